"""Sphinx settings of the documentation site: `make docs` builds it. Its source is the repository itself, so that links
between README.md, docs/ and the other pages are the same here and in a browser of repositories."""

import os
import subprocess
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import maelab
from maelab.cli import COMMANDS

project, author, release = "maelab", "the maelab authors", maelab.__version__
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "README.md",
    "SECURITY.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "bench/README.md",
    "results/README.md",
]
exclude_patterns = [
    ".*",
    "build",
    "data",
    "runs",
    "dist",
    "results/build",
    "results/pictures",
    "tests",
    "maelab",
    "examples",
]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
suppress_warnings = ["myst.header"]  # CHANGELOG.md and the log go their own way with headings
myst_heading_anchors = 3
nb_execution_mode = "force"  # the notebook is run as the site is built, and stops the build if it fails
nb_execution_raise_on_error = True
nb_execution_timeout = 1200
autodoc_member_order = "bysource"
default_role = "code"  # of `x` in docstrings
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

html_theme = "furo"
html_title = "maelab"
html_copy_source = False
html_show_copyright = False


class Help(SphinxDirective):
    """`{maelab-help}`: what `maelab COMMAND --help` says, for every command."""

    def run(self) -> list[nodes.Node]:
        found: list[nodes.Node] = []
        for name in COMMANDS:
            command = [sys.executable, "-m", "maelab", name, "--help"]
            said = subprocess.run(
                command, env={**os.environ, "COLUMNS": "88"}, capture_output=True, text=True, check=True
            )
            section = nodes.section(ids=[f"maelab-{name}"])
            section += nodes.title(text=f"maelab {name}")
            section += nodes.literal_block(text=said.stdout.rstrip(), language="text")
            found.append(section)
        return found


def _enter_from_the_top(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        page = '<!doctype html><meta charset="utf-8"><title>maelab</title>'
        page += '<meta http-equiv="refresh" content="0; url=docs/index.html"><a href="docs/index.html">maelab</a>\n'
        Path(app.outdir, "index.html").write_text(page, encoding="utf-8")


_WRITTEN: dict[str, list[str]] = {}  # what is said of fields, where napoleon takes what comes before a colon for a type


def _keep(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    if what == "attribute":
        _WRITTEN[name] = [*lines]


def _put_back(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    if what == "attribute":
        lines[:] = _WRITTEN.pop(name)


def setup(app: Sphinx) -> None:
    """Add what this site has beside Sphinx."""
    app.add_directive("maelab-help", Help)
    app.connect("autodoc-process-docstring", _keep, priority=400)
    app.connect("autodoc-process-docstring", _put_back, priority=600)  # napoleon has 500
    app.connect("build-finished", _enter_from_the_top)
