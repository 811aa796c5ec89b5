"""Every number on the page is the one that its heading says: in these runs no two of them are alike."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from pages import Drawing, note_drawings, page
from run_folders import change, write

from maelab import figures as pictures
from maelab.report import figures

NONE = "\N{EN DASH}"


@pytest.fixture(autouse=True)
def drawings(monkeypatch) -> list[Drawing]:
    """What the pages would show in pictures."""
    return note_drawings(monkeypatch)


@pytest.fixture
def shown(monkeypatch) -> list[Figure]:
    """The figures that are drawn in the test."""
    seen: list[Figure] = []
    save = figures.save_figure
    monkeypatch.setattr(pictures, "DPI", 20)
    monkeypatch.setattr(figures, "save_figure", lambda figure, file: (seen.append(figure), save(figure, file))[1])
    return seen


def classifier(folder: Path, data: str = "mnist", *, val: float, test: float, **fields) -> Path:
    """A finished fine-tuning whose accuracies are all different, the epochs' too."""
    run = write(folder, "finetune", data, test, **fields)
    change(run / "result.json", "val", "accuracy", value=val)
    rows = [
        {"epoch": epoch, "split": split, "loss": base + epoch / 100, "accuracy": base + 0.1 + epoch / 1000}
        for epoch in (1, 2)
        for split, base in (("train", 0.3 + val / 10), ("val", 0.6 + val / 10))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def drawn(drawings: list[Drawing], name: str) -> list[Drawing]:
    return [drawing for drawing in drawings if drawing.name.startswith(name)]


@pytest.fixture
def rivals(tmp_path):
    """Classifiers from scratch, two seeds a setting: one is better on validation, the other on the test images. The
    same for those from an MNIST autoencoder, and on CIFAR-10."""
    folder = tmp_path / "all"
    write(folder / "mae", "pretrain", "mnist", 0.1)
    for data, init, seed in itertools.product(("mnist", "cifar10"), ("none", "x/mae"), (0, 1)):
        off = (data == "cifar10") * 0.1 + (init == "none") * 0.01 + seed / 1000
        fields = {"seed": seed, "init": init, "epochs": 2}
        if init != "none" and data == "cifar10":
            config = json.loads((folder / "mae" / "config.json").read_text())
            fields |= {k: config[k] for k in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
        names = [f"{data}-{init[0]}-{what}-{seed}" for what in ("chosen", "lucky")]
        classifier(folder / names[0], data, val=0.95 - off, test=0.93 - off, **fields)
        classifier(folder / names[1], data, val=0.90 - off, test=0.99 - off, **fields, label_smoothing=0.25)
    return folder


def test_the_best_is_what_is_best_on_validation_everywhere(rivals, tmp_path, drawings):
    said = page(rivals, tmp_path / "page.html")
    best = {(row["data"], row["start"]): row for row in said.table("Best classifier for each")}
    figures_of = {key: (row["test accuracy"], row["validation"]) for key, row in best.items()}
    assert figures_of == {
        ("MNIST", "from MNIST MAE"): ("0.9295 ± 0.0007", "0.9495 ± 0.0007"),
        ("MNIST", "from scratch"): ("0.9195 ± 0.0007", "0.9395 ± 0.0007"),
        ("CIFAR-10", "from MNIST MAE"): ("0.8295 ± 0.0007", "0.8495 ± 0.0007"),
        ("CIFAR-10", "from scratch"): ("0.8195 ± 0.0007", "0.8395 ± 0.0007"),
    }
    assert [row[:5] for row in said.rows("MNIST and CIFAR-10: the best")] == [
        ["from MNIST MAE", "0.9295 ± 0.0007", "7.05%", "0.8295 ± 0.0007", "17.05%"],
        ["from scratch", "0.9195 ± 0.0007", "8.05%", "0.8195 ± 0.0007", "18.05%"],
    ]
    # beside the reports: that from the autoencoder, and of these the one chosen on validation
    for caption, test in {"MNIST, epoch by epoch": "0.9295", "CIFAR-10, epoch by epoch": "0.8295"}.items():
        assert said.rows(caption)[-1][-1] == f"{test} ± 0.0007"
    for caption, test in {"MNIST. Ours": "0.9295 ± 0.0007", "CIFAR-10. Ours": "0.8295 ± 0.0007"}.items():
        assert said.rows(caption)[-1] == ["test", "", "", NONE, test]
    ours = [row for row in said.rows("CIFAR-10 test accuracy, from") if row[0].startswith("ours")]
    assert [(row[0], row[3]) for row in ours] == [
        ("ours, from scratch", "0.8195 ± 0.0007"), ("ours, from MNIST MAE", "0.8295 ± 0.0007"),
    ]  # fmt: skip
    # in the comparisons every setting is shown, that which is best on validation first
    (mnist,) = drawn(drawings, "controls-mnist")
    assert [name for name, _ in mnist.arguments[0]] == [
        "from MNIST MAE", "from scratch", "from MNIST MAE, label smoothing 0.25", "from scratch, label smoothing 0.25",
    ]  # fmt: skip
    assert len(drawn(drawings, "confusion-")) == 4
    for number in ("0.9895", "0.9795", "0.8895", "0.8795"):  # those with luck on the test images, nowhere as the best
        for caption in ("Best classifier", "MNIST and CIFAR-10: the best", "MNIST. Ours", "CIFAR-10. Ours"):
            assert not any(number in cell for row in said.rows(caption) for cell in row)


def test_no_column_says_what_another_one_should(tmp_path):
    folder = tmp_path / "all"
    for seed in (0, 1):
        mae = write(folder / f"mae-s{seed}", "pretrain", "mnist", 0.12 + seed / 50, seed=seed)
        change(mae / "result.json", "train", "masked_mse", value=0.32 + seed / 50)
        change(mae / "result.json", "val", "knn_accuracy", value=0.52 + seed / 50)
        change(mae / "result.json", "params", value=1_230_000)
        change(mae / "result.json", "images_per_s", value=777.0 + seed)
        change(mae / "result.json", "train_time_s", value=60.0 + 2 * seed)
        config = {
            "task": "probe",
            "recipe": "mnist",
            "data": "same",
            "init": f"x/mae-s{seed}",
            "seed": seed,
            "epochs": 2,
        }
        probe = folder / f"probe-s{seed}"
        probe.mkdir()
        (probe / "config.json").write_text(json.dumps(config))
        test, val = (
            {"knn_accuracy": base + 0.01 + seed / 50, "accuracy": base + 0.03 + seed / 50} for base in (0.71, 0.81)
        )
        result = {"task": "probe", "data": "mnist", "test": test, "val": val, "train_time_s": 5.0}
        (probe / "result.json").write_text(json.dumps(result))
    classifier(folder / "c", val=0.91, test=0.83, seed=3)
    said = page(folder, tmp_path / "page.html")
    (row,) = said.table("Masked autoencoders:")
    assert {head: row[head] for head in row if head != "runs"} == {
        "data": "MNIST", "parameters": "1.23M", "patch": "4", "hidden": "0.75", "epochs": "2",
        "train MSE": "0.3300 ± 0.0141", "validation MSE": "0.1300 ± 0.0141", "k-NN, validation": "0.5300 ± 0.0141",
        "k-NN, test": "0.7300 ± 0.0141", "linear, test": "0.7500 ± 0.0141", "seeds": "2", "time a run": "61 s",
    }  # fmt: skip
    (best,) = said.table("Best classifier for each")
    assert (best["test accuracy"], best["validation"]) == ("0.8300", "0.9100")
    listed = {row["run"].split("/")[-1]: row for row in said.table("Runs.")}
    assert [listed["c"][head] for head in ("seed", "validation", "test", "time")] == ["3", "0.9100", "0.8300", "61 s"]
    assert [listed["mae-s1"][head] for head in ("validation", "test", "time", "images/s")] == [
        "0.1400", NONE, "62 s", "778",
    ]  # fmt: skip
    assert [listed["probe-s0"][head] for head in ("validation", "test", "time")] == ["0.8400", "0.7400", "5.0 s"]
    # epoch by epoch: training loss, training accuracy, validation accuracy
    rows = said.rows("MNIST, epoch by epoch")
    assert [row[2::2] for row in rows[:2]] == [["0.4010", "0.4920", "0.7920"], ["0.4110", "0.4930", "0.7930"]]
    assert [row[2::2] for row in said.rows("MNIST. Ours")[:2]] == [["0.4920", "0.7920"], ["0.4930", "0.7930"]]
    (ours,) = [row for row in said.rows("MNIST autoencoder, patch 4") if row[0] == "ours"]
    assert ours[1:3] == ["0.3300 ± 0.0141", "0.1300 ± 0.0141"]


def test_the_autoencoder_beside_report_a_is_the_best_on_validation(tmp_path):
    for name, val, train, blr in (("chosen", 0.10, 0.30, 0.1), ("lucky", 0.20, 0.05, 0.2)):
        run = write(tmp_path / "r" / name, "pretrain", "mnist", val, blr=blr)
        change(run / "result.json", "train", "masked_mse", value=train)
    (_, ours) = page(tmp_path / "r", tmp_path / "page.html").rows("MNIST autoencoder, patch 4")
    assert ours[:3] == ["ours", "0.3000", "0.1000"]


def test_a_sweep_puts_every_judgement_into_its_own_column_and_picture(tmp_path, drawings):
    judgements = ("masked_mse", "knn_accuracy", "linear_accuracy", "finetune_accuracy")
    grid = list(itertools.product("24", ("0.3", "0.5", "0.7")))
    cells: list[dict[str, Any]] = [
        {"settings": {"patch_size": patch, "mask_ratio": ratio}}
        | {judgement: round(0.1 + j / 5 + (n + 1) * (j + 2) % 7 / 100, 4) for j, judgement in enumerate(judgements)}
        for n, (patch, ratio) in enumerate(grid)
    ]
    write(tmp_path / "sweep" / "a=1" / "pretrain", "pretrain", "mnist", 0.3)
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"complete": True, "cells": cells}))
    said = page(tmp_path / "sweep", tmp_path / "page.html")
    order = sorted(cells, key=lambda cell: -cell["finetune_accuracy"])
    errors = sorted(cell["masked_mse"] for cell in cells)
    assert said.rows("Sweep sweep, both rankings") == [
        [
            *cell["settings"].values(),
            *(f"{cell[j]:.4f}" for j in judgements),
            str(place),
            str(errors.index(cell["masked_mse"]) + 1),
        ]
        for place, cell in enumerate(order, 1)
    ]
    for judgement in judgements:
        (picture,) = (d for d in drawings if d.how is pictures.heat_map and judgement.replace("_", "-") in d.name)
        assert picture.arguments[0] == {tuple(cell["settings"].values()): cell[judgement] for cell in cells}
        assert picture.arguments[1] == ("patch_size", "mask_ratio")


