"""What lies beside and around a checkpoint: files of others, folders of checkpoints, caches, and a second writer."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from typer.testing import CliRunner

from dist_asgd import (
    CheckpointManager,
    ShardedASGD,
    async_save_checkpoint,
    export_averaged,
    load_checkpoint,
    read_extra,
    save_checkpoint,
)
from dist_asgd.checkpoint.format import directory, safetensors, writer
from dist_asgd.checkpoint.format.locks import open_alone
from dist_asgd.checkpoint.format.manifest import MANIFEST_NAME, CheckpointError
from dist_asgd.cli import app
from tests.harness.ranks import run, run_errors
from tests.harness.topologies import assert_same_state, build, whole_state

worlds = pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
COMMANDS = ["inspect", "verify", "export", "consolidate", "diff"]


def cli(command: str, path: Path, out: Path) -> Any:
    """Run a command on ``path``, which writes into the folder ``out`` if it writes anything."""
    outs = {"export": [out / "out.safetensors"], "consolidate": [out / "out.pt"], "diff": [path]}
    return CliRunner().invoke(app, [command, str(path), *map(str, outs.get(command, []))])


# --- files of others -----------------------------------------------------------------------------------------


def leave_files(path: Path) -> None:
    """Put into a checkpoint what systems, tools and people put into folders."""
    for name in ("config.json", ".DS_Store", ".nfs000000000001", ".gitattributes", "__7_0.distcp", "ä b"):
        (path / name).write_bytes(b"theirs")
    (path / ".cache" / "huggingface").mkdir(parents=True)
    (path / "gone").symlink_to("nowhere")
    os.mkfifo(path / "pipe")


def loads_among_others(rank: int, _world_size: int, folder: str, stage: str) -> None:
    """Job: a checkpoint loads with files of others in it."""
    live = build(stage).train(3)
    with CheckpointManager(folder) as manager:
        path = manager.save(live.model, live.optimizer, step=3, extra=rank)
        if rank == 0:
            leave_files(path)
        if dist.is_initialized():
            dist.barrier()
        other = build(stage, seed=7)
        restored = manager.restore(other.model, other.optimizer)
        assert restored is not None
        assert_same_state(other, whole_state(live))
        assert load_checkpoint(path, other.model, other.optimizer, verify=False) == rank
        assert read_extra(path) == 0


@pytest.mark.parametrize(("world_size", "stage"), [(1, "single"), (2, "stage2"), (2, "fsdp2")])
def test_files_of_others_are_ignored(world_size: int, stage: str, tmp_path: Path) -> None:
    """Only files that the manifest names are a checkpoint's: with more of them it loads, and all commands work."""
    run("none" if world_size == 1 else "gloo", world_size, loads_among_others, str(tmp_path / "c"), stage)
    for command in COMMANDS:
        result = cli(command, tmp_path / "c" / "latest", tmp_path)
        assert result.exit_code == 0, result.output
        if command == "verify":
            assert "config.json" in result.stderr


# --- another folder than the checkpoint's ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manager's folder with the checkpoints of steps 9 and 10."""
    folder = tmp_path_factory.mktemp("kept") / "c"
    live = build("single").train(1)
    for step in (9, 10):
        CheckpointManager(folder).save(live.model, live.optimizer, step=step, extra="mine")
    return folder


