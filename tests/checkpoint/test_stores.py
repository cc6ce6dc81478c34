"""Checkpoints and exports in object stores: in memory, and in an S3 server that runs beside the tests."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from fsspec.implementations.memory import MemoryFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from typer.testing import CliRunner
from upath import UPath

from dist_asgd import (
    CheckpointManager,
    async_save_checkpoint,
    export_averaged,
    load_checkpoint,
    read_extra,
    save_checkpoint,
)
from dist_asgd.checkpoint.format import locks, store_directory, stores
from dist_asgd.checkpoint.format.file_report import Described, FileReport
from dist_asgd.checkpoint.format.manifest import CheckpointError
from dist_asgd.checkpoint.format.paths import as_path
from dist_asgd.checkpoint.format.writer import WrittenFile
from dist_asgd.checkpoint.reader import CheckedReader
from dist_asgd.cli import app
from tests.harness.ranks import run, run_errors
from tests.harness.topologies import assert_same_state, build, whole_state


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """The store of ``memory://``, empty."""
    store: MemoryFileSystem = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    yield store
    store.store.clear()


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, Any]]:
    """The options with which s3fs reaches a server of this test's own, which has one bucket, named "bucket"."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    options = {
        "endpoint_url": f"http://{host}:{port}",
        "key": "key",
        "secret": "secret",
        "config_kwargs": {"retries": {"max_attempts": 1}},
    }
    fsspec.filesystem("s3", **options).mkdir("bucket")
    yield options
    started.stop()


def objects(path: UPath) -> list[str]:
    """The names of all objects below ``path``, relative to it."""
    path.fs.invalidate_cache()
    below = path.fs.find(path.path)
    return sorted(str(name).split(path.path.strip("/") + "/", 1)[1] for name in below)


# --- what a file system does, a store does ---------------------------------------------------------------------


def goes_round(_rank: int, _world_size: int, folder: UPath, topology: str, loads: str) -> None:
    """Job: save, load in another topology, load parts, manage and export."""
    live = build(topology).train(3)
    expected = whole_state(live)
    save_checkpoint(folder / "a", live.model, live.optimizer, step=3, extra={"rank": _rank})
    pending = async_save_checkpoint(folder / "b", live.model, live.optimizer, step=3)
    pending.wait()
    assert pending.path == folder / "b"
    for name in ("a", "b"):
        other = build(loads, seed=7)
        extra = load_checkpoint(folder / name, other.model, other.optimizer)
        assert extra == ({"rank": _rank} if name == "a" else None)
        assert_same_state(other, expected)
    assert read_extra(folder / "a", rank=_rank) == {"rank": _rank}
    with CheckpointManager(folder / "runs", keep=2) as manager:
        for step in (3, 4, 5):
            manager.async_save(live.model, live.optimizer, step=step, extra=step)
            expected = whole_state(live)
            live.train(step < 5)
    assert manager.steps() == [4, 5]
    assert manager.latest() == folder / "runs" / "step-00000005"
    other = build(loads, seed=7)
    restored = manager.restore(other.model, other.optimizer)
    assert restored is not None
    assert (restored.step, restored.extra) == (5, 5)
    assert_same_state(other, expected)


@pytest.mark.parametrize(
    ("world_size", "topology", "loads"),
    [(1, "single", "torch"), (2, "stage2", "fsdp2"), (2, "fsdp2-sharded", "stage1")],
)
def test_everything_works_in_s3(world_size: int, topology: str, loads: str, server: dict[str, Any]) -> None:
    """All functions, on real ranks, and nothing but whole checkpoints is left in the bucket."""
    folder = UPath(f"s3://bucket/{topology}", **server)
    run("gloo" if world_size > 1 else "none", world_size, goes_round, folder, topology, loads)
    names = objects(folder)
    assert {name.rpartition("/")[0] for name in names} == {"a", "b", "runs/step-00000004", "runs/step-00000005"}
    assert {name.rpartition("/")[2].partition("-")[0] for name in names} == {
        ".metadata",
        "chunks.index",
        "manifest.json",
        *(f"__{rank}_0" for rank in range(world_size)),
    }


@pytest.mark.parametrize("form", ["address", "UPath", "Path"])
def test_every_form_of_an_address_is_taken(form: str, memory: MemoryFileSystem, tmp_path: Path) -> None:
    """An address as text, as a UPath, and as the Path that somebody made of it, which has lost a slash."""
    live = build("single").train(3)

    def path(name: str) -> Any:
        text = f"memory://here/{name}"
        return {"address": text, "UPath": UPath(text), "Path": Path(text)}[form]

    with contextlib.chdir(tmp_path):
        save_checkpoint(path("a"), live.model, live.optimizer, step=3, extra="mine")
        other = build("single", seed=7)
        assert load_checkpoint(path("a"), other.model, other.optimizer) == "mine"
        assert_same_state(other, whole_state(live))
        export_averaged(path("out/model.safetensors"), live.model, live.optimizer)
        CheckpointManager(path("runs")).save(live.model, live.optimizer, step=3)
        assert read_extra(path("a")) == "mine"
    assert not list(tmp_path.iterdir())
    assert {name.split("/")[2] for name in memory.find("/")} == {"a", "out", "runs"}


def test_the_commands_take_addresses(memory: MemoryFileSystem, tmp_path: Path) -> None:
    """Every command reads from a store and writes into one; results are those of a file system, to the byte."""
    live = build("single").train(3)
    save_checkpoint("memory://c/a", live.model, live.optimizer, step=3)
    save_checkpoint(tmp_path / "a", live.model, live.optimizer, step=3)
    for command in (
        ["inspect", "memory://c/a"],
        ["verify", "memory://c/a"],
        ["diff", "memory://c/a", str(tmp_path / "a")],
        ["export", "memory://c/a", "memory://c/out/x.safetensors"],
        ["export", str(tmp_path / "a"), str(tmp_path / "x.safetensors")],
        ["consolidate", "memory://c/a", "memory://c/out/x.pt"],
        ["consolidate", "memory://c/a", str(tmp_path / "x.pt")],
        ["export", "memory://c/a", "memory://c/shards/x.safetensors", "--max-shard-gb", "1e-6"],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, (command, result.output)
    for name in ("x.safetensors", "x.pt"):
        assert memory.cat_file(f"/c/out/{name}") == (tmp_path / name).read_bytes()
    shards = [name for name in memory.find("/c/shards") if "-of-" in name]
    whole = safetensors.torch.load((tmp_path / "x.safetensors").read_bytes())
    found = {k: v for name in shards for k, v in safetensors.torch.load(memory.cat_file(name)).items()}
    assert len(shards) > 1
    assert found.keys() == whole.keys()
    assert all(found[key].equal(whole[key]) for key in whole)
    taken = CliRunner().invoke(app, ["export", "memory://c/a", "memory://c/out/x.safetensors"])
    assert taken.exit_code == 1
    assert "exists" in taken.stderr
    # A single file takes the place of shards and their index.
    forced = CliRunner().invoke(app, ["export", "memory://c/a", "memory://c/shards/x.safetensors", "--force"])
    assert forced.exit_code == 0
    assert memory.find("/c/shards") == ["/c/shards/x.safetensors"]


def test_dcp_reads_what_is_in_a_store_and_is_read(server: dict[str, Any]) -> None:
    """torch's own fsspec reader loads a checkpoint of ours, and ours loads what its writer wrote."""
    live = build("single").train(3)
    folder = UPath("s3://bucket/dcp", **server)
    save_checkpoint(folder / "ours", live.model, live.optimizer, step=3)
    state = {"model": {key: torch.zeros_like(value) for key, value in live.model.state_dict().items()}}
    dcp.load(state, storage_reader=FsspecReader(str(folder / "ours"), **server), no_dist=True)
    assert all(state["model"][key].equal(value) for key, value in live.model.state_dict().items())

    dcp.save(state, storage_writer=FsspecWriter(str(folder / "theirs"), **server), no_dist=True)
    zeros = {"model": {key: torch.zeros_like(value) for key, value in live.model.state_dict().items()}}
    dcp.load(zeros, storage_reader=CheckedReader(folder / "theirs", verify=False), no_dist=True)
    assert all(zeros["model"][key].equal(value) for key, value in live.model.state_dict().items())