def test_a_confusion_matrix_is_summed_over_seeds_with_the_true_classes_as_rows(tmp_path, drawings):
    for seed, counts in enumerate(([[5, 2, 0], [1, 4, 3], [0, 0, 9]], [[6, 0, 1], [0, 8, 0], [7, 0, 2]])):
        run = classifier(tmp_path / "r" / f"s{seed}", val=0.9, test=0.8, seed=seed)
        change(run / "result.json", "test", "confusion", value=counts)
        recall = {name: counts[i][i] / sum(counts[i]) for i, name in enumerate("abc")}
        change(run / "result.json", "test", "per_class", value=recall)
    said = page(tmp_path / "r", tmp_path / "page.html")
    (picture,) = drawn(drawings, "confusion-")
    assert picture.how is pictures.confusion
    assert picture.arguments == ([[11, 2, 1], [1, 12, 3], [7, 0, 11]], ["a", "b", "c"])
    assert said.rows("MNIST, from scratch: share of each class") == [
        ["a", "0.7857 ± 0.1010"], ["b", "0.7500 ± 0.3536"], ["c", "0.6111 ± 0.5500"],
    ]  # fmt: skip


VALUES = (0.1, 0.2, 0.6)  # mean 0.3, sample deviation 0.2646; of the population 0.2160, standard error 0.1528
DEVIATION = float(np.std(VALUES, ddof=1))


