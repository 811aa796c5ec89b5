"""Published figures with ours beside them."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from maelab.report import published
from maelab.report.groups import Group, Statistic, families, title
from maelab.report.pieces import (
    NONE,
    Better,
    Figure,
    Material,
    Section,
    Table,
    augmented,
    best_classifiers,
    commands,
    counted,
    describe,
    duration,
    extra,
    filled,
    numbers,
    parameters,
    plain_loss,
    show,
    validated,
)

MEASURED_ALTERED = (
    " Our training figures are measured on augmented images or against smoothed labels, theirs on plain ones: only"
    " validation and test compare."
)
QUANTITIES = (("train", "loss", "loss"), ("train", "accuracy", "train"), ("val", "accuracy", "validation"))


def versus(ours: Statistic | None, theirs: float | None, higher: bool = True) -> Any:
    """Our cell, marked where it is at least as good as theirs."""
    beaten = ours is not None and theirs is not None and (ours.mean >= theirs if higher else ours.mean <= theirs)
    return Better(show(ours)) if beaten else show(ours)


def autoencoders(material: Material, patch: int, ratio: float) -> list[Group]:
    """Our answers to a published autoencoder of MNIST."""
    return [
        group
        for group in material.done("pretrain", sweeps=True)
        if group.data == "mnist" and not group.config["norm_pix_loss"]
        and (group.config["patch_size"], group.config["mask_ratio"]) == (patch, ratio)
    ]  # fmt: skip


def contender(material: Material, data: str, epochs: int) -> Group | None:
    """Our answer to a published classifier: the best on validation within its epochs, from an MNIST MAE if there is
    one, since that is the published programme."""
    groups = [g for g in material.done("finetune") if g.data == data and g.config["epochs"] <= epochs]
    return max([g for g in groups if g.start == "from MNIST MAE"] or groups, key=validated, default=None)


def protocol(group: Group) -> str:
    c = group.config
    return (
        f"Ours: {group.name}; {describe(c)}; {c['optimizer']}; {'augmented' if augmented(c) else 'no augmentation'};"
        f" {counted(len(group.done), 'seed')}; {c['val_fraction']:.0%} of the training images held out."
    ) + ("" if plain_loss(c) else MEASURED_ALTERED)


def classifiers(
    material: Material, report: str, theirs: Mapping[str, Mapping[int, Sequence[float]]], epochs: int,
    tests: Mapping[str, float], quantities: Sequence[tuple[str, str, str]], digits: int,
) -> list[Table]:  # fmt: skip
    """The classifiers of a report, epoch by epoch and on its test images, each with ours of at most so many epochs.
    `quantities` are what its figures are, (split, quantity, name), and `digits` those that it prints."""
    tables = []
    for data, figures in theirs.items():
        group = contender(material, data, epochs)
        if group is None:
            continue
        rows: list[list[Any]] = []
        for epoch in sorted({*figures, group.config["epochs"]}):
            rows.append([str(epoch)])
            values = figures.get(epoch, [None] * len(quantities))
            for (split, quantity, _), value in zip(quantities, values, strict=True):
                ours = group.by_epoch(split, quantity).get(epoch)
                comparable = split == "val" or plain_loss(group.config)
                rows[-1] += [show(value, digits), versus(ours, value if comparable else None, quantity == "accuracy")]
        gaps, test = [""] * (2 * len(quantities) - 2), tests.get(data)
        rows.append(["test", *gaps, show(test), versus(group.measured("test", "accuracy"), test)])
        head = ("epoch", *(word for *_, what in quantities for word in (f"{what}, {report}", "ours")))
        how = ", epoch by epoch" if tests else ""
        tables.append(Table(f"{title(data)}{how}. {protocol(group)}", head, rows, commands=commands(group.runs)))
    return tables


def report_a(material: Material) -> Section | None:
    """Report A's tables with ours beside them."""
    blocks: list[Table | Figure] = []
    theirs = published.A_PRETRAINING
    if groups := autoencoders(material, theirs["patch_size"], theirs["mask_ratio"]):
        group = min(groups, key=lambda g: math.inf if (v := g.mean("val", "masked_mse")) is None else v)
        train = versus(group.measured("train", "masked_mse"), theirs["masked_mse"], higher=False)
        rows = [
            ["report A", show(theirs["masked_mse"]), NONE, str(theirs["epochs"]), theirs["took"], ()],
            ["ours", train, show(group.measured("val", "masked_mse")), str(group.config["epochs"]),
             duration(group.mean("train_time_s")), numbers([group])],
        ]  # fmt: skip
        caption = (
            "MNIST autoencoder, patch 4, three quarters hidden: mean squared error over hidden pixels. Theirs is a"
            " ViT-T with a decoder of 4 layers; its validation error was not printed. It divides by 0.75"
            " where 37 of 49 patches are hidden: as ours is measured, its 0.0877 is 0.0871."
        )
        head = ("", "training MSE", "validation MSE", "epochs", "time", "runs")
        blocks.append(Table(caption, head, rows, frozenset({0, 5}), commands(group.runs)))
    blocks += classifiers(
        material, "A", published.A_CLASSIFIERS, published.A_EPOCHS, published.A_TEST, QUANTITIES, digits=4
    )
    text = [f"{published.A_PROTOCOL} Bold: ours is at least as good. {published.A_LOSSES}"]
    return Section("report-a", "Beside report A: from an MNIST autoencoder", text, blocks) if blocks else None