# --- errors ----------------------------------------------------------------------------------------------------


def saves_to(rank: int, _world_size: int, paths: list[UPath], call: str) -> None:
    """Job: use the path of this rank; model and optimizer stay as they are."""
    live = build("stage1").train(1)
    before = whole_state(live)
    path = paths[rank]
    try:
        if call == "save":
            save_checkpoint(path, live.model, live.optimizer, step=1)
        elif call == "load":
            load_checkpoint(path, live.model, live.optimizer)
        elif call == "restore":
            CheckpointManager(path).restore(live.model, live.optimizer)
        elif call == "async":
            async_save_checkpoint(path, live.model, live.optimizer, step=1).wait()
        else:
            export_averaged(path / "a.safetensors", live.model, live.optimizer)
    finally:
        assert_same_state(live, before)


@pytest.mark.parametrize("call", ["save", "async", "load", "restore", "export"])
def test_a_store_that_does_not_answer_is_an_error_on_all_ranks(call: str, server: dict[str, Any]) -> None:
    """All ranks name the store's own error, and no object is left."""
    path, dead = (UPath("s3://bucket/dead", **server | more) for more in ({}, {"endpoint_url": "http://127.0.0.1:9"}))
    paths = [dead, path] if call in ("restore", "export") else [path, dead]
    for error in run_errors("gloo", 2, saves_to, paths, call):
        assert "Could not connect" in error.message or "there is no checkpoint" in error.message
        assert "s3://bucket/dead" in error.message
        assert ("cannot write" in error.message) == (call in ("save", "async", "export"))
    assert not objects(path)


