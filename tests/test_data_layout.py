"""What a folder means: classes, parts, and what is no folder of images."""

from pathlib import Path

import pytest
import torch
from pictures import bad, classes, save

from maelab.data import Dataset, load
from maelab.errors import UsageError


def test_class_folders_hold_out_about_a_tenth(digits_folder: Path, mnist_small: Dataset) -> None:
    data = load(f"folder:{digits_folder}")
    assert data.test is not None and data.train.labels is not None and data.test.labels is not None
    n_train, n_test = len(data.train), len(data.test)
    assert n_train + n_test == 300 and 15 <= n_test <= 45
    assert data.train.images.shape == (n_train, 1, 28, 28) and data.train.images.dtype == torch.uint8
    assert data.train.images.is_contiguous() and data.test.images.is_contiguous()
    of_class = data.test.labels.bincount(minlength=10)
    assert of_class.min() >= 1 and (data.train.labels.bincount() + of_class).tolist() == [30] * 10
    assert data.class_names == mnist_small.class_names and data.name == f"folder:{digits_folder}"
    # pixels and labels are those that were written
    originals = {image.numpy().tobytes(): label for image, label in _pairs(mnist_small)}
    found = {image.numpy().tobytes(): int(label) for image, label in _pairs(data)}
    assert len(found) == n_train and all(originals[image] == label for image, label in found.items())


def _pairs(data: Dataset) -> list[tuple[torch.Tensor, int]]:
    assert data.train.labels is not None
    return list(zip(data.train.images, data.train.labels.tolist(), strict=True))


def test_colour_folder(cifar_folder: Path) -> None:
    data = load(f"folder:{cifar_folder}")
    assert data.test is not None
    assert data.train.images.shape[1:] == (3, 32, 32) and len(data.train) + len(data.test) == 200


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", 50 * i)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("")
    (tmp_path / "empty sub-folder").mkdir()
    data = load(f"folder:{tmp_path}")
    assert data.train.labels is None and data.test is None and data.class_names == () and data.skipped == ()
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 50, 100]


def test_train_and_test_folders(tmp_path: Path) -> None:
    classes(tmp_path / "train", "ab", 4)
    for k, name in enumerate("ab"):
        for i in (60, 61):
            save(tmp_path / "test" / name / f"{i}.png", 100 * k + i)
    data = load(f"folder:{tmp_path}")
    assert data.test is not None and data.train.labels is not None and data.test.labels is not None
    assert data.class_names == ("a", "b")
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 and data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.test.images[:, 0, 0, 0].tolist() == [60, 61, 160, 161]


def test_images_deeper_in_a_class_folder_count(tmp_path: Path) -> None:
    classes(tmp_path)
    save(tmp_path / "a" / "more" / "x.PNG")
    data = load(f"folder:{tmp_path}")
    assert data.test is not None and len(data.train) + len(data.test) == 21 and data.class_names == ("a", "b")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root.rmdir(), "there is no folder"),
        (lambda root: (root.rmdir(), root.write_text("x")), "is a file"),
        (lambda root: None, "holds no images"),
        (lambda root: (root / "a").mkdir(), "holds no images"),
        (lambda root: (classes(root), (root / "c").mkdir()), "class 'c' in .* holds no images"),
        (lambda root: (classes(root), save(root / "x.png")), "both images and sub-folders"),
        (lambda root: (classes(root / "train"), classes(root / "val")), "name the two parts train/ and test/"),
        (lambda root: classes(root / "train"), "name the two parts train/ and test/"),
        (
            lambda root: (classes(root / "train", "a"), classes(root / "test", "ab")),
            "class 'b' is in .*test but not in",
        ),
        (lambda root: (classes(root / "train"), save(root / "test" / "x.png")), "test has no classes"),
        (lambda root: [classes(root / part) for part in ("train", "test", "val")], "and also val/"),
        (lambda root: (root / "x.png").write_text(""), r"none of the images.*x.png \(empty\)"),
        (lambda root: (classes(root, "a"), bad(root / "b" / "0.png")), "class 'b' .* no good training image"),
    ],
)
def test_unusable_folders(make, message: str, tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    make(root)
    with pytest.raises(UsageError, match=message) as caught:
        load(f"folder:{root}")
    assert "\n" not in str(caught.value)


def test_folder_without_path() -> None:
    with pytest.raises(UsageError, match="names no folder"):
        load("folder:")
