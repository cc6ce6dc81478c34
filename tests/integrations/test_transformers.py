"""The ``Trainer`` of Transformers, and LoRA by peft."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dist_asgd import ShardedASGD, ShardedAverage, export_averaged, load_checkpoint, save_checkpoint
from dist_asgd.integrations.transformers import ShardedASGDCallback, Stage2Mixin
from dist_asgd.integrations.wrappers import sharded_asgd
from tests.harness.bits import assert_same_bits
from tests.harness.ranks import run, run_errors
from tests.integrations.launched import launched

worlds = pytest.mark.parametrize(("backend", "ranks"), [("none", 1), ("gloo", 2)])
scenario = pytest.mark.scenario
SETTINGS: dict[str, Any] = {"lr": 0.1, "t0": 3, "weight_decay": 0.01}


class Stage2Trainer(Stage2Mixin, Trainer):
    """What a user writes."""


class Tokens(Dataset):  # type: ignore[type-arg]
    """Random sequences."""

    def __init__(self, count: int) -> None:
        self.ids = torch.randint(0, 31, (count, 8), generator=torch.Generator().manual_seed(count))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@dataclass(frozen=True)
class Case:
    """A user's script."""

    model: str = "gpt2"
    tied: bool = True
    by_class: bool = False
    stage: int = 1
    lora: bool = False
    on_accelerators: bool = False
    args: dict[str, Any] = field(default_factory=dict)


