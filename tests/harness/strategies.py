"""Hypothesis strategies that draw histories."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.harness.history import (
    AddGroup,
    Event,
    GroupSpec,
    History,
    ParamSpec,
    Reload,
    SetLr,
    SetT0,
    SetTrained,
    StartAveraging,
    Step,
)

_SHAPES = st.one_of(
    st.sampled_from([(), (0,), (1,), (2,), (17,), (33,), (3, 0), (64,), (65, 3), (8, 16)]),
    st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
)
RELOADS = ("own", "consolidated", "torch")
_LRS = st.sampled_from([1e-3, 0.01, 0.05, 0.1, 0.3])


@st.composite
def param_specs(draw: st.DrawFn, dtype: str) -> ParamSpec:
    """Draw one parameter of an odd shape, sometimes non-contiguous or frozen."""
    shape = draw(_SHAPES)
    layouts = ["contiguous"]
    if len(shape) >= 1:
        layouts.append("sliced")
    if len(shape) >= 2:
        layouts.append("transposed")
    if len(shape) == 4:
        layouts.append("channels_last")
    layout = draw(st.sampled_from(layouts))
    return ParamSpec(shape, dtype, layout, frozen=draw(st.integers(0, 9)) == 9)


@st.composite
def group_specs(draw: st.DrawFn, dtypes: tuple[str, ...]) -> GroupSpec:
    """Draw one group of one to five parameters with its own hyperparameters."""
    params = st.sampled_from(dtypes).flatmap(param_specs)
    return GroupSpec(
        params=tuple(draw(st.lists(params, min_size=1, max_size=5))),
        lr=draw(_LRS),
        lambd=draw(st.sampled_from([0.0, 1e-4, 0.01])),
        alpha=draw(st.sampled_from([0.5, 0.75, 1.0])),
        t0=draw(st.sampled_from([0, 1, 2.0, 3, 5, 1e6])),
        weight_decay=draw(st.sampled_from([0.0, 0.01, 0.1])),
        maximize=draw(st.booleans()),
        tensor_lr=draw(st.booleans()),
    )


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Draw one step; most parameters have gradients on all ranks."""
    who = st.sampled_from(["all", "all", "all", "some", "none"])
    return Step(
        who=tuple(draw(st.lists(who, min_size=1, max_size=5))),
        by_hand=tuple(draw(st.lists(st.sampled_from([False, False, True]), min_size=1, max_size=3))),
        num_backwards=draw(st.integers(1, 2)),
        no_sync=draw(st.booleans()),
    )


@st.composite
def histories(
    draw: st.DrawFn,
    dtypes: tuple[str, ...] = ("float32",),
    max_events: int = 10,
    reloads: tuple[str, ...] = RELOADS,
) -> History:
    """Draw one to three groups, with dtypes drawn from ``dtypes``, and at most ``max_events`` events."""
    groups = tuple(draw(st.lists(group_specs(dtypes), min_size=1, max_size=3)))
    group = st.integers(0, len(groups) - 1)
    rare: st.SearchStrategy[Event] = st.one_of(
        st.builds(SetLr, group, _LRS),
        st.builds(SetT0, group, st.sampled_from([0.0, 1.0, 4.0])),
        st.builds(StartAveraging),
        st.builds(SetTrained, st.integers(0, 14), st.booleans()),
        st.builds(AddGroup, group_specs(dtypes)),
        st.builds(Reload, st.sampled_from(reloads)),
    )
    events = draw(st.lists(st.one_of(steps(), steps(), rare), min_size=2, max_size=max_events))
    return History(groups, tuple(events), draw(st.integers(0, 2**16)), draw(st.booleans()))
