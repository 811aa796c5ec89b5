"""What the page says: sections of paragraphs, tables and figures, each only where the runs have something to say."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from maelab import figures as pictures
from maelab.report import published
from maelab.report.beside import report_a, report_b, systems
from maelab.report.controls import controls, label_fractions
from maelab.report.figures import COLOURS, curve
from maelab.report.groups import BUDGET, Group, Run, Statistic, Sweep, families, mean_sd, number, sweep_command, title
from maelab.report.pieces import (
    NONE,
    Figure,
    Image,
    Material,
    Section,
    Table,
    best_classifiers,
    commands,
    counted,
    describe,
    draw,
    duration,
    extra,
    figure,
    filled,
    found,
    numbers,
    parameters,
    plain_loss,
    show,
    slug,
)

JUDGEMENTS = {
    "masked_mse": "masked MSE",
    "knn_accuracy": "k-NN",
    "linear_accuracy": "linear probe",
    "finetune_accuracy": "fine-tuned",
}


def headline(material: Material) -> Section:
    """What was run, and the best of it."""
    runs, done = material.runs, [run for run in material.runs if run.result]
    names = {"pretrain": "pretraining", "finetune": "fine-tuning", "probe": "probing"}
    counts = {name: sum(run.task == task for run in done) for task, name in names.items()}
    kinds = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    spent = sum(number(run.result, "train_time_s") or 0 for run in done)
    sets = sorted({title(run.data) for run in runs})
    text = [
        f"{counted(len(done), 'finished run')} ({kinds}) on {' and '.join(sets)};"
        f" {duration(spent)} of training in all."
        + (f" {len(runs) - len(done)} more unfinished: listed, and left out of every mean." if done != runs else ""),
        "Accuracies are fractions. Where several seeds were run, ± is the sample standard deviation over them."
        " Every choice, of the epoch and of the best setting, was made on validation images held out of the training"
        " set; the test set was read once, at the end of each run.",
    ]
    best = best_classifiers(material)
    rows = [
        [
            title(data), start + extra(group), show(group.measured("test", "accuracy")),
            show(group.measured("val", "accuracy")), str(len(group.done)), parameters(group),
            str(group.config["epochs"]), duration(group.mean("train_time_s")), numbers([group]),
        ]
        for (data, start), group in best.items()
    ]  # fmt: skip
    caption = "Best classifier for each data set and start, chosen by mean validation accuracy."
    head = ("data", "start", "test accuracy", "validation", "seeds", "parameters", "epochs", "time a run", "runs")
    blocks: list[Table | Figure] = [Table(caption, head, rows, frozenset({0, 1, 8}))] if rows else []
    return Section("results", "Results", text, [*blocks, *autoencoders(material), *transfer(best)])


def autoencoders(material: Material) -> list[Table]:
    rows = []
    for group in material.done("pretrain"):
        c = group.config
        star = "*" if c["norm_pix_loss"] else ""
        of_it = (r for r in material.of("probe") if r.origin and r.origin.number in numbers([group]))
        probes = Group("", tuple(r for r in of_it if r.origin and r.data == r.origin.data))
        rows.append(
            [
                title(group.data) + ", fp32" * (c["precision"] == "fp32"), parameters(group), str(c["patch_size"]),
                f"{c['mask_ratio']:g}", str(c["epochs"]), show(group.measured("train", "masked_mse")) + star,
                show(group.measured("val", "masked_mse")) + star, show(group.measured("val", "knn_accuracy")),
                show(probes.measured("test", "knn_accuracy")), show(probes.measured("test", "accuracy")),
                str(len(group.done)), duration(group.mean("train_time_s")), numbers([group, probes]),
            ]
        )  # fmt: skip
    head = ("data", "parameters", "patch", "hidden", "epochs", "train MSE", "validation MSE")
    head += ("k-NN, validation", "k-NN, test", "linear, test", "seeds", "time a run", "runs")
    caption = (
        "Masked autoencoders: mean squared error over hidden pixels on the [-1, 1] scale, and what frozen features are"
        " good for. Errors at other patch sizes and mask ratios belong to other tasks and do not compare."
    )
    if any(run.config["norm_pix_loss"] for run in material.of("pretrain")):
        caption += (
            " Starred: trained on normalised pixels; the error then uses each hidden patch's true mean and deviation,"
            " and is not that of a whole prediction."
        )
    return [filled(Table(caption, head, rows, frozenset({0, 12})))] if rows else []


def transfer(best: dict[tuple[str, str], Group]) -> list[Table]:
    """MNIST and CIFAR-10 side by side."""
    if not {"mnist", "cifar10"} <= {data for data, _ in best}:
        return []
    rows = []
    for start in dict.fromkeys(start for _, start in best):
        groups = [best.get((data, start)) for data in ("mnist", "cifar10")]
        values = [group and group.measured("test", "accuracy") for group in groups]
        cells = [cell for v in values for cell in (show(v), f"{1 - v.mean:.2%}" if v else NONE)]
        rows.append([start, *cells, numbers(filter(None, groups))])
    head = ("start", "MNIST test", "error", "CIFAR-10 test", "error", "runs")
    return [Table("MNIST and CIFAR-10: the best of each start, side by side.", head, rows, frozenset({0, 5}))]


def machines(done: Sequence[Run]) -> list[Table]:
    fields = ("hardware", "cpu", "gpu", "torch", "python", "maelab")
    used: dict[tuple[str, ...], list[Run]] = {}
    for run in done:
        used.setdefault(tuple(str(run.env.get(f) or NONE) for f in fields), []).append(run)
    rows = []
    for key, runs in used.items():
        commits = dict.fromkeys(str(run.env.get("git_commit") or NONE) for run in runs)
        rows.append([*key, ", ".join(commits), tuple(run.number for run in runs)])
    head = (*fields, "commits", "runs")
    caption = "Hardware and versions, as each run recorded them."
    return [filled(Table(caption, head, rows, frozenset(range(8))))] if rows else []


PANELS = {
    "pretrain": (
        ("val", "masked_mse", "masked MSE, validation"),
        ("val", "knn_accuracy", "k-NN accuracy, validation"),
        ("val", "effective_rank", "effective rank of the features"),
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
            charts = math.ceil(len(family) / len(COLOURS))
            lines = math.ceil(len(family) / charts)  # evenly: a ninth is not left alone
            for groups in (family[i : i + lines] for i in range(0, len(family), lines)):
                if images := _curves(material, f"curve-{task}-{{split}}-{{quantity}}", panels, groups):
                    runs = [run for group in groups for run in group.runs]
                    blocks.append(figure(_curves_caption(task, groups), images, runs))
    return Section("curves", "Loss and accuracy over the epochs", [], blocks) if blocks else None


def _curves(
    material: Material, name: str, panels: Sequence[tuple[str, str, str]], groups: Sequence[Group]
) -> list[Image]:
    """A drawing for each of the panels whose quantity was measured; `name` has gaps for its split and quantity."""
    runs, images = [run for group in groups for run in group.runs], []
    for split, quantity, label in panels:
        if any(quantity in row and row["split"] == split for run in runs for row in run.metrics):
            file = slug(name.format(split=split, quantity=quantity), runs[0].name)
            alt = f"{label} over the epochs: {'; '.join(group.name for group in groups)}"
            images.append(draw(material, file, alt, curve, groups, split, quantity, label))
    return images


def _curves_caption(task: str, groups: Sequence[Group]) -> str:
    data = title(groups[0].data)
    what = f"Pretraining on {data}" if task == "pretrain" else f"Fine-tuning on {data}: {describe(groups[0].config)}"
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
                settings = (tuple(str(cell["settings"].get(f)) for f in fields) for cell in cells)
                values = dict(zip(settings, (number(cell, judgement) for cell in cells), strict=True))
                alt = f"{name} on validation over {fields[0]} and {fields[1]}".replace("_", " ")
                file = slug("sweep", sweep.name, judgement)
                images.append(draw(material, file, alt, pictures.heat_map, values, tuple(fields), name))
            caption = (
                f"Sweep {sweep.name}, every cell judged on validation: the error over hidden pixels, lower being"
                " better, and the accuracy of k-NN, of a linear probe and after fine-tuning. Yellow marks the highest."
            )
            if images:
                blocks.append(Figure(caption, images, tuple(run.number for run in sweep.runs), line))
        ranks = {judgement: _ranks(cells, judgement) for judgement in ("finetune_accuracy", "masked_mse")}
        rows = []
        for i, cell in enumerate(cells):
            row: list[Any] = [str(cell["settings"].get(field, NONE)) for field in fields]
            mine = (r for r in sweep.runs if r.task == "pretrain" and [str(r.config.get(f)) for f in fields] == row)
            row.append(next(map(hidden_patches, mine), NONE))
            row += [show(number(cell, judgement)) for judgement in judged]
            row += [str(places.get(i, NONE)) for places in ranks.values()]
            rows.append([*row, str(cell.get("error", ""))])
        order = sorted(range(len(rows)), key=lambda i: ranks["finetune_accuracy"].get(i, math.inf))
        head = [*(f.replace("_", " ") for f in fields), "hidden", *judged.values()]
        head += ["rank by fine-tuning", "rank by MSE", ""]
        failed = any("error" in cell for cell in cells)
        state = "" if sweep.content.get("complete", True) else " The sweep is unfinished."
        caption = f"Sweep {sweep.name}, both rankings: by fine-tuned accuracy, which chooses, and by masked MSE.{state}"
        keep = len(head) if failed else len(head) - 1
        shown = [rows[i][:keep] for i in order]
        words = frozenset({len(head) - 1} if failed else set())
        blocks.append(filled(Table(caption, head[:keep], shown, words, line)))
        blocks += _sweep_curves(material, sweep, fields)
    return Section("sweep", "Patch size, mask ratio: sweeps", [published.B_CHOICE], blocks) if blocks else None


def hidden_patches(run: Run) -> str:
    """How many patches of how many an autoencoder hides, where its result says so: a ratio keeps whole patches."""
    hidden, patches = (number(run.result, key) for key in ("hidden", "patches"))
    return NONE if hidden is None or patches is None else f"{hidden:.0f} of {patches:.0f}"


def _sweep_curves(material: Material, sweep: Sweep, fields: Sequence[str]) -> list[Figure]:
    """One figure for each value of the first field, since errors compare within it at best."""
    figures = []
    known = [run for run in sweep.runs if run.task == "pretrain" and all(field in run.config for field in fields)]
    for family in families(known, tuple(fields[:1])):
        if images := _curves(material, "sweep-curve-{quantity}", PANELS["pretrain"][:2], family):
            shared = f"{fields[0].replace('_', ' ')} {family[0].config[fields[0]]}"
            caption = f"Sweep {sweep.name}, {shared}: error and, where it was followed, k-NN accuracy on validation."
            figures.append(Figure(caption, images, numbers(family), [sweep_command(sweep)]))
    return figures


def _ranks(cells: Sequence[object], judgement: str) -> dict[int, int]:
    """index -> place, from 1; equal values share one."""
    known = {i: value for i, cell in enumerate(cells) if (value := number(cell, judgement)) is not None}
    order = sorted(known.values(), reverse=judgement != "masked_mse")
    return {i: 1 + order.index(value) for i, value in known.items()}


def reconstructions(material: Material) -> Section | None:
    """Original, masked, rebuilt: one picture for each setting, from its first seed; a figure for each data set."""
    by_data: dict[str, list[tuple[Image, Run]]] = {}
    groups = material.done("pretrain", sweeps=True, fields=("data",))
    for group in sorted(groups, key=lambda g: (g.config["patch_size"], g.config["mask_ratio"], g.config["epochs"])):
        run, c = group.done[0], group.config
        setting = f"patch {c['patch_size']}, mask ratio {c['mask_ratio']:g}"
        alt = f"original, masked and rebuilt images, row by row: {setting}"
        if image := found(material, run, "reconstructions", alt):
            count = "" if (hidden := hidden_patches(run)) == NONE else f" ({hidden} patches hidden)"
            caption = (
                f"Run {run.number}: {setting}{count}, {c['epochs']} epochs, seed {run.config['seed']}; masked MSE on"
                f" all of validation {show(number(run.result, 'val', 'masked_mse'))}."
            )
            by_data.setdefault(run.data, []).append((replace(image, caption=caption), run))
    blocks: list[Table | Figure] = []
    for data, shown in by_data.items():
        caption = (
            f"{title(data)}: validation images, what the encoder sees (hidden patches grey) and what is rebuilt, with"
            " the visible patches pasted back. The first seed of each setting; errors at different patch sizes and mask"
            " ratios do not compare."
        )
        blocks.append(figure(caption, [image for image, _ in shown], [run for _, run in shown]))
    return Section("reconstructions", "What the autoencoders rebuild", [], blocks) if blocks else None


def predictions(material: Material) -> Section | None:
    """Galleries, confusion matrices and accuracy by class, for the best group of each data set and start."""
    blocks: list[Table | Figure] = []
    for (data, start), group in best_classifiers(material).items():
        run = group.done[0]
        where, seed = f"{title(data)}, {start}{extra(group)}", f"seed {run.config['seed']}"
        alt = "test images with the predicted class and its probability"
        if image := found(material, run, "predictions", alt):
            caption = (
                f"{where}, {seed}: {alt}. Wrong ones, in red with their true class, are shown more often than they"
                " occur; within right and wrong the choice is random."
            )
            blocks.append(figure(caption, [image], [run]))
        counts, recall = _confusion(group)
        if counts:
            name, over = slug("confusion", data, start, run.name), len(group.done)
            alt = "confusion matrix of the test images: rows are true classes, columns predictions"
            image = draw(material, name, alt, pictures.confusion, counts, list(recall))
            seeds = f"summed over {over} seeds" if over > 1 else seed
            caption = f"{where}: test images by true and predicted class, {seeds}."
            blocks.append(figure(caption, [image], group.done, narrow=True))
            rows = [[label, show(value)] for label, value in recall.items()]
            text = f"{where}: share of each class's test images that is recognised."
            blocks.append(Table(text, ("class", "accuracy"), rows, commands=commands(group.done)))
        elif image := found(material, run, "confusion", "confusion matrix: rows are true classes"):
            caption = f"{where}, {seed}: test images by true and predicted class."
            blocks.append(figure(caption, [image], [run], narrow=True))
    return Section("predictions", "What the classifiers say", [], blocks) if blocks else None


def _confusion(group: Group) -> tuple[list[list[int]], dict[str, Statistic | None]]:
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


def listing(material: Material) -> Section:
    """Every run with its time."""
    head = ("no.", "run", "task", "data", "start", "seed", "epochs", "validation", "test", "time", "images/s", "state")
    blocks: list[Table | Figure] = []
    for caption, in_sweep in (("Runs.", False), ("Runs that are cells of sweeps.", True)):
        rows = []
        for run in material.runs:
            if run.in_sweep is not in_sweep:
                continue
            measure, start = ("masked_mse", "") if run.task == "pretrain" else ("accuracy", run.start)
            epoch = max((row["epoch"] for row in run.metrics), default=0)
            state = "finished" if run.result else f"unfinished: {epoch} of {run.config['epochs']} epochs"
            rows.append(
                [
                    run.number, run.name, run.task, title(run.data), start, str(run.config["seed"]),
                    str(run.config["epochs"]), *(show(number(run.result, part, measure)) for part in ("val", "test")),
                    duration(number(run.result, "train_time_s")), show(number(run.result, "images_per_s"), 0), state,
                ]
            )  # fmt: skip
        if rows:
            text = f"{caption} Accuracies, and for pretraining the masked MSE."
            blocks.append(Table(text, head, rows, frozenset({1, 2, 3, 4, 11})))
    blocks += machines([run for run in material.runs if run.result])
    return Section("runs", "Runs, times and commands", [], blocks)


def sections(material: Material) -> list[Section]:
    """Every section that has something to say, in reading order."""
    parts = (headline, report_a, report_b, systems, controls, label_fractions, sweeps, curves, reconstructions)
    return [section for part in (*parts, predictions, listing) if (section := part(material))]
