"""``GradientTensor``: what ``p.grad`` is in stage 2 once the reducer has taken the gradient of a backward.

Trainers, and functions of torch that they call, read and change ``p.grad``. The gradient of the whole batch is the mean
over all ranks, and of that each rank keeps the fragment in its shard. So a ``GradientTensor`` has the shape, dtype and
device of its parameter and no memory of its own. What can be computed on fragments is computed on them: operators that
change each element in place, norms, and the check for overflows. ``torch.nn.utils.clip_grad_norm_`` is right that way.
Every other operator raises a RuntimeError.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor

# They change each element by itself, in place. Further arguments are numbers, tensors of one element, and tensors that
# can be expanded to the gradient's shape.
ELEMENTWISE = (
    "mul",
    "div",
    "add",
    "sub",
    "clamp",
    "clamp_min",
    "clamp_max",
    "zero",
    "fill",
    "neg",
    "sign",
    "nan_to_num",
)
# The same for lists of gradients; a further argument may be a list as well.
FOREACH = ("mul", "div", "add", "sub", "clamp_min", "clamp_max", "zero", "neg", "sign")


class GradientReader(Protocol):
    """Who holds the gradients (``PublishedGradients``). Parameters are named by their index; calls are collective."""

    def fragments(self, indices: Sequence[int]) -> list[Tensor]:
        """This rank's fragment ``(fragment_numel,)`` of each mean gradient, about to be changed; complex if it is."""

    def fragment_of(self, index: int, whole: Tensor) -> Tensor:
        """This rank's fragment of ``whole``, a real tensor of the parameter's shape. Not collective."""

    def norm(self, index: int, norm_type: float) -> Tensor:
        """The norm of a mean gradient, 0-dim float64; all ranks get the same."""

    def any_rank(self, flag: Tensor) -> Tensor:
        """The largest ``flag`` of all ranks, of any shape with 1 element, as ``(1,)``."""


