"""Checks the arguments of ``ShardedASGD`` and of ``add_param_group()``, and the hyperparameters before each step.

Every error says what was asked, why it cannot be had, and what to do instead. Errors are raised on this rank; the
caller shares them, so that all ranks raise. Only ``check_new_group`` may communicate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .comm import Communicators
from .placements import dtensor, fsdp1
from .placements.leaves import refuse_sharded, refuse_unready
from .precision_checks import DTYPES, check_average_device, check_kinds, check_rounding
from .storage.memory_order import memory_strides, same_strides
from .storage.precision import Precision
from .update import backend
from .update.weights import AVERAGE_KEY, check_rule

# Whether a parameter has or gets state; the others are frozen.
Held = Callable[[Tensor], bool]
REAL_HYPERPARAMETERS = ("lr", "lambd", "alpha", "t0", "weight_decay")
FLAGS = ("maximize", "differentiable", "capturable")
FORMS = ("foreach", "fused")
# Hyperparameters that groups need not have; None is meant then.
OPTIONAL = ("fused", AVERAGE_KEY)
HYPERPARAMETERS = (*REAL_HYPERPARAMETERS, *FLAGS, *FORMS, AVERAGE_KEY)


def stays_on_device(group: dict[str, Any], key: str) -> bool:
    """Whether a hyperparameter is read by the device only: a learning rate on a GPU, with the fused kernel."""
    value = group[key]
    return bool(group.get("fused")) and isinstance(value, Tensor) and backend.of(value.device) is backend.TRITON


def scalar(value: Any) -> float:
    """A hyperparameter as a float. A Tensor has one element; if it is on a device, this waits for the device."""
    return float(value.item()) if isinstance(value, Tensor) else float(value)


def check_options(
    stage: Any, bucket_cap_mb: Any, flags: Mapping[str, Any], precision: Precision, differentiable: bool
) -> None:
    """Raise ValueError unless the constructor's own options are of their kind and in range; ``flags`` are bool."""
    if stage not in (1, 2) or isinstance(stage, bool):
        raise ValueError(
            f"dist_asgd: stage must be 1 (gradients arrive averaged, as from DDP) or 2 (this optimizer "
            f"reduce-scatters them), got {stage!r}."
        )
    number = isinstance(bucket_cap_mb, (int, float)) and not isinstance(bucket_cap_mb, bool)
    if not number or not 0 < bucket_cap_mb < math.inf:
        raise ValueError(f"dist_asgd: bucket_cap_mb must be a positive number of MiB, got {bucket_cap_mb!r}.")
    for key, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"dist_asgd: {key} must be True or False, got {flag!r}.")
    check_kinds(precision)
    if precision.reduce_dtype is not None and stage != 2:
        raise ValueError(
            "dist_asgd: reduce_dtype with stage=1: gradients arrive reduced there. Pass stage=2, or register one of "
            "DDP's communication hooks (torch.distributed.algorithms.ddp_comm_hooks) and reduce_dtype=None."
        )
    if precision.master_weights and precision.stochastic_rounding is not None:
        raise ValueError(
            "dist_asgd: master_weights=True with stochastic_rounding: masters lose nothing to rounding. Pass one "
            "of them."
        )
    asked = [key for key, value in asdict(precision).items() if value is not None and value is not False]
    if differentiable and asked:
        raise ValueError(
            f"dist_asgd: {asked[0]} with differentiable=True: everything has the parameters' dtype there. Leave "
            f"{asked[0]} out."
        )


