"""Choices that must stay what they are: a change moves images between training, validation and test, or alters what a
seed means, in runs that people have already. Known values, from which nobody can tell how they came about."""

import struct
from pathlib import Path

import pytest
import torch

from maelab.config import DataConfig
from maelab.data import ImageSet, label_fraction, limit, load, split, training_sets
from maelab.data.batches import epoch_order, part_seed, step_generator
from maelab.data.splits import content_key, hold_out


def pixels(data: ImageSet | None) -> list[int]:
    """The red of each image: which one it is."""
    assert data is not None
    return data.images[:, 0].flatten().tolist()


def numbered(labels: torch.Tensor | None) -> ImageSet:
    return ImageSet(torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1), labels)


@pytest.mark.parametrize(
    ("stream", "held"),
    [
        ("test", [19, 114, 226, 230, 410, 520, 555, 559, 618, 718, 777, 793, 800, 802, 838, 922, 960]),
        ("validation 0", [7, 261, 298, 546, 550, 721, 728, 749, 793, 829, 892, 908, 996]),
        ("validation 7", [26, 113, 130, 247, 289, 326, 470, 560, 641, 693, 857, 870, 885]),
    ],
)
def test_which_keys_are_held_out(stream, held):
    assert hold_out(torch.arange(1000), None, 0.02, stream).nonzero()[:, 0].tolist() == held


def test_the_key_of_a_file(tmp_path):
    (tmp_path / "x").write_bytes(b"maelab")
    assert content_key(tmp_path / "x").hex() == "f5ff5f41f8a1a20a"


def one_pixel(path: Path, number: int) -> None:
    """A BMP of one pixel, byte by byte, whose red is the number."""
    header = struct.pack("<2sIHHI", b"BM", 58, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, 1, 1, 1, 24, 0, 4, 0, 0, 0, 0
    )
    path.write_bytes(header + bytes([9, 5, number, 0]))


TEST = [5, 9, 10, 26, 27, 28, 46, 59, 60, 68, 73, 87, 100]
VALIDATION = {0: [37, 42, 49, 50, 54, 65, 74, 78, 95, 101], 3: [6, 50, 56, 64, 66, 67, 72, 76, 82, 85, 95, 117]}


def test_which_images_of_a_folder_are_for_testing_and_for_validation(tmp_path):
    """The streams have their names in the folder's loader and in the split; the keys come from the files' bytes."""
    for number in range(120):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        one_pixel(tmp_path / "ab"[number % 2] / f"{number:03d}.bmp", number)
    data = load(f"folder:{tmp_path}", img_size=(1, 1))
    assert sorted(pixels(data.test)) == TEST
    for seed, expected in VALIDATION.items():
        config = DataConfig(data="", val_fraction=0.1, split_seed=seed)
        assert sorted(pixels(training_sets(data, config)[1])) == expected


def test_which_images_of_a_built_in_set_are_for_validation():
    classes = torch.arange(200) % 4
    assert pixels(split(numbered(classes), 0.05, 0)[1]) == [10, 19, 44, 57, 64, 65, 74, 118, 157, 163]
    assert pixels(split(numbered(classes), 0.05, 3)[1]) == [30, 35, 53, 60, 69, 75, 80, 86, 136, 186]
    assert pixels(split(numbered(None), 0.05, 0)[1]) == [10, 19, 44, 57, 64, 65, 74, 81, 118, 157]


def test_which_images_a_limit_and_a_share_of_the_labels_leave():
    classes = torch.arange(200) % 4
    assert pixels(limit(numbered(None), 6, 0)) == [44, 57, 157, 64, 19, 74]
    assert pixels(limit(numbered(None), 6, 3)) == [186, 86, 75, 35, 60, 80]
    assert pixels(label_fraction(numbered(classes), 0.04, 0)) == [10, 19, 44, 57, 64, 74, 157, 163]
    assert pixels(label_fraction(numbered(classes), 0.04, 3)) == [35, 53, 60, 69, 75, 80, 86, 186]


def test_what_the_seed_of_a_run_means():
    assert epoch_order(10, 0, 0).tolist() == [2, 0, 4, 1, 5, 3, 9, 6, 8, 7]
    assert epoch_order(10, 0, 1).tolist() == [3, 7, 6, 1, 8, 5, 2, 9, 0, 4]
    assert epoch_order(10, 5, 0).tolist() == [3, 2, 8, 1, 0, 4, 5, 6, 9, 7]
    assert torch.randint(1000, (4,), generator=step_generator(0, 0)).tolist() == [687, 258, 577, 665]
    assert torch.randint(1000, (4,), generator=step_generator(5, 7)).tolist() == [903, 211, 965, 649]
    assert (part_seed(0, 0, 0), part_seed(5, 7, 1), part_seed(5, 7, 0)) == (3241444873, 2419657339, 1543621648)
