"""Names of classes, files and folders are data: in pictures, tables, CSV, pages, commands and other tools' formats."""

import csv
import inspect
import io
import json
import os
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from processes import Maelab

from maelab import figures
from maelab.config import RunOptions
from maelab.names import csv_cell, encodable, shell_word, short, visible
from maelab.report import figures as drawings
from maelab.report.groups import Group, load
from maelab.runs import commit
from maelab.tasks.predict import predict
from maelab.training.checkpoint import read_spec
from maelab.training.trackers import MLflow, log_outcome

BYTES = os.fsdecode(b"caf\xe9")  # no UTF-8
FORMULA, TAG = "=cmd|'calc'!A0", "<img src=x onerror=alert(1)>"
CLASSES = sorted(["$x_{$", FORMULA, TAG, BYTES, "a\nb", "\N{GRINNING FACE}"])
HOSTILE = (
    *CLASSES,
    r"$\frac$",
    "\x1b[31mred\x07",
    "\u202egnp.txt",
    "a\u2028b",
    "",
    "x" * 10_000,
    "\N{CJK RADICAL CLIFF}",
    "\ud800",
)
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\ud800-\udfff]")  # but for the line's end
CPU = ("--threads", 1, "--kernels", "torch")


# --- text -----------------------------------------------------------------------------------------------------------


def test_what_a_person_sees():
    assert visible("a\nb\r\t\x1b[31m\x9b\u202e\u2028\ufeff\x00") == r"a\nb\r\t\x1b[31m\u009b\u202e\u2028\ufeff\x00"
    assert visible(BYTES) == encodable(BYTES) == r"caf\xe9" and visible("\ud800") == r"\ud800"
    plain = "a b, Größe, \N{GRINNING FACE}, \u200d, חתול, $x$ \\n"
    assert visible(plain) == encodable(plain) == plain and visible(visible("a\n")) == visible("a\n")
    assert encodable("a\nb\x1b") == "a\nb\x1b"
    assert short("x" * 10_000, 8) == "xxxxxxx…" and short("a\nb", 8) == r"a\nb" and short("\n\n\n", 5) == r"\n\n…"


def test_what_a_spreadsheet_reads():
    for start in "=+-@\t\n\uff1d":
        assert csv_cell(f"{start}1+1") == f"'{start}1+1"
    for text in ("", "a=1", "0.5", "a,b\nc", BYTES):
        assert csv_cell(text) == text
    assert csv_cell("a\r=1+1") == r"a\r=1+1", "a writer of CSV may leave it bare, and it begins a row"
    assert csv_cell("\x1b[31m") == r"\x1b[31m" and csv_cell("\ud800\udc9b") == r"\ud800\x9b"
    assert csv_cell("\udcc2\udc9b[31m") == r"\xc2\x9b[31m", "their bytes would be a control character"


@pytest.mark.parametrize(
    "name", ["plain", "a b", "it's", "$(date)`id`", *CLASSES, "\\'\n'\\n", "\x1b\x9b\u202e!", "-x;y"]
)
def test_a_copied_word_is_the_name_again(name):
    word = shell_word(name)
    assert visible(word) == word
    said = subprocess.run(["bash", "-c", f"printf %s {word.replace('-x', './-x')}"], capture_output=True, check=True)
    assert os.fsdecode(said.stdout) == name.replace("-x", "./-x")


# --- pictures -------------------------------------------------------------------------------------------------------


def _public(module: Any) -> Iterator[tuple[str, Callable[..., None]]]:
    for name, function in vars(module).items():
        ours = inspect.isfunction(function) and function.__module__ == module.__name__ and name[0] != "_"
        if ours and next(iter(inspect.signature(function).parameters), "") == "file":
            yield name, function


