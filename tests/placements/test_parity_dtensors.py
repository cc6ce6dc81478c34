"""Parity over DTensors: the histories of ``test_parity`` end on torch's bits however parameters were sharded before.

All but 16-bit parameters are compared with ``torch.optim.ASGD`` on the whole model, in one process: an update that acts
element by element must not depend on where elements are. On CPUs torch itself rounds 16-bit ones by their place in the
tensor that they are in (see ``harness.oracle``), and of a DTensor that is its local tensor: so the oracle of those is
``torch.optim.ASGD`` on local tensors, which is what torch would do with these parameters. With masters nothing is
rounded by place, and the oracle is whole again.
"""

import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.history import AddGroup, GroupSpec, History, ParamSpec, Reload, Step
from tests.harness.placements import KINDS
from tests.harness.ranks import run
from tests.harness.strategies import RELOADS, histories
from tests.harness.subject import Saved, Setting, check_history
from tests.test_parity import EVERYTHING, TINY_BUCKETS_MB

EXAMPLES = int(os.environ.get("PARITY_EXAMPLES", "2"))
DTYPES = [("float64", "complex64"), ("bfloat16",), ("float16",), ("float32", "bfloat16", "complex64")]
NARROW = [("bfloat16",), ("bfloat16", "float16")]

# FSDP2 is saved and loaded through torch's helpers, too.
RELOADS_OF_DTENSORS = (*RELOADS, "by name", "full")
# Some fragments are empty, or have strides that no dense tensor has.
STRIDED = GroupSpec((ParamSpec((0,), layout="sliced"), ParamSpec((2, 7), layout="transposed")))
BY_NAME = (AddGroup(STRIDED), Step(), Reload("by name"), Step(), Reload("full"), Step())
ALL_OF_IT = replace(EVERYTHING, events=(*EVERYTHING.events, *BY_NAME))

forms = pytest.mark.parametrize("form", ["forloop", "foreach", "fused"])


@st.composite
def worlds(
    draw: st.DrawFn, form: str, kinds: tuple[str, ...] = tuple(KINDS), masters: bool = False
) -> tuple[int, Setting]:
    """Draw a world size and the options of a history there, with parameters placed in one of ``kinds``."""
    kind = draw(st.sampled_from(kinds))
    world_size = draw(st.sampled_from(KINDS[kind]))
    # Plain parameters beside DTensors may be sharded in hybrid.
    hybrid = kind == "mixed" and world_size == 4 and draw(st.booleans())
    setting = Setting(
        stage=draw(st.sampled_from([1, 2])),
        form=form,
        bucket_cap_mb=draw(st.sampled_from([TINY_BUCKETS_MB, 25.0])),
        masters=masters,
        mesh=(2, 2) if hybrid else None,
        placement=kind,
        shard_replicated=draw(st.booleans()),
    )
    return world_size, setting


def placed_histories(dtypes: tuple[str, ...] = ("float32",)) -> st.SearchStrategy[History]:
    """Draw histories whose parameters may be DTensors."""
    return histories(dtypes, reloads=RELOADS_OF_DTENSORS)


def check(world: tuple[int, Setting], history: History) -> None:
    """Run the history beside torch's."""
    world_size, setting = world
    run("gloo", world_size, check_history, history, setting)


@forms
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_histories_are_torch_to_the_bit(kind: str, form: str, data: st.DataObject) -> None:
    """Histories run with every kind of placement and every implementation, in float32."""
    check(data.draw(worlds(form, (kind,))), data.draw(placed_histories()))


@pytest.mark.parametrize(("kind", "shares"), [*((kind, True) for kind in KINDS), ("hsdp", False)])
def test_all_that_happens_on_as_many_ranks_as_there_can_be(kind: str, shares: bool) -> None:
    """One history has every event, and parameters of which some of the 4 ranks have no element."""
    setting = Setting(2, "fused", TINY_BUCKETS_MB, placement=kind, shard_replicated=shares)
    check((4, setting), ALL_OF_IT)


@forms
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_elements_are_rounded_by_their_place_in_the_local_tensor(dtype: str, form: str) -> None:
    """Local tensors fill vector lanes or leave a rest, and are cut between replicas; drawn ones are often too small."""
    shapes = ((64,), (65, 3), (130,), (33,))
    group = GroupSpec(tuple(ParamSpec(shape, dtype) for shape in shapes), t0=0, weight_decay=0.1)
    history = History((group,), (Step(), Step(), Step()))
    check((4, Setting(1, form, TINY_BUCKETS_MB, placement="hsdp")), history)


@forms
@pytest.mark.parametrize("dtypes", DTYPES, ids="+".join)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_histories_of_every_dtype_are_torch_to_the_bit(dtypes: tuple[str, ...], form: str, data: st.DataObject) -> None:
    """Histories run with every dtype, and with several in one group, in drawn placements."""
    check(data.draw(worlds(form)), data.draw(placed_histories(dtypes)))


@forms
@pytest.mark.parametrize("dtypes", NARROW, ids="+".join)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_masters_are_float32_parameters_to_the_bit(dtypes: tuple[str, ...], form: str, data: st.DataObject) -> None:
    """Masters are torch's on whole float32 parameters, and the local tensors are their roundings."""
    check(data.draw(worlds(form, masters=True)), data.draw(placed_histories(dtypes)))


@forms
@settings(max_examples=EXAMPLES)
@given(history=placed_histories(("float32", "complex64")), data=st.data())
def test_a_history_goes_on_placed_otherwise(form: str, history: History, data: st.DataObject) -> None:
    """A consolidated state dict is loaded at another world size, by plain parameters or ones with other placements."""
    stop = data.draw(st.integers(1, len(history.events) - 1))
    (ranks, first), (other_ranks, other) = data.draw(worlds(form)), data.draw(worlds(form))
    # The oracle goes through the whole history with the gradients of one stage.
    other = replace(other, stage=first.stage, placement=data.draw(st.sampled_from([other.placement, None])))
    saved: list[Saved] = run("gloo", ranks, check_history, history, first, stop)
    run("gloo", other_ranks, check_history, history, other, None, saved[0])
