"""The tutorial's commands, one after the other, as someone types them, on a small folder and in less time."""

import re
import shlex
import shutil
import signal
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import Maelab

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()
QUICKER = {"fit": ("--minutes", "0.02"), "finetune": ("--epochs", "2")}


def lines() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [line.removeprefix("maelab ") for block in blocks for line in block.splitlines()]


def test_every_command_of_the_tutorial_works(cifar_folder, maelab: Maelab, tmp_path):
    for name in ("cat", "ship"):
        shutil.copytree(cifar_folder / name, tmp_path / "photos" / name)
    shutil.copytree(cifar_folder / "dog", tmp_path / "photos" / "unlabelled")
    shutil.copytree(cifar_folder / "frog", tmp_path / "new")
    asked = lines()
    assert len(asked) > 8 and asked[0].startswith("fit ")
    for line in asked:
        words = shlex.split(line)
        if words[0] == "demo":
            if find_spec("gradio"):
                _open_and_end(words, maelab, tmp_path)
            continue
        if words[0] in QUICKER:
            flag, value = QUICKER[words[0]]
            words[words.index(flag) + 1] = value
        if words[0] in ("fit", "finetune", "predict", "reconstruct", "attention", "features"):
            words += ["--threads", "1"]
        done = maelab.run(*words, cwd=tmp_path)
        assert done.status == 0 and done.out, (line, done)
        for flag in ("--out", "--gallery"):
            assert flag not in words or (tmp_path / words[words.index(flag) + 1]).exists(), line
    assert (tmp_path / "runs" / "fit-photos" / "report.html").exists() and (tmp_path / "mlflow.db").exists()


def _open_and_end(words: list[str], maelab: Maelab, folder: Path) -> None:
    """The page answers; Ctrl-C ends the server."""
    server = maelab.start(*words, "--port", 0, "--threads", 1, cwd=folder)
    server.wait_for(server.out)
    with urllib.request.urlopen(server.out.read_text().split()[0], timeout=200) as answer:
        assert answer.status == 200 and b"maelab" in answer.read()
    server.signal(signal.SIGINT)
    assert server.wait().status == 0


@pytest.mark.parametrize("picture", re.findall(r"\]\(([^)]+\.(?:png|py))\)", PAGE))
def test_what_it_shows_is_there(picture):
    assert (Path(__file__).parents[1] / "docs" / picture).exists()
