"""What others build on: public names, signatures, keys and formats. A change here is a change for users.

``surface.txt`` is the list. ``python -m tests.test_surface`` writes it anew; its diff is what the changelog has to
tell.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dist_asgd
from dist_asgd import ShardedASGD, save_checkpoint
from dist_asgd.checkpoint.format import manifest, metadata

FILE = Path(__file__).with_name("surface.txt")


def describe(name: str, value: Any) -> Iterator[str]:
    """The lines for one name, and for the public members of a class."""
    if not callable(value):
        yield f"{name}: {type(value).__name__}"
        return
    if inspect.isclass(value) and issubclass(value, BaseException):
        bases = ", ".join(base.__name__ for base in value.__mro__[1:-2])
        yield f"{name}: an error, {bases}"
        return
    yield f"{name}{signature(value)}"
    if not inspect.isclass(value):
        return
    for member in sorted(vars(value)):
        if member.startswith("_"):
            continue
        found = inspect.getattr_static(value, member)
        if isinstance(found, property):
            yield f"{name}.{member}: property"
        elif isinstance(found, classmethod | staticmethod) or callable(found):
            yield f"{name}.{member}{signature(getattr(value, member))}"
        else:
            yield f"{name}.{member}: attribute"


def signature(value: Any) -> str:
    """Names, kinds and defaults of the parameters."""
    found = inspect.signature(value)
    params = [param.replace(annotation=inspect.Parameter.empty) for param in found.parameters.values()]
    return str(found.replace(parameters=params, return_annotation=inspect.Signature.empty))


def surface(folder: Path) -> str:
    """All lines."""
    lines = [line for name in sorted(dist_asgd.__all__) for line in describe(name, getattr(dist_asgd, name))]
    model = nn.Linear(2, 2).bfloat16()
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, master_weights=True)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.state_dict()
    lines.append(f"keys of a parameter's state: {sorted(state['state'][0])}")
    lines.append(f"keys of a parameter group: {sorted(state['param_groups'][0])}")
    save_checkpoint(folder / "saved", model, optimizer, step=1, extra=1)
    lines.append(f"files of a checkpoint: {sorted(path.name for path in (folder / 'saved').iterdir())}")
    keys = metadata.parse((folder / "saved" / ".metadata").read_bytes(), "").state_dict_metadata
    lines.append(f"keys of a checkpoint: {sorted(keys)}")
    lines.append(f"format of manifest.json: {manifest.FORMAT}")
    return "\n".join(lines) + "\n"


def test_the_surface_is_what_it_was(tmp_path: Path) -> None:
    """Or the list says how it has changed."""
    assert surface(tmp_path) == FILE.read_text()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(surface(Path(folder)))