def _arguments(names: list[str]) -> dict[str, tuple[Any, ...]]:
    """For each drawing, what puts these names wherever a text can go."""
    images = np.zeros((len(names), 3, 8, 8))
    groups = [(name, images, images, images) for name in names]
    row = {"epoch": 1, "split": "val", "loss": 0.5}
    return {
        "reconstructions": (groups, names[:3], names),
        "ratio_sweep": (groups, *[{i / 10: 0.5 for i in range(len(names))}] * 2),
        "animation": (groups,),
        "curves": ([row | dict.fromkeys(names[:4], 0.5)],),
        "predictions": (images, [*range(1, len(names)), 0], np.eye(len(names)), names),
        "rows": ([[(name, images[0]) for name in names], [("", None)]],),
        "mosaic": ([], np.zeros((0, 2))),
        "confusion": (np.eye(len(names), dtype=int), names),
        "heat_map": ({(name, other): 0.5 for name in names for other in names}, (names[0], names[1]), names[2]),
        "curve": ([Group(name, ()) for name in names], "val", "loss", names[0]),
        "dots": ([(name, [0.5, 0.6]) for name in names], names[0]),
        "fractions": ({name: {0.1: [0.5], 1.0: [0.6]} for name in names}, names[0]),
    }


DRAWINGS = dict([*_public(figures), *_public(drawings)])


@pytest.mark.parametrize("drawing", DRAWINGS)
def test_every_drawing_shows_names_as_they_are_written(drawing, tmp_path, monkeypatch):
    seen: list[Text] = []
    save = Figure.savefig
    monkeypatch.setattr(figures, "DPI", 30)
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (save(f, *a, **k), seen.extend(f.findobj(Text))))
    with warnings.catch_warnings():  # curves and the like may find no room: that they say, and draw
        warnings.filterwarnings("ignore", "constrained_layout not applied|Tight layout not applied")
        DRAWINGS[drawing](tmp_path / "picture", *_arguments(list(HOSTILE))[drawing])
    with Image.open(tmp_path / "picture") as picture:
        assert max(picture.size) < 5000
    for text in filter(Text.get_text, seen):
        assert not text.get_parse_math() and not text.get_usetex()
        assert not OBEYED.search(text.get_text()) and len(text.get_text()) < 300, text
    if drawing not in ("animation", "mosaic"):  # neither has a text
        assert any("$x_{$" in text.get_text() for text in seen) or drawing in ("curves", "ratio_sweep", "heat_map")


def test_every_picture_goes_through_the_same_door():
    sources = {file: file.read_text() for file in Path(figures.__file__).parent.rglob("*.py")}
    assert {file.name: source.count(".savefig(") for file, source in sources.items() if ".savefig(" in source} == {
        "figures.py": 1
    }


def test_what_fails_costs_no_result(tmp_path, capsys):
    with figures.optional("the picture c.png could not be drawn"):
        raise ValueError("\nbad \x1b[31m\nmore")
    assert capsys.readouterr().err == "the picture c.png could not be drawn: bad \\x1b[31m; the result stands\n"
    with figures.optional("x"):
        (tmp_path / "file").write_text("")
        figures.curves(tmp_path / "file" / "c.png", [{"epoch": 1, "split": "train", "loss": 1.0}])
    assert capsys.readouterr().err.startswith(f"x: cannot write {tmp_path}/file/c.png: ")
    with pytest.raises(KeyboardInterrupt), figures.optional("x"):
        raise KeyboardInterrupt


# --- from the folder to the page ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(maelab: Maelab, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder of images with hostile names; a classifier and an autoencoder of them; what each process said."""
    work, random = tmp_path_factory.mktemp("names"), np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (work / "images" / name).mkdir(parents=True)
        for i in range(5):
            pixels = random.integers(0, 60, (8, 8, 3), dtype=np.uint8) + 30 * number
            Image.fromarray(pixels.astype(np.uint8)).save(work / "images" / name / f"{i}.png")
    flags = (
        "--data",
        "folder:images",
        "--limit",
        10,
        "--img-size",
        8,
        8,
        "--patch-size",
        4,
        "--epochs",
        1,
        "--val-fraction",
        0.3,
    )
    said = {}
    for task, more in (("pretrain", ()), ("finetune", ("--init", "none"))):
        out = f"runs/{task[0]} \x1b[31m\ncafé"
        ended = maelab.run(task, "smoke", *more, *flags, "--out", out, *CPU, cwd=work, drawn=True)
        assert ended.status == 0 and "could not" not in ended.err, ended
        said[task] = ended.out
    return work, said


