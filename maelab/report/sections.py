"""What the page says: sections of paragraphs, tables and figures, each only where the runs have something to say."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maelab import figures as pictures
from maelab.errors import RunError
from maelab.report import published
from maelab.report.figures import COLOURS, curve, data_uri, dots, drawn, fractions, picture
from maelab.report.groups import (
    AUGMENT,
    BUDGET,
    Group,
    Run,
    Sweep,
    aspects,
    at_epoch,
    command,
    families,
    mean_sd,
    measured,
    number,
    start_label,
    sweep_command,
    title,
)

Statistic = tuple[float, float | None, int] | None
JUDGEMENTS = {
    "masked_mse": "masked MSE",
    "knn_accuracy": "k-NN accuracy",
    "linear_accuracy": "linear probe accuracy",
    "finetune_accuracy": "fine-tuned accuracy",
}
NONE = "–"


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
    kind: str = "table"


@dataclass(frozen=True)
class Image:
    """A picture as data, for light and, where it was drawn for that, for dark paper; `name` of the exported PNG."""

    alt: str
    light: str
    dark: str = ""


@dataclass(frozen=True)
class Figure:
    """Images with one caption, the runs they show and the commands that make those."""

    caption: str
    images: Sequence[Image]
    runs: tuple[int, ...]
    commands: Sequence[str]
    kind: str = "figure"


@dataclass(frozen=True)
class Section:
    """A chapter of the page."""

    id: str
    title: str
    text: Sequence[str]
    blocks: Sequence[Table | Figure]


@dataclass(frozen=True)
class Material:
    """What the sections are made from: the runs, where to draw, and where to note what cannot be shown."""

    runs: Sequence[Run]
    sweeps: Sequence[Sweep]
    folder: Path
    note: Callable[[str, str], None]

    def of(self, task: str, sweeps: bool = False) -> list[Run]:
        return [run for run in self.runs if run.task == task and (sweeps or not run.in_sweep)]


def show(value: Statistic) -> str:
    """0.9943 ± 0.0004, as mean and sample standard deviation."""
    if value is None:
        return NONE
    return f"{value[0]:.4f}" + (f" ± {value[1]:.4f}" if value[1] is not None else "")


def duration(seconds: float | None) -> str:
    """Seconds in the unit that people would use."""
    if seconds is None:
        return NONE
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def million(params: float | None) -> str:
    return NONE if params is None else f"{params / 1e6:.2f}M"


def numbers(groups: Iterable[Group]) -> tuple[int, ...]:
    return tuple(run.number for group in groups for run in group.runs)


def commands(runs: Iterable[Run]) -> list[str]:
    """Of the runs, each after the run that it starts from."""
    lines: dict[str, None] = {}
    for run in runs:
        lines |= dict.fromkeys(command(r) for r in (run.origin and run.origin.origin, run.origin, run) if r)
    return list(lines)


def figure(caption: str, images: Sequence[Image], runs: Iterable[Run]) -> Figure:
    shown = list(runs)
    return Figure(caption, images, tuple(run.number for run in shown), commands(shown))


def draw(material: Material, name: str, alt: str, how: Callable[..., None], *arguments: Any) -> Image:
    light, dark = drawn(material.folder, name, how, *arguments)
    return Image(alt, data_uri(light.read_bytes()), data_uri(dark.read_bytes()))


def found(material: Material, run: Run, name: str, alt: str) -> Image | None:
    """A picture of the run folder, as it is."""
    try:
        content = picture(run.folder, name)
    except (RunError, OSError) as error:
        material.note(run.name, str(error))
        return None
    return Image(alt, data_uri(content)) if content else None


def slug(*words: object) -> str:
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in "-".join(str(w) for w in words).lower())
    return "-".join(part for part in kept.split("-") if part)[:80]


def validated(group: Group) -> float:
    """What choices rest on: mean validation accuracy, the best of several being the highest."""
    value = measured(group, "val", "accuracy")
    return value[0] if value else -math.inf


def describe(config: dict[str, Any]) -> str:
    """Budget and model of a family, in words."""
    model = f"patch {config['patch_size']}, width {config['embed_dim']}, {config['depth']} blocks"
    share = f", {config['limit']} images at most" if config["limit"] else ""
    return f"{config['epochs']} epoch{'s' * (config['epochs'] != 1)}, {model}, batch {config['batch_size']}{share}"


def headline(material: Material) -> Section:
    """What was run, and the best of it."""
    runs, done = material.runs, [run for run in material.runs if run.result]
    tasks = ((t, sum(run.task == t for run in done)) for t in ("pretrain", "finetune", "probe"))
    names = {"pretrain": "pretraining", "finetune": "fine-tuning", "probe": "probing"}
    spent = sum(number(run.result, "train_time_s") or 0 for run in done)
    kinds = ", ".join(f"{count} {names[task]}" for task, count in tasks if count)
    sets = sorted({title(run.data) for run in runs})
    text = [
        f"{len(done)} finished run{'s' * (len(done) != 1)} ({kinds}) on {' and '.join(sets)};"
        f" {duration(spent)} of training in all."
        + (f" {len(runs) - len(done)} more unfinished: listed, and left out of every mean." if done != runs else ""),
        "Accuracies are fractions. Where several seeds were run, ± is the sample standard deviation over them."
        " Every choice, of the epoch and of the best setting, was made on validation images held out of the training"
        " set; the test set was read once, at the end of each run.",
    ]
    rows: list[list[Any]] = []
    best = best_classifiers(material)
    for (data, _), group in best.items():
        c = group.config
        rows.append(
            [
                title(data), start_label(group.runs[0]) + extra(group), show(measured(group, "test", "accuracy")),
                show(measured(group, "val", "accuracy")), str(len(group.done)),
                million(number(group.done[0].result, "params")), str(c["epochs"]),
                duration((measured(group, "train_time_s") or (None,))[0]), numbers([group]),
            ]
        )  # fmt: skip
    caption = "Best classifier for each data set and start, chosen by mean validation accuracy."
    head = ("data", "start", "test accuracy", "validation", "seeds", "parameters", "epochs", "time a run", "runs")
    blocks: list[Table | Figure] = [Table(caption, head, rows, frozenset({0, 1, 8}))] if rows else []
    return Section("results", "Results", text, blocks + [*autoencoders(material), *transfer(best), *machines(done)])


def extra(group: Group) -> str:
    """What the group's name says beside the start."""
    rest = group.name.removeprefix(start_label(group.runs[0]))
    return rest if rest.startswith(", ") else ""


