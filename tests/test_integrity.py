"""Every file of a checkpoint is checked when it is read; what was damaged, cut or taken away is noticed and said."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import Maelab
from safetensors.torch import load_file, save_file

from maelab import load_model
from maelab.errors import RunError
from maelab.runs import commit, find_checkpoint, settle
from maelab.runs.checkpoints import NAMES, intact

TINY = ("--limit", 40, "--batch-size", 20, "--threads", 1, "--kernels", "torch")
SAVED = "run/checkpoints/commit.json"


@pytest.fixture(scope="module")
def line(digits_folder) -> tuple[object, ...]:
    return ("pretrain", "smoke", "--data", f"folder:{digits_folder}", *TINY, "--epochs", 4)


@pytest.fixture(scope="module")
def whole(maelab: Maelab, line, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    work = tmp_path_factory.mktemp("whole")
    assert maelab.run(*line, "--out", "run", cwd=work).status == 0
    return work / "run"


@pytest.fixture(scope="module")
def killed(maelab: Maelab, line, tmp_path_factory) -> Path:
    """The same run, killed once its third epoch was saved."""
    work = tmp_path_factory.mktemp("killed")
    assert maelab.run(*line, "--out", "run", cwd=work, die=(SAVED, 3, "after")).status == -signal.SIGKILL
    return work / "run"


def flip(file: Path, at: float = 0.5) -> None:
    """Change one bit, somewhere in the file."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * at)] ^= 1
    file.write_bytes(content)


def result(run: Path) -> dict[str, object]:
    content = json.loads((run / "result.json").read_text())
    return {key: value for key, value in content.items() if key not in ("train_time_s", "images_per_s")}


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "a bit near the end": lambda file: flip(file, 0.99),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "other": lambda file: file.write_bytes(b"garbage" * 1000),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", ["last/training.pt", "last/model.safetensors", "last/config.json", "commit.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(damage, name, maelab, line, whole, killed, tmp_path):
    if name == "commit.json" and damage != "gone" and not damage.startswith(("cut", "empty", "other")):
        pytest.skip("a bit of it may change what it says of another file, or nothing that matters")
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    DAMAGE[damage](run / "checkpoints" / name)
    ended = maelab.run(*line, "--out", "run", cwd=tmp_path)
    assert ended.status == 0, ended
    assert f"run/checkpoints/{name} is " in ended.err and "; going on from the checkpoint before it\n" in ended.err
    assert "going on from step 4 of 8" in ended.err, "two of three epochs"
    assert result(run) == result(whole)


def test_a_damaged_best_is_taken_from_its_copy(maelab, line, whole, killed, tmp_path):
    """Its epoch may have passed long ago: the run would have nothing to go back to."""
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    flip(run / "checkpoints" / "best" / "model.safetensors")
    ended = maelab.run(*line, "--out", "run", cwd=tmp_path)
    assert ended.status == 0 and result(run) == result(whole), ended


