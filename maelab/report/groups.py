"""Run folders as data: what each run was, which differ only in their seed, and which may be compared."""

import dataclasses
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
BUDGET = ("data", "label_fraction", "epochs", "limit", "batch_size", "img_size", "val_fraction", *ENCODER)
AUGMENT = (*(f.name for f in dataclasses.fields(Augment)), "mixup", "cutmix")
ADAPTED = {"adapt_patch_embed": "patch embedding", "adapt_pos_embed": "position embedding"}
PLAIN = {f.name: f.default for f in dataclasses.fields(FinetuneConfig) if f.name in AUGMENT}
GENERIC = {"pretrain", "finetune", "probe"}  # folder names that many runs share


class Statistic(NamedTuple):
    """Mean, sample standard deviation (None of one value) and count."""

    mean: float
    deviation: float | None
    n: int


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

    @property
    def start(self) -> str:
        """Where the weights came from, in words: 'from scratch', 'from MNIST MAE', 'from runs/x'."""
        if self.config["init"] == "none":
            return "from scratch"
        if self.origin is None:
            return f"from {self.config['init']}"
        return f"from {title(self.origin.data)} {'MAE' if self.origin.task == 'pretrain' else 'classifier'}"


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

    @property
    def data(self) -> str:
        return self.runs[0].data

    @property
    def start(self) -> str:
        return self.runs[0].start

    def values(self, *path: str) -> list[float]:
        """A number of the results, of each finished run that has it."""
        return [value for run in self.done if (value := number(run.result, *path)) is not None]

    def measured(self, *path: str) -> Statistic | None:
        return mean_sd(self.values(*path))

    def mean(self, *path: str) -> float | None:
        value = self.measured(*path)
        return value and value.mean

    def by_epoch(self, split: str, quantity: str) -> dict[int, Statistic]:
        """A number of the metrics after each epoch, over the finished runs that have it, in the order of epochs."""
        values: dict[int, list[float | None]] = {}
        for row in (row for run in self.done for row in run.metrics if row["split"] == split):
            values.setdefault(row["epoch"], []).append(number(row, quantity))
        return {epoch: summary for epoch, found in sorted(values.items()) if (summary := mean_sd(found))}


@dataclass(frozen=True)
class Sweep:
    """A sweep: its cells (settings, judgements or error) and the runs below it."""

    name: str
    content: dict[str, Any]
    runs: tuple[Run, ...]


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
    cells = {path for path in found if not sweeps.keys().isdisjoint(path.parents)}
    runs: list[Run] = []
    for path in sorted(found, key=cells.__contains__):  # stable
        try:
            runs.append(_read(path, found[path], len(runs) + 1, path in cells))
        except (RunError, OSError) as error:
            problems.append((found[path], str(error)))
    runs = [_with_origin(run, runs) for run in runs]
    grids = []
    for path, name in sweeps.items():
        try:
            grids.append(Sweep(name, sweep_of(path), tuple(run for run in runs if path in run.folder.parents)))
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
        else:  # a number, or None for one or several, or for a text
            fits = number(config, key) is not None or (value is None and isinstance(given, list | str | None))
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
    if run.config["init"] == "none":
        return None
    parts = run_of(run.config["init"]).parts
    scores: dict[int, list[Run]] = {}
    for other in runs:
        if other is run or other.task == "probe":
            continue
        if run.task == "finetune" and any(other.config.get(f, 0) != run.config.get(f, 0) for f in ENCODER):
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
    config = {k: v for k, v in run.config.items() if k not in ("seed", "split_seed", "recipe", "knn_every")}
    return _key(config | {"init": _start(run)})


def _start(run: Run) -> str:
    """What the weights were at first, but for the seed."""
    return _identity(run.origin) or re.sub(r"(?<![a-z])(s|seed)([-_=]?)\d+", r"\1\2*", run.config["init"])


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
        shared = _key([run.task, run.data, *(run.config.get(f, getattr(FinetuneConfig, f, None)) for f in fields)])
        by_family.setdefault(shared, {}).setdefault(_identity(run), []).append(run)
    return [_named([sorted(g, key=lambda run: run.config["seed"]) for g in f.values()]) for f in by_family.values()]


def _named(groups: list[list[Run]]) -> list[Group]:
    firsts = [group[0] for group in groups]
    varying = _differing(firsts)
    recipe, usual = nearest_recipe(firsts[0].config) if firsts[0].task != "probe" else ("", {})
    names = []
    for run in firsts:
        few = run.task == "pretrain" and len(varying) < 3  # then each value is said, the recipe's own too
        changed = [k for k in varying if few or _key(run.config.get(k)) != _key(usual.get(k))]
        said = {k: run.config.get(k) for k in changed}
        words = [] if run.task == "pretrain" else [run.start]
        rivals = [other.origin for other in firsts if other.origin and words and other.start == words[0]]
        if run.origin and rivals:
            before = {k: run.origin.config.get(k) for k in _differing(rivals)}
            of_start = [phrase(k, value) for k, value in before.items() if k not in said or said[k] != value]
            words = [f"{words[0]} ({', '.join(of_start)})"] if of_start else words
        if set(changed) & set(AUGMENT) and all(run.config.get(k, v) == v for k, v in PLAIN.items()):
            words.append("no augmentation")
            changed = [k for k in changed if k not in AUGMENT]
        words += [phrase(k, run.config.get(k)) for k in changed]
        names.append(", ".join(words) or f"recipe {recipe}")
    for name, count in Counter(names).items():  # what no field tells apart, the first folder does
        if count > 1:
            names = [f"{n} ({run.name})" if n == name else n for n, run in zip(names, firsts, strict=True)]
    return [Group(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def _differing(runs: Sequence[Run]) -> list[str]:
    hidden = {"seed", "split_seed", "init", "recipe", "task", "data", "knn_every"}
    return [k for k in runs[0].config if k not in hidden and len({_key(run.config.get(k)) for run in runs}) > 1]


def phrase(name: str, value: Any) -> str:
    """A field of the config and its value, in words."""
    if name == "label_fraction":
        return f"{100 * value:.3g}% of the labels" if value < 1 else "all labels"
    if name in ADAPTED:
        return f"new {ADAPTED[name]}" if value == "reinit" else f"{ADAPTED[name]} {value}"
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {'none' if value is None else value}"


def aspects(run: Run) -> dict[str, Any]:
    """What may differ between two controls: where the weights came from, augmentation as one, every other field."""
    config = {
        k: v
        for k, v in run.config.items()
        if k not in ("seed", "split_seed", "init", "recipe", "task", "knn_every", *AUGMENT)
    }
    if run.config["init"] == "none":
        config = {k: v for k, v in config.items() if not k.startswith("adapt_")}
        config |= {f.name: f.default for f in dataclasses.fields(FinetuneConfig) if f.name.startswith("adapt_")}
    return {**config, "init": _start(run), "augmentation": [run.config.get(k) for k in AUGMENT]}


def mean_sd(values: Iterable[float | None]) -> Statistic | None:
    """The statistic of the numbers among the values."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Statistic(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


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
