"""One self-contained page from run folders: nothing is loaded from elsewhere, and no script runs in it."""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from maelab.errors import RunError, UsageError
from maelab.names import visible
from maelab.report.figures import data_uri
from maelab.report.groups import command, load, sweep_command
from maelab.report.pieces import Material
from maelab.report.sections import sections
from maelab.runs import write_atomically


def report(folders: Sequence[Path], *, out: Path = Path("report.html"), figures: Path | None = None) -> dict[str, Any]:
    """Build one HTML page from run folders.

    Args:
        folders: run folders, sweeps, or folders that hold such at any depth.
        out: page to write.
        figures: folder for the page's drawings as PNG; None keeps them in the page alone.

    Returns:
        {"report", "runs", "unfinished", "damaged", "figures", "pictures"}: the file, how many runs it shows, names of
        those that are unfinished and of those that were left out, the PNG files, and the runs' pictures on it.

    Raises:
        UsageError: if a folder does not exist or holds no run, or `out` is a folder.
        RunError: if no run can be read, or the page cannot be written.
    """
    return build_page(folders, out=out, figures=figures)


def build_page(
    folders: Sequence[Path],
    *,
    out: Path,
    figures: Path | None = None,
    title: str = "",
    lead: Sequence[str] = (),
    pictures: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """What `report` does.

    Args:
        folders, out, figures: see there.
        title: of the page; "" names the folders.
        lead: paragraphs for the top of the page.
        pictures: caption -> image file, below them.
    """
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the name of a file")
    if figures is not None and figures.exists() and not figures.is_dir():
        raise UsageError(f"--figures {figures} is a file; give the name of a folder")
    runs, sweeps, problems = load(folders)
    if not runs:
        raise RunError(f"no run can be read: {problems[0][1]}")
    with tempfile.TemporaryDirectory() as place:
        parts = sections(Material(runs, sweeps, Path(place), problems))
        drawings = [file for file in sorted(Path(place).glob("*.png")) if not file.stem.endswith("-dark")]
        if figures is not None:
            for file in drawings:
                write_atomically(figures / file.name, file.read_bytes())
    problems = list(dict.fromkeys(problems))
    for _, problem in problems:
        print(visible(f"maelab: left out: {' '.join(problem.split())}"), file=sys.stderr)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("maelab.report", "."),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else visible(value),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["numbers"] = lambda cell: isinstance(cell, tuple)
    first = [(caption, data_uri(file.read_bytes())) for caption, file in (pictures or {}).items()]
    page = environment.get_template("page.html.j2").render(
        title=title,
        lead=lead,
        pictures=first,
        sections=parts,
        runs=runs,
        commands={run.number: command(run) for run in runs},
        sweeps=[(sweep, sweep_command(sweep)) for sweep in sweeps if sweep.runs],
        problems=problems,
        names=[file.name for file in folders],
    )
    write_atomically(out, page.encode())
    return {
        "report": str(out),
        "runs": len(runs),
        "unfinished": [run.name for run in runs if not run.result],
        "damaged": [name for name, _ in problems],
        "figures": [str(figures / file.name) for file in drawings] if figures is not None else [],
        "pictures": [
            str(image.file)
            for section in parts
            for block in section.blocks
            for image in getattr(block, "images", ())
            if image.file
        ],
    }
