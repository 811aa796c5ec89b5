"""Sweeps: the same pretraining over a grid of settings, each cell judged by what its encoder is good for."""

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from maelab import commandline, figures, recipes
from maelab.config import FinetuneConfig, PretrainConfig, ProbeConfig, RunOptions
from maelab.errors import MaelabError, UsageError
from maelab.runs import HoldsAnother, is_complete, open_collection, write_json
from maelab.runs import folder as folders
from maelab.runs.listing import SWEEP
from maelab.tasks.finetune import finetune
from maelab.tasks.pretrain import pretrain
from maelab.tasks.probe import probe
from maelab.training.loop import Interrupted
from maelab.training.runlog import first_process, in_words, part_of, say

MARKER, ENTRIES = SWEEP, frozenset({"complete", "best", "lowest_masked_mse", "cells"})
JUDGEMENTS = ("masked_mse", "knn_accuracy", "linear_accuracy", "finetune_accuracy")


SHARED = ("data", "seed", "split_seed", "val_fraction", "limit", "img_size", "precision")
FILES = (
    *(f"figures/{judgement}.png" for judgement in JUDGEMENTS),
    *(f"*=*/{task}/{file}" for task in ("pretrain", "probe", "finetune") for file in folders.RUN),
    folders.LOCK, MARKER,
)  # fmt: skip


def run_cell(config: PretrainConfig, finetuning: FinetuneConfig, folder: Path, options: RunOptions) -> dict[str, float]:
    """Pretrain one cell, then judge it on validation; what is complete in `folder`, and the same, is not done again.

    Probe and fine-tuning see the images that the autoencoder saw, and validate on those that it did not see.

    Returns:
        masked_mse, knn_accuracy, linear_accuracy and finetune_accuracy, all on validation.
    """
    same = {field: getattr(config, field) for field in SHARED}
    init = str(folder / "pretrain")
    probing = ProbeConfig(init=init, **{field: value for field, value in same.items() if field != "img_size"})

    def done(task: Callable[..., tuple[Path, dict[str, Any]]], config: object) -> dict[str, Any]:
        place = replace(options, out=folder / task.__name__, overwrite=False)
        try:
            return task(config, options=place, recipe="sweep")[1]["val"]
        except HoldsAnother:
            if not options.overwrite:
                raise
            return task(config, options=replace(place, overwrite=True), recipe="sweep")[1]["val"]

    pretrained, probed = done(pretrain, config), done(probe, probing)
    tuned = done(finetune, replace(finetuning, init=init, **same))
    return {
        "masked_mse": pretrained["masked_mse"],
        "knn_accuracy": probed["knn_accuracy"],
        "linear_accuracy": probed["accuracy"],
        "finetune_accuracy": tuned["accuracy"],
    }


def sweep(
    config: PretrainConfig,
    *,
    grid: Sequence[str],
    finetune_epochs: int = 3,
    options: RunOptions | None = None,
    recipe: str = "mnist",
) -> tuple[Path, dict[str, Any]]:
    """Pretrain over a grid of settings and judge each.

    It can be stopped, and goes on where it was; a cell that fails is reported. The best cell is the one with the best
    fine-tuned validation accuracy: reconstruction errors at other patch sizes and mask ratios belong to other tasks, so
    they rank nothing. Both rankings are given.

    Args:
        config: what to pretrain, where the grid says nothing else.
        grid: field=value,value,...: a field of the recipe and the values to try; give it once for each field.
        finetune_epochs: epochs of the fine-tuning that judges each cell.
        options: where to run; `out` is the folder for the cells' run folders, sweep.json and figures/.
        recipe: of the fine-tuning; it names the default folder too.

    Returns:
        The folder and the content of sweep.json: "cells" (settings, judgements or "error"), "best" and
        "lowest_masked_mse" (settings).

    Raises:
        UsageError: before any work, if the grid cannot be read or holds an impossible value.
    """
    cells, options = read_grid(config, grid), options or RunOptions()
    finetuning = recipes.get("finetune", recipe)
    assert isinstance(finetuning, FinetuneConfig)
    finetuning = replace(finetuning, epochs=finetune_epochs)
    out = options.out or Path("runs") / f"sweep-{recipe}"
    with open_collection(out, FILES, MARKER, ENTRIES) if first_process() else contextlib.nullcontext():
        return out, _sweep(cells, finetuning, out, options)


def read_grid(config: PretrainConfig, grid: Sequence[str]) -> dict[tuple[tuple[str, str], ...], PretrainConfig]:
    """The cells of a grid: settings, ((field, value), ...), -> the config with them.

    Raises:
        UsageError: if an axis cannot be read, or a value is impossible.
    """
    known = {option.name: option for option in commandline.fields(PretrainConfig)}
    axes = []
    for axis in grid:
        name, equals, values = axis.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not all(values.split(",")):
            raise UsageError(f"--grid {axis}: write field=value,value,...")
        if name not in known:
            commandline.refuse("--" + name.replace("_", "-"), known.values(), "sweep")
        axes.append([(name, value.strip()) for value in values.split(",")])
    return {
        settings: replace(config, **{name: known[name].convert(value.split()) for name, value in settings})
        for settings in itertools.product(*axes)
    }


def _sweep(
    cells: Mapping[tuple[tuple[str, Any], ...], PretrainConfig],
    finetuning: FinetuneConfig,
    out: Path,
    options: RunOptions,
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    taken: list[float] = []  # seconds, by the cells that were not done before
    for number, (settings, config) in enumerate(cells.items(), 1):
        name = ",".join(f"{field}={value}" for field, value in settings)
        row: dict[str, Any] = {"settings": dict(settings)}
        title, begun = f"cell {number} of {len(cells)}: {name.replace(',', ', ')}", time.perf_counter()
        place = out / name.replace("/", "%2F")  # a value is no path
        fresh = not is_complete(place / "finetune")
        if first_process():
            write_json(out / MARKER, _ranked(rows, complete=False))
        try:
            with part_of(title):
                row |= run_cell(config, finetuning, place, options)
            said = "  ".join(f"{judgement} {row[judgement]:.4f}" for judgement in JUDGEMENTS)
        except Interrupted:
            raise
        except Exception as error:  # whatever ends a cell does not end the others
            row["error"] = said = str(error) if isinstance(error, MaelabError) else f"{type(error).__name__}: {error}"
        taken += [time.perf_counter() - begun] if fresh else []
        left = sum(taken) / max(1, len(taken)) * (len(cells) - number)
        say(f"{title}  {said}" + (f"  about {in_words(left)} left" if taken and number < len(cells) else ""))
        rows.append(row)
    result = _ranked(rows, complete=True)
    if not first_process():
        return result
    write_json(out / MARKER, result)
    fields = [field for field, _ in next(iter(cells))]
    if len(fields) == 2:
        for judgement in JUDGEMENTS:
            values = {tuple(row["settings"].values()): row.get(judgement) for row in rows}
            with figures.optional(f"the picture {judgement}.png could not be drawn"):
                figures.heat_map(
                    out / "figures" / f"{judgement}.png", values, (fields[0], fields[1]), judgement.replace("_", " ")
                )
    return result


def _ranked(rows: list[dict[str, Any]], complete: bool) -> dict[str, Any]:
    finished = [row for row in rows if "error" not in row]
    best = max(finished, key=lambda row: row["finetune_accuracy"], default=None)
    lowest = min(finished, key=lambda row: row["masked_mse"], default=None)
    return {
        "complete": complete,
        "best": best and best["settings"],
        "lowest_masked_mse": lowest and lowest["settings"],
        "cells": rows,
    }