def test_a_bucket_that_is_not_there(server: dict[str, Any]) -> None:
    """The error says so on all ranks."""
    path = UPath("s3://nowhere/a", **server)
    for call in ("save", "export"):
        for error in run_errors("gloo", 2, saves_to, [path, path], call):
            assert "bucket does not exist" in error.message


def test_ranks_that_share_no_store(memory: MemoryFileSystem) -> None:
    """Every process has a memory of its own: the save notices, and says what is wrong."""
    path = UPath("memory://a")
    for error in run_errors("gloo", 2, saves_to, [path, path], "save"):
        assert "not all ranks write to the same store" in error.message
    assert not memory.find("/")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("nosuch://bucket/a", "no address that fsspec knows"),
        ("s3://bucket", "names a store and nothing in it"),
        ("simplecache::s3://bucket/a", "chain"),
        ("gdrive://a/b", "install gdrive_fs"),
    ],
)
def test_addresses_that_cannot_be_used(path: str, text: str, tmp_path: Path) -> None:
    """They are a ValueError before anything is done, and no local folder of that name is made."""
    live = build("single").train(1)
    with contextlib.chdir(tmp_path):
        for call in (
            lambda: save_checkpoint(path, live.model, live.optimizer, step=1),
            lambda: load_checkpoint(path, live.model, live.optimizer),
            lambda: CheckpointManager(path),
            lambda: export_averaged(f"{path}.safetensors", live.model, live.optimizer),
        ):
            with pytest.raises(ValueError, match=text):
                call()
    assert not list(tmp_path.iterdir())


def test_without_the_library_addresses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(ValueError, match=r"install 'dist_asgd\[stores\]'"):
        as_path("s3://bucket/a")


