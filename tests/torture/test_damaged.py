"""Every command on damaged and hostile run folders, and with values beyond any use: one line, or a good answer."""

import contextlib
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_folder
from engine import INPUTS, LONG, SEED, tell

from maelab import cli
from maelab.runs import as_json, sha256

TINY = ("--limit", "20", "--batch-size", "10", "--epochs", "1", "--threads", "1", "--kernels", "torch")
SHAPE = ("--embed-dim", "16", "--depth", "1", "--num-heads", "1", "--patch-size", "7", "--precision", "fp32")
DECODER = ("--decoder-embed-dim", "16", "--decoder-depth", "1", "--decoder-num-heads", "1")
DEEP = "[" * 400 + "]" * 400  # Python's own reader takes it
HUGE = int("9" * 400)
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "text": "x",
    "half a character": "\ud800",
    "digits": "1",
    "list": [1],
    "object": {"a": [1]},
    "negative": -1,
    "fraction": 0.5,
    "10**6": 10**6,
    "10**18": 10**18,
    "10**30": 10**30,
    "400 digits": HUGE,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "1e308": 1e308,
    "deep": json.loads(DEEP),
    "empty": [],
}
CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "cut": b'{"task": "pre',
    "no object": b"[1]",
    "null": b"null",
    "no text": b"\xff\xfe\0",
    "zeros": bytes(1000),
    "deep list": b"[" * 10**5,
    "deep object": b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
    "empty object": b"{}",
    "number": b"9" * 10**5,
    "exponent": b"1e" + b"9" * 400,
    "long": b'{"a": "' + b"x" * (1 << 20),
}


@pytest.fixture(scope="module")
def runs(nothing_drawn, tmp_path_factory: pytest.TempPathFactory, mnist_small) -> Iterator[Path]:
    """A pretraining, one that is unfinished, a classifier, a probe, a sweep, and images. Do not change."""
    place = tmp_path_factory.mktemp("whole")
    images = write_folder(place / "digits", mnist_small.train, mnist_small.class_names, 6)
    data, before = ("--data", f"folder:{images}", "--val-fraction", "0.3"), os.getcwd()
    os.chdir(place)
    small = (*data, *TINY)
    assert run("pretrain", "smoke", *small, *SHAPE, *DECODER, "--out", "mae") == 0
    assert run("finetune", "smoke", *small, "--init", "mae", "--precision", "fp32", "--out", "classifier") == 0
    assert run("probe", "mae", "--val-fraction", "0.3", *TINY, "--precision", "fp32", "--out", "probe") == 0
    sweep = ("--grid", "mask_ratio=0.5,0.7", "--finetune-epochs", "1")
    assert run("sweep", "smoke", *small, *SHAPE, *DECODER, *sweep, "--out", "sweep") == 0
    shutil.copytree("mae", "unfinished")
    Path("unfinished/result.json").unlink()
    yield place
    os.chdir(before)


def run(*command: str) -> int:
    return cli.main(list(command))


class TooLong(BaseException):
    pass


def one_line(capsys: pytest.CaptureFixture[str], *command: str, seconds: int = 10) -> tuple[int, str]:
    """Status and stderr of a command, which says what is wrong in one line of its own, or does its work."""

    def stop(*_: object) -> None:
        raise TooLong(command)

    capsys.readouterr()
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        status = run(*command)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    said = capsys.readouterr().err
    assert status in (0, 1, 2), (command, status, said)
    assert "Traceback" not in said and "should not happen" not in said, (command, said)
    if status:
        last = said.splitlines()[-1]
        assert last.startswith("maelab: ") and len(last) < 2000, (command, said[-3000:])
    return status, said