HINTS = {
    "": "pass {0}/latest, or call CheckpointManager",
    "..": "pass {0}",
    "step-00000010/.metadata": "It is a file of the checkpoint {0}/step-00000010: pass that directory",
    "step-00000012": "In {0} there are step-00000009, step-00000010",
    "best": "It is a link to step-00000002, which is not there any more.",
    ".step-00000011.tmp-0123456789ab": "It is what a save that crashed, or that still runs, has written so far",
    "step-00000010/sub": "It is a folder inside the checkpoint {0}/step-00000010: pass that directory",
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("where", HINTS)
def test_the_checkpoint_that_was_meant_is_named(kept: Path, tmp_path: Path, where: str, verify: bool) -> None:
    """A folder of checkpoints, a file of one, a missing or unfinished one: the error says what to pass instead."""
    folder = tmp_path / "above" / "c"
    shutil.copytree(kept, folder, symlinks=True)
    (folder / "best").symlink_to("step-00000002")
    (folder / ".step-00000011.tmp-0123456789ab").mkdir()
    (folder / "step-00000010" / "sub").mkdir()
    path = folder.parent if where == ".." else folder / where
    if where == "..":
        shutil.rmtree(folder)
        shutil.copytree(kept / "step-00000010", folder)
    live = build("single", seed=7)
    before = whole_state(live)
    calls = [
        lambda: load_checkpoint(path, live.model, live.optimizer, verify=verify),
        lambda: read_extra(path, verify=verify),
    ]
    for call in calls:
        with pytest.raises(CheckpointError) as raised:
            call()
        assert HINTS[where].format(folder) in str(raised.value)
    assert_same_state(live, before)
    for command in COMMANDS:
        result = cli(command, path, tmp_path)
        assert result.exit_code == (2 if command == "diff" else 1)
        assert HINTS[where].format(folder) in result.stderr.replace("\n", "")


def loads_the_folder(_rank: int, _world_size: int, folder: str) -> None:
    """Job: load a manager's folder as if it were a checkpoint."""
    live = build("stage1")
    load_checkpoint(folder, live.model, live.optimizer)


def manages_a_checkpoint(_rank: int, _world_size: int, folder: str, action: str) -> None:
    """Job: take a checkpoint for a manager's folder."""
    live = build("stage1").train(1)
    manager = CheckpointManager(f"{folder}/step-00000010")
    if action == "save":
        manager.save(live.model, live.optimizer, step=11)
    else:
        manager.restore(live.model, live.optimizer)


@worlds
def test_folder_and_checkpoint_are_not_mixed_up(backend: str, world_size: int, kept: Path) -> None:
    """A folder is no checkpoint, and a checkpoint no folder: restoring from one had found nothing, in silence."""
    for error in run_errors(backend, world_size, loads_the_folder, str(kept)):
        assert "the newest of which is step-00000010" in error.message
    for action in ("save", "restore"):
        for error in run_errors(backend, world_size, manages_a_checkpoint, str(kept), action):
            assert "is a checkpoint, and no folder of checkpoints" in error.message
    assert sorted(os.listdir(kept)) == ["latest", "step-00000009", "step-00000010"]


# --- links -----------------------------------------------------------------------------------------------------


def into_cache(source: Path, root: Path, kind: str) -> Path:
    """Copy a checkpoint the way a tool does, its files in a cache and links to them; returns the directory."""
    cache = root / {"hub": "blobs", "dvc": ".dvc/cache/files/md5", "annex": ".git/annex/objects"}[kind]
    cache.mkdir(parents=True)
    path = root / "snapshots" / "0123abcd" / "step-1" if kind == "hub" else root / "data" / "step-1"
    path.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, cache / f"{number:040x}")
        (path / file.name).symlink_to(os.path.relpath(cache / f"{number:040x}", path))
    return path


@pytest.mark.parametrize("kind", ["hub", "dvc", "annex"])
def test_links_into_the_cache_of_a_tool_are_followed(kept: Path, tmp_path: Path, kind: str) -> None:
    """A checkpoint in the cache of the Hugging Face Hub, of DVC or of git-annex loads, also by a link to it."""
    path = into_cache(kept / "step-00000010", tmp_path, kind)
    (tmp_path / "link").symlink_to(path)
    for name in (path, tmp_path / "link"):
        live = build("single", seed=7)
        assert load_checkpoint(name, live.model, live.optimizer) == "mine"
        assert_same_state(live, whole_state(build("single").train(1)))
        for command in COMMANDS:
            assert cli(command, name, tmp_path).exit_code == 0
            for out in tmp_path.glob("out.*"):
                out.unlink()


