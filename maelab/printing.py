"""What a command prints of its result, lines for people or with --json one object, and of an error, one line."""

import contextlib
import csv
import io
import json
import os
import re
import select
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from maelab.errors import MaelabError, RunError, UsageError, out_of_memory
from maelab.names import csv_cell, visible

Given = Mapping[str, Any]


@dataclass(frozen=True)
class Output:
    """What to print."""

    json: bool = False
    """print the result as one JSON object on stdout"""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(frozen=True)
class PredictOutput(Output):
    """What to print."""

    csv: bool = False
    """print CSV instead of a table"""

    def __post_init__(self) -> None:
        if self.csv and self.json:
            raise UsageError("--csv and --json exclude each other")


@dataclass(frozen=True)
class RunsOutput(Output):
    """What to print."""

    columns: str | None = None
    """fields to show, a,b,c; --json shows all there are"""


def first_process() -> bool:
    """Whether this process is the one that speaks: with --devices, every one comes by."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def emit(output: Output, result: Any, *lines: str, styled: bool = False) -> None:
    """Print the result as JSON, or these lines: each stays one, and a terminal obeys nothing in them, unless they are
    `styled` for it."""
    if first_process():
        print(json.dumps(result) if output.json else "\n".join(lines if styled else map(visible, lines)))


def reader_has_gone() -> bool:
    """Whether nobody reads stdout any more, as behind `| head`: any other pipe that breaks is a failure."""
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: Windows has no poll
        poll = select.poll()
        poll.register(sys.stdout, 0)
        return bool(poll.poll(0))
    return False


def drop() -> None:
    """Let what stdout still holds go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(message: str) -> None:
    """Print a line on stderr, if there is one."""
    if first_process() and sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(visible(f"maelab: {message}"), file=sys.stderr)


def explain(error: BaseException | None) -> tuple[str, int]:
    """One line and an exit status for an error."""
    if isinstance(error, MaelabError):
        return str(error), error.exit_status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command starts again, from the last checkpoint if there is one", 130
    if isinstance(error, BrokenPipeError):
        return "a pipe broke: the process at its other end has gone (--debug shows where)", 1
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename2 or error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}", 1
    first = (str(error).splitlines() or [""])[0]
    if error is not None and out_of_memory(error):
        return "there is not enough memory; try a smaller --batch-size, --accumulate 2, or a smaller model", 1
    return f"{type(error).__name__}: {first} (this should not happen; --debug shows where)", 1


def lines(of: Callable[[dict[str, Any]], Iterable[str]]) -> Callable[[dict[str, Any], Given, Output], None]:
    """A printer of the lines that `of` makes of a result."""
    return lambda result, given, output: emit(output, result, *of(result))


def template(*texts: str) -> Callable[[dict[str, Any], Given, Output], None]:
    """A printer of lines with gaps for parts of the result."""
    return lines(lambda result: (text.format(**result) for text in texts))


pretrained = template(
    "masked MSE {val[masked_mse]:.4f} on validation (loss {val[loss]:.4f}, mean predictor {mean_predictor_loss:.4f})",
    "{run}",
)
finetuned = template(
    "test accuracy {test[accuracy]:.4f} (validation {val[accuracy]:.4f}, best epoch {best_epoch} of {epochs})", "{run}"
)
probed = template(
    "k-NN accuracy {test[knn_accuracy]:.4f} on test, {val[knn_accuracy]:.4f} on validation",
    "linear accuracy {test[accuracy]:.4f} on test, {val[accuracy]:.4f} on validation",
    "{run}",
)
attention = template("attention of {of}, over {images} images", "{out}")
features = template("{images} images, {dim} features each", "{out}")
report = template("{report}")


@lines
def mapped(result: dict[str, Any]) -> Iterator[str]:
    yield visible(f"{result['images']} images in {result['out']}; picture: {result['picture']}")
    yield visible(f"open it: {result['open']}")


@lines
def similar(result: dict[str, Any]) -> Iterator[str]:
    for entry in result["found"]:
        yield visible(f"{entry['path']}: like")
        for one in entry["similar"]:
            yield visible(f"  {one['similarity']:.3f}  {one['path']}")
    yield result["out"]


@lines
def odd(result: dict[str, Any]) -> Iterator[str]:
    for one in result["ranked"][: result["top"]]:
        said = ", ".join(f"{name} {one[name]:.2f}" for name in ("distance", "patch", "error") if name in one)
        yield visible(f"{one['score']:6.2f}  {one['path']} ({said})")
    yield result["out"]