def params_of(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """All parameters of ``groups``, in registration order."""
    return [param for group in groups for param in group["params"]]


def named_params(groups: Sequence[dict[str, Any]], index: int) -> list[tuple[str, Tensor]]:
    """A group's parameters with the user's names, or with their position in ``param_groups`` if they have none."""
    params = groups[index]["params"]
    names = groups[index].get("param_names") or [f"param_groups[{index}]['params'][{i}]" for i in range(len(params))]
    return list(zip(names, params, strict=True))


def check_hyperparameters(group: dict[str, Any], where: str, devices: Iterable[torch.device] | None = None) -> None:
    """Raise ValueError unless every hyperparameter of ``group`` is of its kind, finite and in range.

    ``where`` names the group in errors. ``devices`` are those of its parameters; if None, they are looked up. The
    constructor and ``add_param_group`` call this, and so does every step if a hyperparameter was replaced.
    """
    missing = [key for key in HYPERPARAMETERS if key not in group and key not in OPTIONAL]
    if missing:
        raise ValueError(f"dist_asgd: {where} lacks {missing}: set them again, or load a state dict that has them.")
    for key in REAL_HYPERPARAMETERS:
        value = group[key]
        if isinstance(value, Tensor):
            if key != "lr":
                raise ValueError(f"dist_asgd: {where}: {key} must be a number, got a Tensor. Only lr may be one.")
            if value.numel() != 1:
                raise ValueError(f"dist_asgd: {where}: a Tensor lr must have 1 element, got {value.numel()}.")
        elif isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"dist_asgd: {where}: {key} must be a number, got {value!r}.")
        # Reading it here would wait for the device in every step.
        if stays_on_device(group, key):
            continue
        number = scalar(value)
        never = key == "t0" and number == math.inf
        # -1 lets an average begin with the first iterate.
        least = -1 if key == "t0" and AVERAGE_KEY in group else 0
        if number < least or not (math.isfinite(number) or never):
            raise ValueError(f"dist_asgd: {where}: {key} must be finite and >= {least}, got {number}.")
    for key in FLAGS:
        if not isinstance(group[key], bool):
            raise ValueError(f"dist_asgd: {where}: {key} must be True or False, got {group[key]!r}.")
    for key in FORMS:
        if not isinstance(form := group.get(key), bool | None):
            raise ValueError(f"dist_asgd: {where}: {key} must be None, True or False, got {form!r}.")
    _check_fused(group, where, devices)
    check_rule(group, where)
    if group["capturable"] and not group.get("fused"):
        raise ValueError(
            f"dist_asgd: {where}: capturable=True without fused=True: step, eta and mu live on the host then, where a "
            f"CUDA graph does not see them. Pass fused=True (CUDA parameters), or capturable=False: a step does not "
            f"wait for the device anyway."
        )


def _check_fused(group: dict[str, Any], where: str, known: Iterable[torch.device] | None) -> None:
    """Raise ValueError if ``fused=True`` does not fit the other options, or a device has no kernel."""
    if not group.get("fused"):
        return
    for key in ("foreach", "differentiable"):
        if group[key]:
            raise ValueError(
                f"dist_asgd: {where}: fused=True with {key}=True: two forms of the update. Pass one of them."
            )
    devices = {p.device for p in group.get("params", ())} if known is None else set(known)
    if len(devices) > 1 and any(backend.of(device) is not backend.C for device in devices):
        raise ValueError(
            f"dist_asgd: {where}: fused=True with parameters on {', '.join(sorted(map(str, devices)))}: the kernel "
            f"keeps a group's scalars on one device. Make a group for each device, or pass fused=None."
        )
    for device in devices:
        reason = backend.why_unavailable(device)
        if reason is None and AVERAGE_KEY in group and backend.of(device) is backend.TRITON:
            reason = f"the scalars of {device} follow the mean of torch.optim.ASGD only, and average= is another rule"
        if reason is not None:
            raise ValueError(f"dist_asgd: {where}: fused=True, but {reason}. Pass fused=None.")
        if group["capturable"] and backend.of(device) is not backend.TRITON:
            raise ValueError(
                f"dist_asgd: {where}: capturable=True with parameters on {device}: CUDA graphs are captured on GPUs "
                f"only. Pass capturable=False."
            )


def check_mode(group: dict[str, Any], where: str, world_size: int, differentiable: bool, stage: int) -> None:
    """Raise ValueError if ``differentiable`` or ``capturable`` does not fit the group, stage or world size."""
    if group["capturable"] and (world_size > 1 or stage == 2):
        raise ValueError(
            f"dist_asgd: {where}: capturable=True with stage={stage} on {world_size} ranks: a step opens with an "
            f"exchange between hosts, and stage 2 reduces in hooks, neither of which a CUDA graph would replay. Use "
            f"one process and stage=1, or capturable=False."
        )
    if group["differentiable"] != differentiable:
        raise ValueError(
            f"dist_asgd: {where}: differentiable={group['differentiable']}, but the optimizer has "
            f"differentiable={differentiable}. It must be the same for all groups: pass it to the constructor."
        )
    if not differentiable:
        return
    if any(dtensor.is_dtensor(param) or fsdp1.is_managed(param) for param in group["params"]):
        raise ValueError(
            f"dist_asgd: {where}: differentiable=True with sharded parameters (DTensor, FSDP1): the update acts on "
            f"local tensors, which autograd would not follow. Pass differentiable=False, or plain parameters in one "
            f"process."
        )
    if world_size > 1:
        raise ValueError(
            f"dist_asgd: differentiable=True on {world_size} ranks: autograd does not see through the gathering of "
            f"shards. Use one process, or torch.optim.ASGD(differentiable=True) on every rank."
        )
    if group["foreach"]:
        raise ValueError(
            f"dist_asgd: {where}: foreach=True with differentiable=True: foreach operators do not support "
            f"autograd. Pass foreach=None or False."
        )
    if stage == 2:
        raise ValueError(
            "dist_asgd: stage=2 with differentiable=True: stage 2 frees the gradients that autograd would need. "
            "Pass stage=1."
        )