def test_where_both_are_damaged_nothing_is_guessed(maelab, line, whole, killed, tmp_path):
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    for name in ("last", "previous/last"):
        flip(run / "checkpoints" / name / "training.pt")
    ended = maelab.run(*line, "--out", "run", cwd=tmp_path)
    assert ended.status == 1 and ended.error() == (
        "run/checkpoints/last/training.pt is damaged: it is not what was saved (another SHA-256);"
        " and there is no checkpoint before it that is whole; --overwrite starts anew"
    )
    assert maelab.run(*line, "--out", "run", "--overwrite", cwd=tmp_path).status == 0
    assert result(run) == result(whole)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_finished_run_whose_best_weights_are_damaged(name, maelab, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    best = run / "checkpoints" / "best" / name
    before = load_model(run)[0].state_dict()
    flip(best)
    again = load_model(run)[0].state_dict()
    if (run / "checkpoints" / "previous" / "best" / name).read_bytes() == (
        whole / "checkpoints" / "best" / name
    ).read_bytes():
        assert all(before[key].equal(again[key]) for key in before), "the copy of the same commit"
    else:
        ended = maelab.run("info", "run", cwd=tmp_path)
        assert "is damaged: it is not what was saved (another SHA-256); the checkpoint before it is used" in ended.err
    flip(run / "checkpoints" / "previous" / "best" / name)
    ended = maelab.run("reconstruct", "run", "--threads", 1, cwd=tmp_path)
    assert ended.status == 1 and f"run/checkpoints/best/{name} is damaged: it is not what was" in ended.error()


def test_a_portable_checkpoint_knows_its_own_sum(whole, tmp_path):
    """Copied out of its run, and for the weights that come with maelab."""
    for source in (find_checkpoint(whole), find_checkpoint("maelab:mnist-mae")):
        copy = tmp_path / source.model.parent.name
        shutil.copytree(source.model.parent, copy)
        state = load_model(copy)[0].state_dict()
        flip(copy / "model.safetensors", 0.9)
        with pytest.raises(RunError, match=r"model.safetensors is damaged .* \(another SHA-256\)"):
            load_model(copy)
        with pytest.raises(RunError, match="another SHA-256"):  # weights of somebody else, well formed
            save_file({key: value * 2 for key, value in state.items()}, copy / "model.safetensors")
            load_model(copy)


@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_metrics_that_were_cut_or_removed_are_noticed(damage, maelab, line, whole, killed, tmp_path):
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    file = run / "metrics.jsonl"
    rows = file.read_bytes().splitlines(keepends=True)
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"".join(rows[:2] if damage == "cut" else [rows[0].replace(b"0", b"1"), *rows[1:]]))
    ended = maelab.run(*line, "--out", "run", cwd=tmp_path)
    assert ended.status == 0
    assert (
        "run/metrics.jsonl was cut or changed since the checkpoint: its rows are written again from there" in ended.err
    )
    written = file.read_bytes().splitlines(keepends=True)
    assert written[: len(rows)] == rows and len(written) == len((whole / "metrics.jsonl").read_bytes().splitlines())


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_a_run_folder_deleted_under_a_running_training_ends_it_in_one_line(task, maelab, line, tmp_path):
    command = (*line, "--epochs", 1000) if task == "pretrain" else ("finetune", *line[1:-2], "--epochs", 1000)
    process = maelab.start(*command, "--out", "run", cwd=tmp_path)
    process.wait_for(tmp_path / "run" / "metrics.jsonl", 2)
    (tmp_path / "run").rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    ended = process.wait()
    assert ended.status == 1
    assert ended.error() == "the run folder run has gone: it was moved or removed while the run went on"
    assert not (tmp_path / "run").exists(), "it is not made again"


def test_training_state_with_other_content_is_one_line(maelab, line, killed, tmp_path):
    """Of the right sum, as someone hostile would make it."""
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    saved = torch.load(run / "checkpoints/last/training.pt", weights_only=True)
    for content in ({"x": 1}, [1], saved | {"position": 3}, saved | {"optimizers": []}, saved | {"model": {}}):
        commit(run, {"last/training.pt": lambda place, content=content: torch.save(content, place)}, {"step": 6})
        ended = maelab.run(*line, "--out", "run", cwd=tmp_path)
        assert ended.status == 1 and ended.error().startswith("run/checkpoints/last/training.pt is damaged ("), ended
        assert ended.error().endswith("; remove run to start anew")


# --- commits --------------------------------------------------------------------------------------------------------


def contents(run: Path) -> dict[str, bytes]:
    files, _ = intact(run, NAMES)
    return {name: file.read_bytes() for name, file in files.items()}


@pytest.mark.parametrize("better", [True, False])
def test_a_commit_is_all_or_nothing(better, monkeypatch, tmp_path):
    """Whatever file it is at when the process ends, what was committed before is whole, or what it commits is."""

    class Killed(BaseException):
        pass

    def files(number: int, with_best: bool) -> dict[str, bytes]:
        names = NAMES if with_best else [name for name in NAMES if name.startswith("last")]
        return {name: f"{name} of commit {number}".encode() for name in names}

    (tmp_path / "before").mkdir()
    commit(tmp_path / "before", files(1, True), {"step": 1})
    commit(tmp_path / "before", files(2, False), {"step": 2})
    before, replace = contents(tmp_path / "before"), os.replace
    n, left = 0, [0]
    while left[0] <= 0:  # until it replaces fewer files than that
        n, left = n + 1, [n + 1]
        run = Path(shutil.copytree(tmp_path / "before", tmp_path / str(n)))

        def deadly(source: Path, target: Path, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("os.replace", deadly)
            try:
                commit(run, files(3, better), {"step": 3})
            except Killed:
                assert contents(run) == before
                settle(run)
                assert contents(run) == before
                assert all((run / "checkpoints" / name).read_bytes() == before[name] for name in NAMES)
        commit(run, files(3, better), {"step": 3})
        assert contents(run) == before | files(3, better)
    assert n > 8


def test_weights_of_a_run_are_those_of_its_best_epoch(whole):
    """The best weights and the state to go on from are of one commit."""
    said = json.loads((whole / "checkpoints/commit.json").read_text())
    assert said["step"] == 8 and said["epoch"] == 4 and set(said["sha256"]) == set(NAMES)
    best = load_file(find_checkpoint(whole).model)
    assert all(best[key].equal(value) for key, value in load_model(whole)[0].state_dict().items())
