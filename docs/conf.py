"""Sphinx configuration of the documentation site. The build is offline: no inventory of another project is fetched."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

# The site documents this checkout, and not a copy of the package that happens to be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dist_asgd.version import __version__

project = "dist_asgd"
author = "the authors of dist_asgd"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"dist_asgd {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

# Markdown: links to headings of any page, as `page.md#heading`, down to the third level.
myst_heading_anchors = 3

# API pages: types stand in the signatures alone, `Attributes:` sections do not repeat documented members, and
# arguments that share a line of `Args:` share one here.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False
toc_object_entries_show_parents = "hide"

# A reference without a target is an error. Names of torch and Python have no targets here, since intersphinx would
# fetch them; neither have the types of this package that users do not name.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|contextlib|os|pathlib|types|typing)\..*"),
    (r"py:.*", r"(Any|Callable|Iterator|Path|Tensor|Optimizer|ParamsT|DeviceMesh|ProcessGroup|NoReturn|nn\.Module)"),
    (r"py:class", r"dist\.ProcessGroup|dist_asgd\.checkpoint\..*\.Open\w+"),
]


# Files of the repository that are read on the site too, and the labels of their places there. The README is not among
# them: the index is its counterpart.
_PLACES = {
    "../CONTRIBUTING.md": "contributing.md",
    "../benchmarks/README.md": "#method",
    **{
        f"../benchmarks/results/{file.name}": f"#report-{file.stem}"
        for file in Path(__file__).resolve().parent.parent.glob("benchmarks/results/*.md")
    },
}


def _link_on_site(match: re.Match[str]) -> str:
    """A Markdown link to a file of the repository, as the site has it: to the file's place there, or without a link."""
    text, file = match.groups()
    if file in _PLACES:
        return f"[{text}]({_PLACES[file]})"
    return f"{text} (`{file.removeprefix('../')}` in the repository)"


def _link_pages(_app: Sphinx, _docname: str, source: list[str]) -> None:
    """Turn links to Markdown files outside docs/ into links to the pages that include them.

    In the repository the links lead to the files themselves.
    """
    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./[^)#]+\.md)\)", _link_on_site, source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx: connects the function above."""
    app.connect("source-read", _link_pages)