def check_new_group(
    groups: Sequence[dict[str, Any]],
    communicators: Communicators,
    precision: Precision,
    differentiable: bool,
    stage: int,
    held: Held,
) -> None:
    """Raise ValueError unless the last of ``groups`` can be optimized beside the others; called once for each group.

    ``held`` says whether a parameter gets state. The others are frozen and left alone, so that they may be anything.
    Collective on the ranks that make a communicator for a device which is new to the optimizer.
    """
    index = len(groups) - 1
    group, where = groups[index], f"param_groups[{index}]"
    refuse_unready(named_params(groups, index), non_leaves=differentiable)
    check_hyperparameters(group, where, {param.device for param in filter(held, group["params"])})
    check_mode(group, where, communicators.world_size, differentiable, stage)
    if differentiable:
        return
    check_group(groups, index, communicators.ranks, precision, held)
    devices = {
        param.device: name
        for i in range(len(groups))
        for name, param in reversed(named_params(groups, i))
        if held(param) and not (dtensor.is_dtensor(param) or fsdp1.is_managed(param))
    }
    check_accelerators(devices, communicators.world_size, stage, communicators.bound_device)
    for param in filter(held, group["params"]):
        if not (dtensor.is_dtensor(param) or fsdp1.is_managed(param)):
            # A device without a backend is an error now, not at the first step.
            communicators.check_device(param.device)


def check_accelerators(
    devices: Mapping[torch.device, str], world_size: int, stage: int, bound: torch.device | None
) -> None:
    """Raise ValueError if parameters lie on accelerators that this process cannot communicate on, or on too many.

    ``devices`` names one parameter on each device; ``bound`` is the accelerator that the process group was bound to
    by ``init_process_group(device_id=...)``, or None.
    """
    accelerators = {device: name for device, name in devices.items() if device.type != "cpu"}
    if world_size == 1:
        return
    where = ", ".join(f"parameter {name} is on {device}" for device, name in accelerators.items())
    if stage == 2 and len(accelerators) > 1:
        # Each accelerator has a thread of its own in backward, and current streams that the other threads do not see.
        raise ValueError(
            f"dist_asgd: stage=2 with {len(accelerators)} accelerators in one process: {where}. Whichever thread of "
            f"backward completes a bucket sends it, on streams of its own. Run one process for each accelerator, or "
            f"pass stage=1."
        )
    for device, name in accelerators.items():
        if bound is not None and bound.type == device.type and bound != device:
            raise ValueError(
                f"dist_asgd: parameter {name} is on {device}, but the process group is bound to {bound} and refuses to "
                f"communicate elsewhere. Move the parameter, or do not pass device_id to init_process_group()."
            )


def check_group(
    groups: Sequence[dict[str, Any]], index: int, ranks: Sequence[int], precision: Precision, held: Held
) -> None:
    """Raise ValueError unless group ``index`` can be updated as ``precision`` asks, beside the groups before it.

    ``ranks`` are the ranks of the process group, numbered as in the default group.
    """
    named = named_params(groups, index)
    seen: dict[int, str] = {}
    for name, param in named:
        if id(param) in seen:
            raise ValueError(
                f"dist_asgd: parameter {name} is given twice (first as {seen[id(param)]}). Pass each parameter once; "
                f"model.parameters() lists tied weights once."
            )
        seen[id(param)] = name
    named_held = [pair for pair in named if held(pair[1])]
    check_params(named_held)
    known = [pair for i in range(index) for pair in named_params(groups, i)]
    check_apart(
        [*(pair for pair in known if held(pair[1])), *named_held],
        [pair for pair in (*known, *named) if not held(pair[1])],
    )
    check_dtensors(named_held, ranks, precision)
    check_rounding(precision, named_held)
    check_average_device(precision, named_held)