def bars(figure: Figure) -> list[np.ndarray]:
    """The ends of the error bars, (2, 2) each, of all lines."""
    (ax,) = figure.axes
    return [segment for lines in ax.containers for collection in lines[2] for segment in collection.get_segments()]  # type: ignore[attr-defined]


def test_bars_of_the_comparisons_are_what_the_caption_says(tmp_path, drawings, shown):
    for seed, value in enumerate(VALUES):
        for name, fields in {"a": {}, "b": {"label_smoothing": 0.3}}.items():
            off = 0.05 * (name == "b")
            classifier(tmp_path / "r" / f"{name}{seed}", val=0.9 - off, test=value + off, seed=seed, **fields)
    said = page(tmp_path / "r", tmp_path / "page.html")
    assert "the dot their mean, the bar one sample standard deviation either way" in said.text
    (picture,) = drawn(drawings, "controls-")
    assert picture.how is figures.dots
    assert [values for _, values in picture.arguments[0]] == [list(VALUES), [value + 0.05 for value in VALUES]]
    picture.how(tmp_path / "d.png", *picture.arguments)
    (figure,) = shown
    for place, mean in enumerate((0.3, 0.35)):
        expected = [[mean - DEVIATION, place], [mean + DEVIATION, place]]
        np.testing.assert_allclose(bars(figure)[place], expected)
        (dot,) = (line for line in figure.axes[0].lines if line.get_marker() == "o" and line.get_ydata()[0] == place)  # type: ignore[index]
        assert dot.get_xdata()[0] == pytest.approx(mean)  # type: ignore[index]
    (rows,) = (rows for _, head, rows in said.tables if head[:2] == ["setting", "test accuracy"])
    assert [row[1] for row in rows] == ["0.3000 ± 0.2646", "0.3500 ± 0.2646"]
    (difference,) = [row for caption, _, rows in said.tables if "differ in one thing only" in caption for row in rows]
    assert difference[4:6] == ["+5.00", "21.60"]  # hundredths; the root of twice 0.1528 squared


