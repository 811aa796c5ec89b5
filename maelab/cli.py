"""The command line: a table from a command to the function that does it, whose signature is the command's, and to what
is printed. Heavy imports happen when the function is called, so that help is fast.

People read stderr; programs read stdout, which carries one JSON object with --json and the main result without.
Exit status: 0 done, 1 the work failed, 2 bad usage, 130 interrupted after saving.
"""

import difflib
import importlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import maelab
from maelab import printing, recipes
from maelab.commandline import Signature, cut, help_of, parse, read
from maelab.config import FinetuneConfig, PretrainConfig, ProbeConfig
from maelab.errors import UsageError
from maelab.printing import Output, PredictOutput, RunsOutput


@dataclass(frozen=True)
class Command:
    """'module:function' that does it, and the function that prints what came out; `first`: see `commandline.read`;
    `begins`: what to say before torch is there, which takes seconds."""

    task: str
    show: Callable[[Any, dict[str, Any], Any], None]
    first: str = ""
    output: type = Output
    begins: str = ""


COMMANDS = {
    "data": Command("maelab.cli:data", printing.data),
    "data shard": Command("maelab.cli:shard", printing.sharded, begins="maelab data shard: looking at files"),
    "pretrain": Command("maelab.tasks.pretrain:pretrain", printing.pretrained, first="recipe"),
    "finetune": Command("maelab.tasks.finetune:finetune", printing.finetuned, first="recipe"),
    "fit": Command("maelab.fitting:fit", printing.fitted, begins="maelab fit: looking at the images"),
    "probe": Command("maelab.tasks.probe:probe", printing.probed, first="init"),
    "evaluate": Command("maelab.tasks.evaluate:evaluate", printing.evaluated),
    "predict": Command("maelab.tasks.predict:predict", printing.predictions, output=PredictOutput),
    "reconstruct": Command("maelab.tasks.reconstruct:reconstruct", printing.reconstructed),
    "attention": Command("maelab.tasks.attention:attention", printing.attention),
    "features": Command("maelab.tasks.features:features", printing.features),
    "similar": Command(
        "maelab.tasks.similar:similar", printing.similar, begins="maelab similar: looking at the images"
    ),
    "map": Command("maelab.tasks.map:map_images", printing.mapped, begins="maelab map: looking at the images"),
    "odd": Command("maelab.tasks.odd:odd", printing.odd, begins="maelab odd: looking at the images"),
    "sweep": Command("maelab.sweep:sweep", printing.swept, first="recipe"),
    "runs": Command("maelab.cli:runs", printing.runs, output=RunsOutput),
    "report": Command("maelab.report:report", printing.report),
    "page": Command("maelab.page:page", printing.page, begins="maelab page: converting the models"),
    "demo": Command("maelab.page:demo", printing.demo, begins="maelab demo: converting the models"),
    "info": Command("maelab.cli:info", printing.info),
    "export": Command("maelab.export:export", printing.exported),
    "bench": Command("maelab.bench:bench", printing.bench),
}


def data(names: Sequence[str], *, data_dir: Path | None = None) -> dict[str, Any]:
    """Download and verify data sets.

    Args:
        names: mnist, fashion-mnist, cifar10.
        data_dir: folder that holds the files already; they are only verified.

    Returns:
        {"data": name -> folder}.
    """
    from maelab.data import obtain

    return {"data": {name: str(obtain(name, data_dir)) for name in names}}


def shard(
    folder: Path, out: Path, *, labels: str | None = None, group: str | None = None, shard_mb: int = 256
) -> dict[str, Any]:
    """Write the images of a folder into shards, for training on more than fits into memory.

    OUT is then a folder of images like any other: maelab fit OUT, or --data folder:OUT. Each image is decoded once to
    see that it can be; its bytes are kept as they are. OUT appears when all is written, and not before.

    Args:
        folder: images, in any layout that a folder may have; or an archive, or a table of them.
        out: folder to write, new or empty.
        labels: table with the classes, PATH or PATH:COLUMN; None takes labels.csv or metadata.csv in the folder.
        group: keep images together on one side of every split: a column of that table, or a regular expression for
            what their paths share, such as 'video_[0-9]+'.
        shard_mb: megabytes of a shard, about.

    Returns:
        See `maelab.data.sharding.shard`.
    """
    from maelab.data import sharding

    return sharding.shard(folder, out, labels=labels, group=group, shard_mb=shard_mb)


