"""``dist-asgd average``, ``average_checkpoints`` and ``average_between``, against sums of whole tensors in float64."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from dist_asgd import (
    CheckpointError,
    PowerMean,
    ShardedASGD,
    ShardedAverage,
    average_between,
    average_checkpoints,
    save_checkpoint,
)
from dist_asgd.checkpoint.offline.contents import CheckpointContents
from tests.checkpoint.test_cli import cli, from_json, one_line, python
from tests.harness.bits import assert_same_bits, same_tree
from tests.harness.ranks import run
from tests.harness.topologies import build, whole_state

Whole = dict[str, Tensor]
Pool = dict[Path, Whole]
# Averaging begins after step 2 (see topologies.OPTIONS): at step 3 no average holds an iterate.
BEGUN = (4, 6, 9)


def histories(rank: int, _world_size: int, topology: str, kind: str, seed: int, steps: list[int], folder: str) -> Any:
    """Job: save at each of ``steps``; returns what was saved, by step."""
    live = build(topology, kind, seed)
    found = {}
    for step in steps:
        live.train(step - live.num_steps)
        with torch.no_grad():
            live.model.get_buffer("seen").fill_(100 * seed + step)
        save_checkpoint(f"{folder}/step-{step:08d}", live.model, live.optimizer, step=step)
        found[step] = whole_state(live)
    return found if rank == 0 else None


def saved(folder: Path, backend: str, world_size: int, topology: str, kind: str, seed: int, steps: Any) -> Pool:
    """Checkpoints of one run, with what they hold."""
    folder.mkdir()
    found = run(backend, world_size, histories, topology, kind, seed, list(steps), str(folder))[0]
    return {folder / f"step-{step:08d}": whole for step, whole in found.items()}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Checkpoints of one model from three runs: by 1, 2 and 4 ranks, of whole tensors, shards and DTensors."""
    folder = tmp_path_factory.mktemp("pool")
    runs = [("none", 1, "single"), ("gloo", 2, "fsdp2-sharded"), ("gloo", 4, "hybrid")]
    found: Pool = {}
    for seed, (backend, world_size, topology) in enumerate(runs):
        found |= saved(folder / topology, backend, world_size, topology, "mlp", seed, BEGUN)
    return found


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Checkpoints of a model with tied, frozen, transposed, 0-dim, empty and unused parameters, by 1 and 3 ranks."""
    folder = tmp_path_factory.mktemp("odd")
    return saved(folder / "one", "none", 1, "single", "odd", 1, BEGUN) | saved(
        folder / "three", "gloo", 3, "stage1", "odd", 2, BEGUN
    )


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """A checkpoint after each step of a run, in bfloat16 with averages in float32."""
    return saved(tmp_path_factory.mktemp("every") / "run", "gloo", 2, "stage2", "bfloat16", 0, range(1, 11))


def value_of(whole: Whole, name: str, last: bool) -> Tensor:
    """What ``export`` would write of a parameter, before it is rounded to the parameter's dtype."""
    begun = not last and f"mu of {name}" in whole and whole[f"mu of {name}"].item() != 1
    return whole[f"ax of {name}"] if begun else whole[f"model.{name}"]


def in_float64(values: list[Tensor], factors: list[float], divisor: float) -> Tensor:
    """The sum of factors times values, in order, divided."""
    total = values[0].double() * factors[0]
    for value, factor in zip(values[1:], factors[1:], strict=True):
        total = total + value.double() * factor
    return total / divisor


def assert_averaged(
    out: Path, sources: list[Whole], factors: list[float], divisor: float, *, last: bool, dtype: torch.dtype | None
) -> None:
    """Assert that ``out`` has the oracle's combination of ``sources``, to the bit, and the last one's buffers."""
    found = load_file(out)
    names = [key.removeprefix("model.") for key in sources[0] if key.startswith("model.")]
    assert found.keys() == set(names)
    for name in names:
        if name == "seen":
            assert_same_bits(found[name], sources[-1]["model.seen"], name)
            continue
        # A tied parameter has its state under the first of its names.
        param = "inner.weight" if name == "tied.weight" else name
        values = [value_of(whole, param, last) for whole in sources]
        wanted = in_float64(values, factors, divisor).to(dtype or sources[0][f"model.{name}"].dtype)
        assert_same_bits(found[name], wanted.contiguous(), name)


