"""Finding and listing runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import environment

from maelab.errors import RunError, UsageError
from maelab.runs import find_runs, read_json, select, summaries, summary
from maelab.runs.checkpoints import MODELS


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
        folder / "sweep" / "a,b=1" / "probe",
        {"task": "probe", "recipe": "sweep", "data": "same", "epochs": 5},
        None,
        epochs=1,
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


# --- maelab runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditions", "tasks"),
    [
        (["task=probe"], ["probe"]),
        (["task!=probe", "complete=true"], ["pretrain", "finetune"]),
        (["init=none"], ["pretrain", "probe"]),
        (["val.accuracy>0.5"], ["finetune"]),
        (["val.masked-mse <= 0.1130"], ["pretrain"]),
        (["seed>=0", "seed<1"], ["pretrain"]),
        (["epochs_done=2.0"], ["finetune"]),
        (["data=mnist", "recipe=sweep"], []),
    ],
)
def test_filters(conditions, tasks, runs):
    assert [row["task"] for row in select(summaries(runs), conditions)] == tasks


def test_sorting_leaves_what_lacks_the_field_to_the_end(runs):
    rows = summaries(runs)
    assert [row["task"] for row in select(rows, sort="seed", descending=True)] == ["finetune", "pretrain", "probe"]
    assert next(row["task"] for row in select(rows, sort="val.masked_mse")) == "pretrain"
    assert [row["epochs_done"] for row in select(rows, sort="epochs_done")] == [1, 2, 6], "numbers, not their digits"


def test_the_table(runs, maelab):
    ended = maelab.run("runs", cwd=runs.parent)
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(" runs/")}
    assert rows == {
        "runs/mae-2": ["pretrain", "mnist", "0", "6", "0.1130", "0.9688"],
        "runs/mae-10": ["finetune", "mnist", "1", "3", "0.9800", "0.9900"],
        "runs/sweep/a,b=1/probe": ["probe", "sweep", "1", "of", "5"],
    }
    os.rename(runs / "mae-10", os.fsencode(runs / "mae-") + b"\xff")
    assert r"mae-\xff" in maelab.run("runs", cwd=runs.parent).out, "a name that is no text shows its bytes"
    chosen = maelab.run("runs", "runs", "--columns", "path,params", "--filter", "params>1", cwd=runs.parent)
    assert [line.split() for line in chosen.out.splitlines()[2:]] == [["runs/mae-2", "1000"]]


def test_json_holds_whole_summaries(runs, maelab):
    damaged = Path(shutil.copytree(runs / "mae-2", runs / "mae-3")) / "config.json"
    damaged.write_text("{")
    ended = maelab.run("runs", runs, "--json", "--filter", "seed=1", cwd=runs)
    assert ended.json() == {"runs": [summary(runs / "mae-10")]}
    assert ended.err.startswith(f"maelab: skipped: {damaged} is damaged: ") and ended.err.count("\n") == 1
    empty = maelab.run("runs", runs / "other", cwd=runs)
    assert (empty.status, empty.out) == (0, f"there is no run in {runs}/other\n")
    assert maelab.run("runs", "--filter", "seed=5", cwd=runs.parent).out == "none of the 3 runs in runs fits\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--filter", "sead=1"], "no run has a field 'sead'; did you mean seed?"),
        (["--sort", "val.acuracy"], "no run has a field 'val.acuracy'; did you mean val.accuracy?"),
        (["--columns", "path,tusk"], "no run has a field 'tusk'; did you mean task?"),
        (["--columns", "x"], "no run has a field 'x'; see --json"),
        (["--filter", "seed"], "--filter seed: write field=value, or with !=, <, >, <=, >="),
        (["--filter", "seed>many"], "--filter seed>many: > compares numbers, got 'many'"),
        (["nowhere"], "there is no folder nowhere"),
    ],
)
def test_refusals(flags, message, runs, maelab):
    folder = [] if flags == ["nowhere"] else [runs]
    ended = maelab.run("runs", *folder, *flags, cwd=runs)
    assert (ended.status, ended.error()) == (2, message)


def test_listing_and_info_load_nothing_heavy_and_are_fast(runs, tmp_path):
    """In a fresh process; CPU time, since the machine may be busy."""
    best = runs / "mae-2" / "checkpoints" / "best"
    description = {"model": "MaskedAutoencoderViT", "arguments": {"depth": 4}, "data": "mnist", "class_names": []}
    (best / "config.json").write_text(json.dumps({"format": 1, **description}))
    (best / "model.safetensors").touch()
    code = f"""if True:
        import sys, time
        from maelab.cli import main
        status = main(["runs", {str(runs)!r}]), main(["info", {str(runs / "mae-2")!r}]), main(["info", {str(best)!r}])
        loaded = [name for name in ("torch", "numpy", "matplotlib", "safetensors") if name in sys.modules]
        print(*status, len(loaded), time.process_time())"""
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, env=environment(tmp_path), capture_output=True, text=True, check=True)
    *status, seconds = done.stdout.splitlines()[-1].split()
    assert status == ["0"] * 4 and float(seconds) < 1, done
    assert "depth = 4" in done.stdout
