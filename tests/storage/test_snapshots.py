"""Snapshots, which each step compares before it passes addresses on, miss no change, in C and in Python."""

import contextlib
import gc
import shutil
import weakref
from array import array
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from dist_asgd import ShardedASGD
from dist_asgd.storage import snapshots
from dist_asgd.storage.snapshots import AddressTable, PublishedState, TensorSnapshot, unexpected_gradients


@pytest.fixture(params=["C", "Python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test with the compiled module, and without it."""
    if request.param == "C" and snapshots._compiled() is None:
        pytest.skip("snapshots.c is not compiled")
    if request.param == "Python":
        monkeypatch.setattr(snapshots, "_compiled", lambda: None)
    return request.param


both_ways = pytest.mark.usefixtures("way")


def test_it_was_compiled_where_it_can_be() -> None:
    """Otherwise half of the tests below would be skipped unnoticed."""
    assert snapshots._compiled() is not None or not any(map(shutil.which, ("cc", "gcc", "clang")))


def matrices() -> list[nn.Parameter]:
    """Make parameters of several shapes, strides and dtypes."""
    return [
        nn.Parameter(torch.zeros(3, 3)),
        nn.Parameter(torch.zeros(4, 5).t()),
        nn.Parameter(torch.zeros(())),
        nn.Parameter(torch.zeros(1, 7, dtype=torch.float64)),
        nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64)),
        nn.Parameter(torch.zeros(0)),
        nn.Parameter(torch.zeros(5, dtype=torch.bfloat16)),
    ]


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "elsewhere": torch.clone,
    "other dtype": Tensor.double,
    "transposed": Tensor.t,
    "other rows": lambda _data: torch.zeros(9, 3)[::3],
}


@both_ways
@pytest.mark.parametrize("move", MOVES)
def test_a_tensor_that_was_moved(move: str) -> None:
    """Each kind of change makes the snapshot stale."""
    params = matrices()
    held = TensorSnapshot.of([None, *params])
    assert held.is_current()
    params[0].data = MOVES[move](params[0].data)
    assert not held.is_current()


@both_ways
def test_a_tensor_that_was_cut_short() -> None:
    """The snapshot is stale, although address and strides are the same."""
    params = matrices()
    held = TensorSnapshot.of(params)
    params[0].data = params[0].data[:2]
    assert not held.is_current()


@both_ways
def test_direct_gradients() -> None:
    """Gradients are present at their addresses; the strides of dimensions of size 1 do not matter in C."""
    params = matrices()
    held = TensorSnapshot.of([None, *params])
    for param in params[1:]:
        param.grad = torch.ones_like(param)
    table = held.gradients()
    assert table.gradients[:2] == [None, None]
    assert all(a is p.grad for a, p in zip(table.gradients[2:], params[1:], strict=True))
    assert table.present == bytes([0, 0] + [1] * (len(params) - 1))
    assert table.addresses is not None
    assert list(table.addresses) == [0, 0, *(p.grad.data_ptr() for p in params[1:] if p.grad is not None)]


class Redirecting(nn.Parameter):
    """A parameter whose class keeps its gradients elsewhere."""

    kept: Tensor | None = None

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        return self.kept


class Answering(nn.Parameter):
    """A parameter whose class has a say in every look-up."""

    kept: Tensor | None = None

    def __getattribute__(self, name: str) -> object:
        return object.__getattribute__(self, "kept" if name == "grad" else name)


@both_ways
def test_gradients_are_what_each_class_says() -> None:
    """Classes may take turns, and none gets the getter of another."""
    params: list[nn.Parameter] = []
    for kind in (nn.Parameter, Redirecting, nn.Parameter, Answering, Answering, Redirecting):
        param = kind(torch.zeros(2))
        gradient = torch.ones(2)
        if kind is nn.Parameter:
            param.grad = gradient
        else:
            param.kept = gradient
        params.append(param)
    expected = [param.grad for param in params]
    assert None not in expected
    found = TensorSnapshot.of(params).gradients().gradients
    assert all(a is b for a, b in zip(found, expected, strict=True))
    assert unexpected_gradients(params, expected) == []