def test_bars_over_the_shares_of_labels_are_what_the_caption_says(tmp_path, drawings, shown):
    for share, off in ((0.1, 0.0), (1.0, 0.3)):
        for seed, value in enumerate(VALUES):
            classifier(tmp_path / "r" / f"{share}-{seed}", val=0.9, test=value + off, seed=seed, label_fraction=share)
    said = page(tmp_path / "r", tmp_path / "page.html")
    assert "bars are one sample standard deviation over seeds" in said.text
    (picture,) = drawn(drawings, "labels-")
    picture.how(tmp_path / "d.png", *picture.arguments)
    (figure,) = shown
    expected = [[[share, mean - DEVIATION], [share, mean + DEVIATION]] for share, mean in ((0.1, 0.3), (1.0, 0.6))]
    np.testing.assert_allclose(bars(figure), expected)
    assert said.rows("MNIST: test accuracy by share") == [["from scratch", "0.3000 ± 0.2646", "0.6000 ± 0.2646"]]


def test_a_curve_is_bold_for_the_mean_of_the_finished_and_thin_for_each_seed(tmp_path, drawings, shown):
    for seed, value in enumerate(VALUES):
        run = write(tmp_path / "r" / f"s{seed}", "finetune", "mnist", 0.9 if seed < 2 else None, seed=seed)
        rows = [
            {"epoch": epoch, "split": split, "loss": 1.0, "accuracy": value / epoch / (1 + (split == "train"))}
            for epoch in (1, 2, 3)
            for split in ("train", "val")
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = page(tmp_path / "r", tmp_path / "page.html")
    assert "A thin line is one seed, dotted while unfinished; a bold one is the mean over the finished" in said.text
    (picture,) = drawn(drawings, "curve-finetune-val-accuracy")
    picture.how(tmp_path / "c.png", *picture.arguments)
    lines = shown[0].axes[0].lines
    thin = {tuple(np.round(line.get_ydata(), 6)): line.get_linestyle() for line in lines if line.get_linewidth() < 1}  # type: ignore[call-overload]
    assert thin == {(0.1, 0.05, 0.033333): "-", (0.2, 0.1, 0.066667): "-", (0.6, 0.3, 0.2): ":"}
    (bold,) = (line for line in lines if line.get_linewidth() > 2)
    np.testing.assert_allclose(bold.get_ydata(), [0.15, 0.075, 0.05])  # type: ignore[arg-type]
    assert list(bold.get_xdata()) == [1, 2, 3] and bold.get_label() == "from scratch (n = 2)"  # type: ignore[arg-type]