def best_classifiers(material: Material) -> dict[tuple[str, str], Group]:
    """(data, start) -> the group with the best mean validation accuracy."""
    best: dict[tuple[str, str], Group] = {}
    for group in itertools.chain.from_iterable(families(material.of("finetune"))):
        key = (group.runs[0].data, start_label(group.runs[0]))
        if group.done and (key not in best or validated(group) > validated(best[key])):
            best[key] = group
    return dict(sorted(best.items(), key=lambda item: (item[0][0] != "mnist", item[0][0], -validated(item[1]))))


def autoencoders(material: Material) -> list[Table]:
    rows = []
    for group in itertools.chain.from_iterable(families(material.of("pretrain"))):
        if not group.done:
            continue
        c = group.config
        probes = Group("", tuple(r for r in material.of("probe") if r.origin in group.runs and r.data == r.origin.data))
        rows.append(
            [
                title(group.runs[0].data), str(c["patch_size"]), f"{c['mask_ratio']:g}", str(c["epochs"]),
                show(measured(group, "train", "masked_mse")), show(measured(group, "val", "masked_mse")),
                show(measured(probes, "test", "knn_accuracy")), show(measured(probes, "test", "accuracy")),
                str(len(group.done)), duration((measured(group, "train_time_s") or (None,))[0]),
                numbers([group, probes]),
            ]
        )  # fmt: skip
    head = ("data", "patch", "hidden", "epochs", "train MSE", "validation MSE", "k-NN, test", "linear, test", "seeds")
    caption = (
        "Masked autoencoders: mean squared error over hidden pixels on the [-1, 1] scale, and what frozen features are"
        " good for. Errors at other patch sizes and mask ratios belong to other tasks and do not compare."
    )
    return [Table(caption, (*head, "time a run", "runs"), rows, frozenset({0, 10}))] if rows else []


def transfer(best: dict[tuple[str, str], Group]) -> list[Table]:
    """MNIST and CIFAR-10 side by side."""
    starts = dict.fromkeys(start for _, start in best)
    if not {"mnist", "cifar10"} <= {data for data, _ in best}:
        return []
    rows = []
    for start in starts:
        groups = [best.get((data, start)) for data in ("mnist", "cifar10")]
        values = [g and measured(g, "test", "accuracy") for g in groups]
        errors = [f"{1 - v[0]:.2%}" if v else NONE for v in values]
        rows.append([start, show(values[0]), errors[0], show(values[1]), errors[1], numbers(g for g in groups if g)])
    head = ("start", "MNIST test", "error", "CIFAR-10 test", "error", "runs")
    return [Table("MNIST and CIFAR-10: the best of each start, side by side.", head, rows, frozenset({0, 5}))]


