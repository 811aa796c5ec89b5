"""Sweeps: the same pretraining over a grid of settings, each cell judged by what its encoder is good for."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from maelab import figures
from maelab.config import FinetuneConfig, PretrainConfig, ProbeConfig, RunOptions
from maelab.errors import MaelabError
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
    cells: Mapping[tuple[tuple[str, Any], ...], PretrainConfig],
    finetuning: FinetuneConfig,
    *,
    out: Path,
    options: RunOptions | None = None,
) -> dict[str, Any]:
    """Run every cell of a grid and rank them. Can be stopped, and goes on where it was; a cell that fails is reported.

    The best cell is the one with the best fine-tuned validation accuracy: reconstruction errors at other patch sizes
    and mask ratios belong to other tasks, so they rank nothing. Both rankings are given.

    Args:
        cells: settings, ((field, value), ...), -> the config to pretrain.
        finetuning: how each encoder is fine-tuned; `init` is filled in.
        out: folder for the cells' run folders, sweep.json and figures/.
        options: where to run.

    Returns:
        The content of sweep.json: "cells" (settings, judgements or "error"), "best" and "lowest_masked_mse" (settings).
    """
    options = options or RunOptions()
    with open_collection(out, FILES, MARKER, ENTRIES) if first_process() else contextlib.nullcontext():
        return _sweep(cells, finetuning, out, options)


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
