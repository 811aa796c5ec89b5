"""What the page concludes: runs that differ in one thing, and what pretraining is worth at each share of the labels."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from maelab.report import published
from maelab.report.figures import dots, fractions
from maelab.report.groups import BUDGET, Group, aspects, families, mean_sd, title
from maelab.report.pieces import (
    MINUS,
    NONE,
    Figure,
    Material,
    Section,
    Table,
    augmented,
    describe,
    draw,
    figure,
    numbers,
    show,
    slug,
    validated,
)

PACE = ("label_fraction", "epochs", "batch_size", "warmup_epochs")  # what may change along a line of shares


def controls(material: Material) -> Section | None:
    """Groups of one budget and model side by side, and what a single difference is worth."""
    blocks: list[Table | Figure] = []
    compared: list[tuple[list[Group], list[list[Any]]]] = []
    for family in families(material.of("finetune")):
        groups = sorted((group for group in family if group.done), key=validated, reverse=True)
        if len(groups) > 1:
            pairs = [pair for a, b in itertools.permutations(groups, 2) if (pair := _difference(a, b))]
            compared.append((groups, pairs))
    _read([pair for _, pairs in compared for pair in pairs])
    every: list[tuple[Any, ...]] = []
    for groups, pairs in compared:
        data, runs = groups[0].data, [run for group in groups for run in group.done]
        what = f"{title(data)}: {describe(groups[0].config)}"
        rows = [(group.name, group.values("test", "accuracy")) for group in groups]
        alt = "; ".join(f"{name}: {show(mean_sd(values))}" for name, values in rows)
        image = draw(material, slug("controls", data, runs[0].name), alt, dots, rows, "test accuracy")
        caption = f"{what}. Ticks are seeds, the dot their mean, the bar one sample standard deviation either way."
        blocks.append(figure(caption, [image], runs))
        table = [
            [g.name, *(show(g.measured(part, "accuracy")) for part in ("test", "val")), str(len(g.done)), numbers([g])]
            for g in groups
        ]
        head = ("setting", "test accuracy", "validation", "seeds", "runs")
        blocks.append(Table(what, head, table, frozenset({0, 4})))
        every += [(what, *pair) for pair in pairs]
        if pairs:
            head = ("setting", "control", "test accuracy", "control's", "points", "std. error", "reading")
            text = (
                f"{what}: settings that differ in one thing only. Points are hundredths of test accuracy; the standard"
                " error is that of the difference of the two means over seeds."
            )
            blocks.append(Table(text, head, [pair[:7] for pair in pairs], frozenset({0, 1, 6})))
    worth = [(what, row) for what, *row in every if row[7] == "init" and row[1].startswith("from scratch")]
    if worth:
        head = ("same budget and model", "start", "test accuracy", "from scratch", "points", "std. error", "reading")
        text = "What pretraining is worth: each comparison with scratch that differs in nothing else, one a row."
        rows = [[what, row[0], *row[2:7]] for what, row in sorted(worth, key=lambda pair: pair[0])]
        blocks.insert(0, Table(text, head, rows, frozenset({0, 1, 6})))
    text = [
        *_verdict(worth),
        "Within each comparison data, epochs, batch size and model are the same; what differs is in the name."
        " A difference counts as clear where Welch's t-test finds it at the 5 % level after Holm's correction for the"
        f" number of comparisons on this page, {sum(row[5] != NONE for row in every)}; one seed supports no such"
        " statement.",
    ]
    return Section("controls", "Controls: what makes the difference", text, blocks) if blocks else None


def _difference(a: Group, b: Group) -> list[Any] | None:
    """A row on what a gains over its control b, which starts from scratch, without augmentation, or as the recipe."""
    left, right = aspects(a.runs[0]), aspects(b.runs[0])
    differing = [key for key in left if left[key] != right.get(key)]
    if len(differing) != 1:
        return None
    plainness = [(g.config["init"] == "none", not augmented(g.config), -len(g.name), g.name) for g in (a, b)]
    x, y = a.measured("test", "accuracy"), b.measured("test", "accuracy")
    if plainness[0] > plainness[1] or x is None or y is None:
        return None
    points = 100 * (x.mean - y.mean)
    error, p = NONE, None
    if x.deviation is not None and y.deviation is not None:
        of_x, of_y = x.deviation**2 / x.n, y.deviation**2 / y.n
        spread = 100 * math.sqrt(of_x + of_y)
        freedom = (of_x + of_y) ** 2 / (of_x**2 / (x.n - 1) + of_y**2 / (y.n - 1)) if spread else 1
        error, p = f"{spread:.2f}", student_p(points / spread, freedom) if spread else float(points == 0)
    return [a.name, b.name, show(x), show(y), f"{points:+.2f}".replace("-", MINUS), error, p, differing[0]]


def student_p(t: float, freedom: float) -> float:
    """The two-sided p-value of Student's t, for any number of degrees of freedom from 1.

    With t = sqrt(freedom) tan(angle) the density is cos(angle) ** (freedom - 1), up to a factor.
    """
    angles = (np.arange(100_000) + 0.5) * (math.pi / 200_000)  # from 0 to a right angle
    density = np.cos(angles) ** (freedom - 1)
    return float(density[angles > math.atan(abs(t) / math.sqrt(freedom))].sum() / density.sum())


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several hypotheses are rejected, so that a false one among them is as rare as `level` (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    held = next((rank for rank, i in enumerate(order) if p_values[i] > level / (len(order) - rank)), len(order))
    rejected = set(order[:held])
    return [i in rejected for i in range(len(p_values))]


def _read(rows: Sequence[list[Any]]) -> None:
    """Put in the place of each p-value what it says, given all the others."""
    judged = [row for row in rows if row[6] is not None]
    for row in rows:
        row[6] = row[6] if row[6] is not None else "one seed: no statement"
    for row, clear in zip(judged, holm([row[6] for row in judged]), strict=True):
        row[6] = ("worse" if row[4].startswith(MINUS) else "better") if clear else "no clear difference"


def _verdict(rows: Sequence[tuple[str, Sequence[Any]]]) -> list[str]:
    """In words what the comparisons of pretrained with untrained encoders say, all together."""
    judged = [(what, row) for what, row in rows if row[5] != NONE]
    if not judged:
        return ["Does pretraining help? No comparison with scratch has two seeds on both sides yet."] if rows else []
    counts = Counter(row[6] for _, row in judged)
    text = (
        f"Does pretraining help? Comparisons with scratch that differ in nothing else: {len(judged)}. Clearly better:"
        f" {counts['better']}; clearly worse: {counts['worse']}; no clear difference: {counts['no clear difference']}."
    )
    for word, choose in (("gain", max), ("loss", min)):
        clear = [(what, row) for what, row in judged if row[6] == ("better" if word == "gain" else "worse")]
        if clear:
            what, row = choose(clear, key=lambda pair: float(pair[1][4].replace(MINUS, "-")))
            text += f" The largest {word}: {row[4]} points, {row[0]}, on {what} ({row[2]} against {row[3]})."
    return [text]


def label_fractions(material: Material) -> Section | None:
    """Accuracy over the share of the labels, one line for each start."""
    blocks: list[Table | Figure] = []
    loose = tuple(field for field in BUDGET if field not in PACE)
    for family in families(material.of("finetune"), loose):
        lines: dict[str, dict[float, Group]] = {}
        for group in sorted(family, key=lambda g: g.config["epochs"]):  # of two lengths at one share, the shorter
            same = next((n for n, line in lines.items() if _rest(next(iter(line.values()))) == _rest(group)), None)
            if group.done and group.config["label_fraction"] not in lines.get(same or "", {}):
                name = same or _without_share(group.name)
                line = lines.setdefault(name if same or name not in lines else group.name, {})
                line[group.config["label_fraction"]] = group
        lines = {name: line for name, line in lines.items() if len(line) > 1}
        if not lines:
            continue
        runs = [run for line in lines.values() for group in line.values() for run in group.done]
        data = runs[0].data
        epochs = sorted({(run.config["label_fraction"], run.config["epochs"]) for run in runs})
        paces = ", ".join(f"{share:.3g}: {count}" for share, count in epochs)
        measured = {n: {s: group.values("test", "accuracy") for s, group in line.items()} for n, line in lines.items()}
        shown = dict(measured)
        if data == "cifar10":
            shown["SSMAE, published (arXiv 2601.20072)"] = {k: [v] for k, v in published.CIFAR10_LABELS.items()}
        said = (f"{n}: " + ", ".join(f"{s:g} {show(mean_sd(v))}" for s, v in p.items()) for n, p in shown.items())
        name = slug("labels", data, runs[0].name)
        image = draw(material, name, "; ".join(said), fractions, shown, "test accuracy")
        caption = (
            f"{title(data)}: test accuracy over the share of the training labels, on a logarithmic axis; bars are one"
            f" sample standard deviation over seeds. Epochs at each share: {paces}."
        )
        blocks.append(figure(caption, [image], runs))
        shares = sorted({share for line in lines.values() for share in line})
        rows = [[n, *(show(mean_sd(points.get(share, []))) for share in shares)] for n, points in measured.items()]
        head = ("start", *(f"{share:.3g}" for share in shares))
        blocks.append(Table(f"{title(data)}: test accuracy by share of the labels.", head, rows))
    known = ", ".join(f"{accuracy:.4f} with {n:,}" for n, accuracy in published.CIFAR10_SEMI_SUPERVISED.items())
    text = (
        "Methods that learn from the unlabelled images while they classify are ahead: on CIFAR-10 FixMatch reports"
        f" {known} labels, with a convolutional network (WRN-28-2, arXiv 2001.07685)."
    )
    return Section("labels", "Few labels", [text], blocks) if blocks else None


def _rest(group: Group) -> dict[str, Any]:
    """What is equal along a line of shares."""
    return {k: v for k, v in aspects(group.runs[0]).items() if k not in PACE}


def _without_share(name: str) -> str:
    """A group's name without what changes along a line of shares."""
    changing = tuple(field.replace("_", " ") for field in PACE)
    kept = [p for p in name.split(", ") if not p.endswith("of the labels") and p != "all labels"]
    return ", ".join(p for p in kept if not p.startswith(changing))