# --- means and EMAs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["pool", "odd"])
def test_random_means_of_mixed_layouts(kind: str, seed: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Any checkpoints, weights, averages or last iterates, dtypes: the bits are those of whole tensors."""
    checkpoints: Pool = request.getfixturevalue(kind)
    draw = random.Random(seed)
    for number in range(6):
        chosen = draw.sample(sorted(checkpoints), draw.randint(1, len(checkpoints)))
        last = draw.random() < 0.4
        dtype = draw.choice([None, None, torch.float64, torch.bfloat16])
        weights = None if draw.random() < 0.3 else [draw.choice([0.1, 1, 3, 1e-9, 1e12]) for _ in chosen]
        out = tmp_path / f"{number}.safetensors"
        assert average_checkpoints(chosen, out, weights=weights, last=last, dtype=dtype) == [out]
        factors = [1.0] * len(chosen) if weights is None else [float(weight) for weight in weights]
        wholes = [checkpoints[path] for path in chosen]
        assert_averaged(out, wholes, factors, math.fsum(factors), last=last, dtype=dtype)


def test_the_mean_of_one_checkpoint_is_its_export(pool: Pool, tmp_path: Path) -> None:
    """The same bits; so are the means of one checkpoint, weighed anyhow, with those of weight 0."""
    first, second = list(pool)[:2]
    cli("export", first, tmp_path / "export.safetensors")
    cli("average", first, tmp_path / "one.safetensors")
    cli("average", "--weights", "0,0.3", second, first, tmp_path / "weighed.safetensors")
    wanted = load_file(tmp_path / "export.safetensors")
    assert same_tree(load_file(tmp_path / "one.safetensors"), wanted)
    assert same_tree(load_file(tmp_path / "weighed.safetensors"), wanted)


def test_a_weight_of_0_leaves_a_checkpoint_out(tmp_path: Path) -> None:
    """Also if it holds no numbers, and also if it is the first or the last one; buffers are the last one's anyway."""
    for name, value in (("good", 1.5), ("bad", math.nan)):
        model = nn.BatchNorm1d(3)
        nn.init.constant_(model.weight, value)
        save_checkpoint(tmp_path / name, model, ShardedASGD(model.named_parameters()), step=1)
    out = tmp_path / "out.safetensors"
    for names, weights in ((("good", "bad"), [2.0, 0.0]), (("bad", "good"), [0.0, 2.0])):
        average_checkpoints([tmp_path / name for name in names], out, weights=weights, last=True, overwrite=True)
        assert load_file(out)["weight"].tolist() == [1.5] * 3


def folder_of(pool: Pool, topology: str) -> tuple[Path, list[Whole]]:
    """The folder of one run, and what its checkpoints hold, in order."""
    chosen = {path: whole for path, whole in pool.items() if path.parent.name == topology}
    return next(iter(chosen)).parent, list(chosen.values())


def test_a_folder_is_its_checkpoints_in_the_order_of_steps(pool: Pool, tmp_path: Path) -> None:
    """``--ema`` and ``--latest``; files beside the checkpoints, and those of crashed saves, are ignored."""
    source, wholes = folder_of(pool, "single")
    folder = Path(shutil.copytree(source, tmp_path / "run"))
    (folder / "latest").symlink_to(f"step-{BEGUN[-1]:08d}")
    (folder / "notes.txt").touch()
    shutil.copytree(folder / "step-00000004", folder / ".step-00000012.tmp-0123456789ab")
    out = tmp_path / "out.safetensors"
    for last in ([], ["--last"]):
        assert "steps 4, 6, 9, decay 0.75" in cli("average", "--ema", "0.75", *last, folder, out, "--force").stdout
        factors = [0.75**2, 0.25 * 0.75, 0.25]
        assert_averaged(out, wholes, factors, 1.0, last=bool(last), dtype=None)
    found = from_json("average", "--latest", "2", "--last", folder, out, "--force")
    assert (found["steps"], found["weights"], found["of"]) == ([6, 9], [0.5, 0.5], "last iterates")
    assert_averaged(out, wholes[1:], [1.0, 1.0], 2.0, last=True, dtype=None)
    # Several folders: all checkpoints of each, one after the other.
    average_checkpoints([folder, folder_of(pool, "hybrid")[0]], out, overwrite=True)
    assert_averaged(out, wholes + folder_of(pool, "hybrid")[1], [1.0] * 6, 6.0, last=False, dtype=None)


def test_the_file_says_what_it_is(pool: Pool, tmp_path: Path) -> None:
    """Sources, steps and weights are in the metadata of each file, and in the output."""
    paths = list(pool)[:3]
    out = tmp_path / "out.safetensors"
    found = from_json("average", "--weights", "1,2,5", *paths, out, "--max-shard-gb", "0.000001")
    index = json.loads((tmp_path / "out.safetensors.index.json").read_text())
    assert len(found["files"]) == len(set(index["weight_map"].values())) > 1
    for file in found["files"]:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert metadata["format"] == "pt"
        assert metadata["rule"] == "mean"
        assert json.loads(metadata["sources"]) == [str(path) for path in paths] == found["sources"]
        assert json.loads(metadata["steps"]) == list(BEGUN)
        assert json.loads(metadata["weights"]) == [0.125, 0.25, 0.625]
    assert found["tensors"] == found["averages"] + 1
    text = cli("average", "--weights", "1,2,5", *paths, tmp_path / "again.safetensors").stdout
    assert "mean of the averages of 3 checkpoints (steps 4, 6, 9, weights 0.125, 0.25, 0.625)" in text


def test_before_averaging_begins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Last iterates are averaged and a note says so, if averaging has begun nowhere; a mixture is refused."""
    found = saved(tmp_path / "run", "none", 1, "single", "mlp", 0, (1, 2, 5))
    one, two, five = found
    out = tmp_path / "out.safetensors"
    assert "averaging has not begun for any parameter" in cli("average", one, two, out).stderr
    assert_averaged(out, [found[one], found[two]], [1.0, 1.0], 2.0, last=True, dtype=None)
    with caplog.at_level(logging.WARNING, "dist_asgd"):
        average_checkpoints([one, two], out, overwrite=True)
    assert "averaging has not begun" in caplog.text
    line = one_line(cli("average", five, one, tmp_path / "no.safetensors", status=1))
    assert all(text in line for text in ("0.weight had begun", str(one), str(five), "--last"))
    assert "note" not in cli("average", "--last", five, one, out, "--force").stderr


# --- other optimizers and other programs -------------------------------------------------------------------


def fsdp2_adamw(_rank: int, _world_size: int, flatten: bool, seeds: list[int], folder: str) -> list[Whole]:
    """Job: FSDP2 and AdamW, saved by torch's own recipe; returns the models."""
    found = []
    for seed in seeds:
        live = build("fsdp2", "mlp", seed)
        optimizer = torch.optim.AdamW(live.model.parameters())
        for param in live.model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        model, optim = get_state_dict(live.model, optimizer, options=options)
        dcp.save({"model": model, "optim": optim}, checkpoint_id=f"{folder}/{seed}")
        found.append({name: value for name, value in whole_state(live).items() if name.startswith("model.")})
    return found


@pytest.mark.parametrize("flatten", [True, False])
def test_adamw_of_fsdp2(tmp_path: Path, flatten: bool) -> None:
    """The last iterates of another optimizer are averaged with ``--last``; without it the error names that option."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wholes = run("gloo", 2, fsdp2_adamw, flatten, [1, 2], str(tmp_path))[0]
    paths = [tmp_path / "1", tmp_path / "2"]
    out = tmp_path / "out.safetensors"
    assert "--last" in one_line(cli("average", "--no-verify", *paths, out, status=1))
    assert "--no-verify" in one_line(cli("average", "--last", *paths, out, status=1))
    found = from_json("average", "--no-verify", "--last", *paths, out)
    assert found["steps"] == [None, None]
    assert_averaged(out, wholes, [1.0, 1.0], 2.0, last=True, dtype=None)


def test_models_without_an_optimizer(tmp_path: Path) -> None:
    """All floating-point entries are averaged, and a note says so; counters are the last one's."""
    models = [nn.BatchNorm1d(3), nn.BatchNorm1d(3)]
    for number, model in enumerate(models):
        nn.init.constant_(model.weight, number)
        nn.init.constant_(model.running_mean, number)  # type: ignore[arg-type]
        model.num_batches_tracked.fill_(5 + number)  # type: ignore[union-attr,operator]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / f"{number}", no_dist=True)
    out = tmp_path / "out.safetensors"
    assert "BatchNorm" in cli("average", "--no-verify", "--last", tmp_path / "0", tmp_path / "1", out).stderr
    found = load_file(out)
    assert found["weight"].tolist() == found["running_mean"].tolist() == [0.5] * 3
    assert found["num_batches_tracked"].item() == 6


def test_statistics_of_batchnorm_are_the_last_ones(tmp_path: Path) -> None:
    """Buffers are copied where the optimizer's parameters are known, as ``export_averaged`` does; frozen ones too."""
    for number in range(2):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
        nn.init.constant_(model[1].weight, number)
        nn.init.constant_(model[1].bias, number)
        model[0].running_mean.fill_(number)
        optimizer = ShardedASGD(model[1].parameters())
        save_checkpoint(tmp_path / f"{number}", model, optimizer, step=number)
    average_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out.safetensors", last=True)
    found = load_file(tmp_path / "out.safetensors")
    assert (found["1.weight"].unique().item(), found["1.bias"].item()) == (0.5, 0.5)
    assert found["0.running_mean"].unique().item() == 1
    assert found["0.weight"].unique().item() == 1


def test_masters_and_wide_averages_are_rounded_once(tmp_path: Path) -> None:
    """The last iterates of 16-bit parameters come from their float32 masters, and averages from ``ax``."""
    wholes = []
    for number in range(2):
        model = nn.Linear(16, 16, bias=False)
        model.load_state_dict({"weight": torch.randn(16, 16, generator=torch.Generator().manual_seed(number))})
        model.bfloat16()
        optimizer = ShardedASGD(model.parameters(), lr=0.01, t0=0, master_weights=True)
        for step in range(3):
            model.weight.grad = torch.full_like(model.weight, 0.37 * (step + 1))
            optimizer.step()
        save_checkpoint(tmp_path / f"{number}", model, optimizer, step=3)
        wholes.append(optimizer.consolidated_state_dict()["state"][0])
    for last, key in ((False, "ax"), (True, "master")):
        out = tmp_path / f"{key}.safetensors"
        average_checkpoints([tmp_path / "0", tmp_path / "1"], out, last=last)
        wanted = in_float64([whole[key] for whole in wholes], [1.0, 1.0], 2.0).bfloat16()
        assert_same_bits(load_file(out)["weight"], wanted, key)


def hooked(model: nn.Module, hook: Callable[..., None], path: Path, seed: int) -> Tensor:
    """Train, register the hook and save; returns the average of the weight."""
    nn.init.normal_(model.get_parameter("weight"), generator=torch.Generator().manual_seed(seed))
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=0)
    for _ in range(4):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    model.register_state_dict_post_hook(hook)
    save_checkpoint(path, model, optimizer, step=4)
    return optimizer.consolidated_state_dict()["state"][0]["ax"]  # type: ignore[no-any-return]


