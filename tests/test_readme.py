"""The README cannot rot: its library example runs, its commands exist, its tree matches the folder."""

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

import maelab
from maelab import cli, recipes
from maelab.runs import read_json
from maelab.runs.checkpoints import PRETRAINED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    parts = README.split("```")[1::2]  # every second part lies between fences
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
    (tree,) = [block for block in blocks("") if block.startswith("maelab/\n")]
    named = set(re.findall(r"^  (\w+(?:\.py|/))", tree, flags=re.MULTILINE))
    present = {
        path.name + "/" * path.is_dir()
        for path in (ROOT / "maelab").iterdir()
        if not path.name.startswith(("_", ".")) and path.suffix in (".py", "")
    }
    assert named == present
    for folder in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir()


def test_pictures_exist():
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.fixture
def make():
    """results/make.py as a module."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "results" / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_results_table_is_that_of_the_kept_runs(make):
    assert make.with_tables(README) == README, "run make results"
    assert make.tables().count("\n") > 2


def test_of_a_sweep_half_done_the_finished_cells_are_kept_and_gone_on_from(make, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "WORK", tmp_path / "work")
    monkeypatch.setattr(make, "KEPT", tmp_path / "kept")
    cells = tmp_path / "work" / "sweep"
    for name, complete in (("patch_size=14", True), ("patch_size=7", False)):
        for task in ("pretrain", "finetune"):
            (cells / name / task).mkdir(parents=True)
            (cells / name / task / "config.json").write_text("{}")
            (cells / name / task / "model.safetensors").write_text("")
            if complete:
                (cells / name / task / "result.json").write_text('{"val": {}}')
    (cells / "sweep.json").write_text('{"complete": false, "cells": [{"settings": {"patch_size": "14"}}]}')
    make.keep(["sweep"])
    kept = {str(file.relative_to(tmp_path / "kept")) for file in (tmp_path / "kept").rglob("*") if file.is_file()}
    done = {
        f"sweep/patch_size=14/{task}/{file}.json" for task in ("pretrain", "finetune") for file in ("config", "result")
    }
    assert kept == {"sweep/sweep.json"} | done
    whole = tmp_path / "kept" / "sweep" / "sweep.json"
    half = whole.read_text()
    whole.write_text('{"complete": true, "cells": []}')
    make.keep(["sweep"])
    assert make.read_json(whole)["complete"]  # half a sweep replaces no whole one
    whole.write_text(half)
    shutil.rmtree(tmp_path / "work")
    monkeypatch.setattr(make.sys, "executable", "/bin/true")  # in place of maelab
    make.run({"sweep": "sweep mnist"}, ["sweep"], jobs=1)
    assert (cells / "patch_size=14" / "finetune" / "result.json").is_file()


def test_a_sweep_some_of_whose_cells_failed_is_done(make, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "WORK", tmp_path / "work")
    monkeypatch.setattr(make, "KEPT", tmp_path / "kept")
    stand_in = tmp_path / "python"
    stand_in.write_text(
        '#!/bin/sh\nwhile [ "$1" != --out ]; do shift; done\n[ "$2" = "${2%sweep}" ] && exit 3\n'
        'mkdir -p "$2" && echo \'{"complete": true}\' > "$2/sweep.json"\nexit 1\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(make.sys, "executable", str(stand_in))
    make.run({"sweep": "sweep mnist"}, ["sweep"], jobs=1)
    with pytest.raises(SystemExit, match="3"):
        make.run({"other": "pretrain mnist"}, ["other"], jobs=1)


def test_a_run_whose_weights_are_shipped_is_begun_from_without_training_it(make, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "WORK", tmp_path)
    monkeypatch.setattr(make.sys, "executable", "/bin/false")  # in place of maelab: whatever is started fails
    todo = {"mae-cifar-long": "pretrain cifar10"}
    make.run(todo, ["best-cifar-s0"], jobs=1)
    model, _ = maelab.load_model(tmp_path / "mae-cifar-long")
    shipped, _ = maelab.load_model("maelab:cifar10-mae")
    for name, weights in shipped.state_dict().items():
        assert torch.equal(model.state_dict()[name], weights), name
    shutil.rmtree(tmp_path / "mae-cifar-long")
    with pytest.raises(SystemExit):
        make.run(todo, ["mae-cifar-long"], jobs=1)


def test_shipped_weights_are_those_of_the_kept_run(make):
    for run, name in make.SHIPPED.items():
        card = (PRETRAINED / name / "README.md").read_text()
        assert json.dumps(read_json(make.KEPT / run / "config.json"), indent=1) in card
