"""Finding and listing runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from maelab.errors import RunError, UsageError
from maelab.runs import MODELS, find_runs, read_json, summaries, summary


def write_run(folder: Path, config: dict[str, Any], result: dict[str, Any] | None = None, epochs: int = 0) -> Path:
    """A run folder by hand, as the tasks write it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"epoch": epoch + 1, "split": split, "loss": 0.5} for epoch in range(epochs) for split in ("train", "val")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


PRETRAIN = {"task": "pretrain", "recipe": "mnist", "data": "mnist", "seed": 0, "epochs": 6, "patch_size": 4}
FINETUNE = {"task": "finetune", "recipe": "mnist", "data": "mnist", "seed": 1, "epochs": 3, "init": "runs/a"}


@pytest.fixture
def runs(tmp_path):
    """Two complete runs, one under way, one probe in a sweep; a checkpoint, a link and a folder that are no runs."""
    folder = tmp_path / "runs"
    val = {"masked_mse": 0.113, "knn_accuracy": 0.96875}
    write_run(folder / "mae-2", PRETRAIN, {**PRETRAIN, "params": 1000, "val": val}, epochs=6)
    scores = {"test": {"accuracy": 0.99}, "val": {"accuracy": 0.98}}
    write_run(folder / "mae-10", FINETUNE, {**FINETUNE, "epochs": 2, **scores, "images_per_s": 5000.5}, epochs=2)
    write_run(
        folder / "sweep" / "a,b=1" / "probe", {"task": "probe", "recipe": "sweep", "data": "same"}, None, epochs=1
    )
    write_run(folder / "mae-2" / "checkpoints" / "best", {"format": 1})
    write_run(folder / "mae-2" / "checkpoints" / "odd", PRETRAIN)
    write_run(folder / "other", {"name": "not ours"})
    write_run(tmp_path / "outside", PRETRAIN)
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to(folder)
    return folder


def test_every_run_is_found_once_and_nothing_else(runs):
    assert [str(run.relative_to(runs)) for run in find_runs(runs)] == ["mae-2", "mae-10", "sweep/a,b=1/probe"]
    assert find_runs(runs / "mae-2") == [runs / "mae-2"]
    assert find_runs(runs / "mae-2" / "checkpoints" / "best") == []
    with pytest.raises(UsageError, match="there is no folder nowhere"):
        find_runs("nowhere")


def test_a_summary_is_flat(runs):
    done = summary(runs / "mae-10")
    assert {"path": str(runs / "mae-10"), "task": "finetune", "init": "runs/a"}.items() <= done.items()
    assert (done["complete"], done["epochs"], done["epochs_done"]) == (True, 3, 2), "stopped early"
    assert (done["val.accuracy"], done["test.accuracy"], done["images_per_s"]) == (0.98, 0.99, 5000.5)
    assert "test" not in done
    mae = summary(runs / "mae-2")
    assert (mae["val.masked_mse"], mae["patch_size"], mae["params"], mae["init"]) == (0.113, 4, 1000, None)
    part = summary(runs / "sweep" / "a,b=1" / "probe")
    assert (part["complete"], part["epochs_done"], part["seed"]) == (False, 1, None)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b'{"task": '),
        ("config.json", b"\xff\x00"),
        ("config.json", b"[" * 100_000),
        ("result.json", b"[1]"),
        ("result.json", b""),
    ],
)
def test_a_damaged_run_is_named_and_skipped(file, content, runs, capsys):
    (runs / "mae-2" / file).write_bytes(content)
    assert [row["task"] for row in summaries(runs)] == ["finetune", "probe"]
    said = capsys.readouterr().err
    assert said.startswith(f"maelab: skipped: {runs}/mae-2/{file} is damaged: ") and said.count("\n") == 1


def test_a_row_of_anything_in_metrics_is_left_out(runs):
    (runs / "mae-2" / "metrics.jsonl").write_bytes(b'7\n{"epoch": "x"}\n\n\xff\n{"epoch": 1, "split": "val"}\n{"epo')
    assert summary(runs / "mae-2")["epochs_done"] == 1


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "result.json", "wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(RunError, match=r"is damaged: it is larger than 64 MiB"):
        read_json(tmp_path / "result.json")


def test_checkpoints_are_of_models_that_can_be_built():
    from maelab.training import checkpoint

    assert tuple(checkpoint.MODELS) == MODELS
