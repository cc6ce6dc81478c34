"""Hooks on parameters, by which stage 2 learns during backward whose gradient has come, and whose is complete.

complete    every hook on the parameter has run, those of the user included, whichever was registered first: autograd
            has come to the hook of another parameter in the same thread, or to the end of the backward
task        one call of backward, as autograd numbers them; a backward inside another (reentrant activation
            checkpointing) is a task of its own
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor

from ..comm import public_call
from ..storage.buffers import BucketParam


class GradientListener(Protocol):
    """Who is told about gradients (the reducer); all methods are called under a lock, on a thread of autograd."""

    def before_gradient(self, index: int) -> None:
        """Backward is about to add to ``p.grad`` of parameter ``index``."""

    def note_gradient(self, index: int) -> None:
        """Backward has added to ``p.grad`` of parameter ``index``; other hooks on the parameter may be yet to run."""

    def note_complete(self, index: int) -> None:
        """All hooks on parameter ``index`` have run: its ``p.grad`` may be taken away."""

    def note_end(self, busy: set[int]) -> None:
        """A backward has ended, with all hooks; other threads add to the ``busy`` parameters, or run hooks on them."""


class BackwardHooks:
    """The hooks of one listener. They keep neither it nor themselves alive, as parameters outlive optimizers.

    A lock lets one thread in at a time: autograd has a thread for each device, and users may have several of theirs.
    If backwards of several threads overlap, ``note_complete`` is not called any more, as no thread can know whether
    another one is just adding to the gradient that it would take. ``step()`` then reduces all gradients.
    """

    def __init__(self, listener: GradientListener) -> None:
        self._listener = weakref.ref(listener)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # Autograd's nodes that accumulate gradients: a parameter does not keep its own alive.
        self._nodes: list[torch.autograd.graph.Node] = []
        weakref.finalize(self, _remove, self._handles)
        self._lock = threading.RLock()
        # By thread: the task and the index of the parameter whose hooks are running, or ran last.
        self._latest: dict[int, tuple[int, int]] = {}
        # By thread: the parameter whose gradient is being added to.
        self._adding: dict[int, int] = {}
        # The tasks whose end is still to come, with the thread in which each had its first gradient; empty after them.
        self.tasks: dict[int, int] = {}
        self._threads_overlap = False

    def register(self, members: Sequence[BucketParam]) -> None:
        """Put hooks on the parameters of ``members``, in place of those of an earlier call."""
        _remove(self._handles)
        self._nodes.clear()
        for member in members:
            # On the node, because a hook on the tensor would also run in torch.autograd.grad(), which adds nothing.
            node = torch.autograd.graph.get_gradient_edge(member.param).node
            self._nodes.append(node)
            self._handles.append(node.register_prehook(partial(_before_gradient, weakref.ref(self), member.index)))
            hook = partial(_on_gradient, weakref.ref(self), member.index)
            self._handles.append(member.param.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Forget the gradients of backwards that have ended, with an error perhaps; called before collective calls."""
        with self._lock:
            self._latest.clear()
            self._adding.clear()
            self.tasks.clear()

    @public_call
    def before_gradient(self, index: int) -> None:
        """Called by autograd before it adds to the gradient of parameter ``index``."""
        task, thread = torch._C._current_graph_task_id(), threading.get_ident()
        with self._lock:
            listener = self._listener()
            if listener is None:
                return
            if task >= 0:
                if task not in self.tasks:
                    self._begin(task, thread)
                self._adding[thread] = index
            listener.before_gradient(index)

    @public_call
    def on_gradient(self, index: int) -> None:
        """Called by autograd, or by whoever calls the hooks of parameters by hand: then no end of a task will come."""
        task, thread = torch._C._current_graph_task_id(), threading.get_ident()
        with self._lock:
            listener = self._listener()
            if listener is None:
                return
            if task < 0:
                listener.note_gradient(index)
                return
            before = self._latest.get(thread)
            self._latest[thread] = task, index
            self._adding.pop(thread, None)
            if task not in self.tasks:
                self._begin(task, thread)
            listener.note_gradient(index)
            if before is not None and not self._threads_overlap:
                listener.note_complete(before[1])

    def running(self) -> set[int]:
        """The parameters some of whose hooks may be yet to run: their ``p.grad`` has to stay for them."""
        return {index for _, index in self._latest.values()}

    def _begin(self, task: int, thread: int) -> None:
        self._threads_overlap |= any(other != thread for other in self.tasks.values())
        self.tasks[task] = thread
        end = partial(_on_end, weakref.ref(self), task)
        torch.autograd.Variable._execution_engine.queue_callback(end)

    @public_call
    def on_end(self, task: int) -> None:
        """Called by autograd at the end of a task that has not failed; the stream is that of the backward's caller."""
        with self._lock:
            listener = self._listener()
            self.tasks.pop(task, None)
            for thread, (latest, index) in list(self._latest.items()):
                if latest == task:
                    del self._latest[thread]
                    if listener is not None and not self._threads_overlap:
                        listener.note_complete(index)
            if listener is not None:
                listener.note_end(self.running() | set(self._adding.values()))


def _before_gradient(hooks: weakref.ref[BackwardHooks], index: int, _: tuple[Tensor, ...]) -> None:
    owner = hooks()
    if owner is not None:
        owner.before_gradient(index)


def _on_gradient(hooks: weakref.ref[BackwardHooks], index: int, _: Tensor) -> None:
    owner = hooks()
    if owner is not None:
        owner.on_gradient(index)


def _on_end(hooks: weakref.ref[BackwardHooks], task: int) -> None:
    owner = hooks()
    if owner is not None:
        owner.on_end(task)


def _remove(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def is_nested() -> bool:
    """Whether the caller, a hook of autograd on the CPU, runs in a backward that another backward has called."""
    calls = (torch.autograd.backward.__code__, torch.autograd.grad.__code__)
    frame: FrameType | None = inspect.currentframe()
    found = 0
    while frame is not None and found < 2:
        found += frame.f_code in calls
        frame = frame.f_back
    return found > 1
