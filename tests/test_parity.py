"""Parity: random histories end, event by event, on the bits of ``torch.optim.ASGD``.

The oracle of the for-loop form and of the fused kernel is torch's for-loop form, of the foreach form torch's
foreach form; the two differ from each other. Histories have odd shapes and layouts, 1 to 3 groups with their own
hyperparameters, skipped gradients, changed learning rates, t0 inside the run, added groups, and saves and loads in
the middle.
"""

import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.harness.history import (
    AddGroup,
    GroupSpec,
    History,
    ParamSpec,
    Reload,
    SetLr,
    StartAveraging,
    Step,
)
from tests.harness.ranks import run
from tests.harness.strategies import histories
from tests.harness.subject import Saved, Setting, check_history

EXAMPLES = int(os.environ.get("PARITY_EXAMPLES", "3"))
TINY_BUCKETS_MB = 0.001
WORLDS = [("none", 1), ("threads", 1), ("threads", 2), ("threads", 3), ("threads", 4), ("gloo", 2), ("gloo", 3)]
DTYPES = [("float32",), ("float64",), ("bfloat16",), ("float16",), ("complex64",), ("float32", "bfloat16")]

forms = pytest.mark.parametrize("form", ["forloop", "foreach", "fused"])
stages = pytest.mark.parametrize("stage", [1, 2], ids=["stage1", "stage2"])

LAZY_ETA = History(
    (GroupSpec((ParamSpec((5,)), ParamSpec((3, 4)))),),
    (SetLr(0, 0.3), Step(who=("all", "none")), SetLr(0, 0.01), Step(), Step(who=("none", "all")), Step()),
)
EVERYTHING = History(
    (
        GroupSpec((ParamSpec((9, 5)), ParamSpec((), frozen=True), ParamSpec((33,))), t0=2, weight_decay=0.1),
        GroupSpec((ParamSpec((2, 3, 4, 5), layout="channels_last"), ParamSpec((0,))), maximize=True),
    ),
    (
        Step(who=("some", "all"), num_backwards=2, no_sync=True),
        Step(by_hand=(True, False)),
        StartAveraging(),
        Step(who=("none", "all", "some"), num_backwards=2),
        AddGroup(GroupSpec((ParamSpec((7,)), ParamSpec((6, 7), layout="transposed")), lambd=0.0, t0=0)),
        Step(),
        Reload("own"),
        Step(),
        Reload("consolidated"),
        Step(who=("none", "all")),
        Reload("torch"),
        Step(),
    ),
    named=True,
)


@forms
@stages
@pytest.mark.parametrize(("backend", "world_size"), WORLDS)
@settings(max_examples=EXAMPLES)
@example(history=LAZY_ETA, bucket_cap_mb=TINY_BUCKETS_MB)
@example(history=EVERYTHING, bucket_cap_mb=25.0)
@given(history=histories(), bucket_cap_mb=st.sampled_from([TINY_BUCKETS_MB, 25.0]))
def test_float32_histories_are_torch_to_the_bit(
    backend: str, world_size: int, stage: int, form: str, history: History, bucket_cap_mb: float
) -> None:
    """Every world size, stage and form."""
    run(backend, world_size, check_history, history, Setting(stage, form, bucket_cap_mb))


@forms
@stages
@pytest.mark.parametrize("dtypes", DTYPES, ids="+".join)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_histories_of_every_dtype_are_torch_to_the_bit(
    dtypes: tuple[str, ...], stage: int, form: str, data: st.DataObject
) -> None:
    """Every dtype, and two dtypes in one group, at a drawn world size and bucket size."""
    history = data.draw(histories(dtypes))
    backend, world_size = data.draw(st.sampled_from(WORLDS))
    setting = Setting(stage, form, data.draw(st.sampled_from([TINY_BUCKETS_MB, 25.0])))
    run(backend, world_size, check_history, history, setting)


@forms
@stages
@pytest.mark.parametrize("dtypes", [("bfloat16",), ("float16",), ("bfloat16", "float16")], ids="+".join)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_masters_are_float32_parameters_to_the_bit(
    dtypes: tuple[str, ...], stage: int, form: str, data: st.DataObject
) -> None:
    """Masters and averages are torch's on float32 parameters, and the parameters are their roundings."""
    history = data.draw(histories(dtypes))
    backend, world_size = data.draw(st.sampled_from(WORLDS))
    setting = Setting(stage, form, data.draw(st.sampled_from([TINY_BUCKETS_MB, 25.0])), masters=True)
    run(backend, world_size, check_history, history, setting)


@forms
@stages
@settings(max_examples=EXAMPLES)
@given(history=histories(("float32", "bfloat16", "complex64")), data=st.data())
def test_a_history_goes_on_at_another_world_size(stage: int, form: str, history: History, data: st.DataObject) -> None:
    """Saved consolidated at one world size and bucket size, loaded at another."""
    worlds = data.draw(st.permutations([1, 2, 3, 4]))
    stop = data.draw(st.integers(1, len(history.events) - 1))
    first = Setting(stage, form, TINY_BUCKETS_MB)
    saved: list[Saved] = run("threads", worlds[0], check_history, history, first, stop)
    run("threads", worlds[1], check_history, history, Setting(stage, form), None, saved[0])