def machines(done: Sequence[Run]) -> list[Table]:
    fields = ("hardware", "cpu", "gpu", "torch", "python", "maelab", "git_commit")
    used: dict[tuple[str, ...], list[int]] = {}
    for run in done:
        used.setdefault(tuple(str(run.env.get(f) or NONE) for f in fields), []).append(run.number)
    rows = [[*key, tuple(runs)] for key, runs in used.items()]
    head = (*("commit" if f == "git_commit" else f for f in fields), "runs")
    return [Table("Hardware and versions, from each run's env.json.", head, rows, frozenset(range(8)))] if rows else []


def versus(ours: Statistic, theirs: float | None, higher: bool = True) -> Any:
    """Our cell, marked where it is at least as good as theirs."""
    beaten = ours is not None and theirs is not None and (ours[0] >= theirs if higher else ours[0] <= theirs)
    return Better(show(ours)) if beaten else show(ours)


def plain_loss(config: dict[str, Any]) -> bool:
    """Whether the training loss is plain cross-entropy of unaltered images."""
    return not config["label_smoothing"] and not augmented(config)


def augmented(config: dict[str, Any]) -> bool:
    return any(config.get(k) for k in AUGMENT if k not in ("crop_scale", "rand_augment_magnitude")) or (
        config.get("crop_scale", 1.0) < 1
    )


def contender(material: Material, data: str, epochs: int) -> Group | None:
    """Our answer to a published classifier: the best on validation within its epochs, from an MNIST MAE if there is
    one, since that is the published programme."""
    groups = [g for family in families(material.of("finetune")) for g in family if g.runs[0].data == data and g.done]
    groups = [g for g in groups if g.config["epochs"] <= epochs]
    same = [g for g in groups if start_label(g.runs[0]) == "from MNIST MAE"]
    return max(same or groups, key=validated, default=None)


def protocol(group: Group) -> str:
    c, n = group.config, len(group.done)
    return (
        f"Ours: {group.name}; {describe(c)}; {c['optimizer']}; {'augmented' if augmented(c) else 'no augmentation'};"
        f" {n} seed{'s' * (n != 1)}; {c['val_fraction']:.0%} of the training images held out."
    )


def report_a(material: Material) -> Section | None:
    """Report A's tables with ours beside them."""
    blocks: list[Table | Figure] = []
    theirs = published.A_PRETRAINING
    groups = [
        group
        for family in families(material.of("pretrain", sweeps=True))
        for group in family
        if group.done and group.runs[0].data == "mnist" and not group.config["norm_pix_loss"]
        and (group.config["patch_size"], group.config["mask_ratio"]) == (theirs["patch_size"], 0.75)
    ]  # fmt: skip
    if groups:
        group = min(groups, key=lambda g: (measured(g, "val", "masked_mse") or (math.inf,))[0])
        train = versus(measured(group, "train", "masked_mse"), theirs["masked_mse"], higher=False)
        took = duration((measured(group, "train_time_s") or (None,))[0])
        rows = [
            ["report A", f"{theirs['masked_mse']:.4f}", NONE, str(theirs["epochs"]), "6.679 days", ()],
            ["ours", train, show(measured(group, "val", "masked_mse")), str(group.config["epochs"]), took,
             numbers([group])],
        ]  # fmt: skip
        caption = (
            "MNIST autoencoder, patch 4, three quarters hidden: mean squared error over hidden pixels. Theirs is a"
            " ViT-T with a decoder of 4 layers; its validation error was not printed."
        )
        head = ("", "training MSE", "validation MSE", "epochs", "time", "runs")
        blocks.append(Table(caption, head, rows, frozenset({0, 5}), commands(group.runs)))
    for data, epochs in published.A_CLASSIFIERS.items():
        group = contender(material, data, published.A_EPOCHS)
        if group is None:
            continue
        last, rows = group.config["epochs"], []
        for epoch in sorted({*epochs, last}):
            row: list[Any] = [str(epoch)]
            loss, train, val = epochs.get(epoch, (None, None, None))
            for split, quantity, value in (("train", "loss", loss), ("train", "accuracy", train), ("val", "accuracy", val)):
                ours = at_epoch(group, epoch, split, quantity)
                comparable = split == "val" or plain_loss(group.config)
                row += [NONE if value is None else f"{value:.4f}"]
                row += [versus(ours, value if comparable else None, higher=quantity == "accuracy")]
            rows.append(row)
        test = published.A_TEST[data]
        rows.append(["test", *[""] * 4, f"{test:.4f}", versus(measured(group, "test", "accuracy"), test)])
        caution = "" if plain_loss(group.config) else (
            " Our training loss and accuracy are measured on augmented images or smoothed labels and theirs on plain"
            " ones: only validation and test compare."
        )  # fmt: skip
        caption = f"{title(data)}, epoch by epoch. {protocol(group)}{caution}"
        head = ("epoch", "loss, A", "ours", "train, A", "ours", "validation, A", "ours")
        blocks.append(Table(caption, head, rows, commands=commands(group.runs)))
    text = [f"{published.A_PROTOCOL} Bold: ours is at least as good. {published.A_LOSSES}"]
    return Section("report-a", "Beside report A: from an MNIST autoencoder", text, blocks) if blocks else None


