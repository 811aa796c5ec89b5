"""Sweeps: the same pretraining over a grid of settings, each cell judged by what its encoder is good for."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from maelab import figures
from maelab.config import FinetuneConfig, PretrainConfig, ProbeConfig, RunOptions
from maelab.errors import MaelabError
from maelab.runs import is_complete, read_json, write_json
from maelab.tasks.finetune import finetune
from maelab.tasks.pretrain import pretrain
from maelab.tasks.probe import probe
from maelab.training.loop import Interrupted
from maelab.training.runlog import in_words, part_of, say

JUDGEMENTS = ("masked_mse", "knn_accuracy", "linear_accuracy", "finetune_accuracy")


def run_cell(config: PretrainConfig, finetuning: FinetuneConfig, folder: Path, options: RunOptions) -> dict[str, float]:
    """Pretrain one cell, then judge it on validation; what is complete in `folder` is not done again.

    Returns:
        masked_mse, knn_accuracy, linear_accuracy and finetune_accuracy, all on validation.
    """
    done: dict[str, dict[str, Any]] = {}
    init = str(folder / "pretrain")
    probing = ProbeConfig(init=init, val_fraction=config.val_fraction, split_seed=config.split_seed, seed=config.seed)
    configs = {"pretrain": config, "probe": probing, "finetune": replace(finetuning, init=init)}
    for name, task in (("pretrain", pretrain), ("probe", probe), ("finetune", finetune)):
        place = folder / name
        if not is_complete(place):
            task(configs[name], options=replace(options, out=place, overwrite=False), recipe="sweep")  # type: ignore[operator]
        done[name] = read_json(place / "result.json")["val"]
    return {
        "masked_mse": done["pretrain"]["masked_mse"],
        "knn_accuracy": done["probe"]["knn_accuracy"],
        "linear_accuracy": done["probe"]["accuracy"],
        "finetune_accuracy": done["finetune"]["accuracy"],
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
    rows: list[dict[str, Any]] = []
    taken: list[float] = []  # seconds, by the cells that were not done before
    for number, (settings, config) in enumerate(cells.items(), 1):
        name = ",".join(f"{field}={value}" for field, value in settings)
        row: dict[str, Any] = {"settings": dict(settings)}
        title, begun = f"cell {number} of {len(cells)}: {name.replace(',', ', ')}", time.perf_counter()
        fresh = not is_complete(out / name / "finetune")
        try:
            with part_of(title):
                row |= run_cell(config, finetuning, out / name, options)
            said = "  ".join(f"{judgement} {row[judgement]:.4f}" for judgement in JUDGEMENTS)
        except Interrupted:
            raise
        except MaelabError as error:
            row["error"] = said = str(error)
        taken += [time.perf_counter() - begun] if fresh else []
        left = sum(taken) / max(1, len(taken)) * (len(cells) - number)
        say(f"{title}  {said}" + (f"  about {in_words(left)} left" if taken and number < len(cells) else ""))
        rows.append(row)
        write_json(out / "sweep.json", _ranked(rows, complete=number == len(cells)))
    result = _ranked(rows, complete=True)
    fields = [field for field, _ in next(iter(cells))]
    if len(fields) == 2:
        for judgement in JUDGEMENTS:
            values = {tuple(row["settings"].values()): row.get(judgement) for row in rows}
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
