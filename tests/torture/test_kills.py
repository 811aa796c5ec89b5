"""Real commands, killed hard at random moments and started again: each ends as if nothing had happened, bit by bit,
and a file of the user's own in the folder survives whatever happens.

`make torture` kills 200 times; without it there are about 10 kills, of the commands that take little.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine import LONG, SEED, tell
from processes import Ended, Maelab
from test_runs import assert_same

from maelab.runs import find_runs, read_json

KILLS = int(os.environ.get("TORTURE_KILLS", "10"))
MARKER = "mine.txt"
SMALL = ("--limit", 60, "--batch-size", 20, "--threads", 1, "--kernels", "torch")
MAE = ("pretrain", "smoke", *SMALL, "--val-fraction", 0.05)
GRID = ("--grid", "mask_ratio=0.5,0.75", "--grid", "seed=1,2", "--epochs", 2, "--finetune-epochs", 1)

# Name -> the command, without --data and --out, and its share of the kills.
COMMANDS: dict[str, tuple[tuple[object, ...], float]] = {
    "pretrain": ((*MAE, "--epochs", 12), 0.2),
    "finetune": (("finetune", "smoke", "--init", "mae", *SMALL, "--epochs", 12, "--ema-decay", 0.9), 0.2),
    "probe": (("probe", "mae", *SMALL, "--epochs", 40), 0.1),
    "sweep": (("sweep", "smoke", *GRID, *SMALL), 0.15),
    "fit": (("fit", "images", "--minutes", 0.05, "--threads", 1, "--kernels", "torch"), 0.15),
    "overwrite": ((*MAE, "--epochs", 8, "--seed", 7, "--overwrite"), 0.2),
}


@pytest.fixture(scope="module")
def begin(maelab: Maelab, digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Lay images, and a finished autoencoder to begin from, into a folder."""
    place = tmp_path_factory.mktemp("before")
    done = maelab.run(*MAE, "--epochs", 2, "--data", f"folder:{digits_folder}", "--out", "mae", cwd=place)
    assert done.status == 0, done.err

    def lay(folder: Path) -> None:
        shutil.copytree(place / "mae", folder / "mae")
        (folder / "images").symlink_to(digits_folder)

    return lay


def line(name: str, digits: Path) -> tuple[object, ...]:
    command = COMMANDS[name][0]
    data = () if name in ("fit", "probe") else ("--data", f"folder:{digits}")
    return (*command, *data, "--out", "run")


def assert_marked(run: Path, ended: Ended) -> None:
    assert (run / MARKER).read_text() == "mine", ended


def same(name: str, folder: Path, whole: Path) -> None:
    """Two ends are the same: every run folder, and the same files."""
    runs = [run.relative_to(folder) for run in find_runs(folder)]
    assert runs and runs == [run.relative_to(whole) for run in find_runs(whole)]
    for run in runs:
        assert_same(folder / run, whole / run)
    if name == "sweep":
        assert read_json(folder / "sweep.json") == read_json(whole / "sweep.json")
    listed = [{p.relative_to(f) for p in f.rglob("*") if not p.name.startswith("events.")} for f in (folder, whole)]
    assert listed[0] == listed[1], "no temporary file stays"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("finetune", "sweep", "fit") else n for n in COMMANDS]
)
def test_killed_again_and_again(name, maelab: Maelab, digits_folder: Path, begin, tmp_path):
    kills, chance, rounds, marked = max(1, round(KILLS * COMMANDS[name][1])), random.Random(f"{name} {SEED}"), 0, 0
    whole, killed, command = tmp_path / "whole", 0, line(name, digits_folder)
    while killed < kills:
        cwd, rounds = tmp_path / f"round {rounds}", rounds + 1
        cwd.mkdir()
        begin(cwd)
        run, before, clean = cwd / "run", killed, 0
        if name == "overwrite":  # another complete run lies there
            shutil.copytree(cwd / "mae", run)
        longest = 0.5
        while killed < kills and killed - before < 8:
            process = maelab.start(*command, cwd=cwd)
            time.sleep(chance.uniform(0.02, longest))
            if chance.random() < 0.5 and run.is_dir():
                (run / MARKER).write_text("mine")
            process.signal(signal.SIGKILL)
            ended = process.wait()
            killed, clean = killed + (ended.status == -signal.SIGKILL), clean + (ended.status == 0)
            assert ended.status in (0, 2, -signal.SIGKILL), (name, SEED, killed, ended)
            if (run / MARKER).exists():
                marked += 1
                assert_marked(run, ended)
                process = maelab.start(*command, cwd=cwd)  # once more, with the file in the way
                time.sleep(chance.uniform(0.02, longest))
                process.signal(signal.SIGKILL)
                ended = process.wait()
                killed, clean = killed + (ended.status == -signal.SIGKILL), clean + (ended.status == 0)
                assert_marked(run, ended)
                (run / MARKER).unlink()
            if clean:
                break
            longest = min(3.0, longest * 1.2)
        ended = maelab.run(*command, cwd=cwd)
        assert ended.status == 0, (name, SEED, killed, ended)
        if not (whole / "run").exists():
            shutil.rmtree(whole, ignore_errors=True)
            whole.mkdir()
            begin(whole)
        if name == "fit":  # its plan depends on the time that it measured, so the other one gets the same
            shutil.rmtree(whole / "run", ignore_errors=True)
            (whole / "run").mkdir()
            shutil.copy(run / "plan.json", whole / "run" / "plan.json")
        if name == "fit" or not (whole / "run").exists():
            done = maelab.run(*command, cwd=whole)
            assert done.status == 0, done.err
        same(name, run, whole / "run")
        shutil.rmtree(cwd)
        if LONG:
            tell(f"{name}: {killed} of {kills} kills, {rounds} ends compared, {marked} times with a file in the way")
