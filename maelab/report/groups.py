"""Run folders as data: what each run was, which differ only in their seed, and which may be compared."""

import dataclasses
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maelab.config import Augment, FinetuneConfig
from maelab.errors import RunError, UsageError
from maelab.runs import (
    CONFIGS,
    commands,
    config_of,
    environment_of,
    find_sweeps,
    is_complete,
    read_metrics,
    result_of,
    run_folders,
    run_of,
    sweep_of,
)
from maelab.runs.commands import ENCODER, flag, line, nearest_recipe

MEASURE = {"pretrain": ("val", "masked_mse"), "finetune": ("test", "accuracy"), "probe": ("test", "accuracy")}
TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
BUDGET = ("data", "label_fraction", "epochs", "limit", "batch_size", "img_size", "val_fraction", "split_seed", *ENCODER)
AUGMENT = (*(f.name for f in dataclasses.fields(Augment)), "mixup", "cutmix")
ADAPTED = {"adapt_patch_embed": "patch embedding", "adapt_pos_embed": "position embedding"}
GENERIC = {"pretrain", "finetune", "probe"}  # folder names that many runs share


@dataclass(frozen=True)
class Run:
    """One run folder, read and checked.

    Args:
        number: on the page, from 1.
        name: path as shown.
        folder: where it lies.
        config: with the defaults of its task filled in, and the precision that was taken where it asks for "auto".
        asked_precision: what the config says itself.
        env: versions, hardware and checksums. metrics: its rows. result: what it came to, {} of an unfinished run.
        in_sweep: whether it is part of a sweep.
        origin: the run that `init` names, where it was given.
    """

    number: int
    name: str
    folder: Path
    config: dict[str, Any]
    asked_precision: str
    env: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    in_sweep: bool
    origin: "Run | None" = None

    @property
    def task(self) -> str:
        return self.config["task"]

    @property
    def asked(self) -> dict[str, Any]:
        """The config as it was asked for."""
        return {**self.config, "precision": self.asked_precision}

    @property
    def data(self) -> str:
        """What it learned on."""
        return str(self.result.get("data", "same")) if self.config["data"] == "same" else self.config["data"]


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed; the name says what sets them apart within their family."""

    name: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> dict[str, Any]:
        return self.runs[0].config

    @property
    def done(self) -> list[Run]:
        """The finished ones, which alone enter means."""
        return [run for run in self.runs if run.result]


@dataclass(frozen=True)
class Sweep:
    """A sweep: its cells (settings, judgements or error) and the runs below it."""

    name: str
    folder: Path
    content: dict[str, Any]
    runs: tuple[Run, ...] = field(default=())


def number(values: object, *path: str) -> float | None:
    """The finite number at values[path[0]][path[1]]..., None where there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    wrong = isinstance(values, bool) or not isinstance(values, int | float) or not math.isfinite(values)
    return None if wrong else float(values)  # type: ignore[arg-type]


def title(data: str) -> str:
    """A data set's name as people write it."""
    return TITLES.get(data, data)


def load(folders: Sequence[Path]) -> tuple[list[Run], list[Sweep], list[tuple[str, str]]]:
    """Every run and sweep at or under the folders.

    Returns:
        Runs (those of sweeps last), sweeps, and (folder as shown, what is wrong) of the damaged folders.

    Raises:
        UsageError: if a folder does not exist or holds no run.
    """
    found: dict[Path, str] = {}
    sweeps: dict[Path, str] = {}
    problems: list[tuple[str, str]] = []
    for given in folders:
        names: dict[Path, str] = {}
        before = len(problems)
        for place in run_folders(given):
            try:
                if "task" in config_of(place):
                    names[place.resolve()] = _shown(place, given)
            except (RunError, OSError) as error:
                problems.append((_shown(place, given), str(error)))
        if not names and len(problems) == before:
            raise UsageError(f"{given} holds no run folder, at any depth")
        for place in find_sweeps(given):
            sweeps.setdefault(place.resolve(), _shown(place, given))
        found = names | found
    runs = []
    order = sorted(found, key=lambda path: any(sweep in path.parents for sweep in sweeps))  # stable
    for path in order:
        try:
            runs.append(_read(path, found[path], len(runs) + 1, any(sweep in path.parents for sweep in sweeps)))
        except (RunError, OSError) as error:
            problems.append((found[path], str(error)))
    runs = [_with_origin(run, runs) for run in runs]
    grids = []
    for path, name in sweeps.items():
        try:
            content = sweep_of(path)
            grids.append(Sweep(name, path, content, tuple(run for run in runs if path in run.folder.parents)))
        except (RunError, OSError) as error:
            problems.append((name, str(error)))
    return runs, grids, list(dict.fromkeys(problems))


