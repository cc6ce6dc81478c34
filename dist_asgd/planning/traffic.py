"""What one rank sends in a step of each mode, by kind of message: the optimizer's messages, and those of DDP and FSDP2.

The step has one backward, and neither clips nor scales gradients. Bytes are those that a rank sends, which are about
as many as it receives: for collectives of other backends than Gloo those of a ring.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..comm.dissemination import num_hops
from ..comm.reports import MASK_BITS, CollectiveCall, RankReport
from ..gradients.sending import direct_numel
from ..storage.buffers import Bucket, StateBuffer
from ..storage.layout import MIB
from ..storage.send_layout import DIRECT_BYTES, send_runs
from .modes import Layout
from .setup import Setup
from .shapes import ModelShapes, ParamShape

# torch's defaults: of the first bucket, and of the others.
_DDP_FIRST_BYTES, _DDP_CAP_BYTES = MIB, 25 * MIB
# Words of control messages are int64; the first one says whether all is well.
_WORD_BYTES, _STATUS_WORDS = 8, 1


@dataclass(frozen=True, slots=True)
class Transfer:
    """The messages of one kind that a rank sends in a step.

    Attributes:
        kind: "reduce-scatter", "all-gather", "all-reduce", or "control exchange", by which ranks agree on a call.
        by: Who makes the calls: "dist_asgd", "DDP" or "FSDP2".
        ranks: How many ranks take part in each call.
        calls: The number of calls.
        messages: The number of messages of this rank; None if the backend decides it.
        sent_bytes: The bytes that this rank sends.
        across_bytes: Those of them that leave the node.
        piece_bytes: The mean size of what one rank sends to one other, or passes on, at a time.
    """

    kind: str
    by: str
    ranks: int
    calls: int
    messages: int | None
    sent_bytes: int
    across_bytes: int
    piece_bytes: int


def across_bytes_of(sent_bytes: int, ranks: int, spacing: int, setup: Setup, in_ring: bool) -> int:
    """The bytes of ``sent_bytes`` that leave the node; the ``ranks`` of a call are ``spacing`` numbers apart."""
    in_node = max(1, min(ranks, setup.ranks_per_node // spacing))
    if ranks <= in_node:
        return 0
    if not in_ring:
        # Every other rank gets a message of its own.
        return sent_bytes * (ranks - in_node) // (ranks - 1)
    # Rings enter each node once, and each of the node's ranks has its share of them.
    return sent_bytes // in_node


def _transfer(
    kind: str, by: str, ranks: int, spacing: int, calls: int, messages: int | None, sent: int, setup: Setup
) -> Iterator[Transfer]:
    """One transfer; none if there is nobody to send to."""
    if ranks > 1 and calls:
        factor = 2 if kind == "all-reduce" else 1
        piece = sent // max(1, factor * calls * (ranks - 1))
        # Gloo's own collectives, which DDP and FSDP2 call, are rings too.
        across = across_bytes_of(sent, ranks, spacing, setup, setup.contiguous or by != "dist_asgd")
        yield Transfer(kind, by, ranks, calls, messages, sent, across, piece)


def ring_bytes(ranks: int, nbytes: int, kind: str) -> int:
    """The bytes that one rank sends in a ring: for a sum twice around, else once."""
    return (2 if kind == "all-reduce" else 1) * nbytes * (ranks - 1) // ranks


def _mean_of_gradients(model: ModelShapes, setup: Setup) -> Iterator[Transfer]:
    """DDP's all-reduce over all ranks."""
    trained = model.trained
    nbytes = sum(param.nbytes for param in trained)
    calls = len(ddp_buckets(trained))
    sent = ring_bytes(setup.ranks, nbytes, "all-reduce")
    yield from _transfer("all-reduce", "DDP", setup.ranks, 1, calls, None, sent, setup)


def ddp_buckets(trained: Sequence[ParamShape]) -> list[int]:
    """The bytes of the buckets that DDP makes, in the order of backward: it closes one that has reached its cap."""
    buckets, used, cap_bytes = [], 0, _DDP_FIRST_BYTES
    for param in reversed(trained):
        used += param.nbytes
        if used >= cap_bytes:
            buckets.append(used)
            used, cap_bytes = 0, _DDP_CAP_BYTES
    return buckets + ([used] if used else [])


def _reduce_scatter(buckets: Iterable[Bucket], shards: int, setup: Setup) -> Iterator[Transfer]:
    calls = messages = sent = 0
    for bucket in buckets:
        if not bucket.trainable:
            continue
        calls += len(bucket.layout.stripes)
        shard, itemsize = bucket.layout.shard_numel, bucket.wire_dtype.itemsize
        if setup.contiguous:
            sent += (shards - 1) * shard * itemsize
            continue
        runs = send_runs(bucket.layout, direct_numel(bucket))
        messages += runs.num_messages(bucket.layout)
        # What lies in the first rank's own shard is not sent.
        sent += sum(stop - max(start, min(stop, shard)) for start, stop, *_ in runs.runs) * itemsize
    found = None if setup.contiguous else messages
    yield from _transfer("reduce-scatter", "dist_asgd", shards, 1, calls, found, sent, setup)


def _all_reduce_across(buckets: Iterable[Bucket], shards: int, replicas: int, setup: Setup) -> Iterator[Transfer]:
    """The all-reduce of shards across replicas."""
    calls = messages = sent = 0
    for bucket in buckets:
        if not bucket.trainable:
            continue
        itemsize = bucket.wire_dtype.itemsize
        for start, stop in bucket.layout.stripes:
            calls += 1
            numel = stop - start
            if setup.contiguous:
                sent += ring_bytes(replicas, numel * itemsize, "all-reduce")
                continue
            # A chunk of the stripe to each of the others, and then the sum of the own chunk; the first ones are longer.
            chunks = [numel // replicas + (rank < numel % replicas) for rank in range(replicas)]
            sent += (numel - chunks[0] + (replicas - 1) * chunks[0]) * itemsize
            messages += sum(chunk > 0 for chunk in chunks[1:]) + (replicas - 1) * (chunks[0] > 0)
    found = None if setup.contiguous else messages
    yield from _transfer("all-reduce", "dist_asgd", replicas, shards, calls, found, sent, setup)


def _all_gather(buckets: Iterable[Bucket], shards: int, setup: Setup) -> Iterator[Transfer]:
    """The gather of updated parameters."""
    sizes = [bucket.layout.shard_numel * bucket.dtype.itemsize for bucket in buckets]
    messages = None if setup.contiguous else len(sizes) * (shards - 1)
    sent = (shards - 1) * sum(sizes)
    yield from _transfer("all-gather", "dist_asgd", shards, 1, len(sizes), messages, sent, setup)


def _gather_among_replicas(
    state_buffers: Iterable[StateBuffer], shards: int, replicas: int, setup: Setup
) -> Iterator[Transfer]:
    """The gather of local tensors that replicas share."""
    calls = messages = sent = 0
    for buffer in state_buffers:
        calls += 1
        shard, itemsize = buffer.layout.shard_numel, buffer.dtype.itemsize
        if setup.contiguous:
            sent += (replicas - 1) * shard * itemsize
            continue
        for start, stop, *_ in send_runs(buffer.layout, DIRECT_BYTES // itemsize).runs:
            if start < shard:
                sent += (replicas - 1) * (min(stop, shard) - start) * itemsize
                messages += replicas - 1
    found = None if setup.contiguous else messages
    yield from _transfer("all-gather", "dist_asgd", replicas, shards, calls, found, sent, setup)


def _control(model: ModelShapes, exchanges: int, setup: Setup) -> Iterator[Transfer]:
    """The exchanges by which all ranks agree before they act: a summary on the host, over Gloo beside NCCL, too."""
    mask_words = -(-sum(1 for _ in model.params) // MASK_BITS)
    summary = RankReport(0, CollectiveCall.STEP, 0, 0, 0, (0, 0), mask_words).summary
    hops = num_hops(setup.ranks)
    nbytes = (_STATUS_WORDS + len(summary)) * _WORD_BYTES
    # Rank 0 sends in hop k to rank 2^k.
    leaving = sum(1 << hop >= setup.ranks_per_node for hop in range(hops))
    if hops:
        sent = exchanges * hops * nbytes
        across = exchanges * leaving * nbytes
        yield Transfer("control exchange", "dist_asgd", setup.ranks, exchanges, exchanges * hops, sent, across, nbytes)


def of_unsharded(model: ModelShapes, setup: Setup) -> tuple[Transfer, ...]:
    """The traffic of ``torch.optim.ASGD`` under DDP."""
    return tuple(_mean_of_gradients(model, setup))


def of_stage1(model: ModelShapes, layout: Layout, shards: int, setup: Setup) -> tuple[Transfer, ...]:
    """The traffic of stage 1: DDP's, one exchange, and the gather of parameters."""
    return (
        *_mean_of_gradients(model, setup),
        *_all_gather(layout.buckets, shards, setup),
        *_control(model, 1, setup),
    )


def of_stage2(model: ModelShapes, layout: Layout, shards: int, setup: Setup) -> tuple[Transfer, ...]:
    """The traffic of stage 2: an exchange opens the round of backward, and another one the step.

    With ``step_in_backward`` each bucket has one in backward.
    """
    in_backward = len(layout.buckets) if setup.step_in_backward else 1
    return (
        *_reduce_scatter(layout.buckets, shards, setup),
        *_all_reduce_across(layout.buckets, shards, setup.ranks // shards, setup),
        *_all_gather(layout.buckets, shards, setup),
        *_control(model, in_backward + 1, setup),
    )


def of_dtensors(model: ModelShapes, layout: Layout, shards: int, setup: Setup, stage: int = 1) -> tuple[Transfer, ...]:
    """The traffic of FSDP2, which gathers for forward and for backward, and of replica groups after the update."""
    replicas = setup.ranks // shards
    blocks = len(model.blocks())
    whole = shards * layout.local_bytes
    gathered, reduced = 2 * ring_bytes(shards, whole, "all-gather"), ring_bytes(shards, whole, "reduce-scatter")
    summed = ring_bytes(replicas, layout.local_bytes, "all-reduce")
    return (
        *_transfer("all-gather", "FSDP2", shards, 1, 2 * blocks, None, gathered, setup),
        *_transfer("reduce-scatter", "FSDP2", shards, 1, blocks, None, reduced, setup),
        *_transfer("all-reduce", "FSDP2", replicas, shards, blocks, None, summed, setup),
        *_gather_among_replicas(layout.state_buffers, shards, replicas, setup),
        *_control(model, stage, setup),
    )