def split(_module: nn.Module, state: dict[str, Tensor], *_: object) -> None:
    """A state_dict hook: two views in place of the weight."""
    whole = state.pop("weight")
    state["upper"], state["left"] = whole[:2], whole[:, :3].t()


def quantised(_module: nn.Module, state: dict[str, Tensor], *_: object) -> None:
    """A state_dict hook: whole numbers in place of the weight."""
    state["weight"] = (state["weight"] * 16).to(torch.int8)


def test_hooks_of_the_model(tmp_path: Path) -> None:
    """Views of a parameter are those of its mean; whole numbers that hooks compute are refused."""
    averages = [hooked(nn.Linear(4, 6, bias=False), split, tmp_path / f"{seed}", seed) for seed in (1, 2)]
    average_checkpoints([tmp_path / "1", tmp_path / "2"], tmp_path / "out.safetensors")
    mean = in_float64(averages, [1.0, 1.0], 2.0).float()
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == {"upper", "left"}
    assert_same_bits(found["upper"], mean[:2], "upper")
    assert_same_bits(found["left"], mean[:, :3].t().contiguous(), "left")
    hooked(nn.Linear(4, 6, bias=False), quantised, tmp_path / "int8", 1)
    out = tmp_path / "no.safetensors"
    assert "a state_dict hook" in one_line(cli("average", tmp_path / "int8", out, status=1))
    assert "weight is torch.int8" in one_line(cli("average", "--last", tmp_path / "int8", out, status=1))


