"""Sweeps: the same pretraining over a grid of settings, each cell judged by what its encoder is good for."""

import contextlib
import itertools
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maelab import commandline, figures, recipes
from maelab.config import FinetuneConfig, PretrainConfig, ProbeConfig, RunOptions
from maelab.errors import MaelabError, RunError, UsageError
from maelab.progress import heartbeat, in_words
from maelab.runs import HoldsAnother, is_complete, open_collection, write_json
from maelab.runs import folder as folders
from maelab.runs.listing import SWEEP
from maelab.runs.mirror import Mirror
from maelab.tasks.finetune import finetune
from maelab.tasks.pretrain import pretrain
from maelab.tasks.probe import probe
from maelab.training.loop import Interrupted
from maelab.training.runlog import console, first_process, part_of, say

MARKER, ENTRIES = SWEEP, frozenset({"complete", "best", "lowest_masked_mse", "cells"})
_LOST = 10  # times that a cell begins again because its machine is gone
_ANSWER = 10.0  # seconds until a cluster answers
_SAVING = 60.0  # seconds that cells have to save themselves
JUDGEMENTS = ("masked_mse", "knn_accuracy", "linear_accuracy", "finetune_accuracy")


SHARED = ("data", "seed", "split_seed", "val_fraction", "limit", "img_size", "precision")
PICTURES = tuple(f"figures/{judgement}.png" for judgement in JUDGEMENTS)
FILES = (  # the marker is removed last, so that what a killed process left is still known as a sweep
    *PICTURES,
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
        mirror = options.mirror and f"{options.mirror}/{task.__name__}"
        place = replace(options, out=folder / task.__name__, mirror=mirror, overwrite=False)
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
    ray: str | None = None,
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
        ray: address of a Ray cluster, HOST:PORT, that computes the cells, as many at a time as it has room for; auto is
            the one that this machine belongs to; local begins one here. --threads says how many processors a cell
            takes.
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
        return out, _sweep(cells, finetuning, out, options, ray)


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
    ray: str | None,
) -> dict[str, Any]:
    names = [",".join(f"{field}={value}" for field, value in settings) for settings in cells]
    work = [
        Cell(
            f"cell {number} of {len(cells)}: {name.replace(',', ', ')}",
            config,
            finetuning,
            out / name.replace("/", "%2F"),
        )
        for number, (name, config) in enumerate(zip(names, cells.values(), strict=True), 1)  # a value is no path
    ]
    fresh = [not is_complete(cell.place / "finetune") for cell in work]
    rows: dict[int, dict[str, Any]] = {}
    begun, computed = time.perf_counter(), 0
    if first_process():
        if options.mirror:
            Mirror(options.mirror, FILES).check()
        write_json(out / MARKER, _ranked([], complete=False))
    for number, found in _here(work, options) if ray is None else on_ray(work, options, ray):
        rows[number] = {"settings": dict([*cells][number])} | found
        said = found.get("error") or "  ".join(f"{judgement} {found[judgement]:.4f}" for judgement in JUDGEMENTS)
        computed += fresh[number]
        left = (time.perf_counter() - begun) / max(1, computed) * (len(work) - len(rows))
        say(f"{work[number].title}  {said}" + (f"  about {in_words(left)} left" if computed and left else ""))
        if first_process():
            write_json(out / MARKER, _ranked([rows[i] for i in sorted(rows)], complete=False))
    result = _ranked([rows[i] for i in sorted(rows)], complete=True)
    if not first_process():
        return result
    write_json(out / MARKER, result)
    fields = [field for field, _ in next(iter(cells))]
    if len(fields) == 2:
        for judgement in JUDGEMENTS:
            values = {tuple(row["settings"].values()): row.get(judgement) for row in result["cells"]}
            with figures.optional(f"the picture {judgement}.png could not be drawn"):
                figures.heat_map(
                    out / "figures" / f"{judgement}.png", values, (fields[0], fields[1]), judgement.replace("_", " ")
                )
    if options.mirror:
        Mirror(options.mirror, (*PICTURES, MARKER)).send(out)
    return result


@dataclass(frozen=True)
class Cell:
    """What a cell is called, what it does, and its folder."""

    title: str
    config: PretrainConfig
    finetuning: FinetuneConfig
    place: Path

    def judge(self, options: RunOptions) -> dict[str, Any]:
        """The judgements of `run_cell`, or {"error": ...}: whatever ends a cell does not end the others."""
        try:
            options = replace(options, mirror=options.mirror and f"{options.mirror}/{self.place.name}")
            return run_cell(self.config, self.finetuning, self.place, options)
        except Interrupted:
            raise
        except Exception as error:
            return {"error": str(error) if isinstance(error, MaelabError) else f"{type(error).__name__}: {error}"}


def _here(work: Sequence[Cell], options: RunOptions) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of a cell from 0, what it came to), one after the other."""
    for number, cell in enumerate(work):
        with part_of(cell.title):
            found = cell.judge(options)
        yield number, found


def on_ray(work: Sequence[Cell], options: RunOptions, address: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of a cell from 0, what it came to), as they end on a Ray cluster.

    A cell whose machine is lost is computed again, from its last checkpoint. All machines need the same maelab, and see
    the images and the sweep's folder under the same paths.

    Raises:
        UsageError: if Ray is not installed, or a cell should be of several processes.
        RunError: if no cluster answers.
        Interrupted: after the cells have saved themselves.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError:
        raise UsageError("--ray needs Ray: pip install 'maelab[ray]'") from None
    if options.devices * options.num_nodes > 1:
        raise UsageError("--ray computes each cell in one process: leave --devices and --num-nodes out")
    _find_cluster(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise RunError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from error
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gpus = 1 if options.device != "cpu" and ray.cluster_resources().get("GPU") else 0
    threads = options.threads or 1
    options = replace(options, threads=threads)
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=_LOST)(_on_a_machine)
    say(f"{len(work)} cells on Ray ({address}), each with {threads} CPU{f' and {gpus} GPU' * gpus}")
    cells = [replace(cell, place=cell.place.absolute()) for cell in work]
    waiting = {task.remote(cell, options, Path.cwd()): number for number, cell in enumerate(cells)}
    beat = heartbeat(f"cells that ended, of {len(work)}")
    try:
        while waiting:
            for ended in ray.wait([*waiting], timeout=1.0)[0]:
                number = waiting.pop(ended)
                try:
                    yield number, ray.get(ended)
                except RayError as error:
                    yield number, {"error": f"Ray: {str(error).strip().splitlines()[-1]}"}
            beat(len(work) - len(waiting))
    except KeyboardInterrupt:
        for cell in waiting:
            ray.cancel(cell)
        ray.wait([*waiting], num_returns=len(waiting), timeout=_SAVING)
        raise Interrupted(f"stopped with {len(waiting)} cells to go; the same command goes on from there") from None
    finally:
        ray.shutdown()


def _find_cluster(address: str) -> None:
    """Ask whether anybody answers at HOST:PORT, since Ray itself tries for many minutes."""
    if address in ("local", "auto"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 2**16:
        raise UsageError(f"--ray {address}: write local, auto, or the address of a cluster as HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
    except OSError as error:
        raise RunError(f"no Ray cluster at {address}: {error.strerror or error}") from error


def _on_a_machine(cell: Cell, options: RunOptions, where: Path) -> dict[str, Any]:
    console.quiet = True
    with contextlib.suppress(FileNotFoundError):  # a machine that shares no disk, but has a mirror
        os.chdir(where)
    return cell.judge(options)


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