def test_a_checkpoint_is_not_overwritten(memory: MemoryFileSystem) -> None:
    """Nor is anything else at its path."""
    live = build("single").train(1)
    save_checkpoint("memory://a/b", live.model, live.optimizer, step=1)
    memory.pipe_file("/other/notes.txt", b"mine")
    before = {name: memory.cat_file(name) for name in memory.find("/")}
    for path, text in (("a/b", "already exists"), ("a", r"something already \(b\)"), ("other", "notes.txt")):
        with pytest.raises(ValueError, match=text):
            save_checkpoint(f"memory://{path}", live.model, live.optimizer, step=1)
    assert {name: memory.cat_file(name) for name in memory.find("/")} == before


def test_damage_and_wrong_paths_are_named(memory: MemoryFileSystem) -> None:
    """A flipped byte, an object that is gone, and the folder above are told apart."""
    live = build("single").train(1)
    CheckpointManager("memory://runs").save(live.model, live.optimizer, step=1)
    path = "memory://runs/step-00000001"
    with pytest.raises(RuntimeError, match=r"pass memory://runs/step-00000001"):
        load_checkpoint("memory://runs", live.model, live.optimizer)
    with pytest.raises(RuntimeError, match="In memory://runs there is step-00000001"):
        load_checkpoint("memory://runs/step-2", live.model, live.optimizer)
    name = next(name for name in memory.find("/runs") if name.endswith(".distcp"))
    good = memory.cat_file(name)
    memory.pipe_file(name, good[:200] + bytes([good[200] ^ 1]) + good[201:])
    with pytest.raises(RuntimeError, match="is damaged"):
        load_checkpoint(path, live.model, live.optimizer)
    memory.rm_file(name)
    with pytest.raises(RuntimeError, match="is missing"):
        load_checkpoint(path, live.model, live.optimizer)


# --- crashes and other writers ---------------------------------------------------------------------------------


class Crash(BaseException):
    """The process has died: nothing that it would do now reaches the store."""