bench = lines(lambda result: [json.dumps(result)])  # people have read the table on stderr
data = lines(lambda result: (f"{name}: verified, in {place}" for name, place in result["data"].items()))
sharded = lines(lambda result: [visible(result["data"])])


@lines
def fitted(result: dict[str, Any]) -> Iterator[str]:
    for paragraph in result["verdict"].split("\n\n"):
        yield paragraph
        yield ""
    for title, key in (
        ("next", "next"),
        ("page", "report"),
        ("picture", "reconstruction"),
        ("mistakes", "mistakes"),
        ("model", "model"),
    ):
        if result.get(key):
            yield f"{title}: {result[key]}"


@lines
def evaluated(result: dict[str, Any]) -> Iterator[str]:
    where = f"on {result['images']} {result['split']} images of {result['data']}"
    if "accuracy" in result:
        yield f"accuracy {result['accuracy']:.4f}, loss {result['loss']:.4f} {where}"
        yield from (f"  {name}: {share:.4f}" for name, share in result["per_class"].items())
    else:
        yield f"masked MSE {result['masked_mse']:.4f} with {result['mask_ratio']:.0%} hidden {where}"


@lines
def reconstructed(result: dict[str, Any]) -> Iterator[str]:
    for ratio, error in result["masked_mse"].items():
        hidden = f"{ratio:.0%} hidden ({result['hidden'][ratio]} of {result['patches']} patches)"
        trivial = f"mean of the visible pixels {result['visible_mean_mse'][ratio]:.4f}"
        yield f"masked MSE {error:.4f} with {hidden}; {trivial}"
    yield result["out"]


@lines
def exported(result: dict[str, Any]) -> Iterator[str]:
    if result["format"] == "timm":
        words = ", ".join(f"{name}={value!r}" for name, value in result["arguments"].items())
        yield f"for timm.models.VisionTransformer({words})"
    if result["format"] == "onnx":
        yield f"opset {result['opset']}, at most {result['max_difference']:.1e} from torch's output in float32"
    if cost := result.get("int8"):
        where = f"on {cost['images']} {cost['split']} images" if "images" in cost else ""
        if "accuracy" in cost:
            yield f"int8: accuracy {cost['accuracy']:.4f} instead of {cost['float32_accuracy']:.4f} {where}"
        elif "relative_error" in cost:
            yield f"int8: off by {cost['relative_error']:.1%} {where}"
        else:
            yield f"int8: cost not measured: {cost['not_measured']}"
    yield result["out"]


@lines
def info(result: dict[str, Any]) -> Iterator[str]:
    config = result["config"]
    what = "complete" if result["complete"] else f"unfinished, {result['epochs_done']} epochs done"
    what = f"{config['task']} {config['recipe']} ({what})" if "task" in config else f"checkpoint of a {result['model']}"
    yield f"{result['run']}: {what}"
    for title in ("arguments", "config", "result"):
        if values := result.get(title):
            yield f"{title}:"
            yield from (f"  {key} = {value}" for key, value in values.items())


def swept(result: dict[str, Any], given: Given, output: Output) -> None:
    said = []
    for row in result["cells"]:
        named = ", ".join(f"{k} {v}" for k, v in row["settings"].items())
        judged = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float))
        said.append(f"{named}: {row.get('error') or judged}")
    emit(output, result, *said, f"best on validation: {result['best']}", result["run"])
    if any("error" in row for row in result["cells"]):
        raise RunError("some cells failed; the same command tries them again")


def page(result: dict[str, Any], given: Given, output: Output) -> None:
    models = ", ".join(f"{model['name']} ({model['bytes'] / 1e6:.1f} MB)" for model in result["models"])
    lines = f"{result['bytes'] / 1e6:.1f} MB: {models}", f"open {result['open']}, or put {result['out']} on any host"
    emit(output, result, *lines)


def demo(result: Iterable[str], given: Given, output: Output) -> None:
    for url in result:  # one, and then the folder stays
        emit(output, {"url": url}, f"{url} (Ctrl-C removes it; maelab page writes one that stays)")
        sys.stdout.flush()


# --------------------------------------------------------------------------------------------------------- predictions