def test_ties_of_checkpoints_that_record_none(tmp_path: Path) -> None:
    """An entry with a parameter's values is averaged with it, and a note says so, as ``export`` does."""
    wholes = []
    for seed in (1, 2):
        model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
        model["second"].weight = model["first"].weight
        nn.init.normal_(model["first"].weight, generator=torch.Generator().manual_seed(seed))
        optimizer = torch.optim.ASGD(model.parameters(), lr=0.1, t0=0, foreach=False)
        for step in range(4):
            for param in model.parameters():
                param.grad = torch.full_like(param, step)
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state, optim = get_state_dict(model, optimizer)
            dcp.save({"model": state, "optim": optim}, checkpoint_id=tmp_path / f"{seed}", no_dist=True)
        wholes.append(optimizer.state[model["first"].weight]["ax"])
    out = tmp_path / "out.safetensors"
    notes = cli("average", "--no-verify", tmp_path / "1", tmp_path / "2", out).stderr
    assert all(f"{tmp_path / seed} does not record ties" in notes for seed in "12")
    mean = in_float64(wholes, [1.0, 1.0], 2.0).float()
    for name in ("first.weight", "second.weight"):
        assert_same_bits(load_file(out)[name], mean, name)


# --- between two checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(3, 4), (3, 10), (4, 10), (6, 9), (9, 10)])
def test_the_mean_of_the_iterates_between(every: Pool, tmp_path: Path, first: int, second: int) -> None:
    """It is that of the averages in float64, to the bit, and that of the iterates up to their rounding."""
    wholes = {int(path.name.removeprefix("step-")): whole for path, whole in every.items()}
    folder = next(iter(every)).parent
    out = tmp_path / "out.safetensors"
    found = from_json(
        "average", "--between", *(folder / f"step-{n:08d}" for n in (first, second)), out, "--dtype", "float32"
    )
    # t0 is 2, so that iterate 4 is the first one in the average.
    n1, n2 = first - 3, second - 3
    assert found["iterates"] == [n2 - n1] * 2
    written = load_file(out)
    for name, value in written.items():
        if name == "seen":
            assert value.unique().item() == second
            continue
        ends = [wholes[second][f"ax of {name}"], wholes[first][f"ax of {name}"]]
        assert_same_bits(value, in_float64(ends, [n2, -n1], n2 - n1).float(), name)
        iterates = torch.stack([wholes[n][f"model.{name}"].double() for n in range(first + 1, second + 1)])
        bound = 10 * torch.finfo(torch.float32).eps * n2 * iterates.abs().max()
        assert (value - iterates.mean(0)).abs().max() <= bound, name
    assert (
        f"mean of the {n2 - n1} iterates between steps {first} and {second}"
        in cli("average", "--between", *(folder / f"step-{n:08d}" for n in (first, second)), out, "--force").stdout
    )
    # In the parameter's dtype.
    assert load_file(out)["0.weight"].dtype == torch.bfloat16


