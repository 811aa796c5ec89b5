"""Command lines from signatures: what is read from the source is what the function takes, and words become values."""

import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

from maelab.cli import COMMANDS, signature
from maelab.commandline import REQUIRED, help_of, parse
from maelab.errors import UsageError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_read_from_the_source_is_what_the_function_takes(command):
    module, _, name = COMMANDS[command].task.partition(":")
    taken, first = signature(command), COMMANDS[command].first
    parameters = dict(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    own = {option.name: option for option in taken.options if not option.owner}
    assert own.keys() | taken.owners.keys() - {"output"} == parameters.keys() - ({"recipe"} - {first})
    for parameter in own.values():
        real = parameters[parameter.name]
        assert parameter.kind == real.annotation
        if parameter.name != first:
            assert parameter.default == (REQUIRED if real.default is real.empty else real.default)
            assert parameter.positional == (real.kind is not real.KEYWORD_ONLY)
    for owner in taken.owners.keys() - {"output"}:
        assert parameters[owner].annotation in (taken.owners[owner], taken.owners[owner] | None)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_argument_is_explained_once_and_in_the_help(command):
    taken = signature(command)
    shown = " ".join(help_of(taken).split())
    labels = [option.label for option in taken.options]
    assert len(set(labels)) == len(labels) and taken.about.endswith(".")
    for option in taken.options:
        assert len(option.help) > 5 and option.help.split()[0] in shown and f" {option.label}" in shown, option
    assert taken.usage in shown


@pytest.mark.parametrize(
    ("line", "owner", "expected"),
    [
        ("reconstruct mae", "", {"run": Path("mae"), "images": (), "mask_ratios": None, "count": 8, "sweep": False}),
        ("reconstruct mae a --count 3 b --sweep", "", {"images": ("a", "b"), "count": 3, "sweep": True}),
        ("reconstruct mae --mask-ratio 0.5 0.75 --mask_ratio=0.9", "", {"mask_ratios": (0.5, 0.75, 0.9)}),
        ("reconstruct mae --mask-file None --mask-kind=grid", "", {"mask_file": None, "mask_kind": "grid"}),
        ("reconstruct -- mae --count", "", {"run": Path("mae"), "images": ("--count",)}),
        ("reconstruct mae --threads 2 --threads None", "options", {"threads": None}),
        ("pretrain mnist --flip --img-size 32 24", "config", {"flip": True, "img_size": (32, 24)}),
        ("pretrain mnist --no-flip --img-size None --seed=-1", "config", {"flip": False, "img_size": None, "seed": -1}),
        ("pretrain --epochs 3 mnist", "", {"recipe": "mnist"}),
        ("probe mae --neighbours 5", "config", {"init": "mae", "neighbours": 5}),
        ("sweep mnist --grid a=1,2 --grid b=3", "", {"grid": ("a=1,2", "b=3"), "finetune_epochs": 3}),
        ("runs --filter a=1 --filter b<2 there", "", {"filter": ("a=1", "b<2"), "dir": Path("there")}),
        ("page one two --images a --images b", "", {"runs": ("one", "two"), "images": ("a", "b"), "data_dir": None}),
        ("evaluate mae --json", "output", {"json": True}),
    ],
)
def test_words_become_values(line, owner, expected):
    command, *words = line.split()
    values = parse(signature(command), words)[owner]
    assert {name: values[name] for name in expected} == expected
    assert owner == "" or values.keys() == expected.keys(), "of a dataclass only what was typed"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("reconstruct mae --mask-ratio", "--mask-ratio: expected at least one argument"),
        ("reconstruct mae --out=", "--out must be a path, got ''"),
        ("evaluate mae --json=yes", "--json/--no-json: ignored explicit argument 'yes'"),
        ("evaluate mae --jso", "unknown flag --jso; did you mean --json?"),
        ("evaluate mae --threads two", "--threads must be a whole number, or None, got 'two'"),
        ("pretrain mnist --img-size 32 x", "--img-size must be 2 of them, each a whole number, or None, got '32 x'"),
        ("pretrain mnist --img-size 3 2 1", "--img-size must be 2 of them, each a whole number, or None, got '3 2 1'"),
        ("pretrain mnist --optimizer muom", "--optimizer must be adamw or muon, got 'muom'; did you mean muon?"),
        ("pretrain mnist --epochs " + "9" * 5000, "--epochs must be a whole number, got '9999"),
        ("export mae --format onx", "--format must be onnx, timm, hf or safetensors, got 'onx'; did you mean onnx?"),
        ("fit photos --minutes 10min", "--minutes must be a finite number, got '10min'"),
        ("fit photos --minutes inf", "--minutes must be a finite number, got 'inf'"),
    ],
)
def test_what_means_nothing_is_one_line(line, message):
    command, *words = line.split(" ")
    with pytest.raises(UsageError) as refused:
        parse(signature(command), words)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_extras_that_messages_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [*(ROOT / "maelab").rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "pyproject.toml"]
    named = {
        n for file in texts for found in re.findall(r"maelab\[([\w,-]+)\]", file.read_text()) for n in found.split(",")
    }
    assert len(named) > 3 and not named - extras.keys()
