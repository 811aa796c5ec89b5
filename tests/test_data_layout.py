"""What a folder means: classes, parts, and what is no folder of images."""

from pathlib import Path

import pytest
import torch
from pictures import bad, classes, save

from maelab.config import DataConfig
from maelab.data import Dataset, load, training_sets
from maelab.data.datasets import whole
from maelab.data.folder import scan
from maelab.data.images import find_images
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


def test_images_without_a_class_count_beside_the_parts_and_within_the_training_part(tmp_path: Path) -> None:
    classes(tmp_path / "train", "ab", 4)
    for place, value in (("unlabelled", 10), ("train/unlabelled", 11), ("test/a", 60), ("test/unlabeled", 61)):
        save(tmp_path / place / "x.png", value)
    save(tmp_path / "test" / "b" / "x.png", 160)
    data = load(f"folder:{tmp_path}")
    assert data.unlabelled is not None and sorted(data.unlabelled.images[:, 0, 0, 0].tolist()) == [10, 11]
    assert data.test is not None and data.test.images[:, 0, 0, 0].tolist() == [60, 160]
    assert "LOOK: 1 images without a class in test/ are left out" in scan(f"folder:{tmp_path}").notes


def test_images_deeper_in_a_class_folder_count(tmp_path: Path) -> None:
    classes(tmp_path)
    save(tmp_path / "a" / "more" / "x.PNG")
    data = load(f"folder:{tmp_path}")
    assert data.test is not None and len(data.train) + len(data.test) == 21 and data.class_names == ("a", "b")


def test_parts_in_any_spelling_and_validation_as_the_folder_says(tmp_path: Path, capsys) -> None:
    for k, part in enumerate(("Training", "VALID", "testing")):
        for j, name in enumerate("ab"):
            for i in range(4):
                save(tmp_path / part / name / f"{i}.png", 80 * k + 20 * j + i)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "boxes.json").write_text("{}")
    for part, name in (("VALID", "of-test"), ("Training", "of-val")):
        save(tmp_path / part / "a" / f"{name}.png", 160 if name == "of-test" else 80)
    data = load(f"folder:{tmp_path}")
    assert data.val is not None and data.test is not None and not data.held_out
    assert [len(part) for part in (data.train, data.val, data.test)] == [8, 8, 8]
    train, val = training_sets(data, DataConfig(data="x", val_fraction=0.5))
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
    assert val.images[:, 0, 0, 0].tolist() == [80, 81, 82, 83, 100, 101, 102, 103]
    assert "left 2 images out of training, which are also test or validation images" in capsys.readouterr().err
    found = scan(f"folder:{tmp_path}")
    assert (found.labelled, found.val, found.test, found.ignored) == (8, 8, 8, {".json": 1})
    assert "8 for validation; 8 for testing, in test/" in "\n".join(found.lines())


def test_a_validation_folder_alone_leaves_the_test_part_to_be_held_out(tmp_path: Path) -> None:
    classes(tmp_path / "train", n=20)
    for i in range(5):
        save(tmp_path / "val" / "a" / f"{i}.png", 200 + i)
    data = load(f"folder:{tmp_path}")
    assert data.val is not None and data.test is not None and data.held_out
    assert len(data.val) == 5 and len(data.test) >= 2 and len(data.train) + len(data.test) == 40
    assert len(whole(data)) == 45


def test_what_systems_and_editors_leave_behind_is_passed_over(tmp_path: Path) -> None:
    classes(tmp_path)
    for place in ("__MACOSX/a", "a/.ipynb_checkpoints", ".git", "b/@eaDir"):
        save(tmp_path / place / "00.png", 7)
    save(tmp_path / "a" / "._00.png", 7)
    (tmp_path / "Thumbs.db").write_bytes(b"\0")
    data = load(f"folder:{tmp_path}")
    assert data.test is not None and data.class_names == ("a", "b") and len(data.train) + len(data.test) == 20
    assert len(list(find_images([tmp_path]))) == 20


def test_links_are_followed_once(tmp_path: Path) -> None:
    classes(tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere" / "far.png", 90)
    (tmp_path / "set" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "a" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "set" / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    data = load(f"folder:{tmp_path / 'set'}")
    assert data.test is not None and len(data.train) + len(data.test) == 21


def test_names_control_no_terminal(tmp_path: Path, capsys) -> None:
    classes(tmp_path)
    (tmp_path / "c\x1b[31m\n").mkdir()
    bad(tmp_path / "a" / "d\x1b[31m.png")
    save(tmp_path / "unlabelled" / "e\x1b[31m.png", 0)  # a copy of a/00.png
    for i in range(10):
        save(tmp_path / "unlabelled" / f"f\x1b[31m{i}.png", 100 + i)  # and of all of b
    load(f"folder:{tmp_path}")
    said = capsys.readouterr().err
    assert "\x1b" not in said and said.count("\n") == said.count("maelab: ") >= 3 and r"c\x1b[31m\n/" in said


def test_names_are_those_that_people_see(tmp_path: Path, capsys) -> None:
    for k, name in enumerate(("caf\u00e9", "cafe\u0301", "Cat", "cat", "empty")):
        (tmp_path / name).mkdir()
        for i in range(10 if name != "empty" else 0):
            save(tmp_path / name / f"{i}.png", 50 * k + i)
    data = load(f"folder:{tmp_path}")
    assert data.class_names == ("Cat", "caf\u00e9", "cat") and data.train.labels is not None and data.test is not None
    assert (data.train.labels.bincount() + data.test.labels.bincount()).tolist() == [10, 20, 10]  # type: ignore[union-attr]
    said = capsys.readouterr().err
    assert "no images, so no class: empty/" in said and "classes 'Cat' and 'cat' differ in case alone" in said
    assert "no images, so no class: empty/" in scan(f"folder:{tmp_path}").lines()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root.rmdir(), "there is no folder"),
        (lambda root: (root.rmdir(), root.write_text("x")), "is a file"),
        (lambda root: None, "holds no images"),
        (lambda root: (root / "a").mkdir(), "holds no images"),
        (lambda root: (classes(root), save(root / "x.png")), "both images and sub-folders"),
        (lambda root: classes(root / "train"), "train/ alone: use folder:.*train, or put test/ or val/"),
        (lambda root: [classes(root / part) for part in ("val", "Test")], "Test/ and val/, and no train/"),
        (lambda root: [classes(root / part) for part in ("train", "Training", "test")], "Training/ and train/: leave"),
        (lambda root: [classes(root / part) for part in ("train", "samples")], "and also samples/.*use folder:.*train"),
        (lambda root: classes(root / "images"), r"images/ alone.*\(a, b\).*are the classes, use folder:.*images"),
        (lambda root: classes(root, "a"), "a single class, a/.*to pretrain.*use folder:.*images/a"),
        (
            lambda root: (classes(root / "train"), classes(root / "test", "abc")),
            "class 'c' is in .*test but not in",
        ),
        (lambda root: (classes(root / "train"), save(root / "test" / "x.png")), "test has no classes"),
        (lambda root: [classes(root / part) for part in ("train", "test", "val", "x")], "and also x/"),
        (lambda root: (classes(root / "train"), classes(root / "valid", "abc")), "class 'c' is in .*valid but not in"),
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