@both_ways
def test_unexpected_gradients() -> None:
    """They are told apart by identity, and None is no gradient."""
    params = matrices()[:4]
    for param in params[:3]:
        param.grad = torch.zeros_like(param)
    expected = [param.grad for param in params]
    assert unexpected_gradients(params, expected) == []
    params[0].grad = torch.zeros_like(params[0])
    params[2].grad = None
    params[3].grad = torch.zeros_like(params[3])
    assert unexpected_gradients(params, expected) == [0, 2, 3]
    with pytest.raises(ValueError, match=r"each parameter|shorter"):
        unexpected_gradients(params, expected[:2])


class Marked(Tensor):
    """A subclass of Tensor."""


def negated() -> Tensor:
    """Ones that are stored as minus ones, with contiguous strides."""
    return torch._neg_view(torch.full((3, 3), -1.0))


INDIRECT: dict[str, Callable[[], Tensor]] = {
    "strides": lambda: torch.ones(3, 3).t(),
    "rows": lambda: torch.ones(9, 3)[::3],
    "negated": negated,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "subclass": lambda: torch.ones(3, 3).as_subclass(Marked),
}
SMUGGLED: dict[str, Callable[[], Tensor]] = {
    "dtype": lambda: torch.ones(3, 3, dtype=torch.float64),
    "shape": lambda: torch.ones(9),
    "rows": lambda: torch.ones(2, 3),
}


@both_ways
@pytest.mark.parametrize("kind", INDIRECT)
def test_gradients_that_do_not_lie_as_their_parameters(kind: str) -> None:
    """There are no addresses if a single gradient is not direct."""
    params = matrices()
    held = TensorSnapshot.of(params)
    for param in params[1:]:
        param.grad = torch.ones_like(param)
    params[0].grad = INDIRECT[kind]()
    table = held.gradients()
    assert table.addresses is None
    assert all(a is p.grad for a, p in zip(table.gradients, params, strict=True))
    assert table.present == bytes([1] * len(params))


@both_ways
@pytest.mark.parametrize("kind", SMUGGLED)
def test_gradients_that_were_changed_after_they_were_set(kind: str) -> None:
    """Torch checks a gradient only when it is set, so the table does."""
    params = matrices()
    held = TensorSnapshot.of(params)
    params[0].grad = torch.ones(3, 3)
    params[0].grad.data = SMUGGLED[kind]()
    assert held.gradients().addresses is None


@both_ways
def test_what_dlpack_does_not_know() -> None:
    """Tensors on the meta device are compared in Python."""
    params = [nn.Parameter(torch.zeros(3, device="meta"))]
    held = TensorSnapshot.of(params)
    assert held.is_current()
    params[0].data = torch.zeros(3, 2, device="meta")
    assert not held.is_current()


def test_records_of_other_tensors_are_refused() -> None:
    """The module does not read past the end of the records."""
    module = snapshots._compiled()
    if module is None:
        pytest.skip("snapshots.c is not compiled")
    exchange = Tensor.__dlpack_c_exchange_api__
    one = [torch.zeros(3)]
    described = module.describe(one, exchange)
    for torn in (described, described[:-8], described[:10], b""):
        with pytest.raises(ValueError, match="described"):
            module.unchanged([*one, *one], torn, exchange)
    with pytest.raises(ValueError, match="8 bytes"):
        module.gradients(one, described, exchange, Tensor, Tensor.is_neg, array("Q", [0, 0]))
    with pytest.raises(IndexError):
        module.pick(array("Q", [1]), array("q", [1, 0]), array("Q", [0]))
    with pytest.raises(IndexError):
        module.pick(array("Q", [1]), array("q", [0]), array("Q", [0]))


def published() -> dict[Tensor, dict[str, Tensor]]:
    """Make state as an optimizer publishes it."""
    step = torch.zeros(())
    return {nn.Parameter(torch.zeros(2)): {"step": step, "ax": torch.zeros(2)} for _ in range(3)}


