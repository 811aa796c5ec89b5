"""The front pages cannot rot: the library example runs, commands exist, tree and tables match what is there."""

import base64
import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pages import note_drawings
from PIL import Image
from run_folders import change, write

import maelab
from maelab import cli, recipes, runs
from maelab.runs.checkpoints import PRETRAINED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = (ROOT / "docs" / "commands.md").read_text()


def blocks(language: str, text: str = README + COMMANDS) -> list[str]:
    parts = text.split("```")[1::2]  # every second part lies between fences
    return [part.removeprefix(f"{language}\n") for part in parts if part.split("\n")[0] == language]


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("") for line in block.splitlines()]
    return [line.removeprefix(".venv/bin/") for line in lines if line.removeprefix(".venv/bin/").startswith("maelab ")]


def test_the_library_example_runs(digits_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = {"limit": 200, "epochs": 1, "data": f"folder:{digits_folder}", "val_fraction": 0.1}
    pretrain, finetune, load = recipes.pretrain_smoke, recipes.finetune_smoke, maelab.load_data
    monkeypatch.setattr(recipes, "pretrain_smoke", lambda: replace(pretrain(), **small))
    monkeypatch.setattr(recipes, "finetune_smoke", lambda: replace(finetune(), **small))
    monkeypatch.setattr(maelab, "load_data", lambda name: load(small["data"]), raising=False)
    (example,) = blocks("python")
    scope: dict = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert 0 <= float(capsys.readouterr().out) <= 1
    test = load(small["data"]).test
    assert test is not None and scope["features"].shape == (len(test), 32)
    assert (scope["folder"] / "result.json").exists()


def test_the_example_is_ten_lines():
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line):
    words = shlex.split(line)[1:]
    command, flags = words[0], [word for word in words if word.startswith("--")]
    assert command in cli.COMMANDS, f"README shows `{line}`"
    if command in ("pretrain", "finetune"):
        assert words[1] in recipes.names(command)
    help_text = cli_help(command, words)
    for flag in flags:
        assert flag in help_text, f"README shows `{line}`, but {flag} is no flag of it"


def cli_help(command: str, words: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli._run([command, *(words[1:2] if command in ("pretrain", "finetune") else []), "--help"])
    return out.getvalue()


def test_the_tree_matches_the_folder():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (tree,) = [block for block in blocks("", text) if block.startswith("maelab/\n")]
    named = set(re.findall(r"^  (\w+(?:\.py|/))", tree, flags=re.MULTILINE))
    present = {
        path.name + "/" * path.is_dir()
        for path in (ROOT / "maelab").iterdir()
        if not path.name.startswith(("_", ".")) and path.suffix in (".py", "")
    }
    assert named == present
    for folder in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir()


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 120


def headings(file: Path) -> list[str]:
    """Of a page of Markdown, as links name them on the sites that show it."""
    texts = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts]


@pytest.mark.parametrize(
    "file", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda f: f.name
)
def test_links_between_the_pages_lead_somewhere(file):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", file.read_text()):
        page = file.parent / target if target else file
        assert page.exists(), target
        assert not anchor or anchor in headings(page), anchor


def test_the_log_begins_with_an_index_of_all_its_entries():
    entries = [name for name in headings(ROOT / "docs" / "log.md") if re.match(r"\d{4}-", name)]
    assert entries == re.findall(r"^\| \[.*\]\(#(.*)\) \|", (ROOT / "docs" / "log.md").read_text(), re.MULTILINE)