def runs(
    dir: Path = Path("runs"), *, filter: Sequence[str] = (), sort: str | None = None, descending: bool = False
) -> dict[str, Any]:
    """List runs and their results, filtered and sorted.

    Args:
        dir: folder to look through.
        filter: 'field=value', or with != and, for numbers, <, >, <=, >=; quote it; may be given several times.
        sort: field to sort by.
        descending: from the highest to the lowest.

    Returns:
        {"rows": all summaries, "chosen": those that fit, in order}.
    """
    from maelab.runs import select, summaries

    rows = summaries(dir)
    return {"rows": rows, "chosen": select(rows, filter, sort, descending)}


def info(run: Path) -> dict[str, Any]:
    """Say what a run folder holds.

    Args:
        run: run folder or checkpoint.

    Returns:
        {"run", "complete", "config", "epochs_done"} and, once there is a checkpoint, its model and the results.
    """
    from maelab import runs

    folder = runs.locate(run)
    config, result, metrics = runs.config_of(folder), runs.result_of(folder), runs.read_metrics(folder)
    about: dict[str, Any] = {"run": str(run), "complete": runs.is_complete(folder)}
    if "task" in config and not metrics:
        return about | {"config": config, "epochs_done": 0}
    spec, _ = runs.read_checkpoint(runs.find_checkpoint(run))
    about |= {key: spec[key] for key in ("model", "arguments", "class_names")}
    about |= {"config": config, "epochs_done": max((row["epoch"] for row in metrics), default=0)}
    return about | {"last_metrics": metrics[-2:], "result": result, "env": runs.environment_of(folder)}


def _config(kind: Any, recipe: str, typed: dict[str, Any]) -> tuple[Any, str]:
    """The config of a recipe, changed by the fields that were typed, and the name for its run folder."""
    if kind is ProbeConfig:
        from maelab import runs

        init, config = typed["init"], kind(**typed)
        if config.data == "same":  # and so are the images to validate on, which the encoder did not see
            config = kind(**{**runs.split_of(runs.locate(init)), **typed})
        return config, Path(init).name.replace(":", "-")
    task = "pretrain" if kind is PretrainConfig else "finetune"
    config = replace(recipes.get(task, recipe), **typed)
    if recipe == "folder":
        config = replace(_for_folder(task, config, typed), **typed)
    if config.init != "none":
        from maelab.runs import saved_elsewhere
        from maelab.tasks.finetune import with_encoder_of
        from maelab.tasks.pretrain import with_shape_of
        from maelab.training.checkpoint import read_spec

        like = with_shape_of if isinstance(config, PretrainConfig) else with_encoder_of
        if isinstance(config, FinetuneConfig) and saved_elsewhere(config.init):
            config = replace(config, **{**recipes.FOR_FOREIGN, **typed})
        fitting = like(config, read_spec(config.init))  # type: ignore[arg-type]
        for name, given in typed.items():
            if given != (needed := getattr(fitting, name)):
                resizes = name == "patch_size" and task == "finetune"
                hint = "; --adapt-patch-embed resize makes it fit" if resizes else ""
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} {given} does not fit --init {config.init}, which has {needed}{hint}")
    return config, recipe


