"""How Sphinx makes the documentation: the pages of this folder, and an API reference from the docstrings."""

import re

from sphinx.application import Sphinx

from narrowgauge import __version__

project = "narrowgauge"
copyright = "The narrowgauge authors, Apache-2.0"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"{project} {release}"
# The pages are written for a repository's viewer: its anchors, and blocks headed "bash run" that tests execute.
myst_heading_anchors = 3
napoleon_use_ivar = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100


def _for_the_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Headings of blocks that Pygments knows; links that leave the folder become the path that they lead to."""
    source[0] = re.sub(r"^```bash run$", "```bash", source[0], flags=re.MULTILINE)
    up = "../" * (page.count("/") + 1)
    source[0] = re.sub(rf"\[([^\]]+)\]\({re.escape(up)}([^)]+)\)", r"\1 (`\2`)", source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", _for_the_site)
