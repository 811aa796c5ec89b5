"""folder:PATH: what is loaded of it, damage, memory, default size and channels."""

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import bad, classes, save
from PIL import Image

from maelab.data import folder, load
from maelab.errors import RunError, UsageError


def test_loading_again_or_from_elsewhere_gives_the_same(digits_folder: Path, tmp_path: Path) -> None:
    first = load(f"folder:{digits_folder}")
    copy = shutil.copytree(digits_folder, tmp_path / "copy")
    again = load(f"folder:{copy}")
    assert first.test is not None and again.test is not None
    assert first.train.images.equal(again.train.images) and first.test.images.equal(again.test.images)
    assert first.checksums == again.checksums and set(first.checksums) == {"images", "files", "labels"}
    save(copy / "0" / "0000.png", 7, (28, 28))
    assert load(f"folder:{copy}").checksums != first.checksums


# -------------------------------------------------------------------------------------------------------------- damage


def gigantic(path: Path) -> None:
    """A PNG of a few hundred bytes that says it is 20000 x 20000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def test_undecodable_images_are_named_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes(tmp_path)
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    (tmp_path / "a" / "text.jpg").write_text("hello")
    bad(tmp_path / "b" / "bad.png")
    gigantic(tmp_path / "b" / "gigantic.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "b" / "whole.jpg")
    whole = (tmp_path / "b" / "whole.jpg").read_bytes()
    (tmp_path / "b" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "whole.jpg").unlink()
    Image.new("L", (8, 8)).save(tmp_path / "b" / "other.ppm")
    (tmp_path / "b" / "other.ppm").rename(tmp_path / "b" / "ppm.png")
    data = load(f"folder:{tmp_path}", img_size=(8, 8), in_chans=1)
    assert data.test is not None and len(data.train) + len(data.test) == 20
    named = [line.split(" (")[0] for line in data.skipped]
    assert named == ["a/empty.png", "a/text.jpg", "b/bad.png", "b/gigantic.png", "b/ppm.png", "b/truncated.jpg"]
    assert "(empty)" in data.skipped[0] and "megapixels" in data.skipped[3] and "truncated" in data.skipped[5]
    err = capsys.readouterr().err
    assert "skipped 6 of 26 images: a/empty.png (empty)" in err and "and 1 more" in err


def test_skipped_images_do_not_shift_labels(tmp_path: Path) -> None:
    classes(tmp_path, "abc", 10)
    for i in range(0, 10, 2):
        path = tmp_path / "b" / f"{i:02d}.png"
        path.write_bytes(path.read_bytes()[:45])  # header whole, pixels cut off
    data = load(f"folder:{tmp_path}")
    assert data.test is not None and len(data.skipped) == 5
    for part in (data.train, data.test):
        assert part.labels is not None
        assert (part.images[:, 0, 0, 0] // 100).tolist() == part.labels.tolist()


def test_more_than_memory_is_refused(digits_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder._available_memory() > 1 << 24
    monkeypatch.setattr(folder, "_available_memory", lambda: 300 * 28 * 28)
    with pytest.raises(RunError, match=r"300 images of 28 x 28 x 1 .* are free"):
        load(f"folder:{digits_folder}")
    assert load(f"folder:{digits_folder}", img_size=(24, 24)).train.images.shape[-1] == 24


def test_where_the_system_tells_nothing_of_its_memory_there_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(folder, "open", missing, raising=False)
    assert folder._available_memory() > 1 << 24
    monkeypatch.delattr(folder.os, "sysconf")
    assert folder._available_memory() > 1 << 60


# ------------------------------------------------------------------------------------------------------ size and modes


@pytest.mark.parametrize(
    ("sizes", "expected"),  # (width, height) -> (height, width)
    [
        ([(20, 10)] * 3, (10, 20)),
        ([(64, 64)] * 2, (64, 64)),
        ([(65, 65)] * 2, (64, 64)),
        ([(8, 8), (40, 30), (100, 50)], (16, 16)),
        ([(50, 70), (60, 80), (90, 200)], (48, 48)),
        ([(400, 300), (500, 600)], (224, 224)),
        ([(5, 4), (4, 4)], (16, 16)),
    ],
)
def test_default_size(sizes: list[tuple[int, int]], expected: tuple[int, int], tmp_path: Path) -> None:
    for i, size in enumerate(sizes):
        save(tmp_path / f"{i}.png", size=size)
    assert tuple(load(f"folder:{tmp_path}").train.images.shape[2:]) == expected


def test_one_colour_image_makes_three_channels(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", 9)
    assert load(f"folder:{tmp_path}").train.images.shape[1] == 1
    save(tmp_path / "colour.png", (1, 2, 3), mode="RGB")
    assert load(f"folder:{tmp_path}").train.images.shape[1] == 3


@pytest.mark.parametrize(
    ("options", "message"), [({"in_chans": 2}, "has not 2 channels"), ({"img_size": (0, 8)}, "img-size")]
)
def test_impossible_options(options: dict, message: str, tmp_path: Path) -> None:
    save(tmp_path / "x.png")
    with pytest.raises(UsageError, match=message):
        load(f"folder:{tmp_path}", **options)
