"""Tests the documentation: the site builds strictly and offline, names are neither missing nor stale, links work."""

import inspect
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import dist_asgd
from dist_asgd.checkpoint.reader import CheckedReader
from tests.rooms import PACKAGE, table

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# The pages of the site, and the other Markdown files, which are read in the repository.
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
MARKDOWN = [*sorted(ROOT.glob("*.md")), *PAGES]
FENCED = re.compile(r"^(`{3,}).*?^\1\s*?$", re.DOTALL | re.MULTILINE)
CODE_SPAN = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


def public_names() -> dict[str, object]:
    """The objects that users import, with the methods and properties of classes, by their names in the inventory."""
    found: dict[str, object] = {
        f"dist_asgd.{name}": getattr(dist_asgd, name) for name in dist_asgd.__all__ if name != "__version__"
    }
    found["dist_asgd.checkpoint.reader.CheckedReader"] = CheckedReader
    for name, value in list(found.items()):
        if inspect.isclass(value):
            own = {key: member for key, member in vars(value).items() if not key.startswith("_")}
            found |= {
                f"{name}.{key}": member
                for key, member in own.items()
                if isinstance(member, property | classmethod | staticmethod) or inspect.isfunction(member)
            }
    return found


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Build the site into a folder of its own; returns the kind of each object that it describes, by name."""
    from sphinx.util.inventory import InventoryFile

    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", str(DOCS), str(out)]
    # At this proxy a build would fail if it looked something up on the network.
    offline = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True, timeout=300, check=False
    )
    assert built.returncode == 0, f"the site does not build:\n{built.stdout}{built.stderr}"
    loaded = InventoryFile.loads((out / "objects.inv").read_bytes(), uri="")
    return {name: kind for kind, objects in loaded.data.items() for name in objects if kind.startswith("py:")}


def test_every_public_name_is_on_the_site(inventory: dict[str, str]) -> None:
    """Every public name is on the site, and so are the public methods and properties of classes."""
    missing = sorted(public_names().keys() - inventory.keys())
    assert not missing, f"add these to docs/api.md, or give them a docstring: {missing}"


def test_every_public_name_has_a_docstring_of_its_own() -> None:
    """Every public name has a docstring that is not inherited, which ``inspect.getdoc`` would accept."""
    bare = [name for name, value in public_names().items() if not (getattr(value, "__doc__", None) or "").strip()]
    assert not bare, f"no docstring: {bare}"


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    found: dict[str, int] = {}
    names = []
    for title in HEADING.findall(FENCED.sub("", page.read_text())):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        names.append(f"{slug}-{count}" if count else slug)
    return frozenset(names)


def broken_links(page: Path, root: Path = ROOT) -> list[str]:
    """The relative links of a page that name no file below ``root``, or no heading in the file."""
    text = CODE_SPAN.sub("", FENCED.sub("", page.read_text()))
    broken = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        outside = root not in (path, *path.parents)
        if outside or not path.exists() or (anchor and (path.suffix != ".md" or anchor not in anchors(path))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    """Relative links work in the README, too, which the site's build does not check, and to files outside docs/."""
    assert not broken_links(page)


def test_broken_links_are_found(tmp_path: Path) -> None:
    """The test above finds broken links, and there are links that it can check."""
    page = tmp_path / "page.md"
    page.write_text("# A `b`: c\n[1](#a-b-c) [2](#nowhere) [3](missing.md) [4](page.md#d)\n```\n[5](code.md)\n```\n")
    assert broken_links(page, tmp_path) == ["#nowhere", "missing.md", "page.md#d"]
    assert len([link for page in MARKDOWN for link in LINK.findall(page.read_text())]) > 50


def test_every_page_is_linked_from_the_readme() -> None:
    """The README links to every page of the site except the index, which is the README's counterpart."""
    linked = {target.partition("#")[0] for target in LINK.findall((ROOT / "README.md").read_text())}
    assert {f"docs/{page.relative_to(DOCS)}" for page in PAGES} - linked == {"docs/index.md"}


def test_the_architecture_page_shows_the_table_of_rooms() -> None:
    """The page shows the table that ``tests/test_structure.py`` enforces."""
    assert table() in (DOCS / "architecture.md").read_text(), "put the output of tests.rooms.table() into the page"


def test_the_architecture_page_names_what_exists() -> None:
    """Every file and every name in its code spans is in the repository, so that a rename reaches the page."""
    sources = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    spans = CODE_SPAN.findall(FENCED.sub("", (DOCS / "architecture.md").read_text()))
    stale = []
    for span in (span.strip("`") for span in spans):
        if re.fullmatch(r"[\w./]+(\.(py|c|md)|/)", span):
            exists = (ROOT / span).exists() or (PACKAGE / span).exists()
        else:
            # Of a call or an attribute the last name counts.
            name = re.fullmatch(r"(?:\w+\.)*(\w+)(?:\(\))?", span)
            exists = name is None or re.search(rf"\b{name[1]}\b", sources) is not None
        if not exists:
            stale.append(span)
    assert not stale
