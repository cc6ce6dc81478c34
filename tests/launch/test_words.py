"""The word-level trainer: weight drop against a formula, windows, and runs on two ranks with NT-ASGD."""

import importlib
import json
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import dropout

from dist_asgd import ShardedASGD
from tests.harness.bits import assert_same_bits
from tests.harness.ranks import run
from tests.launch.ranks import run_ranks
from tests.launch.runs import REPOSITORY, losses

TRAINER = REPOSITORY / "launch" / "trainer"
SCRIPT = TRAINER / "train_words.py"
# As small as it can be; the learning rate is so large that the held-out loss soon rises.
TINY = (
    *("--width", "8", "--hidden", "12", "--vocabulary", "40", "--train-words", "3000", "--eval-words", "400"),
    *("--bptt", "8", "--batch", "3", "--lr", "40", "--clip", "0", "--weight-decay", "0", "--patience", "2"),
    *("--steps", "40", "--eval-every", "4", "--log-every", "1", "--drop", "0.2", "--weight-drop", "0.4"),
)
Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a file of the trainer by its bare name, as the script does."""
    monkeypatch.syspath_prepend(str(TRAINER))
    return importlib.import_module


# --- weight drop --------------------------------------------------------------------------------------------


def cells(layer: nn.LSTM, recurrent: Tensor, inputs: Tensor) -> Tensor:
    """The outputs of an LSTM layer by its equations, with ``recurrent`` as its recurrent matrix."""
    hidden = cell = torch.zeros(inputs.shape[1], layer.hidden_size, dtype=inputs.dtype)
    outputs = []
    for now in inputs:
        gates = now @ layer.weight_ih_l0.t() + layer.bias_ih_l0 + hidden @ recurrent.t() + layer.bias_hh_l0
        entry, forget, candidate, exit_ = gates.chunk(4, dim=1)
        cell = forget.sigmoid() * cell + entry.sigmoid() * candidate.tanh()
        hidden = exit_.sigmoid() * cell.tanh()
        outputs.append(hidden)
    return torch.stack(outputs)


@pytest.mark.parametrize("training", [True, False])
def test_weight_drop_and_its_gradients_follow_the_equations(
    trainer: Callable[[str], ModuleType], training: bool
) -> None:
    """In training with a mask, of which each element is 0 or 1 / (1 - share); in evaluation with the whole matrix."""
    torch.manual_seed(0)
    lstm = trainer("lstm")
    dropped = lstm.WeightDrop(lstm.Recurrence(5, 7), 0.4).double().train(training)
    layer, inputs = dropped.layer, torch.randn(6, 3, 5, dtype=torch.float64)
    hidden = torch.zeros(1, 3, 7, dtype=torch.float64)
    weights = torch.randn(6, 3, 7, dtype=torch.float64)
    for seed in (1, 2):
        torch.manual_seed(seed)
        (dropped(inputs, (hidden, hidden))[0] * weights).sum().backward()
        found = {name: p.grad for name, p in layer.named_parameters()}
        layer.zero_grad()

        torch.manual_seed(seed)
        mask = dropout(torch.ones_like(layer.weight_hh_l0), 0.4, training)
        assert sorted(mask.unique().tolist()) == pytest.approx([0.0, 1 / 0.6] if training else [1.0])
        recurrent = (layer.weight_hh_l0 * mask).detach().requires_grad_()
        outputs = cells(layer, recurrent, inputs)
        (outputs * weights).sum().backward()
        assert recurrent.grad is not None
        torch.testing.assert_close(found["weight_hh_l0"], recurrent.grad * mask)
        for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
            torch.testing.assert_close(found[name], getattr(layer, name).grad)
        layer.zero_grad()
        torch.testing.assert_close(
            dropped.eval()(inputs, (hidden, hidden))[0], cells(layer, layer.weight_hh_l0, inputs)
        )
        dropped.train(training)


def test_locked_dropout_drops_the_same_features_at_all_times(trainer: Callable[[str], ModuleType]) -> None:
    """Of each column others."""
    values = trainer("lstm").locked_dropout(torch.ones(9, 4, 50), 0.5, True)
    assert torch.equal(values, values[:1].expand_as(values))
    assert not torch.equal(values[:, 0], values[:, 1])
    assert sorted(values.unique().tolist()) == [0.0, 2.0]


class Flattening(nn.LSTM):
    """An LSTM that binds its weights to one chunk when cuDNN would, and counts how often."""

    num_flattened = 0

    def flatten_parameters(self) -> None:
        weights = [weight for weight in self._flat_weights if isinstance(weight, Tensor)]
        if len(weights) != len(self._flat_weights_names):
            return
        chunk = torch.cat([weight.detach().flatten() for weight in weights])
        for weight, values in zip(weights, chunk.split([weight.numel() for weight in weights]), strict=True):
            weight.data = values.view_as(weight)
        self.num_flattened += 1


def with_flattened_weights(_rank: int, _world_size: int, stage: int) -> None:
    """Job: forwards that rebind weights, in training and inside of averages, train as forwards that do not."""
    results = []
    for kind in (Flattening, nn.LSTM):
        layer = kind(4, 5)
        for index, p in enumerate(layer.parameters()):
            nn.init.constant_(p, 0.1 * (1 + index))
        optimizer = ShardedASGD(layer.named_parameters(), lr=0.1, t0=1, stage=stage, bucket_cap_mb=0.0005)
        held_out = []
        for number in range(6):
            inputs = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(number))
            mask = (torch.rand(20, 5, generator=torch.Generator().manual_seed(9 + number)) > 0.3).float()
            optimizer.zero_grad()
            dropped = {"weight_hh_l0": layer.weight_hh_l0 * mask}
            functional_call(layer, dropped, (inputs,))[0].square().sum().backward()
            optimizer.step()
            with torch.no_grad(), optimizer.averaged_parameters():
                held_out.append(layer(inputs)[0])
        results.append([*held_out, *(p.detach().clone() for p in layer.parameters())])
        if isinstance(layer, Flattening):
            assert layer.num_flattened >= 12, "each of these forwards has to rebind the weights"
    for found, expected in zip(*results, strict=True):
        assert_same_bits(found, expected, "with flattened weights")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_weights_that_forwards_flatten(backend: str, world_size: int, stage: int) -> None:
    """To the bit: cuDNN's chunks may take the weights of a plain ``nn.LSTM`` away in every forward."""
    run(backend, world_size, with_flattened_weights, stage)