def test_other_links_are_refused_with_a_remedy(kept: Path, tmp_path: Path) -> None:
    """Links elsewhere, by way of the cache too, and links to nothing are refused."""
    path = into_cache(kept / "step-00000010", tmp_path / "hub", "hub")
    blob = (path / MANIFEST_NAME).resolve()
    outside = blob.rename(tmp_path / "outside")
    for name, target in (("outside", outside), ("through", outside), ("nothing", tmp_path / "none")):
        (path / MANIFEST_NAME).unlink()
        if name == "through":
            blob.symlink_to(target)
            target = blob
        (path / MANIFEST_NAME).symlink_to(target)
        with pytest.raises(CheckpointError, match=r"is a symbolic link.*Copy the checkpoint with cp -rL"):
            read_extra(path)


# --- two writers -----------------------------------------------------------------------------------------------


class Held:
    """Holds every save of this process back before its files are on disk, from ``hold`` to ``let_go``."""

    def __init__(self) -> None:
        self._go = threading.Event()
        self._original = writer.HashedFile.sync

    def hold(self) -> None:
        original, go = self._original, self._go

        def sync(file: writer.HashedFile) -> None:
            go.wait(30)
            original(file)

        writer.HashedFile.sync = sync  # type: ignore[method-assign]

    def let_go(self) -> None:
        self._go.set()
        writer.HashedFile.sync = self._original  # type: ignore[method-assign]


def is_being_written(folder: str) -> bool:
    """Whether a save holds its lock and has data; a folder may get its final name while this looks."""
    with contextlib.suppress(FileNotFoundError):
        return any(list(writer.parent.glob("*.distcp")) for writer in Path(folder).rglob(".writer"))
    return False


def two_jobs(_rank: int, _world_size: int, folder: str, managed: bool) -> str:
    """Job: a second optimizer saves where the first is still writing."""
    first, second = build("stage1").train(2), build("stage2", seed=7).train(1)
    # The groups for the background are made first.
    for number, live in enumerate((first, second)):
        save_checkpoint(f"{folder}/warm{number}", live.model, live.optimizer, step=1)
    held = Held()
    held.hold()
    try:
        if managed:
            pending = CheckpointManager(f"{folder}/c").async_save(first.model, first.optimizer, step=2)
        else:
            pending = async_save_checkpoint(f"{folder}/c", first.model, first.optimizer, step=2)
        while not is_being_written(folder):
            assert not pending.done()
        if dist.is_initialized():
            dist.barrier()
        save = CheckpointManager(f"{folder}/c").save if managed else partial(save_checkpoint, f"{folder}/c")
        with pytest.raises(ValueError, match="another save is writing") as caught:
            save(second.model, second.optimizer, step=3)
    finally:
        held.let_go()
    pending.wait()
    path = Path(folder, "c", "latest") if managed else Path(folder, "c")
    load_checkpoint(path, second.model, second.optimizer)
    assert_same_state(second, whole_state(first))
    assert not list(Path(folder).rglob(".*tmp-*"))
    assert not list(Path(folder).rglob(".writer"))
    return str(caught.value)


