"""The commands of the tutorial and of its two sisters, as someone types them, on small folders and in less time."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import Maelab

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "tutorial.md").read_text()
QUICKER = {"fit": ("--minutes", "0.02"), "finetune": ("--epochs", "2")}


def lines(page: str = PAGE) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    return [line.removeprefix("maelab ") for block in blocks for line in block.splitlines()]


@pytest.mark.slow
def test_every_command_of_the_tutorial_works(cifar_folder, maelab: Maelab, runtime, tmp_path):
    for name in ("cat", "ship"):
        shutil.copytree(cifar_folder / name, tmp_path / "photos" / name)
    shutil.copytree(cifar_folder / "dog", tmp_path / "photos" / "unlabelled")
    shutil.copytree(cifar_folder / "frog", tmp_path / "new")
    asked = lines()
    assert len(asked) > 8 and asked[0].startswith("fit ")
    for line in asked:
        words = shlex.split(line)
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


def quick(line: str, maelab: Maelab, folder: Path) -> str:
    """What a command of a page says on stderr, in less time."""
    words = shlex.split(line)
    if "--minutes" in words:
        words[words.index("--minutes") + 1] = "0.02"
    done = maelab.run(*words, "--threads", 1, cwd=folder)
    assert done.status == 0 and done.out, (line, done)
    return done.err


@pytest.mark.slow
def test_the_page_on_labels_holds(maelab: Maelab, tmp_path):
    rows = ["file,species,site,split"]
    for i in range(80):
        name, species = f"IMG_{i:04d}.jpg", ("heron", "stork")[i // 4 % 2]
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("L", (32, 32), 60 + 100 * (i // 4 % 2) + i).save(tmp_path / "photos" / name)
        rows.append(f"{name},{species},site {i // 4},{'test' if i // 4 % 5 == 0 else 'train'}")
    (tmp_path / "photos" / "labels.csv").write_text("\n".join(rows))
    said = [quick(line, maelab, tmp_path) for line in lines((DOCS / "labels.md").read_text())]
    assert len(said) == 3 and all("column 'species', 80 of 80 images" in text for text in said)
    for name in ("fit-photos", "by-site"):
        page = (tmp_path / "runs" / name / "report.html").read_text()
        assert "3 finished runs" in page and "could not be read" not in page
    assert "groups" not in said[0] and "20 groups by --group" in said[1] and "groups by --group" in said[2]


@pytest.mark.slow
def test_the_page_on_bands_holds(maelab: Maelab, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(60):
        numbers = rng.integers(100, 2000, (32, 32)).astype(np.uint16) + 2000 * (i % 2)
        for place in ("cells", "new"):
            (tmp_path / place / ("alive", "dead")[i % 2]).mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / place / ("alive", "dead")[i % 2] / f"{i}.npy", numbers.astype(np.uint16))
    first, second = (quick(line, maelab, tmp_path) for line in lines((DOCS / "bands.md").read_text()))
    assert (
        "become 0 to 255 by one range of all images, which the model keeps: 1" in first and "cannot read" not in second
    )


@pytest.mark.parametrize("picture", re.findall(r"\]\(([^)]+\.(?:png|py))\)", PAGE))
def test_what_it_shows_is_there(picture):
    assert (Path(__file__).parents[1] / "docs" / picture).exists()
