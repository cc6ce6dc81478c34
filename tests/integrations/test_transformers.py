"""The ``Trainer`` of Transformers, and LoRA by peft."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dist_asgd import ShardedASGD
from dist_asgd.integrations.transformers import ShardedASGDCallback, Stage2Mixin
from dist_asgd.integrations.wrappers import sharded_asgd
from tests.harness.bits import assert_same_bits, same_tree
from tests.harness.ranks import run, run_errors
from tests.integrations.launched import launched

worlds = pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
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
    args: dict[str, Any] = field(default_factory=dict)


CASES = {
    "gpt2": Case(),
    "gpt2 untied, by class": Case(tied=False, by_class=True),
    "llama": Case("llama", tied=False),
    "llama tied, by class": Case("llama", by_class=True),
    "accumulation, no clipping": Case(args={"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}),
    "clipping": Case(args={"max_grad_norm": 0.05}),
    "checkpointing": Case(args={"gradient_checkpointing": True}),
    "bf16": Case(args={"bf16": True}),
    "lora": Case("llama", lora=True),
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


@worlds
@pytest.mark.parametrize("name", CASES)
def test_trainer_as_documented(tmp_path: Path, name: str, backend: str, world_size: int) -> None:
    """No adapter; the same bits and the same losses in the log."""
    run(backend, world_size, trains, CASES[name], tmp_path)


@worlds
@pytest.mark.parametrize("name", ["gpt2", "llama tied, by class", "accumulation, no clipping", "lora"])
def test_stage2_mixin(tmp_path: Path, name: str, backend: str, world_size: int) -> None:
    """Beside DDP and torch.optim.ASGD."""
    case = CASES[name]
    run(backend, world_size, trains, Case(**{**case.__dict__, "stage": 2}), tmp_path)


def test_torch_compile(tmp_path: Path) -> None:
    """Inductor compiles the model, and ``step()`` stays outside."""
    run("none", 1, trains, Case("llama", args={"torch_compile": True, "max_steps": 3}), tmp_path, timeout_s=300)
