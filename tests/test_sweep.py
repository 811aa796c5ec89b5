"""A sweep, as a user runs it: every cell judged, a failing one survived, nothing done twice."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import FORKED_RANKS

from maelab import cli

GRID = ("--grid", "patch_size=5,7,14", "--grid", "mask_ratio=0.5")
SMALL = ("--limit", "100", "--epochs", "1", "--finetune-epochs", "1", "--val-fraction", "0.2", "--batch-size", "32")


@pytest.fixture(scope="module")
def swept(maelab, digits_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    line = ("sweep", "smoke", "--data", f"folder:{digits_folder}", *GRID, *SMALL, "--threads", "1")
    return folder, line, maelab.run(*line, cwd=folder)


def test_cells_are_judged_and_a_failing_one_is_reported(swept):
    folder, _, ended = swept
    assert ended.status == 1 and "some cells failed" in ended.err and "Traceback" not in ended.err
    result = json.loads((folder / "runs" / "sweep-smoke" / "sweep.json").read_text())
    bad, *good = result["cells"]
    assert bad["settings"] == {"patch_size": "5", "mask_ratio": "0.5"}
    assert "5 does not divide the image size 28x28" in bad["error"]
    for row in good:
        place = folder / "runs" / "sweep-smoke" / f"patch_size={row['settings']['patch_size']},mask_ratio=0.5"
        for task, field, judgement in (
            ("pretrain", "masked_mse", "masked_mse"),
            ("probe", "knn_accuracy", "knn_accuracy"),
            ("probe", "accuracy", "linear_accuracy"),
            ("finetune", "accuracy", "finetune_accuracy"),
        ):
            assert json.loads((place / task / "result.json").read_text())["val"][field] == row[judgement]
    assert result["best"] == max(good, key=lambda row: row["finetune_accuracy"])["settings"]
    assert result["lowest_masked_mse"] == min(good, key=lambda row: row["masked_mse"])["settings"]
    assert len(list((folder / "runs" / "sweep-smoke" / "figures").glob("*.png"))) == 4


def test_one_line_for_each_cell(swept):
    lines = [line for line in swept[2].err.splitlines() if line.startswith("cell ")]
    assert [line.split(":")[0] for line in lines] == [f"cell {n} of 3" for n in (1, 2, 3)]
    assert "5 does not divide" in lines[0] and "finetune_accuracy 0." in lines[1] and " left" in lines[1]
    assert "epoch 1/1" not in swept[2].err and "left" not in lines[2]


def test_what_is_finished_is_not_done_again(swept, maelab):
    folder, line, _ = swept
    results = sorted((folder / "runs").rglob("result.json"))
    before = {file: file.stat().st_mtime_ns for file in results}
    ended = maelab.run(*line, cwd=folder)
    assert len(results) == 6 and {file: file.stat().st_mtime_ns for file in results} == before
    assert "pretrain on" not in ended.err


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((), "sweep needs --grid: field=value,value,...: "),
        (("--grid", "patch_size"), "write field=value,value"),
        (("--grid", "patch_sise=4"), "did you mean --patch-size?"),
        (("--grid", "mask_ratio=0.5,2"), "--mask-ratio"),
        (("--grid", "flip=true,perhaps"), "--flip must be false or true, got 'perhaps'"),
        (("--grid", "threads=1,2"), "unknown flag --threads"),
    ],
)
def test_a_wrong_grid_is_refused_before_any_work(grid, message, maelab, tmp_path):
    ended = maelab.run("sweep", "smoke", *grid, cwd=tmp_path)
    assert ended.status == 2 and message in ended.error()
    assert not list(tmp_path.iterdir())


def test_a_value_that_is_a_path_does_not_lead_out_of_the_folder(maelab, digits_folder, tmp_path):
    (work := tmp_path / "a" / "b" / "c" / "d").mkdir(parents=True)
    (tmp_path / "digits").symlink_to(digits_folder)
    grid = ("--data", "folder:../../../../digits", "--grid", "data=folder:../../../../digits")
    ended = maelab.run("sweep", "smoke", *grid, *SMALL, "--threads", "1", "--out", "out", cwd=work)
    assert ended.status == 0, ended
    assert [path.name for path in work.iterdir()] == ["out"]
    assert (work / "out" / "data=folder:..%2F..%2F..%2F..%2Fdigits" / "finetune" / "result.json").is_file()


# --- nothing stale --------------------------------------------------------------------------------------------------


def cells(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "runs/sweep-smoke/sweep.json").read_text())["cells"]


def configs(folder: Path, cell: str) -> dict[str, dict[str, Any]]:
    place = folder / "runs" / "sweep-smoke" / cell
    return {task: json.loads((place / task / "config.json").read_text()) for task in ("pretrain", "probe", "finetune")}


@pytest.mark.slow
def test_a_cell_is_used_again_only_if_all_that_shapes_it_is_the_same(maelab, digits_folder, tmp_path):
    grid = ("--grid", "mask_ratio=0.5,0.75")
    line = ("sweep", "smoke", "--data", f"folder:{digits_folder}", *grid, *SMALL, "--threads", "1")
    assert maelab.run(*line, cwd=tmp_path).status == 0
    first = cells(tmp_path)
    refused = maelab.run(*line, "--epochs", 2, "--seed", 1, cwd=tmp_path)
    assert refused.status == 1 and "epochs 1 instead of 2, seed 0 instead of 1; use --overwrite" in refused.err
    assert all("error" in row for row in cells(tmp_path))
    other = maelab.run(*line, "--epochs", 2, "--seed", 1, "--overwrite", cwd=tmp_path)
    assert other.status == 0 and all(
        a["masked_mse"] != b["masked_mse"] for a, b in zip(first, cells(tmp_path), strict=True)
    )
    assert {config["seed"] for config in configs(tmp_path, "mask_ratio=0.5").values()} == {1}
    results = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("result.json")}
    again = maelab.run(*line, "--epochs", 2, "--seed", 1, "--overwrite", cwd=tmp_path)
    assert again.status == 0 and {file: file.stat().st_mtime_ns for file in results} == results, "the same ones"
    # Other weights under the name that the fine-tuning begins from: the fine-tuning is another one too.
    assert maelab.run(*line, "--epochs", 1, "--overwrite", cwd=tmp_path).status == 0
    assert cells(tmp_path) == first


def test_what_judges_a_cell_sees_what_its_autoencoder_saw(maelab, digits_folder, tmp_path):
    """Values that differ from every default, so that none can be lost on the way."""
    told = {"seed": 3, "split_seed": 5, "val_fraction": 0.3, "limit": 60, "precision": "fp32"}
    flags = [word for name, value in told.items() for word in (f"--{name.replace('_', '-')}", value)]
    line = ("sweep", "smoke", "--data", f"folder:{digits_folder}", "--grid", "mask_ratio=0.5", *flags)
    line += ("--img-size", 14, 14, "--epochs", 1, "--finetune-epochs", 2, "--batch-size", 20, "--threads", 1)
    assert (ended := maelab.run(*line, cwd=tmp_path)).status == 0, ended
    found = configs(tmp_path, "mask_ratio=0.5")
    for task, config in found.items():
        assert {name: config[name] for name in told} == told, task
        assert config["data"] == f"folder:{digits_folder}" and config.get("img_size", [14, 14]) == [14, 14]
    place = "runs/sweep-smoke/mask_ratio=0.5/pretrain"
    assert found["probe"]["init"] == found["finetune"]["init"] == place and found["finetune"]["epochs"] == 2


def test_any_error_ends_a_cell_and_not_the_sweep(maelab, digits_folder, tmp_path):
    """An error that is none of maelab's own: a file lies where a cell's folder belongs."""
    (tmp_path / "digits").symlink_to(digits_folder)
    line = ("sweep", "smoke", "--data", "folder:digits", "--grid", "mask_ratio=0.5,0.75", *SMALL, "--threads", 1)
    ended = maelab.run(*line, "--out", "out", cwd=tmp_path, die=("mask_ratio=0.5/pretrain/config.json", 1, "after"))
    assert ended.status < 0
    shutil.rmtree(tmp_path / "out" / "mask_ratio=0.5")
    (tmp_path / "out" / "mask_ratio=0.5").write_text("in the way")
    ended = maelab.run(*line, "--out", "out", cwd=tmp_path)
    bad, good = json.loads((tmp_path / "out" / "sweep.json").read_text())["cells"]
    assert ended.status == 1 and "error" in bad and good["finetune_accuracy"] >= 0
    assert (tmp_path / "out" / "mask_ratio=0.5").read_text() == "in the way"


ONE_FAILS = """
import os
from maelab.tasks import pretrain

