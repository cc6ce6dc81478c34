"""State buffers and buckets: the flat memory of parameters and state on this rank, and the parameters that lie in it.

state buffer  ``StateBuffer``: the average ``ax``, and what masters need, of parameters of one group, dtype and device.
              Presharded parameters have state buffers of their own (``placements/presharded.py``)
bucket        ``Bucket``: a state buffer that also holds its parameters, whole, and in stage 2 this rank's shard of
              their reduced gradient. Parameters lie in its memory: an all-gather writes them in place, without a copy
member        a parameter as one of its bucket or state buffer: ``ShardedParam``, and ``BucketParam`` in a bucket. All
              the members of an optimizer together are its parameters

``state.py`` builds and keeps them; gradients, updates, gathers and state dicts work on them bucket by bucket. Complex
parameters are stored as pairs of reals, and every count here is in real elements. Nothing here communicates.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from . import huge_pages, masters
from .average import AverageMemory
from .layout import BucketLayout, Fragment, Slot
from .memory_order import flattened, memory_strides
from .owners import Owners
from .precision import Precision
from .published import as_complex, own_storage
from .send_layout import SendLayout


class ShardedParam(ABC):
    """One parameter of a bucket or state buffer (a member), and the fragment of it that this rank updates.

    param     the user's parameter
    name      the user's name for it if parameters were passed with names, else its place in ``param_groups``
    index     its number among all parameters of the optimizer, in registration order, and its bit in bit masks
    bucket    the bucket or state buffer that has its state, and that keeps this object
    slot      where its elements lie in that buffer's layout
    fragment  which of its elements this rank updates, and where in this rank's shard their state lies
    strides   those of the memory order in which its elements are counted
    """

    __slots__ = ("_bucket", "fragment", "index", "name", "param", "slot", "strides")

    # Whether every rank has the parameter whole, and a fragment of its state by the layout of the bucket.
    is_whole = False

    def __init__(
        self,
        param: Tensor,
        name: str,
        index: int,
        bucket: StateBuffer,
        slot: Slot,
        fragment: Fragment,
        strides: tuple[int, ...],
    ) -> None:
        # Weak, because the bucket lists its members: its memory must be freed as soon as the optimizer is deleted.
        self._bucket = weakref.ref(bucket)
        self.param = param
        self.name = name
        self.index = index
        self.slot = slot
        self.fragment = fragment
        self.strides = strides

    @property
    def bucket(self) -> StateBuffer:
        """See the class."""
        return cast(StateBuffer, self._bucket())

    @property
    @abstractmethod
    def is_unmoved(self) -> bool:
        """Whether the parameter still has the memory, shape, strides, dtype and device that it had at construction.

        The memory of a presharded parameter may be another: it is followed.
        """

    @property
    def is_rebound(self) -> bool:
        """Whether it has other memory of the same shape, dtype and device, whose values ``bring_home`` takes."""
        return False

    def other_owner(self) -> str | None:
        """The name that another optimizer has for the parameter, if it has taken the parameter's memory over."""
        return None

    def check_unmoved(self) -> None:
        """RuntimeError unless ``is_unmoved``."""
        if not self.is_unmoved:
            other = self.other_owner()
            if other is not None:
                raise RuntimeError(
                    f"dist_asgd: parameter {self.name} was given to another ShardedASGD after this one, as {other}, "
                    f"and lies in the memory of that one now. Give each parameter to one optimizer, or delete the "
                    f"other optimizer before this one is used again."
                )
            raise RuntimeError(
                f"dist_asgd: parameter {self.name} was moved, re-cast or re-bound after the optimizer was constructed "
                f"and stepped (it was {self.dtype} on {self.bucket.device}, it is {self.param.dtype} of shape "
                f"{tuple(self.param.shape)} on {self.param.device}). Change parameters in place (p.copy_()), or "
                f"convert the model before the first step."
            )

    @property
    @abstractmethod
    def gradient(self) -> Tensor | None:
        """The plain tensor that ``p.grad`` is or holds on this rank, of any strides; None if there is no gradient."""

    @property
    @abstractmethod
    def rng_offset(self) -> int:
        """The place of the fragment's first element in the whole parameter, in memory order.

        Stochastic rounding draws random numbers by place, so that they do not depend on how parameters are sharded.
        """

    @abstractmethod
    def param_range(self, start: int, stop: int) -> Tensor:
        """The parameter's elements whose state is ``[start, stop)`` of this rank's shard: ``(stop - start,)``, a view.

        In a bucket the range may go on into the fragments of its neighbours.
        """

    @abstractmethod
    def fragment_of(self, whole: Tensor) -> Tensor:
        """This rank's fragment of ``whole``, a tensor of the parameter's shape: ``(fragment_numel,)``, as reals."""

    @abstractmethod
    def state_entry(self, fragment: Tensor) -> Tensor:
        """This rank's ``fragment`` ``(fragment_numel,)`` of sharded state as ``optimizer.state`` shows it.

        It shares the memory of ``fragment`` and has a storage of its own.
        """

    @property
    @abstractmethod
    def norm_owner(self) -> int:
        """The number of the set of ranks that counts this parameter in the global norm.

        Ranks with the same number hold disjoint fragments that add up to the whole parameter. 0: this rank's fragment
        is empty or a copy, and is not counted.
        """

    @property
    def dtype(self) -> torch.dtype:
        """The parameter's dtype; that of its bucket is the real counterpart."""
        return self.bucket.param_dtype

    @property
    def average(self) -> Tensor:
        """The memory of ``ax`` of this rank's fragment: ``(fragment_numel,)``, complex for a complex parameter."""
        return self._fragment_in(self.bucket.average[self.fragment.start : self.fragment.stop])

    @property
    def average_values(self) -> Tensor:
        """As ``average``, to be read only: the parameter itself if it stands for its average."""
        if self.bucket.params_stand:
            return self._fragment_in(self.param_range(self.fragment.start, self.fragment.stop))
        return self.average

    def _fragment_in(self, reals: Tensor) -> Tensor:
        return as_complex(reals) if self.bucket.param_dtype.is_complex else reals

    @property
    def fragment_start(self) -> int:
        """Where the fragment begins in memory order, in elements of the parameter's dtype: complex ones count once."""
        return self.fragment.param_start // (2 if self.dtype.is_complex else 1)

    def state_fragments(self) -> dict[str, Tensor]:
        """This rank's fragment ``(fragment_numel,)`` of each sharded state, by its key in state dicts.

        ``ax`` is ``average_values``, ``master`` a new float32 tensor.
        """
        fragments = {"ax": self.average_values}
        if self.bucket.master is not None:
            fragments["master"] = self.masters()
        return fragments

    def masters(self) -> Tensor:
        """The float32 masters of the fragment, ``(fragment_numel,)``, as a copy; only if the bucket has masters."""
        assert self.bucket.master is not None
        start, stop = self.fragment.start, self.fragment.stop
        out = torch.empty(stop - start, dtype=torch.float32, device=self.bucket.device)
        return masters.read(self.param_range(start, stop), self.bucket.master[start:stop], out)

    def set_masters(self, values: Tensor) -> None:
        """Set the masters of the fragment to float32 ``values`` ``(fragment_numel,)``, and the parameter with them."""
        assert self.bucket.master is not None
        start, stop = self.fragment.start, self.fragment.stop
        masters.write(values, self.param_range(start, stop), self.bucket.master[start:stop])