def report_b(material: Material) -> Section | None:
    """Report B's tables with ours beside them."""
    blocks: list[Table | Figure] = []
    rows, used = [], []
    for (patch, mask), epochs in published.B_PRETRAINING.items():
        groups = [
            group
            for family in families(material.of("pretrain", sweeps=True))
            for group in family
            if group.done and group.runs[0].data == "mnist" and not group.config["norm_pix_loss"]
            and (group.config["patch_size"], group.config["mask_ratio"]) == (patch, mask)
        ]  # fmt: skip
        if not groups:
            continue
        group = min(groups, key=lambda g: (abs(g.config["epochs"] - published.B_EPOCHS), g.config["epochs"]))
        row: list[Any] = [f"{patch}", f"{mask:g}"]
        for epoch, value in epochs.items():
            row += [f"{value:.4f}", versus(at_epoch(group, epoch, "train", "loss"), value, higher=False)]
        value = published.B_VALIDATION.get((patch, mask))
        shown = f"{value:.4f}" if value else NONE
        rows.append([*row, shown, versus(measured(group, "val", "masked_mse"), value, higher=False), numbers([group])])
        used += group.runs
    if rows:
        head = ("patch", "hidden", "epoch 1, B", "ours", "epoch 5, B", "ours", "epoch 10, B", "ours", "val, B", "ours")
        caption = (
            "MNIST autoencoders: training loss, the mean over each epoch of the squared error over hidden pixels, and"
            " validation error at the end. Rows of different patch sizes or ratios do not compare with each other."
        )
        blocks.append(Table(caption, (*head, "runs"), rows, frozenset({10}), commands(used)))
    for data, epochs in published.B_CLASSIFIERS.items():
        group = contender(material, data, published.B_EPOCHS)
        if group is None:
            continue
        last, rows = group.config["epochs"], []
        for epoch in sorted({*epochs, last}):
            train, val = epochs.get(epoch, (None, None))
            ours = at_epoch(group, epoch, "train", "accuracy"), at_epoch(group, epoch, "val", "accuracy")
            cells = [f"{v:.3f}" if v else NONE for v in (train, val)]
            marked = versus(ours[0], train if plain_loss(group.config) else None), versus(ours[1], val)
            rows.append([str(epoch), cells[0], marked[0], cells[1], marked[1]])
        rows.append(["test", "", "", NONE, show(measured(group, "test", "accuracy"))])
        head = ("epoch", "train, B", "ours", "validation, B", "ours")
        blocks.append(Table(f"{title(data)}. {protocol(group)}", head, rows, commands=commands(group.runs)))
    text = [f"{published.B_PROTOCOL} Bold: ours is at least as good.", published.B_CAUTION]
    return Section("report-b", "Beside report B: patch size and mask ratio", text, blocks) if blocks else None