made = pretrain.make_step

def make(config, *more):
    if config.patch_size == 14 and os.environ["RANK"] == "1":
        raise ValueError("something odd in the second process")
    return made(config, *more)

pretrain.make_step = make
"""


@pytest.mark.dist
def test_cells_in_two_processes_and_one_process_that_fails(digits_folder, maelab, tmp_path: Path):
    """What fails in one process ends its cell alone; the next one has new processes."""
    line = ("sweep", "smoke", "--data", f"folder:{digits_folder}", "--grid", "patch_size=14,7", *SMALL, "--threads", 1)
    two = ("--device", "cpu", "--devices", 2, "--out", "out")
    done = maelab.run(*line, *two, cwd=tmp_path, first=FORKED_RANKS + ONE_FAILS)
    assert done.status == 1 and "some cells failed" in done.err and "Traceback" not in done.err, done.err
    result = json.loads((tmp_path / "out" / "sweep.json").read_text())
    bad, good = result["cells"]
    assert bad["error"] == "ValueError: something odd in the second process" and result["complete"]
    assert result["best"] == good["settings"] == {"patch_size": "7"}
    lines = [line for line in done.err.splitlines() if line.startswith("cell ")]
    assert len(lines) == 2 and "something odd" in lines[0] and "finetune_accuracy" in lines[1]


# ------------------------------------------------------------------------------------------------------------- on Ray


def test_cells_on_ray_are_those_of_a_sweep_without(swept, tmp_path):
    """A process of its own: Ray starts others, and finds its way by what the command line was."""
    folder, line, _ = swept
    here = json.loads((folder / "runs" / "sweep-smoke" / "sweep.json").read_text())
    command = [sys.executable, "-m", "maelab", *line, "--ray", "local", "--out", str(tmp_path / "ray")]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    assert json.loads((tmp_path / "ray" / "sweep.json").read_text()) == here
    lines = [line for line in ended.stderr.splitlines() if line.startswith("cell ")]
    assert sorted(line.split(":")[0] for line in lines) == [f"cell {n} of 3" for n in (1, 2, 3)]
    assert "3 cells on Ray (local), each with 1 CPU\n" in ended.stderr
    assert len(list((tmp_path / "ray" / "figures").glob("*.png"))) == 4


def test_ray_that_is_not_there_is_said_in_a_line(swept, maelab, tmp_path):
    line = swept[1]
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9", "nowhere.invalid:1"):
        refused = maelab.run(*line, "--ray", address, "--out", "out", cwd=tmp_path)
        assert refused.status == 1 and refused.error().startswith(f"no Ray cluster at {address}: ")
    for address in ("nonsense", ":1", "127.0.0.1:99999", "host:port"):
        refused = maelab.run(*line, "--ray", address, "--out", "out", cwd=tmp_path)
        assert refused.error() == f"--ray {address}: write local, auto, or the address of a cluster as HOST:PORT"
    refused = maelab.run(*line, "--ray", "local", "--devices", 2, "--device", "cpu", cwd=tmp_path).error()
    assert refused == "--ray computes each cell in one process: leave --devices and --num-nodes out"


_CLUSTER = """
import json, os, sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from maelab import cli
out, *line = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
cells = lambda: [p.parent.parent.name for p in Path(out).glob("*/pretrain/metrics.jsonl") if p.stat().st_size]
def kill():
    while len(cells()) < 2:  # both nodes are in the middle of something
        time.sleep(0.05)
    print("killed a node while these had begun:", *cells(), flush=True)
    cluster.remove_node(nodes[1], allow_graceful=False)