def _shown(path: Path, given: Path) -> str:
    """The path from the given folder's name on."""
    return str(path.resolve().relative_to(given.resolve().parent))


def _read(folder: Path, name: str, number_: int, in_sweep: bool) -> Run:
    config = config_of(folder)
    kind = CONFIGS.get(str(config.get("task")))
    if kind is None or not isinstance(config.get("data"), str):
        raise RunError(f"the config of {folder} is damaged: it names no known task and data")
    usual = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    config = {"recipe": "custom", "init": "none", **usual, **config}
    for key, value in {**usual, "recipe": "", "init": ""}.items():
        given = config[key]
        if isinstance(value, bool | str):
            fits = isinstance(given, type(value))
        else:  # a number, or None for one or several
            fits = number(config, key) is not None or (value is None and (given is None or isinstance(given, list)))
        if not fits:
            raise RunError(f"the config of {folder} is damaged: {key} is {given!r}")
    result = result_of(folder) if is_complete(folder) else {}
    if is_complete(folder) and number(result, *MEASURE[config["task"]]) is None:
        raise RunError(f"the result of {folder} is damaged: it holds no {'.'.join(MEASURE[config['task']])}")
    env, asked = environment_of(folder), config.get("precision", "auto")
    taken = re.search(r"\b(fp32|bf16)\b", str(env.get("hardware"))) if asked == "auto" else None
    if taken:
        config["precision"] = taken[0]
    return Run(number_, name, folder, config, asked, env, read_metrics(folder), result, in_sweep)


def _with_origin(run: Run, runs: Sequence[Run], depth: int = 0) -> Run:
    origin = _origin(run, runs) if depth < 8 else None  # files may claim a circle
    return dataclasses.replace(run, origin=origin and _with_origin(origin, runs, depth + 1))


def _origin(run: Run, runs: Iterable[Run]) -> Run | None:
    """The run that `init` names: the same folder, or the only one whose path ends alike and whose encoder fits."""
    init = run.config.get("init", "none")
    if init == "none":
        return None
    parts = run_of(init).parts
    scores: dict[int, list[Run]] = {}
    for other in runs:
        if other is run or other.task == "probe":
            continue
        if run.task == "finetune" and any(other.config[f] != run.config[f] for f in ENCODER):
            continue
        pairs = list(zip(reversed(parts), reversed(other.folder.parts), strict=False))
        alike = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        if alike > (bool(parts) and parts[-1] in GENERIC):
            scores.setdefault(alike, []).append(other)
    best = scores[max(scores)] if scores else []
    return best[0] if len(best) == 1 else None


def _key(values: object) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _identity(run: Run | None) -> str:
    """What a run was, but for the seed: equal for runs that differ in nothing else."""
    if run is None:
        return ""
    config = {k: v for k, v in run.config.items() if k not in ("seed", "init", "recipe", "knn_every")}
    return _key({**config, "init": _start(run)})


def _start(run: Run) -> str:
    """What the weights were at first, but for the seed."""
    init = run.config.get("init", "none")
    seedless = re.sub(r"(?<![a-z])(s|seed)([-_=]?)\d+", r"\1\2*", init)
    return _identity(run.origin) if run.origin else seedless


def start_label(run: Run) -> str:
    """Where the weights came from, in words: 'from scratch', 'from MNIST MAE', 'from runs/x'."""
    if run.config.get("init", "none") == "none":
        return "from scratch"
    if run.origin is None:
        return f"from {run.config['init']}"
    return f"from {title(run.origin.data)} {'MAE' if run.origin.task == 'pretrain' else 'classifier'}"


def families(runs: Iterable[Run], fields: Sequence[str] = BUDGET) -> list[list[Group]]:
    """Groups of runs of one task that agree in the given fields: same data, budget and model.

    Args:
        runs: of one task.
        fields: of the config that a family shares.

    Returns:
        Families in the order of their first runs; in each, groups named by what sets them apart.
    """
    by_family: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        shared = _key([run.task, run.data, *(run.config.get(f) for f in fields)])
        by_family.setdefault(shared, {}).setdefault(_identity(run), []).append(run)
    return [_named([sorted(g, key=lambda run: run.config["seed"]) for g in f.values()]) for f in by_family.values()]


