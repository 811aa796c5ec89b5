"""The command line: a table from command to function. Heavy imports happen inside a command, so that help is fast.

People read stderr; programs read stdout, which carries one JSON object with --json and the main result without.
Exit status: 0 done, 1 the work failed, 2 bad usage, 130 interrupted after saving.
"""

import contextlib
import csv
import dataclasses
import difflib
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from maelab import recipes
from maelab.config import ComputeOptions, FinetuneConfig, PretrainConfig, ProbeConfig, RunOptions
from maelab.errors import MaelabError, RunError, UsageError, out_of_memory
from maelab.names import csv_cell, visible

Positional = tyro.conf.Positional


@dataclass(frozen=True)
class Output:
    """What to print."""

    json: bool = False
    """print the result as one JSON object on stdout"""
    debug: bool = False
    """show the traceback of an error"""


def _parse(kind: Any, arguments: list[str], command: str, default: Any = tyro.MISSING_NONPROP) -> Any:
    """Flags to a dataclass; what is wrong becomes one line that names the nearest right flag."""
    known = {"--help"} | _flags(kind)
    for argument in arguments:
        name = argument.split("=")[0].replace("_", "-")
        if argument.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"see maelab {command} --help"
            raise UsageError(f"unknown flag {name}; {hint}")
    said = io.StringIO()
    marks = (tyro.conf.OmitArgPrefixes,)
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=f"maelab {command}", args=arguments, default=default, config=marks)
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise UsageError(f"{_in_one_line(said.getvalue())}; see maelab {command} --help") from None


def _in_one_line(said: str) -> str:
    """What tyro says about wrong arguments, without its frame, headings and advice."""
    text = re.sub(r"[╭╮╰╯│─]+", " ", said.split("Argument helptext")[0].split("For full help")[0])
    text = re.sub(r"\s+", " ", text).strip()
    for heading in ("Value error", "Invalid choice", "Missing argument", "Parsing error"):
        text = text.removeprefix(heading).strip()
    if text.startswith("Required options"):  # no command has a required flag
        return "there is no run folder named"
    if union := re.match(
        r"Error parsing (\S+): no type matching (\S+ ?\S*) could be instantiated from (\[.*?\])", text
    ):
        wanted = union[2].replace("{None}|", "").strip("{}")
        return f"{union[1]} takes {wanted} or None, got {union[3]}"
    text = (
        text.replace("Error parsing ", "")
        .replace("Unrecognized options Un", "Un")
        .replace(" .", "")
        .rstrip(". ")
        .replace(". Expected", ", expected")
    )
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def _flags(kind: Any) -> set[str]:
    flags = set()
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.type):
            flags |= _flags(f.type)
        elif get_args(f.type)[1:] != get_args(Positional[int])[1:]:
            name = f.name.replace("_", "-")
            flags |= {f"--{name}", f"--no-{name}"} if f.type is bool else {f"--{name}"}
    return flags


def _first_process() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _print(output: Output, result: dict[str, Any], *lines: str, styled: bool = False) -> None:
    """Print the result as JSON, or these lines: each stays one, and a terminal obeys nothing in them, unless they are
    `styled` for it."""
    if _first_process():  # with --devices, every process comes by
        text = "\n".join(lines if styled else map(visible, lines))
        print(json.dumps(result) if output.json else text)


def _with_recipe(task: str, arguments: list[str], command: str | None = None) -> tuple[str, Any]:
    """Name and config of the `task` recipe that is the first argument of `command` (None: the task itself)."""
    command = command or task
    if not arguments or arguments[0].startswith("-"):
        if "--help" in arguments or "-h" in arguments:
            print(f"usage: maelab {command} RECIPE [flags]; recipes: {', '.join(recipes.names(task))}\n")
            return "RECIPE", recipes.get(task, "mnist")
        raise UsageError(f"{command} needs a recipe as its first argument: {', '.join(recipes.names(task))}")
    return arguments[0], recipes.get(task, arguments[0])


def _typed(arguments: list[str]) -> set[str]:
    """The fields whose flags are there."""
    flags = (argument.split("=")[0] for argument in arguments if argument.startswith("--"))
    return {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}


