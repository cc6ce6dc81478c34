"""Nothing is lost: failures leave what was there, crashes leave the last checkpoint whole, and every rank knows."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd import CheckpointManager, PeerError, async_save_checkpoint, load_checkpoint, save_checkpoint
from dist_asgd.checkpoint.format import directory, reader, writer
from dist_asgd.checkpoint.pending import PendingSave
from dist_asgd.checkpoint.save import Saver
from tests.harness.ranks import run, run_errors
from tests.harness.topologies import Run, assert_same_state, build, whole_state

WORLDS = [("none", 1), ("gloo", 2)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
# How many real kills; 200 take two minutes.
NUM_KILLS = int(os.environ.get("DIST_ASGD_KILLS", "8"))


# --- failures ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(_folder: Path) -> Iterator[None]:
    """No file may grow beyond 4 KB, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def vanishing_folder(folder: Path) -> Iterator[None]:
    """Remove the folder while data is written."""
    original = writer.HashedFile.sync

    def sync(self: writer.HashedFile) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        original(self)

    writer.HashedFile.sync = sync  # type: ignore[method-assign]
    try:
        yield
    finally:
        writer.HashedFile.sync = original  # type: ignore[method-assign]


@contextlib.contextmanager
def bad_manifest(_folder: Path) -> Iterator[None]:
    """Make writing the manifest fail, which only rank 0 writes."""
    original = directory.write_manifest

    def refuse(*_args: Any) -> None:
        raise OSError(5, "Input/output error", "manifest.json")

    directory.write_manifest = refuse
    try:
        yield
    finally:
        directory.write_manifest = original


@contextlib.contextmanager
def failing_fsync(_folder: Path) -> Iterator[None]:
    """Make every fsync fail after the data was written."""
    original = writer.HashedFile.sync

    def refuse(_file: writer.HashedFile) -> None:
        raise OSError(5, "Input/output error", "a file")

    writer.HashedFile.sync = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        writer.HashedFile.sync = original  # type: ignore[method-assign]


TROUBLES = {
    "full disk": full_disk,
    "vanishing folder": vanishing_folder,
    "manifest": bad_manifest,
    "fsync": failing_fsync,
}


def fails_to_save(
    rank: int, world_size: int, trouble: str, only_rank: int | None, folder: str, asynchronous: bool
) -> str:
    """Job: a save that fails is an error, and training goes on as if it had not been called."""
    live = build("stage1").train(3)
    # The group for checkpoints is made by the first: its store is a file too, and must not meet the full disk.
    save_checkpoint(Path(folder) / "first", live.model, live.optimizer, step=3)
    if rank == 0:
        shutil.rmtree(Path(folder) / "first")
    before = whole_state(live)
    inside = contextlib.nullcontext() if only_rank not in (None, rank) else TROUBLES[trouble](Path(folder))

    def save() -> None:
        if asynchronous:
            async_save_checkpoint(Path(folder) / "new", live.model, live.optimizer, step=3).wait()
        else:
            save_checkpoint(Path(folder) / "new", live.model, live.optimizer, step=3)

    with inside, pytest.raises(RuntimeError, match="dist_asgd") as caught:
        save()
    assert not isinstance(caught.value, PeerError)
    assert not Path(folder).exists() or not os.listdir(folder)
    assert_same_state(live, before)
    assert_same_state(live.train(1), whole_state(build("stage1").train(4)))
    Path(folder).mkdir(exist_ok=True)
    if world_size > 1:
        dist.barrier()
    # The next save is not hindered by leftovers.
    save_checkpoint(Path(folder) / "new", live.model, live.optimizer, step=4)
    load_checkpoint(Path(folder) / "new", live.model, live.optimizer)
    return str(caught.value)


CASES = [(trouble, 2, only_rank) for trouble in TROUBLES for only_rank in (None, 0, 1)]
CASES = [case for case in CASES if case != ("manifest", 2, 1)]  # which rank 1 does not write
CASES += [(trouble, 1, None) for trouble in TROUBLES]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "async"])
@pytest.mark.parametrize(("trouble", "world_size", "only_rank"), CASES)
def test_a_save_that_fails_raises_the_same_everywhere(
    trouble: str, world_size: int, only_rank: int | None, asynchronous: bool, tmp_path: Path
) -> None:
    """A failed save raises on every rank, leaves no files, and does not change training."""
    backend = "none" if world_size == 1 else "gloo"
    folder = tmp_path / "folder"
    folder.mkdir()
    messages = run(backend, world_size, fails_to_save, trouble, only_rank, str(folder), asynchronous)
    assert len(set(messages)) == 1
    assert os.listdir(folder) == ["new"]
    if trouble == "vanishing folder":
        assert "The folder has vanished, or not all ranks share it" in " ".join(messages[0].split())
    if only_rank == 1 and trouble in ("full disk", "fsync"):
        assert "rank 1 of 2" in messages[0]