@contextlib.contextmanager
def crash_at(moment: int) -> Iterator[Callable[[], int]]:
    """Let the process die at its call number ``moment`` of the store; yields a function that counts the calls."""
    count = 0
    originals = {name: getattr(MemoryFileSystem, name) for name in ("_open", "rm_file", "pipe_file", "mv")}

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > moment:
                raise Crash
            return original(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, original in originals.items():
            patch.setattr(MemoryFileSystem, name, dying(original))
        yield lambda: count


@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(
    keep: int, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latest checkpoint loads after a crash between any two calls of the store, and the next save cleans up."""
    live = build("single").train(1)
    states = {1: whole_state(live)}
    CheckpointManager("memory://runs", keep=keep).save(live.model, live.optimizer, step=1)
    good = {name: memory.cat_file(name) for name in memory.find("/")}
    states[2] = whole_state(live.train(1))
    outcomes = set()
    for moment in range(100):
        memory.store.clear()
        for name, data in good.items():
            memory.pipe_file(name, data)
        with crash_at(moment) as counted:
            with contextlib.suppress(Crash):
                CheckpointManager("memory://runs", keep=keep).save(live.model, live.optimizer, step=2)
            calls = counted()
        # The next process is another one.
        monkeypatch.setattr(store_directory, "living_owner", lambda _data: None)
        manager = CheckpointManager("memory://runs", keep=keep)
        other = build("single", seed=7)
        restored = manager.restore(other.model, other.optimizer)
        assert restored is not None
        assert_same_state(other, states[restored.step])
        outcomes.add(restored.step)
        manager.save(live.model, live.optimizer, step=3)
        whole = manager.steps()
        assert whole[-1] == 3
        assert len(whole) <= keep
        left = {name.split("/")[2] for name in memory.find("/runs")}
        assert left == {f"step-{step:08d}" for step in whole}
        assert not [name for name in memory.find("/runs") if name.endswith(".writer")]
        monkeypatch.undo()
        if calls <= moment:
            break
    else:
        pytest.fail("a save makes fewer calls than that")
    assert outcomes == {1, 2}


@pytest.mark.parametrize("what", ["alive", "another of its number", "ended", "elsewhere"])
def test_what_a_save_left_is_told_from_a_save_that_runs(
    what: str, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of this host that still runs is not disturbed; its number alone proves nothing."""
    live = build("single").train(1)
    first = store_directory.begin(as_path("memory://a"))  # type: ignore[arg-type]
    if what == "another of its number":
        monkeypatch.setattr(locks, "_start_of", lambda _pid: "another time")
    elif what == "ended":
        first.close()
    elif what == "elsewhere":
        monkeypatch.setattr(socket, "gethostname", lambda: "another-host")
    if what == "alive":
        with pytest.raises(ValueError, match="another save is writing memory://a at this moment"):
            save_checkpoint("memory://a", live.model, live.optimizer, step=1)
        assert [name.rpartition("/")[2] for name in memory.find("/a")] == [".writer"]
        return
    save_checkpoint("memory://a", live.model, live.optimizer, step=1)
    # The other learns of it, and removes nothing that is not its own.
    with pytest.raises(ValueError, match="another save"):
        first.finish(1, [FileReport.of(WrittenFile({}, "__0_0.distcp"))], Described(b"metadata", b"index"), "rank 0")
    first.discard()
    first.close()
    other = build("single", seed=7)
    load_checkpoint("memory://a", other.model, other.optimizer)
    assert_same_state(other, whole_state(live))


def test_a_save_that_was_taken_for_crashed_at_its_very_end_fails(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are gone when its manifest is there: it fails, and leaves the path to the other save."""
    live = build("single").train(1)
    late = store_directory.StoreDirectory.put_in_place

    def put_in_place(self: store_directory.StoreDirectory) -> None:
        monkeypatch.setattr(store_directory.StoreDirectory, "put_in_place", late)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(socket, "gethostname", lambda: "another-host")
            others.append(store_directory.begin(self.path))
        late(self)

    others: list[store_directory.StoreDirectory] = []
    monkeypatch.setattr(store_directory.StoreDirectory, "put_in_place", put_in_place)
    with pytest.raises(RuntimeError, match="Another save to this path has removed it"):
        save_checkpoint("memory://a", live.model, live.optimizer, step=1)
    assert [name.rpartition("/")[2] for name in memory.find("/a")] == [".writer"]
    others[0].close()
    save_checkpoint("memory://a", live.model, live.optimizer, step=1)
    assert load_checkpoint("memory://a", live.model, live.optimizer) is None


def test_an_answer_that_is_lost_is_no_error(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's library tries again, and is refused because of its own first try."""
    original = stores.put

    def put(path: UPath, data: bytes) -> None:
        original(path, data)
        original(path, data)

    monkeypatch.setattr(stores, "put", put)
    live = build("single").train(1)
    save_checkpoint("memory://a", live.model, live.optimizer, step=1)
    assert load_checkpoint("memory://a", live.model, live.optimizer) is None
    assert len(memory.find("/a")) == 4


def test_a_failed_save_leaves_nothing(memory: MemoryFileSystem) -> None:
    """Neither does an error at the very end, and the next save works."""
    live = build("single").train(1)
    for name in (".distcp", "chunks.index", ".metadata", "manifest.json"):
        with pytest.MonkeyPatch.context() as patch:
            opened = MemoryFileSystem._open

            def refuse(self: Any, path: str, mode: str, _open: Any = opened, _name: str = name, **options: Any) -> Any:
                if path.endswith(_name) and mode != "rb":
                    raise OSError("the store is full")
                return _open(self, path, mode, **options)

            patch.setattr(MemoryFileSystem, "_open", refuse)
            with pytest.raises(RuntimeError, match="the store is full"):
                save_checkpoint("memory://a", live.model, live.optimizer, step=1)
        assert not memory.find("/a"), name
    save_checkpoint("memory://a", live.model, live.optimizer, step=1)


def test_damaged_checkpoints_are_moved_aside_in_s3(server: dict[str, Any]) -> None:
    """With everything below them; what lies under their new names already stays, and the next save goes on."""
    folder = UPath("s3://bucket/fallback", **server)
    live = build("single").train(1)
    manager = CheckpointManager(folder, keep=None)
    for step in (1, 2, 3):
        manager.save(live.model, live.optimizer, step=step, extra=step)
    (folder / "step-00000003/notes/why.txt").write_text("mine")
    (folder / "damaged-step-00000002/notes.txt").write_text("mine")
    for step in (2, 3):
        (folder / f"step-0000000{step}/.metadata").write_bytes(b"damaged")
    restored = manager.restore(live.model, live.optimizer, fallback=True)
    assert restored is not None
    assert restored.extra == 1
    manager.save(live.model, live.optimizer, step=2)
    assert manager.steps() == [1, 2]
    found = objects(folder)
    assert {name.partition("/")[0] for name in found} == {
        *(f"step-0000000{step}" for step in (1, 2)),
        *(f"damaged-step-0000000{name}" for name in ("2", "2-2", "3")),
    }
    assert [name for name in found if name.startswith("damaged-step-00000002/")] == ["damaged-step-00000002/notes.txt"]
    assert "damaged-step-00000003/notes/why.txt" in found
    assert manager.restore(live.model, live.optimizer) is not None


@pytest.mark.usefixtures("memory")
def test_a_store_that_is_down_is_not_taken_for_damage() -> None:
    """``fallback=True`` passes over damaged checkpoints only; the newest one loads when the store is back."""
    live = build("single").train(1)
    manager = CheckpointManager("memory://runs")
    manager.save(live.model, live.optimizer, step=1)
    manager.save(live.model, live.optimizer, step=2)
    opened = MemoryFileSystem._open

    def refuse(self: Any, path: str, mode: str, **options: Any) -> Any:
        if "step-00000002" in path:
            raise ConnectionError("no route to the store")
        return opened(self, path, mode, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "_open", refuse)
        with pytest.raises(RuntimeError, match="no route to the store") as caught:
            manager.restore(live.model, live.optimizer, fallback=True)
        assert not isinstance(caught.value, CheckpointError)
        result = CliRunner().invoke(app, ["verify", "memory://runs/step-00000002"])
        assert result.exit_code == 1
        assert "no route to the store" in result.stderr
        assert "damaged" not in result.stderr
    restored = manager.restore(live.model, live.optimizer, fallback=True)
    assert restored is not None
    assert (restored.step, restored.skipped) == (2, ())


def test_removing_a_checkpoint_of_many_ranks_takes_few_turns(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests go side by side: the manifest is gone before them, and the owner file stays until after them."""
    path = as_path("memory://a")
    for rank in range(64):
        memory.pipe_file(f"/a/__{rank}_0-0123456789ab.distcp", b"x")
    memory.pipe_file("/a/manifest.json", b"x")
    order: list[str] = []
    together = threading.Barrier(8)
    original = MemoryFileSystem.rm_file

    def rm_file(self: Any, name: str) -> None:
        if name.endswith(".distcp"):
            # Passes only if eight are under way at a time.
            together.wait(timeout=10)
        order.append(name.rpartition("/")[2])
        original(self, name)

    monkeypatch.setattr(MemoryFileSystem, "rm_file", rm_file)
    store_directory.remove(path)  # type: ignore[arg-type]
    assert (order[0], order[-1]) == ("manifest.json", ".writer")
    assert not memory.find("/a")


def test_a_huge_owner_file_is_not_read_whole(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can write to the store cannot fill this rank's memory by it."""
    memory.pipe_file("/a/.writer", b"x" * (1 << 20))
    read: list[int] = []
    original = MemoryFileSystem.cat_file

    def cat_file(self: Any, name: str, start: Any = None, end: Any = None, **options: Any) -> Any:
        found = original(self, name, start=start, end=end, **options)
        read.append(len(found))
        return found

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    live = build("single").train(1)
    save_checkpoint("memory://a", live.model, live.optimizer, step=1)
    assert max(read) <= 1 << 16