def _parse_recipe(kind: Any, task: str, arguments: list[str], command: str | None = None) -> tuple[str, Any]:
    """Name of the recipe, and `kind`, whose first field is its config, parsed; recipe folder looks at the images."""
    recipe, config = _with_recipe(task, arguments, command)
    flags, line = arguments[recipe != "RECIPE" :], f"{command or task} {recipe}"
    args = _parse(kind, flags, line, kind(config))
    if recipe == "folder":
        args = _parse(kind, flags, line, kind(_for_folder(task, args.config, _typed(flags))))
    return recipe, args


def _for_folder(task: str, given: Any, typed: set[str]) -> Any:
    """The config of recipe folder for the images that lie there; says what was found and chosen."""
    if "data" not in typed:
        raise UsageError(f"{task} folder needs --data folder:PATH, your folder of images")
    from maelab.data.folder import scan
    from maelab.training.checkpoint import read_spec
    from maelab.training.runlog import say

    found, init = scan(given.data), getattr(given, "init", "none")
    fixed = {field: getattr(given, field) for field in ("img_size", "patch_size") if field in typed}
    if init != "none":
        has = read_spec(init).arguments
        fixed = {"img_size": tuple(has.get("img_size", ())) or None, "patch_size": has.get("patch_size")} | fixed
    images = found.labelled if task == "finetune" else found.labelled + found.unlabelled
    config: Any = recipes.get(task, "folder", images=images, side=found.side, grey=found.grey, **fixed)
    for line in [*found.lines(), recipes.explain_folder(config, images, found.side, found.grey, init)]:
        say(line)
    return config


def data(arguments: list[str]) -> None:
    """download and verify data sets: mnist, fashion-mnist, cifar10"""

    @dataclass(frozen=True)
    class Arguments:
        names: Positional[tuple[str, ...]]
        """data sets"""
        data_dir: Path | None = None
        """folder that holds the files already; they are only verified"""
        output: Output = field(default_factory=Output)

    args = _parse(Arguments, arguments, "data")
    from maelab.data import NAMES, obtain

    if not args.names:
        raise UsageError(f"data needs a name: {', '.join(NAMES)}")
    places = {name: str(obtain(name, args.data_dir)) for name in args.names}
    _print(args.output, {"data": places}, *(f"{name}: verified, in {place}" for name, place in places.items()))


def pretrain(arguments: list[str]) -> None:
    """pretrain a masked autoencoder: maelab pretrain RECIPE"""

    @dataclass(frozen=True)
    class Arguments:
        config: PretrainConfig
        options: RunOptions = field(default_factory=RunOptions)
        output: Output = field(default_factory=Output)

    recipe, args = _parse_recipe(Arguments, "pretrain", arguments)
    from maelab.tasks.pretrain import pretrain

    folder, result = pretrain(args.config, options=args.options, recipe=recipe)
    val, trivial = result["val"], result["mean_predictor_loss"]
    text = f"masked MSE {val['masked_mse']:.4f} on validation (loss {val['loss']:.4f}, mean predictor {trivial:.4f})"
    _print(args.output, {"run": str(folder), **result}, text, str(folder))


def finetune(arguments: list[str]) -> None:
    """train a classifier: maelab finetune RECIPE --init RUN|none"""

    @dataclass(frozen=True)
    class Arguments:
        config: FinetuneConfig
        options: RunOptions = field(default_factory=RunOptions)
        output: Output = field(default_factory=Output)

    recipe, args = _parse_recipe(Arguments, "finetune", arguments)
    from maelab.tasks.finetune import finetune, with_encoder_of
    from maelab.training.checkpoint import read_spec

    if args.config.init != "none":
        fitting = with_encoder_of(args.config, read_spec(args.config.init))
        for f in dataclasses.fields(fitting):
            given, needed = getattr(args.config, f.name), getattr(fitting, f.name)
            flag = f"--{f.name.replace('_', '-')}"
            if given != needed and f.name in _typed(arguments):
                hint = "; --adapt-patch-embed resize makes it fit" if f.name == "patch_size" else ""
                raise UsageError(f"{flag} {given} does not fit --init {args.config.init}, which has {needed}{hint}")
    folder, result = finetune(args.config, options=args.options, recipe=recipe)
    test, val = result["test"]["accuracy"], result["val"]["accuracy"]
    text = f"test accuracy {test:.4f} (validation {val:.4f}, best epoch {result['best_epoch']} of {result['epochs']})"
    _print(args.output, {"run": str(folder), **result}, text, str(folder))


