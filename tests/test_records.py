"""Runs as data: a table of records says all that is small of run folders, and makes them again."""

import json
import shlex
from pathlib import Path

import pytest
from run_folders import change, write

from maelab import runs
from maelab.errors import RunError
from maelab.runs.commands import ENCODER

TEXTS = ("*.json", "*.jsonl")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sweep of two cells, one of them begun, and two runs outside of it, one on other hardware."""
    folder = tmp_path / "runs"
    write(folder / "a", "pretrain", "mnist", 0.1)
    write(folder / "b", "finetune", "mnist", 0.123456789012345678, init="runs/a")
    change(folder / "b" / "env.json", "hardware", value="cuda")
    write(folder / "sweep" / "p=4" / "pretrain", "pretrain", "mnist", 0.3)
    write(folder / "sweep" / "p=7" / "pretrain", "pretrain", "mnist", None)
    runs.write_json(folder / "sweep" / "sweep.json", {"complete": False, "cells": [{"settings": {"p": "4"}}]})
    return folder


def content(folder: Path) -> dict[str, list]:
    """Relative name -> the JSON values of its lines, of every text in a folder."""
    files = [file for kind in TEXTS for file in folder.rglob(kind)]
    return {
        str(file.relative_to(folder)): [json.loads(line) for line in file.read_text().splitlines()]
        if file.suffix == ".jsonl"
        else [json.loads(file.read_text())]
        for file in files
    }


def table_of(folder: Path, file: Path) -> dict[str, runs.Record]:
    records = {name: record for place in folder.iterdir() for name, record in runs.records_under(place).items()}
    runs.write_records(file, records)
    return records


def test_every_value_comes_back_from_the_table(folder, tmp_path):
    records = table_of(folder, tmp_path / "table.jsonl")
    assert records.keys() == {"a", "b", "sweep", "sweep/p=4/pretrain"}  # what is not complete is left out
    again = runs.read_records(tmp_path / "table.jsonl")
    assert again == records
    for name, record in again.items():
        runs.restore(record, tmp_path / "again" / name)
    expected = {name: values for name, values in content(folder).items() if "p=7" not in name}
    assert content(tmp_path / "again") == expected
    assert runs.is_complete(tmp_path / "again" / "b")
    runs.write_records(tmp_path / "second.jsonl", dict(reversed(again.items())))
    assert (tmp_path / "second.jsonl").read_bytes() == (tmp_path / "table.jsonl").read_bytes()


def test_hardware_is_said_once(folder, tmp_path):
    table_of(folder, tmp_path / "table.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    said = {line["run"]: line["env"] for line in lines if "env" in line}
    assert isinstance(said["a"], dict) and said["sweep/p=4/pretrain"] == "a" and said["b"]["hardware"] == "cuda"


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", '{"run": "x"}',
        '{"run": "x", "config": {}, "env": "nobody", "metrics": {"columns": [], "rows": []}}',
        '{"run": "x", "env": {}, "metrics": {"columns": ["epoch"], "rows": [[1, 2]]}}',
        '{"run": "../x", "sweep": {}}', '{"run": "/x", "sweep": {}}', '{"run": 3, "sweep": {}}',
    ],
)  # fmt: skip
def test_a_damaged_table_is_refused_in_one_line(line, tmp_path):
    file = tmp_path / "table.jsonl"
    file.write_text('{"run":"good","sweep":{}}\n' + line + "\n")
    with pytest.raises(RunError, match=r"table.jsonl is damaged in line 2 \(") as refused:
        runs.read_records(file)
    assert "\n" not in str(refused.value)
    with pytest.raises(RunError, match=r"cannot read .*none\.jsonl"):
        runs.read_records(tmp_path / "none.jsonl")


@pytest.mark.parametrize("cells", ["{}", '{"cells": 3}', '{"cells": [3]}', '{"cells": [{}]}', "[]", "{"])
def test_a_damaged_sweep_is_named(cells, tmp_path):
    (tmp_path / "sweep.json").write_text(cells)
    with pytest.raises(RunError, match=r"sweep\.json is damaged"):
        runs.sweep_of(tmp_path)
    assert runs.sweep_of(tmp_path / "nowhere") == {}


@pytest.mark.parametrize("path", ["runs/x", "runs/x/checkpoints", "runs/x/checkpoints/best", "runs/x/checkpoints/last"])
def test_a_path_into_a_run_means_the_run(path):
    assert runs.run_of(path) == Path("runs/x")


def test_a_command_says_what_differs_and_the_seed(folder):
    config = runs.config_of(folder / "b")
    assert runs.command(config) == "maelab finetune mnist --init runs/a --epochs 2 --seed 0"
    odd = config | {"seed": 3, "flip": True, "patch_size": 7, "img_size": [32, 48], "data": "folder:it's"}
    words = shlex.split(runs.command(odd, init="other run", out="runs/a b"))
    assert words[:5] == ["maelab", "finetune", "mnist", "--init", "other run"] and words[-2:] == ["--out", "runs/a b"]
    assert "--patch-size" not in words  # it comes with the weights
    assert "--flip" in words and words[words.index("--data") + 1] == "folder:it's"
    assert words[words.index("--img-size") + 1 :][:2] == ["32", "48"] and words[words.index("--seed") + 1] == "3"
    scratch = runs.command(config | {"init": "none", "patch_size": 7})
    assert "--patch-size 7" in scratch and set(ENCODER) <= config.keys()
    probe = {"task": "probe", "recipe": "sweep", "init": "runs/a", "seed": 0, "neighbours": 5}
    assert runs.command(probe) == "maelab probe runs/a --neighbours 5 --seed 0"