def systems(material: Material) -> Section | None:
    """Published CIFAR-10 accuracy with ours among it."""
    rows: list[tuple[float, list[Any]]] = [
        (accuracy, [name, params, epochs, f"{accuracy:.4f}".rstrip("0"), source, ()])
        for name, params, epochs, accuracy, source in published.CIFAR10
    ]
    ours = [group for (data, _), group in best_classifiers(material).items() if data == "cifar10"]
    for group in ours:
        value = measured(group, "test", "accuracy")
        assert value is not None
        before = group.runs[0].origin
        epochs = f"{before.config['epochs']} + {group.config['epochs']}" if before else str(group.config["epochs"])
        name = Better(f"ours, {start_label(group.runs[0])}{extra(group)}")
        source = f"{value[2]} seed{'s' * (value[2] != 1)}"
        params = million(number(group.done[0].result, "params"))
        rows.append((value[0], [name, params, epochs, Better(show(value)), source, numbers([group])]))
    rows.sort(key=lambda row: row[0])
    head = ("system", "parameters", "epochs", "test accuracy", "source", "runs")
    caption = "CIFAR-10 test accuracy, from the lowest to the highest; epochs of pretraining + fine-tuning."
    shown = [row for _, row in rows]
    table = Table(caption, head, shown, frozenset({0, 4, 5}), commands(run for group in ours for run in group.runs))
    return Section("published", "Beside published CIFAR-10 accuracies", [], [table]) if ours else None


PANELS = {
    "pretrain": (
        ("val", "masked_mse", "masked MSE, validation"),
        ("val", "knn_accuracy", "k-NN accuracy, validation"),
        ("train", "loss", "training loss"),
    ),
    "finetune": (
        ("val", "accuracy", "accuracy, validation"),
        ("train", "accuracy", "accuracy, training"),
        ("val", "loss", "loss, validation"),
        ("train", "loss", "loss, training"),
    ),
}


def curves(material: Material) -> Section | None:
    """Loss and accuracy over the epochs."""
    blocks: list[Table | Figure] = []
    for task, panels in PANELS.items():
        for family in families(material.of(task), ("data",) if task == "pretrain" else BUDGET):
            for groups in (family[i : i + len(COLOURS)] for i in range(0, len(family), len(COLOURS))):
                runs = [run for group in groups for run in group.runs]
                images = []
                for split, quantity, label in panels:
                    if any(quantity in row and row["split"] == split for run in runs for row in run.metrics):
                        name = slug("curve", task, runs[0].data, runs[0].number, split, quantity)
                        alt = f"{label} over the epochs: {'; '.join(group.name for group in groups)}"
                        images.append(draw(material, name, alt, curve, groups, split, quantity, label))
                if images:
                    blocks.append(figure(_curves_caption(task, groups), images, runs))
    return Section("curves", "Loss and accuracy over the epochs", [], blocks) if blocks else None


def _curves_caption(task: str, groups: Sequence[Group]) -> str:
    config, data = groups[0].config, title(groups[0].runs[0].data)
    what = f"Pretraining on {data}" if task == "pretrain" else f"Fine-tuning on {data}: {describe(config)}"
    text = f"{what}. A thin line is one seed, dotted while unfinished; a bold one is the mean over the finished seeds."
    if task == "pretrain":
        if len({(group.config["patch_size"], group.config["mask_ratio"]) for group in groups}) > 1:
            text += " Errors at different patch sizes and mask ratios do not compare with each other."
        if len({group.config["norm_pix_loss"] for group in groups}) > 1:
            text += " The training loss of normalised pixels is another quantity than that of plain ones."
    elif any(not plain_loss(group.config) for group in groups):
        text += " Training figures are of augmented images or smoothed labels where the recipe says so."
    return text


def sweeps(material: Material) -> Section | None:
    """Heat maps, and both rankings of the cells."""
    blocks: list[Table | Figure] = []
    for sweep in material.sweeps:
        cells, line = sweep.content["cells"], [sweep_command(sweep)]
        fields = list(dict.fromkeys(str(field) for cell in cells for field in cell["settings"]))
        judged = {j: name for j, name in JUDGEMENTS.items() if any(number(cell, j) is not None for cell in cells)}
        if len(fields) == 2:
            images = []
            for judgement, name in judged.items():
                values = {tuple(str(cell["settings"].get(f)) for f in fields): number(cell, judgement) for cell in cells}
                alt = f"{name} on validation over {fields[0]} and {fields[1]}".replace("_", " ")
                label = f"{name} ({'lower' if judgement == 'masked_mse' else 'higher'} is better)"
                arguments = values, (fields[0], fields[1]), label
                images.append(
                    draw(material, slug("sweep", sweep.name, judgement), alt, pictures.heat_map, *arguments)
                )
            caption = f"Sweep {sweep.name}: every cell judged on validation, by four measures."
            if images:
                blocks.append(Figure(caption, images, tuple(run.number for run in sweep.runs), line))
        ranks = {j: _ranks([number(cell, j) for cell in cells], j != "masked_mse") for j in judged}
        rows = []
        for i, cell in enumerate(cells):
            row: list[Any] = [str(cell["settings"].get(field, NONE)) for field in fields]
            row += [NONE if (v := number(cell, j)) is None else f"{v:.4f}" for j in judged]
            row += [ranks.get(j, {}).get(i, NONE) for j in ("finetune_accuracy", "masked_mse")]
            rows.append([*row, str(cell.get("error", ""))])
        order = sorted(range(len(rows)), key=lambda i: ranks.get("finetune_accuracy", {}).get(i, "999").zfill(3))
        head = [*(f.replace("_", " ") for f in fields), *judged.values(), "rank downstream", "rank by error", ""]
        failed = any("error" in cell for cell in cells)
        state = "" if sweep.content.get("complete", True) else " The sweep is unfinished."
        caption = f"Sweep {sweep.name}, both rankings: by fine-tuned accuracy, which chooses, and by masked MSE.{state}"
        keep = len(head) if failed else len(head) - 1
        shown = [rows[i][:keep] for i in order]
        blocks.append(Table(caption, head[:keep], shown, frozenset({len(head) - 1} if failed else set()), line))
    return Section("sweep", "Patch size, mask ratio: sweeps", [published.B_CHOICE], blocks) if blocks else None


