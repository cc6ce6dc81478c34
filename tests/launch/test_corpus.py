"""The text that ranks train on: what is held out stays out, and a step's windows depend on the step alone."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.launch.runs import REPOSITORY

CONTEXT = 8


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, found as launch/trainer/train.py finds it."""
    monkeypatch.syspath_prepend(REPOSITORY / "launch" / "trainer")
    return importlib.import_module("corpus")


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A folder with a text in which every word occurs once."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "numbers").write_text("".join(f"{number:06} " for number in range(10_000)))
    (tmp_path / "b").write_text("end of the text")
    return tmp_path


def test_every_byte_is_trained_on_or_held_out(corpus: ModuleType, numbers: Path) -> None:
    text = corpus.read_corpus([numbers], CONTEXT)
    assert text.num_files == 2
    assert len(text.train) + len(text.held_out) == 70_000 + 1 + 15  # with the separator of the files
    assert 0.04 < len(text.held_out) / 70_000 < 0.06
    words = [set(part.tobytes().split()[1:-1]) for part in (text.train, text.held_out)]
    # Words cut by a block's border are in neither part whole.
    assert len([word for word in words[0] & words[1] if len(word) == 6]) == 0
    assert corpus.read_corpus([numbers], CONTEXT).fingerprint == text.fingerprint


def test_windows_depend_on_seed_step_and_index_alone(corpus: ModuleType, numbers: Path) -> None:
    text = corpus.read_corpus([numbers], CONTEXT)

    def batch(seed: int = 0, step: int = 5, batch_index: int = 0) -> torch.Tensor:
        return text.batch(seed=seed, step=step, batch_index=batch_index, num_batches=4, windows=3, context=CONTEXT)

    assert batch().shape == (3, CONTEXT + 1)
    assert torch.equal(batch(), batch())
    for other in (batch(seed=1), batch(step=6), batch(batch_index=1)):
        assert not torch.equal(batch(), other)


def test_held_out_windows_do_not_overlap(corpus: ModuleType, numbers: Path) -> None:
    text = corpus.read_corpus([numbers], CONTEXT)
    windows = text.held_out_windows(windows=10**6, context=CONTEXT)
    targets = windows[:, 1:].flatten()
    assert targets.tolist() == text.held_out[1 : len(targets) + 1].tolist()  # each once, in order
    assert text.held_out_windows(windows=16, context=CONTEXT).shape == (16, CONTEXT + 1)


def test_too_short_a_text_is_an_error(corpus: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("short")
    with pytest.raises(ValueError, match="5 bytes of text are too few"):
        corpus.read_corpus([tmp_path], CONTEXT)
    with pytest.raises(ValueError, match="no such file or folder"):
        corpus.read_corpus([tmp_path / "absent"], CONTEXT)