class Steps:
    """Runs of one small model, saved at chosen steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, name: str, steps: tuple[int, ...], skip: range = range(0), change: Any = None, **options: Any) -> Any:
        """Train and save as ``name-step``; the weight has no gradient in steps of ``skip``; returns all iterates."""
        model = nn.Linear(3, 2)
        nn.init.constant_(model.weight, 1.0)
        nn.init.constant_(model.bias, 1.0)
        optimizer = ShardedASGD(model.named_parameters(), **{"lr": 0.1, "t0": 1, **options})
        iterates = {}
        for step in range(1, steps[-1] + 1):
            for param in model.parameters():
                param.grad = (
                    torch.full_like(param, float(step % 3)) if param is model.bias or step not in skip else None
                )
            if change is not None:
                change(optimizer, step)
            optimizer.step()
            iterates[step] = {name: param.detach().clone() for name, param in model.named_parameters()}
            if step in steps:
                save_checkpoint(self.folder / f"{name}-{step}", model, optimizer, step=step)
        return iterates

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[Steps]:
    """A folder for runs."""
    (tmp_path / "runs").mkdir()
    return Steps(tmp_path / "runs")


def test_between_counts_the_steps_of_each_parameter(steps: Steps, tmp_path: Path) -> None:
    """A parameter that skipped steps has fewer iterates, and one that took none is as it was."""
    iterates = steps.run("a", (5, 9), skip=range(7, 9))
    out = tmp_path / "out.safetensors"
    assert from_json("average", "--between", steps["a-5"], steps["a-9"], out)["iterates"] == [2, 4]
    found = load_file(out)
    for name, of in (("weight", (6, 9)), ("bias", (6, 7, 8, 9))):
        mean = torch.stack([iterates[step][name].double() for step in of]).mean(0)
        assert torch.allclose(found[name].double(), mean, rtol=1e-6, atol=0), name
    iterates = steps.run("b", (5, 9), skip=range(6, 10))
    average_between(steps["b-5"], steps["b-9"], out, overwrite=True)
    assert_same_bits(load_file(out)["weight"], iterates[9]["weight"], "weight")


@pytest.mark.parametrize("t0", [0, 2.5, 4])
def test_between_for_any_t0(steps: Steps, tmp_path: Path, t0: float) -> None:
    """Also if t0 is no whole number, the iterates after the first checkpoint weigh alike."""
    iterates = steps.run("a", (6, 11), t0=t0)
    average_between(steps["a-6"], steps["a-11"], tmp_path / "out.safetensors")
    mean = torch.stack([iterates[step]["weight"].double() for step in range(7, 12)]).mean(0)
    assert torch.allclose(load_file(tmp_path / "out.safetensors")["weight"].double(), mean, rtol=1e-6, atol=0)


def sliding(optimizer: ShardedASGD, step: int) -> None:
    """Make an EMA of the average."""
    optimizer.param_groups[0]["t0"] = max(0, step - 3)


def anew(optimizer: ShardedASGD, step: int) -> None:
    """Begin averaging anew after step 6."""
    if step == 7:
        optimizer.start_averaging()


BETWEEN: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, int], tuple[str, ...]]] = {
    "not begun": ({"t0": 5}, {"t0": 5}, (5, 9), ("had not begun in", "a-5", "b-9", "step 6 or later")),
    "order": ({}, {}, (9, 5), ("9 steps in", "5 in", "--between EARLIER LATER")),
    "same": ({}, {}, (9, 9), ("no parameter stepped between",)),
    "t0": ({"t0": 1}, {"t0": 2}, (5, 9), ("t0 of parameter weight is 1", "and 2 in", "b-9")),
    "anew": ({}, {"change": anew}, (5, 9), ("t0 of parameter weight is 1", "begun anew")),
    "runs": ({}, {"lambd": 0.5}, (5, 9), ("lambd of parameter weight", "0.5 in", "different runs")),
    "decay": ({}, {"weight_decay": 0.5}, (5, 9), ("weight_decay of parameter weight", "different runs")),
    "ema": ({"change": sliding}, {"change": sliding}, (5, 9), ("t0 of parameter weight",)),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_between_refuses(steps: Steps, tmp_path: Path, what: str) -> None:
    """The error names the parameter, both checkpoints and what to do."""
    first, second, (one, other), words = BETWEEN[what]
    steps.run("a", (one,), **first)
    steps.run("b", (other,), **second)
    line = one_line(
        cli("average", "--between", steps[f"a-{one}"], steps[f"b-{other}"], tmp_path / "o.safetensors", status=1)
    )
    assert all(word in line for word in words), line
    assert not (tmp_path / "o.safetensors").exists()


def test_between_refuses_averages_that_are_no_uniform_mean(steps: Steps, tmp_path: Path) -> None:
    """With one t0, mu tells: here it belongs to other steps than were taken since t0."""

    model = nn.Linear(3, 2)
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=1)
    for _ in range(5):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    for state in optimizer.state.values():
        state["mu"].fill_(0.1)
    save_checkpoint(steps["ema"], model, optimizer, step=5)
    steps.run("c", (9,))
    line = one_line(cli("average", "--between", steps["ema"], steps["c-9"], tmp_path / "o.safetensors", status=1))
    assert all(word in line for word in ("weight in", "ema", "no uniform mean", "0.1", "0.25"))


def beside_adamw(folder: Path, steps: tuple[int, ...], **options: Any) -> list[Tensor]:
    """Train with AdamW, and save a ShardedAverage at ``steps``; returns the iterates of the weight."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    average = ShardedAverage(model.named_parameters(), **options)
    iterates = []
    for step in range(1, steps[-1] + 1):
        for param in model.parameters():
            param.grad = torch.full_like(param, float(step % 3))
        optimizer.step()
        average.update()
        iterates.append(model.weight.detach().clone())
        if step in steps:
            save_checkpoint(folder / f"{step}", model, average, step=step)
    return iterates


