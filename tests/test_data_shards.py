"""Shards: a folder in a few tar archives trains as the folder does, and damage is named."""

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Maelab

from maelab.config import FinetuneConfig, PretrainConfig, Reading, RunOptions
from maelab.data import load, training_sets
from maelab.data.folder import list_folder, scan
from maelab.data.sets import ImageSet, UnreadImages
from maelab.data.sharding import shard
from maelab.data.shards import INDEX, read_index, write_index
from maelab.errors import RunError, UsageError
from maelab.tasks.pretrain import pretrain
from maelab.training import loop

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 1, "num_heads": 1, "decoder_embed_dim": 24, "decoder_depth": 1}
TINY |= {"decoder_num_heads": 1, "epochs": 2, "batch_size": 8, "img_size": (32, 32), "knn_every": 0}


@pytest.fixture
def own(cifar_folder: Path, tmp_path: Path) -> Path:
    """Three classes of 20 images, one of them unlabelled, one copy and one broken file."""
    root = tmp_path / "own"
    for name in ("cat", "ship"):
        shutil.copytree(cifar_folder / name, root / name)
    shutil.copytree(cifar_folder / "dog", root / "unlabelled")
    first, second = sorted((root / "cat").iterdir())[:2]
    shutil.copy(first, root / "cat" / "a copy.png")
    (root / "cat" / "cut.png").write_bytes(second.read_bytes()[:200])
    return root


@pytest.fixture
def written(own: Path, tmp_path: Path) -> Path:
    shard(own, tmp_path / "shards", shard_mb=1)
    return tmp_path / "shards"


def same_sets(one: ImageSet | None, other: ImageSet | None) -> bool:
    if one is None or other is None:
        return one is other
    pairs = ((one.labels, other.labels), (one.keys, other.keys), (one.groups, other.groups))
    return one.images[:].equal(other.images[:]) and all((a is b is None) or a.equal(b) for a, b in pairs)  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", ["held-out", "given", "groups", "flat", "table"])
def test_shards_hold_what_the_folder_holds(layout: str, own: Path, tmp_path: Path) -> None:
    """The same parts, labels, splits and pixels, whatever says them."""
    more: dict[str, Any] = {}
    (own / "cat" / "cut.png").unlink()  # only decoding shows that it is broken, so a scan counts it
    if layout == "given":
        for part, name in (("train", "cat"), ("train", "ship"), ("test", "cat"), ("test", "ship"), ("val", "cat")):
            for file in sorted((own / name).glob("*.png"))[{"train": 0, "test": 8, "val": 15}[part] :][:8]:
                place = own.parent / "given" / part / name / file.name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, place)
        own = own.parent / "given"
    elif layout == "flat":
        own = own / "unlabelled"
    elif layout == "groups":
        more["group"] = "([0-9])[.]png$"
    elif layout == "table":
        files = sorted((own / "cat").glob("[0-9]*.png"))
        rows = "".join(f"{file.name},{'old' if i % 2 else 'new'}\n" for i, file in enumerate(files))
        own = own / "cat"
        (own / "labels.csv").write_text(f"file_name,label\n{rows}")
    out = shard(own, tmp_path / "out", shard_mb=1, **more)["data"]
    reading = Reading(**more)
    there, here = load(f"folder:{own}", reading=reading), load(out, reading=reading)
    assert isinstance(here.train.images, UnreadImages)
    for name in ("train", "test", "val", "unlabelled"):
        assert same_sets(getattr(there, name), getattr(here, name)), name
    assert (there.class_names, there.held_out, there.listing) == (here.class_names, here.held_out, here.listing)
    assert there.checksums["files"] == here.checksums["files"]
    config = FinetuneConfig(data="x", val_fraction=0.25)
    for one, other in zip(training_sets(there, config), training_sets(here, config), strict=True):
        assert same_sets(one, other)
    found, again = scan(f"folder:{own}", reading), scan(out, reading)
    assert replace(found, fingerprint="") == replace(again, fingerprint="")
    assert list_folder(out) == here.listing
    if more:
        assert load(out).checksums == here.checksums, "shards know their groups"
        with pytest.raises(UsageError, match=r"written with --group .* the shards have to be written again"):
            load(out, reading=Reading(group="other"))