def _ranks(values: Sequence[float | None], higher: bool) -> dict[int, str]:
    """index -> place, from 1; equal values share one."""
    known = [value for value in values if value is not None]
    better = (lambda a, b: a > b) if higher else (lambda a, b: a < b)
    return {i: str(1 + sum(better(o, v) for o in known)) for i, v in enumerate(values) if v is not None}


def reconstructions(material: Material) -> Section | None:
    """Original, masked, rebuilt: one picture for each patch size and mask ratio, from the first seed."""
    blocks: list[Table | Figure] = []
    groups = [g for family in families(material.of("pretrain", sweeps=True), ("data",)) for g in family if g.done]
    groups.sort(key=lambda g: (g.runs[0].data, g.config["patch_size"], g.config["mask_ratio"]))
    for group in groups:
        run = group.done[0]
        image = found(material, run, "reconstructions.png", "original, masked and rebuilt images, row by row")
        if image:
            c = run.config
            size, hidden = c["patch_size"], f"{c['mask_ratio']:.0%}"
            caption = (
                f"{title(run.data)}, patches of {size}x{size}, {hidden} hidden, after {c['epochs']} epochs, seed"
                f" {c['seed']}: validation images, what the encoder sees (hidden patches grey), and what is rebuilt, with"
                f" the visible patches pasted back. Over all of validation the masked MSE is"
                f" {show(mean_sd([number(run.result, 'val', 'masked_mse')]))}."
            )
            blocks.append(figure(caption, [image], [run]))
    return Section("reconstructions", "What the autoencoders rebuild", [], blocks) if blocks else None


def predictions(material: Material) -> Section | None:
    """Galleries, confusion matrices and accuracy by class, for the best group of each data set and start."""
    blocks: list[Table | Figure] = []
    for (data, start), group in best_classifiers(material).items():
        run = group.done[0]
        where = f"{title(data)}, {start}{extra(group)}, seed {run.config['seed']}"
        gallery = found(material, run, "predictions.png", "test images with the predicted class and its probability")
        if gallery:
            caption = (
                f"{where}: test images with the predicted class and its probability. Wrong ones, in red with their"
                " true class, are shown more often than they occur; within right and wrong the choice is random."
            )
            blocks.append(figure(caption, [gallery], [run]))
        counts, recall = _confusion(group)
        if counts:
            name, over = slug("confusion", data, start, run.number), len(group.done)
            alt = "confusion matrix of the test images: rows are true classes, columns predictions"
            image = draw(material, name, alt, pictures.confusion, counts, list(recall))
            seeds = f"summed over {over} seeds" if over > 1 else f"seed {run.config['seed']}"
            caption = f"{title(data)}, {start}{extra(group)}: test images by true and predicted class, {seeds}."
            blocks.append(figure(caption, [image], group.done))
            rows = [[label, *(show(value) for value in pair)] for label, *pair in [(k, v) for k, v in recall.items()]]
            text = f"{title(data)}, {start}{extra(group)}: share of each class's test images that is recognised."
            blocks.append(Table(text, ("class", "accuracy"), rows, commands=commands(group.done)))
        elif image := found(material, run, "confusion.png", "confusion matrix: rows are true classes"):
            blocks.append(figure(f"{where}: test images by true and predicted class.", [image], [run]))
    return Section("predictions", "What the classifiers say", [], blocks) if blocks else None


