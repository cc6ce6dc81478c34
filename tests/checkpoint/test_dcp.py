"""torch's own recipe on a sharded optimizer: ``get_state_dict``, ``dcp.save``, ``dcp.load``, ``set_state_dict``."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from dist_asgd.placements.shard_tensor import ShardTensor, row_major_regions
from tests.harness.cases import every_value
from tests.harness.ranks import run
from tests.harness.topologies import Run, assert_same_state, build, whole_state

# (topology, ranks): every pair of neighbours is one way through a file.
PLACES = [("single", 1), ("stage1", 2), ("fsdp2", 2), ("stage2", 3), ("fsdp2", 4), ("stage1", 1), ("stage2", 4)]
PLACES += [("hsdp-sharded", 4), ("hsdp", 2), ("hsdp-sharded", 2), ("fsdp2-sharded", 3), ("hsdp-sharded", 4)]


def backend(topology: str) -> str:
    return "none" if topology == "single" else "gloo"


def options(flatten: bool) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=flatten)


def save(_rank: int, _world_size: int, topology: str, kind: str, folder: str, how: str) -> dict[str, Tensor]:
    """Job: train, save, and train on; the whole state after that."""
    live = build(topology, kind).train(4)
    model, optim = get_state_dict(live.model, live.optimizer, options=options(how != "nested"))
    state = {"model": model, "optim": optim}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "async":
            dcp.async_save(state, checkpoint_id=folder, no_dist=topology == "single").result()
        else:
            dcp.save(state, checkpoint_id=folder, no_dist=topology == "single")
    return whole_state(live.train(3))


def load(_rank: int, _world_size: int, topology: str, kind: str, folder: str, how: str, expected: Any) -> None:
    """Job: load into a fresh model and optimizer, and go on with the same bits."""
    live = build(topology, kind, seed=7)
    model, optim = get_state_dict(live.model, live.optimizer, options=options(how != "nested"))
    state: dict[str, Any] = {"model": model, "optim": optim}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=topology == "single")
    set_state_dict(
        live.model,
        live.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optim"],
        options=options(how != "nested"),
    )
    assert_same_state(Run(topology, live.model, live.optimizer, 4).train(3), expected)


@every_value(step=range(len(PLACES)), how=["flattened", "nested", "async", "flattened", "nested"])
def test_torchs_recipe_moves_between_topologies(step: int, how: str, tmp_path: Path) -> None:
    """A state that one topology saved loads in the next one, bit for bit."""
    source, target = PLACES[step - 1], PLACES[step]
    expected = run(backend(source[0]), source[1], save, source[0], "mlp", str(tmp_path), how)[0]
    run(backend(target[0]), target[1], load, target[0], "mlp", str(tmp_path), how, expected)


@every_value(kind=["odd", "complex", "bfloat16"], ranks=[(1, 3), (3, 2), (4, 1), (2, 4)])
def test_odd_parameters_move_too(kind: str, ranks: tuple[int, int], tmp_path: Path) -> None:
    """Tied, frozen, transposed, channels_last, 0-dim, empty, unused and complex parameters load, and wider averages."""
    source, target = (("single" if n == 1 else "stage1", n) for n in ranks)
    expected = run(backend(source[0]), source[1], save, source[0], kind, str(tmp_path), "flattened")[0]
    run(backend(target[0]), target[1], load, target[0], kind, str(tmp_path), "flattened", expected)


def without_copies(_rank: int, _world_size: int) -> None:
    """Job: ``state_dict()`` hands out the optimizer's own memory, and every region is a view of it."""
    live = build("stage1").train(3)
    for index, entry in live.optimizer.state_dict()["state"].items():
        param = list(live.model.parameters())[index]
        own = live.optimizer.state[param]["ax"]
        assert isinstance(entry["ax"], ShardTensor)
        assert entry["ax"].shape == param.shape
        assert entry["ax"].to_local().data_ptr() == own.data_ptr()
        for _, view in entry["ax"].regions():
            assert view.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()


def test_state_dict_copies_nothing() -> None:
    """Saving copies no shard, however large it is."""
    run("gloo", 2, without_copies)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    """Draw a shape, an order of its dimensions in memory, and a range of elements."""
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    bounds = st.integers(0, math.prod(shape))
    start, stop = sorted((draw(bounds), draw(bounds)))
    return shape, list(order), start, stop


@given(ranges())
def test_boxes_tile_the_range(drawn: tuple[list[int], list[int], int, int]) -> None:
    """The regions hold exactly the elements of the range, each where it belongs, and are at most 2·N - 1."""
    shape, order, start, stop = drawn
    whole = torch.arange(math.prod(shape)).view([shape[d] for d in order])
    whole = whole.permute([order.index(d) for d in range(len(order))])
    part = ShardTensor(whole.as_strided((stop - start,), (1,), start), whole.shape, whole.stride(), start)
    seen = torch.zeros(shape, dtype=torch.bool)
    boxes = part.regions()
    for (offsets, sizes), view in boxes:
        place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        assert torch.equal(whole[place], view)
        assert not seen[place].any()
        seen[place] = True
    assert sorted(whole[seen].tolist()) == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_a_range_that_is_a_box_is_one_box() -> None:
    """Neighbours are merged: for whole rows, for a range inside one row, and for the whole tensor."""
    assert row_major_regions(12, 36, (6, 3, 4)) == [((1, 0, 0), (2, 3, 4))]
    assert row_major_regions(13, 15, (6, 3, 4)) == [((1, 0, 1), (1, 1, 2))]
    assert row_major_regions(0, 72, (6, 3, 4)) == [((0, 0, 0), (6, 3, 4))]
    assert row_major_regions(5, 5, (6, 3, 4)) == []
    assert row_major_regions(0, 1, ()) == [((), ())]