def fit(arguments: list[str]) -> None:
    """do it all for a folder of images, within a given time: maelab fit FOLDER"""

    @dataclass(frozen=True)
    class Arguments:
        folder: Positional[Path | None] = None
        """images: a sub-folder for each class, those without a class in unlabelled/, or all directly in the folder"""
        minutes: float = 30
        """time to spend"""
        seed: int = 0
        """seed of initialisation, order, augmentation and masks"""
        out: Path | None = None
        """folder for runs, page and verdict; None is runs/fit-NAME. Stopped, the same command goes on"""
        overwrite: bool = False
        """begin anew where the folder holds another fit"""
        options: ComputeOptions = field(default_factory=ComputeOptions)
        output: Output = field(default_factory=Output)

    args = _parse(Arguments, arguments, "fit")
    if args.folder is None:
        raise UsageError("fit needs a folder of images: maelab fit FOLDER")
    from maelab.fit import fit

    result = fit(
        args.folder,
        minutes=args.minutes,
        seed=args.seed,
        out=args.out,
        overwrite=args.overwrite,
        options=args.options,
    )
    lines = [result["verdict"], f"next: {result['next']}", f"page: {result['report']}"]
    lines += [f"picture: {result['reconstruction']}", *([f"model: {result['model']}"] if result["model"] else [])]
    _print(args.output, result, *lines)


def probe(arguments: list[str]) -> None:
    """judge frozen features by k-NN and a linear classifier: maelab probe RUN"""

    @dataclass(frozen=True)
    class Arguments:
        config: ProbeConfig
        options: RunOptions = field(default_factory=RunOptions)
        output: Output = field(default_factory=Output)

    run, rest = ("RUN", arguments) if not arguments or arguments[0].startswith("-") else (arguments[0], arguments[1:])
    if run == "RUN" and "--help" not in arguments and "-h" not in arguments:
        raise UsageError("probe needs a run folder as its first argument: maelab probe RUN")
    args = _parse(Arguments, rest, "probe RUN", Arguments(ProbeConfig(init=run)))
    from maelab.tasks.probe import probe

    folder, result = probe(args.config, options=args.options, recipe=Path(run).name.replace(":", "-"))
    test, val = result["test"], result["val"]
    lines = [
        f"{name} accuracy {test[key]:.4f} on test, {val[key]:.4f} on validation"
        for name, key in (("k-NN", "knn_accuracy"), ("linear", "accuracy"))
    ]
    _print(args.output, {"run": str(folder), **result}, *lines, str(folder))


def evaluate(arguments: list[str]) -> None:
    """measure a finished run on its test or validation images: maelab evaluate RUN"""

    @dataclass(frozen=True)
    class Arguments:
        run: Positional[Path]
        """run folder or checkpoint"""
        data: str | None = None
        """data set; None is the one it was trained on"""
        split: Literal["test", "val"] = "test"
        """which images"""
        mask_ratio: float | None = None
        """share of patches to hide from an autoencoder; None is that of its training"""
        options: ComputeOptions = field(default_factory=ComputeOptions)
        output: Output = field(default_factory=Output)

    args = _parse(Arguments, arguments, "evaluate")
    from maelab.tasks.evaluate import evaluate

    result = evaluate(
        args.run,
        data=args.data,
        split=args.split,
        mask_ratio=args.mask_ratio,
        options=RunOptions(**vars(args.options)),
    )
    where = f"on {result['images']} {args.split} images of {result['data']}"
    if "accuracy" in result:
        lines = [f"accuracy {result['accuracy']:.4f}, loss {result['loss']:.4f} {where}"]
        lines += [f"  {name}: {share:.4f}" for name, share in result["per_class"].items()]
    else:
        lines = [f"masked MSE {result['masked_mse']:.4f} with {result['mask_ratio']:.0%} hidden {where}"]
    _print(args.output, result, *lines)