def test_training_from_shards_is_training_from_the_folder(own: Path, written: Path, maelab: Maelab, tmp_path) -> None:
    flags = ("--embed-dim", 24, "--depth", 1, "--num-heads", 1, "--epochs", 2, "--threads", 1)
    rows = {}
    for data in (own, written):
        before, after = f"{data.name}-p", f"{data.name}-f"
        maelab.run("pretrain", "folder", "--data", f"folder:{data}", *flags, "--out", before, cwd=tmp_path)
        line = ("finetune", "folder", "--init", before, "--data", f"folder:{data}", "--unlabelled", 2)
        maelab.run(
            "finetune", "folder", "--init", before, "--data", f"folder:{data}", *flags[6:], "--out", after, cwd=tmp_path
        )
        maelab.run(*line[:3], after, *line[4:], "--ema-decay", 0.9, *flags[6:], "--out", f"{after}-u", cwd=tmp_path)
        lines = [(tmp_path / run / "metrics.jsonl").read_text() for run in (before, after, f"{after}-u")]
        rows[data.name] = [
            {name: value for name, value in json.loads(row).items() if name not in ("seconds", "images_per_s")}
            for row in "".join(lines).splitlines()
        ]
    assert rows["own"] == rows["shards"] and len(rows["own"]) == 12
    assert "damaged" not in maelab.run("evaluate", "shards-f", cwd=tmp_path).err


def test_the_command_says_what_it_found_and_loses_nothing(own: Path, maelab: Maelab, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in own.rglob("*.png")}
    ended = maelab.run("data", "shard", own, "out", "--json", cwd=tmp_path)
    result = ended.json()
    assert result == {
        "data": "folder:out", "shards": 1, "images": 61, "unreadable": result["unreadable"],
        "bytes": (tmp_path / "out" / "train-000000.tar").stat().st_size,
    }  # fmt: skip
    assert result["unreadable"][0].startswith("cat/cut.png (") and "unreadable, left out: 1" in ended.err
    assert {path: path.read_bytes() for path in own.rglob("*.png")} == before
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [INDEX, "train-000000.tar"] and not list(tmp_path.glob(".out*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    for out, said in (
        ("out", "holds something already"),
        ("mine", "holds something"),
        (own / "x", "among your images"),
    ):
        assert said in maelab.run("data", "shard", own, out, cwd=tmp_path).error()
    assert "holds shards already" in maelab.run("data", "shard", "out", "new", cwd=tmp_path).error()
    assert "at least 1" in maelab.run("data", "shard", own, "new", "--shard-mb", 0, cwd=tmp_path).error()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names and not (own / "x").exists()
    assert maelab.run("data", "shards", cwd=tmp_path).error()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_other_tools_read_the_shards(own: Path, written: Path) -> None:
    """WebDataset itself, and Python's tarfile: each image beside its class, bytes as they were."""
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(written.glob("*.tar"))]
    originals = {path.read_bytes(): path.parent.name for path in own.rglob("*.png")}
    seen = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        kind = {b"0": "cat", b"1": "ship", None: "unlabelled"}[sample.get("cls")]
        assert originals[sample["png"]] == kind
        seen.append(kind)
    assert len(seen) == 61 and len(set(seen[:8])) > 1, "classes are mixed"
    with tarfile.open(urls[0]) as tar:
        member = next(one for one in tar if one.name.endswith(".png"))
        index = read_index(written)
        assert member.offset_data in index.columns["offset"] and member.mtime == 0


