"""``python -m benchmarks.checkpoint_scale``: what a checkpoint of a large model on many ranks costs beside its data.

A Llama of 7B parameters is laid out on 1,024 ranks, as ``ShardedASGD`` would lay it out, and no data is made: the data
files are sparse, of the right size. Three ranks are then played, each in a process of its own, with the package's own
functions.

save         rank 0 takes what all ranks report, and makes ``.metadata``, the index and ``manifest.json``
load, first  rank 0 reads and checks the index and the manifest, and finds the chunks of its own fragments
load, other  any other rank does what it has to do before it reads data: it finds the chunks of its fragments

Time is of the processor, in one thread. Memory is the peak above what the process held before (``VmHWM``). What travels
between ranks is counted in bytes, and not timed.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan

from benchmarks.report import markdown_table, surroundings
from dist_asgd.checkpoint.format.chunk_table import ChunkTable
from dist_asgd.checkpoint.format.file_report import described, packed, unpacked
from dist_asgd.checkpoint.format.index import INDEX_NAME
from dist_asgd.checkpoint.format.manifest import Chunk, FileEntry, Manifest, checked_bytes, hash_of
from dist_asgd.checkpoint.format.metadata import METADATA_NAME
from dist_asgd.checkpoint.format.reader import CheckedReader, OpenCheckpoint
from dist_asgd.checkpoint.format.writer import Row, WrittenFile
from dist_asgd.checkpoint.rows import row_range
from dist_asgd.placements.shard_tensor import ShardTensor, row_major_regions
from dist_asgd.state_dict.whole_tensors import MAX_STAGING_BYTES
from dist_asgd.storage.layout import MIN_BUCKETS, BucketLayout, bucket_cap_bytes, fill_buckets, lay_out

MIB = 1 << 20
STEP = 1000
# What torch.save writes around the elements of a tensor, about.
FRAME_BYTES = 1200
SCALARS = ("step", "eta", "mu")
OPTIONS = ("lr", "lambd", "alpha", "t0", "weight_decay", "foreach", "maximize", "differentiable", "capturable")
_SENT = "sent"
# The rank that plays "load, other": neither the first nor the last, whose shards may be shorter, nor the one in the
# middle, whose shards may begin with rows.
OTHER = 0.49


def llama(hidden: int, ffn: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a Llama by name, in the order of its modules; key and value have as many heads as the query."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


MODEL = llama(4096, 11008, 32, 32000)
_POSITIONS = {name: position for position, name in enumerate(MODEL)}


def _name_of(key: str) -> str:
    """The name of the parameter in the key of a weight, or of an average."""
    return key.removeprefix("model.") if key.startswith("model.") else key[len("optim.state.") : -len(".ax")]


@dataclass
class Layout:
    """Where the fragments of all ranks lie: the buckets, each with the names of its parameters."""

    world_size: int
    buckets: list[tuple[list[str], BucketLayout]] = field(default_factory=list)

    @classmethod
    def of(cls, world_size: int, cap_mib: float) -> Layout:
        names = list(MODEL)[::-1]
        numels = [math.prod(MODEL[name]) for name in names]
        cap = bucket_cap_bytes(cap_mib, 2 * sum(numels), MIN_BUCKETS[2], world_size)
        chosen = fill_buckets(numels, 2, cap)
        return cls(
            world_size, [([names[i] for i in b], lay_out([numels[i] for i in b], 2, world_size)) for b in chosen]
        )

    def fragments(self, rank: int) -> Iterator[tuple[str, int, int]]:
        """The name, start and number of elements of every fragment of ``rank``."""
        for name, start, stop, _ in self._fragments(rank):
            yield name, start, stop - start

    def saved_rows(self, rank: int) -> Iterator[tuple[str, int, int]]:
        """The name, start and stop of what ``rank`` saves of each parameter: rows of which its shard has a part."""
        for name, start, stop, shard_numel in self._fragments(rank):
            yield name, *row_range(start, stop, MODEL[name], shard_numel, 2, _POSITIONS[name] % 2 == 0)

    def _fragments(self, rank: int) -> Iterator[tuple[str, int, int, int]]:
        for names, layout in self.buckets:
            for name, slot in zip(names, layout.slots, strict=True):
                fragment = layout.fragment(slot, rank)
                if fragment.numel:
                    start = fragment.param_start
                    yield name, start, start + fragment.numel, layout.shard_numel

    def num_gathers(self) -> int:
        """How many collectives bring the float32 averages of all buckets to rank 0, if the backend is NCCL."""
        width = max(1, MAX_STAGING_BYTES // (self.world_size * torch.float32.itemsize))
        return sum(-(-layout.shard_numel // width) for _, layout in self.buckets)

    def written(self, rank: int) -> WrittenFile:
        """What ``rank`` reports of its file: bfloat16 parameters, a float32 ``ax``, and on rank 0 the values of all."""
        rows, chunks, offset = list[Row](), list[Chunk](), 0
        draw = random.Random(rank)

        def add(length: int) -> int:
            nonlocal offset
            chunks.append(Chunk(offset, length, f"{draw.getrandbits(128):032x}"))
            offset += length
            return len(chunks) - 1

        ranges = [(f"model.{n}", torch.bfloat16, start, stop) for n, start, stop in self.saved_rows(rank)]
        ranges += [(f"optim.state.{n}.ax", torch.float32, start, start + k) for n, start, k in self.fragments(rank)]
        for key, dtype, start, stop in ranges:
            shape = MODEL[_name_of(key)]
            for offsets, sizes in row_major_regions(start, stop, shape):
                chunk = add(math.prod(sizes) * dtype.itemsize + FRAME_BYTES)
                rows.append(Row(key, chunk, dtype, shape, offsets, sizes))
        if not rank:
            values = {value: add(FRAME_BYTES) for value in (*SCALARS, *OPTIONS)}
            for name in MODEL:
                rows += [Row(f"optim.state.{name}.{key}", values[key], torch.float32) for key in SCALARS]
                rows += [Row(f"optim.param_groups.{name}.{key}", values[key]) for key in OPTIONS]
        paths: dict[str, tuple[str | int, ...]] = {}
        if not rank:
            keys = [f"state.{name}.{key}" for name in MODEL for key in (*SCALARS, "ax")]
            keys += [f"param_groups.{name}.{key}" for name in MODEL for key in OPTIONS]
            paths |= {f"model.{name}": ("model", name) for name in MODEL}
            paths |= {f"optim.{key}": ("optim", key) for key in keys}
        return WrittenFile(paths, f"__{rank}_0.distcp", FileEntry(offset, f"{rank:032x}"), chunks, rows)

    def targets(self, rank: int) -> dict[str, ShardTensor]:
        """The fragments that ``rank`` loads, in memory of their own."""
        found = {}
        for name, start, numel in self.fragments(rank):
            strides = torch.empty(MODEL[name], device="meta").stride()
            for key, dtype in ((f"model.{name}", torch.bfloat16), (f"optim.state.{name}.ax", torch.float32)):
                local = torch.empty(numel, dtype=dtype)
                found[key] = ShardTensor(local, MODEL[name], strides, start)
        return found


# --- the ranks that are played ---------------------------------------------------------------------------


@contextmanager
def measured(result: dict[str, Any], what: str) -> Iterator[None]:
    """Add seconds of the processor, and the peak of memory in bytes, to ``result``."""
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _status("VmRSS"), time.process_time()
    yield
    result[f"{what}_seconds"] = time.process_time() - start
    result[f"{what}_bytes"] = _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def save(layout: Layout, folder: Path) -> dict[str, Any]:
    """Play rank 0 in a save, and leave the checkpoint in ``folder``."""
    gathered = [packed(layout.written(rank)) for rank in range(layout.world_size)]
    result: dict[str, Any] = {"gathered_bytes": sum(map(len, gathered[1:]))}
    with measured(result, "save"):
        reports = unpacked(gathered)
        found = described(folder, reports)
        entries = {report.name: report.file for report in reports if report.file is not None}
        for name, data in ((METADATA_NAME, found.metadata), (INDEX_NAME, found.index)):
            entries[name] = FileEntry(len(data), hash_of(data))
        manifest = checked_bytes(folder, Manifest(STEP, layout.world_size, entries))
    (folder / METADATA_NAME).write_bytes(found.metadata)
    (folder / INDEX_NAME).write_bytes(found.index)
    (folder / "manifest.json").write_bytes(manifest)
    for report in reports:
        with (folder / report.name).open("wb") as sparse:
            sparse.truncate(report.file.bytes if report.file else 0)
    sizes = {"metadata": len(found.metadata), "index": len(found.index), "manifest": len(manifest)}
    num_chunks = sum(len(report.rows) for report in reports)
    return {**result, "chunks": num_chunks, **{f"{name}_bytes": size for name, size in sizes.items()}}


def _find(opened: OpenCheckpoint, layout: Layout, rank: int) -> LoadPlan:
    """Find the chunks of the fragments of ``rank``."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    return CheckedReader.of(opened).plan(layout.targets(rank), planner)


