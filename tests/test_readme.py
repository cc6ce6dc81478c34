"""The Python blocks of the README and of the pages in docs/ run when they are saved and started as the page says.

A comment ``<!-- test -->`` (one process) or ``<!-- test: N ranks -->`` stands right before each block, for readers of
the source. The first line of a block says to all readers what it is:

- ``# NAME.py: python NAME.py`` or ``# NAME.py: torchrun --standalone --nproc-per-node N NAME.py``: a whole file, and
  the command that runs it;
- ``# NAME.py, which the files below import``: a whole file that is not started;
- ``# in NAME.py, before destroy_process_group()`` or ``# in NAME.py, at its end``: a fragment of a file shown before.

A page's files are run in the order in which they stand, in one folder, each with all of its fragments.
"""

import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.launch.ranks import run_ranks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)]
BLOCK = re.compile(r"<!-- test(?:: (\d+) ranks)? -->\s*```python\n(.*?)```", re.DOTALL)
WHOLE = re.compile(r"# (\w+\.py): (?:torchrun --standalone --nproc-per-node (\d+)|python) \1\n")
IMPORTED = re.compile(r"# (\w+\.py), which the files below import\n")
FRAGMENT = re.compile(r"# in (\w+\.py), (before destroy_process_group\(\)|at its end)\n")
END = re.compile(r"^dist\.destroy_process_group\(\)\n", re.MULTILINE)
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@dataclass
class Script:
    """A file of a page: its text, how many ranks run it (0: ``python``; None: it is imported), and its fragments."""

    name: str
    ranks: int | None
    text: str
    inner: list[str] = field(default_factory=list)
    trailing: list[str] = field(default_factory=list)

    def spliced(self) -> str:
        """The file with its fragments."""
        text = self.text
        if self.inner:
            assert len(END.findall(text)) == 1, f"{self.name} has no one place before destroy_process_group()"
            text = END.sub(lambda end: "".join(self.inner) + end[0], text)
        return text + "".join(self.trailing)


def scripts(page: Path) -> list[Script]:
    """A page's files in order, with the fragments that belong to them."""
    found: dict[str, Script] = {}
    for marked, code in BLOCK.findall(page.read_text()):
        if whole := WHOLE.match(code):
            assert (whole[2] or "") == marked, f"{page.name}: the comment before {whole[1]} gives other ranks"
            found[whole[1]] = Script(whole[1], int(whole[2] or 0), code)
        elif imported := IMPORTED.match(code):
            found[imported[1]] = Script(imported[1], None, code)
        else:
            fragment = FRAGMENT.match(code)
            assert fragment is not None, f"{page.name}: the first line of a block does not say what it is: {code[:80]}"
            script = found[fragment[1]]
            (script.trailing if fragment[2] == "at its end" else script.inner).append(code)
    return list(found.values())


def run_script(script: Script, folder: Path) -> str:
    """Run a file that lies in a folder, as its first line says; returns what it printed."""
    assert script.ranks is not None
    run = run_ranks(max(1, script.ranks), [], ENVIRONMENT, folder / script.name, folder, script.ranks > 0)
    assert run.returncode == 0, run.stdout
    return run.stdout


def weights_of_deepspeed(folder: Path) -> None:
    """Write what DeepSpeed's zero_to_fp32.py makes of a checkpoint of the page's model: weights by name."""
    sizes = {"0.weight": (64, 16), "0.bias": (64,), "2.weight": (1, 64), "2.bias": (1,)}
    (folder / "weights").mkdir()
    torch.save(OrderedDict((name, torch.randn(size)) for name, size in sizes.items()), folder / WEIGHTS)


# Files that a page's commands write with programs that are not installed here.
WEIGHTS = "weights/pytorch_model.bin"
PREPARED = {"migration.md": weights_of_deepspeed}


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name)
def test_files_run(page: Path, tmp_path: Path) -> None:
    """In the order in which a reader meets them."""
    if page.name in PREPARED:
        PREPARED[page.name](tmp_path)
    for script in scripts(page):
        (tmp_path / script.name).write_text(script.spliced())
        if script.ranks is not None:
            run_script(script, tmp_path)


def test_the_first_file_goes_on_when_it_is_started_again(tmp_path: Path) -> None:
    """The README says so of the file that it begins with, which the index of the site shows, too."""
    first = scripts(ROOT / "README.md")[0]
    assert scripts(ROOT / "docs" / "index.md")[0].text == first.text
    (tmp_path / first.name).write_text(first.text)
    assert "after 200 steps" in run_script(first, tmp_path)
    assert "after 400 steps" in run_script(first, tmp_path)


def test_a_whole_file_comes_before_fragments() -> None:
    """Whoever reads the README from the top can start what they see."""
    files = scripts(ROOT / "README.md")
    assert files[0].ranks == 2
    assert any(script.ranks == 0 for page in PAGES for script in scripts(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_is_left_out(page: Path) -> None:
    """A Python block without a comment before it would not run."""
    assert page.read_text().count("```python\n") == len(BLOCK.findall(page.read_text()))
