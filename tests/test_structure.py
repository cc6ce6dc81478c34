"""The architecture: data flows one way, one module talks, and no file grows without bound."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rooms import LEVELS, PACKAGE, room_of

FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 450

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


# What this package reads of torch's internals, because torch has no public name for it.
PRIVATE_TO_TORCH = {
    *(
        "_C",
        "_base",
        "_foreach_copy_",
        "_foreach_lerp_",
        "_foreach_mul_",
        "_foreach_norm",
        "_foreach_zero_",
        "_make_wrapper_subclass",
        "_to_copy",
    ),
    *("_cdata", "_schema"),  # storages and operators
    *("_disabled_torch_function_impl", "_version"),
    *("_current_graph_task_id", "_execution_engine"),  # autograd
    *("_Options", "_device_types", "_devices", "_get_backend", "_timeout", "_world"),  # process groups
    *("_local_tensor", "_spec"),  # DTensor
    *("_fsdp_flattened", "_is_flat_param"),  # FSDP1
    "_is_profiler_enabled",
    *("_compiled_call_impl", "_modules", "_orig_mod", "_parameters"),  # modules
    *("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks"),
    *("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"),
    "_replace",  # typing.NamedTuple
}


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


def test_every_room_is_in_the_table() -> None:
    """A new room is put into ``tests/rooms.py`` on purpose."""
    assert {room_of(path) for path in FILES} == LEVELS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_only_from_rooms_below(path: Path) -> None:
    """Rooms on one line of the table never import each other."""
    room = room_of(path)
    for name in imports(path):
        pieces = name.split(".")
        other = pieces[1] if len(pieces) > 1 else ""
        if pieces[0] == "dist_asgd" and other in LEVELS and other != room:
            assert LEVELS[other] < LEVELS[room], f"{room} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nobody_reads_private_attributes_of_others(path: Path) -> None:
    """An underscore attribute is read where it is defined: in its own file. Those of torch are listed."""
    tree = ast.parse(path.read_text())
    own = _defined_private_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own | PRIVATE_TO_TORCH:
            assert ast.unparse(node.value) in ("self", "cls"), f"{path.name}:{node.lineno} reads {ast.unparse(node)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
            "attrgetter",
        ):
            for name in (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)):
                if _is_private(name):
                    assert name in own | PRIVATE_TO_TORCH, f"{path.name}:{node.lineno} reads {name!r} by name"


# Calls that take an attribute's name as a string.
BY_NAME = ("getattr", "setattr", "hasattr", "delattr", "attrgetter")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined_private_names(tree: ast.Module) -> set[str]:
    """Private names that a file defines: functions, classes, annotated names and attributes that it assigns to self."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__":
            names |= {e.value for e in ast.walk(node.value) if isinstance(e, ast.Constant) and isinstance(e.value, str)}
    return {name for name in names if _is_private(name)}


@pytest.mark.parametrize(
    "path", [p for p in FILES if room_of(p) in ("storage", "update")], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_storage_and_update_know_nothing_of_torch_distributed(path: Path) -> None:
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
    assert not [name for name in imports(PACKAGE / "storage" / "layout.py") if name.startswith("torch")]


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) != "comm"], ids=lambda p: p.name)
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