class BucketParam(ShardedParam):
    """A parameter that was moved into a bucket: whole on every rank, which updates the fragment in its shard."""

    __slots__ = ("_address", "_shape", "_view_strides")

    is_whole = True

    def __init__(self, param: Tensor, name: str, index: int, bucket: Bucket, slot: Slot, rank: int) -> None:
        super().__init__(param, name, index, bucket, slot, bucket.layout.fragment(slot, rank), memory_strides(param))
        self._shape = param.shape
        self.bring_home()
        self._address = param.data_ptr()
        self._view_strides = param.stride()
        Owners.claim(param, bucket, name)

    def bring_home(self, keep_slot: bool = False) -> None:
        """Make the slot the parameter's memory, and copy its values there or, with ``keep_slot``, take those there."""
        param, view = self.param, self.bucket.flat[self.slot.offset : self.slot.stop]
        if param.is_complex():
            view = torch.view_as_complex(view.view(-1, 2))
        # The parameter keeps its strides (channels-last, for example), so that modules compute as before.
        view = view.as_strided(param.shape, self.strides)
        if not keep_slot:
            view.copy_(param.detach())
        # Modules, hooks and autograd keep the parameter object; only its memory is another now. It has a storage of its
        # own over the bucket, because savers take tensors of one storage for one tensor.
        param.data = own_storage(view)

    @property
    def is_rebound(self) -> bool:
        param = self.param
        return (
            param.shape == self._shape
            and param.dtype == self.bucket.param_dtype
            and param.device == self.bucket.device
            and param.layout == torch.strided
            and not any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True))
            and self.other_owner() is None
            and not self.is_unmoved
        )

    def other_owner(self) -> str | None:
        return Owners.other(self.param, self.bucket)

    @property
    def bucket(self) -> Bucket:
        return cast(Bucket, self._bucket())

    @property
    def is_unmoved(self) -> bool:
        # If any of these differs, an update of the bucket would not reach the parameter.
        param = self.param
        return (
            param.data_ptr() == self._address
            and param.dtype == self.bucket.param_dtype
            and param.shape == self._shape
            and param.stride() == self._view_strides
        )

    @property
    def gradient(self) -> Tensor | None:
        return self.param.grad

    @property
    def rng_offset(self) -> int:
        return self.fragment.param_start

    def param_range(self, start: int, stop: int) -> Tensor:
        return self.bucket.shard[start:stop]

    def fragment_of(self, whole: Tensor) -> Tensor:
        return flattened(whole, self.strides)[
            self.fragment.param_start : self.fragment.param_start + self.fragment.numel
        ]

    def state_entry(self, fragment: Tensor) -> Tensor:
        return own_storage(fragment)

    @property
    def norm_owner(self) -> int:
        # In hybrid sharding every replica has equal gradients: the first one counts.
        return int(self.fragment.numel > 0 and self.bucket.replica == 0)