def _confusion(group: Group) -> tuple[list[list[int]], dict[str, Statistic]]:
    """Confusion matrix summed over the finished seeds, and class -> accuracy; empty where a run does not hold them."""
    tables = [run.result["test"].get("confusion") for run in group.done]
    names = [run.result["test"].get("per_class") for run in group.done]
    if not all(isinstance(per_class, dict) and per_class.keys() == names[0].keys() for per_class in names):
        return [], {}
    n = len(names[0])
    for table in tables:
        square = isinstance(table, list) and len(table) == n and all(isinstance(r, list) and len(r) == n for r in table)
        if not square or any(number({"": v}, "") is None or v < 0 for r in table for v in r):
            return [], {}
    summed = [[int(sum(table[i][j] for table in tables)) for j in range(n)] for i in range(n)]
    return summed, {name: mean_sd(number(per_class, name) for per_class in names) for name in names[0]}


def controls(material: Material) -> Section | None:
    """Groups of one budget and model side by side, and what a single difference is worth."""
    blocks: list[Table | Figure] = []
    for family in families(material.of("finetune")):
        groups = sorted((group for group in family if group.done), key=validated, reverse=True)
        if len(groups) < 2:
            continue
        data, runs = groups[0].runs[0].data, [run for group in groups for run in group.done]
        what = f"{title(data)}: {describe(groups[0].config)}"
        rows = [(g.name, [v for r in g.done if (v := number(r.result, "test", "accuracy")) is not None]) for g in groups]
        alt = "; ".join(f"{name}: {show(mean_sd(values))}" for name, values in rows)
        image = draw(material, slug("controls", data, runs[0].number), alt, dots, rows, "test accuracy")
        caption = f"{what}. Ticks are seeds, the dot their mean, the bar one sample standard deviation either way."
        blocks.append(figure(caption, [image], runs))
        table = [
            [g.name, show(measured(g, "test", "accuracy")), show(measured(g, "val", "accuracy")), str(len(g.done)),
             numbers([g])]
            for g in groups
        ]  # fmt: skip
        head = ("setting", "test accuracy", "validation", "seeds", "runs")
        blocks.append(Table(what, head, table, frozenset({0, 4})))
        pairs = [pair for a, b in itertools.permutations(groups, 2) if (pair := _difference(a, b))]
        if pairs:
            head = ("one difference", "test accuracy", "against", "points", "standard error", "reading")
            text = (
                f"{what}: settings that differ in one thing only. Points are hundredths of test accuracy; the standard"
                " error is that of the difference of the two means over seeds."
            )
            blocks.append(Table(text, head, pairs, frozenset({0, 5})))
    text = [
        "Within each comparison data, epochs, batch size and model are the same; what differs is in the name."
        " A difference counts as clear beyond two standard errors; one seed supports no such statement."
    ]
    return Section("controls", "Controls: what makes the difference", text, blocks) if blocks else None


def _difference(a: Group, b: Group) -> list[Any] | None:
    """A row on what a gains over its control b, which starts from scratch, without augmentation, or as the recipe."""
    left, right = aspects(a.runs[0]), aspects(b.runs[0])
    differing = [key for key in left if left[key] != right.get(key)]
    if len(differing) != 1 or differing == ["label_fraction"]:
        return None
    if differing == ["init"]:
        is_control = b.config["init"] == "none" or (a.config["init"] != "none" and a.name > b.name)
    elif differing == ["augmentation"]:
        is_control = augmented(a.config) and not augmented(b.config) or (
            augmented(a.config) == augmented(b.config) and a.name > b.name
        )
    else:
        is_control = a.name > b.name
    means = measured(a, "test", "accuracy"), measured(b, "test", "accuracy")
    if not is_control or means[0] is None or means[1] is None:
        return None
    points = 100 * (means[0][0] - means[1][0])
    error, reading = NONE, "one seed: no statement"
    if means[0][1] is not None and means[1][1] is not None:
        spread = 100 * math.sqrt(means[0][1] ** 2 / means[0][2] + means[1][1] ** 2 / means[1][2])
        verdict = "better" if points > 0 else "worse"
        error, reading = f"{spread:.2f}", verdict if abs(points) > 2 * spread else "no clear difference"
    return [f"{a.name} – against {b.name}", show(means[0]), show(means[1]), f"{points:+.2f}", error, reading]


