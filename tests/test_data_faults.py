"""What ruins results is said before anyone asks."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_folder
from pictures import classes, save
from PIL import Image

from maelab.config import Reading
from maelab.data import Dataset, load
from maelab.data.faults import ALIKE, _near_copies, describe_cropping, describe_ignored
from maelab.data.folder import scan
from maelab.data.layout import HEIF
from maelab.errors import UsageError


def notes(root: Path, word: str, **more: object) -> list[str]:
    return [line for line in load(f"folder:{root}", **more).faults if word in line]  # type: ignore[arg-type]


def test_a_good_folder_hears_nothing(cifar_small: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, n in (("train", 12), ("test", 4)):
        write_folder(tmp_path / part, getattr(cifar_small, part), cifar_small.class_names, n)
    data = load(f"folder:{tmp_path}")
    assert data.faults == () and capsys.readouterr().err == ""


def test_test_images_that_look_like_training_images_are_named(cifar_small: Dataset, tmp_path: Path) -> None:
    for part, n in (("train", 12), ("test", 4)):
        write_folder(tmp_path / part, getattr(cifar_small, part), cifar_small.class_names, n)
    originals = sorted((tmp_path / "train").rglob("*.png"))[::40]
    for path in originals:  # other bytes, other pixels, the same picture
        again = Image.open(path).resize((48, 48), Image.Resampling.BICUBIC).resize((32, 32))
        again.save(tmp_path / "test" / path.parent.name / f"again {path.stem}.jpg", quality=90)
    (said,) = notes(tmp_path, "look like training images")
    assert said.startswith(f"{len(originals)} test images") and "again " in said and "--group" in said


def test_what_looks_the_same_is_what_correlates(mnist_small: Dataset) -> None:
    """A naive loop over all pairs; two of the judging images are brighter, noisier copies."""
    pictures = F.adaptive_avg_pool2d(mnist_small.train.images[:40].float(), 16)[:, 0]
    noise = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    thumbnails = torch.cat([pictures, pictures[[3, 17]] * 1.1 + 5 + noise, torch.full((1, 16, 16), 9.0)])
    judges = torch.zeros(43, dtype=torch.bool)
    judges[[0, 1, 2, 40, 41, 42]] = True
    expected = [
        (i, j)
        for i in judges.nonzero()[:-1, 0].tolist()
        for j in (~judges).nonzero()[:, 0].tolist()
        if np.corrcoef(thumbnails[i].flatten(), thumbnails[j].flatten())[0, 1] > ALIKE
    ]
    assert _near_copies(thumbnails, judges, ~judges) == expected == [(40, 3), (41, 17)]


def test_uneven_classes_and_few_test_images_are_said(tmp_path: Path) -> None:
    classes(tmp_path / "even", "ab", 60)
    assert not notes(tmp_path / "even", "uneven")
    for i in range(90):
        save(tmp_path / "other" / "common" / f"{i}.png", i)
    for i in range(12):
        save(tmp_path / "other" / "rare" / f"{i}.png", 100 + i)
    (said,) = notes(tmp_path / "other", "uneven")
    assert "common has" in said and "rare" in said and "--class-weights balanced" in said
    (said,) = notes(tmp_path / "other", "test images")
    assert "30 are the least" in said


def test_nearly_black_images_are_named(tmp_path: Path) -> None:
    classes(tmp_path, "ab", 10)
    for i in range(3):
        save(tmp_path / "a" / f"dark{i}.png", i)
    (said,) = notes(tmp_path, "nearly black")
    assert said.startswith("nearly black: 13 of 23 images")  # those of a are dark too: 0 to 9


@pytest.mark.parametrize(("size", "share"), [((32, 64), 0.5), ((64, 32), 0.5), ((32, 32), 0.0), ((32, 40), 0.2)])
def test_the_share_that_cropping_cuts_off(size: tuple[int, int], share: float, tmp_path: Path) -> None:
    said = describe_cropping([size], (16, 16))
    assert bool(said) == (share >= 0.1) and (not said or f"cuts off {share:.0%} of an image" in said[0])
    for i in range(4):
        save(tmp_path / f"{i}.png", 90 + i, (size[1], size[0]))
    assert bool(notes(tmp_path, "cropping", img_size=(16, 16))) == (share >= 0.1)
    assert not notes(tmp_path, "cropping", img_size=(16, 16), reading=Reading("pad"))


def test_ignored_files_are_loud_over_a_tenth_and_advice_is_given() -> None:
    assert describe_ignored({}, 10) == []
    assert describe_ignored({".txt": 1}, 99) == ["other files, ignored: 1 .txt"]
    loud, advice = describe_ignored({".heic": 140}, 24)
    assert loud.startswith("LOOK: 140 of 164 files are no images here")
    assert advice == "LOOK: 140 of 164 files are .heic: pip install 'maelab[heif]'"


def test_a_class_whose_files_are_all_of_another_kind_is_loud(tmp_path: Path) -> None:
    classes(tmp_path, "ab", 10)
    (tmp_path / "butterfly").mkdir()
    assert "no images, so no class: butterfly/" in scan(f"folder:{tmp_path}").lines()
    (tmp_path / "butterfly").rmdir()
    (tmp_path / "c").mkdir()
    for i in range(4):
        (tmp_path / "c" / f"{i}.dcm").write_bytes(b"DICM")
    said = scan(f"folder:{tmp_path}").lines()
    assert "LOOK: no images, so no class: c/, but 4 .dcm" in said
    assert any("LOOK: 4 of 24 files are no images" in line for line in said)
    assert any("4 of 24 files are .dcm: save them as TIFF or .npy" in line for line in said)
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.dcm").write_bytes(b"DICM")
    with pytest.raises(UsageError, match=r"holds no images .*, but 1 \.dcm"):
        load(f"folder:{tmp_path / 'only'}")


def test_links_that_lead_nowhere_are_counted(tmp_path: Path) -> None:
    classes(tmp_path, "ab", 10)
    os.symlink("nowhere.png", tmp_path / "a" / "lost.png")
    os.symlink("nowhere", tmp_path / "b" / "gone")
    assert "links that lead nowhere: 2" in scan(f"folder:{tmp_path}").lines()


@pytest.mark.skipif(not HEIF, reason="pillow-heif is not installed")
def test_heic_is_read_like_any_picture(tmp_path: Path) -> None:
    from pillow_heif import from_pillow

    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, :48] = (200, 100, 50)
    from_pillow(Image.fromarray(pixels)).save(tmp_path / "IMG_0001.HEIC", quality=95)
    data = load(f"folder:{tmp_path}", img_size=(64, 96))
    left = data.train.images[0, :, 32, 20]
    assert (left.int() - torch.tensor([200, 100, 50])).abs().max() < 12
    content = (tmp_path / "IMG_0001.HEIC").read_bytes()
    (tmp_path / "cut.heic").write_bytes(content[: len(content) // 2])
    (tmp_path / "none.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    assert [line.partition(" ")[0] for line in load(f"folder:{tmp_path}").skipped] == ["cut.heic", "none.heic"]