def reconstruct(arguments: list[str]) -> None:
    """draw original, masked and rebuilt images: maelab reconstruct RUN [IMAGE...]"""

    @dataclass(frozen=True)
    class Arguments:
        run: Positional[Path]
        """run folder or checkpoint of a masked autoencoder"""
        images: Positional[tuple[Path, ...]] = ()
        """image files, folders, globs; none takes test images of the data it was trained on"""
        mask_ratio: tuple[float, ...] = ()
        """one group of rows for each; none is the ratio of training"""
        mask_kind: Literal["random", "block", "grid"] = "random"
        """block: one block for each image; grid: the regular pattern nearest to the ratio"""
        mask_file: Path | None = None
        """what to hide: the dark parts of an image or the 1s of a text, with a cell for each patch or each pixel"""
        sweep: bool = False
        """draw the ratios 0.1 to 0.9, or with --out FILE.gif an animation of vanishing patches"""
        count: int = 8
        """how many images of the data set"""
        seed: int = 0
        """chooses images and masks"""
        out: Path = Path("reconstruction.png")
        """picture to write"""
        options: ComputeOptions = field(default_factory=ComputeOptions)
        output: Output = field(default_factory=Output)

    args = _parse(Arguments, arguments, "reconstruct")
    from maelab.tasks.reconstruct import reconstruct

    result = reconstruct(
        args.run,
        args.images,
        mask_ratios=args.mask_ratio or None,
        mask_kind=args.mask_kind,
        mask_file=args.mask_file,
        sweep=args.sweep,
        count=args.count,
        seed=args.seed,
        out=args.out,
        options=RunOptions(**vars(args.options)),
    )
    lines = [
        f"masked MSE {error:.4f} with {ratio:.0%} hidden ({result['hidden'][ratio]} of {result['patches']} patches);"
        f" mean of the visible pixels {result['visible_mean_mse'][ratio]:.4f}"
        for ratio, error in result["masked_mse"].items()
    ]
    _print(args.output, result, *lines, result["out"])


def attention(arguments: list[str]) -> None:
    """draw where a model looks: maelab attention RUN [IMAGE...]"""

    @dataclass(frozen=True)
    class Arguments:
        run: Positional[Path]
        """run folder or checkpoint of a classifier or a masked autoencoder"""
        images: Positional[tuple[Path, ...]] = ()
        """image files, folders, globs; none takes test images of the data it was trained on"""
        count: int = 8
        """how many images of the data set"""
        seed: int = 0
        """chooses images"""
        out: Path = Path("attention.png")
        """picture to write"""
        options: ComputeOptions = field(default_factory=ComputeOptions)
        output: Output = field(default_factory=Output)

    args = _parse(Arguments, arguments, "attention")
    from maelab.tasks.attention import attention

    options = RunOptions(**vars(args.options))
    result = attention(args.run, args.images, count=args.count, seed=args.seed, out=args.out, options=options)
    _print(args.output, result, f"attention of {result['of']}, over {result['images']} images", result["out"])


def features(arguments: list[str]) -> None:
    """write features of images for other tools: maelab features RUN IMAGE... --out FILE.npz"""

    @dataclass(frozen=True)
    class Arguments:
        run: Positional[Path]
        """run folder or checkpoint of a classifier or a masked autoencoder"""
        images: Positional[tuple[str, ...]] = ()
        """files, folders, globs, or - for paths from stdin; none takes --data"""
        data: str | None = None
        """data set; None is the one it was trained on"""
        split: Literal["train", "val", "test"] = "test"
        """which images of it"""
        pool: Literal["token", "avg"] = "avg"
        """the class token, or the mean of the patch tokens"""
        out: Path = Path("features.npz")
        """file to write: .npz, or .parquet where pyarrow is installed"""
        options: ComputeOptions = field(default_factory=ComputeOptions)
        output: Output = field(default_factory=Output)

    args = _parse(Arguments, arguments, "features")
    from maelab.tasks.features import features

    result = features(
        args.run,
        _with_stdin(args.images) if args.images else (),
        data=args.data,
        split=args.split,
        pool=args.pool,
        out=args.out,
        options=RunOptions(**vars(args.options)),
    )
    _print(args.output, result, f"{result['images']} images, {result['dim']} features each", result["out"])