def test_a_folder_that_filled_meanwhile_keeps_what_it_has(own: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(
        "maelab.data.sharding.write_index", lambda *_: (tmp_path / "out" / "letter.txt").write_text("mine")
    )
    with pytest.raises(RunError, match="cannot write"):
        shard(own, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"] and not list(tmp_path.glob(".out*"))


def test_shards_are_cut_at_their_size_and_by_part(own: Path, tmp_path: Path) -> None:
    for name in ("cat", "ship"):
        for i, file in enumerate(sorted((own / name).glob("[0-9]*.png"))):
            place = tmp_path / "big" / ("test" if i % 3 else "train") / name / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    rng = np.random.default_rng(0)
    for i in range(24):  # noise, which no format makes small
        noise = Image.fromarray(rng.integers(0, 256, (200, 200, 3), np.uint8))
        noise.save(tmp_path / "big" / "train" / "cat" / f"noise-{i}.png")
    result = shard(tmp_path / "big", tmp_path / "out", shard_mb=1)
    lengths = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.tar")}
    names = [f"train-{i:06d}.tar" for i in range(result["shards"] - 1)]
    assert sorted(lengths) == ["test-000000.tar", *names] and result["shards"] >= 4
    assert max(lengths.values()) < 1_020_000 and sum(lengths.values()) == result["bytes"]
    data = load(result["data"], img_size=(32, 32))
    assert data.test is not None and not data.held_out
    assert same_sets(data.test, load(f"folder:{tmp_path / 'big'}", img_size=(32, 32)).test)


# -------------------------------------------------------------------------------------------------------------- damage


def test_a_damaged_image_is_named_and_another_of_its_class_takes_its_place(written: Path, tmp_path, capsys) -> None:
    whole = load(f"folder:{written}")
    pixels = {name: getattr(whole, name).images[:] for name in ("train", "test", "unlabelled")}
    assert whole.train.labels is not None
    index = read_index(written)
    row = int(np.flatnonzero(index.columns["key"] == int(whole.train.keys[3]))[0])  # type: ignore[index]
    file = written / list(index.shards)[index.columns["shard"][row]]
    content = bytearray(file.read_bytes())
    content[index.columns["offset"][row] + 100] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    data = load(f"folder:{written}")
    assert data.checksums == whole.checksums
    for name in ("test", "unlabelled"):
        assert getattr(data, name).images[:].equal(pixels[name])
    assert not capsys.readouterr().err
    images, again = data.train.images[:], data.train.images[torch.tensor([3])]
    following = next(i for i in range(4, len(images)) if whole.train.labels[i] == whole.train.labels[3])
    assert images[3].equal(pixels["train"][following]) and again[0].equal(images[3])
    rest = [i for i in range(len(images)) if i != 3]
    assert images[rest].equal(pixels["train"][rest])
    err = capsys.readouterr().err
    assert err.count("is damaged: images in it are not what was written") == 1 and str(file) in err
    content[:] = bytes(len(content))
    file.write_bytes(content)
    with pytest.raises(RunError, match="no image of the same class can be read; write the shards again"):
        load(f"folder:{written}").train.images[:]


def test_a_shard_that_is_not_whole_is_left_out(own: Path, tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    for i in range(24):
        name = ("cat", "ship")[i % 2]
        Image.fromarray(rng.integers(0, 256, (200, 200, 3), np.uint8)).save(own / name / f"noise-{i}.png")
    out = tmp_path / "out"
    shard(own, out, shard_mb=1)
    whole = load(f"folder:{out}")
    first, *_, last = sorted(out.glob("*.tar"))
    first.unlink()
    data = load(f"folder:{out}")
    assert 0 < len(data.train) < len(whole.train) and data.checksums["files"] != whole.checksums["files"]
    assert f"{first} is missing or has another length" in capsys.readouterr().err
    assert len(data.train.images[:]) == len(data.train)
    last.write_bytes(last.read_bytes()[:-512])
    fewer = load(f"folder:{out}")
    assert len(fewer.train) < len(data.train) and f"{last} is missing" in capsys.readouterr().err
    for file in out.glob("*.tar"):
        file.unlink()
    with pytest.raises(UsageError, match=r"no shard in .* is whole"):
        load(f"folder:{out}")


def columns_of(written: Path) -> dict[str, np.ndarray]:
    return {name: column.copy() for name, column in read_index(written).columns.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shard": 7}, "the number of a shard"),
        ({"shard": -1}, "the number of a shard"),
        ({"offset": 2**40}, "a place"),
        ({"offset": -1}, "a place"),
        ({"size": 0}, "a size"),
        ({"size": -5}, "a size"),
        ({"label": 2}, "a label"),
        ({"label": -2}, "a label"),
        ({"part": 3}, "a part"),
    ],
)
def test_an_index_from_anywhere_is_checked(change: dict[str, int], said: str, written: Path) -> None:
    index = read_index(written)
    columns = columns_of(written)
    for name, value in change.items():
        columns[name][2] = value
    write_index(written, replace(index, columns=columns))
    with pytest.raises(UsageError, match=rf"{INDEX} is no index of shards \({said}\); maelab data shard writes one"):
        load(f"folder:{written}")


@pytest.mark.parametrize(
    "change",
    [
        {"shards": {"../../etc/passwd": 10**6}},
        {"shards": {"train-000000.tar/../x": 10**6}},
        {"shards": {"train-000000.tar": "many"}},
        {"shards": ["train-000000.tar"]},
        {"class_names": [1, 2]},
        {"class_names": None},
        {"size": [10**9, 10**9]},
        {"size": [0, 32]},
        {"channels": True},
        {"channels": 10**9},
        {"value_range": [[1]]},
        {"value_range": 5},
        {"asked": [1]},
        {"asked": [1, 2]},
        {"given": 1},
        {"found": {}},
        {"found": {"classes": {"cat": 1}}},
    ],
)
def test_what_an_index_says_is_checked(change: dict[str, Any], written: Path) -> None:
    write_index(written, replace(read_index(written), **change))
    with pytest.raises(UsageError, match="is no index of shards"):
        load(f"folder:{written}")


@pytest.mark.parametrize(
    ("name", "value"),
    [("classes", {"cat": "many"}), ("classes", [1]), ("side", -1), ("side", True), ("broken", "x"), ("smallest", [1])],
)
def test_what_an_index_says_was_found_is_checked(name: str, value: Any, written: Path) -> None:
    index = read_index(written)
    write_index(written, replace(index, found=index.found | {name: value}))
    with pytest.raises(UsageError, match=r"is no index of shards \(what a scan found\)"):
        scan(f"folder:{written}")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_that_is_no_index_is_named(content: bytes, written: Path) -> None:
    (written / INDEX).write_bytes(content)
    for look in (load, scan, list_folder):
        with pytest.raises(UsageError, match="is no index of shards"):
            look(f"folder:{written}")


def test_a_folder_that_changes_or_a_full_disk_leaves_nothing(own: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("maelab.data.sharding.shutil.disk_usage", lambda _: type("U", (), {"free": 1000}))
    with pytest.raises(RunError, match=r"the shards need 0\.1? ?.*GiB, and .* GiB free"):
        shard(own, tmp_path / "out")
    monkeypatch.undo()
    read, seen = Path.read_bytes, set[Path]()
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"x" * (path in seen or bool(seen.add(path))))
    with pytest.raises(RunError, match="has changed while the shards were written; begin again"):
        shard(own, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# ------------------------------------------------------------------------------------------------------------- reading


def test_what_is_expected_is_read_ahead_and_is_the_same(written: Path) -> None:
    images: Any = load(f"folder:{written}").train.images
    plain, index = images[:], torch.tensor([3, 1, 4])
    asked: list[int] = []
    read = images._read
    images._read = lambda rows: asked.append(len(rows)) or read(rows)
    for _ in range(3):
        images.expect(index)
    assert images[index].equal(plain[index]) and asked == [3], "read once"
    assert images[index].equal(plain[index]) and asked == [3, 3]
    for start in range(30):  # nobody asks for these: they do not pile up
        images.expect(torch.tensor([start % len(images)] * (1 + start)))
    assert len(images._expected) <= 16


def test_a_long_epoch_is_saved_within_and_goes_on_exactly(written: Path, tmp_path: Path, monkeypatch) -> None:
    """Killed at step 4 of an epoch of 6, with what was saved at step 3, it ends as if nothing had happened."""
    config = PretrainConfig(data=f"folder:{written}", val_fraction=0.1, **TINY)
    whole, _ = pretrain(config, options=RunOptions(out=tmp_path / "whole", threads=1))
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    steps = 0
    set_rate = loop.set_learning_rate

    class Killed(BaseException):
        pass

    def step(*given: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise Killed
        set_rate(*given)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "set_learning_rate", step)
        pretrain(config, options=RunOptions(out=tmp_path / "killed", threads=1))
    commit = json.loads((tmp_path / "killed" / "checkpoints" / "commit.json").read_text())
    assert commit["step"] == 3 and commit["epoch"] == 0
    pretrain(config, options=RunOptions(out=tmp_path / "killed", threads=1))
    name = "checkpoints/best/model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (whole / name).read_bytes()