def report_b(material: Material) -> Section | None:
    """Report B's tables with ours beside them."""
    blocks: list[Table | Figure] = []
    rows, used = [], []
    for (patch, mask), epochs in published.B_PRETRAINING.items():
        groups = autoencoders(material, patch, mask)
        off = min((abs(group.config["epochs"] - published.B_EPOCHS) for group in groups), default=0)
        near = [group for group in groups if abs(group.config["epochs"] - published.B_EPOCHS) == off]
        named = families([run for group in near for run in group.runs], ("data",))  # by what differs among these
        for group in itertools.chain(*named):
            row: list[Any] = [f"{patch}", f"{mask:g}", group.name if len(near) > 1 else NONE]
            losses = group.by_epoch("train", "loss")
            for epoch, value in epochs.items():
                row += [show(value), versus(losses.get(epoch), value, higher=False)]
            value = published.B_VALIDATION.get((patch, mask))
            row += [show(value), versus(group.measured("val", "masked_mse"), value, higher=False), numbers([group])]
            rows.append(row)
            used += group.runs
    if rows:
        head = ("patch", "hidden", "ours has", "epoch 1, B", "ours", "epoch 5, B", "ours", "epoch 10, B", "ours")
        caption = (
            "MNIST autoencoders: training loss, the mean over each epoch of the squared error over hidden pixels, and"
            " validation error at the end. Rows of different patch sizes or ratios do not compare with each other."
        )
        table = Table(caption, (*head, "val, B", "ours", "runs"), rows, frozenset({2, 11}), commands(used))
        blocks.append(filled(table))
    blocks += classifiers(material, "B", published.B_CLASSIFIERS, published.B_EPOCHS, {}, QUANTITIES[1:], digits=3)
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
        value = group.measured("test", "accuracy")
        assert value is not None
        before = group.runs[0].origin
        epochs = f"{before.config['epochs']} + {group.config['epochs']}" if before else str(group.config["epochs"])
        name, source = Better(f"ours, {group.start}{extra(group)}"), counted(value.n, "seed")
        row = [name, parameters(group), epochs, Better(show(value)), source, numbers([group])]
        rows.append((value.mean, row))
    head = ("system", "parameters", "epochs", "test accuracy", "source", "runs")
    caption = "CIFAR-10 test accuracy, from the lowest to the highest; epochs of pretraining + fine-tuning."
    shown = [row for _, row in sorted(rows, key=lambda row: row[0])]
    table = Table(caption, head, shown, frozenset({0, 4, 5}), commands(run for group in ours for run in group.runs))
    return Section("published", "Beside published CIFAR-10 accuracies", [], [table]) if ours else None