def predict(arguments: list[str]) -> None:
    """classify images with a fine-tuned model: maelab predict RUN IMAGE..."""

    @dataclass(frozen=True)
    class Arguments:
        run: Positional[Path]
        """run folder or checkpoint of a classifier"""
        images: Positional[tuple[str, ...]] = ()
        """files, folders, globs, or - for paths from stdin, one a line; scaled and cropped as in training, never
        inverted: a model of MNIST expects white digits on black"""
        top: int = 3
        """classes to name for each image"""
        csv: bool = False
        """print CSV instead of a table"""
        gallery: Path | None = None
        """PNG to draw of the first 64 images with their classes"""
        batch_size: int = 256
        """images in memory at a time"""
        options: ComputeOptions = field(default_factory=ComputeOptions)
        output: Output = field(default_factory=Output)

    args = _parse(Arguments, arguments, "predict")
    if not args.images:
        raise UsageError("predict needs images: files, folders, globs, or - for paths from stdin")
    if args.csv and args.output.json:
        raise UsageError("--csv and --json exclude each other")
    from maelab.tasks.predict import predict
    from maelab.training.checkpoint import read_spec
    from maelab.training.runlog import say

    entries = predict(
        args.run,
        _with_stdin(args.images),
        top=args.top,
        batch_size=args.batch_size,
        gallery=args.gallery,
        options=RunOptions(**vars(args.options)),
    )
    count = {"read": 0, "unreadable": 0}

    def noted() -> Iterator[dict[str, Any]]:
        for entry in entries:
            count["unreadable" if "error" in entry else "read"] += 1
            if "error" in entry:
                say(visible(f"cannot read {entry['path']}: {entry['error']}"))
            yield entry

    if args.output.json:
        _predictions_as_json(noted())
    elif args.csv:
        _predictions_as_csv(noted(), args.top)
    else:
        _predictions_as_table(noted(), [visible(name) for name in read_spec(args.run).class_names])
    if not count["read"]:
        raise RunError("no image could be read") if count["unreadable"] else UsageError("stdin names no image")


def _with_stdin(images: Iterable[str]) -> Iterator[str]:
    """The images, with the lines of stdin in the place of each "-"."""
    for image in images:
        lines = sys.stdin.buffer if image == "-" else ()
        yield from (os.fsdecode(line.rstrip(b"\r\n")) for line in lines if line.strip())
        if image != "-":
            yield image


def _predictions_as_json(entries: Iterable[dict[str, Any]]) -> None:
    """One object, written as it grows."""
    before = '{"predictions": ['
    for entry in entries:
        print(before, json.dumps(entry), sep="", end="")
        before = ", "
    if before == ", ":
        print("]}")


def _predictions_as_csv(entries: Iterable[dict[str, Any]], top: int) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # paths are bytes, and stay what they are
    writer = csv.writer(sys.stdout, lineterminator="\n")
    ranks = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    for i, entry in enumerate(entries):
        if i == 0:
            writer.writerow(["path", "error", *(name + rank for rank in ranks for name in ("label", "probability"))])
        ranked = [
            value
            for guess in entry.get("top", ())
            for value in (csv_cell(guess["label"]), f"{guess['probability']:.6f}")
        ]
        about = [csv_cell(entry["path"]), csv_cell(entry.get("error", ""))]
        writer.writerow([*about, *ranked, *[""] * (2 * top - len(ranked))])


def _predictions_as_table(entries: Iterable[dict[str, Any]], names: list[str]) -> None:
    """The path comes last, so that columns stand below each other however long it is."""
    from rich.cells import cell_len

    width = max((cell_len(name) for name in names if len(name) <= _LONG), default=4)
    for entry in entries:
        guesses = [
            f"{label}{' ' * (width - cell_len(label))} {guess['probability']:6.1%}"
            for guess in entry.get("top", ())
            for label in (visible(guess["label"]),)
        ]
        print("  ".join([*(guesses or ["unreadable".ljust(width + 7)]), visible(entry["path"])]))