@pytest.mark.parametrize(("start", "every"), [(0, 1), (2, 3), (9, 2), (5, 4)])
def test_between_averages_beside_another_optimizer(tmp_path: Path, start: int, every: int) -> None:
    """Of a ShardedAverage those iterates count that it has counted."""
    iterates = beside_adamw(tmp_path, (9, 20), start=start, every=every)
    average_between(tmp_path / "9", tmp_path / "20", tmp_path / "out.safetensors")
    counted = [iterates[index].double() for index in range(start, 20, every) if index >= 9]
    mean = torch.stack(counted).mean(0)
    assert torch.allclose(load_file(tmp_path / "out.safetensors")["weight"].double(), mean, rtol=1e-5, atol=1e-6)
    # The other commands of this file read it, too.
    average_checkpoints([tmp_path / "20"], tmp_path / "one.safetensors")
    mean = torch.stack([iterates[index].double() for index in range(start, 20, every)]).mean(0)
    assert torch.allclose(load_file(tmp_path / "one.safetensors")["weight"].double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decay": 0.9}, ("no uniform mean", "exponential")),
        ({"weight": PowerMean(2.0)}, ("no uniform mean", "power")),
        ({"weight": lambda n: 1 / n}, ("no uniform mean", "custom")),
        ({"every": 30}, ("no iterate of parameter", "both averages hold 1", "'every': 30")),
        ({"start": 10}, ("had not begun in", "step 10 or later")),
    ],
)
def test_between_refuses_other_rules(tmp_path: Path, options: dict[str, Any], words: tuple[str, ...]) -> None:
    """By the rule that the checkpoint records."""
    beside_adamw(tmp_path, (8, 20), **options)
    out = tmp_path / "out.safetensors"
    line = one_line(cli("average", "--between", tmp_path / "8", tmp_path / "20", out, status=1))
    assert all(word in line for word in words), line


