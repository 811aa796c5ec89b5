"""Published figures with ours beside them."""

import math
from typing import Any

from maelab.report import published
from maelab.report.groups import (
    Group,
    at_epoch,
    families,
    measured,
    number,
    start_label,
    title,
)
from maelab.report.pieces import (
    NONE,
    Better,
    Figure,
    Material,
    Section,
    Statistic,
    Table,
    augmented,
    best_classifiers,
    commands,
    describe,
    duration,
    extra,
    filled,
    million,
    numbers,
    plain_loss,
    show,
    validated,
)

MEASURED_ALTERED = (
    " Our training figures are measured on augmented images or against smoothed labels, theirs on plain ones: only"
    " validation and test compare."
)


def versus(ours: Statistic, theirs: float | None, higher: bool = True) -> Any:
    """Our cell, marked where it is at least as good as theirs."""
    beaten = ours is not None and theirs is not None and (ours[0] >= theirs if higher else ours[0] <= theirs)
    return Better(show(ours)) if beaten else show(ours)


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
    ) + ("" if plain_loss(c) else MEASURED_ALTERED)


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
            for split, quantity, value in (
                ("train", "loss", loss),
                ("train", "accuracy", train),
                ("val", "accuracy", val),
            ):
                ours = at_epoch(group, epoch, split, quantity)
                comparable = split == "val" or plain_loss(group.config)
                row += [NONE if value is None else f"{value:.4f}"]
                row += [versus(ours, value if comparable else None, higher=quantity == "accuracy")]
            rows.append(row)
        test = published.A_TEST[data]
        rows.append(["test", *[""] * 4, f"{test:.4f}", versus(measured(group, "test", "accuracy"), test)])
        caption = f"{title(data)}, epoch by epoch. {protocol(group)}"
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
        nearest = min(abs(group.config["epochs"] - published.B_EPOCHS) for group in groups)
        near = [g for g in groups if abs(g.config["epochs"] - published.B_EPOCHS) == nearest]
        for group in families([run for g in near for run in g.runs], ("data",))[0]:  # named by what differs
            row: list[Any] = [f"{patch}", f"{mask:g}", group.name if len(near) > 1 else NONE]
            for epoch, value in epochs.items():
                row += [f"{value:.4f}", versus(at_epoch(group, epoch, "train", "loss"), value, higher=False)]
            value = published.B_VALIDATION.get((patch, mask))
            row += [f"{value:.4f}" if value else NONE]
            rows.append([*row, versus(measured(group, "val", "masked_mse"), value, higher=False), numbers([group])])
            used += group.runs
    if rows:
        head = ("patch", "hidden", "ours has", "epoch 1, B", "ours", "epoch 5, B", "ours", "epoch 10, B", "ours")
        caption = (
            "MNIST autoencoders: training loss, the mean over each epoch of the squared error over hidden pixels, and"
            " validation error at the end. Rows of different patch sizes or ratios do not compare with each other."
        )
        table = Table(caption, (*head, "val, B", "ours", "runs"), rows, frozenset({2, 11}), commands(used))
        blocks.append(filled(table))
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