# By what the tables call them. GPT-2 with tied weights is the model if none is named.
BY_CLASS = "`optimizer_cls_and_kwargs=`"
CASES = {
    "training as documented": Case(),
    f"{BY_CLASS}, GPT-2 untied": Case(tied=False, by_class=True),
    "Llama untied": Case("llama", tied=False),
    f"{BY_CLASS}, Llama tied": Case("llama", by_class=True),
    "accumulation": Case(args={"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}),
    "clipping by norm": Case(args={"max_grad_norm": 0.05}),
    "gradient checkpointing": Case(args={"gradient_checkpointing": True}),
    "bf16": Case(args={"bf16": True}),
    "LoRA by peft": Case("llama", lora=True),
}


def build(case: Case) -> nn.Module:
    """A tiny model from its config."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 31, "tie_word_embeddings": case.tied}
    if case.model == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=1, n_head=2, n_positions=8, **sizes))
    else:
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=12, intermediate_size=16, num_hidden_layers=1, **heads, **sizes)
        )
    if case.lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    return model


def trainer_of(
    case: Case, folder: Path, ours: bool, callbacks: list[TrainerCallback] | None = None, **more: Any
) -> Any:
    """The script up to ``train()``."""
    options = {"max_steps": 6, "logging_steps": 2, "save_strategy": "no", **case.args, **more}
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=2, **options
    )
    if case.on_accelerators:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = build(case)
    made: dict[str, Any] = {"model": model, "args": args, "train_dataset": Tokens(48), "eval_dataset": Tokens(8)}
    kwargs = SETTINGS | ({"stage": case.stage} if ours else {"foreach": False})
    cls = ShardedASGD if ours else torch.optim.ASGD
    if case.by_class:
        made["optimizer_cls_and_kwargs"] = (cls, kwargs)
    else:
        params = model.named_parameters() if ours else model.parameters()
        optimizer = cls(params, **kwargs)
        made["optimizers"] = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    return (Stage2Trainer if ours and case.stage == 2 else Trainer)(**made, callbacks=callbacks)


def bits(trainer: Any) -> dict[str, Tensor]:
    """Parameters and averages by name, whole."""
    optimizer = trainer.optimizer.optimizer
    whole = isinstance(optimizer, ShardedASGD)
    state = (optimizer.consolidated_state_dict(to=None) if whole else optimizer.state_dict())["state"]
    found = {f"p {name}": p.detach().clone() for name, p in trainer.model.named_parameters()}
    return found | {f"ax{index}": entry["ax"].clone() for index, entry in state.items()}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert_same_bits(got[key], value, key)


def trains(rank: int, world_size: int, case: Case, folder: Path) -> None:
    """Job: one script with either optimizer."""
    found = []
    for ours in (False, True):
        with launched(rank, world_size):
            trainer = trainer_of(case, folder, ours)
            trainer.train()
            found.append((bits(trainer), [log.get("loss") for log in trainer.state.log_history]))
    if case.stage == 2 and case.args.get("max_grad_norm") != 0.0:
        # The global norm adds up the squares in another order.
        for key, value in found[0][0].items():
            torch.testing.assert_close(found[1][0][key], value, rtol=1e-5, atol=1e-6)
    else:
        assert_same(found[1][0], found[0][0])
        assert found[0][1] == found[1][1]
    if case.lora:
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        assert sharded_asgd(trainer.optimizer).memory_report().full_state_bytes < 8 * trained


@scenario("{name}")
@worlds
@pytest.mark.parametrize("name", CASES)
def test_trainer_as_documented(tmp_path: Path, name: str, backend: str, ranks: int) -> None:
    """No adapter; the same bits and the same losses in the log."""
    run(backend, ranks, trains, CASES[name], tmp_path)


@scenario("stage 2: {name}", "with `Stage2Mixin`")
@worlds
@pytest.mark.parametrize(
    "name", ["training as documented", f"{BY_CLASS}, Llama tied", "accumulation", "clipping by norm", "LoRA by peft"]
)
def test_stage2_mixin(tmp_path: Path, name: str, backend: str, ranks: int) -> None:
    """Beside DDP and torch.optim.ASGD."""
    run(backend, ranks, trains, replace(CASES[name], stage=2), tmp_path)


@scenario("`torch_compile=True`")
@worlds
def test_torch_compile(tmp_path: Path, backend: str, ranks: int) -> None:
    """Of the model; ``step()`` stays outside. (Inductor takes minutes on a CPU.)"""
    args = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 3}
    run(backend, ranks, trains, Case(args=args), tmp_path)


# --- checkpoints and the average ---------------------------------------------------------------------------------

SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "save_total_limit": 5}


def saves(rank: int, world_size: int, case: Case, folder: Path) -> None:
    """Job: both scripts train without a break, and save in the middle."""
    for ours in (False, True):
        with launched(rank, world_size):
            place = folder / ("ours" if ours else "torch")
            trainer = trainer_of(case, place, ours, [ShardedASGDCallback()] if ours else None, **SAVES)
            trainer.train()
            if trainer.args.should_save:
                torch.save(bits(trainer), place / "bits.pt")
            elif ours:
                bits(trainer)
            trainer.accelerator.wait_for_everyone()


def resumes(rank: int, world_size: int, case: Case, folder: Path, same: bool) -> None:
    """Job: new scripts resume from the checkpoints of both, also from each other's."""
    found = {}
    for ours, source in ((False, "torch"), (True, "ours"), (True, "torch"), (False, "ours")):
        with launched(rank, world_size):
            place = folder / f"{ours} from {source} on {rank}"
            trainer = trainer_of(case, place, ours, [ShardedASGDCallback()] if ours else None, **SAVES)
            trainer.train(resume_from_checkpoint=str(folder / source / "checkpoint-3"))
            found[f"{ours} {source}"] = bits(trainer)
    wanted = torch.load(folder / "torch" / "bits.pt") if same else found["False torch"]
    for got in found.values():
        assert_same(got, wanted)


CALLBACK = "with `ShardedASGDCallback`"
RESUMED = [
    scenario("checkpoint of `torch.optim.ASGD` resumed, and the reverse", CALLBACK),
    scenario("{before}-rank checkpoint resumed", CALLBACK),
]


@pytest.mark.parametrize(("before", "ranks"), [(1, 1), (2, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("training as documented", marks=RESUMED),
        pytest.param(f"{BY_CLASS}, Llama tied", marks=RESUMED),
        pytest.param("LoRA by peft", marks=scenario("{name}: {before}-rank checkpoint resumed", CALLBACK)),
    ],
)
def test_resume_from_checkpoint(tmp_path: Path, name: str, before: int, ranks: int) -> None:
    """On the same number of ranks as if nothing had happened; on another as with torch.optim.ASGD."""
    case = CASES[name]
    run("gloo" if before > 1 else "none", before, saves, case, tmp_path)
    run("gloo" if ranks > 1 else "none", ranks, resumes, case, tmp_path, before == ranks)


@scenario("stage 2: 2-rank checkpoint resumed", "with `Stage2Mixin`, `ShardedASGDCallback`", ranks=2)
def test_resume_in_stage2(tmp_path: Path) -> None:
    """From its own checkpoint."""
    case = Case(stage=2, args={"max_grad_norm": 0.0})
    run("gloo", 2, saves, case, tmp_path)
    run("gloo", 2, resumes, case, tmp_path, True)


FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}


def fully_sharded(rank: int, world_size: int, folder: Path) -> None:
    """Job: FSDP2 by the Trainer's arguments, without a break and resumed. Accelerate takes it on accelerators only."""
    found = []
    case = Case("llama", tied=False, by_class=True, on_accelerators=True, args=FSDP)
    for name, ours, callbacks in (("torch", False, []), ("ours", True, []), ("called", True, [ShardedASGDCallback()])):
        for checkpoint in (None, str(folder / name / "checkpoint-3")):
            with launched(rank, world_size):
                trainer = trainer_of(case, folder / name, ours, callbacks, **SAVES)
                trainer.train(resume_from_checkpoint=checkpoint)
                assert (folder / name / "checkpoint-3" / "optimizer.bin").exists()
                found.append({name: p.detach().full_tensor() for name, p in trainer.model.named_parameters()})
    for got in found[1:]:
        assert_same(got, found[0])


@scenario("FSDP2: clipping by norm", ranks=2)
@scenario("FSDP2: 2-rank checkpoint resumed", ranks=2)
def test_fsdp2(tmp_path: Path) -> None:
    """Checkpoints and resume included, without the callback and with it."""
    run("gloo", 2, fully_sharded, tmp_path)


@scenario("FSDP2: `optimizers=`", "refused: Passing `optimizers` is not allowed if PyTorch FSDP is enabled", ranks=2)
def test_fsdp2_wants_the_class(tmp_path: Path, refusal: str) -> None:
    """The Trainer builds the optimizer after the model was sharded."""
    case = Case("llama", tied=False, on_accelerators=True, args=FSDP)
    for error in run_errors("gloo", 2, trains, case, tmp_path):
        assert refusal in error.message


def averages_fully_sharded(rank: int, world_size: int, folder: Path) -> None:
    """Job: FSDP2, and the average beside each checkpoint."""
    case = Case("llama", tied=False, by_class=True, on_accelerators=True, args=FSDP)
    with launched(rank, world_size):
        trainer_of(case, folder, True, [ShardedASGDCallback(save_average=True)], **SAVES).train()


@scenario("FSDP2: `save_average=True`", "refused: save_average=True does not work with FSDP", ranks=2)
def test_fsdp2_saves_no_average(tmp_path: Path, refusal: str) -> None:
    """It would have to be gathered."""
    for error in run_errors("gloo", 2, averages_fully_sharded, tmp_path):
        assert refusal in error.message


@scenario("`fsdp=True` on CPUs, which Accelerate ignores", CALLBACK, ranks=2)
def test_fsdp_on_cpus(tmp_path: Path) -> None:
    """The model is in DDP, so the checkpoint has to be made whole."""
    run("gloo", 2, saves, Case("llama", tied=False, args=FSDP), tmp_path)
    content = torch.load(tmp_path / "ours" / "checkpoint-3" / "optimizer.pt")
    assert [type(entry["ax"]) for entry in content["state"].values()] == [Tensor] * len(content["state"])
    assert content["state"]


class Losses(TrainerCallback):
    """Evaluates by hand what the Trainer should have evaluated: the average."""

    def __init__(self) -> None:
        self.average: list[float] = []
        self.last: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate:
            optimizer = sharded_asgd(kwargs["optimizer"])
            self.last.append(loss_of(kwargs["model"]))
            with optimizer.averaged_parameters():
                self.average.append(loss_of(kwargs["model"]))


@torch.no_grad()
def loss_of(model: Any) -> float:
    """The mean loss of the evaluation."""
    ids = Tokens(8).ids
    model.eval()
    loss = float(model(input_ids=ids, labels=ids).loss)
    model.train()
    return loss


BEST: dict[str, Any] = {
    **{"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 8},
    **{"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False},
}


def picks_best(rank: int, world_size: int, case: Case, folder: Path, averaged: bool) -> None:
    """Job: evaluations, files and the model at the end are those of the average, or of the last iterate."""
    with launched(rank, world_size):
        losses = Losses()
        callback = ShardedASGDCallback(evaluate_average=averaged, save_average=averaged)
        trainer = trainer_of(case, folder, True, [losses, callback], **BEST | case.args)
        trainer.train()
        evaluated = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
        wanted = losses.average if averaged else losses.last
        # For GPT-2 the Trainer divides by 8 tokens, of which 7 have a loss.
        factor = 7 / 8 if case.model == "gpt2" else 1.0
        assert evaluated == pytest.approx([factor * loss for loss in wanted], abs=1e-5)
        assert losses.average[-1] != pytest.approx(losses.last[-1], abs=1e-5)
        assert loss_of(trainer.model) == pytest.approx(min(wanted), abs=1e-5)
        if averaged:
            best = Path(trainer.state.best_model_checkpoint)
            assert (best / "averaged" / "config.json").exists() or case.lora
            assert (best / "optimizer.pt").exists()


LAST, AVERAGE = "last iterate as the best model", "average evaluated, saved, and picked as the best"


@worlds
@pytest.mark.parametrize("weights", [LAST, AVERAGE])
@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        pytest.param("training as documented", "steps", marks=scenario("{weights}", CALLBACK)),
        pytest.param("Llama untied", "best", marks=scenario("{weights}", CALLBACK)),
        pytest.param("LoRA by peft", "steps", marks=scenario("{name}: {weights}", CALLBACK)),
    ],
)
def test_load_best_model_at_end(
    tmp_path: Path, name: str, strategy: str, weights: str, backend: str, ranks: int
) -> None:
    """With the callback, evaluations and the best model are the average."""
    case = replace(CASES[name], args={"save_strategy": strategy})
    run(backend, ranks, picks_best, case, tmp_path, weights == AVERAGE)


class Ended(TrainerCallback):
    """What the launcher does to the other ranks once the one that writes has failed."""

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("ended by the launcher")


def saves_a_part(rank: int, world_size: int, folder: Path, message: str) -> None:
    """Job: the callback is missing. The rank that writes raises, with the line that makes it whole."""
    advice = f"{re.escape(message)}.*{re.escape('add dist_asgd.integrations.transformers.ShardedASGDCallback()')}"
    with launched(rank, world_size):
        trainer = trainer_of(Case(), folder, True, [Ended()], **SAVES)
        with pytest.raises(RuntimeError, match="ended by the launcher" if rank else advice):
            trainer.train()


def saves_the_whole(rank: int, world_size: int, folder: Path) -> None:
    """Job: the callback is missing, and the only rank has the whole."""
    with launched(rank, world_size):
        trainer_of(Case(), folder, True, **SAVES).train()


@scenario("checkpoint without the adapter", ranks=1)
@scenario(
    "checkpoint without the adapter",
    "refused: transformers would save one rank's part of the optimizer's state as if it were the whole",
    ranks=2,
)
def test_a_checkpoint_of_a_part_is_an_error(tmp_path: Path, refusal: str) -> None:
    """One rank has the whole."""
    run("gloo", 2, saves_a_part, tmp_path, refusal)
    run("none", 1, saves_the_whole, tmp_path)
    assert (tmp_path / "checkpoint-3" / "optimizer.pt").exists()


@scenario("`launch/examples`, by torchrun", CALLBACK, ranks=2)
def test_the_example_runs(tmp_path: Path) -> None:
    """With few steps: it trains, resumes, evaluates the average, and exports it."""
    code = "import pathlib, sys, launch.examples.transformers as example; example.STEPS = 4; "
    code += "example.main(1, pathlib.Path(sys.argv[1]))"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, sys.executable, "-c", code, str(tmp_path)]
    root = Path(__file__).parent.parent.parent
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "best_average" in ran.stdout
    assert (tmp_path / "last-average.safetensors").exists()


# --- what cannot work ------------------------------------------------------------------------------------------


def wrong(rank: int, world_size: int, what: str, folder: Path) -> None:
    """Job: a script that cannot work."""
    with launched(rank, world_size):
        if what == WITHOUT:
            case = Case(stage=2)
            trainer = trainer_of(case, folder, True)
            trainer = Trainer(
                model=trainer.model,
                args=trainer.args,
                train_dataset=Tokens(16),
                optimizers=(sharded_asgd(trainer.optimizer), None),
            )
        elif what == "the mixin":
            trainer = trainer_of(Case(), folder, True)
            trainer.__class__ = Stage2Trainer
        else:
            trainer = trainer_of(Case(stage=2, args={"torch_compile": True}), folder, True)
        trainer.train()


WITHOUT = "stage 2 without the adapter"


@pytest.mark.parametrize(
    ("what", "backend", "ranks"),
    [
        pytest.param(what, backend, ranks, marks=scenario(text, f"refused: {message}"))
        for backend, ranks in (("none", 1), ("gloo", 2))
        for what, text, message in (
            (WITHOUT, WITHOUT, "With stage=2 do not wrap the model in DDP"),
            ("the mixin", "stage 1 with the adapter for stage 2", "Stage2Mixin is for ShardedASGD(stage=2)"),
            ("compiled", "stage 2: `torch_compile=True`", "Call model.compile() instead"),
        )
        if (what, ranks) != (WITHOUT, 1)
    ],
)
def test_what_cannot_work_is_an_error_on_every_rank(
    tmp_path: Path, what: str, backend: str, ranks: int, refusal: str
) -> None:
    """With the remedy."""
    for error in run_errors(backend, ranks, wrong, what, tmp_path):
        assert refusal in error.message


@scenario(WITHOUT, ranks=1)
def test_one_rank_has_no_ddp(tmp_path: Path) -> None:
    """So nothing has to be left out."""
    run("none", 1, wrong, WITHOUT, tmp_path)


# --- AdamW, and an average beside it -----------------------------------------------------------------------


def trains_on_fsdp2(rank: int, _world_size: int, tied: bool, folder: Path) -> dict[str, Tensor]:
    """Job: train by hand, save, go on from the checkpoint in another model, and export its average; its weights."""
    batches = Tokens(48).ids.view(6, 8, 8)

    def made() -> tuple[nn.Module, torch.optim.Optimizer, ShardedAverage]:
        # Without dropout, so that the restart sees the same.
        model = build(Case(tied=tied)).eval()
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, ShardedAverage(model.named_parameters(), decay=0.75)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, ema: ShardedAverage, batches: Tensor) -> None:
        for ids in batches:
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            ema.update()

    model, optimizer, ema = made()
    train(model, optimizer, ema, batches[:3])
    save_checkpoint(folder / "half", model, optimizer, step=3, averages={"ema": ema})
    train(model, optimizer, ema, batches[3:])
    again, its_optimizer, its_ema = made()
    load_checkpoint(folder / "half", again, its_optimizer, averages={"ema": its_ema})
    train(again, its_optimizer, its_ema, batches[3:])
    save_checkpoint(folder / "whole", again, its_optimizer, step=6, averages={"ema": its_ema})
    for which in ("job", "checkpoint"):
        if rank == 0:
            model.config.save_pretrained(folder / which)
    export_averaged(folder / "job" / "model.safetensors", again, its_ema)
    with ema.averaged_parameters():
        return {name: value.full_tensor().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("tied", [True, False])
def test_an_average_beside_adamw_is_loaded_by_from_pretrained(tmp_path: Path, tied: bool) -> None:
    """From training on 2 ranks of FSDP2, with a restart, to a model for inference: from the job and a checkpoint."""
    expected = run("gloo", 2, trains_on_fsdp2, tied, tmp_path)[0]
    command = [sys.executable, "-m", "dist_asgd", "export", str(tmp_path / "whole"), "--average", "ema"]
    subprocess.run([*command, str(tmp_path / "checkpoint" / "model.safetensors")], check=True)
    for which in ("job", "checkpoint"):
        loaded = GPT2LMHeadModel.from_pretrained(tmp_path / which)
        found = loaded.state_dict()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same_bits(found[name], value, f"{name} of the {which}")
