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
    (r"py:.*", r"(torch|collections|os|pathlib|types|typing)\..*"),
    (r"py:.*", r"(Any|Callable|Iterator|Path|Tensor|Optimizer|ParamsT|DeviceMesh|ProcessGroup|NoReturn)"),
    (r"py:class", r"dist\.ProcessGroup|dist_asgd\.checkpoint\..*\.Open\w+"),
]


def _offer_files(_app: Sphinx, _docname: str, source: list[str]) -> None:
    """Turn links to Markdown files outside docs/ into downloads: those files are no pages of the site."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)\)", r"](path:\1)", source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx: connects the function above."""
    app.connect("source-read", _offer_files)
