"""folder:PATH: layouts, modes, damage."""

import re
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from maelab.config import PretrainConfig
from maelab.data import Dataset, folder, load, training_sets
from maelab.data.augment import augment
from maelab.data.batches import eval_batches, step_generator
from maelab.data.datasets import MappedImages
from maelab.errors import RunError, UsageError


def save(path: Path, value: int | tuple[int, ...] = 128, size: tuple[int, int] = (8, 8), mode: str = "L") -> Path:
    """A one-coloured image; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def classes(root: Path, names: str = "ab", n: int = 10) -> Path:
    for k, name in enumerate(names):
        for i in range(n):
            save(root / name / f"{i:02d}.png", 100 * k + i)
    return root


def one(path: Path, **options: object) -> torch.Tensor:
    """The only image of a flat folder, uint8 (C, H, W)."""
    data = load(f"folder:{path.parent}", **options)  # type: ignore[arg-type]
    assert len(data.train) == 1
    return data.train.images[0]


# ------------------------------------------------------------------------------------------------------------- layouts


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


def test_loading_again_or_from_elsewhere_gives_the_same(digits_folder: Path, tmp_path: Path) -> None:
    first = load(f"folder:{digits_folder}")
    copy = shutil.copytree(digits_folder, tmp_path / "copy")
    again = load(f"folder:{copy}")
    assert first.test is not None and again.test is not None
    assert first.train.images.equal(again.train.images) and first.test.images.equal(again.test.images)
    assert first.checksums == again.checksums and set(first.checksums) == {"images", "files", "labels"}
    save(copy / "0" / "0000.png", 7, (28, 28))
    assert load(f"folder:{copy}").checksums != first.checksums


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


# -------------------------------------------------------------------------------------------------------------- damage


def bad(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n damaged")


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
    Image.new("L", (8, 8)).save(tmp_path / "b" / "other.gif")
    (tmp_path / "b" / "other.gif").rename(tmp_path / "b" / "gif.png")
    data = load(f"folder:{tmp_path}", img_size=(8, 8), in_chans=1)
    assert data.test is not None and len(data.train) + len(data.test) == 20
    named = [line.split(" (")[0] for line in data.skipped]
    assert named == ["a/empty.png", "a/text.jpg", "b/bad.png", "b/gif.png", "b/gigantic.png", "b/truncated.jpg"]
    assert "(empty)" in data.skipped[0] and "megapixels" in data.skipped[4] and "truncated" in data.skipped[5]
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


def test_resize_covers_and_crops_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((10, 40), np.uint8)
    pixels[:, 15:25] = 200  # the middle square
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (one(tmp_path / "wide.png", img_size=(10, 10)) == 200).all()
    assert one(tmp_path / "wide.png", img_size=(5, 20)).shape == (1, 5, 20)


def test_resize_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    small = one(tmp_path / "stripes.png", img_size=(8, 8)).float()
    assert (small - 127.5).abs().max() < 8


@pytest.mark.parametrize(
    ("mode", "value", "grey", "colour"),
    [
        ("L", 77, 77, [77, 77, 77]),
        ("1", 1, 255, [255, 255, 255]),
        ("I;16", 65535, 255, [255, 255, 255]),
        ("I;16", 257 * 90 - 100, 90, [90, 90, 90]),
        ("LA", (40, 0), 255, [255, 255, 255]),
        ("RGB", (255, 0, 0), 76, [255, 0, 0]),
        ("RGBA", (255, 0, 0, 255), 76, [255, 0, 0]),
        ("RGBA", (255, 0, 0, 0), 255, [255, 255, 255]),
    ],
)
def test_modes(mode: str, value: int | tuple[int, ...], grey: int, colour: list[int], tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", value, mode=mode)
    with Image.open(path) as image:
        assert image.mode == mode, "the file really has this mode"
    assert one(path, in_chans=1)[0, 0, 0].item() == grey
    assert one(path, in_chans=3)[:, 0, 0].tolist() == colour
    assert len(one(path)) == (1 if mode in ("L", "1", "I;16", "LA") else 3)


def test_palette_and_its_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "x.png")
    assert one(tmp_path / "x.png")[:, 0, 0].tolist() == [10, 200, 30]
    image.save(tmp_path / "x.png", transparency=1)
    assert one(tmp_path / "x.png")[:, 0, 0].tolist() == [255, 255, 255]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = save(tmp_path / "x.jpg", (0, 255, 255, 0), mode="CMYK")  # no cyan, all magenta and yellow: red
    red, green, blue = one(path)[:, 4, 4].tolist()
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "JPG"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    pixel = one(save(tmp_path / f"x.{suffix}", (200, 100, 50), mode="RGB"))[:, 4, 4]
    assert (pixel.int() - torch.tensor([200, 100, 50])).abs().max() <= 4


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation(suffix: str, tmp_path: Path) -> None:
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:, :16] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: white on top
    Image.fromarray(pixels).convert("RGB").save(tmp_path / f"x.{suffix}", exif=exif, quality=95)
    image = one(tmp_path / f"x.{suffix}", img_size=(32, 16))[0].float()
    assert image[:14].mean() > 240 and image[18:].mean() < 15
    if suffix != "png":
        assert one(tmp_path / f"x.{suffix}").shape == (3, 32, 16), "the default size is that of the upright image"


def test_one_colour_image_makes_three_channels(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", 9)
    assert load(f"folder:{tmp_path}").train.images.shape[1] == 1
    save(tmp_path / "colour.png", (1, 2, 3), mode="RGB")
    assert load(f"folder:{tmp_path}").train.images.shape[1] == 3


def test_folder_without_path() -> None:
    with pytest.raises(UsageError, match="names no folder"):
        load("folder:")


@pytest.mark.parametrize(
    ("options", "message"), [({"in_chans": 2}, "in_chans is 2"), ({"img_size": (0, 8)}, "img-size")]
)
def test_impossible_options(options: dict, message: str, tmp_path: Path) -> None:
    save(tmp_path / "x.png")
    with pytest.raises(UsageError, match=message):
        load(f"folder:{tmp_path}", **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"10\n01\n11\n", "has 3 x 2 cells; it needs 2 x 2, one for each patch, or 8 x 8, one for each pixel"),
        (b"1,0\n1\n", "its lines have no cells or different numbers of them"),
        (b"\n \n", "its lines have no cells or different numbers of them"),
        (b"00\n00\n", "hides no patch"),
        (b"11\n11\n", "hides every patch"),
        (b"1 2\n0 0\n", "not a PNG, JPEG, WEBP, BMP image"),
        (b"", "empty"),
    ],
)
def test_masks_that_cannot_be(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mask").write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(message)):
        folder.read_mask(tmp_path / "mask", (2, 2), (8, 8))


def test_a_mask_is_hidden_where_it_is_1_or_dark(tmp_path: Path) -> None:
    (tmp_path / "mask.txt").write_text("0; 1; 0\n\n1; 0; 0\n")
    assert folder.read_mask(tmp_path / "mask.txt", (2, 3), (8, 12)).tolist() == [0, 1, 0, 1, 0, 0]
    pixels = np.full((8, 12), 255, np.uint8)
    pixels[:4, 4:8], pixels[4:, :3], pixels[4:, 4:6] = 0, 30, 0  # whole, three quarters dark, half
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "mask.png")
    assert folder.read_mask(tmp_path / "mask.png", (2, 3), (8, 12)).tolist() == [0, 1, 0, 1, 0, 0]


# --------------------------------------------------------------------------------------------------- larger than memory


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every set is kept in a file; the folder of those files."""
    monkeypatch.setenv("MAELAB_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(folder, "_MAPPED_ABOVE", 0)
    return tmp_path / "cache" / "folders"


def awkward(cifar_folder: Path, root: Path) -> Path:
    """CIFAR-10 images, some unlabelled, one broken."""
    for name in ("cat", "ship"):
        shutil.copytree(cifar_folder / name, root / name)
    shutil.copytree(cifar_folder / "dog", root / "unlabelled")
    whole = (root / "cat" / sorted(path.name for path in (root / "cat").iterdir())[3]).read_bytes()
    (root / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    return root


def test_images_in_a_file_train_like_those_in_memory(cifar_folder, mapped: Path, monkeypatch, tmp_path, capsys) -> None:
    root = awkward(cifar_folder, tmp_path / "own")
    on_disk = load(f"folder:{root}")
    again = load(f"folder:{root}")
    monkeypatch.setattr(folder, "_MAPPED_ABOVE", 2**29)
    memory = load(f"folder:{root}")
    assert isinstance(on_disk.train.images, MappedImages) and isinstance(memory.train.images, torch.Tensor)
    assert on_disk.checksums == again.checksums == memory.checksums and again.skipped == memory.skipped
    assert len(memory.skipped) == 1 and capsys.readouterr().err.count("decoding") == 1, "decoded once"
    config = PretrainConfig(data="folder", val_fraction=0.25, limit=40, crop_padding=4, flip=True, color_jitter=0.3)
    for one, other in zip(
        training_sets(on_disk, config, unlabelled=True), training_sets(memory, config, unlabelled=True), strict=True
    ):
        assert isinstance(one.images, MappedImages), "unread"
        assert one.images.shape == other.images.shape and one.labels.equal(other.labels)  # type: ignore[union-attr]
        index = torch.tensor([3, 0, 7, 7])
        batches = [augment(part.images, index, config, step_generator(1, 2)) for part in (one, other)]
        assert batches[0].equal(batches[1])
        for (x, _), (y, _) in zip(eval_batches(one, 16), eval_batches(other, 16), strict=True):
            assert x.equal(y)
    assert on_disk.test is not None and memory.test is not None and on_disk.test.images[:].equal(memory.test.images)
    on_disk.train.images[torch.tensor([0])].zero_()
    assert on_disk.train.images[:].equal(memory.train.images), "what is read is a copy"


def test_a_cache_follows_its_folder_and_survives_damage(cifar_folder, mapped: Path, tmp_path) -> None:
    root = awkward(cifar_folder, tmp_path / "own")
    expected = load(f"folder:{root}").train.images[:]
    (file,) = mapped.glob("*.uint8")
    content = bytearray(file.read_bytes())
    content[0] ^= 255
    file.write_bytes(content)
    assert load(f"folder:{root}").train.images[:].equal(expected), "a damaged file is made anew"
    file.write_bytes(content[:-1])
    assert load(f"folder:{root}").train.images[:].equal(expected)
    next(mapped.glob("*.json")).write_text("{")
    assert load(f"folder:{root}").train.images[:].equal(expected)
    in_use = load(f"folder:{root}")
    (root / "cat" / "cut.png").unlink()
    assert load(f"folder:{root}").skipped == ()
    (new,) = mapped.glob("*.uint8")
    assert new != file and not list(mapped.glob("*.part")), "the old file is gone"
    assert in_use.train.images[:].equal(expected), "who reads the old one keeps it"
    load(f"folder:{root}", img_size=(16, 16))
    assert len(list(mapped.glob("*.uint8"))) == 2


def test_two_at_once_decode_once(cifar_folder, mapped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(load, [f"folder:{cifar_folder}"] * 2)
    assert one.train.images[:].equal(two.train.images[:]) and capsys.readouterr().err.count("decoding") == 1


def test_a_full_disk_is_said_before_decoding(cifar_folder, mapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match=r"200 decoded images need .* set MAELAB_DATA"):
        load(f"folder:{cifar_folder}")
    assert not list(mapped.glob("*.part")) and not list(mapped.glob("*.uint8"))