# --- words and windows --------------------------------------------------------------------------------------


def test_windows_follow_each_other(trainer: Callable[[str], ModuleType]) -> None:
    """Each begins where the one before ended, and has a next word; a longer run has the windows of a shorter one."""
    words = trainer("words")
    drawn = words.windows(3, 500, 301, 20)
    for before, window in pairwise(drawn):
        assert window.start == before.start + before.length or (window.start, before.start + before.length) == (0, 300)
    lengths = [window.length for window in drawn]
    assert all(length >= 1 for length in lengths)
    assert all(window.start + window.length < 301 for window in drawn)
    full = [window.length for window in drawn if window.start + window.length < 300]
    assert 5 <= min(full) < 15 < 20 < max(full)
    assert sum(full) / len(full) == pytest.approx(19.5, abs=1.0)
    assert words.windows(3, 100, 301, 20) == drawn[:100]
    assert words.windows(4, 100, 301, 20) != drawn[:100]


def test_ranks_read_columns_of_one_text(trainer: Callable[[str], ModuleType]) -> None:
    """Side by side, each one a stretch of the text."""
    words = trainer("words")
    text = torch.arange(23)
    columns = torch.cat([words.columns_of(text, 4, first, first + 2) for first in (0, 2)], dim=1)
    assert columns.t().tolist() == [[5 * column + row for row in range(5)] for column in range(4)]
    inputs, targets = words.rows(columns, words.Window(1, 3))
    assert torch.equal(inputs + 1, targets)
    with pytest.raises(ValueError, match="too few for 12 columns"):
        words.columns_of(text, 12, 0, 6)


