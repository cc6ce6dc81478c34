"""Averages beside an optimizer in checkpoints: any topology loads what another has saved, all of it or nothing."""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from typer.testing import CliRunner

from dist_asgd import (
    AverageRule,
    CheckpointManager,
    ExponentialMean,
    HalfLife,
    ShardedASGD,
    ShardedAverage,
    UniformMean,
    async_save_checkpoint,
    export_averaged,
    load_checkpoint,
    save_checkpoint,
)
from dist_asgd.cli import app
from dist_asgd.update.weights import AverageSchedule
from tests.checkpoint.test_any_optimizer import placed, whole
from tests.harness.bits import assert_same_bits
from tests.harness.meshes import hybrid_mesh
from tests.harness.models import mlp
from tests.harness.ranks import run, run_errors
from tests.harness.topologies import build

RULES: dict[str, tuple[AverageRule, int]] = {
    "ema": (ExponentialMean(0.75), 0),
    "tail": (UniformMean(), 3),
    "half-life": (HalfLife(2, every=2), 1),
}


class Life:
    """A model, AdamW (or another optimizer) and averages of it, on ``kind`` of parameters. Collective.

    They are ``plain`` on every rank, ``hybrid`` (plain, and two replicas of the averages' shards), or DTensors of
    ``fsdp2``, ``hsdp`` or tensor parallelism (``tp``); ``stage2`` has a ShardedASGD.
    """

    def __init__(self, kind: str, seed: int = 0, rules: Any = RULES) -> None:
        self.model: nn.Module = mlp(width=8, depth=1, seed=seed)
        if kind == "fsdp2":
            fully_shard(self.model)
        elif kind in ("hsdp", "tp"):
            self.model = build(kind, seed=seed).model
            del self.model.seen
        if kind == "stage2":
            self.optimizer: torch.optim.Optimizer = ShardedASGD(
                self.model.named_parameters(), lr=0.02, t0=2, stage=2, bucket_cap_mb=0.001
            )
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        self.averages = {
            name: ShardedAverage(
                self.model.named_parameters(),
                weight=rule,
                start=start,
                bucket_cap_mb=0.001,
                mesh=hybrid_mesh((2, 2)) if kind == "hybrid" else None,
            )
            for name, (rule, start) in rules.items()
        }

    def step(self, number: int) -> None:
        """Take a step with the gradients of this number, the same on all ranks."""
        for name, param in self.model.named_parameters():
            draw = torch.Generator().manual_seed(1000 * number + sum(name.encode()))
            param.grad = placed(torch.randint(-64, 65, param.shape, generator=draw) / 256.0, param)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def update(self) -> None:
        """Update all averages."""
        for average in self.averages.values():
            average.update()

    def everything(self) -> dict[str, Tensor]:
        """Parameters, state of AdamW and averages in their place, whole. Collective."""
        found = {name: whole(param) for name, param in self.model.named_parameters()}
        for which, average in self.averages.items():
            with average.averaged_parameters():
                found |= {f"{which} {name}": whole(param) for name, param in self.model.named_parameters()}
            found[f"{which} number"] = torch.tensor(average.averaged_steps())
        if not isinstance(self.optimizer, ShardedASGD):
            for index, entry in self.optimizer.state_dict()["state"].items():
                found |= {f"{key} {index}": whole(value) for key, value in entry.items()}
        return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Everything to the bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_bits(found[name], value, name)


# --- random histories --------------------------------------------------------------------------------------

History = list[tuple[str, int, list[tuple[str, int]]]]
"""Lives, each on a kind of parameters and a number of ranks, with actions and their numbers."""


PLACES = [("plain", 1), ("plain", 3), ("hybrid", 4), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("tp", 2)]


def history_of(seed: int) -> History:
    """Three lives; each but the last ends with a save, and the next one loads it."""
    draw = random.Random(seed)
    lives: History = []
    number = 0
    for life in range(3):
        # Over the seeds, every place is the first, the second and the third.
        kind, ranks = PLACES[(seed * (life + 1) + 2 * life) % len(PLACES)]
        actions = []
        for _ in range(draw.randint(3, 8)):
            number += 1
            actions.append((draw.choice(["step", "step", "step", "step", "skip", "swap", "raise", "refuse"]), number))
        lives.append((kind, ranks, actions))
    return lives


class Refusal(RuntimeError):
    """Raised inside a load."""


def refuse_load(*_: Any) -> None:
    """Raise, as a hook on a load."""
    raise Refusal