def _run(work: Path, task: str) -> Path:
    return next(path for path in (work / "runs").iterdir() if path.name.startswith(task[0]))


def test_training_ends_with_a_result_and_its_pictures(trained):
    work, said = trained
    run = _run(work, "finetune")
    assert list(json.loads((run / "result.json").read_text())["test"]["per_class"]) == CLASSES
    assert read_spec(run).class_names == tuple(CLASSES)
    for file in ("curves", "predictions", "confusion"):
        with Image.open(run / "figures" / f"{file}.png") as picture:
            assert picture.format == "PNG"
    assert said["finetune"].splitlines()[-1] == r"runs/f \x1b[31m\ncafé"


def test_predictions_in_every_form(trained, maelab: Maelab, tmp_path):
    work, _ = trained
    line = ("predict", _run(work, "finetune"), "images", "broken\x1b[31m\n.png", *CPU, "--top", len(CLASSES))
    (paths,) = [[str(file) for file in sorted((work / "images").rglob("*.png"))]]
    paths = [path.removeprefix(f"{work}/") for path in paths]

    exact = maelab.run(*line, "--json", cwd=work).json()["predictions"]
    assert sorted(entry["path"] for entry in exact[:-1]) == sorted(paths)
    assert {guess["label"] for guess in exact[0]["top"]} == set(CLASSES)

    table = maelab.run(*line, "--gallery", tmp_path / "g.png", cwd=work)
    lines = table.out.split("\n")[:-1]
    assert len(lines) == len(exact) and not OBEYED.search(table.out) and not OBEYED.search(table.err)
    seen, broken = table.err.splitlines()
    assert seen.startswith("images is the folder that ") and broken == (
        "cannot read broken\\x1b[31m\\n.png: matches no file"
    )
    assert all(line.endswith(visible(entry["path"])) for line, entry in zip(lines, exact, strict=True))
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.format == "PNG"

    ended = maelab.run(*line, "--csv", cwd=work)
    rows = list(csv.reader(io.StringIO(ended.out, newline="")))[1:]
    assert "\x1b" not in ended.out
    for row, entry in zip(rows[:-1], exact, strict=False):
        assert row[0] == entry["path"]
        assert row[2::2] == [f"'{FORMULA}" if g["label"] == FORMULA else g["label"] for g in entry["top"]]
        assert [float(cell) for cell in row[3::2]] == pytest.approx([g["probability"] for g in entry["top"]], abs=1e-6)
    for cell in (cell for row in rows for cell in row):
        assert not cell or cell[0] not in "=+-@\t\r\n"


def test_a_path_that_a_spreadsheet_would_compute(trained, maelab: Maelab):
    work, _ = trained
    (work / "=1+1.png").write_bytes(next((work / "images").rglob("*.png")).read_bytes())
    ended = maelab.run("predict", _run(work, "finetune"), "=1+1.png", "@x.png", "--csv", *CPU, cwd=work)
    assert [row[0] for row in csv.reader(io.StringIO(ended.out))] == ["path", "'=1+1.png", "'@x.png"]