def test_words_and_their_numbers(trainer: Callable[[str], ModuleType]) -> None:
    """The most frequent words of the training text have numbers, and all others share one."""
    import numpy as np

    words, corpus = trainer("words"), trainer("corpus")
    train, held_out = (np.frombuffer(text, dtype=np.uint8) for text in (b"a_1 = a_1 + 12\n= a_1 b", b"a_1 b = c"))
    found = words.read_words(corpus.Corpus(train, held_out, 1, 7), 3, 100, 3)
    assert found.train.tolist() == [1, 2, 1, 0, 0, 0, 2, 1, 0]
    assert found.held_out.tolist() == [1, 0, 2]
    assert (found.num_words, found.fingerprint) == (3, 7)
    with pytest.raises(ValueError, match="too few"):
        words.read_words(corpus.Corpus(train, held_out, 1, 7), 3, 100, 1)


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train_words(text: Path, environment: dict[str, str]) -> Train:
    """Runs the word-level trainer to its end, on two ranks unless ``ranks`` says otherwise."""

    def start(*arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
        return run_ranks(ranks, [*TINY, "--data", str(text), *arguments], environment, SCRIPT)

    return start


@pytest.fixture(scope="module")
def finished(train_words: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, str]]:
    """Where a run of each stage left its files, and what it printed."""
    found = {}
    for stage in (1, 2):
        out = tmp_path_factory.mktemp(f"words-{stage}")
        run_ = train_words("--stage", str(stage), "--checkpoint-every", "8", "--keep", "9", "--out", str(out))
        assert run_.returncode == 0, run_.stdout
        found[stage] = (out, run_.stdout)
    return found


def triggered_at(out: Path) -> int:
    """The step at which algorithm 1 begins to average, by the losses that a run has logged."""
    held_out = losses(out)["held_out_last"]
    logged: list[float] = []
    for step, loss in held_out.items():
        if len(logged) > 2 and loss > min(logged[:-2]):
            return step
        logged.append(loss)
    raise AssertionError(f"the losses never ask for averaging: {held_out}")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_begins_to_average_when_its_losses_ask_for_it(finished: dict[int, tuple[Path, str]], stage: int) -> None:
    """Not before, and says so; afterwards the average is another point."""
    out, output = finished[stage]
    begins = triggered_at(out)
    assert f"step {begins}: the held-out loss is above the lowest one before the last 2 evaluations" in output
    assert output.count("so averaging begins") == 1
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["first_average_step"], summary["unit"]) == (begins, "word")
    curves = losses(out)
    for step in curves["held_out_last"]:
        assert (curves["held_out_average"][step] == curves["held_out_last"][step]) == (step <= begins)
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "nats per word" in output


def test_stages_agree_to_the_bit(finished: dict[int, tuple[Path, str]]) -> None:
    """On two ranks, where there is one order of summing, and without clipping."""
    assert losses(finished[1][0]) == losses(finished[2][0])


def test_a_resumed_run_takes_the_same_decision(
    finished: dict[int, tuple[Path, str]], train_words: Train, tmp_path: Path
) -> None:
    """Bit for bit, with the hidden states, dropout and learning rates of the run that was not interrupted."""
    begins = triggered_at(finished[1][0])
    step = (begins - 1) // 8 * 8
    assert step > 0, "there is no checkpoint before the trigger"
    out = tmp_path / "out"
    shutil.copytree(finished[1][0], out, symlinks=True)
    kept = tmp_path / "kept"
    shutil.move(out / "checkpoint" / f"step-{step:08}", kept)
    shutil.rmtree(out / "checkpoint")
    run_ = train_words("--stage", "1", "--out", str(out), "--resume-from", str(kept))
    assert run_.returncode == 0, run_.stdout
    assert f"resumed after step {step}" in run_.stdout
    assert "so averaging begins" in run_.stdout
    assert losses(out) == losses(finished[1][0])


def test_a_run_goes_on_on_another_number_of_ranks(
    finished: dict[int, tuple[Path, str]], train_words: Train, tmp_path: Path
) -> None:
    """In the other stage, on one rank, with the logged losses."""
    kept = str(finished[1][0] / "checkpoint" / "step-00000032")
    run_ = train_words("--stage", "2", "--out", str(tmp_path), "--resume-from", kept, ranks=1)
    assert run_.returncode == 0, run_.stdout
    summary: dict[str, Any] = json.loads((tmp_path / "summary.json").read_text())
    assert summary["first_average_step"] == triggered_at(finished[1][0])


def test_another_model_is_refused(finished: dict[int, tuple[Path, str]], train_words: Train, tmp_path: Path) -> None:
    """With the options that differ."""
    kept = str(finished[1][0] / "checkpoint" / "step-00000032")
    run_ = train_words("--out", str(tmp_path), "--resume-from", kept, "--hidden", "13", "--patience", "3", ranks=1)
    assert run_.returncode != 0
    assert "--hidden is 13, was 12, --patience is 3, was 2" in run_.stdout
