"""``step_in_backward=True``: the bits of stage 2, what it holds, and what it refuses."""

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
    SetTrained,
    StartAveraging,
    Step,
)
from tests.harness.ranks import run
from tests.harness.strategies import histories
from tests.harness.subject import Setting, check_history

EXAMPLES = int(os.environ.get("PARITY_EXAMPLES", "2"))
TINY_BUCKETS_MB = 0.001
WORLDS = [("none", 1), ("threads", 2), ("threads", 3), ("threads", 4), ("gloo", 2), ("gloo", 4)]
DTYPES = [("float32",), ("bfloat16",), ("float16",), ("complex64",), ("float32", "bfloat16")]
MANY = GroupSpec(tuple(ParamSpec((n, 40)) for n in (9, 8, 7, 6, 5)), t0=2, weight_decay=0.1)
EVERYTHING = History(
    (MANY, GroupSpec((ParamSpec((2, 3, 4, 5), layout="channels_last"), ParamSpec((3,), frozen=True)), maximize=True)),
    (
        SetLr(0, 0.3),
        Step(who=("all", "some", "all", "none")),
        Step(num_backwards=2),
        StartAveraging(),
        SetLr(0, 0.01),
        # Parameters that the step before did not have are reduced and updated in step().
        Step(who=("some", "all", "none")),
        Step(who=("all", "none"), by_hand=(False, False, True)),
        AddGroup(GroupSpec((ParamSpec((70,)), ParamSpec((6, 7), layout="transposed")), lambd=0.0, t0=0)),
        Step(),
        SetTrained(6, True),
        Step(),
        Reload("own"),
        Step(),
        Reload("consolidated"),
        Step(who=("none", "all")),
        Step(),
    ),
    named=True,
)


forms = st.sampled_from(["forloop", "foreach", "fused"])


@pytest.mark.parametrize(("backend", "world_size"), WORLDS)
@settings(max_examples=EXAMPLES)
@example(history=EVERYTHING, form="fused", bucket_cap_mb=TINY_BUCKETS_MB)
@example(history=EVERYTHING, form="foreach", bucket_cap_mb=0.01)
@given(history=histories(), form=forms, bucket_cap_mb=st.sampled_from([TINY_BUCKETS_MB, 0.01, 25.0]))
def test_histories_have_the_bits_of_torch(
    backend: str, world_size: int, history: History, form: str, bucket_cap_mb: float
) -> None:
    """Also with gradients on some ranks only, by hand, of parameters that are frozen and unfrozen, after reloads."""
    run(backend, world_size, check_history, history, Setting(2, form, bucket_cap_mb, in_backward=True))


@pytest.mark.parametrize("dtypes", DTYPES, ids="+".join)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_histories_of_every_dtype_have_the_bits_of_torch(dtypes: tuple[str, ...], data: st.DataObject) -> None:
    """At a drawn form, world size and bucket size; with masters if there are any."""
    history = data.draw(histories(dtypes))
    backend, world_size = data.draw(st.sampled_from(WORLDS))
    form = data.draw(forms)
    masters = dtypes in (("bfloat16",), ("float16",)) and data.draw(st.booleans())
    setting = Setting(2, form, data.draw(st.sampled_from([TINY_BUCKETS_MB, 25.0])), masters, in_backward=True)
    run(backend, world_size, check_history, history, setting)


@settings(max_examples=EXAMPLES)
@example(history=EVERYTHING, world=("gloo", (2, 2)))
@given(
    history=histories(("float32", "bfloat16")),
    world=st.sampled_from([("threads", (2, 2)), ("threads", (1, 3)), ("gloo", (2, 1)), ("gloo", (2, 2))]),
)
def test_hybrid_histories_have_the_bits_of_torch(history: History, world: tuple[str, tuple[int, int]]) -> None:
    """Every replica updates its shards."""
    backend, mesh = world
    setting = Setting(2, "fused", TINY_BUCKETS_MB, mesh=mesh, in_backward=True)
    run(backend, mesh[0] * mesh[1], check_history, history, setting)