class GradientTensor(torch.Tensor):
    """The gradient of one parameter, of which each rank holds a fragment.

    ``unsent`` is this rank's own gradient, whole, while it waits to be sent with its bucket; None after that.
    """

    reader: weakref.ref[GradientReader]
    param_index: int
    unsent: Tensor | None

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        index: int,
        reader: weakref.ref[GradientReader],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> GradientTensor:
        """Make the gradient of parameter ``index``, with the properties of ``like`` unless they are given."""
        made: GradientTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_size=0,
            dtype=dtype or like.dtype,
            device=device or like.device,
        )
        # Weak: the tensor lies on the parameter, which outlives the optimizer.
        made.reader = reader
        made.param_index = index
        made.unsent = None
        return made

    def belongs_to(self, index: int, reader: GradientReader) -> bool:
        """Whether this is the gradient that ``reader`` gave parameter ``index``, or was made of it by a conversion."""
        return self.param_index == index and self.reader() is reader

    def to_local(self) -> Tensor:
        """This rank's fragment of the mean gradient, ``(fragment_numel,)``: a view. Collective after a backward."""
        return self.held_by().fragments([self.param_index])[0]

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """The bytes that it keeps on this rank: those of ``unsent``. The optimizer's shards are not among them."""
        return 0 if self.unsent is None else self.unsent.nbytes

    def data_ptr(self) -> int:
        """Raise a RuntimeError: there is no memory of the whole gradient, and 0 is no address to read."""
        _refuse("data_ptr()")

    def held_by(self) -> GradientReader:
        reader = self.reader()
        if reader is None:
            raise RuntimeError(
                "dist_asgd: this p.grad belongs to a ShardedASGD that was deleted. Call model.zero_grad() before the "
                "parameters are used with another optimizer."
            )
        return reader

    # Functions of torch are no exception: only their operators are asked for.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` on fragments if that gives what it gives on whole gradients, else raise a RuntimeError."""
        namespace, _, name = str(func.overloadpacket).partition(".")
        operation = _OPERATIONS.get(name) if namespace == "aten" else None
        if operation is None:
            _refuse(name)
        return operation(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GradientTensor(shape={tuple(self.shape)}, dtype={self.dtype}, a fragment on each rank)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled or deep-copied."""
        _refuse("a copy")


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(
        f"dist_asgd: {what} of a p.grad in stage 2: each rank holds a fragment of the mean gradient, and no rank the "
        f"whole. p.grad.to_local() is this rank's fragment; norms, clipping, and operators that change each element in "
        f"place (mul_, clamp_, zero_) work. For the gradient of this rank alone run backward inside no_sync(), or read "
        f"p.grad in a hook on the parameter. With stage=2 do not wrap the model in DDP, which reads gradients, too."
    )


# --- operators -------------------------------------------------------------------------------------------


def _alias(_: Any, args: tuple[Any, ...], __: dict[str, Any]) -> Tensor:
    """The same gradient: ``detach()`` and ``.data`` make no copy."""
    return cast(Tensor, args[0])


def _convert(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """The same gradient in another dtype or on another device: ``module.to()`` converts gradients with parameters."""
    own: GradientTensor = args[0]
    made = GradientTensor(own, own.param_index, own.reader, options.get("dtype"), options.get("device"))
    made.unsent = own.unsent
    return made


def _change(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """Change each element in place."""
    target = args[0]
    if not isinstance(target, GradientTensor):
        _refuse("an operator into another tensor")
    fragment = target.to_local()
    others = [_fragment_of(target, other) for other in args[1:]]
    func(fragment, *others, **{key: _fragment_of(target, value) for key, value in options.items()})
    return target


def _change_all(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Change each element of several gradients in place; some may be ordinary ones."""
    targets: Sequence[Tensor] = args[0]
    fragments = _local_tensors(targets)
    others = [
        [_fragment_of(t, value) for t, value in zip(targets, other, strict=True)] if isinstance(other, list) else other
        for other in args[1:]
    ]
    func(fragments, *others, **options)


def _norm(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """The norm over all elements, in the dtype that torch would return it in."""
    own: GradientTensor = args[0]
    order = options.get("ord", args[1] if len(args) > 1 else 2)
    dims = options.get("dim", args[2] if len(args) > 2 else None)
    keep = options.get("keepdim", args[3] if len(args) > 3 else False)
    if dims is not None and len({dim % max(own.dim(), 1) for dim in dims}) != own.dim():
        _refuse("the norm along some dimensions")
    norm = own.held_by().norm(own.param_index, float(order)).to(own.device, options.get("dtype") or _real(own.dtype))
    return norm.reshape((1,) * own.dim()) if keep else norm


def _norms(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> list[Tensor]:
    """The norms of several gradients; some may be ordinary ones."""
    order = options.get("ord", args[1] if len(args) > 1 else 2)
    dtype = options.get("dtype", args[2] if len(args) > 2 else None)
    return [torch.linalg.vector_norm(gradient, order, dtype=dtype) for gradient in args[0]]


def _unscale(func: Any, args: tuple[Any, ...], _: dict[str, Any]) -> None:
    """Divide gradients by a scaler's scale, and set its flag if any rank's overflowed: scales stay equal on all."""
    gradients, found_inf, inverse_scale = args
    fragments = [fragment for fragment in _local_tensors(gradients) if fragment.numel()]
    if fragments:
        func(fragments, found_inf, inverse_scale)
    for reader in {id(r): r for g in gradients if isinstance(g, GradientTensor) for r in [g.held_by()]}.values():
        found_inf.copy_(reader.any_rank(found_inf).reshape(found_inf.shape))


_OPERATIONS: dict[str, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    "detach": _alias,
    "alias": _alias,
    "_to_copy": _convert,
    "empty_like": _convert,
    "linalg_vector_norm": _norm,
    "_foreach_norm": _norms,
    "_amp_foreach_non_finite_check_and_unscale_": _unscale,
    **{f"{name}_": _change for name in ELEMENTWISE},
    **{f"_foreach_{name}_": _change_all for name in FOREACH},
}


def _local_tensors(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The fragments of gradients, and ordinary ones as they are. Each optimizer is asked once for all of its own."""
    own: dict[int, tuple[GradientReader, list[int]]] = {}
    for gradient in gradients:
        if isinstance(gradient, GradientTensor):
            reader = gradient.held_by()
            own.setdefault(id(reader), (reader, []))[1].append(gradient.param_index)
    fragments = {key: iter(reader.fragments(indices)) for key, (reader, indices) in own.items()}
    return [next(fragments[id(g.reader())]) if isinstance(g, GradientTensor) else g for g in gradients]


def _fragment_of(target: Tensor, value: Any) -> Any:
    """What ``value``, beside ``target`` in an operator for each element, is beside the fragment of ``target``."""
    if isinstance(value, GradientTensor):
        _refuse("a combination with another gradient")
    if not isinstance(target, GradientTensor) or not isinstance(value, Tensor):
        return value
    if value.numel() == 1:
        return value.reshape(())
    if target.dtype.is_complex:
        _refuse("a combination of a complex gradient with another tensor")
    return target.held_by().fragment_of(target.param_index, value.expand(target.shape))


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype
