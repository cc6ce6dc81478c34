"""Parameters that are more than an address: tensor subclasses that keep their elements in other tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

from dist_asgd import ShardedASGD
from tests.harness.ranks import run, run_errors

both = pytest.mark.parametrize("stage", [1, 2])
forms = pytest.mark.parametrize("form", [{}, {"foreach": True}, {"foreach": False}], ids=["fused", "foreach", "loop"])
worlds = pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
Form = dict[str, Any]


class Boxed(Tensor):
    """A tensor that keeps its elements in another one, as quantised weights do."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Boxed":
        """No memory of its own."""
        boxed: Boxed = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        boxed.held = inner
        return boxed

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _meta: object, _size: object, _stride: object) -> "Boxed":
        return Boxed(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args_in, kwargs_in = pytree.tree_map_only(Boxed, lambda b: b.held, (args, kwargs or {}))
        out = pytree.tree_map_only(Tensor, Boxed, func(*args_in, **kwargs_in))
        return return_and_correct_aliasing(func, args, kwargs or {}, out)  # type: ignore[no-untyped-call]


def with_boxed(_rank: int, _world_size: int, stage: int, form: Form, trained: bool) -> None:
    """Job: two boxed parameters beside a plain one."""
    held = [torch.ones(4), torch.ones(4)]
    boxed = [nn.Parameter(Boxed(one), requires_grad=trained) for one in held]
    plain = nn.Parameter(torch.ones(4))
    optimizer = ShardedASGD([*boxed, plain], lr=0.1, stage=stage, **form)
    plain.grad = torch.ones_like(plain)
    optimizer.step()
    assert plain[0].item() < 1
    assert [one[0].item() for one in held] == [1.0, 1.0]


@both
@forms
@worlds
def test_tensor_subclasses_without_memory(backend: str, world_size: int, stage: int, form: Form) -> None:
    """Trained ones are refused by the name of their type, frozen ones stay as they are."""
    for error in run_errors(backend, world_size, with_boxed, stage, form, True):
        assert "is a Boxed, a tensor subclass" in error.message
        assert error.type_name == "ValueError"
    run(backend, world_size, with_boxed, stage, form, False)
