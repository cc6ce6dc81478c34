"""The bytes that one rank holds in each mode, laid out by the optimizer's own classes on the meta device.

The rank is the first one, which never holds less than another: shards are equal, and DTensors are cut into chunks of
which the first is the longest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import memory
from ..gather import MAX_PACKED
from ..gradients.scratch import scratch_bytes
from ..gradients.sending import MAX_IN_FLIGHT, direct_numel
from ..gradients.transfers import MAX_LAUNCHED
from ..placements.dtensor import chunk_of
from ..placements.presharded_buffers import fill_state_buffers
from ..storage.bucketing import build_buckets, reduce_order
from ..storage.buffers import Bucket, StateBuffer
from ..storage.layout import BucketLayout, bucket_cap_bytes, lay_out, min_buckets
from ..storage.send_layout import DIRECT_BYTES, send_runs
from ..update import cpu
from ..update.offload import scratch_bytes as scratch_bytes_of
from ..update.operators import scratch_uses, tile_numel
from ..update.segments import KernelDtypes
from .gloo_buffers import gloo_bytes
from .setup import Setup
from .shapes import ModelShapes, ParamShape


@dataclass(frozen=True, slots=True)
class RankBytes:
    """The bytes on one rank.

    Attributes:
        parameters: The parameters that this rank holds, padding included, as in ``MemoryReport.parameter_bytes``.
        padding: Those of ``parameters`` that belong to no parameter.
        unmanaged: Frozen parameters and buffers of the model, of which the optimizer holds nothing.
        gradients: Gradients between backward and ``zero_grad()``, as in ``MemoryReport.gradient_bytes``.
        average: This rank's shards of ``ax``, and of the averages beside the optimizer, once averaging has begun.
        masters: This rank's shards of float32 masters, without what 16-bit parameters hold of them.
        buffers: What the optimizer keeps between steps to send and to update, as in ``MemoryReport.in_flight_bytes``.
        passing: What is there for a part of a step, of the optimizer and of others: gradients that were not sent yet,
            the buffers of DDP, the parameters that FSDP2 gathers, intermediate results of torch's foreach operators.
        host: Averages beside the optimizer that lie in host memory; no part of ``total``.
    """

    parameters: int = 0
    padding: int = 0
    unmanaged: int = 0
    gradients: int = 0
    average: int = 0
    masters: int = 0
    buffers: int = 0
    passing: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """Add all of them up. It is an upper bound of the peak, as not all of ``passing`` is there at one time."""
        counted = self.parameters + self.unmanaged + self.gradients + self.average + self.masters
        return counted + self.buffers + self.passing


@dataclass(frozen=True, slots=True)
class Layout:
    """What a mode lays out on one rank.

    Attributes:
        bytes: The bytes on the rank.
        buckets: Its buckets in reduce order, on the meta device; none for DTensors.
        state_buffers: The state buffers of DTensors that replicas share.
        local_bytes: The bytes of the local tensors of DTensors.
        notes: What has to be known of this mode, a sentence each.
    """

    bytes: RankBytes
    buckets: Sequence[Bucket] = ()
    state_buffers: Sequence[StateBuffer] = ()
    local_bytes: int = 0
    notes: tuple[str, ...] = field(default=())


# --- modes with plain parameters ---------------------------------------------------------------------------------


def unsharded(model: ModelShapes, setup: Setup) -> Layout:
    """``torch.optim.ASGD`` under DDP: everything whole on every rank, and ``ax`` in the parameters' dtypes."""
    trained = sum(param.nbytes for param in model.trained)
    # torch/optim/asgd.py, _multi_tensor_asgd: a list of tensors beside the gradients. On the host the loop is the
    # default, which has one tensor of a parameter's size.
    intermediate = trained if setup.device.type != "cpu" else max((p.nbytes for p in model.trained), default=0)
    found = RankBytes(
        parameters=trained,
        unmanaged=model.frozen_bytes + model.buffer_bytes,
        gradients=trained,
        average=trained,
        passing=intermediate + _beside_ddp(trained, setup),
    )
    found = _with_averages(found, setup, trained, 0)
    notes = ("torch's ax has the parameters' 16 bits and stops moving",) if _narrow(model) else ()
    return Layout(found, notes=notes)


def _narrow(model: ModelShapes) -> bool:
    return any(param.dtype.itemsize == 2 for param in model.trained)


def _beside_ddp(gradient_bytes: int, setup: Setup) -> int:
    """The bytes of DDP's buckets beside gradients that are no views of them."""
    return 0 if setup.gradient_as_bucket_view or setup.ranks == 1 else gradient_bytes


def stage1(model: ModelShapes, setup: Setup, shards: int) -> Layout:
    """Stage 1 under DDP: the state is sharded over ``shards`` ranks."""
    buckets = buckets_of(model, setup, 1, shards)
    for bucket in buckets:
        for member in bucket.members:
            member.param.grad = torch.empty_like(member.param)
    report = memory.report(buckets, update_bytes(buckets, setup))
    found = _with_averages(_from_report(report, model), setup, *beside_bytes(model, setup, shards))
    return Layout(replace(found, passing=_beside_ddp(found.gradients, setup)), buckets)


def stage2(model: ModelShapes, setup: Setup, shards: int) -> Layout:
    """Stage 2: state and gradients are sharded over ``shards`` ranks, and equal replicas have the same shards."""
    buckets = buckets_of(model, setup, 2, shards)
    in_flight = update_bytes(buckets, setup) + send_buffer_bytes(buckets, setup)
    if setup.step_in_backward:
        in_flight += scratch_bytes(buckets)
    else:
        for bucket in buckets:
            bucket.gradient_shard()
    if not setup.contiguous and setup.ranks > 1:
        in_flight += gloo_bytes(buckets, shards, setup.ranks // shards)
    report = memory.report(buckets, in_flight)
    found = _with_averages(_from_report(report, model), setup, *beside_bytes(model, setup, shards))
    notes = ("backward updates the buckets, with step_in_backward=True",) if setup.step_in_backward else ()
    return Layout(replace(found, passing=_unsent_bytes(buckets, setup)), buckets, notes=notes)


def beside_bytes(model: ModelShapes, setup: Setup, shards: int) -> tuple[int, int]:
    """One average beside the optimizer of plain parameters on this rank, as ``build_presharded`` cuts them.

    Returned are its bytes, and those of the scratch memory for its updates if it lies in host memory.
    """
    buffers: list[StateBuffer] = []
    for group in model.groups:
        classes: dict[torch.dtype, list[ParamShape]] = {}
        for param in group:
            if param.trained:
                classes.setdefault(param.dtype, []).append(param)
        for dtype, alike in classes.items():
            reals = 2 if dtype.is_complex else 1
            numels = [param.numel * reals for param in alike]
            itemsize = dtype.itemsize // reals
            positions = fill_state_buffers(numels, itemsize, setup.bucket_cap_mb, shards)
            cut = [[numels[i] for i in of_one] for of_one in positions] if shards > 1 else [numels]
            like = torch.empty(0, dtype=dtype, device="meta")
            buffers += [StateBuffer(lay_out(of_one, itemsize, shards), like, 0, setup.precision) for of_one in cut]
    return sum(buffer.average.nbytes for buffer in buffers), scratch_bytes_of(buffers)


def _with_averages(found: RankBytes, setup: Setup, each: int, scratch: int) -> RankBytes:
    """Add the averages beside the optimizer, of ``each`` bytes and, in host memory, ``scratch`` on the device."""
    beside = setup.averages * each
    if not setup.averages_on_host:
        return replace(found, average=found.average + beside)
    return replace(found, host=beside, buffers=found.buffers + setup.averages * scratch)


def _from_report(report: memory.MemoryReport, model: ModelShapes) -> RankBytes:
    return RankBytes(
        parameters=report.parameter_bytes,
        padding=report.padding_bytes,
        unmanaged=model.frozen_bytes + model.buffer_bytes,
        gradients=report.gradient_bytes,
        average=report.state_bytes,
        masters=report.master_bytes,
        buffers=report.in_flight_bytes,
    )


def buckets_of(model: ModelShapes, setup: Setup, stage: int, shards: int) -> list[Bucket]:
    """The buckets of the first rank, in reduce order, on the meta device; as ``ParamShards`` builds them."""
    first_indices: list[int] = []
    held: list[list[tuple[int, str, Tensor]]] = []
    num_params = 0
    for group in model.groups:
        first_indices.append(num_params)
        held.append([(num_params + i, p.name, p.on_meta()) for i, p in enumerate(group) if p.trained])
        num_params += len(group)
    total_bytes = sum(param.nbytes for entries in held for _, _, param in entries)
    at_least = min_buckets(stage, setup.step_in_backward and stage == 2)
    cap_bytes = bucket_cap_bytes(setup.bucket_cap_mb, total_bytes, at_least, shards)
    buckets: list[Bucket] = []
    for group_index, entries in enumerate(held):
        buckets += build_buckets(
            entries,
            group_index=group_index,
            rank=0,
            world_size=shards,
            replica=0,
            cap_bytes=cap_bytes,
            precision=setup.precision,
        )
    return reduce_order(buckets, [len(group) for group in model.groups], first_indices)


def update_bytes(buffers: Iterable[StateBuffer], setup: Setup) -> int:
    """The scratch memory of the update, as ``Updater`` keeps it."""
    if setup.fused and setup.device.type != "cpu":
        return 0
    longest: dict[tuple[torch.dtype, bool], int] = {}
    for buffer in buffers:
        on_cpu = setup.device.type == "cpu"
        by_kernel = on_cpu and cpu.why_unavailable() is None and cpu.supports(KernelDtypes.of(buffer))
        numel = min(tile_numel(setup.device), buffer.layout.shard_numel)
        for use in scratch_uses(buffer, by_kernel):
            longest[use] = max(longest.get(use, 0), numel)
    return sum(numel * dtype.itemsize for (dtype, _), numel in longest.items())


def send_buffer_bytes(buckets: Sequence[Bucket], setup: Setup) -> int:
    """The send buffers of stage 2, as ``SendBuffers`` keeps them: as long as the longest stripe, for each dtype."""
    longest: dict[torch.dtype, int] = {}
    for bucket in buckets:
        numel = packed_numel(bucket.layout, setup, direct_numel(bucket))
        longest[bucket.wire_dtype] = max(longest.get(bucket.wire_dtype, 0), numel)
    return MAX_IN_FLIGHT * sum(numel * dtype.itemsize for dtype, numel in longest.items())


def packed_numel(layout: BucketLayout, setup: Setup, direct: int) -> int:
    """The elements that are packed to be sent: a stripe of a bucket, or what is smaller than ``direct`` elements."""
    return layout.stripe_numel * layout.world_size if setup.contiguous else send_runs(layout, direct).packed_numel


def _unsent_bytes(buckets: Sequence[Bucket], setup: Setup) -> int:
    """The gradients that lie on parameters until their bucket is sent, if backward follows registration order.

    They are those of one bucket, which fills, and of the buckets before it that are on their way: of those that are
    cut into stripes, and with Gloo of all, because large gradients are sent from where they lie.
    """
    window = deque(maxlen=MAX_LAUNCHED)  # type: deque[int]
    most = 0
    for bucket in buckets:
        size = sum(member.param.nbytes for member in bucket.members)
        most = max(most, size + sum(window))
        if setup.contiguous and len(bucket.layout.stripes) == 1:
            # It is packed at once.
            size = 0
        window.append(size)
    return most


# --- DTensors ----------------------------------------------------------------------------------------------------


def dtensors(model: ModelShapes, setup: Setup, replicas: int, shards: int) -> Layout:
    """FSDP2: DTensors sharded along dimension 0 over ``shards`` ranks, with ``replicas`` of them that share state."""
    state_buffers: list[StateBuffer] = []
    local_bytes = 0
    for group_index, group in enumerate(model.groups):
        classes: dict[torch.dtype, list[ParamShape]] = {}
        for param in group:
            if param.trained:
                classes.setdefault(param.dtype, []).append(param)
        for dtype, alike in classes.items():
            like = torch.empty(0, dtype=dtype, device="meta")
            reals = 2 if dtype.is_complex else 1
            numels = [_local_numel(param, shards) * reals for param in alike]
            itemsize = dtype.itemsize // reals
            local_bytes += sum(numels) * itemsize
            cut = [numels]
            if replicas > 1:
                chosen = fill_state_buffers(numels, itemsize, setup.bucket_cap_mb, replicas)
                cut = [[numels[position] for position in positions] for positions in chosen]
            for of_one in cut:
                layout = lay_out(of_one, itemsize, replicas)
                state_buffers.append(StateBuffer(layout, like, group_index, setup.precision))
    frozen = sum(_local_numel(p, shards) * p.dtype.itemsize for p in model.params if not p.trained)
    buffers = update_bytes(state_buffers, setup)
    if replicas > 1:
        buffers += replica_bytes(state_buffers, setup)
    average = sum(buffer.average.nbytes for buffer in state_buffers)
    found = RankBytes(
        parameters=local_bytes,
        unmanaged=frozen + model.buffer_bytes,
        gradients=local_bytes,
        average=average,
        masters=sum(buffer.master.nbytes for buffer in state_buffers if buffer.master is not None),
        buffers=buffers,
        passing=_fsdp2_bytes(model) if shards > 1 else 0,
    )
    found = _with_averages(found, setup, average, scratch_bytes_of(state_buffers))
    notes: tuple[str, ...] = ()
    scalars = [param.name for param in model.params if not param.shape]
    if scalars:
        notes = (f"FSDP2 refuses 0-dim parameters ({scalars[0]}): give them the shape (1,)",)
    return Layout(found, (), state_buffers if replicas > 1 else (), local_bytes, notes)


def _local_numel(param: ParamShape, shards: int) -> int:
    """The elements of the first rank's local tensor, which is the largest."""
    if not param.shape or not param.numel:
        return param.numel
    return chunk_of(param.shape[0], shards, 0)[1] * (param.numel // param.shape[0])


def replica_bytes(state_buffers: Sequence[StateBuffer], setup: Setup) -> int:
    """The buffers for packed local tensors of replica groups, as ``Gatherer`` keeps them: they take turns."""
    by_dtype: dict[tuple[torch.dtype, int], int] = {}
    numels = [(b.dtype, packed_numel(b.layout, setup, DIRECT_BYTES // b.dtype.itemsize)) for b in state_buffers]
    packed = [entry for entry in numels if entry[1]]
    # An odd number of gathers begins every other step with the other buffer.
    for turn, (dtype, numel) in enumerate(packed * (1 + len(packed) % MAX_PACKED)):
        key = (dtype, turn % MAX_PACKED)
        by_dtype[key] = max(by_dtype.get(key, 0), numel)
    return sum(numel * dtype.itemsize for (dtype, _), numel in by_dtype.items())


def _fsdp2_bytes(model: ModelShapes) -> int:
    """What FSDP2 itself holds at its peak, about, if each block and then the model is given to ``fully_shard``.

    The parameters outside of blocks stay gathered until backward has ended. In backward one block is in use while the
    next one is gathered, and the gradients of one block are reduced while the next ones are computed.
    """
    blocks = model.blocks()
    outside = blocks.pop("", 0)
    largest = max(blocks.values(), default=0)
    return 2 * (outside + 2 * largest)