def commands(name: str, place: Path) -> Iterator[tuple[str, ...]]:
    """What may be done with the run folder `name`."""
    data = ("--data", f"folder:{place / 'digits'}", "--val-fraction", "0.3")
    image, few = str(next((place / "digits" / "0").iterdir())), ("--threads", "1")
    yield "info", name
    yield "info", name, "--json"
    yield "runs", "."
    yield "runs", ".", "--json", "--sort", "seed", "--filter", "epochs>0"
    yield "report", name
    if name == "sweep":
        sweep = ("--grid", "mask_ratio=0.5,0.7", "--finetune-epochs", "1", "--out", name)
        yield "sweep", "smoke", *data, *TINY, *SHAPE, *DECODER, *sweep
        return
    yield "evaluate", name, *few
    yield "evaluate", name, "--split", "val", *few
    yield "features", name, image, *few
    yield "features", name, "--split", "val", *few
    yield "attention", name, image, *few
    yield "attention", name, "--count", "1", *few
    yield "probe", name, "--val-fraction", "0.3", *TINY, "--precision", "fp32", "--out", "new"
    yield "finetune", "smoke", *data, *TINY, "--init", name, "--precision", "fp32", "--out", "newer"
    yield "export", name, "--format", "timm", "--out", "exported.safetensors"
    yield "export", name, "--format", "safetensors", "--out", "exported"
    yield "predict", name, image, *few
    if name in ("mae", "unfinished"):
        yield "reconstruct", name, image, *few
        yield "pretrain", "smoke", *data, *TINY, *SHAPE, *DECODER, "--out", name


def with_json(file: Path, change: dict[str, Any]) -> None:
    """Replace entries, by names such as arguments.depth."""
    content = json.loads(file.read_text())
    for path, value in change.items():
        *above, last = path.split(".")
        inside = content
        for key in above:
            inside = inside[key]
        inside[last] = value
    file.write_bytes(as_json(content))


def commit_again(run: Path) -> None:
    """Make the sums of the checkpoints those of what lies there, as someone hostile would."""
    file = run / "checkpoints" / "commit.json"
    with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError, OSError):  # it is what was damaged
        content = json.loads(file.read_text())
        content["sha256"] = {name: sha256(run / "checkpoints" / name) for name in content["sha256"]}
        file.write_bytes(as_json(content))


def paths_of(content: Any, before: str = "", depth: int = 3) -> list[str]:
    """Names of entries, such as arguments.depth."""
    found = []
    if isinstance(content, dict):
        for key, value in content.items():
            found.append(before + key)
            if depth > 1 and "." not in key:
                found += paths_of(value, f"{before}{key}.", depth - 1)
    return found


JSON_FILES = (
    "config.json",
    "result.json",
    "env.json",
    "tracker.json",
    "checkpoints/commit.json",
    "checkpoints/best/config.json",
    "checkpoints/last/config.json",
)


def damage(chance: random.Random, folder: Path) -> str:
    """Do something bad to a run folder; in words, what."""
    kind = chance.random()
    if kind < 0.1:
        file = chance.choice([p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".maelab.lock"])
        name = chance.choice(sorted(CONTENTS))
        file.write_bytes(CONTENTS[name])
        said = f"{file.relative_to(folder)}: {name}"
    elif kind < 0.25:
        name = chance.choice(sorted(VALUES))
        key = chance.choice(["epoch", "split", "loss", "accuracy", "masked_mse", "lr", "seconds", "new"])
        file = folder / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[chance.randrange(len(rows))][key] = VALUES[name]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        said = f"metrics.jsonl: {key} is {name}"
    else:
        files = [p for p in (folder / name for name in JSON_FILES) if p.is_file()]
        file = chance.choice([*files, *[f for f in files if "best" in str(f)] * 2])
        said = ""
        for _ in range(chance.choice([1, 1, 1, 2])):
            content = json.loads(file.read_text())
            path = chance.choice(paths_of(content) or ["new"])
            name = chance.choice(sorted(VALUES))
            try:
                with_json(file, {path: VALUES[name]})
            except (TypeError, KeyError):
                continue
            said += f"{file.relative_to(folder)}: {path} is {name}; "
    if chance.random() < 0.8:
        commit_again(folder)
    return said


def damage_sweep(chance: random.Random, folder: Path) -> str:
    if chance.random() < 0.5:
        return damage(chance, chance.choice(sorted(file.parent for file in folder.rglob("env.json"))))
    file, name = folder / "sweep.json", chance.choice(sorted(VALUES))
    path = chance.choice(paths_of(json.loads(file.read_text())))
    with_json(file, {path: VALUES[name]})
    return f"sweep.json: {path} is {name}"


