"""Buckets are built from the parameters of a group, and put into the order in which backward fills them.

``state.py`` calls both functions. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .buffers import Bucket, BucketParam
from .layout import fill_buckets, lay_out
from .precision import Precision


def build_buckets(
    params: Sequence[tuple[int, str, Tensor]],
    *,
    group_index: int,
    rank: int,
    world_size: int,
    replica: int,
    cap_bytes: int,
    precision: Precision,
    max_stripe_bytes: Callable[[torch.device], int | None] = lambda _: None,
) -> list[Bucket]:
    """Move the plain parameters of one group, given as (index, name, parameter), into buckets.

    The parameters of a bucket share dtype, device and ``requires_grad``. They are taken in reverse registration order,
    which is about the order in which backward produces their gradients. Bucket sizes follow ``fill_buckets``, and
    stripes are at most of about ``cap_bytes`` and what ``max_stripe_bytes`` says of their device.
    """
    classes: dict[tuple[torch.dtype, torch.device, bool], list[int]] = {}
    for position in reversed(range(len(params))):
        param = params[position][2]
        # A frozen parameter gets no gradient, and would keep a bucket of trainable ones from ever being full.
        classes.setdefault((param.dtype, param.device, param.requires_grad), []).append(position)
    buckets: list[Bucket] = []
    for (dtype, device, _), positions in classes.items():
        stripe_bytes = min(cap_bytes, max_stripe_bytes(device) or cap_bytes)
        reals = 2 if dtype.is_complex else 1
        itemsize = dtype.itemsize // reals
        numels = [params[position][2].numel() * reals for position in positions]
        for chosen in fill_buckets(numels, itemsize, cap_bytes):
            layout = lay_out([numels[i] for i in chosen], itemsize, world_size, stripe_bytes)
            bucket = Bucket(layout, params[positions[chosen[0]]][2], group_index, rank, replica, precision)
            # A parameter's old memory is freed as it moves: at most one bucket of parameters exists twice.
            for i, slot in zip(chosen, layout.slots, strict=True):
                index, name, param = params[positions[i]]
                bucket.members.append(BucketParam(param, name, index, bucket, slot, rank))
            bucket.reset_masters()
            buckets.append(bucket)
    return buckets


def reduce_order(buckets: Sequence[Bucket], group_sizes: Sequence[int], first_indices: Sequence[int]) -> list[Bucket]:
    """The buckets in the order in which backward is expected to fill them; the same on every rank.

    ``group_sizes`` and ``first_indices`` give the number of parameters of each group, and the index of its first. A
    bucket is full when its earliest registered parameter has its gradient. How early that is counts relative to the
    parameter's group, because groups often cover the same layers (weights and biases, for example).
    """

    def earliest(bucket: Bucket) -> float:
        size, first = group_sizes[bucket.group_index], first_indices[bucket.group_index]
        return min((member.index - first + 0.5) / size for member in bucket.members)

    return sorted(buckets, key=earliest, reverse=True)