def check_params(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError unless each of the ``named`` parameters can be moved to a bucket, or updated where it is."""
    for name, param in named:
        refuse_sharded(name, param)
        if param.dtype not in DTYPES:
            raise ValueError(
                f"dist_asgd: parameter {name} has dtype {param.dtype}; supported are "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}. Leave it out of the "
                f"optimizer, or keep it in one of these."
            )
        if _has_no_memory(param):
            raise ValueError(
                f"dist_asgd: parameter {name} is a {type(param).__qualname__}, a tensor subclass that keeps its "
                f"elements in other tensors, so it cannot be moved to flat memory. Freeze it (requires_grad_(False)), "
                f"pass a plain parameter, or update it with torch.optim.ASGD."
            )
        if param.layout != torch.strided:
            raise ValueError(f"dist_asgd: parameter {name} is {param.layout}; only dense parameters can be sharded.")
        if param.device.type == "meta":
            raise ValueError(
                f"dist_asgd: parameter {name} is on the meta device. Materialise the model (to_empty() and "
                f"initialisation) before constructing the optimizer."
            )
        if _is_taken_out_of_shared_memory(param):
            raise ValueError(
                f"dist_asgd: parameter {name} is in memory that other processes share (share_memory_(), a "
                f"torch.multiprocessing queue, or a mapped file). The optimizer moves parameters to memory of its own, "
                f"which those processes would not see. Give the model its own copy first (p.data = p.data.clone() for "
                f"each parameter), or use torch.optim.ASGD for training in shared memory (Hogwild)."
            )
        if any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True)):
            raise ValueError(
                f"dist_asgd: parameter {name} of shape {tuple(param.shape)} is an expanded view: its elements share "
                f"memory. Make it contiguous: torch.nn.Parameter(p.detach().contiguous())."
            )


def check_apart(held: Sequence[tuple[str, Tensor]], frozen: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError if a parameter of ``held`` shares memory with another one; two of ``frozen`` may."""
    spans = [(*span, True) for name, param in held for span in _span(name, param)]
    spans += [(*span, False) for name, param in frozen for span in _span(name, param)]
    # In the order of addresses, a parameter shares memory with an earlier one if it does with the one that ends last.
    last: dict[bool, tuple[int, str]] = {}
    for start, stop, name, is_held in sorted(spans):
        for other_stop, other in (entry for kind, entry in last.items() if kind or is_held):
            if start < other_stop:
                raise ValueError(
                    f"dist_asgd: parameters {other} and {name} share memory but are different Parameter objects. Tie "
                    f"weights by using one Parameter in both places. If forward computes one from the other "
                    f"(WeightDrop), pass only the raw weight."
                )
        last[is_held] = max(last.get(is_held, (0, "")), (stop, name))


def _is_taken_out_of_shared_memory(param: Tensor) -> bool:
    # torch calls all CUDA memory shared. Presharded parameters stay in their memory, whatever it is.
    if param.device.type != "cpu" or dtensor.is_dtensor(param) or fsdp1.is_managed(param):
        return False
    return bool(param.is_shared())  # type: ignore[no-untyped-call]


def check_dtensors(named: Sequence[tuple[str, Tensor]], ranks: Sequence[int], precision: Precision) -> None:
    """Raise ValueError if a DTensor cannot be updated where it is, as ``precision`` asks.

    ``ranks`` are the ranks of the process group, numbered as in the default group.
    """
    for name, param in named:
        if not dtensor.is_dtensor(param):
            continue
        problem = dtensor.placement_problem(name, param, ranks, precision.stochastic_rounding is not None)
        local = dtensor.local_tensor(param)
        if problem is None and not same_strides(local, memory_strides(local)):
            problem = (
                f"the local tensor of parameter {name}, of shape {tuple(local.shape)} and strides {local.stride()}, is "
                f"not dense in memory. Make it contiguous before constructing the optimizer."
            )
        if problem is not None:
            raise ValueError(f"dist_asgd: {problem}")


def _has_no_memory(param: Tensor) -> bool:
    """Whether ``param`` is a wrapper subclass, which has no memory of its own (quantised or scaled weights)."""
    return is_traceable_wrapper_subclass(param) and not dtensor.is_dtensor(param)


def has_memory(param: Tensor) -> bool:
    """Whether the elements of ``param``, a plain tensor, can be read in memory of its own."""
    strided = param.layout == torch.strided and param.device.type != "meta"
    return strided and not _has_no_memory(param) and not param.is_quantized


def _span(name: str, param: Tensor) -> list[tuple[int, int, str]]:
    """The addresses (first byte, one past the last) of a parameter's memory on this rank, with its name."""
    param = dtensor.local_tensor(param) if dtensor.is_dtensor(param) else param
    if not has_memory(param) or not param.numel():
        return []
    extent = sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True)) + 1
    return [(param.data_ptr(), param.data_ptr() + extent * param.element_size(), name)]


def hyperparameters(group: dict[str, Any]) -> tuple[tuple[str, object], ...]:
    """The hyperparameters of ``group`` as plain values. The fingerprint that ranks compare is made of them."""
    plain: list[tuple[str, object]] = [
        (key, "on the device" if stays_on_device(group, key) else scalar(group[key])) for key in REAL_HYPERPARAMETERS
    ]
    options = [(AVERAGE_KEY, str(group[AVERAGE_KEY].options()))] if AVERAGE_KEY in group else []
    return (*plain, *((key, group.get(key)) for key in (*FLAGS, *FORMS)), *options)