_LONG = 60  # characters of a class's name for which a table leaves no room


def runs(arguments: list[str]) -> None:
    """list runs and their results, filtered and sorted: maelab runs [DIR]"""

    @dataclass(frozen=True)
    class Arguments:
        dir: Positional[Path] = Path("runs")
        """folder to look through"""
        filter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
        """'field=value', or with != and, for numbers, <, >, <=, >=; quote it; may be given several times"""
        sort: str | None = None
        """field to sort by"""
        descending: bool = False
        """from the highest to the lowest"""
        columns: str | None = None
        """fields to show, a,b,c; --json shows all there are"""
        output: Output = field(default_factory=Output)

    args = _parse(Arguments, arguments, "runs")
    from maelab.runs import known_field, select, summaries

    rows = summaries(args.dir)
    chosen = select(rows, args.filter, args.sort, args.descending)
    if args.columns is None:
        columns = [c for c in _COLUMNS if any(row.get(c) is not None for row in chosen)]
    else:
        columns = [known_field(name.strip(), rows) for name in args.columns.split(",")]
    if chosen:
        text = _table(chosen, columns)
    else:
        text = f"none of the {len(rows)} runs in {args.dir} fits" if rows else f"there is no run in {args.dir}"
    _print(args.output, {"runs": chosen}, text, styled=bool(chosen))


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
        long = name in ("path", "init", "data")
        table.add_column(
            heading,
            justify="right" if numbers else "left",
            no_wrap=not long,
            overflow="fold",
            min_width=20 if long else None,
        )
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


def info(arguments: list[str]) -> None:
    """say what a run folder holds: maelab info RUN"""

    @dataclass(frozen=True)
    class Arguments:
        run: Positional[Path]
        """run folder or checkpoint"""
        output: Output = field(default_factory=Output)

    args = _parse(Arguments, arguments, "info")
    from maelab.runs import (
        config_of,
        environment_of,
        find_checkpoint,
        is_complete,
        locate,
        read_checkpoint,
        read_metrics,
        result_of,
    )

    folder = locate(args.run)
    config, result = config_of(folder), result_of(folder)
    metrics = read_metrics(folder)
    summary: dict[str, Any] = {"run": str(args.run), "complete": is_complete(folder)}
    if "task" in config and not metrics:
        summary |= {"config": config, "epochs_done": 0}
    else:
        spec, _ = read_checkpoint(find_checkpoint(args.run))
        summary |= {key: spec[key] for key in ("model", "arguments", "class_names")}
        summary |= {"config": config, "epochs_done": max((row["epoch"] for row in metrics), default=0)}
        summary |= {"last_metrics": metrics[-2:], "result": result, "env": environment_of(folder)}
    state = "complete" if summary["complete"] else f"unfinished, {summary['epochs_done']} epochs done"
    what = (
        f"{config['task']} {config['recipe']} ({state})" if "task" in config else f"checkpoint of a {summary['model']}"
    )
    lines = [f"{args.run}: {what}"]
    for title in ("arguments", "config", "result"):
        values = summary.get(title) or {}
        lines += [f"{title}:"] + [f"  {key} = {value}" for key, value in values.items()] if values else []
    _print(args.output, summary, *lines)