def load_first(layout: Layout, folder: Path) -> dict[str, Any]:
    """Play rank 0 in a load, and leave in ``folder`` what it sends to the others."""
    result: dict[str, Any] = {}
    with measured(result, "first"):
        packed = OpenCheckpoint(folder).table().pack()
        _find(OpenCheckpoint.of_table(folder, ChunkTable.unpack(packed)), layout, 0)
    (folder / _SENT).write_bytes(packed)
    return {**result, "sent_bytes": len(packed)}


def load_other(layout: Layout, folder: Path) -> dict[str, Any]:
    """Play another rank in a load; whole chunks are read, also if another rank wants a part of them too."""
    result: dict[str, Any] = {}
    packed = (folder / _SENT).read_bytes()
    with measured(result, "other"):
        opened = OpenCheckpoint.of_table(folder, ChunkTable.unpack(packed))
        plan = _find(opened, layout, int(layout.world_size * OTHER))
    infos = [opened.storage_info(index) for index in {item.storage_index for item in plan.items}]
    return {**result, "read_chunks": len(infos), "read_bytes": sum(info.length for info in infos)}


def _in_process(play: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Call ``play`` in a fresh process, so that nobody else's memory is counted."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(play, args)


# --- the report ------------------------------------------------------------------------------------------


def run(world_size: int, cap_mib: float) -> dict[str, Any]:
    """All figures of one world size and bucket size."""
    layout = Layout.of(world_size, cap_mib)
    result: dict[str, Any] = {"world_size": world_size, "cap_mib": cap_mib, "buckets": len(layout.buckets)}
    result["gathers"] = layout.num_gathers()
    with tempfile.TemporaryDirectory() as folder:
        for play in (save, load_first, load_other):
            result |= _in_process(play, layout, Path(folder))
            print(f"{world_size} ranks, {cap_mib} MiB: {play.__name__} done", file=sys.stderr)
    return result


def as_markdown(results: list[dict[str, Any]]) -> str:
    """The report, one line for each layout."""

    def mib(value: float) -> str:
        return f"{value / MIB:.1f}"

    def both(result: dict[str, Any], what: str) -> str:
        return f"{result[f'{what}_seconds']:.2f} s, {result[f'{what}_bytes'] / MIB:.0f} MiB"

    rows = [
        [
            f"{r['world_size']:,}, {r['cap_mib']:g}",
            f"{r['buckets']:,}",
            f"{r['gathers']:,}",
            f"{r['chunks']:,}",
            mib(r["metadata_bytes"]),
            mib(r["index_bytes"]),
            f"{r['manifest_bytes'] / 1024:.0f}",
            mib(r["gathered_bytes"]),
            both(r, "save"),
            both(r, "first"),
            mib(r["sent_bytes"]),
            both(r, "other"),
            f"{r['read_chunks']:,}, {mib(r['read_bytes'])}",
        ]
        for r in results
    ]
    header = [
        "ranks, bucket_cap_mb",
        "buckets",
        "gathers",
        "pieces",
        ".metadata (MiB)",
        "index (MiB)",
        "manifest (KiB)",
        "to rank 0 (MiB)",
    ]
    header += ["save: rank 0", "load: rank 0", "from rank 0 (MiB)", "load: another rank", "it reads (chunks, MiB)"]
    fields = [[name, str(value)] for name, value in surroundings("benchmarks.checkpoint_scale").items()]
    numel = sum(map(math.prod, MODEL.values()))
    fields.append(["model", f"Llama, {numel / 1e9:.2f}B bfloat16 parameters in {len(MODEL)} tensors, float32 averages"])
    return "\n\n".join(
        [
            "# Benchmark: the descriptions of a large checkpoint",
            markdown_table(["field", "value"], fields),
            "Processor time of one thread, and the peak of memory above what the process held before. *gathers*:\n"
            "collectives of an export with NCCL. *pieces*: regions of tensors, and values. *to rank 0*: what all\n"
            "ranks report of their files in a save. *from rank 0*: what each rank gets of it in a load. *it reads*:\n"
            "the data of that rank, in whole pieces; a rank's share of all data is "
            f"{6 * sum(map(math.prod, MODEL.values())) / results[0]['world_size'] / MIB:.0f} MiB.",
            markdown_table(header, rows),
        ]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_scale", description=__doc__.split("\n")[0])
    parser.add_argument("--world-size", type=int, default=1024)
    parser.add_argument("--caps", type=float, nargs="+", default=[25.0, 100.0, 250.0], help="bucket_cap_mb")
    parser.add_argument("--markdown", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = as_markdown([run(args.world_size, cap) for cap in args.caps])
    print(report)
    if args.markdown:
        args.markdown.write_text(report + "\n")


if __name__ == "__main__":
    main()
