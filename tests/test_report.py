"""The page, as its reader sees it: built from small run folders written by hand, without any training."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys

import pytest
from pages import Drawing, note_drawings, page
from run_folders import PNG, change, write

from maelab import figures, recipes
from maelab.cli import signature
from maelab.commandline import parse  # the very parser that a user's command meets
from maelab.errors import RunError, UsageError
from maelab.report import report
from maelab.report.controls import holm, student_p
from maelab.report.groups import command, families, load


@pytest.fixture(autouse=True)
def drawings(monkeypatch) -> list[Drawing]:
    """What the pages would show in pictures. A page is drawn for the command below, in a process of its own."""
    return note_drawings(monkeypatch)


@pytest.fixture
def runs(tmp_path):
    """Two seeds of an MNIST autoencoder; three each of a classifier from it and from scratch, and one unfinished."""
    folder = tmp_path / "all"
    for seed in (0, 1):
        write(folder / f"mae-s{seed}", "pretrain", "mnist", 0.1 + seed / 50, seed=seed)
        (folder / f"mae-s{seed}" / "figures").mkdir()
        (folder / f"mae-s{seed}" / "figures" / "reconstructions.png").write_bytes(PNG)
    for seed, (with_mae, scratch) in enumerate([(0.991, 0.981), (0.993, 0.980), (0.992, 0.979)]):
        write(folder / f"f-s{seed}", "finetune", "mnist", with_mae, seed=seed, init=f"elsewhere/mae-s{seed % 2}")
        write(folder / f"n-s{seed}", "finetune", "mnist", scratch, seed=seed)
    write(folder / "f-s3", "finetune", "mnist", None, seed=3, init="elsewhere/mae-s1")
    return folder


def test_the_page_says_means_and_differences_and_stands_alone(runs, tmp_path):
    shown = page(runs, tmp_path / "page.html")
    text = shown.text
    assert "0.9920 ± 0.0010" in text and "0.9800 ± 0.0010" in text  # by hand: 0.991, 0.993, 0.992
    assert "0.1100 ± 0.0141" in text  # the autoencoders: 0.10, 0.12
    assert "from MNIST MAE from scratch 0.9920 ± 0.0010 0.9800 ± 0.0010 +1.20 0.08 better" in text
    assert "Clearly better: 1; clearly worse: 0" in text
    assert "batch 256 from MNIST MAE 0.9920 ± 0.0010 0.9800 ± 0.0010 +1.20 0.08 better" in text  # its worth
    assert "unfinished: 2 of 2 epochs" in text and "1 more unfinished" in text
    assert "k-NN accuracy, validation over the epochs" in (tmp_path / "page.html").read_text()
    assert "0.9927" in text and "6.679 days" in text and "claim without a log" in text  # the reports
    assert "cpu, bf16" in text and "2.13.0" in text
    # it stands alone
    assert shown.addresses and all(a.startswith(("data:image/png;base64,", "#")) for a in shown.addresses)
    assert "script" not in shown.tags and "link" not in shown.tags
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", (tmp_path / "page.html").read_text())
    targets = {a for a in shown.addresses if a.startswith("#run-")}
    assert len(targets) == 9  # each run is linked from what it made


def test_groups_differ_in_their_seed_alone(runs):
    loaded, _, _ = load([runs])
    (family,) = families([run for run in loaded if run.task == "finetune"])
    sizes = {group.name: (len(group.runs), len(group.done)) for group in family}
    assert sizes == {"from MNIST MAE": (4, 3), "from scratch": (3, 3)}


def test_seeds_that_have_their_own_images_are_one_group(tmp_path):
    for seed in (0, 1, 2):
        write(tmp_path / "r" / f"n-{seed}", "finetune", "mnist", 0.9, seed=seed, split_seed=seed, label_fraction=0.01)
    loaded, _, _ = load([tmp_path / "r"])
    assert [[len(group.runs) for group in family] for family in families(loaded)] == [[3]]


def test_groups_are_named_by_what_differs(tmp_path):
    write(tmp_path / "a", "finetune", "mnist", 0.9)
    write(tmp_path / "b", "finetune", "mnist", 0.9, label_fraction=0.01)
    plain = dict.fromkeys(("affine_degrees", "affine_scale", "affine_translate", "affine_shear"), 0.0)
    write(tmp_path / "c", "finetune", "mnist", 0.9, **plain)
    write(tmp_path / "d", "finetune", "mnist", 0.9, init="gone/x", adapt_pos_embed="reinit")
    write(tmp_path / "e", "finetune", "mnist", 0.9, epochs=7)
    loaded, _, _ = load([tmp_path])
    named = [[group.name for group in family] for family in families(loaded)]
    assert named == [
        ["from scratch", "from scratch, no augmentation", "from gone/x, new position embedding"],
        ["from scratch"],  # with few labels: another budget
        ["from scratch"],
    ]  # fmt: skip


def test_few_labels_are_a_budget_that_is_named(tmp_path):
    for name, init in {"a": "none", "b": "gone/x"}.items():
        write(tmp_path / "r" / name, "finetune", "mnist", 0.9, label_fraction=0.01, init=init)
    write(tmp_path / "r" / "c", "finetune", "mnist", 0.9)
    text = page(tmp_path / "r", tmp_path / "page.html").text
    assert "1% of the labels. Ticks are seeds" in text


def test_two_seeds_a_side_count_by_their_own_degrees_of_freedom_and_among_all_that_is_compared(tmp_path):
    texts = []
    for epochs, scratch, begun in ((1, (0.7551, 0.7478), (0.7811, 0.7896)), (2, (0.8192, 0.8193), (0.8364, 0.8394))):
        for seed in (0, 1):
            folder = tmp_path / "all" / f"{epochs}-{seed}"
            write(folder / "n", "finetune", "cifar10", scratch[seed], seed=seed, epochs=epochs)
            write(folder / "f", "finetune", "cifar10", begun[seed], seed=seed, epochs=epochs, init="elsewhere/mae")
        texts.append(page(tmp_path / "all", tmp_path / f"{epochs}.html").text)
    alone, both = texts
    assert "+3.39 0.56 better" in alone  # Welch: t = 6.05, 1.96 degrees of freedom, p = 0.028
    assert "+3.39 0.56 no clear difference" in both  # Holm: the lower of two has to be below 0.025
    assert re.search(r"\+1.8[67] 0.15 no clear difference", both)  # t = 12.4, 1.00 degrees: p = 0.051
    assert "comparisons on this page, 1;" in alone and "comparisons on this page, 2;" in both


@pytest.mark.parametrize(
    ("t", "freedom", "p"),  # from tables; the first has a closed form, any number of them will do
    [(1, 1, 0.5), (12.706, 1, 0.05), (4.303, 2, 0.05), (4.604, 4, 0.01), (-2.228, 10, 0.05), (1.962, 1000, 0.05)],
)
def test_p_values_are_those_of_students_tables(t, freedom, p):
    assert student_p(t, freedom) == pytest.approx(p, rel=2e-3)


def test_holm_steps_down_and_stops_at_the_first_that_fails():
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]  # 0.03 > 0.05 / 2, so 0.04 < 0.05 no more
    assert holm([0.04, 0.02]) == [True, True] and holm([0.06]) == [False] and holm([]) == []


def test_a_ninth_line_is_not_drawn_alone(tmp_path):
    for cut in range(9):
        write(tmp_path / "all" / f"r{cut}", "finetune", "mnist", 0.9, label_smoothing=cut / 20)
    page(tmp_path / "all", tmp_path / "page.html")
    alts = re.findall(r'alt="accuracy, validation over the epochs: ([^"]*)"', (tmp_path / "page.html").read_text())
    assert [alt.count(";") + 1 for alt in alts] == [5, 4]


def test_precision_is_what_was_taken_not_what_was_asked_for(tmp_path):
    write(tmp_path / "a", "finetune", "mnist", 0.9)
    write(tmp_path / "b", "finetune", "mnist", 0.9, precision="bf16", init="gone/x")
    write(tmp_path / "c", "finetune", "mnist", 0.9, precision="fp32")
    loaded, _, _ = load([tmp_path])
    assert [run.config["precision"] for run in loaded] == ["bf16", "bf16", "fp32"]
    assert ["--precision" in command(run) for run in loaded] == [False, True, True]


def test_errors_of_normalised_pixels_are_starred(tmp_path):
    write(tmp_path / "r" / "a", "pretrain", "mnist", 0.11)
    assert "Starred" not in page(tmp_path / "r", tmp_path / "page.html").text
    write(tmp_path / "r" / "b", "pretrain", "cifar10", 0.03)
    text = page(tmp_path / "r", tmp_path / "page.html").text
    assert "0.0300*" in text and "0.1100*" not in text and "Starred: trained on normalised pixels" in text


def test_report_b_meets_every_run_of_its_cell_at_the_nearest_length(tmp_path):
    for name, epochs, warmup in (("a", 10, 1.0), ("b", 10, 0.1), ("c", 60, 1.0)):
        fields = {"patch_size": 7, "mask_ratio": 0.5, "epochs": epochs, "warmup_epochs": warmup}
        write(tmp_path / "all" / name, "pretrain", "mnist", 0.1, **fields)
    rows = page(tmp_path / "all", tmp_path / "page.html").text.split("MNIST autoencoders: training loss")[1][:700]
    assert "7 0.5 warmup epochs 1.0 0.6934 1.0000" in rows and "7 0.5 warmup epochs 0.1 0.6934 1.0000" in rows
    assert rows.count("7 0.5 ") == 2  # not the one of 60 epochs


def test_labels_curve_lists_each_share(tmp_path):
    for share in (0.01, 0.1, 1.0):
        for seed in (0, 1):
            write(
                tmp_path / "r" / f"{share}-s{seed}", "finetune", "cifar10", share / 2, label_fraction=share, seed=seed
            )
    write(tmp_path / "r" / "longer", "finetune", "cifar10", 0.9, epochs=20)  # no part of the line: another length
    text = page(tmp_path / "r", tmp_path / "page.html").text
    assert "from scratch 0.0050 ± 0.0000 0.0500 ± 0.0000 0.5000 ± 0.0000" in text


def test_commands_make_the_run_again(tmp_path):
    fields = {"seed": 3, "flip": True, "limit": 500, "img_size": [28, 28], "muon_lr": 0.05, "precision": "fp32"}
    write(tmp_path / "a b", "finetune", "mnist", 0.9, **fields)
    (run,), _, _ = load([tmp_path])
    line = command(run)
    assert line.startswith("maelab finetune mnist --init none ") and line.endswith(f"'{tmp_path.name}/a b'")
    words = shlex.split(line)[3:-2]
    typed = parse(signature("finetune"), ["mnist", *words])["config"]
    again = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(recipes.finetune_mnist(), **typed))))
    assert again == {k: v for k, v in run.config.items() if k in again}


def test_sweeps_show_both_rankings(tmp_path):
    cells = [
        {"settings": {"patch_size": "4", "mask_ratio": "0.5"}, "masked_mse": 0.3, "finetune_accuracy": 0.97},
        {"settings": {"patch_size": "7", "mask_ratio": "0.5"}, "masked_mse": 0.2, "finetune_accuracy": 0.95},
        {"settings": {"patch_size": "5", "mask_ratio": "0.5"}, "error": "5 does not divide 28"},
    ]
    folder = tmp_path / "sweep"
    write(folder / "patch_size=4,mask_ratio=0.5" / "pretrain", "pretrain", "mnist", 0.3, patch_size=4, mask_ratio=0.5)
    (folder / "sweep.json").write_text(json.dumps({"complete": True, "cells": cells}))
    text = page(folder, tmp_path / "page.html").text
    assert "4 0.5 0.3000 0.9700 1 2" in text and "7 0.5 0.2000 0.9500 2 1" in text  # downstream, then by error
    assert "5 does not divide 28" in text and "belong to other tasks" in text
    line = "maelab sweep mnist --grid patch_size=4,7,5 --grid mask_ratio=0.5 --epochs 2"
    assert f"a sweep of 3 cells, run 1 {line}" in text  # among the commands that print shows too
    run = folder / "patch_size=4,mask_ratio=0.5" / "pretrain"
    result = json.loads((run / "result.json").read_text()) | {"patches": 49, "hidden": 25}
    (run / "result.json").write_text(json.dumps(result))
    assert "4 0.5 25 of 49 0.3000 0.9700 1 2" in page(folder, tmp_path / "page.html").text


def test_names_cannot_break_the_page(drawings, tmp_path, monkeypatch):
    evil, folder = "<img src=x onerror=alert(1)> $\\frac", tmp_path / "r"
    for name, fields in {
        evil: {"init": '"><script>alert(2)</script> $\\frac'},
        "scratch": {},
        "few": {"init": '"><script>alert(2)</script> $\\frac', "label_fraction": 0.1},
    }.items():
        run = write(folder / name, "finetune", "mnist", 0.9, **fields)
        change(run / "result.json", "test", "per_class", value={"<b>a$^": 0.75, "</td>": 1.0})
    cells = [{"settings": {"<i>$_": "</td>$^{", "b": f"{n}"}, "masked_mse": n, "error": "<u>"} for n in (1, 2)]
    cell = write(folder / "sweep" / "<s>=$_,b=1" / "pretrain", "pretrain", "mnist", 0.3, **cells[0]["settings"])
    (folder / "sweep" / "sweep.json").write_text(json.dumps({"complete": True, "cells": cells}))
    shown = page(folder, tmp_path / "page.html")
    assert not {"script", "b", "i", "u", "s"} & {*shown.tags}
    assert all(a.startswith(("data:image/png;base64,", "#")) for a in shown.addresses)
    assert all(text in shown.text for text in (evil, "<b>a$^", "</td>$^{", "<u>", cell.parent.name))
    monkeypatch.setattr(figures, "DPI", 20)
    kinds = {drawing.how: drawing for drawing in drawings}
    assert {how.__name__ for how in kinds} == {"dots", "fractions", "curve", "heat_map", "confusion"}
    for how, drawing in kinds.items():
        how(tmp_path / "picture.png", *drawing.arguments)


def test_damaged_folders_are_named_and_skipped(runs, tmp_path, capsys):
    (runs / "f-s0" / "config.json").write_text('{"task": ')
    (runs / "n-s0" / "result.json").write_text('{"test": {"accuracy": NaN}}')
    outside = tmp_path / "secret.png"
    outside.write_bytes(PNG)
    picture = runs / "mae-s0" / "figures" / "reconstructions.png"
    picture.unlink()
    picture.symlink_to(outside)
    shown = page(runs, tmp_path / "page.html")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(line.startswith("maelab: left out: ") for line in said)
    for word in (
        "f-s0/config.json is damaged",
        "n-s0 is damaged: it holds no test.accuracy",
        "points outside of its run folder",
    ):
        assert any(word in line for line in said) and word in shown.text
    assert "0.9925 ± 0.0007" in shown.text  # of the two that are left


@pytest.mark.parametrize(
    ("field", "value"), [("epochs", "many"), ("val_fraction", None), ("init", 3), ("flip", "x"), ("recipe", [])]
)
def test_a_config_of_wrong_types_is_damage(field, value, tmp_path):
    write(tmp_path / "fit", "finetune", "mnist", 0.9)
    write(tmp_path / "odd", "finetune", "mnist", 0.9, **{field: value})
    loaded, _, problems = load([tmp_path])
    assert [run.folder.name for run in loaded] == ["fit"]
    assert len(problems) == 1 and f"{field} is {value!r}" in problems[0][1]


def test_refusals(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no run folder"):
        report([runs, tmp_path / "empty"], out=tmp_path / "page.html")
    with pytest.raises(UsageError, match="there is no folder"):
        report([tmp_path / "none"], out=tmp_path / "page.html")
    with pytest.raises(UsageError, match="is a folder"):
        report([runs], out=tmp_path)
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(RunError, match="no run can be read"):
        report([tmp_path / "empty"], out=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command_writes_page_and_figures_without_torch(tmp_path):
    write(tmp_path / "r" / "a", "pretrain", "mnist", 0.1)
    code = (
        "import sys; from maelab.cli import main; status = main(sys.argv[1:]);"
        " sys.exit(status or 10 * ('torch' in sys.modules))"
    )
    words = ["report", "r", "--out", "page.html", "--figures", "pictures", "--json"]
    ended = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["runs"] == 1 and (tmp_path / "page.html").read_bytes().startswith(b"<!DOCTYPE html>")
    assert result["figures"] and all(
        (tmp_path / file).read_bytes().startswith(b"\x89PNG") for file in result["figures"]
    )


def test_columns_that_no_run_fills_are_left_out(tmp_path):
    folder = write(tmp_path / "runs" / "mae", "pretrain", "mnist", 0.1)
    shown = page(tmp_path / "runs", tmp_path / "page.html").text
    assert "validation MSE" in shown and "linear, test" not in shown and "k-NN, validation seeds" not in shown
    result = json.loads((folder / "result.json").read_text())
    result["val"]["knn_accuracy"] = 0.875
    (folder / "result.json").write_text(json.dumps(result))
    shown = page(tmp_path / "runs", tmp_path / "page.html").text
    assert "k-NN, validation seeds" in shown and "0.8750" in shown