threading.Thread(target=kill, daemon=True).start()
status = cli.main([*line, "--ray", cluster.address, "--out", out])
print("status", status)
"""


@pytest.mark.slow
@pytest.mark.dist
def test_the_cells_of_a_machine_that_is_lost_run_again(digits_folder, tmp_path):
    """A real cluster of two nodes, of which one is killed while both compute."""
    line = ["sweep", "smoke", "--data", f"folder:{digits_folder}", "--grid", "seed=0,1,2", *SMALL, "--epochs", "12"]
    line += ["--threads", "1"]
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    assert cli.main([*line, "--out", str(whole)]) == 0
    command = [sys.executable, "-c", _CLUSTER, str(lost), *line]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert "killed a node" in ended.stdout and "status 0" in ended.stdout, ended.stdout + ended.stderr
    assert json.loads((lost / "sweep.json").read_text()) == json.loads((whole / "sweep.json").read_text())


@pytest.mark.slow
@pytest.mark.dist
def test_stopped_the_cells_on_ray_save_themselves(digits_folder, tmp_path):
    line = [sys.executable, "-m", "maelab", "sweep", "smoke", "--data", f"folder:{digits_folder}", *GRID, *SMALL]
    line += ["--threads", "1", "--ray", "local", "--out", str(tmp_path / "out")]
    line[line.index("--epochs") + 1] = "200"
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, preexec_fn=default_sigint)
    while not any(path.stat().st_size for path in tmp_path.glob("out/*/pretrain/metrics.jsonl")):
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command goes on from there" in err and "Traceback" not in err, err
    saved = [json.loads(path.read_text()) for path in tmp_path.glob("out/*/pretrain/checkpoints/commit.json")]
    assert saved and not json.loads((tmp_path / "out" / "sweep.json").read_text())["complete"]


def default_sigint() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
