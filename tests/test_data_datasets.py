"""Loading the full sets, and the seeded cuts."""

import hashlib
import time
from pathlib import Path

import pytest
import torch
from conftest import DATA

from maelab.data import Dataset, ImageSet, label_fraction, limit, load, sources, split
from maelab.data.datasets import FASHION_CLASSES, idx_set
from maelab.errors import UsageError


def unbalanced(sizes: tuple[int, ...] = (50, 30, 7, 1)) -> ImageSet:
    """An image set in which every image is told by its single pixel."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    return ImageSet(torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1), labels)


def pixels(data: ImageSet) -> list[int]:
    return data.images.flatten().tolist()


def counts(data: ImageSet) -> list[int]:
    assert data.labels is not None
    return data.labels.bincount(minlength=4).tolist()


def cached(name: str) -> bool:
    return all((sources.cache_dir() / name / file).exists() for file in sources.FILES[name])


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "shape", "mean", "first_labels"),
    [
        ("mnist", (1, 28, 28), [0.1307], [5, 0, 4, 1, 9]),
        ("fashion-mnist", (1, 28, 28), [0.2860], [9, 0, 0, 3, 0]),
        ("cifar10", (3, 32, 32), [0.4914, 0.4822, 0.4465], [6, 9, 9, 4, 1]),
    ],
)
def test_full_sets(name: str, shape: tuple[int, ...], mean: list[float], first_labels: list[int]) -> None:
    if not cached(name):
        pytest.skip(f"{name} is not in the cache; `maelab data {name}` gets it")
    start = time.monotonic()
    data = load(name)
    assert time.monotonic() - start < 5
    assert data.name == name and len(data.class_names) == 10 and data.test is not None
    assert data.train.images.shape == ((50_000 if name == "cifar10" else 60_000), *shape)
    assert data.test.images.shape == (10_000, *shape)
    for part in (data.train, data.test):
        assert part.images.dtype == torch.uint8 and part.images.is_contiguous()
        assert (
            part.labels is not None and part.labels.dtype == torch.int64 and set(part.labels.tolist()) == set(range(10))
        )
    means = [(channel.double().mean() / 255).item() for channel in data.train.images.unbind(1)]
    assert means == pytest.approx(mean, abs=1e-4)
    assert data.train.labels is not None and data.train.labels[:5].tolist() == first_labels
    assert data.checksums == sources.FILES[name]


def test_fashion_mnist_has_its_classes_in_order() -> None:
    parts = ("images-idx3", "labels-idx1")
    data = idx_set(*((DATA / f"fashion-mnist-{part}-ubyte.gz").read_bytes() for part in parts))
    assert data.images.shape == (200, 1, 28, 28) and data.labels is not None
    shape = {name: data.images[data.labels == i].float().mean(dim=(0, 1)) for i, name in enumerate(FASHION_CLASSES)}
    ink = {name: image.sum() for name, image in shape.items()}
    middle = {name: image[:, 9:19].sum() / ink[name] for name, image in shape.items()}
    lower = {name: image[14:].sum() / ink[name] for name, image in shape.items()}
    assert sorted(middle, key=lambda name: middle[name])[-2:] == ["Dress", "Trouser"]  # narrow
    assert min(ink, key=lambda name: ink[name]) == "Sandal"
    assert sorted(lower, key=lambda name: lower[name])[-3:] == ["Ankle boot", "Sneaker", "Sandal"]  # on the ground


def test_small_sets_are_real_and_balanced(mnist_small: Dataset, cifar_small: Dataset) -> None:
    for data, shape, n in ((mnist_small, (1, 28, 28), (60, 20)), (cifar_small, (3, 32, 32), (30, 10))):
        assert data.test is not None
        for part, each in zip((data.train, data.test), n, strict=True):
            assert part.images.shape == (10 * each, *shape) and part.images.is_contiguous()
            assert part.labels is not None and part.labels.bincount().tolist() == [each] * 10
            assert len({hashlib.md5(image.numpy().tobytes()).digest() for image in part.images}) == len(part)


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("cifar", "'cifar10'"),
        ("CIFAR-10", "'cifar10'"),
        ("fashion_mnist", "'fashion-mnist'"),
        ("minst", "'mnist'"),
        ("folder", "folder:PATH"),
        ("folder/photos", "folder:PATH"),
        ("zzz", "there are mnist, fashion-mnist, cifar10 and folder:PATH"),
        ("", "there are mnist"),
    ],
)
def test_unknown_spec(spec: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=hint) as caught:
        load(spec)
    assert "\n" not in str(caught.value)


def test_a_path_without_folder_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"write 'folder:{tmp_path}'"):
        load(str(tmp_path))


def test_image_set_subset_and_device() -> None:
    data = unbalanced()
    part = data[torch.tensor([5, 2])]
    assert data.labels is not None and part.labels is not None
    assert len(part) == 2 and pixels(part) == [5, 2] and part.labels.tolist() == data.labels[[5, 2]].tolist()
    assert part.to("meta").images.device.type == "meta"
    assert len(ImageSet(data.images, None)[torch.tensor([1])]) == 1


def test_split_is_disjoint_seeded_and_balanced() -> None:
    data = unbalanced()
    train, val = split(data, 0.2, seed=3)
    assert sorted(pixels(train) + pixels(val)) == list(range(88))
    assert len(val) == round(0.2 * 88)
    assert counts(val) in ([10, 6, 1, 0], [10, 6, 2, 0], [11, 6, 1, 0])
    assert pixels(split(data, 0.2, seed=3)[1]) == pixels(val)
    assert pixels(split(data, 0.2, seed=4)[1]) != pixels(val)
    assert pixels(train) == sorted(pixels(train)), "original order"


def test_the_splits_of_sets_that_never_change_stay() -> None:
    """Results of years hang on them."""
    data = unbalanced()
    held = [1, 4, 7, 13, 22, 27, 28, 32, 39, 42, 45, 55, 65, 69, 75, 78, 80, 87]
    assert data.keys is None and pixels(split(data, 0.2, seed=3)[1]) == held
    assert pixels(split(ImageSet(data.images, None), 0.1, seed=0)[1]) == [13, 33, 45, 47, 53, 55, 65, 71, 76]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.73])
def test_split_of_a_balanced_set(fraction: float, mnist_small: Dataset) -> None:
    _, val = split(mnist_small.train, fraction, seed=0)
    per_class = counts(val)
    assert max(per_class) - min(per_class) <= 1 and len(val) == round(600 * fraction)


def test_split_edges() -> None:
    data = unbalanced()
    train, val = split(data, 0, seed=0)
    assert pixels(train) == pixels(data) and len(val) == 0 and val.images.shape == (0, 1, 1, 1)
    assert len(split(data, 0.001, seed=0)[1]) == 1, "a fraction above 0 holds out something"
    train, val = split(ImageSet(data.images, None), 0.25, seed=0)
    assert len(val) == 22 and val.labels is None and not set(pixels(train)) & set(pixels(val))
    for fraction in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(UsageError, match="validation fraction"):
            split(data, fraction, seed=0)


def test_limit() -> None:
    data = unbalanced()
    few, more = limit(data, 5, seed=0), limit(data, 9, seed=0)
    assert pixels(more)[:5] == pixels(few), "the first of one shuffle"
    assert pixels(few) != pixels(limit(data, 5, seed=1)) and pixels(few) != [0, 1, 2, 3, 4]
    assert sorted(pixels(limit(data, 88, seed=0))) == list(range(88))
    for n in (0, -1, 89):
        with pytest.raises(UsageError, match=f"--limit {n} is not between 1 and 88"):
            limit(data, n, seed=0)


def test_label_fraction() -> None:
    data = unbalanced()
    tenth, half = label_fraction(data, 0.1, seed=0), label_fraction(data, 0.5, seed=0)
    assert counts(tenth) == [5, 3, 1, 1] and counts(half) == [25, 15, 4, 1]
    assert set(pixels(tenth)) < set(pixels(half)), "a smaller share lies within a larger one"
    assert pixels(label_fraction(data, 0.1, seed=0)) == pixels(tenth) != pixels(label_fraction(data, 0.1, seed=1))
    assert counts(label_fraction(data, 1e-9, seed=0)) == [1, 1, 1, 1]
    assert pixels(label_fraction(data, 1, seed=0)) == pixels(data)
    for fraction in (0, -1, 1.01, float("nan")):
        with pytest.raises(UsageError, match="label fraction"):
            label_fraction(data, fraction, seed=0)
    with pytest.raises(UsageError, match="needs labels"):
        label_fraction(ImageSet(data.images, None), 0.5, seed=0)
