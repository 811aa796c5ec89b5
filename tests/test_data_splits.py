"""Which images of a folder are held out, however the folder changes, and what is said of the changes."""

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import write_folder
from PIL import Image
from processes import Maelab

from maelab.config import PretrainConfig
from maelab.data import Dataset, compare_images, load, training_sets
from maelab.data.folder import scan
from maelab.data.splits import _draw, hold_out, list_of_images
from maelab.errors import UsageError

CONFIG = PretrainConfig(data="folder", val_fraction=0.2, split_seed=3)


def sides(root: Path) -> dict[bytes, str]:
    """The pixels of each image of a folder -> the part that it is in."""
    data = load(f"folder:{root}")
    train, val = training_sets(data, CONFIG, unlabelled=True)
    parts = {"train": train, "val": val} | ({"test": data.test} if data.test else {})
    found = [(image.numpy().tobytes(), name) for name, part in parts.items() for image in part.images[:]]
    assert len(dict(found)) == len(set(found)), "an image lies on two sides"
    return dict(found)


def moved(before: dict[bytes, str], after: dict[bytes, str]) -> int:
    return sum(before[image] != after[image] for image in before.keys() & after.keys())


@pytest.fixture
def grown(digits_folder: Path, mnist_small: Dataset, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A copy of the 300 digits, and 300 other digits that lie elsewhere under the paths they would have there."""
    every = write_folder(tmp_path / "every", mnist_small.train, mnist_small.class_names, 60)
    root = Path(shutil.copytree(digits_folder, tmp_path / "digits"))
    more = [path for path in sorted(every.rglob("*.png")) if not (root / path.relative_to(every)).exists()]
    return root, more


@pytest.mark.parametrize("flat", [False, True])
def test_images_keep_their_side_when_others_come_and_go(grown: tuple[Path, list[Path]], flat: bool) -> None:
    root, more = grown
    if flat:  # without classes, all in one folder
        for folder in sorted(root.iterdir())[1:]:
            for path in folder.iterdir():
                path.rename(root / "0" / f"{folder.name} {path.name}")
            folder.rmdir()
        more, root = [path for path in more if path.parent.name == "0"], root / "0"
    last = sides(root)
    assert len(last) == 300 and set(last.values()) == ({"train", "val"} if flat else {"train", "val", "test"})
    for n in (1, 29):
        for path in more[:n]:
            shutil.copy(path, (root if flat else root / path.parent.name) / path.name)
        more, now = more[n:], sides(root)
        assert moved(last, now) == 0 and len(now) == len(last) + n
        last = now
    for path in sorted(root.rglob("*.png"))[3::7]:
        path.unlink()
    now = sides(root)
    assert moved(last, now) == 0 and len(now) < len(last) - 40


def test_images_keep_their_side_under_other_names(digits_folder: Path, tmp_path: Path) -> None:
    first = sides(digits_folder)
    root = Path(shutil.copytree(digits_folder, tmp_path / "elsewhere"))
    for n, path in enumerate(sorted((root / "3").iterdir())):
        path.rename(path.with_name(f"{'é' if n % 2 else unicodedata.normalize('NFD', 'é')}{n}.png"))
    (root / "5").rename(root / "five")
    for path in sorted((root / "7").iterdir())[:5]:  # a mended class
        path.rename(root / "1" / path.name.replace(".", "x."))
    assert sides(root) == first


def test_copies_share_a_side_and_move_nothing(digits_folder: Path, tmp_path: Path, capsys) -> None:
    first = sides(digits_folder)
    root = Path(shutil.copytree(digits_folder, tmp_path / "copies"))
    for path in sorted(root.rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
    assert sides(root) == first and capsys.readouterr().err == "", "copies in one class are no fault"


def test_copies_in_two_classes_are_named_and_stay_together(digits_folder: Path, tmp_path: Path, capsys) -> None:
    first = sides(digits_folder)
    root = Path(shutil.copytree(digits_folder, tmp_path / "copies"))
    for path in sorted((root / "4").iterdir()):
        shutil.copy(path, root / "9" / f"four {path.name}")
    (root / "unlabelled").mkdir()
    for path in sorted((root / "8").iterdir()):
        shutil.copy(path, root / "unlabelled")
    assert sides(root) == first
    test = load(f"folder:{root}").test
    assert test is not None and test.labels is not None
    err = capsys.readouterr().err.splitlines()
    name = min(path.name for path in (root / "4").iterdir())
    assert err[0] == f"maelab: 60 identical files lie in different classes, for example 4/{name} and 9/four {name}"
    n = int((test.labels == 8).sum())
    assert err[1].startswith(f"maelab: left {n} images out of training, which are also test images: for example ")
    assert " unlabelled/" in err[1] and " as 8/" in err[1] and len(set(err)) == len(err), "once in a process"


def test_images_of_train_that_are_also_in_test_are_left_out(digits_folder: Path, tmp_path: Path, capsys) -> None:
    for part, names in (("train", "0123"), ("test", "0123")):
        for name in names:
            shutil.copytree(digits_folder / name, tmp_path / "own" / part / name)
    for path in [*(tmp_path / "own" / "test").rglob("*.png")]:
        if int(path.stem) % 2:
            path.unlink()
    in_test = len([*(tmp_path / "own" / "test").rglob("*.png")])
    data = load(f"folder:{tmp_path / 'own'}")
    assert data.test is not None and (len(data.test), len(data.train)) == (in_test, 120 - in_test)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"maelab: left {in_test} images out of training, which are also test images: for example ")
    assert "train/0/" in line and "as test/0/" in line
    found = scan(f"folder:{tmp_path / 'own'}")
    assert (found.labelled, found.test) == (120 - in_test, in_test)
    shutil.rmtree(tmp_path / "own" / "test")
    shutil.copytree(tmp_path / "own" / "train", tmp_path / "own" / "test")
    with pytest.raises(UsageError, match=r"class '0' .* has no good training image"):
        load(f"folder:{tmp_path / 'own'}")
    for part in ("train", "test"):
        shutil.copytree(digits_folder / "0", tmp_path / "flat" / part)
    with pytest.raises(UsageError, match=r"is also in .*; none is left to train on"):
        load(f"folder:{tmp_path / 'flat'}")


def test_a_class_of_two_has_one_on_either_side(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i:02d}").mkdir()
        for k in range(2):
            Image.new("L", (4, 4), i).resize((4 + k, 4)).save(tmp_path / f"{i:02d}" / f"{k}.png")
    (tmp_path / "00" / "broken.png").write_bytes((tmp_path / "00" / "0.png").read_bytes()[:45])  # the header is whole
    data = load(f"folder:{tmp_path}", img_size=(4, 4))
    assert data.test is not None and data.test.labels is not None and data.train.labels is not None
    assert data.train.labels.tolist() == data.test.labels.tolist() == list(range(100))


def test_a_look_agrees_with_loading(digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from maelab.data import folder

    data, found = load(f"folder:{digits_folder}"), scan(f"folder:{digits_folder}")
    assert data.test is not None and data.train.labels is not None
    assert list(found.classes.values()) == data.train.labels.bincount().tolist() and found.test == len(data.test)
    monkeypatch.setenv("MAELAB_DATA", str(tmp_path))
    monkeypatch.setattr(folder, "_MAPPED_ABOVE", 0)
    kept = load(f"folder:{digits_folder}")
    assert kept.listing == data.listing and kept.checksums == data.checksums
    monkeypatch.setattr(folder, "content_key", lambda path: pytest.fail(f"{path} is read again"))
    assert scan(f"folder:{digits_folder}") == found


# --------------------------------------------------------------------------------------------------------------- rules


def random_keys(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (n,), generator=torch.Generator().manual_seed(seed))


def test_shares_are_about_right_and_streams_independent() -> None:
    keys, labels = random_keys(40_000), torch.arange(40_000) % 10
    for fraction in (0.05, 0.1, 0.5):
        share = hold_out(keys, labels, fraction, "test").double()
        assert share.mean() == pytest.approx(fraction, abs=5 * (fraction * (1 - fraction) / len(keys)) ** 0.5)
    test, val = hold_out(keys, labels, 0.1, "test"), hold_out(keys, labels, 0.1, "validation 0")
    other = hold_out(keys, labels, 0.1, "validation 1")
    for one, two in ((test, val), (val, other)):
        assert (one & two).double().mean() == pytest.approx(0.01, abs=0.003)
    assert hold_out(keys, labels, 0.1, "test").equal(test)
    shuffled = torch.randperm(len(keys), generator=torch.Generator().manual_seed(1))
    assert hold_out(keys[shuffled], labels[shuffled], 0.1, "test").equal(test[shuffled])


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_growing_class_takes_nothing_out_of_training(n: int) -> None:
    keys = random_keys(0)
    for seed in range(300):
        keys = random_keys(n + 1, seed)
        before, after = hold_out(keys[:n], None, 0.1, "t"), hold_out(keys, None, 0.1, "t")
        for held in (before, after):
            assert 0 < int(held.sum()) < len(held)
        low = [_draw("t", key) < 0.1 for key in keys[:n].tolist()]
        assert not (~before & after[:n]).any() or all(low), "from a share of 0.1 ** n of all classes"
    assert not hold_out(keys[:1], None, 0.1, "t").any(), "of one image none is held out"
    assert not hold_out(keys, None, 0, "t").any() and len(hold_out(keys[:0], None, 0.1, "t")) == 0


def test_copies_across_classes_are_no_exception() -> None:
    for seed in range(300):
        a, b, c = random_keys(3, seed).tolist()
        keys, labels = torch.tensor([a, b, b, c]), torch.tensor([0, 0, 1, 1])
        held = hold_out(keys, labels, 0.1, "t")
        assert held[1] == held[2]
        assert held[:2].any() or not held[0], "the class's own image makes up for it"


# ------------------------------------------------------------------------------------------------------------- changes


def listed(**images: str) -> bytes:
    return list_of_images((f"{name}.png", content.encode().ljust(8)) for name, content in images.items())


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"a": "1", "b": "2", "c": "3"}, None),
        ({"a": "1", "b": "2", "c": "3", "d": "4"}, "1 image was added"),
        ({"a": "1", "d": "4", "e": "5"}, "2 images were added, 2 removed"),
        ({"a": "1", "b": "x"}, "1 image was removed, 1 changed"),
        ({"a": "1", "B": "2", "C": "3"}, "2 images were renamed or moved"),
        ({"a": "2", "B": "1", "c": "3", "d": "3"}, "2 images were added, 1 removed, 1 changed"),
        ({}, "3 images were removed"),
    ],
)
def test_changes_are_said_in_words(now: dict[str, str], said: str | None) -> None:
    assert compare_images(listed(a="1", b="2", c="3"), listed(**now)) == said


def test_the_list_of_a_folder_says_what_changed(digits_folder: Path, tmp_path: Path) -> None:
    before = load(f"folder:{digits_folder}")
    root = Path(shutil.copytree(digits_folder, tmp_path / "own"))
    assert len(before.listing) == 16 * 300 and load(f"folder:{root}", img_size=(14, 14)).listing == before.listing
    paths = sorted(root.rglob("*.png"))
    for i in range(12):
        Image.new("L", (28, 28), i).save(root / "4" / f"new {i}.png")
    for path in paths[:3]:
        path.unlink()
    Image.new("L", (28, 28), 99).save(paths[5])
    after = load(f"folder:{root}").listing
    assert compare_images(before.listing, after) == "12 images were added, 3 removed, 1 changed"
    with pytest.raises(ValueError, match="16 bytes for each"):
        compare_images(before.listing[:-1], after)


def test_paths_are_told_apart_as_people_do() -> None:
    name = "é/x.png"
    one, other = (list_of_images([(unicodedata.normalize(form, name), b"12345678")]) for form in ("NFC", "NFD"))
    assert one == other
    assert list_of_images([(Path("bad\udcff.png"), b"12345678")]) != one


# --- what a run says later -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(maelab: Maelab, digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with `digits` and a classifier of them, in `run`."""
    work = tmp_path_factory.mktemp("trained")
    shutil.copytree(digits_folder, work / "digits")
    line = (
        "finetune",
        "smoke",
        "--data",
        "folder:digits",
        "--limit",
        40,
        "--epochs",
        1,
        "--threads",
        1,
        "--out",
        "run",
    )
    assert (ended := maelab.run(*line, cwd=work)).status == 0, ended
    return work


CHANGED = "folder:digits has changed since run was trained: 2 images were added, 1 removed, 1 changed\n"


def test_commands_say_what_has_changed_in_the_runs_own_folder(trained: Path, maelab: Maelab, tmp_path: Path) -> None:
    work = Path(shutil.copytree(trained, tmp_path / "work"))
    lines = (
        ("evaluate", "run", "--threads", 1),
        ("evaluate", "run", "--split", "val", "--threads", 1),
        ("evaluate", "run", "--data", f"folder:{work / 'digits'}", "--threads", 1),
        ("features", "run", "--split", "train", "--threads", 1),
        ("export", "run", "--int8", "--out", "a.onnx"),
    )
    for line in lines[:2]:
        assert "has changed" not in maelab.run(*line, cwd=work).err
    files = sorted((work / "digits" / "3").iterdir())
    files[0].unlink()
    Image.new("L", (28, 28), 7).save(files[1])
    for i in (1, 2):
        Image.new("L", (28, 28), 100 + i).save(work / "digits" / "3" / f"new{i}.png")
    for line in lines:
        ended = maelab.run(*line, cwd=work)
        said = CHANGED.replace("folder:digits", f"folder:{work / 'digits'}") if "--data" in line else CHANGED
        assert ended.status == 0 and said in ended.err, ended
    ended = maelab.run("predict", "run", "digits", "--threads", 1, cwd=work)
    seen = "digits is the folder that run was trained on, so it has seen most of these images; since then 2 images were"
    assert ended.status == 0 and f"{seen} added, 1 removed, 1 changed\n" in ended.err


def test_another_folder_without_test_is_evaluated_whole(trained: Path, maelab: Maelab, mnist_small, tmp_path) -> None:
    """The model saw none of its images, however they are shared out."""
    work = Path(shutil.copytree(trained, tmp_path / "work"))
    write_folder(work / "other", mnist_small.test, mnist_small.class_names, 5)
    line = ("evaluate", "run", "--threads", 1, "--json")
    assert maelab.run(*line, "--data", "folder:other", cwd=work).json()["images"] == 50
    own = maelab.run(*line, cwd=work).json()["images"]
    assert 0 < own < 60 and maelab.run(*line, "--data", "folder:../work/digits", cwd=work).json()["images"] == own
    shutil.copytree(work / "digits" / "0", work / "other" / "0", dirs_exist_ok=True)  # some that it saw
    assert maelab.run(*line, "--data", "folder:other", cwd=work).json()["images"] < 30


def test_a_run_of_another_split_is_not_measured_on_it(trained: Path, maelab: Maelab, tmp_path: Path) -> None:
    """Its environment lacks the sum of the files, as of a run made when images were held out by their places."""
    work = Path(shutil.copytree(trained, tmp_path / "work"))
    about = json.loads((work / "run" / "env.json").read_text())
    del about["data_md5"]["files"]
    (work / "run" / "env.json").write_text(json.dumps(about))
    ended = maelab.run("evaluate", "run", "--threads", 1, cwd=work)
    assert ended.status == 2 and "was trained when images were held out by their places" in ended.error()
