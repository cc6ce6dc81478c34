"""The work on a checkpoint grows with the number of parameters and not with its square."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from dist_asgd import ShardedASGD, save_checkpoint
from dist_asgd.checkpoint.format import reader
from dist_asgd.checkpoint.format.pickles import Machine
from dist_asgd.checkpoint.offline import contents, convert
from dist_asgd.checkpoint.offline.contents import CheckpointContents
from dist_asgd.checkpoint.offline.diff import compare
from dist_asgd.checkpoint.offline.inspect import summarize
from tests.harness.checkpoints import read_metadata

COUNT = 60


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of named parameters, with as many buffers of the same shape."""
    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.full((4,), float(i))) for i in range(COUNT)})
    for i in range(COUNT):
        model.register_buffer(f"b{i}", torch.full((4,), -1.0 - i))
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=0)
    for step in range(3):
        for param in model.values():
            param.grad = torch.full_like(param, 1.0 + step)
        optimizer.step()
    path = tmp_path_factory.mktemp("many") / "saved"
    save_checkpoint(path, model, optimizer, step=3)
    return path


def exported(path: Path) -> Any:
    """Plan an export, with a search for ties among the buffers."""
    return convert.plan_export(CheckpointContents(path), False, None)


WORK: dict[str, Callable[[Path], Any]] = {
    "inspect": lambda path: summarize(CheckpointContents(path)),
    "diff": lambda path: list(compare(CheckpointContents(path), CheckpointContents(path))),
    "export": exported,
    "groups": lambda path: CheckpointContents(path).groups,
}


@pytest.mark.parametrize("name", WORK)
def test_shared_values_are_read_once(saved: Path, name: str) -> None:
    """All parameters of a group have one list of all their names, and share hyperparameters."""
    load, read = reader.load_object, contents.CheckpointContents.tensor
    counts = {"objects": 0, "tensors": 0}

    def counted_load(*args: Any) -> Any:
        counts["objects"] += 1
        return load(*args)

    def counted_read(*args: Any) -> Any:
        counts["tensors"] += 1
        return read(*args)

    with (
        patch.object(reader, "load_object", counted_load),
        patch.object(contents.CheckpointContents, "tensor", counted_read),
    ):
        WORK[name](saved)
    assert counts["objects"] <= 2 * 12
    assert counts["tensors"] <= 2 * 6 * COUNT


def test_metadata_is_read_record_by_record(saved: Path) -> None:
    """As DCP pickles them: opcodes are executed alone where a kind of record occurs first, and nowhere else."""
    counts = {"short": 0, "long": 0}
    record = Machine._record

    def counted(machine: Machine, *args: Any) -> int:
        end = record(machine, *args)
        counts["short" if end else "long"] += 1
        return end

    (saved / ".metadata").write_bytes(pickle.dumps(read_metadata(saved)))
    with patch.object(Machine, "_record", counted):
        CheckpointContents(saved, verify=False)
    assert counts["short"] > 20 * COUNT
    assert counts["long"] < 40


def test_a_tensor_of_many_regions_is_looked_up_once(tmp_path: Path) -> None:
    """The work on a tensor grows with the number of its regions, and not with its square."""
    rows = torch.arange(200.0).view(100, 2)
    for rank, row in enumerate(rows):
        header = {"__metadata__": {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [rank, 0]}})}}
        text = json.dumps(header | {"w": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}).encode()
        data = len(text).to_bytes(8, "little") + text + row.numpy().tobytes()
        (tmp_path / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors").write_bytes(data)
    opened = reader.OpenCheckpoint(tmp_path, verify=False)
    with patch.object(reader.OpenCheckpoint, "regions", side_effect=opened.regions) as regions:
        assert torch.equal(opened.whole_tensor("w"), rows)
    assert regions.call_count <= 1


def test_a_list_that_parameters_share_is_walked_once(tmp_path: Path) -> None:
    """By a save, which takes containers apart as DCP does."""
    from dist_asgd.checkpoint import containers

    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.ones(4)) for i in range(COUNT)})
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1)
    with patch.object(containers, "flatten_state_dict", wraps=containers.flatten_state_dict) as flatten:
        save_checkpoint(tmp_path / "saved", model, optimizer, step=0)
    assert flatten.call_count <= 2