def test_between_refuses_parameters_without_state(tmp_path: Path) -> None:
    """``torch.optim.ASGD`` has no state of a parameter before its first gradient, and so no average."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.1, t0=1)
    for step in range(1, 9):
        for param in model.parameters():
            param.grad = torch.ones_like(param) if param is model.bias or step > 4 else None
        optimizer.step()
        if step in (4, 8):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state, optim = get_state_dict(model, optimizer)
                dcp.save({"model": state, "optim": optim}, checkpoint_id=tmp_path / f"{step}", no_dist=True)
    out = tmp_path / "out.safetensors"
    line = one_line(cli("average", "--no-verify", "--between", tmp_path / "4", tmp_path / "8", out, status=1))
    assert "averaging of parameter weight had not begun" in line
    assert "(step 0, t0 1)" in line


def test_between_notes_averages_that_are_too_coarse(tmp_path: Path, steps: Steps) -> None:
    """Averages in 16 bits were rounded at each step, which the difference magnifies."""
    model = nn.Linear(3, 2).bfloat16()
    optimizer = ShardedASGD(model.named_parameters(), lr=0.01, t0=0, average_dtype=torch.bfloat16)
    for step in range(1, 10):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        if step in (6, 9):
            save_checkpoint(steps[f"{step}"], model, optimizer, step=step)
    assert (
        "relative errors of up to about"
        in cli("average", "--between", steps["6"], steps["9"], tmp_path / "o.safetensors").stderr
    )


# --- refusals and damage -----------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[list[str], str]] = {
    "count": (["--weights", "1,2"], "got 2 weights (1, 2) for 3 checkpoints"),
    "negative": (["--weights", "1,-2,3"], "number 2 is -2"),
    "nan": (["--weights", "1,2,nan"], "number 3 is nan"),
    "infinite": (["--weights", "inf,2,1"], "number 1 is inf"),
    "zero": (["--weights", "0,0,0"], "have the sum 0"),
    "words": (["--weights", "1;2;3"], "numbers with commas between them"),
    "both": (["--weights", "1,2,3", "--ema", "0.5"], "leave out one of the two"),
    "decay": (["--ema", "1"], "at least 0 and below 1, got 1"),
    "decay nan": (["--ema", "nan"], "at least 0 and below 1"),
    "three": (["--between"], "wants two checkpoints"),
    "between weights": (["--between", "--weights", "1,2,3"], "--weights cannot be combined with --between"),
    "between last": (["--between", "--last"], "--last cannot be combined with --between"),
    "between ema": (["--between", "--ema", "0"], "--ema cannot be combined with --between"),
    "between latest": (["--between", "--latest", "2"], "--latest cannot be combined with --between"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options_that_are_refused(pool: Pool, tmp_path: Path, what: str) -> None:
    """The error says what was wanted; nothing is written."""
    options, words = OPTIONS[what]
    assert words in one_line(cli("average", *options, *list(pool)[:3], tmp_path / "out.safetensors", status=1))
    assert list(tmp_path.iterdir()) == []


def test_sources_and_outputs_that_are_refused(pool: Pool, tmp_path: Path) -> None:
    """The same checkpoint twice, none, an OUT that was left out or is taken, arguments of another type."""
    first, second, *_ = pool
    link = tmp_path / "latest"
    link.symlink_to(first)
    out = tmp_path / "out.safetensors"
    assert "are the same checkpoint" in one_line(cli("average", first, link, out, status=1))
    assert "must end in .safetensors" in one_line(cli("average", first, second, status=1))
    assert "is no checkpoint" in one_line(cli("average", first, tmp_path, out, status=1))
    cli("average", first, status=2)
    cli("average", "--latest", "0", first, out, status=2)
    assert not out.exists()
    out.touch()
    assert "--force" in one_line(cli("average", first, second, out, status=1))
    for arguments, words in (
        ({"sources": []}, "no checkpoint to average"),
        ({"latest": 0}, "latest must be"),
        ({"ema": True}, "decay of an EMA"),
        ({"weights": [True, 1]}, "number 1 is True"),
        ({"dtype": torch.int8}, "wanted a floating-point dtype"),
    ):
        with pytest.raises(ValueError, match=words):
            average_checkpoints(**{"sources": [first, second], "out": tmp_path / "new.safetensors", **arguments})


def other_model(kind: str) -> nn.Module:
    """A Linear that differs from ``nn.Linear(3, 2)``."""
    if kind == "shape":
        return nn.Linear(4, 2)
    if kind == "complex":
        return nn.Linear(3, 2, dtype=torch.complex64)
    return nn.Linear(3, 2, bias=False)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("shape", ("weight is [2, 3]", "[2, 4]", "different models")),
        ("name", ("bias is in", "and not in", "different models")),
        ("complex", ("weight is torch.float32", "torch.complex64")),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("option", ["--last", "--between"])
def test_models_that_differ(tmp_path: Path, kind: str, words: tuple[str, ...], swapped: bool, option: str) -> None:
    """The error names the parameter and both files."""
    for name, model in (("one", nn.Linear(3, 2)), ("two", other_model(kind))):
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=0)
        for _ in range(6 if (name == "two") != swapped else 4):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
        save_checkpoint(tmp_path / name, model, optimizer, step=1)
    paths = [tmp_path / "one", tmp_path / "two"]
    line = one_line(cli("average", option, *(paths[::-1] if swapped else paths), tmp_path / "o.safetensors", status=1))
    assert all(str(path) in line for path in paths)
    assert all(word in line for word in (words if not swapped else words[-1:])), line


def test_dtypes_that_differ(tmp_path: Path) -> None:
    """The mean has the wider dtype."""
    for name, dtype in (("one", torch.bfloat16), ("two", torch.float32), ("three", torch.float16)):
        model = nn.Linear(3, 2).to(dtype)
        nn.init.constant_(model.weight, 1 / 3)
        save_checkpoint(tmp_path / name, model, ShardedASGD(model.named_parameters()), step=1)
    for names, wanted in (
        (("one", "two"), torch.float32),
        (("one", "three"), torch.float32),
        (("one",), torch.bfloat16),
    ):
        out = tmp_path / "out.safetensors"
        average_checkpoints([tmp_path / name for name in names], out, last=True, overwrite=True)
        assert load_file(out)["weight"].dtype == wanted


@pytest.mark.parametrize("torn", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("option", [[], ["--last"], ["--between"]])
def test_a_torn_source_is_found(pool: Pool, tmp_path: Path, torn: str, option: list[str]) -> None:
    """A flipped bit or a short file in any source is an error that names the file, and no output is left."""
    first, second = (path for path in pool if path.parent.name == "hybrid" and path.name != "step-00000004")
    copy = Path(shutil.copytree(second, tmp_path / "copy"))
    file = copy / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    for at in range(0, len(data), 64):
        data[at] ^= 1
    file.write_bytes(data if torn == "flipped" else data[:-8])
    if torn == "missing":
        file.unlink()
    line = one_line(cli("average", *option, first, copy, tmp_path / "out.safetensors", status=1))
    assert str(file) in line
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    with pytest.raises(CheckpointError, match="__1_0"):
        average_checkpoints([first, copy], tmp_path / "out.safetensors")


@pytest.mark.parametrize("option", ["--last", "--between"])
def test_ctrl_c_leaves_no_file(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """The temporary file was there when the signal came, and is not there afterwards; an earlier export stays."""
    out = tmp_path / "out.safetensors"
    average_checkpoints([next(iter(pool))], out)
    before = out.read_bytes()
    names: list[str] = []
    read = CheckpointContents.tensor

    def tensor(self: CheckpointContents, key: str) -> Tensor:
        if key.endswith("2.bias") or key.endswith("2.bias.ax"):
            names.extend(path.name for path in tmp_path.iterdir())
            signal.raise_signal(signal.SIGINT)
        return read(self, key)

    monkeypatch.setattr(CheckpointContents, "tensor", tensor)
    # Jobs in the background of a shell ignore the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert "wrote" not in cli("average", option, *list(pool)[:2], out, "--force", status=130).stdout
    finally:
        signal.signal(signal.SIGINT, handler)
    assert sorted(names) == [".out.safetensors.partial", "out.safetensors"]
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == before


MEASURE = """
import json, sys
from dist_asgd.cli import app
large, out = sys.argv[1:]
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
found = []
for options in ([], ["--last", "--weights", "1,2,3"], ["--between"]):
    count = 2 if options == ["--between"] else 3
    def average(kind):
        paths = [f"{large}/{kind}-{step}" for step in range(3, 3 + count)]
        app(["average", *options, *paths, out, "--force"], standalone_mode=False)
    average("small")
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    average("large")
    found.append(peak() - before)
print(json.dumps(found))
"""


def test_memory_is_bounded_by_one_tensor(tmp_path: Path) -> None:
    """Of 3 checkpoints of 8 averages of 4 MB each, a sum in float64 and a tensor are in memory."""
    for name, count, size in (("large", 8, 1024), ("small", 1, 8)):
        model = nn.ParameterList(nn.Parameter(torch.randn(size, 1024)) for _ in range(count))
        optimizer = ShardedASGD(model.parameters(), t0=0, foreach=False)
        for step in range(1, 6):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            if step > 2:
                save_checkpoint(tmp_path / f"{name}-{step}", model, optimizer, step=step)
    done = python("-c", MEASURE, str(tmp_path), str(tmp_path / "o.safetensors"), MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    # 8 bytes an element of the sum, and twice 4 of a tensor and of what it is read from.
    assert max(json.loads(done.stdout.splitlines()[-1])) < 4.5 * 4 * 1024 * 1024