@both_ways
def test_published_state() -> None:
    """The objects may be in any order and among others, but none may be replaced or missing."""
    state = published()
    snapshot = PublishedState(("step", "ax"), state)
    assert snapshot.matches(state)
    assert snapshot.matches({param: {**own, "more": own["ax"]} for param, own in state.items()})
    assert snapshot.matches(dict(reversed(state.items())))
    assert snapshot.matches({param: dict(reversed(own.items())) for param, own in state.items()})
    first, _, last = state
    for wrong in ({"step": state[last]["step"]}, {**state[last], "ax": torch.zeros(2)}, {}):
        assert not snapshot.matches({**state, last: wrong})
    swapped = {"step": state[last]["ax"], "ax": state[last]["step"]}
    renamed = {"steps": state[last]["step"], "ax": state[last]["ax"]}
    for wrong in (swapped, renamed):
        assert not snapshot.matches({**state, last: wrong})
    assert not snapshot.matches({param: own for param, own in state.items() if param is not first})


@both_ways
def test_address_table() -> None:
    """Offsets are added to addresses; an address 0 stays 0."""
    table = AddressTable([(2, 4), (0, 0), (1, 8)])
    assert list(table.of(array("Q", [100, 0, 2**63]))) == [2**63 + 4, 100, 0]
    assert list(AddressTable([]).of(array("Q"))) == []


def stepping(**options: object) -> tuple[list[nn.Parameter], ShardedASGD]:
    """Make an optimizer and let it take a step."""
    params = [nn.Parameter(torch.ones(3, 3)) for _ in range(3)]
    optimizer = ShardedASGD([(f"layer{i}", p) for i, p in enumerate(params)], lr=1.0, lambd=0.0, **options)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return params, optimizer


@both_ways
@pytest.mark.parametrize("key", ["step", "eta", "mu", "ax"])
def test_replaced_state_is_an_error_that_names_the_parameter(key: str) -> None:
    """Without the error, the optimizer would go on with its own tensor."""
    params, optimizer = stepping()
    optimizer.state[params[1]][key] = optimizer.state[params[1]][key] + 1
    with pytest.raises(RuntimeError, match="layer1 was replaced"):
        optimizer.step()


@both_ways
def test_a_lazily_negated_gradient_is_used_as_it_reads() -> None:
    """Its memory holds the opposite values."""
    params, optimizer = stepping(fused=True)
    params[1].grad = negated()
    optimizer.step()
    assert [param[0, 0].item() for param in params] == [-1.0, -1.0, -1.0]


@both_ways
@pytest.mark.parametrize("kind", SMUGGLED)
def test_a_changed_gradient_is_an_error_that_names_the_parameter(kind: str) -> None:
    """The error comes before the kernel reads past the end."""
    params, optimizer = stepping(fused=True)
    assert params[2].grad is not None
    params[2].grad.data = SMUGGLED[kind]()
    with pytest.raises(RuntimeError, match="gradient of parameter layer2"):
        optimizer.step()


@both_ways
def test_a_step_keeps_no_gradients() -> None:
    """Their memory is freed when the user drops them, also after a step that failed."""
    params, optimizer = stepping(fused=True)
    for lr in (1.0, -1.0):
        optimizer.param_groups[0]["lr"] = lr
        with contextlib.suppress(ValueError):
            optimizer.step()
        alive = [weakref.ref(param.grad) for param in params]
        optimizer.zero_grad()
        if lr < 0:
            gc.collect()  # an exception and the frames that it went through hold each other
        assert [ref() for ref in alive] == [None, None, None]
        for param in params:
            param.grad = torch.ones_like(param)


@pytest.mark.parametrize(("key", "value"), [("maximize", 0), ("lambd", False), ("fused", 1), ("alpha", float("nan"))])
def test_hyperparameters_are_checked_again_where_they_were_set_again(key: str, value: object) -> None:
    """They are checked even if the new value is equal to the old one, but of another type."""
    _, optimizer = stepping(fused=True)
    optimizer.step()
    optimizer.param_groups[0][key] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=key):
            optimizer.step()


def test_a_tensor_lr_is_checked_at_each_step() -> None:
    """Its value can change in place."""
    params = [nn.Parameter(torch.ones(3))]
    lr = torch.tensor(0.1)
    optimizer = ShardedASGD(params, lr=lr)
    params[0].grad = torch.ones(3)
    optimizer.step()
    lr.fill_(-1.0)
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer.step()