def sweep(arguments: list[str]) -> None:
    """pretrain over a grid of settings and judge each: maelab sweep RECIPE --grid patch_size=2,4,7"""

    @dataclass(frozen=True)
    class Arguments:
        config: PretrainConfig
        grid: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
        """field=value,value,...: a field of the recipe and the values to try; give it once for each field"""
        finetune_epochs: int = 3
        """epochs of the fine-tuning that judges each cell"""
        options: RunOptions = field(default_factory=RunOptions)
        output: Output = field(default_factory=Output)

    recipe, args = _parse_recipe(Arguments, "pretrain", arguments, "sweep")
    command, flags = f"sweep {recipe}", arguments[recipe != "RECIPE" :]
    axes = []
    for axis in args.grid:
        name, equals, values = axis.partition("=")
        if not equals or not all(values.split(",")):
            raise UsageError(f"--grid {axis}: write field=value,value,...")
        axes.append([(name.strip(), value.strip()) for value in values.split(",")])
    if not axes:
        raise UsageError("maelab sweep needs at least one --grid field=value,value,...")
    cells = {}
    for settings in itertools.product(*axes):  # parsed like flags, so that a wrong one is refused before any work
        more = [word for name, value in settings for word in (f"--{name.replace('_', '-')}", value)]
        cells[settings] = _parse(Arguments, [*flags, *more], command, args).config
    judging = recipes.get("finetune", recipe if recipe != "RECIPE" else "mnist")
    assert isinstance(judging, FinetuneConfig)
    finetuning = dataclasses.replace(
        judging, epochs=args.finetune_epochs, data=args.config.data, limit=args.config.limit,
        seed=args.config.seed, precision=args.config.precision, val_fraction=args.config.val_fraction,
        img_size=args.config.img_size,
    )  # fmt: skip
    from maelab.sweep import sweep

    out = args.options.out or Path("runs") / f"sweep-{recipe}"
    result = sweep(cells, finetuning, out=out, options=args.options)
    lines = []
    for row in result["cells"]:
        named = ", ".join(f"{k} {v}" for k, v in row["settings"].items())
        judged = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float))
        lines.append(f"{named}: {row.get('error') or judged}")
    _print(args.output, {"run": str(out), **result}, *lines, f"best on validation: {result['best']}", str(out))
    if any("error" in row for row in result["cells"]):
        raise RunError("some cells failed; the same command tries them again")


def report(arguments: list[str]) -> None:
    """build one HTML page from run folders: maelab report DIR..."""

    @dataclass(frozen=True)
    class Arguments:
        folders: Positional[tuple[Path, ...]]
        """run folders, sweeps, or folders that hold such at any depth"""
        out: Path = Path("report.html")
        """page to write"""
        figures: Path | None = None
        """folder for the page's drawings as PNG"""
        output: Output = field(default_factory=Output)

    args = _parse(Arguments, arguments, "report")
    from maelab.report import report

    if not args.folders:
        raise UsageError("report needs a folder with runs: maelab report DIR...")
    result = report(args.folders, out=args.out, figures=args.figures)
    _print(args.output, result, result["report"])


def export(arguments: list[str]) -> None:
    """write a model for ONNX, transformers or timm: maelab export RUN --format onnx"""

    @dataclass(frozen=True)
    class Arguments:
        run: Positional[Path]
        """run folder or checkpoint"""
        format: Literal["onnx", "timm", "hf", "safetensors"] = "onnx"
        """onnx: one file for onnxruntime; hf: a folder for transformers; timm: a file of weights under timm's names;
        safetensors: maelab's own checkpoint, a folder"""
        out: Path | None = None
        """what to write; None is named after the run, here"""
        int8: bool = False
        """onnx: matrices in 8 bits, and what that costs on validation images, where the data are at hand"""
        data_dir: Path | None = None
        """folder that holds the data set's files already"""
        output: Output = field(default_factory=Output)

    args = _parse(Arguments, arguments, "export")
    from maelab.export import export

    result = export(args.run, format=args.format, out=args.out, int8=args.int8, data_dir=args.data_dir)
    lines = []
    if args.format == "timm":
        words = ", ".join(f"{name}={value!r}" for name, value in result["arguments"].items())
        lines.append(f"for timm.models.VisionTransformer({words})")
    if args.format == "onnx":
        lines.append(f"opset {result['opset']}, at most {result['max_difference']:.1e} from torch's output in float32")
    if cost := result.get("int8"):
        where = f"on {cost['images']} {cost['split']} images" if "images" in cost else ""
        if "accuracy" in cost:
            text = f"accuracy {cost['accuracy']:.4f} instead of {cost['float32_accuracy']:.4f} {where}"
        elif "relative_error" in cost:
            text = f"features off by {cost['relative_error']:.1%} {where}"
        else:
            text = f"cost not measured: {cost['not_measured']}"
        lines.append(f"int8: {text}")
    _print(args.output, result, *lines, result["out"])