def lives(rank: int, world_size: int, kind: str, actions: Any, folder: str, number: int) -> dict[str, Tensor]:
    """Job: load the checkpoint of the life before, act, save; everything after that."""
    life = Life(kind, seed=number)
    if number:
        load_checkpoint(f"{folder}/{number - 1}", life.model, life.optimizer, averages=life.averages)
    for action, at in actions:
        if action in ("step", "skip"):
            life.step(at)
        if action == "step":
            life.update()
        elif action == "raise":
            with contextlib.suppress(KeyError), life.averages["ema"].averaged_parameters():
                raise KeyError(rank)
        elif action == "refuse" and number:
            before = life.everything()
            # The last thing that is loaded, so that all is written before it raises, on one rank.
            hook = (
                life.averages["tail"].register_load_state_dict_post_hook(refuse_load)
                if rank == at % world_size
                else None
            )
            with pytest.raises(RuntimeError, match=r"the average 'tail' refused the checkpoint .* Refusal"):
                load_checkpoint(f"{folder}/{number - 1}", life.model, life.optimizer, averages=life.averages)
            if hook is not None:
                hook.remove()
            assert_same(life.everything(), before)
        elif action == "swap":
            life.everything()
    path = f"{folder}/{number}"
    if number % 2:
        save_checkpoint(path, life.model, life.optimizer, step=number, averages=life.averages)
    else:
        pending = async_save_checkpoint(path, life.model, life.optimizer, step=number, averages=life.averages)
        # Training goes on while the checkpoint is written; what it does is not in the checkpoint.
        found = life.everything()
        life.step(0)
        life.update()
        pending.wait()
        return found
    return life.everything()


def oracle(history: History) -> dict[str, Tensor]:
    """Everything after a history, of one model in one process: means by the recurrence of their rules."""
    model = mlp(width=8, depth=1)
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    life = Life.__new__(Life)
    life.model, life.optimizer, life.averages = model, optimizer, {}
    means: dict[str, dict[str, Tensor]] = {which: {} for which in RULES}
    updates, counted = 0, dict.fromkeys(RULES, 0)
    for _, _, actions in history:
        for action, at in actions:
            if action in ("step", "skip"):
                life.step(at)
            if action != "step":
                continue
            updates += 1
            for which, (rule, start) in RULES.items():
                schedule = AverageSchedule(rule)
                if not schedule.counts(updates, start - 1):
                    continue
                counted[which] += 1
                for name, p in model.named_parameters():
                    if counted[which] == 1:
                        means[which][name] = p.detach().clone()
                    else:
                        means[which][name].lerp_(p.detach(), rule.weight(counted[which]))
    found = life.everything()
    for which in RULES:
        now = dict(zip(names, (p.detach() for p in model.parameters()), strict=True))
        found |= {f"{which} {name}": means[which].get(name, now[name]).clone() for name in names}
        found[f"{which} number"] = torch.tensor(counted[which])
    return found


@pytest.mark.parametrize("seed", range(len(PLACES)))
def test_random_histories(seed: int, tmp_path: Path) -> None:
    """Steps with and without updates, swaps, exceptions on one rank and all, saves, loads on other layouts."""
    history = history_of(seed)
    found: list[Any] = []
    for number, (kind, ranks, actions) in enumerate(history):
        found = run("none" if ranks == 1 else "gloo", ranks, lives, kind, actions, str(tmp_path), number)
        if kind == "hybrid":
            # The second replica, ranks 2 and 3, has nothing to write.
            assert {path.name[:3] for path in (tmp_path / str(number)).glob("*.distcp")} == {"__0", "__1"}
    expected = oracle(history)
    for each in found:
        assert_same(each, expected)


# --- what ranks and checkpoints may disagree about ---------------------------------------------------------


def differs(rank: int, _world_size: int, which: str, path: str) -> None:
    """Job: one rank passes other averages than the other."""
    life = Life("plain")
    life.step(0)
    life.update()
    averages: Any = life.averages
    if rank == 1:
        others: dict[str, Any] = {
            "fewer": {"ema": averages["ema"]},
            "none": None,
            "no averages": [1],
            "bad name": {"a.b": averages["ema"]},
        }
        averages = others.get(which, averages)
        if which == "updates":
            averages["tail"].update()
    if which == "loads":
        save_checkpoint(path, life.model, life.optimizer, step=1, averages=averages)
        load_checkpoint(path, life.model, life.optimizer, averages=averages if rank else None)
    save_checkpoint(path, life.model, life.optimizer, step=1, averages=averages)


