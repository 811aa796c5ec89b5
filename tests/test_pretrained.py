"""Weights by name: a finished run is shipped, and every command that takes a run takes its name."""

import json
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from processes import environment

from maelab import cli, load_model, pretrained, recipes, runs
from maelab.errors import UsageError
from maelab.pretrained import ship
from maelab.runs import checkpoints
from maelab.tasks import pretrain

SMALL = ("--limit", "64", "--batch-size", "32", "--threads", "1", "--kernels", "torch", "--json", "--epochs", "1")


@pytest.fixture(scope="module")
def tiny(digits_folder, nothing_drawn, tmp_path_factory):
    """(run folder of a tiny autoencoder, data flags)."""
    run = tmp_path_factory.mktemp("tiny") / "run"
    data = ("--data", f"folder:{digits_folder}")
    assert cli.main(["pretrain", "smoke", *data, *SMALL, "--mask-ratio", "0.5", "--flip", "--out", str(run)]) == 0
    return run, data


@pytest.fixture
def shipped(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "PRETRAINED", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    return ship(tiny[0], "tiny-mae")


def test_a_name_serves_wherever_a_run_does(tiny, shipped, capsys):
    for line in (
        ["info", "maelab:tiny-mae"],
        ["evaluate", "maelab:tiny-mae", "--threads", "1"],
        ["reconstruct", "maelab:tiny-mae", "--threads", "1", "--count", "2"],
        ["probe", "maelab:tiny-mae", *SMALL],
        ["finetune", "smoke", "--init", "maelab:tiny-mae", *tiny[1], *SMALL],
    ):
        capsys.readouterr()
        line = line if "--json" in line else [*line, "--json"]
        assert cli.main(line) == 0, capsys.readouterr().err
        answer = json.loads(capsys.readouterr().out)
        if line[0] == "evaluate":
            assert answer["run"] == "maelab:tiny-mae"
            assert cli.main([*line[:1], str(tiny[0]), *line[2:]]) == 0
            assert answer["masked_mse"] == json.loads(capsys.readouterr().out)["masked_mse"]
    assert runs.read_json(Path("runs/probe-maelab-tiny-mae-1/config.json"))["init"] == "maelab:tiny-mae"
    ours, _ = load_model("maelab:tiny-mae")
    theirs, _ = load_model(tiny[0])
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_the_card_says_what_the_run_was(tiny, shipped):
    assert sorted(file.name for file in shipped.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card, result = (shipped / "README.md").read_text(), runs.read_json(tiny[0] / "result.json")
    for text in (
        "maelab pretrain smoke --data folder:",
        "--batch-size 32",
        "--flip",
        "seed 0",
        f"{result['val']['masked_mse']:.4f}",
        f"{result['val']['knn_accuracy']:.4f}",
        f"{result['params']:,} parameters",
        "MIT",
        "Limits: one run of one seed",
        "28x28 pixels with\n1 channel scaled",
        runs.read_json(tiny[0] / "env.json")["torch"],
    ):
        assert text in card, card
    assert json.loads(card.split("```json")[1].split("```")[0]) == runs.read_json(tiny[0] / "config.json")


def test_the_command_of_the_card_makes_the_same_config(tiny, monkeypatch):
    config = runs.read_json(tiny[0] / "config.json")
    seen = []
    monkeypatch.setattr(pretrain, "pretrain", lambda config, **_: seen.append(config) or (Path(), {}))
    cli.main(shlex.split(runs.command(config))[1:])
    assert json.loads(json.dumps(vars(seen[0]))).items() <= config.items()


def test_the_card_of_a_classifier(tmp_path):
    config = json.loads(json.dumps(vars(recipes.finetune_mnist()))) | {"task": "finetune", "recipe": "mnist", "seed": 3}
    scores = {"val": {"accuracy": 0.98765}, "test": {"accuracy": 0.99123}}
    result = {"data": "mnist", "params": 1, "best_epoch": 5, "epochs": 6, "train_time_s": 60, **scores}
    checkpoint = {"arguments": {"img_size": [28, 28], "in_chans": 1}, "class_names": ("0", "1")}
    card = pretrained.card("x", config, {}, {3: result}, checkpoint, halved=False)
    assert "| accuracy on the test images, read once | 0.9912 |" in card and "epoch 5 of 6" in card
    assert "by split seed 0 | 0.9877 |" in card and "`maelab finetune mnist --init none --seed 3`" in card


def test_the_card_says_the_spread_of_other_seeds(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "PRETRAINED", tmp_path / "pretrained")
    others = [Path(shutil.copytree(tiny[0], tmp_path / f"seed-{seed}")) for seed in (1, 2)]
    config, result = (runs.read_json(tiny[0] / f"{name}.json") for name in ("config", "result"))
    own = result["val"]["masked_mse"]
    for seed, (other, more) in enumerate(zip(others, (0.01, 0.05), strict=True), start=1):
        runs.write_json(other / "config.json", config | {"seed": seed})
        runs.write_json(other / "result.json", result | {"val": result["val"] | {"masked_mse": own + more}})
    card = (ship(tiny[0], "three", others) / "README.md").read_text()
    assert "of seeds 0, 1, 2 |" in card and "Limits: the best on validation of 3 seeds, so its own" in card
    assert f"| {own:.4f} | {own + 0.02:.4f} ± 0.0265 |" in card
    assert "Limits: one of 2 seeds. It" in (ship(others[1], "two", others[:1]) / "README.md").read_text()
    with pytest.raises(UsageError, match="it is unfinished"):
        ship(tiny[0], "again", [tmp_path])
    with pytest.raises(UsageError, match="has the same seed"):
        ship(tiny[0], "again", [tiny[0]])
    runs.write_json(others[0] / "config.json", config | {"seed": 1, "mask_ratio": 0.3})
    with pytest.raises(UsageError, match="it differs in mask_ratio"):
        ship(tiny[0], "again", others)


def test_the_card_names_the_run_begun_from_not_where_it_lay(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "PRETRAINED", tmp_path / "pretrained")
    run = Path(shutil.copytree(tiny[0], tmp_path / "run"))
    config = runs.read_json(run / "config.json") | {"init": str(tmp_path / "somewhere" / "mae-long")}
    runs.write_json(run / "config.json", config)
    card = (ship(run, "begun") / "README.md").read_text()
    assert '"init": "mae-long"' in card and "somewhere" not in card


def test_large_weights_are_rounded_to_float16(tiny, tmp_path, monkeypatch):
    whole = (tiny[0] / "checkpoints" / "best" / "model.safetensors").stat().st_size
    monkeypatch.setattr(pretrained, "LARGEST", whole - 1)
    monkeypatch.setattr(checkpoints, "PRETRAINED", tmp_path / "pretrained")
    folder = ship(tiny[0], "half")
    assert (folder / "model.safetensors").stat().st_size < 0.6 * whole
    assert "before the weights were rounded to float16" in (folder / "README.md").read_text()
    (ours, _), (theirs, _) = load_model("maelab:half"), load_model(tiny[0])
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.half().float(), rtol=0, atol=0)


def test_refusals(tiny, shipped, tmp_path, monkeypatch):
    def refused(run: Path | str, name: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            ship(run, name)

    refused(tiny[0], "tiny-mae", "tiny-mae exists; choose another name")
    for name in ("../up", "a/b", "", "Big", "-x"):
        refused(tiny[0], name, "is no name for weights")
    refused("nowhere", "a", "nowhere is not the folder of a finished")
    unfinished = Path(shutil.copytree(tiny[0], tmp_path / "unfinished"))
    (unfinished / "result.json").unlink()
    refused(unfinished, "a", "unfinished is not the folder of a finished")
    monkeypatch.setattr(pretrained, "LARGEST", 1000)
    refused(tiny[0], "a", r"model.safetensors has 0\.\d MB in float16; at most 0 are shipped")
    assert [p.name for p in checkpoints.PRETRAINED.iterdir()] == ["tiny-mae"]
    for name in ("maelab:other", "maelab:../../etc", "maelab:"):
        with pytest.raises(UsageError, match=f"^no pretrained weights are called {name}; choose from maelab:tiny-mae$"):
            runs.find_checkpoint(name)
    shutil.rmtree(shipped)
    with pytest.raises(UsageError, match="this copy holds none"):
        runs.find_checkpoint("maelab:a")


def test_the_script_refuses_in_one_line(tmp_path):
    line = [sys.executable, "-m", "maelab.pretrained", "nowhere", "a"]
    done = subprocess.run(line, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    message = "maelab: nowhere is not the folder of a finished pretraining or fine-tuning\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_a_wheel_holds_the_weights():
    root = Path(__file__).parents[1]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["maelab"]
    files = [f"pretrained/tiny/{file}" for file in ("model.safetensors", "config.json", "README.md")]
    files += [
        str(path.relative_to(root / "maelab")) for path in checkpoints.PRETRAINED.glob("*/*") if path.suffix != ".pyc"
    ]
    assert all(any(fnmatch(file, pattern) for pattern in declared) for file in files), (files, declared)
