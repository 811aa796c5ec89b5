"""Runs in several processes: what goes wrong in one is said once, all decide alike, and none stays behind."""

import json
import math
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import FORKED_RANKS, Maelab
from torch import nn

from maelab.config import LoopConfig, RunOptions
from maelab.errors import RunError, UsageError
from maelab.runs import Run
from maelab.training.checkpoint import ModelSpec
from maelab.training.loop import Step, Task, train
from maelab.training.parallel import start_engine
from maelab.training.ranks import launch

pytestmark = pytest.mark.dist
TWO = RunOptions(device="cpu", devices=2, threads=1)


class Odd(Exception):
    """Cannot be made from its arguments, so no other process can have it."""

    def __init__(self, what: str, number: int) -> None:
        super().__init__(f"{what} {number}")


def work(folder: Path, how: str) -> str:
    """What each of two processes does; the second fails."""
    rank = os.environ["RANK"]
    (folder / rank).write_text(str(os.getpid()))
    if how == "before they meet" and rank == "0":
        time.sleep(600)
    if how == "before they meet":
        while not (folder / "0").exists():
            time.sleep(0.01)
        raise UsageError("--data is not there")
    engine = start_engine(TWO, "fp32")
    for step in range(10):
        if step == 5 and rank == "1":
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "odd":
                raise Odd("image", 7)
        engine.mean(torch.ones(2))
    return f"{rank} of {engine.world_size}"


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").exists() and ") Z " in Path(f"/proc/{pid}/stat").read_text()


def all_go(pids: list[int]) -> None:
    end = time.monotonic() + 60
    while not all(map(gone, pids)):
        assert time.monotonic() < end, "a process was left"
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        pytest.param("before they meet", UsageError, "--data is not there", marks=pytest.mark.slow),
        ("odd", RunError, "Odd: image 7"),
        ("killed", RunError, "process 1 of the run was ended by SIGKILL; if memory ran out, .*"),
    ],
)
def test_a_process_that_fails_is_heard_and_none_is_left(how: str, error: type[Exception], message: str, tmp_path: Path):
    with pytest.raises(error) as caught:
        launch(work, TWO, tmp_path, how)
    assert re.fullmatch(message, str(caught.value))
    assert all(gone(int((tmp_path / rank).read_text())) for rank in "01")


def test_machines_that_cannot_find_each_other_are_refused():
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        launch(work, RunOptions(devices=2, num_nodes=2))
    with pytest.raises(UsageError, match="nobody started them"):
        start_engine(TWO)


def decide(folder: Path) -> None:
    """Two trainings: each process sees other scores in the first, and one alone a loss that is no number in the second.
    Writes what each process made of it."""
    engine = start_engine(TWO, "fp32")
    rank = engine.global_rank
    spec = ModelSpec("Linear", {"in_features": 2, "out_features": 1}, "none")
    found: dict[str, Any] = {}

    def task(bad_step: int | None) -> Task:
        def batch(step: int, part: int, parts: int) -> tuple[torch.Tensor]:
            return (torch.full((1, 2), math.nan if step == bad_step and rank == 1 else 1.0),)

        def loss(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": model(x).square().mean()}

        def validate(model: Any, epoch: int) -> dict[str, float]:
            return {"loss": float(epoch if rank == 0 else -epoch), "threads": torch.get_num_threads()}

        return Task(nn.Linear(2, 1), spec, 4, Step(batch, loss), validate, "loss", False, patience=2)

    config = LoopConfig(epochs=6, batch_size=2, warmup_epochs=0)
    for name in ("patience", "nan"):
        if rank == 0:
            (folder / name).mkdir()
        engine.barrier()
        try:
            outcome = train(engine, Run(folder / name, {}), task(3 if name == "nan" else None), config)
            found[name] = [outcome.epochs, outcome.best_epoch, outcome.val]
        except RunError as error:
            found[name] = str(error).partition(" (")[0]
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_all_processes_decide_alike(maelab: Maelab, tmp_path: Path):
    """Stopping early, the best epoch, and giving up: at the same step of every process. One validates, with the
    threads of both."""
    here = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); from pathlib import Path; import test_ranks\n"
    there = f"test_ranks.launch(test_ranks.decide, test_ranks.TWO, Path({str(tmp_path)!r}))"
    assert maelab.run("--version", cwd=tmp_path, first=FORKED_RANKS + here + there).status == 0
    for rank in "01":
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {"patience": [3, 1, {"loss": 1.0, "threads": 2}], "nan": "the loss is nan at step 4"}


def test_interrupted_it_saves_and_goes_on_and_killed_it_leaves_nobody(
    digits_folder: Path, maelab: Maelab, tmp_path: Path
):
    """Two processes that read from shards: interrupted, one of them killed, and the one that started them killed."""
    assert maelab.run("data", "shard", digits_folder, "shards", cwd=tmp_path).status == 0
    flags = "--limit 64 --batch-size 16 --epochs 60 --val-fraction 0.1 --device cpu --devices 2 --threads 1 --out run"
    line = ("pretrain", "smoke", "--data", "folder:shards", "--knn-every", 0, *flags.split())
    rows = tmp_path / "run" / "metrics.jsonl"

    process = maelab.start(*line, cwd=tmp_path)
    process.wait_for(rows, lines=2)
    children = children_of(process.pid)
    for pid in (*children, process.pid):  # as a terminal does
        os.kill(pid, signal.SIGINT)
    ended = process.wait()
    assert ended.status == 130 and ended.error().startswith("stopped at step "), ended
    assert len(children) >= 2
    all_go(children)

    process = maelab.start(*line, cwd=tmp_path)
    process.wait_for(rows, lines=rows.read_bytes().count(b"\n") + 1)
    children = children_of(process.pid)
    os.kill(max(children), signal.SIGKILL)
    ended = process.wait()
    assert ended.status == 1 and "process 1 of the run" in ended.error(), ended
    all_go(children)

    process = maelab.start(*line, cwd=tmp_path)
    process.wait_for(rows, lines=rows.read_bytes().count(b"\n") + 1)
    children = children_of(process.pid)
    process.signal(signal.SIGKILL)
    assert process.wait().status == -signal.SIGKILL
    assert process.err.read_text().count("going on from step") == 1
    all_go(children)