@pytest.mark.parametrize(
    ("which", "problem"),
    [
        ("fewer", "averages of a checkpoint differ between ranks: averages: rank 0 has .* rank 1 has"),
        ("none", r"rank 0 has averages \['ema'.* averages.* on every rank"),
        ("no averages", "averages must be a ShardedAverage, or a dict of names"),
        ("bad name", "an average cannot be called 'a.b'"),
        ("updates", r"number of calls of update\(\)"),
        ("loads", r"rank 1 has averages \['ema'.* averages.* on every rank"),
    ],
)
def test_ranks_that_differ_are_an_error(which: str, problem: str, tmp_path: Path) -> None:
    """Nothing hangs, and nothing is written."""
    for error in run_errors("gloo", 2, differs, which, str(tmp_path / "c"), within_s=30):
        assert re.search(problem, error.message), error.message
    assert which == "loads" or not list(tmp_path.iterdir())


def test_names_that_do_not_match_are_an_error(tmp_path: Path) -> None:
    """Missing and extra averages are named; ``strict=False`` keeps the ones and leaves the others out."""
    life = Life("plain")
    for number in range(6):
        life.step(number)
        life.update()
    save_checkpoint(tmp_path / "c", life.model, life.optimizer, step=6, averages=life.averages)
    expected = life.everything()

    other = Life("plain", seed=1)
    other.step(1)
    other.update()
    before = other.everything()
    ema = other.averages["ema"]
    for averages, problem in [
        (None, "in the checkpoint only: averages.ema, averages.half-life, averages.tail"),
        (
            {"ema": ema, "slow": other.averages["tail"]},
            "missing in the checkpoint: averages.slow; in the checkpoint only",
        ),
        (ema, "missing in the checkpoint: averages.average; in the checkpoint only"),
    ]:
        with pytest.raises(ValueError, match=f"{problem}.* Averages are loaded by averages="):
            load_checkpoint(tmp_path / "c", other.model, other.optimizer, averages=averages)
        assert_same(other.everything(), before)
    averages = {"ema": ema, "slow": other.averages["tail"]}
    load_checkpoint(tmp_path / "c", other.model, other.optimizer, averages=averages, strict=False)
    found = other.everything()
    for name, value in expected.items():
        kept = name.startswith(("tail", "half-life")) and name.split()[1] == "number"
        if not name.startswith(("tail", "half-life")) or kept:
            assert_same_bits(found[name], before[name] if kept else value, name)

    with pytest.raises(ValueError, match="the average 'b' is the average 'a' as well"):
        save_checkpoint(tmp_path / "d", life.model, life.optimizer, step=1, averages={"b": ema, "a": ema})
    with pytest.raises(ValueError, match="'average' is the optimizer as well"):
        save_checkpoint(tmp_path / "d", life.model, ema, step=1, averages=ema)
    with pytest.raises(ValueError, match=r"cannot be called 'optim'"):
        save_checkpoint(tmp_path / "d", life.model, life.optimizer, step=1, averages={"optim": ema})
    with pytest.raises(ValueError, match="is no parameter of the model"):
        save_checkpoint(tmp_path / "d", life.model, life.optimizer, step=1, averages=ema)
    for call in (save_checkpoint, load_checkpoint):
        step: dict[str, Any] = {"step": 1} if call is save_checkpoint else {}
        where = tmp_path / ("d" if step else "c")
        with (
            life.averages["ema"].averaged_parameters(),
            pytest.raises(RuntimeError, match="inside averaged_parameters"),
        ):
            call(where, life.model, life.optimizer, **step)
    assert not (tmp_path / "d").exists()


def test_the_rule_comes_from_the_checkpoint(tmp_path: Path) -> None:
    """As hyperparameters do; a function of the user's has to be passed again."""
    life = Life("plain")
    for number in range(5):
        life.step(number)
        life.update()
    save_checkpoint(tmp_path / "c", life.model, life.optimizer, step=5, averages=life.averages)
    others = dict.fromkeys(RULES, (UniformMean(every=3), 0))
    other = Life("plain", seed=1, rules=others)
    load_checkpoint(tmp_path / "c", other.model, other.optimizer, averages=other.averages)
    for name, (rule, start) in RULES.items():
        (group,) = other.averages[name].param_groups
        assert (group["average"], group["t0"]) == (rule, start - 1)
    for each in (life, other):
        for number in range(5, 8):
            each.step(number)
            each.update()
    assert_same(other.everything(), life.everything())

    mine: Callable[[int], float] = lambda n: 1 / n**2  # noqa: E731
    custom = ShardedAverage(life.model.named_parameters(), weight=mine)
    custom.update()
    save_checkpoint(tmp_path / "custom", life.model, life.optimizer, step=8, averages=custom)
    again = ShardedAverage(life.model.named_parameters(), weight=mine)
    load_checkpoint(tmp_path / "custom", life.model, life.optimizer, averages=again)
    assert again.averaged_steps() == 1
    with pytest.raises(ValueError, match="averages by a function, which state dicts do not hold"):
        load_checkpoint(
            tmp_path / "custom", life.model, life.optimizer, averages=ShardedAverage(life.model.named_parameters())
        )


