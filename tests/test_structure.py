"""The architecture: data flows one way, one module talks, and no file grows without bound."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dist_asgd

PACKAGE = Path(dist_asgd.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 450

# From the top: a module imports only from those on lines above its own, or beside it in its own folder.
LAYERS = [
    {"version", "layout", "masters", "facts", "dtensor", "fsdp1"},
    {"buffers", "comm"},
    {"agreement", "parts", "replicas"},
    {"portions"},
    {"residents"},
    {"update"},
    {"validation"},
    {"gradients", "memory", "gather", "state", "claims"},
    {"reduce"},
    {"clip", "scaling"},
    {"averaging", "checkpoint"},
    {"differentiable"},
    {"state_dicts"},
    {"optimizer"},
    {"amp"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
# The command line is no room but a way into one.
ROOMS = {"averaging", "checkpoint", "plan"}
COLLECTIVES = {
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "new_group",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "scatter",
    "send",
}


def part_of(path: Path) -> str:
    """The module, or the folder, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level(part: str) -> int:
    """The part's line in ``LAYERS``."""
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports, wherever the import stands."""
    package = ["dist_asgd", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            prefix = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*prefix, alias.name]) for alias in node.names)


def test_every_module_has_its_place() -> None:
    """A new module is put into ``LAYERS`` (and into the design's table) on purpose."""
    known = set().union(*LAYERS)
    assert {part_of(path) for path in FILES} == known


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_import_only_from_those_above_them(path: Path) -> None:
    """And rooms never import each other."""
    part = part_of(path)
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] != "dist_asgd" or len(pieces) < 2:
            continue
        other = pieces[1]
        if other == part or other not in set().union(*LAYERS):
            continue
        assert level(other) < level(part), f"{part} imports {name}"
        assert not {part, other} <= ROOMS, f"room {part} imports room {other}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if part_of(p) in ("layout", "update")], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_layout_and_update_know_nothing_of_torch_distributed(path: Path) -> None:
    """Neither themselves nor through what they import."""
    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        current = waiting.pop()
        seen.add(current)
        for name in imports(current):
            assert not name.startswith("torch.distributed"), f"{current.name} imports {name}"
            pieces = name.split(".")[1:] if name.startswith("dist_asgd.") else []
            for end in range(1, len(pieces) + 1):
                found = PACKAGE.joinpath(*pieces[:end]).with_suffix(".py")
                if found.exists() and found not in seen:
                    waiting.append(found)


def test_layout_is_pure_integers() -> None:
    """No torch at all."""
    assert not [name for name in imports(PACKAGE / "layout.py") if name.startswith("torch")]


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) != "comm"], ids=lambda p: p.name)
def test_only_comm_calls_collectives(path: Path) -> None:
    """No other module calls ``torch.distributed``'s functions that talk."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        source = ast.unparse(node.func.value)
        if source in ("dist", "torch.distributed", "c10d"):
            assert node.func.attr not in COLLECTIVES, f"{path.name}:{node.lineno} calls {ast.unparse(node.func)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_short(path: Path) -> None:
    """No god files."""
    assert len(path.read_text().splitlines()) < MAX_LINES


def test_no_module_keeps_mutable_state() -> None:
    """Module-level names are bound once, to constants, functions and classes."""
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            names = ast.unparse(node).split("=")[0].strip()
            mutable = isinstance(value, ast.Dict | ast.List | ast.Set) and names != "__all__"
            assert not mutable or names.split(":")[0].isupper() or names.startswith("_"), f"{path.name}: {names}"
        assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Global)], path.name


def test_dtensors_are_loaded_where_there_are_any() -> None:
    """They take a second to import."""
    script = "import sys, dist_asgd; assert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