def _for_folder(task: str, given: Any, typed: dict[str, Any]) -> Any:
    """The config of recipe folder for the images that lie there; says what was found and chosen."""
    if "data" not in typed:
        raise UsageError(f"{task} folder needs --data folder:PATH, your folder of images")
    from maelab.data import reading_of
    from maelab.data.folder import scan
    from maelab.training.checkpoint import read_spec
    from maelab.training.runlog import say

    found, init = scan(given.data, reading_of(given)), getattr(given, "init", "none")
    fixed = {field: typed[field] for field in ("img_size", "patch_size") if field in typed}
    if init != "none":
        has = read_spec(init).arguments
        fixed = {"img_size": tuple(has.get("img_size", ())) or None, "patch_size": has.get("patch_size")} | fixed
    images = found.labelled if task == "finetune" else found.labelled + found.unlabelled
    config: Any = recipes.get(task, "folder", images=images, side=found.side, grey=found.grey, **fixed)
    for line in [*found.lines(), recipes.explain_folder(config, images, found.side, found.channels, found.val, init)]:
        say(line)
    return config


def signature(name: str, words: Sequence[str] = ()) -> Signature:
    """The signature of a command; where the words begin with a recipe, the defaults are its."""
    command = COMMANDS[name]
    found = read(name, command.task, command.output, command.first)
    if command.first != "recipe":
        return found
    task = "finetune" if found.owners["config"] is FinetuneConfig else "pretrain"
    usual = recipes.get(task, words[0] if words and not words[0].startswith("-") else "mnist")
    options = [replace(o, default=getattr(usual, o.name)) if o.owner == "config" else o for o in found.options]
    options = [replace(o, help=", ".join(recipes.names(task))) if o.name == "recipe" else o for o in options]
    return replace(found, options=tuple(options))


def _run(words: Sequence[str]) -> None:
    name, *rest = words or ["--help"]
    if (both := " ".join(words[:2])) in COMMANDS:  # a command of two words
        name, rest = both, [*words[2:]]
    if name in ("-h", "--help", "help"):
        print(f"{maelab.__doc__}\n\nusage: maelab COMMAND ...; maelab COMMAND --help says more\n")
        for found in map(signature, COMMANDS):
            about = found.about[:1].lower() + found.about[1:].rstrip(".")
            print(f"  {found.command:12s} {about}: {found.usage}")
    elif name == "--version":
        print(maelab.__version__)
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        raise UsageError(f"there is no command {name!r}; {hint}")
    elif {"-h", "--help"} & {*cut(rest)[0]}:
        print(help_of(signature(name, rest)), end="")
    else:
        _call(COMMANDS[name], signature(name, rest), rest)


def _call(command: Command, signature: Signature, words: Sequence[str]) -> None:
    typed = parse(signature, words)
    arguments, output = typed.pop(""), command.output(**typed.pop("output"))
    if "config" in typed:
        kind, recipe = signature.owners["config"], arguments.get("recipe", "")
        arguments["config"], arguments["recipe"] = _config(kind, recipe, typed.pop("config"))
    arguments |= {owner: signature.owners[owner](**fields) for owner, fields in typed.items()}
    if command.begins:
        print(command.begins, file=sys.stderr, flush=True)
    module, _, function = command.task.partition(":")
    result = getattr(importlib.import_module(module), function)(**arguments)
    if isinstance(result, tuple):  # of a training
        result = {"run": str(result[0]), **result[1]}
    command.show(result, arguments, output)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words, after = cut(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"] + ["--", *after] * bool(after)
    if arguments is None:  # the process is this command's
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that temporary files go away
        sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - it was closed before the start
        if not debug:
            threading.excepthook = lambda thrown: printing.complain(printing.explain(thrown.exc_value)[0])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal cannot show ends no command
    try:
        _run(words)
        sys.stdout.flush()
        return 0
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and printing.reader_has_gone():
            printing.drop()
            return 0
        if arguments is None:
            for number in (signal.SIGINT, signal.SIGTERM):  # once more ends all at once, without a traceback
                signal.signal(number, signal.SIG_DFL)
        message, status = printing.explain(error)
        if debug and status != 130:
            traceback.print_exc()
    try:
        sys.stdout.flush()
    except OSError:  # it may be what failed, and would fail again at exit
        printing.drop()
    printing.complain(message)
    return status
