"""The published file formats as arrays."""

import gzip
import io
import pickle

import numpy as np
import pytest
from PIL import Image
from small_sets import CIFAR, python_batch, python_batches

from maelab.data import formats
from maelab.errors import MaelabError, RunError


def test_read_idx() -> None:
    data = b"\0\0\x08\x03" + np.array([2, 1, 3], ">u4").tobytes() + bytes(range(6))
    assert formats.read_idx(data).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    assert formats.read_idx(gzip.compress(data)).shape == (2, 1, 3)
    for bad in (b"", b"\0\0", data[:-1], data + b"x", b"\0\0\x0d" + data[3:], data[:6], b"\0\0\x08\xff" + data[4:]):
        with pytest.raises(RunError):
            formats.read_idx(bad)
    for bad in (b"\x1f\x8bdamaged", gzip.compress(data)[:-4], gzip.compress(data)[:-8] + bytes(8)):
        with pytest.raises(RunError, match="gzip file"):
            formats.read_idx(bad)


def test_gzip_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_FILE", 1000)
    assert formats.gunzip(gzip.compress(bytes(1000))) == bytes(1000)
    with pytest.raises(RunError, match="unpacks to more than"):
        formats.gunzip(gzip.compress(bytes(1001)))


def test_read_cifar_binary_and_back() -> None:
    images, labels = formats.read_cifar_binary(CIFAR["test_batch.bin"])
    assert images.shape == (100, 3, 32, 32) and sorted(labels.tolist()) == [i // 10 for i in range(100)]
    assert formats.cifar_binary(images.reshape(-1, 3072), labels) == CIFAR["test_batch.bin"]
    with pytest.raises(MaelabError):
        formats.read_cifar_binary(CIFAR["test_batch.bin"][:-1])


def test_python_batch_of_full_size() -> None:
    """10,000 images: lists are appended a thousand at a time, and a pickle machine sees the same in it."""
    rng = np.random.default_rng(0)
    binary = rng.integers(0, 256, (10_000, 3073), np.uint8)
    binary[:, 0] %= 10
    data = python_batch(b"training batch 1 of 5", binary.tobytes())
    images, labels = formats.read_cifar_pickle(data)
    assert formats.cifar_binary(images, labels) == binary.tobytes()
    unpickled = pickle.loads(data, encoding="bytes")
    assert unpickled[b"labels"] == labels.tolist() and (unpickled[b"data"] == images).all()
    assert len(unpickled[b"filenames"]) == 10_000


def test_python_batch_that_is_written_otherwise_is_refused() -> None:
    data = python_batches()["test_batch"]
    images, labels = formats.read_cifar_pickle(data)
    again = pickle.dumps({b"labels": labels.tolist(), b"data": images}, protocol=2)
    for bad in (b"", b"\x80\x02}.", again, data[: len(data) // 2], data.replace(b"q\5(K", b"q\5(K\0K"), data[:100]):
        with pytest.raises(RunError, match="CIFAR-10 python batch"):
            formats.read_cifar_pickle(bad)


def test_sheet_of_another_size_is_refused_before_it_is_decoded() -> None:
    small = io.BytesIO()
    Image.new("RGB", (1024, 9_999)).save(small, "PNG")
    with pytest.raises(ValueError, match="instead of 1024 x 10000"):
        formats.read_png_sheet(small.getvalue())
