"""What a page is made of, and the words and numbers that its sections share."""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maelab.errors import RunError
from maelab.names import visible
from maelab.report.figures import data_uri, drawn, picture
from maelab.report.groups import AUGMENT, BUDGET, Group, Run, Statistic, Sweep, command, families, number, phrase
from maelab.runs import figure_of

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Better:
    """A cell of ours that is at least as good as the published one beside it."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells: text, or a tuple of run numbers; `words` are the columns that are not numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    words: frozenset[int] = frozenset({0})
    commands: Sequence[str] = ()


def filled(table: Table) -> Table:
    """The table without the columns that no row has anything in."""
    kept = [column for column in range(len(table.head)) if any(row[column] != NONE for row in table.rows)]
    rows = [[row[column] for column in kept] for row in table.rows]
    words = frozenset(place for place, column in enumerate(kept) if column in table.words)
    return replace(table, head=[table.head[column] for column in kept], rows=rows, words=words)


@dataclass(frozen=True)
class Image:
    """A picture as data, for light and, where it was drawn here, for dark paper; `caption` where it is one of many, and
    `file` where it is one of a run."""

    alt: str
    light: str
    dark: str = ""
    caption: str = ""
    file: Path | None = None


@dataclass(frozen=True)
class Figure:
    """Images with one caption, the runs they show and the commands that make those."""

    caption: str
    images: Sequence[Image]
    runs: tuple[int, ...]
    commands: Sequence[str]
    narrow: bool = False


@dataclass(frozen=True)
class Section:
    """A chapter of the page."""

    id: str
    title: str
    text: Sequence[str]
    blocks: Sequence[Table | Figure]


@dataclass(frozen=True)
class Material:
    """What the sections are made from: the runs, where to draw, and where to note what cannot be shown, as (name of the
    run, problem)."""

    runs: Sequence[Run]
    sweeps: Sequence[Sweep]
    folder: Path
    problems: list[tuple[str, str]]

    def of(self, task: str, sweeps: bool = False) -> list[Run]:
        return [run for run in self.runs if run.task == task and (sweeps or not run.in_sweep)]

    def done(self, task: str, sweeps: bool = False, fields: Sequence[str] = BUDGET) -> list[Group]:
        """Groups of all families, those with a finished run."""
        return [group for family in families(self.of(task, sweeps), fields) for group in family if group.done]


def show(value: Statistic | float | None, digits: int = 4) -> str:
    """0.9943 ± 0.0004, as mean and sample standard deviation; one number alone; a dash for none."""
    if isinstance(value, Statistic):
        return show(value.mean) + (f" ± {value.deviation:.4f}" if value.deviation is not None else "")
    return NONE if value is None else f"{value:.{digits}f}"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def duration(seconds: float | None) -> str:
    """Seconds in the unit that people would use."""
    if seconds is None:
        return NONE
    if seconds < 9.5:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def parameters(group: Group) -> str:
    params = number(group.done[0].result, "params")
    return NONE if params is None else f"{params / 1e6:.2f}M"


def numbers(groups: Iterable[Group]) -> tuple[int, ...]:
    return tuple(run.number for group in groups for run in group.runs)


def commands(runs: Iterable[Run]) -> list[str]:
    """Of the runs, each after the run that it starts from."""
    lines: dict[str, None] = {}
    for run in runs:
        lines |= dict.fromkeys(command(r) for r in (run.origin and run.origin.origin, run.origin, run) if r)
    return list(lines)


def figure(caption: str, images: Sequence[Image], runs: Sequence[Run], narrow: bool = False) -> Figure:
    return Figure(caption, images, tuple(run.number for run in runs), commands(runs), narrow)


def draw(material: Material, name: str, alt: str, how: Callable[..., None], *arguments: Any) -> Image:
    light, dark = drawn(material.folder, name, how, *arguments)
    return Image(alt, data_uri(light.read_bytes()), data_uri(dark.read_bytes()))


def found(material: Material, run: Run, name: str, alt: str) -> Image | None:
    """A picture of the run folder, as it is."""
    try:
        content = picture(run.folder, name)
    except (RunError, OSError) as error:
        material.problems.append((run.name, str(error)))
        return None
    return Image(alt, data_uri(content), file=figure_of(run.folder, name)) if content else None


def slug(*words: object) -> str:
    """A name for a file, from words that may hold anything."""
    whole = "-".join(str(word) for word in words)
    kept = "-".join(re.findall("[a-z0-9]+", whole.lower()))
    return kept if len(kept) <= 80 else f"{kept[:70]}-{zlib.crc32(visible(whole).encode()):08x}"


def validated(group: Group) -> float:
    """What choices rest on: mean validation accuracy, the best of several being the highest."""
    value = group.mean("val", "accuracy")
    return -math.inf if value is None else value


def extra(group: Group) -> str:
    """What the group's name says beside the start."""
    rest = group.name.removeprefix(group.start)
    return rest if rest.startswith(", ") else ""


def describe(config: dict[str, Any]) -> str:
    """Budget and model of a family, in words."""
    model = f"patch {config['patch_size']}, width {config['embed_dim']}, {config['depth']} blocks"
    share = f", {config['limit']} images at most" if config["limit"] else ""
    if config.get("label_fraction", 1.0) < 1:
        share += f", {phrase('label_fraction', config['label_fraction'])}"
    return f"{counted(config['epochs'], 'epoch')}, {model}, batch {config['batch_size']}{share}"


def augmented(config: dict[str, Any]) -> bool:
    switches = (k for k in AUGMENT if k not in ("crop_scale", "rand_augment_magnitude"))
    return any(map(config.get, switches)) or config.get("crop_scale", 1.0) < 1


def plain_loss(config: dict[str, Any]) -> bool:
    """Whether the training loss is plain cross-entropy of unaltered images."""
    return not config["label_smoothing"] and not augmented(config)


def best_classifiers(material: Material) -> dict[tuple[str, str], Group]:
    """(data, start) -> the group with the best mean validation accuracy."""
    best: dict[tuple[str, str], Group] = {}
    for group in material.done("finetune"):
        key = (group.data, group.start)
        best[key] = max(best.get(key, group), group, key=validated)
    return dict(sorted(best.items(), key=lambda item: (item[0][0] != "mnist", item[0][0], -validated(item[1]))))
