"""Large folders, decoded once into a file of the cache."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from maelab.config import PretrainConfig
from maelab.data import cache as module
from maelab.data import folder, load, training_sets
from maelab.data.augment import augment
from maelab.data.batches import in_batches, step_generator
from maelab.data.sets import UnreadImages
from maelab.errors import RunError
from maelab.files import make_folder


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
    assert isinstance(on_disk.train.images, UnreadImages) and isinstance(memory.train.images, torch.Tensor)
    assert on_disk.checksums == again.checksums == memory.checksums and again.skipped == memory.skipped
    assert len(memory.skipped) == 1 and capsys.readouterr().err.count("decoding") == 1, "decoded once"
    config = PretrainConfig(data="folder", val_fraction=0.25, limit=40, crop_padding=4, flip=True, color_jitter=0.3)
    for one, other in zip(
        training_sets(on_disk, config, unlabelled=True), training_sets(memory, config, unlabelled=True), strict=True
    ):
        assert isinstance(one.images, UnreadImages), "unread"
        assert one.images.shape == other.images.shape and one.labels.equal(other.labels)  # type: ignore[union-attr]
        index = torch.tensor([3, 0, 7, 7])
        batches = [augment(part.images, index, config, step_generator(1, 2)) for part in (one, other)]
        assert batches[0].equal(batches[1])
        for x, y in zip(*(in_batches(lambda x: x, part, 16) for part in (one, other)), strict=True):
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
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match=r"200 decoded images need .* set MAELAB_DATA"):
        load(f"folder:{cifar_folder}")
    assert not list(mapped.glob("*.part")) and not list(mapped.glob("*.uint8"))


def test_the_cache_is_nobody_elses_to_write_to(tmp_path):
    """Where the umask lets a group write, the kernels that lie beside the data would not be loaded."""
    before = os.umask(0o002)
    try:
        make_folder(tmp_path / "a" / "b")
        make_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    for made in (tmp_path / "a", tmp_path / "a" / "b"):
        assert made.stat().st_mode & 0o777 == 0o755
