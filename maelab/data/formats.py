"""The file formats in which the built-in sets are published, as arrays: nothing here runs what a file says."""

from __future__ import annotations

import io
import re
import zlib

import numpy as np

from maelab.errors import RunError

MAX_FILE = 1 << 26  # bytes of one file in memory; the largest has 47 MB


def gunzip(data: bytes) -> bytes:
    """The content of a gzip file's first part. Raises: RunError if it is none, breaks off, or holds too much."""
    codec = zlib.decompressobj(wbits=31)  # gzip.GzipFile would go through millions of empty parts one by one
    try:
        plain = codec.decompress(data, MAX_FILE + 1)
    except zlib.error as error:
        raise RunError(f"not a gzip file: {error}") from error
    if len(plain) > MAX_FILE:
        raise RunError(f"unpacks to more than {MAX_FILE >> 20} MiB")
    if not codec.eof:
        raise RunError("a gzip file that breaks off")
    return plain


def read_idx(data: bytes) -> np.ndarray:
    """The array of an IDX file of unsigned bytes (LeCun's format), gzipped or not.

    Returns: uint8, (N, 28, 28) for MNIST images and (N,) for labels. Raises: RunError if `data` is anything else.
    """
    if data[:2] == b"\x1f\x8b":
        data = gunzip(data)
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise RunError("not an IDX file of unsigned bytes")
    ndim = data[3]
    header = 4 + 4 * ndim
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4))
    array = np.frombuffer(data, np.uint8)[header:]
    if len(data) < header or int(np.prod(shape, dtype=object)) != array.size:
        raise RunError(f"IDX file says shape {shape} but holds {array.size} values")
    return array.reshape(shape)


def read_cifar_binary(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 3, 32, 32) and labels uint8 (N,) of a CIFAR-10 binary batch: rows of 1 + 3072 bytes.

    Raises: RunError if the length does not fit.
    """
    if len(data) % 3073:
        raise RunError("not a CIFAR-10 binary batch: its length is no multiple of 3073 bytes")
    rows = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def cifar_binary(images: np.ndarray, labels: np.ndarray) -> bytes:
    """The binary batch of images uint8 (N, 3072), plane-ordered, and labels uint8 (N,)."""
    if images.dtype != np.uint8 or images.shape != (len(labels), 3072):
        raise ValueError("not a batch of CIFAR-10 images")
    return np.concatenate([labels[:, None], images], axis=1).tobytes()


# How Python 2 wrote the published batches: a list of numbers, appended a thousand at a time, then an array as a string.
_PICKLED = re.compile(
    rb"U\x06labelsq\x04\]q\x05((?:\((?:K[\0-\t])+e)+)U\x04dataq\x06cnumpy\.core\.multiarray\n.{50,150}?\x89T(.{4})",
    re.DOTALL,
)


def read_cifar_pickle(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 3072) and labels uint8 (N,) of a published CIFAR-10 python batch, found without unpickling it.

    Raises: RunError if `data` is written in any other way.
    """
    head = _PICKLED.search(data)
    if head is None:
        raise RunError("not a CIFAR-10 python batch as it was published")
    labels = np.frombuffer(re.sub(rb"[(Ke]", b"", head[1]), np.uint8)
    size = int.from_bytes(head[2], "little")
    pixels = np.frombuffer(data, np.uint8)[head.end() : head.end() + size]
    if pixels.size != 3072 * labels.size:
        raise RunError(f"CIFAR-10 python batch of {labels.size} labels but {pixels.size} values")
    return pixels.reshape(-1, 3072), labels


def read_png_sheet(data: bytes) -> np.ndarray:
    """Plane-ordered images uint8 (10000, 3072) of a sheet with one image per row, 1024 RGB pixels each."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("PNG",)) as sheet:
        # The size is known, so it is asserted before decoding; at 10 megapixels it stays under Pillow's bomb limit.
        if sheet.size != (1024, 10_000) or sheet.mode not in ("RGB", "RGBA"):
            raise ValueError(f"a {sheet.mode} sheet of {sheet.size} instead of 1024 x 10000 RGB pixels")
        pixels = np.asarray(sheet.convert("RGB"))  # (10000, 1024, 3)
    return pixels.transpose(0, 2, 1).reshape(-1, 3072)