def predictions(result: Iterable[dict[str, Any]], given: Given, output: PredictOutput) -> None:
    """Each as soon as it is there; what cannot be read is named on stderr too."""
    from maelab.training.checkpoint import read_spec
    from maelab.training.runlog import say

    count = {"read": 0, "unreadable": 0}

    def noted() -> Iterator[dict[str, Any]]:
        for entry in result:
            count["unreadable" if "error" in entry else "read"] += 1
            if "error" in entry:
                say(f"cannot read {entry['path']}: {entry['error']}")
            yield entry

    if output.json:
        _as_json(noted())
    elif output.csv:
        _as_csv(noted(), given["top"])
    else:
        _as_table(noted(), [visible(name) for name in read_spec(given["run"]).class_names])
    if not count["read"]:
        raise RunError("no image could be read") if count["unreadable"] else UsageError("stdin names no image")


def _as_json(entries: Iterable[dict[str, Any]]) -> None:
    """One object, written as it grows."""
    before = '{"predictions": ['
    for entry in entries:
        print(before, json.dumps(entry), sep="", end="")
        before = ", "
    if before == ", ":
        print("]}")


def _as_csv(entries: Iterable[dict[str, Any]], top: int) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # paths are bytes, and stay what they are
    writer = csv.writer(sys.stdout, lineterminator="\n")
    ranks = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    for i, entry in enumerate(entries):
        if i == 0:
            writer.writerow(["path", "error", *(name + rank for rank in ranks for name in ("label", "probability"))])
        row = [csv_cell(entry["path"]), csv_cell(entry.get("error", ""))]
        for guess in entry.get("top", ()):
            row += [csv_cell(guess["label"]), f"{guess['probability']:.6f}"]
        writer.writerow(row + [""] * (2 + 2 * top - len(row)))


def _as_table(entries: Iterable[dict[str, Any]], names: list[str]) -> None:
    """The path comes last, so that columns stand below each other however long it is."""
    from rich.cells import cell_len

    width = max((cell_len(name) for name in names if len(name) <= _LONG), default=4)
    for entry in entries:
        guesses = []
        for guess in entry.get("top", ()):
            label = visible(guess["label"])
            guesses.append(f"{label}{' ' * (width - cell_len(label))} {guess['probability']:6.1%}")
        print("  ".join([*(guesses or ["unreadable".ljust(width + 7)]), visible(entry["path"])]))


_LONG = 60  # characters of a class's name for which a table leaves no room


# ---------------------------------------------------------------------------------------------------------------- runs


def runs(result: dict[str, Any], given: Given, output: RunsOutput) -> None:
    from maelab.runs import known_field

    rows, chosen = result["rows"], result["chosen"]
    if output.columns is None:
        columns = [c for c in _COLUMNS if any(row.get(c) is not None for row in chosen)]
    else:
        columns = [known_field(name.strip(), rows) for name in output.columns.split(",")]
    if chosen:
        text = _table(chosen, columns)
    else:
        text = f"none of the {len(rows)} runs in {given['dir']} fits" if rows else f"there is no run in {given['dir']}"
    emit(output, {"runs": chosen}, text, styled=bool(chosen))


_COLUMNS = ("path", "task", "recipe", "seed", "epochs")
_COLUMNS += ("val.masked_mse", "val.knn_accuracy", "val.accuracy", "test.accuracy")


def _table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as a table as wide as the terminal, or 100 columns; where that is too narrow, paths are folded."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from maelab.runs import as_text

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in columns:
        numbers = all(isinstance(row.get(name), int | float | None) for row in rows)
        heading = re.sub(r"([._])", r"\1\n", visible(name))
        justify, long = "right" if numbers else "left", name in ("path", "init", "data")
        table.add_column(heading, justify=justify, no_wrap=not long, overflow="fold", min_width=20 if long else None)
    for row in rows:
        cells = []
        for name in columns:
            value = row.get(name)
            if name == "epochs" and not row["complete"]:
                cells.append(visible(f"{row['epochs_done']} of {value}"))
            elif isinstance(value, float):
                cells.append(f"{value:.4f}" if "." in name else f"{value:g}")
            else:
                cells.append("" if value is None else visible(as_text(value)))
        table.add_row(*cells, style=None if row["complete"] else "dim")
    terminal = sys.stdout.isatty()
    console = Console(file=io.StringIO(), markup=False, highlight=False, emoji=False, force_terminal=terminal or None)
    console.width = shutil.get_terminal_size().columns if terminal else 100
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")  # type: ignore