SAMPLES = max(20, INPUTS // 10)


def test_every_command_on_damaged_runs(runs, capsys, monkeypatch, tmp_path):
    for number in range(SAMPLES):
        chance = random.Random(f"damaged {SEED} {number}")
        place = tmp_path / "place"
        place.mkdir()
        monkeypatch.chdir(place)
        name = chance.choice(["mae", "mae", "classifier", "classifier", "unfinished", "unfinished", "probe", "sweep"])
        shutil.copytree(runs / name, place / name)
        said = (damage_sweep if name == "sweep" else damage)(chance, place / name)
        command = chance.choice(list(commands(name, runs)))
        try:
            one_line(capsys, *command)
        except BaseException as error:
            raise AssertionError(
                f"seed {SEED}, number {number}: {said} in {name}; maelab {' '.join(command)}"
            ) from error
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(place)
        if LONG and number % 100 == 99:
            tell(f"commands on damaged runs: {number + 1} of {SAMPLES}")


# --- values beyond any use ------------------------------------------------------------------------------------------

TOO_LARGE = (str(HUGE), "9" * 5000, "-1", "1e9999", str(10**19), "NaN", "true")
COUNTS = (
    "seed",
    "split-seed",
    "epochs",
    "batch-size",
    "limit",
    "patch-size",
    "embed-dim",
    "depth",
    "mlp-ratio",
    "threads",
)
COUNTS += ("devices", "warmup-epochs", "blr", "crop-padding", "rand-augment-ops", "num-nodes", "decoder-depth")


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    before = set(Path().iterdir())
    status, said = one_line(capsys, *command)
    assert status == 2 and set(Path().iterdir()) == before, (command, status, said)
    return said


@pytest.mark.parametrize("value", TOO_LARGE, ids=lambda value: value[:20])
def test_numbers_beyond_any_use_are_refused_before_any_work(value, runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    data = ("--data", f"folder:{runs / 'digits'}", "--out", "never")
    image = str(next((runs / "digits" / "0").iterdir()))
    for field in COUNTS:
        if field not in ("warmup-epochs", "blr") or not value.isdecimal():  # far, and a number all the same
            refused(capsys, "pretrain", "smoke", *data, f"--{field}={value}")
    refused(capsys, "pretrain", "smoke", *data, "--img-size", value, "28")
    refused(capsys, "fit", str(runs / "digits"), f"--minutes={value}", "--out", "never")
    refused(capsys, "fit", str(runs / "digits"), f"--seed={value}", "--out", "never")
    for flag in ("top", "batch-size"):
        refused(capsys, "predict", "classifier", image, f"--{flag}={value}")
    for command in ("reconstruct", "attention"):
        for flag in ("count", "seed"):
            refused(capsys, command, "mae", f"--{flag}={value}")
    for flag in ("repeats", "threads"):
        refused(capsys, "bench", f"--{flag}={value}")
    refused(capsys, "demo", f"--port={value}")


def test_sizes_that_no_machine_has(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    data = ("--data", f"folder:{runs / 'digits'}", "--out", "never")
    assert "--threads must be at most 1024" in refused(capsys, "pretrain", "smoke", *data, "--threads", str(10**9))
    assert "must be at most 32768" in refused(capsys, "pretrain", "smoke", *data, "--img-size", *[str(10**9)] * 2)
    assert "--minutes must be above 0" in refused(capsys, "fit", str(runs / "digits"), "--minutes", "1e20")
    assert "--depth must be at most 1000" in refused(capsys, "pretrain", "smoke", *data, "--depth", str(10**6))


@pytest.mark.parametrize("name", ["config.json", "result.json", "env.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", CONTENTS)
def test_files_that_are_nothing_of_the_kind(content, name, runs, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "mae", "mae")
    (tmp_path / "mae" / name).write_bytes(CONTENTS[content])
    for command in ("info", "runs", "report"):
        one_line(capsys, command, "mae" if command == "info" else ".")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("depth", 10**6),
        ("depth", 10**30),
        ("depth", math.nan),
        ("depth", -1),
        ("depth", True),
        ("depth", "1"),
        ("depth", [1]),
        ("img_size", [28, True]),
        ("embed_dim", 1e308),
        ("num_heads", None),
        ("patch_size", 0),
    ],
)
def test_checkpoints_of_impossible_sizes(field, value, runs, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    best = runs / "classifier" / "checkpoints" / "best"
    shutil.copytree(best, "checkpoint")
    with_json(tmp_path / "checkpoint" / "config.json", {f"arguments.{field}": value})
    image = str(next((runs / "digits" / "0").iterdir()))
    for command in (
        ("predict", "checkpoint", image),
        ("attention", "checkpoint", image),
        ("features", "checkpoint", image),
    ):
        status, said = one_line(capsys, *command)
        assert status == 1 and "config.json" in said