class StateBuffer(AverageMemory):
    """The state on this rank of parameters of one group, dtype and device.

    average         (shard_numel,)          ``ax`` of this rank's shard, in ``average_dtype`` or, after a load, wider
    master          (shard_numel,) or None  the part of float32 masters that parameters do not hold, see ``masters.py``
    members         the parameters, in the order of their slots
    param_dtype     the parameters' dtype; ``dtype`` is its real counterpart, in which elements are stored
    gradient_dtype  the dtype in which the update reads gradients
    seed            the seed of stochastic rounding; None if parameters are rounded to nearest
    """

    # The whole parameters, if an all-gather has to bring them to every rank after an update; else None.
    flat: Tensor | None = None
    # Whether each member's memory is its own, so that an update cannot run over several members at once.
    separate_params = True

    members: Sequence[ShardedParam]

    def __init__(self, layout: BucketLayout, like: Tensor, group_index: int, precision: Precision) -> None:
        self.layout = layout
        self.group_index = group_index
        self.param_dtype = like.dtype
        self.dtype = like.dtype.to_real() if like.dtype.is_complex else like.dtype
        self.gradient_dtype = self.dtype
        self.device = like.device
        self.make_average(precision)
        self.master: Tensor | None = None
        if self.dtype.itemsize == 2 and precision.master_weights:
            self.master = huge_pages.zeros(layout.shard_numel, masters.held_dtype(self.dtype), self.device)
        self.seed = precision.stochastic_rounding if self.dtype == torch.bfloat16 else None

    @property
    def updates_in_float32(self) -> bool:
        """Whether 16-bit parameters are updated in float32 and rounded once: with masters or stochastic rounding."""
        return self.master is not None or self.seed is not None

    def reset_masters(self) -> None:
        """Set the masters to the parameters' present values: at construction, and after a load without masters."""
        if self.master is not None:
            for member in self.members:
                member.set_masters(member.param_range(member.fragment.start, member.fragment.stop).float())

    def state_shards(self) -> dict[str, Tensor]:
        """This rank's shard ``(shard_numel,)`` of each sharded state of whole parameters, by its key in state dicts.

        ``ax`` is to be read only, ``master`` is a new float32 tensor.
        """
        return {"ax": self.average_values}

    def reduced_gradient(self) -> Tensor | None:
        """The reduced gradient ``(shard_numel,)`` if this optimizer reduced it (stage 2); None if ``p.grad`` has it."""
        return None

    def on_params_written(self) -> None:
        """Make modules that keep copies of the parameters drop them.

        Called after parameters were written outside of a step (averages, loads).
        """