# --- a manager, stage 2, buffers ---------------------------------------------------------------------------


def manages(_rank: int, _world_size: int, folder: str) -> None:
    """Job: a folder of checkpoints of ShardedASGD, which has an average of its own, and averages beside it."""
    life = Life("stage2")
    with CheckpointManager(folder) as checkpoints:
        for step in (1, 2, 3):
            life.step(step)
            life.update()
            if step == 2:
                checkpoints.async_save(life.model, life.optimizer, step=step, averages=life.averages)
                expected = life.everything()
        other = Life("stage2", seed=3)
        restored = checkpoints.restore(other.model, other.optimizer, averages=other.averages)
        assert restored is not None
        assert restored.step == 2
        assert_same(other.everything(), expected)
        checkpoints.save(other.model, other.optimizer, step=3, averages=other.averages)
        with pytest.raises(ValueError, match=r"in the checkpoint only: averages\.ema"):
            checkpoints.restore(other.model, other.optimizer)


def test_a_manager_saves_and_restores_averages(tmp_path: Path) -> None:
    """In the background too."""
    run("gloo", 2, manages, str(tmp_path / "run"))


def normed(seed: int) -> nn.Sequential:
    """A model with running statistics."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def keeps_buffers(rank: int, world_size: int, mode: str, path: str) -> None:
    """Job: kept buffers are saved, loaded without the wrapper of DDP, and exported."""
    model = normed(0)
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average = ShardedAverage(wrapped, decay=0.5, buffers=mode)
    for step in range(4):
        optimizer.zero_grad()
        wrapped(torch.randn(6, 12, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        if step < 3:
            average.update()
    save_checkpoint(path, wrapped, optimizer, step=4, averages={"ema": average})
    with average.averaged_parameters():
        expected = {name: value.clone() for name, value in model.state_dict().items()}
    mean = model.state_dict()["1.running_mean"]
    assert (mode == "keep") == torch.equal(expected["1.running_mean"], mean)

    again = normed(1)
    loaded = ShardedAverage(again, decay=0.5, buffers=mode)
    load_checkpoint(path, again, torch.optim.SGD(again.parameters(), lr=1.0, momentum=0.5), averages={"ema": loaded})
    for which, file in ((average, "live"), (loaded, "loaded")):
        export_averaged(f"{path}-{file}.safetensors", wrapped if which is average else again, which)
    if rank == 0:
        result = CliRunner().invoke(app, ["export", path, f"{path}-offline.safetensors", "--average", "ema"])
        assert result.exit_code == 0, result.output
        for file in ("live", "loaded", "offline"):
            assert_same(load_file(f"{path}-{file}.safetensors"), expected)
    average.update()
    loaded.update()
    with average.averaged_parameters():
        expected = {name: value.clone() for name, value in model.state_dict().items()}
    with loaded.averaged_parameters():
        assert_same(dict(again.state_dict()), expected)


@pytest.mark.parametrize("mode", ["keep", "copy", "average"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_buffers_are_saved_and_exported(ranks: int, mode: str, tmp_path: Path) -> None:
    """Those that the average keeps, from a job and from a checkpoint; 'keep' has the model's own."""
    run("none" if ranks == 1 else "gloo", ranks, keeps_buffers, mode, str(tmp_path / "c"))


# --- from training to a file -------------------------------------------------------------------------------


