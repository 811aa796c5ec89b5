"""What lies beside maelab's files stays: hidden files, links and folders, whatever happens to the command."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from processes import Ended, Maelab

from maelab.runs import folder as folders

TINY = ("--limit", 40, "--batch-size", 20, "--epochs", 2, "--threads", 1, "--kernels", "torch")
HELD = ("--device", "mps")  # this machine has none, so the command fails after it was understood


def surround(folder: Path) -> dict[str, bytes | str]:
    """Put somebody's things into a folder, and say what they are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (folder / ".env").write_text("SECRET=1\n")
    (folder / ".backup.2024").write_text("years of work")
    (folder / ".config.json.2024").write_text("mine")
    (folder / "thesis.txt").write_text("years of work")
    (folder / "notes" / "empty").mkdir(parents=True)
    while not (folder / "figures" / "mine.png").exists():
        with contextlib.suppress(FileNotFoundError):  # a run that gives up takes its own folder away while it is empty
            (folder / "figures").mkdir(exist_ok=True)
            (folder / "figures" / "mine.png").write_text("a figure")
    (folder / "link").symlink_to(folder / "thesis.txt")
    (folder / "dangling").symlink_to("nowhere")
    return everything(folder)


def everything(folder: Path) -> dict[str, bytes | str]:
    """Every entry of a folder: what a file holds, where a link points, "folder" for a folder."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        with contextlib.suppress(FileNotFoundError):  # a run at work is faster
            kind = f"-> {os.readlink(path)}" if path.is_symlink() else "folder" if path.is_dir() else ""
            found[name] = kind or path.read_bytes()
    return found


@pytest.fixture(scope="module")
def work(maelab: Maelab, digits_folder, tmp_path_factory) -> Path:
    """A folder with two classes of digits, a pretrained run `mae` and a fine-tuned one `classifier`."""
    work = tmp_path_factory.mktemp("work")
    for name in "01":
        shutil.copytree(digits_folder / name, work / "digits" / name)
    data = ("--data", "folder:digits")
    for line in (
        ("pretrain", "smoke", *data, *TINY, "--out", "mae"),
        ("finetune", "smoke", "--init", "mae", *data, *TINY, "--out", "classifier"),
    ):
        assert (ended := maelab.run(*line, cwd=work)).status == 0, ended.err
    return work


COMMANDS = {
    "pretrain": ("pretrain", "smoke", "--data", "folder:digits", *TINY),
    "finetune": ("finetune", "smoke", "--init", "mae", "--data", "folder:digits", *TINY),
    "probe": ("probe", "mae", *TINY),
    "fit": ("fit", "digits", "--minutes", 0.02, "--threads", 1),
    "sweep": ("sweep", "smoke", "--data", "folder:digits", "--grid", "mask_ratio=0.5", "--finetune-epochs", 1, *TINY),
}
MARKERS = {"fit": "plan.json", "sweep": "sweep.json"}
TOGETHER = pytest.mark.parametrize("command", COMMANDS)


def run(maelab: Maelab, work: Path, command: str, out: Path, *more: object, **request: object) -> Ended:
    return maelab.run(*COMMANDS[command], "--out", out, *more, cwd=work, **request)


@TOGETHER
@pytest.mark.parametrize("more", [(), ("--overwrite",), HELD, ("--overwrite", *HELD)], ids=lambda more: " ".join(more))
def test_a_folder_of_somebody_is_refused_before_any_work(command, more, maelab, work, tmp_path):
    if command == "sweep" and "mps" in more:
        more = more[:-2]
    before = surround(tmp_path / "mine")
    ended = run(maelab, work, command, tmp_path / "mine", *more)
    assert ended.status == 2 and "which maelab did not write" in ended.error(), ended
    assert everything(tmp_path / "mine") == before


@TOGETHER
@pytest.mark.parametrize("entry", [".backup.2024", ".lock", "notes/", "link", "config.json", "plan.json", "sweep.json"])
def test_one_entry_of_somebody_is_enough(command, entry, maelab, work, tmp_path):
    """Also one that is hidden, an empty folder, a link, or another program's file of the same name."""
    mine = tmp_path / "mine"
    mine.mkdir()
    if entry.endswith("/"):
        (mine / entry).mkdir()
    elif entry == "link":
        (mine / entry).symlink_to("nowhere")
    else:
        (mine / entry).write_text(json.dumps({"task": "image-classification", "data": "x", "cells": []}))
    before = everything(mine)
    for more in ((), ("--overwrite",)):
        ended = run(maelab, work, command, mine, *more)
        assert ended.status == 2 and "--out" in ended.error(), ended
        assert everything(mine) == before


@TOGETHER
def test_a_command_that_fails_leaves_an_empty_folder_and_no_new_one(command, maelab, work, tmp_path):
    (tmp_path / "there").mkdir()
    for name, remains in (("there", True), ("new", False)):
        flags = ("--blr", 1e30, "--precision", "fp32") if command in ("pretrain", "finetune") else HELD
        ended = run(maelab, work, command, tmp_path / name, *flags)
        assert ended.status in (1, 2), ended
        if command != "sweep":  # it keeps its list of cells, and what became of them
            assert (tmp_path / name).exists() == remains
            assert not remains or everything(tmp_path / name) == {}