def label_fractions(material: Material) -> Section | None:
    """Accuracy over the share of the labels, one line for each start."""
    blocks: list[Table | Figure] = []
    loose = tuple(field for field in BUDGET if field not in ("epochs", "batch_size"))
    for family in families(material.of("finetune"), loose):
        lines: dict[str, dict[float, list[float]]] = {}
        members: dict[str, list[Group]] = {}
        for group in family:
            rest = {k: v for k, v in aspects(group.runs[0]).items() if k not in PACE}
            same = next((n for n, gs in members.items() if _rest(gs[0]) == rest), None)
            values = [v for r in group.done if (v := number(r.result, "test", "accuracy")) is not None]
            if values:
                line = same or _without_share(group.name)
                line = line if same or line not in members else group.name
                members.setdefault(line, []).append(group)
                lines.setdefault(line, {}).setdefault(group.config["label_fraction"], []).extend(values)
        lines = {name: points for name, points in lines.items() if len(points) > 1}
        if not lines:
            continue
        runs = [run for name in lines for group in members[name] for run in group.done]
        data = runs[0].data
        epochs = sorted({(run.config["label_fraction"], run.config["epochs"]) for run in runs})
        paces = ", ".join(f"{share:.3g}: {count}" for share, count in epochs)
        shown = dict(lines)
        if data == "cifar10":
            shown["SSMAE, published (arXiv 2601.20072)"] = {k: [v] for k, v in published.CIFAR10_LABELS.items()}
        name = slug("labels", data, runs[0].number)
        alt = "; ".join(f"{n}: " + ", ".join(f"{s:g} {show(mean_sd(v))}" for s, v in p.items()) for n, p in shown.items())
        image = draw(material, name, alt, fractions, shown, "test accuracy")
        caption = (
            f"{title(data)}: test accuracy over the share of the training labels, on a logarithmic axis; bars are one"
            f" sample standard deviation over seeds. Epochs at each share: {paces}."
        )
        blocks.append(figure(caption, [image], runs))
        shares = sorted({share for points in lines.values() for share in points})
        rows = [[n, *(show(mean_sd(points.get(share, []))) for share in shares)] for n, points in lines.items()]
        head = ("start", *(f"{share:.3g}" for share in shares))
        blocks.append(Table(f"{title(data)}: test accuracy by share of the labels.", head, rows))
    return Section("labels", "Few labels", [], blocks) if blocks else None


PACE = ("label_fraction", "epochs", "batch_size", "warmup_epochs")  # what may change along a line of shares


def _rest(group: Group) -> dict[str, Any]:
    return {k: v for k, v in aspects(group.runs[0]).items() if k not in PACE}


def _without_share(name: str) -> str:
    """A group's name without what changes along a line of shares."""
    changing = tuple(field.replace("_", " ") for field in PACE)
    kept = [p for p in name.split(", ") if not p.endswith("of the labels") and p != "all labels"]
    return ", ".join(p for p in kept if not p.startswith(changing))


def listing(material: Material) -> Section:
    """Every run with its time."""
    head = ("no.", "run", "task", "data", "start", "seed", "epochs", "validation", "test", "time", "images/s", "state")
    blocks: list[Table | Figure] = []
    for caption, runs in (
        ("Runs.", [run for run in material.runs if not run.in_sweep]),
        ("Runs that are cells of sweeps.", [run for run in material.runs if run.in_sweep]),
    ):
        rows = []
        for run in runs:
            measure = "masked_mse" if run.task == "pretrain" else "accuracy"
            epoch = max((row["epoch"] for row in run.metrics), default=0)
            state = "finished" if run.result else f"unfinished: {epoch} of {run.config['epochs']} epochs"
            speed = number(run.result, "images_per_s")
            rows.append(
                [
                    run.number, run.name, run.task, title(run.data),
                    "" if run.task == "pretrain" else start_label(run), str(run.config["seed"]),
                    str(run.config["epochs"]), *(show(mean_sd([number(run.result, s, measure)])) for s in ("val", "test")),
                    duration(number(run.result, "train_time_s")), NONE if speed is None else f"{speed:.0f}", state,
                ]
            )  # fmt: skip
        if rows:
            text = f"{caption} Accuracies, and for pretraining the masked MSE."
            blocks.append(Table(text, head, rows, frozenset({1, 2, 3, 4, 11})))
    return Section("runs", "Runs, times and commands", [], blocks)


def sections(material: Material) -> list[Section]:
    """Every section that has something to say, in reading order."""
    parts = (headline, controls, label_fractions, report_a, report_b, systems, curves, sweeps, reconstructions)
    return [section for part in (*parts, predictions, listing) if (section := part(material))]