@worlds
@pytest.mark.parametrize("managed", [False, True], ids=["path", "manager"])
def test_a_second_writer_is_told_of_the_first(
    backend: str, world_size: int, managed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second gets the error, on all ranks, with the process that writes; the first goes on, and hears of it."""
    for message in run(backend, world_size, two_jobs, str(tmp_path), managed):
        assert f"process {os.getpid()} on" in message or world_size > 1
        assert "each stage of a pipeline" in message
    if world_size == 1:
        assert "another writer wanted to save to" in caplog.text


def one_manager(_rank: int, _world_size: int, folder: str) -> None:
    """Job: while the save of an optimizer is still being written, its manager restores into another, and saves that."""
    first, second = build("stage1").train(2), build("stage2", seed=7).train(1)
    with CheckpointManager(f"{folder}/c") as checkpoints:
        for step, go_on in ((2, "restore"), (3, "save"), (5, "async_save")):
            held = Held()
            held.hold()
            timer = threading.Timer(0.3, held.let_go)
            checkpoints.async_save(first.model, first.optimizer, step=step)
            timer.start()
            if go_on == "restore":
                restored = checkpoints.restore(second.model, second.optimizer)
                assert restored is not None
                assert restored.step == step
                assert_same_state(second, whole_state(first))
            else:
                getattr(checkpoints, go_on)(second.model, second.optimizer, step=step + 1)
            timer.join()
        checkpoints.wait()
        assert checkpoints.steps() == [4, 5, 6]


@worlds
def test_a_manager_waits_for_the_save_of_another_optimizer(backend: str, world_size: int, tmp_path: Path) -> None:
    """It is the latest checkpoint in a moment, and writes to the folder that the next save clears."""
    run(backend, world_size, one_manager, str(tmp_path))


def two_stages(rank: int, _world_size: int, folder: str) -> str:
    """Job: both stages of a pipeline, each with a group of its own, save to one path at once."""
    groups = [dist.new_group([0]), dist.new_group([1])]
    torch.manual_seed(rank)
    stage = nn.Linear(3 + rank, 4)
    optimizer = ShardedASGD(stage.parameters(), lr=0.1, process_group=groups[rank])
    dist.barrier()
    try:
        save_checkpoint(f"{folder}/c", stage, optimizer, step=1)
    except ValueError as error:
        return str(error)
    return "saved"


def test_stages_of_a_pipeline_on_one_path(tmp_path: Path) -> None:
    """At most one stage saves, whole; the others hear why not, and nothing blames the disk."""
    answers = run("gloo", 2, two_stages, str(tmp_path))
    assert answers.count("saved") <= 1
    assert all(answer == "saved" or ("stage" in answer and "pipeline" in answer) for answer in answers)
    assert sorted(os.listdir(tmp_path)) == (["c"] if "saved" in answers else [])


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_two_exports_to_one_file(kept: Path, tmp_path: Path, name: str) -> None:
    """A second export, by whatever call, neither mixes its bytes into those of the first nor removes them."""
    other = open_alone(tmp_path / f".{name}.partial")
    other.write(b"theirs")
    command = "consolidate" if name == "out.pt" else "export"
    result = cli(command, kept / "latest", tmp_path)
    assert result.exit_code == 1
    assert "another process is writing" in result.stderr
    if command == "export":
        live = build("single")
        with pytest.raises(ValueError, match="another process is writing"):
            export_averaged(tmp_path / name, live.model, live.optimizer)
    other.flush()
    assert (tmp_path / f".{name}.partial").read_bytes() == b"theirs"
    other.close()
    # What a crash has left is overwritten.
    assert cli(command, kept / "latest", tmp_path).exit_code == 0


def test_an_export_that_comes_second_replaces_nothing(tmp_path: Path) -> None:
    """Without ``overwrite`` a file that has appeared during the export stays."""
    specs = {"w": safetensors.TensorSpec(torch.float32, (2,))}
    files = safetensors.TensorFiles(tmp_path / "a.safetensors", specs, metadata={})
    files.open()
    files.write("w", torch.zeros(2))
    (tmp_path / "a.safetensors").write_bytes(b"theirs")
    with pytest.raises(ValueError, match="exists"):
        files.commit()
    files.discard()
    assert (tmp_path / "a.safetensors").read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["a.safetensors"]


def begins_often(folder: str, results: Any) -> None:
    """Process: begin saves to one path, and give them up; puts the errors that are no refusal."""
    errors = []
    for _ in range(60):
        try:
            directory.begin(Path(folder, "a")).discard()
        except Exception as error:
            if "another save is writing" not in str(error):
                errors.append(repr(error))
    results.put(errors)


def test_saves_that_begin_at_the_same_moment_take_nothing_from_each_other(tmp_path: Path) -> None:
    """None takes the directory of another for a leftover, however their steps fall together."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=begins_often, args=(str(tmp_path), results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    assert found == [[]] * len(processes)
    assert not list(tmp_path.iterdir())