@pytest.fixture
def make():
    """results/make.py as a module."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "results" / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def elsewhere(make, tmp_path, monkeypatch):
    """The same, working in a folder of its own, with an empty table; what it calls in place of maelab does nothing."""
    for name, place in {"WORK": "work", "TABLE": "runs.jsonl", "PICTURES": "pictures", "BUILD": "build"}.items():
        monkeypatch.setattr(make, name, tmp_path / place)
    runs.write_records(make.TABLE, {})
    monkeypatch.setattr(make.sys, "executable", "/bin/true")
    return make


def stand_in(make, monkeypatch, file: Path, script: str) -> None:
    """A shell script in place of maelab: $1 is the whole command but its --out, which is $2."""
    head = 'shift 2; words=; while [ "$1" != --out ]; do words="$words$1 "; shift; done; set -- "$words" "$2"\n'
    file.write_text(f"#!/bin/sh\n{head}{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(make.sys, "executable", str(file))


def test_the_results_tables_are_those_of_the_kept_runs(make):
    records = runs.read_records(make.TABLE)
    results = make.RESULTS.read_text()
    assert make.with_tables(README, make.gains(records)) == README, "run make page"
    assert make.with_tables(results, make.tables(records)) == results, "run make page"
    assert make.tables(records).count("\n") > 30


def test_the_pictures_that_are_kept_belong_to_kept_runs(make):
    kept = {file.parent.relative_to(make.PICTURES).as_posix() for file in make.PICTURES.rglob("*.png")}
    assert kept and kept <= runs.read_records(make.TABLE).keys()


def test_of_a_sweep_half_done_the_complete_runs_are_kept_until_it_is_whole(elsewhere):
    sweep = elsewhere.WORK / "sweep"
    for cell, score in {"patch_size=14": 0.1, "patch_size=7": None}.items():
        write(sweep / cell / "pretrain", "pretrain", "mnist", score)

    def marked(complete: bool) -> None:
        cells = [{"settings": {"patch_size": "14"}}]
        runs.write_json(sweep / "sweep.json", {"complete": complete, "cells": cells})

    marked(complete=False)
    elsewhere.keep(["sweep", "never-begun"])
    half = runs.read_records(elsewhere.TABLE)
    assert half.keys() == {"sweep", "sweep/patch_size=14/pretrain"} and not half["sweep"]["sweep"]["complete"]
    write(sweep / "patch_size=4" / "pretrain", "pretrain", "mnist", 0.2)
    marked(complete=True)
    elsewhere.keep(["sweep"])
    whole = runs.read_records(elsewhere.TABLE)
    assert whole.keys() == half.keys() | {"sweep/patch_size=4/pretrain"} and whole["sweep"]["sweep"]["complete"]
    marked(complete=False)
    elsewhere.keep(["sweep"])
    assert runs.read_records(elsewhere.TABLE) == whole  # half a sweep replaces no whole one


def test_a_run_that_is_kept_again_replaces_its_record_and_an_unfinished_one_does_not(elsewhere):
    write(elsewhere.WORK / "a", "finetune", "mnist", 0.9)
    write(elsewhere.WORK / "ab", "finetune", "mnist", 0.8)
    elsewhere.keep(["a", "ab"])
    run = elsewhere.WORK / "a"
    change(run / "result.json", "test", "accuracy", value=0.95)
    elsewhere.keep(["a"])
    kept = runs.read_records(elsewhere.TABLE)
    assert {name: record["result"]["test"]["accuracy"] for name, record in kept.items()} == {"a": 0.95, "ab": 0.8}
    (run / "result.json").unlink()
    elsewhere.keep(["a"])
    assert runs.read_records(elsewhere.TABLE) == kept


def test_each_command_is_called_after_that_of_the_run_it_begins_from(elsewhere, tmp_path, monkeypatch):
    stand_in(elsewhere, monkeypatch, tmp_path / "python", f'echo "$1" >> {tmp_path}/called')
    write(elsewhere.WORK / "b", "pretrain", "mnist", 0.1)  # complete or not: its command finds that out
    todo = {"c": "finetune mnist --init @b", "b": "pretrain mnist", "d": "finetune mnist --init @c"}
    elsewhere.run(todo, [*todo], jobs=1)
    work = elsewhere.WORK
    assert [line.rstrip() for line in (tmp_path / "called").read_text().splitlines()] == [
        "pretrain mnist", f"finetune mnist --init {work / 'b'}", f"finetune mnist --init {work / 'c'}"
    ]  # fmt: skip


def test_a_sweep_some_of_whose_cells_failed_is_done(elsewhere, tmp_path, monkeypatch):
    marker = 'mkdir -p "$2" && echo \'{"complete": true, "cells": []}\' > "$2/sweep.json"'
    stand_in(elsewhere, monkeypatch, tmp_path / "python", f'case "$1" in sweep*) {marker}; exit 1;; *) exit 3;; esac')
    elsewhere.run({"sweep": "sweep mnist"}, ["sweep"], jobs=1)
    with pytest.raises(SystemExit, match="3"):
        elsewhere.run({"other": "pretrain mnist"}, ["other"], jobs=1)
    stand_in(elsewhere, monkeypatch, tmp_path / "python", "exit 2")  # refused, e.g. because it is another sweep
    with pytest.raises(SystemExit, match="2"):
        elsewhere.run({"sweep": "sweep mnist"}, ["sweep"], jobs=1)
    with pytest.raises(SystemExit, match="2"):
        elsewhere.run({"other": "pretrain mnist", "next": "finetune mnist --init @other"}, ["next"], jobs=1)
    assert not (elsewhere.WORK / "next").exists()


def test_a_run_whose_weights_are_shipped_is_begun_from_without_training_it(make, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "WORK", tmp_path)
    monkeypatch.setattr(make.sys, "executable", "/bin/false")  # in place of maelab: whatever is started fails
    todo = {"mae-cifar-long": "pretrain cifar10"}
    make.run(todo, ["best-cifar-s0"], jobs=1)
    model, _ = maelab.load_model(tmp_path / "mae-cifar-long")
    shipped, _ = maelab.load_model("maelab:cifar10-mae")
    for name, weights in shipped.state_dict().items():
        assert torch.equal(model.state_dict()[name], weights), name
    assert runs.record_of(tmp_path / "mae-cifar-long") == runs.read_records(make.TABLE)["mae-cifar-long"]
    make.run(todo, ["best-cifar-s0"], jobs=1)  # it is there by now
    shutil.rmtree(tmp_path / "mae-cifar-long")
    with pytest.raises(SystemExit):
        make.run(todo, ["mae-cifar-long"], jobs=1)


def test_shipped_weights_are_those_of_the_kept_run(make):
    records = runs.read_records(make.TABLE)
    for run, name in make.SHIPPED.items():
        card = (PRETRAINED / name / "README.md").read_text()
        assert json.dumps(records[run]["config"], indent=1) in card


def test_the_page_is_made_of_the_table_and_the_pictures_on_it_are_kept(elsewhere, monkeypatch):
    note_drawings(monkeypatch)
    for name, seed in {"mae-s0": 0, "mae-s1": 1}.items():  # one setting: the page shows the picture of its first seed
        run = write(elsewhere.WORK / name, "pretrain", "mnist", 0.1, seed=seed)
        picture = runs.figure_of(run, "reconstructions")
        picture.parent.mkdir()
        Image.new("RGB", (30, 20), (200, 10 * seed, 0)).save(picture)
    elsewhere.keep(["mae-s0", "mae-s1"])
    for _ in range(2):
        elsewhere.build(runs.read_records(elsewhere.TABLE))
        (kept,) = (file for file in elsewhere.PICTURES.rglob("*") if file.is_file())
        assert kept == elsewhere.PICTURES / "mae-s0" / "reconstructions.png"
        with Image.open(kept) as image:
            assert image.convert("RGB").getcolors() == [(600, (200, 0, 0))]
        page = (elsewhere.BUILD / "report.html").read_text()
        assert base64.b64encode(kept.read_bytes()).decode() in page and any((elsewhere.BUILD / "figures").iterdir())
        shutil.rmtree(elsewhere.WORK)  # the second time from the table and the kept pictures alone
        elsewhere.WORK.mkdir()
