"""What the reduce-scatter of a bucket sends: the packed buffer, and large gradients as they lie."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..storage.buffers import Bucket
from ..storage.layout import SendRange
from ..storage.memory_order import flattened


def source(bucket: Bucket, gradients: Sequence[Tensor | None], packed: Tensor, send_range: SendRange) -> Tensor:
    """The elements that are sent for ``send_range``, 1-D: a view of the packed buffer, or of the gradient as it lies.

    Zeros if the parameter has no gradient.
    """
    numel = send_range.stop - send_range.start
    if send_range.slot is None:
        return packed[send_range.source : send_range.source + numel]
    gradient = gradients[send_range.slot]
    if gradient is None:
        return packed.new_zeros(numel)
    flat = flattened(gradient, bucket.members[send_range.slot].strides)
    return flat[send_range.source : send_range.source + numel]
