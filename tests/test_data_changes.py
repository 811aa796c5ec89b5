"""A change in a folder that leaves all else as it was is noticed: by its fingerprint, and by the file of its pixels."""

import os
from pathlib import Path

import pytest
import torch
from pictures import classes, save
from PIL import Image

from maelab.data import Dataset, ImageSet, datasets, folder, load
from maelab.data.cache import cached_keys
from maelab.data.decode import read_header
from maelab.data.folder import scan
from maelab.data.layout import fingerprint_of, list_files
from maelab.errors import RunError


def fingerprint(root: Path) -> str:
    return fingerprint_of(list_files(root).files, root)


def rewrite(path: Path, value: int, *, keep_time: bool) -> None:
    """Another grey in a file of the same size."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] = value  # the last pixel
    path.write_bytes(content)
    later = before.st_mtime_ns + (0 if keep_time else 1_000_000)
    os.utime(path, ns=(before.st_atime_ns, later))
    assert path.stat().st_size == before.st_size


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """train/ and test/ of two classes, as BMP: every image has the same size in bytes."""
    for part, values in (("train", range(6)), ("test", range(50, 53))):
        for k, name in enumerate("ab"):
            for i in values:
                save(tmp_path / "own" / part / name / f"{i}.bmp", 100 * k + i)
    return tmp_path / "own"


def test_a_file_that_is_written_again_changes_the_fingerprint_by_its_time(own):
    before = fingerprint(own)
    assert fingerprint(own) == before == scan(f"folder:{own}").fingerprint
    rewrite(own / "train" / "a" / "3.bmp", 7, keep_time=False)
    assert fingerprint(own) != before


def test_a_file_of_another_size_changes_the_fingerprint_whatever_its_time(own):
    before, path = fingerprint(own), own / "train" / "a" / "3.bmp"
    stat = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns and fingerprint(own) != before


def test_names_classes_and_parts_change_the_fingerprint(own):
    seen = {fingerprint(own)}
    for source, target in (
        ("train/a/3.bmp", "train/a/x.bmp"),
        ("train/a/x.bmp", "train/b/x.bmp"),
        ("train/b/x.bmp", "test/b/x.bmp"),
    ):
        (own / source).rename(own / target)
        seen.add(fingerprint(own))
    (own / "test" / "b" / "x.bmp").unlink()
    seen.add(fingerprint(own))
    assert len(seen) == 5
    files = list_files(own).files
    for changed in ({"label": 1}, {"part": "test"}, {"part": "val"}):  # of the same path
        assert fingerprint_of([files[0]._replace(**changed), *files[1:]], own) not in seen
    assert fingerprint_of(files, own) in seen


@pytest.mark.parametrize("shape", [(8, 8), (4, 4)])
def test_pixels_that_are_kept_in_a_file_follow_an_image_that_is_written_again(shape, own, tmp_path, monkeypatch):
    monkeypatch.setenv("MAELAB_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(folder, "_MAPPED_ABOVE", 0)
    before = load(f"folder:{own}", img_size=shape).train.images[:]
    rewrite(own / "train" / "a" / "3.bmp", 255, keep_time=False)
    after = load(f"folder:{own}", img_size=shape).train.images[:]
    monkeypatch.setattr(folder, "_MAPPED_ABOVE", 2**29)
    assert not after.equal(before) and after.equal(load(f"folder:{own}", img_size=shape).train.images)


def test_keys_that_are_kept_are_those_of_this_very_folder(own, tmp_path, monkeypatch):
    monkeypatch.setenv("MAELAB_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(folder, "_MAPPED_ABOVE", 0)
    load(f"folder:{own}")
    files = list_files(own).files
    assert len(cached_keys(files, own, fingerprint(own))) == 18
    before = fingerprint(own)
    rewrite(own / "train" / "a" / "3.bmp", 255, keep_time=False)
    assert cached_keys(files, own, fingerprint(own)) == {} and len(cached_keys(files, own, before)) == 18
    assert cached_keys(files, tmp_path, before) == {}


# --- limits that are written down -----------------------------------------------------------------------------------


def test_one_size_up_to_64_is_kept_and_others_become_squares_by_16(tmp_path):
    for n, (sizes, expected) in enumerate((
        ([(64, 64), (64, 64)], (64, 64)),
        ([(64, 40), (64, 40)], (40, 64)),
        ([(65, 65), (65, 65)], (64, 64)),
        ([(65, 30), (65, 30)], (16, 16)),
        ([(12, 12), (14, 14)], (16, 16)),
        ([(47, 90), (47, 80)], (32, 32)),
        ([(300, 260), (300, 250)], (224, 224)),
        ([(240, 239), (300, 239)], (224, 224)),
    )):  # fmt: skip
        for i, size in enumerate(sizes):
            save(tmp_path / str(n) / f"{i}.png", 50 * i, size)
        assert load(f"folder:{tmp_path / str(n)}").train.images.shape[2:] == expected, sizes


def test_a_scan_tells_the_shorter_side_and_the_smallest_and_largest(tmp_path):
    for i, size in enumerate([(10, 50), (20, 90), (70, 30)]):  # width, height
        save(tmp_path / f"{i}.png", i, size)
    found = scan(f"folder:{tmp_path}")
    assert (found.side, found.smallest, found.largest) == (20, (50, 10), (30, 70))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_says_the_size_of_the_upright_image(orientation, tmp_path):
    image = Image.new("L", (12, 6), 9)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.jpg", exif=exif)
    header = read_header(tmp_path / "x.jpg")
    shown = load(f"folder:{tmp_path}").train.images
    assert (header.height, header.width) == tuple(shown.shape[2:]) == ((12, 6) if orientation > 4 else (6, 12))


SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".PNG", ".JpG")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_an_image_in_any_case(suffix, tmp_path):
    short = {"jpg": "JPEG", "jfif": "JPEG", "tif": "TIFF"}
    format = short.get(suffix[1:].lower(), suffix[1:].upper())
    Image.new("L", (8, 8), 90).save(tmp_path / f"x{suffix}", format=format)
    assert len(load(f"folder:{tmp_path}").train) == 1


@pytest.mark.parametrize("spelt", ["unlabelled", "unlabeled"])
def test_either_spelling_holds_images_without_a_class(spelt, tmp_path):
    classes(tmp_path, "ab", 4)
    for i in range(3):
        save(tmp_path / spelt / f"{i}.png", 240 + i)
    data = load(f"folder:{tmp_path}")
    assert data.class_names == ("a", "b") and data.unlabelled is not None and len(data.unlabelled) == 3


def test_a_set_says_whether_its_test_part_was_held_out(own, tmp_path):
    classes(tmp_path / "plain", "ab", 4)
    assert load(f"folder:{tmp_path / 'plain'}").held_out and not load(f"folder:{own}").held_out
    assert not load(f"folder:{tmp_path / 'plain' / 'a'}").held_out


@pytest.mark.parametrize("times", [0.79, 0.81])
def test_four_fifths_of_the_free_memory_may_be_filled(times, own, monkeypatch):
    monkeypatch.setattr(folder, "_available_memory", lambda: int(18 * 64 / times))
    if times < 0.8:
        assert len(load(f"folder:{own}").train) == 12
    else:
        with pytest.raises(RunError, match="choose a smaller --img-size or fewer images"):
            load(f"folder:{own}")


def test_a_resized_set_is_smoothed_before_it_is_made_smaller(monkeypatch):
    """Stripes of one white pixel in four become a dark grey, in the training and the test part."""
    stripes = ((torch.arange(32) % 4 == 0) * 255).to(torch.uint8).expand(6, 1, 32, 32).contiguous()
    data = Dataset("mnist", ImageSet(stripes, torch.arange(6)), ImageSet(stripes[:2], torch.arange(2)), (), {})
    monkeypatch.setattr(datasets, "_load_built_in", lambda *_: data)
    small = load("mnist", img_size=(8, 8))
    for part in (small.train, small.test):
        assert part is not None and part.images.shape[2:] == (8, 8)
        assert (part.images.float() - 255 / 4).abs().max() < 25
