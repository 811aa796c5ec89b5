"""The page's drawings, each for light and for dark paper, and the pictures that lie in run folders."""

import base64
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.ticker import MaxNLocator
from PIL import Image

from maelab.errors import RunError
from maelab.figures import panels, save_figure
from maelab.names import short
from maelab.report.groups import Group, mean_sd, number
from maelab.runs import figure_of

COLOURS = ("#2f7ed8", "#e07b1a", "#2e9e6b", "#a05cc5", "#d1495b", "#1a9fb0", "#a0763a", "#8a8f98")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
PAPER = {"light": ("#ffffff", "#23272e"), "dark": ("#14171c", "#d6d9de")}  # paper and ink, as in the page's style
PAPERED = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
WIDTH = 5.0  # inches of one panel
LARGEST_FILE, LARGEST_PICTURE = 64 << 20, 50_000_000  # bytes of a PNG, and pixels, that are read at all
EMBEDDED, SIDE = 2 << 20, 1600  # bytes beyond which a PNG is scaled down, to so many pixels


def drawn(folder: Path, name: str, draw: Callable[..., None], *arguments: Any) -> tuple[Path, Path]:
    """Call draw(file, *arguments) for light and for dark paper. 256 colours are plenty, and a third of the bytes.

    Returns:
        The files folder/NAME.png and folder/NAME-dark.png.
    """
    files = folder / f"{name}.png", folder / f"{name}-dark.png"
    for file, (back, ink) in zip(files, PAPER.values(), strict=True):
        with matplotlib.rc_context(STYLE | dict.fromkeys(PAPERED, back) | dict.fromkeys(INKED, ink)):
            draw(file, *arguments)
        with Image.open(file) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    return files


def _legend(figure: Any, ax: Any) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        wrapped = [textwrap.fill(short(label, 3 * 64), 64) for label in labels]
        figure.legend(handles, wrapped, loc="outside lower left", ncols=1, handlelength=1.4)


def curve(file: Path, groups: Sequence[Group], split: str, quantity: str, label: str) -> None:
    """A quantity over the epochs: a thin line for each seed, dashed where the run is unfinished, bold for the mean.

    Args:
        file: PNG to write.
        groups: one colour each.
        split: train or val.
        quantity: of the metrics.
        label: title of the panel.
    """
    figure, [[ax]] = panels(figsize=(WIDTH, 3.1 + 0.2 * len(groups)), layout="constrained")
    for group, colour in zip(groups, COLOURS, strict=False):
        for run in group.runs:
            rows = [row for row in run.metrics if row["split"] == split and number(row, quantity) is not None]
            style: dict[str, Any] = {"linestyle": "-" if run.result else ":", "marker": "." if len(rows) == 1 else None}
            if rows:
                epochs, values = [row["epoch"] for row in rows], [row[quantity] for row in rows]
                ax.plot(epochs, values, color=colour, linewidth=0.8, alpha=0.6, **style)
        means = group.by_epoch(split, quantity)
        shared = {epoch: value.mean for epoch, value in means.items() if value.n == len(group.done)}
        name = f"{group.name} (n = {len(group.done)})" if group.done else f"{group.name} (unfinished)"
        marker = "o" if len(shared) < 3 else None
        ax.plot(list(shared), list(shared.values()), color=colour, linewidth=2.2, label=name, marker=marker)
    ax.set(title=label, xlabel="epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y")
    _legend(figure, ax)
    save_figure(figure, file)


def dots(file: Path, rows: Sequence[tuple[str, Sequence[float]]], label: str) -> None:
    """One line of the page for each group: small dots for the seeds, a large one for the mean, a bar for its deviation.

    Args:
        file: PNG to write.
        rows: (name, values of the seeds).
        label: what the values are.
    """
    figure, [[ax]] = panels(figsize=(WIDTH * 1.3, 0.9 + 0.52 * len(rows)), layout="constrained")
    for y, (name, values) in enumerate(rows):
        summary = mean_sd(values)
        assert summary is not None
        colour, bar = COLOURS[y % len(COLOURS)], summary.deviation or None
        ax.errorbar(summary.mean, y, xerr=bar, fmt="o", color=colour, capsize=4, markersize=7, linewidth=2)
        ax.plot(values, [y] * len(values), "|", color=colour, markersize=9, alpha=0.8)
        ax.annotate(
            short(name, 120), (0, y), (2, 7), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9
        )
    ax.set(xlabel=label, yticks=[], ylim=(len(rows) - 0.5, -0.75))
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
    ax.margins(x=0.12)
    save_figure(figure, file)


def fractions(file: Path, lines: Mapping[str, Mapping[float, Sequence[float]]], label: str) -> None:
    """Accuracy over the share of the labels, on a logarithmic axis, with a bar for the deviation over seeds.

    Args:
        file: PNG to write.
        lines: name -> share of the labels -> values of the seeds.
        label: title.
    """
    figure, [[ax]] = panels(figsize=(WIDTH * 1.3, 3.4 + 0.2 * len(lines)), layout="constrained")
    for (name, points), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
        known = {share: s for share, values in sorted(points.items()) if (s := mean_sd(values))}
        deviations = [s.deviation or 0.0 for s in known.values()]
        ax.errorbar(
            list(known), [s.mean for s in known.values()], yerr=deviations,
            color=colour, marker="o", linewidth=2, capsize=4, label=name,
        )  # fmt: skip
    shares = sorted({share for points in lines.values() for share in points})
    ax.set_xscale("log")
    ax.set_xticks(shares, [f"{share:.3g}" for share in shares])
    ax.minorticks_off()
    ax.grid(axis="y")
    ax.set(title=label, xlabel="share of the labels")
    _legend(figure, ax)
    save_figure(figure, file)


def picture(folder: Path, name: str) -> bytes | None:
    """A figure of a run folder, scaled down if it is large; None where there is none.

    Raises:
        RunError: if it lies outside of the folder, is no PNG, or is too large to read.
    """
    file = figure_of(folder, name)
    if not file.is_file():
        return None
    if not file.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{file} points outside of its run folder")
    if file.stat().st_size > LARGEST_FILE:
        raise RunError(f"{file} is larger than {LARGEST_FILE >> 20} MiB")
    content = file.read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if image.width * image.height > LARGEST_PICTURE:
                raise RunError(f"{file} has more than {LARGEST_PICTURE} pixels")
            image.load()
            if len(content) > EMBEDDED or max(image.size) > 2 * SIDE:
                small = image.convert("RGB")
                small.thumbnail((SIDE, SIDE))
                stream = io.BytesIO()
                small.save(stream, "PNG", optimize=True)
                content = stream.getvalue()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RunError(f"{file} is no PNG that can be read ({error})") from error
    return content


def data_uri(content: bytes) -> str:
    """The image itself as the address of an image."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
