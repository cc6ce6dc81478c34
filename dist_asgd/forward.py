"""The forward after a step, which may begin before the gathers of that step have ended: ``overlap_forward(module)``.

``step()`` leaves the gathers of buckets in flight, and whoever reads a parameter waits for that of its bucket. A call
of a module waits in a forward pre-hook. Everybody else reads a parameter of a module from ``module._parameters``: a
parent that uses the weight of a child, ``parameters()``, ``state_dict()``, ``to()``, ``functional_call()``, the user.
So while parameters of a module are in flight, a dict that waits stands there, and the first to read puts the module's
own one back. What cannot be noticed is a read of a parameter that somebody has taken from the module before, and kept.

owner    a module that has parameters in buckets itself, not in its submodules
key      the id of a bucket
covered  a parameter with owners below the modules that ``overlap_forward()`` was called for, whose reads are noticed
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .comm import Communicators, public_call
from .gather import Arrivals, Gatherer
from .state import ParamShards
from .storage.buffers import Bucket
from .update.plan import Plan


def _of_own(name: str) -> Any:
    """The method ``name`` of the module's own dict, after the parameters have arrived."""

    def call(self: ParametersInFlight, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.arrive(), name)(*args, **kwargs)

    return call


class ParametersInFlight(dict[str, Any]):
    """Stands in the place of ``module._parameters`` until somebody reads a parameter there, and waits then.

    It has no entries of its own: what reads them past these methods (guards of compiled code) finds none, and not one
    that has not arrived. Names, their number and whether there is one can be read without a wait. ``arrivals`` are the
    gathers in flight, and ``keys`` those of the buckets that ``module`` has parameters in. ``own`` is the module's own
    dict, or one that waits for another optimizer.
    """

    def __init__(self, module: nn.Module, own: dict[str, Any], arrivals: Arrivals, keys: frozenset[int]) -> None:
        super().__init__()
        self.own = own
        self._module = weakref.ref(module)
        self._arrivals = arrivals
        self._keys = keys

    def arrive(self) -> dict[str, Any]:
        """Wait for the parameters, and put the module's own dict back in its place; returns that."""
        self._arrivals.wait_for(self._keys)
        module = self._module()
        if module is not None and module._parameters is self:
            _put(module, self.own)
        return self.own

    def is_of(self, arrivals: Arrivals) -> bool:
        """Whether it waits for these."""
        return self._arrivals is arrivals

    def __contains__(self, name: object) -> bool:
        return name in self.own

    def __len__(self) -> int:
        return len(self.own)

    def keys(self) -> Any:
        """As in a dict."""
        return self.own.keys()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and files get the module's own dict."""
        return dict, (self.arrive(),)

    __iter__ = _of_own("__iter__")
    __getitem__ = _of_own("__getitem__")
    __setitem__ = _of_own("__setitem__")
    __delitem__ = _of_own("__delitem__")
    __eq__ = _of_own("__eq__")
    __ne__ = _of_own("__ne__")
    __or__ = _of_own("__or__")
    __ror__ = _of_own("__ror__")
    __ior__ = _of_own("__ior__")
    get = _of_own("get")
    items = _of_own("items")
    values = _of_own("values")
    copy = _of_own("copy")
    pop = _of_own("pop")
    popitem = _of_own("popitem")
    setdefault = _of_own("setdefault")
    update = _of_own("update")
    clear = _of_own("clear")


def _put(module: nn.Module, parameters: dict[str, Any]) -> None:
    # Past __setattr__, in which torch and subclasses look for parameters and buffers of that name.
    module.__dict__["_parameters"] = parameters


def _without(arrivals: Arrivals, parameters: dict[str, Any]) -> dict[str, Any]:
    """``parameters`` of a module without a dict that waits for ``arrivals``."""
    if not isinstance(parameters, ParametersInFlight):
        return parameters
    parameters.own = _without(arrivals, parameters.own)
    return parameters.own if parameters.is_of(arrivals) else parameters


class ArrivalHook:
    """The forward pre-hook of owners: a module is called once its parameters have arrived.

    ``whole``: the hook of a compiled module, in which no hooks of submodules run, so that all below have to arrive.
    ``calls`` are the modules that were called, in the order of their first calls, or None if nobody wants to know.
    """

    def __init__(self, whole: bool) -> None:
        self.whole = whole
        self.calls: dict[int, int] | None = None
        self.on_cuda = False

    def __call__(self, module: nn.Module, _: Any) -> None:
        _before_call(self, module)

    def __reduce__(self) -> Any:
        """In copies and files of a module it is a function that does nothing, and for which nothing has to be there."""
        return getattr, (nullcontext(), "__exit__")