def saves_to(_rank: int, _world_size: int, path: str) -> None:
    """Job: save to ``path``."""
    live = build("stage1").train(1)
    save_checkpoint(path, live.model, live.optimizer, step=1)


def test_a_save_removes_what_crashed_saves_to_the_same_path_left(tmp_path: Path) -> None:
    """A save removes the leftovers of its own path, and nothing that another job may be writing."""
    for name in (".new.tmp-0123456789ab", ".new.old-0123456789ab", ".other.tmp-0123456789ab", ".new.tmp-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_text("half")
    live = build("single").train(1)
    save_checkpoint(tmp_path / "new", live.model, live.optimizer, step=1)
    assert sorted(os.listdir(tmp_path)) == [".new.tmp-mine", ".other.tmp-0123456789ab", "new"]


PATHS: dict[str, tuple[str, str]] = {
    "a file": ("file", "is a file"),
    "below a file": ("file/new", "is not a folder"),
    "a directory": ("directory", "already exists"),
    "a missing folder": ("missing/new", "is not a folder"),
    "a folder that takes nothing": ("/proc/new", "cannot write the checkpoint"),
}


@worlds
@pytest.mark.parametrize("kind", PATHS)
def test_paths_that_cannot_be(backend: str, world_size: int, kind: str, tmp_path: Path) -> None:
    """A path that is taken or has no parent is the same error on every rank, with a remedy, and nothing is changed."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "mine").write_text("mine")
    where, expected = PATHS[kind]
    for error in run_errors(backend, world_size, saves_to, str(tmp_path / where)):
        assert expected in error.message
        assert error.type_name in ("ValueError", "RuntimeError")
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "directory" / "mine").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
@worlds
def test_a_read_only_folder(backend: str, world_size: int, tmp_path: Path) -> None:
    """A read-only folder is an error on every rank."""
    tmp_path.chmod(0o500)
    for error in run_errors(backend, world_size, saves_to, str(tmp_path / "new")):
        assert "Permission denied" in error.message


def disagrees(rank: int, _world_size: int, folder: str, what: str) -> None:
    """Job: ranks pass different arguments."""
    live = build("stage1").train(1)
    path, step = f"{folder}/new", 1
    if what == "path" and rank:
        path += "2"
    if what == "step" and rank:
        step = 2
    if what == "call" and rank:
        live.optimizer.step()
    save_checkpoint(path, live.model, live.optimizer, step=step)


@pytest.mark.parametrize("what", ["path", "step", "call"])
def test_ranks_that_disagree_raise_at_once(what: str, tmp_path: Path) -> None:
    """Ranks that disagree raise an error instead of waiting for each other."""
    for error in run_errors("gloo", 2, disagrees, str(tmp_path), what, within_s=5):
        assert "rank" in error.message
    assert not os.listdir(tmp_path)


def fails_to_load(rank: int, _world_size: int, folder: str, only_rank: int) -> str:
    """Job: one rank cannot read the checkpoint, and no rank loads it."""
    live = build("stage2").train(3)
    path = Path(folder) / "new"
    save_checkpoint(path, live.model, live.optimizer, step=3)
    live.train(2)
    before = whole_state(live)
    kept = reader.hash_of
    if rank == only_rank:
        reader.hash_of = lambda data: "0" * 32 if len(data) < 3000 else kept(data)
    try:
        with pytest.raises(RuntimeError, match="damaged") as caught:
            load_checkpoint(path, live.model, live.optimizer)
    finally:
        reader.hash_of = kept
    assert_same_state(live, before)
    load_checkpoint(path, live.model, live.optimizer)
    return str(caught.value)


@pytest.mark.parametrize("only_rank", [0, 1])
def test_a_load_that_fails_on_one_rank_changes_nothing_on_any(only_rank: int, tmp_path: Path) -> None:
    """A load changes all ranks or none."""
    messages = run("gloo", 2, fails_to_load, str(tmp_path), only_rank)
    assert messages[0] == messages[1]
    assert f"rank {only_rank} of 2" in messages[0]


# --- in the background ---------------------------------------------------------------------------------------


def slow_writes(seconds: float) -> Callable[[], None]:
    """Slow every file down; returns a function that undoes it."""
    original = writer.HashedFile.sync

    def sync(self: writer.HashedFile) -> None:
        time.sleep(seconds)
        original(self)

    writer.HashedFile.sync = sync  # type: ignore[method-assign]
    return lambda: setattr(writer.HashedFile, "sync", original)


def goes_on(_rank: int, _world_size: int, folder: str) -> None:
    """Job: steps during a save change nothing in it; a second save waits or is refused, and both are complete."""
    live = build("stage1").train(3)
    expected = whole_state(live)
    undo = slow_writes(0.3)
    first = async_save_checkpoint(f"{folder}/1", live.model, live.optimizer, step=3)
    assert not first.done()
    live.train(2)
    assert not first.done()
    with pytest.raises(RuntimeError, match="still being written"):
        async_save_checkpoint(f"{folder}/2", live.model, live.optimizer, step=5, when_busy="refuse")
    assert not Path(f"{folder}/2").exists()
    second = async_save_checkpoint(f"{folder}/2", live.model, live.optimizer, step=5)
    assert first.done()
    latest = whole_state(live)
    live.train(1)
    second.wait()
    undo()
    other = build("stage2", seed=7)
    load_checkpoint(f"{folder}/1", other.model, other.optimizer)
    assert_same_state(other, expected)
    load_checkpoint(f"{folder}/2", other.model, other.optimizer)
    assert_same_state(other, latest)


@worlds
def test_training_goes_on_while_a_checkpoint_is_written(backend: str, world_size: int, tmp_path: Path) -> None:
    """Steps during a save do not change the staged state."""
    run(backend, world_size, goes_on, str(tmp_path))


def saved_in_the_background() -> tuple[PendingSave, weakref.ref[Tensor]]:
    """Return a finished save of one process, and a weak reference to a tensor that it wrote."""
    live = build("single").train(1)
    with tempfile.TemporaryDirectory() as folder:
        pending = async_save_checkpoint(f"{folder}/1", live.model, live.optimizer, step=1)
        staged = next(iter(Saver.of(live.optimizer)._staging._buffers.values())).local
        pending.wait()
        return pending, weakref.ref(staged)


def test_a_finished_save_holds_on_to_nothing() -> None:
    """A finished save frees its state, although its handle lives until the next save."""
    pending, staged = saved_in_the_background()
    gc.collect()
    assert staged() is None
    assert pending.done()


def saves_in_inference_mode(_rank: int, _world_size: int, folder: str, topology: str) -> None:
    """Job: save inside inference mode, in the foreground and the background, and then outside of it."""
    live = build(topology, "mlp").train(2)
    with torch.inference_mode():
        save_checkpoint(f"{folder}/1", live.model, live.optimizer, step=2)
        async_save_checkpoint(f"{folder}/2", live.model, live.optimizer, step=2).wait()
    async_save_checkpoint(f"{folder}/3", live.model, live.optimizer, step=2).wait()
    expected = whole_state(live)
    for number in (1, 2, 3):
        other = build(topology, "mlp", seed=7)
        load_checkpoint(f"{folder}/{number}", other.model, other.optimizer)
        assert_same_state(other, expected)
    live.train(1)


@pytest.mark.parametrize("topology", ["stage2", "fsdp2"])
def test_saving_works_in_inference_mode(tmp_path: Path, topology: str) -> None:
    """Saving works in inference mode, where DTensors cannot be detached and new tensors cannot be written to later."""
    run("gloo", 2, saves_in_inference_mode, str(tmp_path), topology)


def fails_later(rank: int, _world_size: int, folder: str, next_call: str) -> None:
    """Job: the error of a save in the background is raised by the next call, once."""
    live = build("stage1").train(2)
    save_checkpoint(f"{folder}/good", live.model, live.optimizer, step=2)
    with full_disk(Path(folder)) if rank == 0 else contextlib.nullcontext():
        pending = async_save_checkpoint(f"{folder}/bad", live.model, live.optimizer, step=2)
        while not pending.done():
            time.sleep(0.01)
    call = {
        "save": lambda: save_checkpoint(f"{folder}/next", live.model, live.optimizer, step=2),
        "async": lambda: async_save_checkpoint(f"{folder}/next", live.model, live.optimizer, step=2).wait(),
        "load": lambda: load_checkpoint(f"{folder}/good", live.model, live.optimizer),
    }[next_call]
    with pytest.raises(RuntimeError, match="File too large"):
        call()
    call()


@worlds
@pytest.mark.parametrize("next_call", ["save", "async", "load"])
def test_a_failure_in_the_background_surfaces_at_the_next_call(
    backend: str, world_size: int, next_call: str, tmp_path: Path
) -> None:
    """Every rank raises the error of a save in the background, and can save again afterwards."""
    run(backend, world_size, fails_later, str(tmp_path), next_call)


AT_EXIT = """
import resource, sys
from dist_asgd import async_save_checkpoint
from tests.harness.topologies import build
live = build("single").train(1)
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
async_save_checkpoint(sys.argv[1], live.model, live.optimizer, step=1)
"""


@pytest.mark.parametrize("disk", ["full", "empty"])
def test_exit_waits_for_the_last_save_and_says_if_it_failed(disk: str, tmp_path: Path) -> None:
    """An error that no call has raised is printed at exit."""
    command = [sys.executable, "-c", AT_EXIT, str(tmp_path / "new"), disk]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    if disk == "full":
        assert "File too large" in ended.stderr
        assert not os.listdir(tmp_path)
    else:
        assert "File too large" not in ended.stderr
        live = build("single", seed=7)
        load_checkpoint(tmp_path / "new", live.model, live.optimizer)


# --- the manager -----------------------------------------------------------------------------------------------


def manages(rank: int, _world_size: int, folder: str) -> None:
    """Job: names, retention, latest, restoring, refusals."""
    live = build("stage1")
    with CheckpointManager(folder, keep=2) as manager:
        assert manager.restore(live.model, live.optimizer) is None
        assert manager.latest() is None
        states = {}
        for step in (1, 2, 3, 12):
            live.train(1)
            states[step] = whole_state(live)
            if step % 2:
                assert manager.save(live.model, live.optimizer, step=step) == manager.path_of(step)
            else:
                manager.async_save(live.model, live.optimizer, step=step, extra={"at": (step, rank)})
        manager.wait()
        assert manager.steps() == [3, 12]
        assert manager.latest() == Path(folder) / "step-00000012"
        assert os.readlink(Path(folder) / "latest") == "step-00000012"
        assert sorted(os.listdir(folder)) == ["latest", "step-00000003", "step-00000012"]
        other = build("stage2", seed=7)
        restored = manager.restore(other.model, other.optimizer)
        assert restored is not None
        assert (restored.step, restored.extra) == (12, {"at": (12, rank)})
        assert_same_state(other, states[12])
        restored = manager.restore(other.model, other.optimizer, step=3)
        assert restored is not None
        assert restored.step == 3
        assert_same_state(other, states[3])
        for step in (12, 4):
            with pytest.raises(ValueError, match="later or the same step"):
                manager.save(live.model, live.optimizer, step=step)
        with pytest.raises(RuntimeError, match="there is no checkpoint"):
            manager.restore(other.model, other.optimizer, step=4)
    if rank == 0:
        shutil.rmtree(folder)
    if dist.is_initialized():
        dist.barrier()
    with pytest.raises(ValueError, match="has vanished"):
        manager.save(live.model, live.optimizer, step=13)


def test_manager_keeps_the_newest(tmp_path: Path) -> None:
    """The manager names, keeps and restores checkpoints, and removes only those that a newer one on disk supersedes."""
    run("gloo", 2, manages, str(tmp_path / "made" / "by it"))


def test_manager_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    """Wrong arguments of the manager are an error at construction."""
    with pytest.raises(ValueError, match="keep must be a number from 1 on"):
        CheckpointManager(tmp_path, keep=0)
    with pytest.raises(ValueError, match="when_busy"):
        CheckpointManager(tmp_path, when_busy="hope")  # type: ignore[arg-type]


# --- crashes ---------------------------------------------------------------------------------------------------


def test_every_moment_of_a_save_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each system call the folder's latest checkpoint loads, with the old state or the new one."""
    folder, moments = tmp_path / "live", tmp_path / "moments"
    live = build("single")
    manager = CheckpointManager(folder, keep=1)
    states = {}
    for step in (1, 2):
        states[step] = whole_state(live.train(1))
        manager.save(live.model, live.optimizer, step=step)
    number, last = 0, None

    def snapshot() -> None:
        nonlocal number, last
        # Files that only grew a little make no new moment.
        seen = sorted((str(p), p.lstat().st_size >> 14) for p in folder.rglob("*"))
        if seen != last:
            shutil.copytree(folder, moments / str(number), symlinks=True)
            number, last = number + 1, seen

    def watched(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            snapshot()
            result = original(*args, **options)
            snapshot()
            return result

        monkeypatch.setattr(owner, name, call)

    states[3] = whole_state(live.train(1))
    monkeypatch.setattr(writer, "_BUFFER_BYTES", 1 << 12)
    for owner, name in (
        (directory.os, "fsync"),
        (directory.os, "unlink"),
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "symlink_to"),
        (Path, "open"),
        (writer.HashedFile, "write"),
    ):
        watched(owner, name)
    manager.save(live.model, live.optimizer, step=3)
    monkeypatch.undo()
    seen = []
    for moment in map(str, range(number)):
        found = CheckpointManager(moments / moment, keep=1)
        other = build("single", seed=7)
        restored = found.restore(other.model, other.optimizer)
        assert restored is not None
        seen.append(restored.step)
        assert_same_state(other, states[restored.step])
        # The next save removes the leftovers.
        found.save(other.model, other.optimizer, step=4)
        assert sorted(os.listdir(moments / moment)) == ["latest", "step-00000004"]
    assert seen == sorted(seen)
    assert set(seen) == {2, 3}
    assert number > 15


def saves_until_killed(rank: int, world_size: int, store: str, folder: str, told: Any) -> None:
    """Run one rank: go on from the last checkpoint, and save at every step, blocking and in the background."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=timedelta(seconds=20)
    )
    live = build("stage2")
    manager = CheckpointManager(folder, keep=2)
    restored = manager.restore(live.model, live.optimizer)
    live.num_steps = restored.step if restored else 0
    told.send(live.num_steps)
    while True:
        live.train(1)
        if live.num_steps % 2:
            manager.save(live.model, live.optimizer, step=live.num_steps)
        else:
            manager.async_save(live.model, live.optimizer, step=live.num_steps).wait()
        told.send(live.num_steps)


@pytest.mark.parametrize("victims", ["all ranks", "one rank"])
def test_kills_at_random_moments_lose_nothing(victims: str, tmp_path: Path) -> None:
    """After SIGKILL of real ranks every checkpoint that was reported as saved is whole and has the trained state."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "pytest", "hypothesis"])
    draw = random.Random(victims)
    oracle = build("single")
    for trial in range(NUM_KILLS // 2):
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        ranks = [
            context.Process(
                target=saves_until_killed,
                args=(rank, 2, str(tmp_path / f"store{trial}"), str(tmp_path / "c"), pipes[rank][1]),
                daemon=True,
            )
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        assert pipes[0][0].poll(60)
        first = reported = pipes[0][0].recv()
        assert oracle.num_steps <= first
        deadline = time.monotonic() + draw.uniform(0.0, 0.25)
        while time.monotonic() < deadline:
            if pipes[0][0].poll(max(0.0, deadline - time.monotonic())):
                reported = pipes[0][0].recv()
        chosen = ranks if victims == "all ranks" else [draw.choice(ranks)]
        for process in chosen:
            os.kill(process.pid or 0, signal.SIGKILL)
        for process in ranks:
            process.join(15)  # the survivor sees its peer gone, and ends with PeerError
            assert process.exitcode is not None
        while pipes[0][0].poll():
            with contextlib.suppress(EOFError):
                reported = pipes[0][0].recv()
                continue
            break
        manager = CheckpointManager(tmp_path / "c", keep=2)
        other = build("single", seed=7)
        restored = manager.restore(other.model, other.optimizer)
        step = restored.step if restored else 0
        assert step >= reported
        oracle.train(step - oracle.num_steps)
        if restored:
            assert_same_state(Run("single", other.model, other.optimizer, step), whole_state(oracle))