def demo(arguments: list[str]) -> None:
    """open a page to draw digits, hide and rebuild patches, compare models: maelab demo [RUN...]"""

    @dataclass(frozen=True)
    class Arguments:
        runs: Positional[tuple[str, ...]] = ()
        """run folders or checkpoints of autoencoders and classifiers; none takes the weights that maelab ships"""
        images: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
        """file, folder or glob of images to pick from; may be given several times"""
        host: str = "127.0.0.1"
        """address to listen on; any other than this one lets other machines in"""
        port: int = 7860
        """port to listen on; 0 takes a free one"""
        options: ComputeOptions = field(default_factory=ComputeOptions)
        output: Output = field(default_factory=Output)

    args = _parse(Arguments, arguments, "demo")
    from maelab.demo import demo

    def ready(url: str) -> None:
        _print(args.output, {"url": url}, f"{url} (Ctrl-C ends it)")
        sys.stdout.flush()

    options = RunOptions(**vars(args.options))
    demo(args.runs, images=args.images, host=args.host, port=args.port, options=options, ready=ready)


def bench(arguments: list[str]) -> None:
    """measure training speed beside Hugging Face's models and the matrix products alone"""

    @dataclass(frozen=True)
    class Arguments:
        names: Positional[tuple[str, ...]] = ()
        """cases; none measures all"""
        repeats: int = 5
        """turns that each contestant gets"""
        device: Literal["cpu", "cuda"] = "cpu"
        """where to compute"""
        threads: int | None = None
        """CPU threads; None takes one per core"""
        out: Path | None = None
        """folder for a dated JSON file and a row in its README.md"""
        output: Output = field(default_factory=Output)

    args = _parse(Arguments, arguments, "bench")
    from maelab.bench import bench

    result = bench(args.names, repeats=args.repeats, device=args.device, threads=args.threads, out=args.out)
    _print(args.output, result, json.dumps(result))  # people have read the table on stderr


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "data": data,
    "pretrain": pretrain,
    "finetune": finetune,
    "fit": fit,
    "probe": probe,
    "evaluate": evaluate,
    "predict": predict,
    "reconstruct": reconstruct,
    "attention": attention,
    "features": features,
    "sweep": sweep,
    "runs": runs,
    "report": report,
    "demo": demo,
    "info": info,
    "export": export,
    "bench": bench,
}


def _run(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        import maelab

        rows = "\n".join(f"  {name:12s} {function.__doc__}" for name, function in COMMANDS.items())
        print(f"{maelab.__doc__}\n\nusage: maelab COMMAND ...; maelab COMMAND --help says more\n\n{rows}")
    elif command == "--version":
        import maelab

        print(maelab.__version__)
    elif command in COMMANDS:
        COMMANDS[command](arguments[1:])
    else:
        near = difflib.get_close_matches(command, COMMANDS, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        raise UsageError(f"there is no command {command!r}; {hint}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    if arguments is None:
        arguments = sys.argv[1:]
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that temporary files go away
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal cannot show ends no command
    try:
        _run(arguments)
        sys.stdout.flush()
        return 0
    except SystemExit as stop:  # of --help
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:  # the reader of stdout has gone
        _drop_stdout()
        return 0
    except KeyboardInterrupt:
        message, status = "interrupted; the same command starts again, from the last checkpoint if there is one", 130
    except Exception as error:
        message, status = _explain(error)
        if "--debug" in arguments:
            traceback.print_exc()
    try:
        sys.stdout.flush()
    except OSError:  # it may be what failed, and would fail again at exit
        _drop_stdout()
    if _first_process():
        print(visible(f"maelab: {message}"), file=sys.stderr)
    return status


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: Exception) -> tuple[str, int]:
    """One line and an exit status for an error."""
    if isinstance(error, MaelabError):
        return str(error), error.exit_status
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename2 or error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}", 1
    first = (str(error).splitlines() or [""])[0]
    if out_of_memory(error):
        return "there is not enough memory; try a smaller --batch-size, --accumulate 2, or a smaller model", 1
    return f"{type(error).__name__}: {first} (this should not happen; --debug shows where)", 1