@pytest.mark.parametrize("how", ["fails", "interrupted", "killed", "done", "replaced"])
@TOGETHER
def test_what_comes_into_the_folder_later_stays(command, how, maelab, work, tmp_path):
    """Somebody puts things beside a run that is at work, or done; then it fails, is stopped, goes on or is replaced."""
    out = tmp_path / "out"
    if how in ("fails", "interrupted", "killed"):
        more = {"largest_file": 5_000} if how == "fails" else {}  # too little for a checkpoint
        process = maelab.start(*COMMANDS[command], "--out", out, cwd=work, **more)
        inner = {"fit": "pretrain/", "sweep": "mask_ratio=0.5/pretrain/"}.get(command, "")
        process.wait_for(out / folders.LOCK if how == "fails" else out / inner / "metrics.jsonl", 0)
        before = surround(out)
        if how != "fails":
            process.signal(signal.SIGINT if how == "interrupted" else signal.SIGKILL)
        process.wait()
        assert theirs(before) == theirs(everything(out))
        begun = (out / MARKERS.get(command, "config.json")).is_file()
        ended = run(maelab, work, command, out)
        assert ended.status == (0 if begun else 2), ended
    else:
        assert (ended := run(maelab, work, command, out)).status == 0, ended
        before = surround(out)
        other = ("--minutes", 0.03) if command == "fit" else ("--seed", 1)
        ended = run(maelab, work, command, out, *((*other, "--overwrite") if how == "replaced" else ()))
        if how == "done" or command == "sweep":  # whose cells are folders of their own
            assert ended.status == 0, ended
        else:
            assert ended.status == 2 and "which maelab did not write" in ended.error(), ended
            assert everything(out) == before
    assert theirs(before) == theirs(everything(out))


def theirs(entries: dict[str, bytes | str]) -> dict[str, bytes | str]:
    """The entries that `surround` made."""
    return {name: content for name, content in entries.items() if name in SOMEBODYS}


SOMEBODYS = (
    ".git", ".git/HEAD", ".env", ".backup.2024", ".config.json.2024", "thesis.txt", "notes", "notes/empty",
    "figures/mine.png", "link", "dangling",
)  # fmt: skip


def test_overwriting_removes_every_file_of_a_run_and_nothing_else(maelab, work, tmp_path):
    out = tmp_path / "out"
    assert run(maelab, work, "pretrain", out).status == 0
    (out / "wandb").mkdir()  # that package's own, which may not have been sent yet
    (out / "wandb" / "run.wandb").write_text("curves")
    assert folders.foreign(out, folders.RUN) is None
    names = set(everything(out))
    assert run(maelab, work, "pretrain", out, "--seed", 1, "--overwrite").status == 0
    again = {name for name in everything(out) if not name.startswith("events.")}
    assert again == {name for name in names if not name.startswith("events.")}
    assert len(list(out.glob("events.*"))) == 2  # of the curves, and of the outcome
    folders.remove(out, folders.RUN, keep=())
    assert set(everything(out)) == {"wandb", "wandb/run.wandb"}


def test_a_link_is_never_followed(maelab, work, tmp_path):
    """A link of a known name leads out of the folder: it is somebody's, and so is what it leads to."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    assert run(maelab, work, "pretrain", out).status == 0
    shutil.move(out / "checkpoints", elsewhere)
    (out / "checkpoints").symlink_to(elsewhere)
    before = everything(elsewhere)
    ended = run(maelab, work, "pretrain", out, "--seed", 1, "--overwrite")
    assert ended.status == 2 and "'checkpoints', which maelab did not write" in ended.error()
    folders.remove(out, folders.RUN, keep=())
    assert everything(elsewhere) == before


@pytest.mark.parametrize(
    "line",
    [
        ("export", "classifier", "--format", "safetensors"),
        ("export", "mae", "--format", "hf"),
        ("report", "mae"),
        ("reconstruct", "mae", "digits", "--threads", 1),
        ("features", "mae", "digits", "--threads", 1),
    ],
    ids=lambda line: f"{line[0]} {line[-1]}",
)
def test_commands_that_write_one_thing_leave_a_folder_alone(line, maelab, work, tmp_path):
    before = surround(tmp_path / "mine")
    ended = maelab.run(*line, "--out", tmp_path / "mine", cwd=work)
    assert ended.status == 2 and everything(tmp_path / "mine") == before, ended


def test_a_bench_adds_no_table_to_somebodys_readme(maelab, tmp_path):
    before = surround(tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("# My project\n")
    ended = maelab.run("bench", "mae-mnist", "--out", "mine", cwd=tmp_path)
    assert ended.status == 2 and "is no table of speeds" in ended.error(), ended
    assert everything(tmp_path / "mine") == before | {"README.md": b"# My project\n"}