@public_call
def _before_call(hook: ArrivalHook, module: nn.Module) -> None:
    if hook.calls is not None:
        hook.calls.setdefault(id(module), len(hook.calls))
    if hook.on_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"dist_asgd: a CUDA graph captures a call of {type(module).__name__}, which overlap_forward() was called "
            f"for: in a replay nobody would wait for its parameters. Leave overlap_forward() out, or capture other "
            f"modules only."
        )
    for each in module.modules() if hook.whole else (module,):
        parameters = each._parameters
        while isinstance(parameters, ParametersInFlight):
            parameters = parameters.arrive()


class Owner(NamedTuple):
    """An owner, the keys of its buckets, and the module whose call it is part of: itself, or a compiled one above."""

    module: nn.Module
    keys: frozenset[int]
    called: nn.Module


class ForwardOverlap:
    """Decides for one optimizer in which order buckets are updated and gathered, and who waits for which.

    Without a module, in one process, among ranks that share memory, and for the local tensors of replica groups,
    ``step()`` waits for all gathers. The modules belong to the caller: one that is deleted counts no more.
    """

    def __init__(self, shards: ParamShards, communicators: Communicators, gatherer: Gatherer) -> None:
        self._shards = shards
        self._communicators = communicators
        self._gatherer = gatherer
        self._modules: list[weakref.ref[nn.Module]] = []
        self._is_wanted = False
        self._hooks = {whole: ArrivalHook(whole) for whole in (False, True)}
        self._handles: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()
        # Weak, because shards that are built anew must not find the memory of the old ones taken.
        self._buckets: list[weakref.ref[Bucket]] = []
        # The keys of buckets, by the id of each parameter.
        self._key_of: dict[int, int] = {}
        # The place of each bucket in the order of the forward, by its key; None until ranks have agreed on one.
        self._places: dict[int, int] | None = None
        own = weakref.ref(shards)
        gatherer.arrivals.on_failure = lambda: _tear(own())

    def __del__(self) -> None:
        """Take the hooks away, unless modules still have to wait."""
        if not self._gatherer.arrivals.keys:
            for handle in self._handles.values():
                handle.remove()

    @staticmethod
    def problem(module: nn.Module, params: Sequence[Tensor]) -> Exception | None:
        """What is wrong with ``module`` for an optimizer of ``params``; None if nothing is."""
        if not isinstance(module, nn.Module):
            return TypeError(
                f"dist_asgd: overlap_forward() got a {type(module).__name__}. Pass the torch.nn.Module whose forward "
                f"comes after step()."
            )
        ids = {id(param) for param in params}
        if not any(id(param) in ids for param in module.parameters()):
            return ValueError(
                f"dist_asgd: overlap_forward() got a {type(module).__name__} that has none of this optimizer's "
                f"parameters, so that nothing would wait for them. Pass the model that the optimizer was constructed "
                f"for."
            )
        return None

    def add(self, module: nn.Module) -> None:
        """Let calls of ``module`` and of all below it wait from the next step on. The same call on all ranks."""
        self._is_wanted = True
        if all(known() is not module for known in self._modules):
            self._modules.append(weakref.ref(module))
        self._restart()
        if self._sends:
            for owner in self._survey()[0]:
                self._hook(owner.called)

    @property
    def _sends(self) -> bool:
        """Whether gathers may be left in flight; the same on all ranks.

        In memory that ranks share nothing travels by itself: others would wait for this rank's forward.
        """
        devices = {bucket.device for bucket in self._shards.buckets} if self._is_wanted else ()
        sends = self._is_wanted and self._communicators.num_shards > 1
        return sends and all(self._communicators.on(device).in_background for device in devices)

    def _hook(self, module: nn.Module) -> None:
        if module not in self._handles:
            # Before other hooks, which may read parameters.
            hook = self._hooks[_is_compiled(module)]
            self._handles[module] = module.register_forward_pre_hook(hook, prepend=True)

    def _survey(self) -> tuple[list[Owner], set[int]]:
        """All owners as modules are now, parents first, and the ids of the parameters that nobody reads unnoticed."""
        owners: list[Owner] = []
        covered: set[int] = set()
        unnoticed: set[int] = set()
        seen: set[nn.Module] = set()
        waiting: list[tuple[nn.Module, nn.Module | None]] = []
        waiting += [(module, None) for known in reversed(self._modules) if (module := known()) is not None]
        key_of = self._key_of
        # Every step walks through all modules, as they may have become others: so this loop is not written for beauty.
        while waiting:
            module, compiled = waiting.pop()
            if module in seen:
                continue
            seen.add(module)
            if compiled is None and _is_compiled(module):
                compiled = module
            if children := module._modules:
                waiting += [(child, compiled) for child in reversed(children.values()) if child is not None]
            parameters: dict[str, Any] = module._parameters
            if not parameters:
                continue
            while type(parameters) is ParametersInFlight:
                parameters = parameters.own
            ids = list(map(id, parameters.values()))
            if type(parameters) is not dict and type(parameters) is not OrderedDict:
                # That of a scripted module, for example, whose forward is not Python's.
                unnoticed.update(ids)
                continue
            covered.update(ids)
            if keys := frozenset([key_of[i] for i in ids if i in key_of]):
                owners.append(Owner(module, keys, module if compiled is None else compiled))
        return owners, covered - unnoticed

    # --- the order --------------------------------------------------------------------------------------------

    def _restart(self) -> None:
        """Forget the order of calls, and note that of the next forward."""
        buckets = self._shards.buckets
        self._buckets = [weakref.ref(bucket) for bucket in buckets]
        self._key_of = {id(member.param): id(bucket) for bucket in buckets for member in bucket.members}
        self._places = None
        self._note_calls({} if self._sends else None)

    def _note_calls(self, calls: dict[int, int] | None) -> None:
        for hook in self._hooks.values():
            hook.calls = calls
            hook.on_cuda = self._shards.on_cuda

    def agree(self, active: frozenset[int]) -> None:
        """Take the order of buckets from the forward of rank 0, if there is no order for these buckets yet.

        Called in every step with the ``active`` parameters, which are the same on all ranks. Collective in the first
        one that has any, and in the next ones while no module was called on rank 0.
        """
        if not self._sends or not active:
            return
        buckets = self._shards.buckets
        if len(buckets) != len(self._buckets) or any(a is not b() for a, b in zip(buckets, self._buckets, strict=True)):
            self._restart()
        if self._places is not None:
            return
        host, own = self._communicators.host, self._order_of_calls()
        # The others have nothing to say: the largest is that of rank 0.
        known, *order = host.largest(own if host.rank == 0 else [-1] * len(own))
        if known < 0:
            # In a group that moves nothing (torch's `fake` backend) nobody hears of rank 0.
            known, *order = own
        if known:
            self._places = {id(buckets[i]): place for place, i in enumerate(order)}
            self._note_calls(None)

    def _order_of_calls(self) -> list[int]:
        """Whether a module was called, and the positions of all buckets in the order in which calls need them."""
        calls = self._hooks[False].calls or {}
        owners, covered = self._survey()
        first_call: dict[int, int] = {}
        last = 0
        for owner in owners:
            # One that is not called, as a parent reads its parameters, comes with the module before it.
            last = calls.get(id(owner.called), last)
            for key in owner.keys:
                first_call[key] = min(first_call.get(key, last), last)
        places: list[tuple[int, int]] = []
        for position, bucket in enumerate(self._shards.buckets):
            # step() itself waits for buckets that are not covered, which so have the time of the others' update.
            known = all(id(member.param) in covered for member in bucket.members)
            # Of those that one module needs, the last in the order of backward comes first.
            places.append((first_call[id(bucket)] if known else -1, -position))
        return [int(bool(calls)), *sorted(range(len(places)), key=places.__getitem__)]

    def in_order(self, plan: Plan) -> Plan:
        """The entries of ``plan`` in the order in which the next forward needs their parameters."""
        places = self._places
        return plan if places is None else sorted(plan, key=lambda entry: places.get(id(entry[0]), len(places)))

    # --- the end of a step ------------------------------------------------------------------------------------

    def end_step(self) -> None:
        """Wait for the gathers that no module waits for, and leave the others to modules."""
        arrivals = self._gatherer.arrivals
        if not self._sends or not arrivals.keys:
            self._gatherer.wait()
            return
        self._gatherer.wait_among_replicas()
        in_flight = set(arrivals.keys)
        owners, covered = self._survey()
        buckets = [bucket for bucket in self._shards.buckets if id(bucket) in in_flight]
        arrivals.wait_for({id(b) for b in buckets if any(id(member.param) not in covered for member in b.members)})
        left = set(arrivals.keys)
        params = {id(bucket): [m.param for m in bucket.members] for bucket in buckets if id(bucket) in left}
        arrivals.defer(params, {bucket.device for bucket in buckets})
        for owner in owners:
            if owner.keys.isdisjoint(left):
                continue
            self._hook(owner.called)
            # What stands there since the last step, because nobody has read it, waits for nothing any more.
            own = _without(arrivals, owner.module._parameters)
            _put(owner.module, ParametersInFlight(owner.module, own, arrivals, owner.keys))


def _is_compiled(module: nn.Module) -> bool:
    """Whether calls of ``module`` run compiled code, in which hooks of submodules would break the graph."""
    return module.__dict__.get("_compiled_call_impl") is not None or "_orig_mod" in module._modules


def _tear(shards: ParamShards | None) -> None:
    """Note that parameters may be torn: a gather of the last step has failed, or the wait for it was interrupted."""
    if shards is not None:
        shards.torn_by = "step()"
