"""A device that is pretended on the CPU, and tells where the host would wait for it if it were a GPU.

``PretendedTensor`` reports the device ``pretended:0`` and holds a CPU tensor with real values. Every operator on it is
seen, and those that CUDA can only run by waiting for the device are noted with the line of the package that asked for
them: reading a value, copies in either direction (but not from pinned memory with ``non_blocking``), and operators
whose result has a size that depends on values. ``python -m tests.harness.pretended_device`` runs optimizers on it and
prints what was noted; a process of its own, because a process can register one such device for good.

What it cannot see: waits inside of one operator of torch's CUDA library that the rules below do not name, waits for
memory (a first allocation of pinned memory), what NCCL does, and the order of streams.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

import dist_asgd
from dist_asgd import GradScaler, ShardedASGD, ShardedAverage, validation
from dist_asgd.comm.streams import Stream
from dist_asgd.storage import average, published
from dist_asgd.update import offload

PACKAGE = str(Path(dist_asgd.__file__).parent)
NAME = "pretended"
# Their results have sizes that depend on values, or are values on the host.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "unique_consecutive",
    "_unique2",
    "bincount",
    "repeat_interleave",
}


class Notes:
    """Where the host has waited, as ``file:line operator``, since the last ``take``; and which tensors are pinned."""

    def __init__(self) -> None:
        self._waits: list[str] = []
        # By address of the storage; kept, so that no other one gets it.
        self._pinned: dict[int, Tensor] = {}

    def add(self, what: str) -> None:
        """Note that the innermost line of the package waits for the device by ``what``."""
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
        place = f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].lineno}" if frames else "outside"
        self._waits.append(f"{place} {what}")

    def take(self) -> list[str]:
        """What was noted since the last call."""
        waits, self._waits = self._waits, []
        return waits

    def pin(self, tensor: Tensor) -> Tensor:
        """What ``pin_memory`` returns: a copy that is known to be pinned."""
        copy = tensor.clone()
        self._pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether ``pin`` has made the memory of the tensor."""
        return tensor.untyped_storage().data_ptr() in self._pinned


NOTES = Notes()


class PretendedTensor(torch.Tensor):
    """A tensor on the pretended device; ``inner`` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendedTensor:
        """Wrap ``inner``, whose memory the tensor shares."""
        made: PretendedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{NAME}:0",
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` on the values, and note it if the host would wait."""
        return _run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        """The address of the values."""
        return self.inner.data_ptr()


class PretendedDevice(TorchDispatchMode):
    """Makes tensors that are created on the device; operators on them come here first."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; on the host as ever if no operand and no result is on the device."""
        return _run(func, args, kwargs or {})


