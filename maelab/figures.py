"""Pictures of a run, from arrays and metrics. Needs no torch: anything that numpy takes is an image.

matplotlib is imported where something is drawn: half a second that a prediction does without.
"""

import contextlib
import io
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from maelab.errors import UsageError
from maelab.names import short, visible
from maelab.runs import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
COLOURS = {"train": "#4c72b0", "val": "#dd8452", "test": "#55a868"}
NAME, LINE, LINES = 16, 240, 12  # characters of a class's name; of a line, and lines of a text, beyond which it is cut


@contextlib.contextmanager
def literal(figure: "Figure") -> Iterator[None]:
    """Draw every text of a figure as it is written, whoever wrote it: no formula, no character that does something.

    A character that the font lacks is drawn as a box.
    """
    import matplotlib
    from matplotlib.text import Text

    def plain(text: str) -> str:
        return "\n".join(short(line, LINE) for line in text.split("\n")[:LINES])

    for ax in figure.axes:  # the labels of ticks are written when they are drawn
        for axis in (ax.xaxis, ax.yaxis):
            for formatter in (axis.get_major_formatter(), axis.get_minor_formatter()):
                written = formatter.format_ticks
                formatter.format_ticks = lambda values, written=written: [plain(text) for text in written(values)]
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_text(plain(text.get_text()))
        text.set_parse_math(False)
        text.set_usetex(False)
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def panels(rows: int = 1, columns: int = 1, *, layout: Any = None, figsize: tuple[float, float], **more: Any) -> Any:
    """A figure and its axes, (rows, columns). Nobody else's: pyplot, and what a notebook draws with it, see none of it.

    Args:
        rows, columns: of axes.
        layout: of `matplotlib.figure.Figure`.
        figsize: width and height, inches.
        more: for `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def save_figure(figure: "Figure", file: Path) -> None:
    """Write a PNG atomically.

    Raises:
        RunError: if it cannot be written.
    """
    with literal(figure):
        write_atomically(file, lambda place: figure.savefig(place, format="png", dpi=DPI, bbox_inches="tight"))


@contextlib.contextmanager
def optional(failure: str) -> Iterator[None]:
    """Let what is inside fail without the result that it belongs to: one line on stderr says `failure` and why."""
    try:
        yield
    except Exception as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        print(visible(f"{failure}: {why}; the result stands"), file=sys.stderr)


def to_picture(image: Any) -> np.ndarray:
    """(C, H, W) in [-1, 1] -> (H, W, 3) in [0, 1]: of many channels the first three, of two the first."""
    picture = np.clip((np.asarray(image, dtype=np.float32) + 1) / 2, 0, 1).transpose(1, 2, 0)
    return picture[:, :, :3] if picture.shape[2] > 2 else np.repeat(picture[:, :, :1], 3, axis=2)


def _mosaic(rows: Sequence[Sequence[Any]]) -> tuple[np.ndarray, list[float], list[float]]:
    """Rows of images (C, H, W) in [-1, 1], white between them: (H', W', 3) in [0, 1], and the centres of rows and
    columns in pixels. Rows may be of different length."""
    height, width = np.shape(rows[0][0])[1:]
    gap = max(1, min(height, width) // 14)
    columns = max(map(len, rows))
    canvas = np.ones((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), dtype=np.float32)
    for r, images in enumerate(rows):
        for c, image in enumerate(images):
            top, left = r * (height + gap), c * (width + gap)
            canvas[top : top + height, left : left + width] = to_picture(image)
    rows_at = [r * (height + gap) + (height - 1) / 2 for r in range(len(rows))]
    return canvas, rows_at, [c * (width + gap) + (width - 1) / 2 for c in range(columns)]


def overlay(images: Any, heat: Any) -> np.ndarray:
    """Images in grey below colours that tell how much attention each patch gets, from none to the most of its image.

    Args:
        images: (N, C, H, W) in [-1, 1].
        heat: (N, rows, columns), not negative.

    Returns:
        (N, 3, H, W) in [-1, 1].
    """
    import matplotlib

    pictures = []
    for image, values in zip(images, np.asarray(heat), strict=True):
        grey = to_picture(image).mean(axis=2, keepdims=True)  # (H, W, 1)
        share = values / max(float(values.max()), 1e-12)
        large = np.kron(share, np.ones(np.floor_divide(grey.shape[:2], values.shape)))
        colours = matplotlib.colormaps["inferno"](large)[:, :, :3]
        pictures.append((0.35 * grey + 0.65 * colours).transpose(2, 0, 1) * 2 - 1)
    return np.stack(pictures)


def reconstructions(
    file: Path,
    groups: Sequence[tuple[str, Any, Any, Any]],
    names: Sequence[str] = ("original", "masked", "rebuilt"),
    columns: Sequence[str] = (),
) -> None:
    """Rows of original, masked and rebuilt images, or others, a group of three rows after the other.

    Args:
        file: PNG to write.
        groups: (title, original, masked, rebuilt), the images (N, C, H, W) in [-1, 1].
        names: of the rows of a group.
        columns: what to write over each image, if anything.
    """
    width = max(len(original) for _, original, _, _ in groups)
    # Without a layout engine: the tight box of save_figure takes in titles and labels, however long.
    figure, axes = panels(len(groups), figsize=(1.3 * width, 4.4 * len(groups)))
    for ax, (title, *rows) in zip(axes[:, 0], groups, strict=True):
        canvas, rows_at, columns_at = _mosaic(rows)
        ax.imshow(canvas, interpolation="nearest")
        ax.set_yticks(rows_at, names)
        ax.set_xticks(columns_at[: len(columns)], [short(name, NAME) for name in columns], fontsize=8)
        ax.tick_params(length=0, labeltop=True, labelbottom=False)
        ax.spines[:].set_visible(False)
        ax.set_title(title, loc="left", fontsize=10)
    save_figure(figure, file)


def ratio_sweep(
    file: Path,
    groups: Sequence[tuple[str, Any, Any, Any]],
    errors: Mapping[float, float],
    baselines: Mapping[float, float],
) -> None:
    """A column for each mask ratio: every image masked and rebuilt, and below them the errors.

    Args:
        file: PNG to write.
        groups: (title, original, masked, rebuilt) for each ratio, the images (N, C, H, W) in [-1, 1].
        errors: ratio -> masked MSE, in the order of the groups.
        baselines: the same of predicting the mean of the visible pixels.
    """
    rows = []
    for i, original in enumerate(groups[0][1]):
        rows.append([original, *(masked[i] for _, _, masked, _ in groups)])
        rows.append([np.ones_like(original), *(rebuilt[i] for *_, rebuilt in groups)])
    canvas, rows_at, columns_at = _mosaic(rows)
    height, width = canvas.shape[:2]
    inches = 1.0 * (len(groups) + 1)
    tall = inches * height / width
    figure, ((above,), (below,)) = panels(
        2, figsize=(inches, tall + 1.6), height_ratios=(tall, 1.6), layout="constrained", sharex=True
    )
    above.imshow(canvas, interpolation="nearest", aspect="auto")
    above.set_yticks(rows_at, ["masked", "rebuilt"] * (len(rows) // 2), fontsize=8)
    above.spines[:].set_visible(False)
    above.tick_params(length=0, labelbottom=False)
    _, bracket, used = groups[0][0].partition(" (")  # the end of the title says what was used beside the model
    above.set_title(f"rebuilt{bracket}{used}" if bracket else "", loc="left", fontsize=8)
    for label, values, colour in (("mean of the visible pixels", baselines, "grey"), ("model", errors, "#4c72b0")):
        below.plot(columns_at[1:], list(values.values()), marker=".", color=colour, label=label)
    below.set_xticks(columns_at, ["original", *(f"{ratio:.0%} hidden" for ratio in errors)], fontsize=8)
    below.set_ylabel("masked MSE", fontsize=8)
    below.set_ylim(bottom=0)
    below.tick_params(axis="y", labelsize=7)
    below.grid(alpha=0.3)
    below.legend(fontsize=8, loc="best")
    save_figure(figure, file)


def animation(file: Path, frames: Iterable[tuple[str, Any, Any, Any]]) -> None:
    """An animated GIF of original, masked and rebuilt images.

    Args:
        file: GIF to write.
        frames: (title, original, masked, rebuilt), the images (N, C, H, W) in [-1, 1], of equal shape in all.
    """
    titles, pictures, font = [], [], ImageFont.load_default(16)
    for title, *rows in frames:
        rows = rows if len(rows[0]) > 2 else list(zip(*rows, strict=True))  # one or two images lie on their side
        picture = Image.fromarray(np.asarray(255 * _mosaic(rows)[0], dtype=np.uint8))
        zoom = min(960 / picture.width, 480 / picture.height)
        how = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.BOX
        zoom = int(zoom) if zoom >= 1 else zoom
        titles.append(short(title, LINE))
        pictures.append(picture.resize((round(picture.width * zoom), round(picture.height * zoom)), how))
    width = max(pictures[0].width, *(int(font.getlength(title)) + 8 for title in titles))
    for i, (title, picture) in enumerate(zip(titles, pictures, strict=True)):
        frame = Image.new("RGB", (width, picture.height + 30), "white")
        frame.paste(picture, (0, 30))
        ImageDraw.Draw(frame).text((2, 6), title, fill="black", font=font)
        pictures[i] = frame.quantize(256, dither=Image.Dither.NONE)
    lasting = [1000, *[120] * (len(pictures) - 2), 2500][-len(pictures) :]  # milliseconds
    more = {"save_all": True, "append_images": pictures[1:], "duration": lasting, "loop": 0}
    write_atomically(file, lambda place: pictures[0].save(place, format="GIF", **more))


_PANELS = ("loss", "knn_accuracy", "effective_rank", "accuracy")  # in this order, then the others
_TITLES = {
    "lr": "learning rate",
    "knn_accuracy": "k-NN accuracy",
    "effective_rank": "effective rank",
    "masked_mse": "masked MSE",
}


def curves(file: Path, metrics: Sequence[dict[str, Any]], best_epoch: int = 0) -> None:
    """One panel for each measured quantity over the epochs, training and validation in one panel, the loss first.

    Args:
        file: PNG to write.
        metrics: rows of metrics.jsonl.
        best_epoch: marked by a line; 0 marks none.
    """
    hidden = {"epoch", "split", "seconds", "images_per_s"}
    names = list(dict.fromkeys(k for row in metrics for k in row if k not in hidden))
    names.sort(key=lambda name: (*_PANELS, name).index(name))
    figure, axes = panels(1, len(names), figsize=(3.6 * len(names), 2.8), layout="constrained")
    for ax, name in zip(axes[0], names, strict=True):
        for split, colour in COLOURS.items():
            points = [(row["epoch"], row[name]) for row in metrics if row["split"] == split and name in row]
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, marker=".", label=split)
        if best_epoch:
            ax.axvline(best_epoch, color="grey", linewidth=0.8, linestyle=":", label="best epoch")
        ax.set(title=_TITLES.get(name, name.replace("_", " ")), xlabel="epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    save_figure(figure, file)


def predictions(
    file: Path, images: Any, labels: Sequence[int] | None, probabilities: Any, class_names: Sequence[str]
) -> None:
    """A gallery of images with the predicted class and its probability; wrong ones in red, with the true class.

    Args:
        file: PNG to write.
        images: (N, C, H, W) in [-1, 1].
        labels: true classes (N,), or None.
        probabilities: (N, classes).
        class_names: of the classes.
    """
    probabilities = np.asarray(probabilities)
    guesses: list[int] = probabilities.argmax(axis=1).tolist()
    truths = guesses if labels is None else list(map(int, labels))
    titled: list[tuple[str, Any, str]] = []
    for image, shares, guess, truth in zip(images, probabilities, guesses, truths, strict=True):
        title = f"{short(class_names[guess], NAME)} ({shares[guess]:.0%})"
        if guess != truth:
            title += f"\nis {short(class_names[truth], NAME)}"
        titled.append((title, image, "black" if guess == truth else "#c44e52"))
    _grid(file, [titled[first : first + 8] for first in range(0, len(titled), 8)], fontsize=8)


def png(name: Path | str, option: str = "--out") -> Path:
    """The file of this name, which `option` gave, if it is a PNG's.

    Raises:
        UsageError: if it is not.
    """
    if (file := Path(name)).suffix.lower() != ".png":
        raise UsageError(f"{option} {file}: the picture is a PNG; give a name that ends in .png")
    return file


def rows(file: Path, pictures: Sequence[Sequence[tuple[str, Any]]]) -> None:
    """Rows of images with a title over each.

    Args:
        file: PNG to write.
        pictures: rows of (title, image (C, H, W) in [-1, 1], or None for an empty place); they may be of any length.
    """
    _grid(file, [[(short(title, NAME), image, "black") for title, image in row] for row in pictures], fontsize=7)


def _grid(file: Path, pictures: Sequence[Sequence[tuple[str, Any, str]]], fontsize: int) -> None:
    """Rows of (title, image or None, colour of the title), in one pair of axes whose units are inches: many axes take
    seconds to lay out."""
    side, gap, line = 1.4, 0.1, fontsize / 72 * 1.25

    def size(image: Any) -> tuple[float, float]:
        height, width = (side, side) if image is None else np.shape(image)[1:]
        return side * height / max(height, width), side * width / max(height, width)

    tall = [max(size(image)[0] for _, image, _ in row) for row in pictures]
    over = [max(title.count("\n") + 1 for title, _, _ in row) * line + gap for row in pictures]
    width, bottom = max(map(len, pictures)) * (side + gap) - gap, sum(tall) + sum(over)
    figure, axes = panels(figsize=(width, bottom))
    ax = axes[0, 0]
    ax.set_position((0, 0, 1, 1))
    ax.axis("off")
    ends = (0, width), (0, bottom)
    for row, height, above in zip(pictures, tall, over, strict=True):
        bottom -= height + above
        for column, (title, image, colour) in enumerate(row):
            (high, wide), middle = size(image), column * (side + gap) + side / 2
            if image is not None:
                place = middle - wide / 2, middle + wide / 2, bottom, bottom + high
                ax.imshow(to_picture(image), interpolation="nearest", aspect="auto", extent=place)
            top = bottom + (high + gap / 2 if image is not None else height / 2)
            ax.text(middle, top, title, fontsize=fontsize, color=colour, ha="center")
    ax.set(xlim=ends[0], ylim=ends[1])
    save_figure(figure, file)


def mosaic(file: Path, pictures: Sequence[bytes], places: np.ndarray, cells: int = 24, side: int = 56) -> None:
    """Images where they belong on a square; of those that fall into one cell the first is drawn.

    Args:
        file: PNG to write.
        pictures: PNG files of our own.
        places: (N, 2) from 0 to 1: to the right and up.
        cells: how many in a row.
        side: of a cell, pixels.
    """
    square, inner = Image.new("RGB", (cells * side, cells * side), "white"), (side - 2, side - 2)
    columns = np.minimum((places * cells).astype(int), cells - 1)
    for first in np.unique(columns, axis=0, return_index=True)[1]:
        shown = Image.open(io.BytesIO(pictures[first]))
        shown = ImageOps.contain(shown, inner, Image.Resampling.NEAREST)
        square.paste(shown, (columns[first, 0] * side + 1, (cells - 1 - columns[first, 1]) * side + 1))
    write_atomically(file, lambda place: square.save(place, format="PNG"))


def confusion(file: Path, counts: Any, class_names: Sequence[str]) -> None:
    """Confusion matrix, coloured by the share of each true class.

    Args:
        file: PNG to write.
        counts: images (classes, classes), rows are true classes; the diagonal is written as each class's recall.
        class_names: of the classes; more than 100 are not written.
    """
    counts = np.asarray(counts)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    n = len(class_names)
    side = min(max(4.0, 0.45 * n + 1.5), 16.0)
    figure, [[ax]] = panels(figsize=(side, side))
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if n <= 20:
        for i, j in np.ndindex(n, n):
            text = f"{share[i, j]:.1%}".replace("100.0%", "100%") if i == j else str(counts[i, j])
            if counts[i, j] or (i == j and counts[i].any()):
                colour = "white" if share[i, j] > 0.5 else "black"
                ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color=colour)
    names = [short(name, NAME) for name in class_names] if n <= 100 else []
    size, shown = min(7.0, 400 / n), range(len(names))
    turned = {"rotation": 60, "ha": "right"} if max(map(len, names), default=0) > 3 else {}
    ax.set_xticks(shown, names, fontsize=size, **turned)
    ax.set_yticks(shown, names, fontsize=size)
    ax.set_xlabel(f"predicted ({n} classes)" if n > 100 else "predicted", fontsize=9)
    ax.set_ylabel("true", fontsize=9)
    ax.set_title("images; on the diagonal the share that was recognised", fontsize=8)
    save_figure(figure, file)


def heat_map(file: Path, values: Mapping[tuple[Any, Any], float | None], fields: tuple[str, str], title: str) -> None:
    """A table of one number over two settings, coloured from the lowest to the highest.

    Args:
        file: PNG to write.
        values: (setting of the first field, of the second) -> number, or None where there is none.
        fields: names of the settings: rows, columns.
        title: what the numbers are.
    """
    import matplotlib

    rows, columns = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
    table = np.array([[values.get((row, column)) for column in columns] for row in rows], dtype=float)  # None: NaN
    figure, [[ax]] = panels(figsize=(1.1 * len(columns) + 1, 0.7 * len(rows) + 0.8))
    image = ax.imshow(np.ma.masked_invalid(table), cmap="viridis", aspect="auto")
    for i, j in np.ndindex(*table.shape):
        missing = np.isnan(table[i, j])
        dark = not missing and float(image.norm(table[i, j])) < 0.6  # type: ignore[arg-type]
        ink = matplotlib.rcParams["text.color"] if missing else "white" if dark else "black"  # none: on bare paper
        text = "none" if missing else f"{table[i, j]:.4f}"
        ax.text(j, i, text, ha="center", va="center", fontsize=9, color=ink)
    ax.set_xticks(range(len(columns)), [short(str(c), 2 * NAME) for c in columns])
    ax.set_yticks(range(len(rows)), [short(str(r), 2 * NAME) for r in rows])
    ax.set(xlabel=fields[1].replace("_", " "), ylabel=fields[0].replace("_", " "), title=title.replace("_", " "))
    save_figure(figure, file)
