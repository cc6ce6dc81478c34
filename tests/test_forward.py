"""``overlap_forward``: ``step()`` returns while parameters travel, and the training is the same to the bit."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.harness.history import History
from tests.harness.ranks import run
from tests.harness.strategies import histories
from tests.harness.subject import Setting, check_history
from tests.test_parity import EVERYTHING, LAZY_ETA, TINY_BUCKETS_MB

WORLDS = [("none", 1, None), ("threads", 3, None), ("gloo", 2, None), ("gloo", 3, None), ("gloo", 4, (2, 2))]


@pytest.mark.parametrize("stage", [1, 2], ids=["stage1", "stage2"])
@settings(max_examples=3)
@example(history=LAZY_ETA, world=WORLDS[2], form="fused")
@example(history=EVERYTHING, world=WORLDS[2], form="forloop")
@example(history=EVERYTHING, world=WORLDS[4], form="fused")
@given(
    history=histories(("float32", "bfloat16")),
    world=st.sampled_from(WORLDS),
    form=st.sampled_from(["fused", "forloop", "foreach"]),
)
def test_histories_are_torch_to_the_bit(
    stage: int, history: History, world: tuple[str, int, tuple[int, int] | None], form: str
) -> None:
    """Whatever is read is what it would be if the step had waited."""
    backend, world_size, mesh = world
    setting = Setting(stage, form, TINY_BUCKETS_MB, mesh=mesh, overlap=True)
    run(backend, world_size, check_history, history, setting)