def test_evaluation_listing_info_and_errors_are_plain_lines(trained, maelab: Maelab):
    work, _ = trained
    run = _run(work, "finetune")
    ended = maelab.run("evaluate", run, *CPU, cwd=work)
    assert ended.status == 0 and [line.split(": ")[0][2:] for line in ended.out.splitlines()[1:]] == [
        visible(name) for name in CLASSES
    ]
    for line in (("runs", "runs"), ("info", run), ("info", "none\x1b[31m\n")):
        ended = maelab.run(*line, cwd=work)
        assert not OBEYED.search(ended.out + ended.err), ended
    assert ended.error() == r"no run folder or checkpoint at none\x1b[31m\n"


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.words = ""
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.words += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_the_page_shows_names_and_commands_that_can_be_copied(trained, maelab: Maelab, tmp_path):
    work, _ = trained
    (work / "runs" / "damaged\x1b\n<b>").mkdir(exist_ok=True)
    (work / "runs" / "damaged\x1b\n<b>" / "config.json").write_text("{")
    ended = maelab.run("report", "runs", "--out", tmp_path / "page.html", "--figures", tmp_path / "drawn", cwd=work)
    assert ended.status == 0 and not OBEYED.search(ended.err) and r"damaged\x1b <b>" in ended.err
    shown = _Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert not OBEYED.search(shown.words) and all(visible(name) in shown.words for name in CLASSES)
    assert not {"b", "script"} & shown.tags and "onerror" not in shown.attributes and "srcset" in shown.attributes
    assert r"$'runs/f \x1b[31m\ncafé'" in shown.words
    assert all(file.parent == tmp_path / "drawn" for file in tmp_path.rglob("*.png"))


# --- a result is worth more than its pictures -----------------------------------------------------------------------


def test_a_tracker_without_pictures_still_gets_the_model(tmp_path):
    commit(tmp_path, {"best/config.json": b"{}", "best/model.safetensors": b""}, {})
    sent: list[str] = []

    class Client:
        def log_artifacts(self, run: str, folder: str, place: str) -> None:
            assert Path(folder).is_dir()
            sent.append(place)

    log_outcome(MLflow(Client(), "1"), tmp_path, {"epochs": 1})
    assert sent == ["model"]


@pytest.mark.parametrize(
    ("task", "pictures"),
    [("finetune", ("curves", "predictions", "confusion")), ("probe", ("curves",))],
)
def test_pictures_that_fail_leave_the_result(task, pictures, trained, maelab: Maelab, tmp_path):
    """A run that was stopped before its result, and finds a file where its pictures belong."""
    work, _ = trained
    smoke = ("smoke", "--init", "none", "--img-size", 8, 8, "--patch-size", 4, "--limit", 10)
    what = smoke if task == "finetune" else (_run(work, "pretrain"),)
    line = (task, *what, "--data", "folder:images", "--epochs", 1, "--val-fraction", 0.3, "--out", tmp_path / "run")
    stopped = maelab.run(*line, *CPU, cwd=work, die=("curves.png", 1, "before"))
    assert stopped.status == -9
    for file in (tmp_path / "run" / "figures").iterdir():
        file.unlink()
    (tmp_path / "run" / "figures").rmdir()
    (tmp_path / "run" / "figures").write_text("no folder")
    ended = maelab.run(*line, *CPU, "--json", cwd=work)
    result = ended.json()
    assert json.loads((tmp_path / "run" / "result.json").read_text()).items() <= result.items()
    lines = [line for line in ended.err.splitlines() if "the result stands" in line]
    assert [line.split(":")[0] for line in lines] == [f"the picture {name}.png could not be drawn" for name in pictures]


def test_a_run_folder_keeps_what_names_are(trained):
    """Exactly: for programs, nothing is escaped."""
    work, _ = trained
    runs, _, _ = load([work / "runs"])
    assert {run.name for run in runs} == {f"runs/{t} \x1b[31m\ncafé" for t in "pf"}
    entry = next(predict(_run(work, "finetune"), work / "images" / BYTES, options=RunOptions(device="cpu", threads=1)))
    assert entry["path"].endswith(f"{BYTES}/0.png") and entry["label"] in CLASSES