def _named(groups: list[list[Run]]) -> list[Group]:
    configs = [group[0].config for group in groups]
    varying = _differing(configs)
    recipe, usual = nearest_recipe(groups[0][0].config) if groups[0][0].task != "probe" else ("", {})
    names = []
    for run in (group[0] for group in groups):
        few = run.task == "pretrain" and len(varying) < 3  # then each value is said, the recipe's own too
        changed = [k for k in varying if few or _key(run.config.get(k)) != _key(usual.get(k))]
        said = {k: run.config.get(k) for k in changed}
        words = [] if run.task == "pretrain" else [start_label(run)]
        rivals = [g[0].origin.config for g in groups if g[0].origin and words and start_label(g[0]) == words[0]]
        if run.origin and rivals:
            before = run.origin.config
            of_start = [
                phrase(k, before.get(k)) for k in _differing(rivals) if k not in said or said[k] != before.get(k)
            ]
            words = [f"{words[0]} ({', '.join(of_start)})"] if of_start else words
        plain = {f.name: f.default for f in dataclasses.fields(FinetuneConfig) if f.name in AUGMENT}
        if set(changed) & set(AUGMENT) and all(run.config.get(k, v) == v for k, v in plain.items()):
            words.append("no augmentation")
            changed = [k for k in changed if k not in AUGMENT]
        words += [phrase(k, run.config.get(k)) for k in changed]
        names.append(", ".join(words) or f"recipe {recipe}")
    for name, count in Counter(names).items():  # what no field tells apart, the first folder does
        if count > 1:
            names = [f"{n} ({g[0].name})" if n == name else n for n, g in zip(names, groups, strict=True)]
    return [Group(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def _differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    hidden = {"seed", "init", "recipe", "task", "data", "knn_every"}
    return [k for k in configs[0] if k not in hidden and len({_key(c.get(k)) for c in configs}) > 1]


def phrase(name: str, value: Any) -> str:
    """A field of the config and its value, in words."""
    if name == "label_fraction":
        return f"{100 * value:.3g}% of the labels" if value < 1 else "all labels"
    if name in ADAPTED:
        return f"new {ADAPTED[name]}" if value == "reinit" else f"{ADAPTED[name]} {value}"
    words = name.replace("_", " ")
    return (
        ("" if value else "no ") + words if isinstance(value, bool) else f"{words} {'none' if value is None else value}"
    )


def aspects(run: Run) -> dict[str, Any]:
    """What may differ between two controls: where the weights came from, augmentation as one, every other field."""
    config = {k: v for k, v in run.config.items() if k not in ("seed", "init", "recipe", "task", "knn_every", *AUGMENT)}
    if run.config.get("init") == "none":
        config = {k: v for k, v in config.items() if not k.startswith("adapt_")}
        config |= {f.name: f.default for f in dataclasses.fields(FinetuneConfig) if f.name.startswith("adapt_")}
    return {**config, "init": _start(run), "augmentation": [run.config.get(k) for k in AUGMENT]}


def mean_sd(values: Iterable[float | None]) -> tuple[float, float | None, int] | None:
    """Mean, sample standard deviation (None for one value) and count of the numbers among the values."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known)


def measured(group: Group, *path: str) -> tuple[float, float | None, int] | None:
    """mean_sd of a number of the results over the finished runs."""
    return mean_sd(number(run.result, *path) for run in group.done)


def at_epoch(group: Group, epoch: int, split: str, quantity: str) -> tuple[float, float | None, int] | None:
    """mean_sd of a number of the metrics after an epoch, over the finished runs."""
    return mean_sd(
        number(row, quantity)
        for run in group.done
        for row in run.metrics
        if row["epoch"] == epoch and row["split"] == split
    )


def command(run: Run) -> str:
    """The command that makes the run again, from its config."""
    return commands.command(run.asked, init=run.origin.name if run.origin else None, out=run.name)


def sweep_command(sweep: Sweep) -> str:
    """The command that makes a sweep again, from its cells and one cell's configs."""
    settings = [cell["settings"] for cell in sweep.content["cells"]]
    grid = {str(k): list(dict.fromkeys(str(s.get(k)) for s in settings)) for k in (settings[0] if settings else {})}
    words = [word for name, values in grid.items() for word in ("--grid", f"{name}={','.join(values)}")]
    pretrain = next((run for run in sweep.runs if run.task == "pretrain"), None)
    finetune = next((run for run in sweep.runs if run.task == "finetune"), None)
    recipe = "RECIPE"
    if pretrain:
        recipe, base = nearest_recipe(pretrain.config)
        changed = [k for k, v in base.items() if k not in grid and pretrain.asked[k] != v]
        words += [word for k in changed for word in flag(k, pretrain.asked[k])]
    if finetune:
        words += ["--finetune-epochs", str(finetune.config["epochs"])]
    return line(["maelab", "sweep", recipe, *words, "--out", sweep.name])