def _is_pretended(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    found: list[Tensor] = []
    tree_map(lambda x: found.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
    ours = [x for x in found if isinstance(x, PretendedTensor)]
    device = kwargs.get("device")
    if not ours and not _is_pretended(device):
        return func(*args, **kwargs)
    name = func.overloadpacket._qualified_op_name.partition("::")[2]
    _note_waits(name, args, kwargs, found, ours)
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, PretendedTensor) else x, (args, kwargs))
    if "device" in kwargs:
        inner_kwargs["device"] = torch.device("cpu")
    inner_kwargs.pop("pin_memory", None)
    result = func(*inner_args, **inner_kwargs)
    if name == "_to_copy" and device is not None and not _is_pretended(device):
        return result
    result = tree_map(lambda x: PretendedTensor(x) if type(x) is Tensor else x, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if func._schema.is_mutable else result


def _note_waits(name: str, args: Any, kwargs: dict[str, Any], found: Sequence[Tensor], ours: Sequence[Tensor]) -> None:
    if name in WAITING:
        NOTES.add(name)
    elif name in ("index", "index_put_", "index_put", "_index_put_impl_"):
        if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            NOTES.add(f"{name} by a mask")
    elif name in ("_to_copy", "copy_"):
        source = args[1] if name == "copy_" else args[0]
        to_host = (
            not isinstance(args[0], PretendedTensor)
            if name == "copy_"
            else not _is_pretended(kwargs.get("device") or args[0].device)
        )
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if isinstance(source, PretendedTensor) and to_host:
            if blocking or name != "copy_" or not NOTES.is_pinned(args[0]):
                NOTES.add("copy to the host")
        elif not isinstance(source, PretendedTensor) and (blocking or not NOTES.is_pinned(source)):
            NOTES.add("copy from the host")
    elif name == "where" and len(ours) < len(found):
        NOTES.add("where with a number, which is copied to the device")
    elif not name.endswith("_like") and any(x.dim() for x in found if not isinstance(x, PretendedTensor)):
        NOTES.add(f"{name} mixes devices")


def _refuse_dlpack(_: Tensor) -> Any:
    raise BufferError("the pretended device has no DLPack")


class _NoKernel:
    """In the place of a Triton kernel: launching it does nothing."""

    def __getitem__(self, _: Any) -> Callable[..., None]:
        return lambda *_, **__: None


def _empty_strided(size: Any, stride: Any, **kwargs: Any) -> Tensor:
    """Memory for ``torch.tensor(values, device=...)``, which torch makes below all modes."""
    return PretendedTensor(torch.empty_strided(size, stride, dtype=kwargs.get("dtype"), device="cpu"))


def _copy_from(source: Tensor, target: Tensor, _non_blocking: bool = False) -> Tensor:
    """The values that ``torch.tensor(values, device=...)`` brings there."""
    NOTES.add("copy from the host")
    assert isinstance(target, PretendedTensor)
    target.inner.copy_(source)
    return target


def register() -> None:
    """Make torch know the device; once a process."""
    from torch.utils import backend_registration

    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, tensors can be made on the device, and ``fused=True`` plans Triton kernels that do nothing."""
    from dist_asgd.update import backend, cuda

    with (
        mock.patch.object(backend, "of", lambda device: backend.TRITON if device.type == NAME else backend.C),
        mock.patch.object(cuda, "update_kernel", _NoKernel()),
        mock.patch.object(cuda, "advance_kernel", _NoKernel()),
        mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: NOTES.pin(tensor)),
        mock.patch.object(published, "to_dlpack", _refuse_dlpack),
        PretendedDevice(),
    ):
        yield


def params_on_device(num: int = 8, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Parameters of 4,096 elements."""
    return [torch.nn.Parameter(torch.full((4096,), 1.0 + i, dtype=dtype, device=NAME)) for i in range(num)]


FORMS: dict[str, dict[str, Any]] = {
    "foreach": {"foreach": True},
    "forloop": {"foreach": False, "fused": False},
    "fused": {"fused": True},
}
MODES: dict[str, dict[str, Any]] = {
    "one process, stage 1": {"stage": 1},
    "one process, stage 2": {"stage": 2},
    "ranks, stage 1": {"stage": 1, "ranks": True},
    "ranks, stage 2": {"stage": 2, "ranks": True},
    "ranks, hybrid": {"stage": 2, "ranks": True, "mesh": (2, 2)},
    "ranks, masters": {"stage": 2, "ranks": True, "dtype": torch.bfloat16, "master_weights": True},
    "ranks, stochastic": {"stage": 2, "ranks": True, "dtype": torch.bfloat16, "stochastic_rounding": 1},
}


def watch(mode: str, form: str) -> dict[str, list[str]]:
    """What each call of six steps waits for; in some steps other parameters have gradients than in the one before."""
    own = dict(MODES[mode])
    ranks, shape, dtype = own.pop("ranks", False), own.pop("mesh", None), own.pop("dtype", torch.float32)
    if ranks:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group(f"cpu:fake,{NAME}:fake", rank=1, world_size=4, store=FakeStore())
    try:
        if shape is not None:
            names = ("replicate", "shard")
            ranks_of = torch.arange(4).view(shape)
            own["mesh"] = dist.DeviceMesh(NAME, ranks_of, mesh_dim_names=names, _init_backend=False, _rank=1)
        with pretended_gpu():
            return _watch_steps(own | FORMS[form], dtype)
    finally:
        if ranks:
            dist.destroy_process_group()


def _watch_steps(options: dict[str, Any], dtype: torch.dtype) -> dict[str, list[str]]:
    params = params_on_device(dtype=dtype)
    optimizer = ShardedASGD(params, lr=1e-3, t0=2, bucket_cap_mb=0.05, **options)
    found: dict[str, list[str]] = {}
    for step in range(6):
        used = params[4:] if step in (2, 4) else params

        def backward(used: list[torch.nn.Parameter] = used) -> None:
            sum(p.sum() for p in used).backward()  # type: ignore[union-attr]

        calls: dict[str, Callable[[], object]] = {
            "backward": backward,
            "clip": lambda: optimizer.clip_grad_norm_(1.0),
            "step": optimizer.step,
            "zero_grad": optimizer.zero_grad,
        }
        for name, call in calls.items():
            NOTES.take()
            call()
            found.setdefault(f"first {name}" if not step else name, []).extend(NOTES.take())
    return found


def watch_scaler(form: str, stage: int) -> dict[str, list[str]]:
    """What the calls of ``dist_asgd.GradScaler`` wait for, with clipping."""
    with pretended_gpu():
        params = params_on_device(4)
        optimizer = ShardedASGD(params, lr=1e-3, stage=stage, **FORMS[form])
        scaler = GradScaler("cpu", init_scale=4.0)
        scaler._lazy_init_scale_growth_tracker(torch.device(NAME))
        found: dict[str, list[str]] = {}
        for step in range(3):
            (sum(p.sum() for p in params) * scaler._scale).backward()
            calls: dict[str, Callable[[], object]] = {
                "scaler.unscale_": lambda: scaler.unscale_(optimizer),
                "clip": lambda: optimizer.clip_grad_norm_(1.0),
                "scaler.step": lambda: scaler.step(optimizer),
                "scaler.update": scaler.update,
                "zero_grad": optimizer.zero_grad,
            }
            for name, call in calls.items():
                NOTES.take()
                call()
                if step:
                    found.setdefault(name, []).extend(NOTES.take())
    return found


def watch_average(form: str) -> dict[str, list[str]]:
    """What entering and leaving ``averaged_parameters()`` waits for."""
    with pretended_gpu():
        params = params_on_device()
        optimizer = ShardedASGD(params, lr=1e-3, t0=0, **FORMS[form])
        for _ in range(3):
            sum(p.sum() for p in params).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        NOTES.take()
        with optimizer.averaged_parameters():
            pass
    return {"averaged_parameters": NOTES.take()}


class _PinnedMemory:
    """In the place of page-locked memory."""

    def __init__(self, sizes_bytes: Sequence[int]) -> None:
        self.tensors = [NOTES.pin(torch.zeros(size, dtype=torch.uint8, device="cpu")) for size in sizes_bytes]

    def holds(self, tensor: Tensor) -> bool:
        """As of ``PinnedMemory``."""
        return True

    def used_by(self, streams: Sequence[Stream]) -> None:
        """Memory of Python's is freed when nobody has it any more."""


def watch_offload(foreach: bool | None, dtype: torch.dtype) -> dict[str, list[str]]:
    """What ``update()`` of averages in host memory waits for, and a read of them."""
    with (
        pretended_gpu(),
        mock.patch.object(average, "PinnedMemory", _PinnedMemory),
        mock.patch.object(offload, "SideStream", return_value=Stream()),
        mock.patch.object(validation, "check_average_device", return_value=None),
    ):
        params = params_on_device(8, dtype)
        host, beside = (
            ShardedAverage(params, decay=0.5, foreach=foreach, average_device=place) for place in ("cpu", None)
        )
        found: dict[str, list[str]] = {}
        for step in range(4):
            NOTES.take()
            host.update()
            found.setdefault("first update" if step == 0 else "update", []).extend(NOTES.take())
            beside.update()
            with torch.no_grad():
                for param in params:
                    host.wait_for_parameters()
                    param.mul_(1.5)
        for param in params:
            assert torch.equal(host.state[param]["ax"], beside.state[param]["ax"].cpu())
    return found


def cases() -> dict[str, Callable[[], dict[str, list[str]]]]:
    """All cases by name."""
    found: dict[str, Callable[[], dict[str, list[str]]]] = {}
    for form in FORMS:
        # Apart from the update, the implementations of torch's operators take the same way.
        for mode in MODES if form != "forloop" else ("one process, stage 1", "ranks, masters", "ranks, stochastic"):
            found[f"{mode}, {form}"] = partial(watch, mode, form)
        for stage in (1, 2):
            found[f"scaler, stage {stage}, {form}"] = partial(watch_scaler, form, stage)
        found[f"average, {form}"] = partial(watch_average, form)
    for foreach in (None, False):
        for dtype in (torch.float32, torch.bfloat16):
            found[f"host memory, {dtype}, foreach={foreach}"] = partial(watch_offload, foreach, dtype)
    return found


def main() -> None:
    """Print a line for each case: its name, and as JSON what each call waits for."""
    register()
    torch.set_num_threads(1)
    for name, case in cases().items():
        try:
            outcome: Any = case()
        except Exception:
            outcome = {"failed": [traceback.format_exc()]}
        print(name, json.dumps(outcome), sep="\t", flush=True)


if __name__ == "__main__":
    main()