class Bucket(StateBuffer):
    """One bucket: the state buffer of plain parameters, and the memory of those parameters.

    flat        (world_size * shard_numel,)  the whole parameters, with zeros as padding
    shard       (shard_numel,)               this rank's shard of ``flat``, a view
    gradient    (shard_numel,) or None       stage 2: the reduced gradient of the shard, kept between steps
    wire_dtype  the dtype in which gradients are sent; they are kept in ``gradient_dtype``
    replica     the number of this rank's copy of all shards in hybrid sharding, else 0
    trainable   whether the parameters required gradients at construction: only such buckets take part in rounds
    """

    separate_params = False

    flat: Tensor

    def __init__(
        self, layout: BucketLayout, like: Tensor, group_index: int, rank: int, replica: int, precision: Precision
    ) -> None:
        super().__init__(layout, like, group_index, precision)
        self.replica = replica
        self.trainable = like.requires_grad
        self.flat = huge_pages.empty(layout.numel, self.dtype, self.device)
        self.shard = self.flat.view(layout.world_size, layout.shard_numel)[rank]
        self.wire_dtype = precision.reduce_dtype or self.dtype
        # A sum that was made in a wider dtype than a 16-bit parameter's stays wide. float32 sums need no wider one.
        self.gradient_dtype = (
            torch.float32 if self.dtype.itemsize == 2 and self.wire_dtype != self.dtype else self.dtype
        )
        self.gradient: Tensor | None = None
        self.members: list[BucketParam] = []
        self._clear_padding()

    def _clear_padding(self) -> None:
        # An update runs over the padding between parameters too, so there must be numbers and not stale memory.
        offset = 0
        for slot in self.layout.slots:
            self.flat[offset : slot.offset].zero_()
            offset = slot.stop
        self.flat[offset:].zero_()

    def gradient_shard(self) -> Tensor:
        """The reduced gradient of the shard, ``(shard_numel,)``; allocated at the first call and kept from then on."""
        # It is kept because fresh memory costs a page fault for every page, in every step.
        if self.gradient is None:
            self.gradient = huge_pages.zeros(self.shard.numel(), self.gradient_dtype, self.device)
        return self.gradient

    @property
    def average_values(self) -> Tensor:
        return self.shard if self.params_stand else self.average

    def reduced_gradient(self) -> Tensor | None:
        return self.gradient

    def state_shards(self) -> dict[str, Tensor]:
        shards = super().state_shards()
        if self.master is not None:
            out = torch.empty_like(self.average, dtype=torch.float32)
            shards["master"] = masters.read(self.shard, self.master, out)
        return shards

    def reset_masters(self) -> None:
        # One call for the whole shard, instead of one for each member. Buckets that are only planned have no values.
        if self.master is not None and not self.flat.is_meta:
            masters.write(self.shard.float(), self.shard, self.master)

    def flat_gradients(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of all members as 1-D reals in memory order: views, or copies of those in another order."""
        return [
            None if gradient is None else flattened(gradient, member.strides)
            for gradient, member in zip(gradients, self.members, strict=True)
        ]

    def pack(self, gradients: Sequence[Tensor | None], layout: SendLayout, out: Tensor) -> None:
        """Copy gradients to ``out``, a send buffer; called by the reducer before it sends a stripe of the bucket.

        ``gradients`` has one entry for each member, as ``flat_gradients`` makes them. The pieces of ``layout`` say what
        goes where; gradients that are None, and the padding, become zeros.
        """
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        zeros: list[Tensor] = []
        bucket_row, row = layout.row_numels
        for piece in layout.pieces:
            if piece.rows == 1:
                target = out[piece.target : piece.target + piece.numel]
            else:
                target = out.as_strided((piece.rows, piece.numel), (row, 1), out.storage_offset() + piece.target)
            gradient = None if piece.slot is None else gradients[piece.slot]
            if piece.slot is None or gradient is None:
                # Stale values would be summed into the padding of the shards.
                zeros.append(target)
                continue
            targets.append(target)
            if piece.rows == 1:
                sources.append(gradient[piece.source : piece.source + piece.numel])
            else:
                start = gradient.storage_offset() + piece.source
                sources.append(gradient.as_strided((piece.rows, piece.numel), (bucket_row, 1), start))
        # One operator for all members: a bucket may have hundreds of small ones.
        if targets:
            torch._foreach_copy_(targets, sources)
        if zeros:
            torch._foreach_zero_(zeros)