def trains_and_saves(_rank: int, _world_size: int, path: str) -> dict[str, Tensor]:
    """Job: AdamW and an EMA on FSDP2, whose forward and backward run; the averages."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = ShardedAverage(model.named_parameters(), decay=0.8)
    for step in range(5):
        optimizer.zero_grad()
        model(torch.randn(6, 12, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        ema.update()
    save_checkpoint(path, model, optimizer, step=5, averages={"ema": ema})
    export_averaged(f"{path}.safetensors", model, ema)
    with ema.averaged_parameters():
        return {name: whole(value) for name, value in model.state_dict().items()}


def test_from_training_on_fsdp2_to_a_plain_model(tmp_path: Path) -> None:
    """The export loads into a plain model, and so does that of the command line, whose other commands know averages."""
    path = tmp_path / "c"
    expected = run("gloo", 2, trains_and_saves, str(path))[0]
    command = CliRunner()
    assert command.invoke(app, ["export", str(path), str(tmp_path / "offline.safetensors")]).exit_code == 0
    for file in ("c", "offline"):
        model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))
        model.load_state_dict(load_file(tmp_path / f"{file}.safetensors"))
        assert_same({name: value.detach() for name, value in model.state_dict().items()}, expected)
    assert command.invoke(app, ["verify", str(path)]).exit_code == 0
    shown = command.invoke(app, ["inspect", str(path)]).output
    assert "average ema: exponential (decay 0.8, warmup 0.0), 5 updates, average of 5 iterates, 4 parameters" in shown
    assert "optimizer: AdamW" in shown
    (entry,) = json.loads(command.invoke(app, ["inspect", str(path), "--json"]).output)["averages"]
    assert (entry["name"], entry["updates"], entry["iterates"]) == ("ema", 5, 5)


def test_averages_over_checkpoints_are_of_the_one_that_is_named(tmp_path: Path) -> None:
    """``dist-asgd average`` and ``--between`` take the averages beside an optimizer as they take its own."""
    life = Life("plain")
    iterates: list[dict[str, Tensor]] = []
    tails: list[dict[str, Tensor]] = []
    for number in range(1, 11):
        life.step(number)
        life.update()
        iterates.append({name: p.detach().double().clone() for name, p in life.model.named_parameters()})
        if number in (6, 10):
            path = tmp_path / str(number)
            save_checkpoint(path, life.model, life.optimizer, step=number, averages=life.averages)
            with life.averages["tail"].averaged_parameters():
                tails.append({name: p.detach().double().clone() for name, p in life.model.named_parameters()})
    command = CliRunner()
    out = str(tmp_path / "out.safetensors")
    paths = [str(tmp_path / "6"), str(tmp_path / "10")]
    result = command.invoke(app, ["average", *paths, out])
    assert result.exit_code == 1
    assert "has several averages" in result.output
    mean = {name: (tails[0][name] + tails[1][name]) / 2 for name in tails[0]}
    between = {name: sum((each[name] for each in iterates[6:]), torch.zeros(())) / 4 for name in mean}
    last = {name: (iterates[5][name] + iterates[9][name]) / 2 for name in mean}
    for arguments, expected in (
        (["--average", "tail"], mean),
        (["--average", "tail", "--between"], between),
        (["--last"], last),
    ):
        result = command.invoke(app, ["average", *paths, out, "--force", *arguments])
        assert result.exit_code == 0, result.output
        for name, value in load_file(out).items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_commands_ask_which_average(tmp_path: Path) -> None:
    """If there are several; of a ShardedASGD its own is one. ``diff`` and ``consolidate`` have all of them."""
    life = Life("stage2")
    for number in range(4):
        life.step(number)
        life.update()
    path = str(tmp_path / "c")
    save_checkpoint(path, life.model, life.optimizer, step=4, averages=life.averages)
    command = CliRunner()
    out = str(tmp_path / "x.safetensors")
    for arguments, problem in [([], "has several averages"), (["--average", "slow"], "has no average 'slow'")]:
        result = command.invoke(app, ["export", path, out, *arguments])
        assert result.exit_code == 1
        assert problem in result.output
        assert "optim (the optimizer's), ema, half-life, tail" in " ".join(result.output.split())
    for name, owner in (("optim", life.optimizer), *life.averages.items()):
        assert command.invoke(app, ["export", path, out, "--average", name, "--force"]).exit_code == 0
        with owner.averaged_parameters():  # type: ignore[attr-defined]
            assert_same(load_file(out), dict(life.model.state_dict()))
    assert command.invoke(app, ["export", path, out, "--last", "--force"]).exit_code == 0
    assert_same(load_file(out), dict(life.model.state_dict()))

    assert command.invoke(app, ["consolidate", path, str(tmp_path / "x.pt")]).exit_code == 0
    found = torch.load(tmp_path / "x.pt")
    other = Life("stage2", seed=2)
    other.model.load_state_dict(found["model"])
    other.optimizer.load_state_dict(found["optim"])
    for name, average in other.averages.items():
        average.load_state_dict(found["averages"][name])
    assert_same(other.everything(), life.everything())
    other.averages["tail"].update()
    save_checkpoint(tmp_path / "d", other.model, other.optimizer, step=4, averages=other.averages)
    result = command.invoke(app, ["diff", path, str(tmp_path / "d")])
    assert result.exit_code == 1
    assert "averages.tail.state.0.weight.step" in result.output
    assert "averages.ema" not in result.output
