"""Image files and masks that a command is given one by one."""

import glob
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from maelab.config import Reading
from maelab.data.decode import FULL_16_BITS, careful, decode, read, why_unreadable
from maelab.data.layout import SUFFIXES, list_images
from maelab.errors import UsageError


def find_images(inputs: Iterable[str | Path]) -> Iterator[tuple[str, str]]:
    """The image files that `inputs` name, one after the other, each input looked up only when its turn comes.

    Args:
        inputs: a file is itself; a folder is the images in it and below, sorted; a glob is what it matches, sorted.

    Yields:
        (path as it was given, ""), or (the input, why it names none).
    """
    for path in map(os.path.expanduser, map(str, inputs)):  # os.path's tests raise no error, whatever a path holds
        literal = os.path.exists(path) or not glob.has_magic(path)
        matches = [path] if literal else sorted(glob.glob(path, recursive=True))
        if not matches:
            yield path, "matches no file"
        for match in matches:
            try:
                images = list(map(str, list_images(Path(match)))) if os.path.isdir(match) else [match]
            except OSError as error:
                yield match, error.strerror or str(error)
                continue
            if not images:
                yield match, f"a folder without images ({', '.join(SUFFIXES)})"
            yield from ((image, "") for image in images)


def read_batches(
    inputs: Iterable[str | Path], size: tuple[int, int], channels: int, reading: Reading, batch_size: int
) -> Iterator[list[tuple[str, torch.Tensor | str]]]:
    """The image files that `inputs` name (see `find_images`), prepared as those of a folder are and decoded in threads,
    so many at a time.

    Yields:
        (path, uint8 (channels, *size)), or (path, why it cannot be read) for each file of a batch, in order.
    """

    def attempt(path: str, reason: str) -> torch.Tensor | str:
        if reason or (os.path.exists(path) and not os.path.isfile(path)):  # reading a pipe might wait for ever
            return reason or "not a file"
        try:
            return torch.from_numpy(decode(Path(path), size, channels, reading).copy())
        except Exception as error:  # decoders raise anything on damaged bytes
            return why_unreadable(error, Path(path))

    found = find_images(inputs)
    while batch := list(islice(found, batch_size)):
        with careful(), ThreadPoolExecutor(os.cpu_count()) as pool:
            images = list(pool.map(attempt, *zip(*batch, strict=True)))
        yield [(path, image) for (path, _), image in zip(batch, images, strict=True)]


def read_all(inputs: Iterable[str | Path], size: tuple[int, int], channels: int, reading: Reading) -> torch.Tensor:
    """All image files that `inputs` name (see `find_images`): uint8 (N, channels, *size).

    Raises:
        UsageError: if one cannot be decoded, or there is none.
    """
    images = []
    for path, image in (pair for batch in read_batches(inputs, size, channels, reading, 64) for pair in batch):
        if isinstance(image, str):
            raise UsageError(f"cannot read the image {path}: {image}")
        images.append(image)
    return torch.stack(images)


def read_mask(path: Path, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """A mask that someone drew: an image whose dark parts, or a text of 0 and 1 whose 1s, are to be hidden.

    Args:
        path: the file, with a cell for each patch or for each pixel; of a patch the larger part decides.
        grid: rows and columns of patches.
        size: height and width in pixels.

    Returns:
        float32 (L,), 1 = hidden.

    Raises:
        UsageError: if it is neither, has another size, or hides nothing or everything.
    """
    try:
        content = path.read_bytes() if path.stat().st_size < 2**20 else b""  # a text of cells is small
        if content and not content.strip(b"01 ,;\t\r\n"):
            lines = [[int(cell) for cell in line if cell in "01"] for line in content.decode().splitlines()]
            lines = [line for line in lines if line]
            if len({len(line) for line in lines}) != 1:
                raise ValueError("its lines have no cells or different numbers of them")
            dark = np.array(lines, np.float32)
        else:
            with careful(), open(path, "rb") as file:
                dark = 1 - np.asarray(read(file, 1, FULL_16_BITS)[0], np.float32) / 255
    except Exception as error:
        raise UsageError(f"cannot read the mask {path}: {why_unreadable(error, path)}") from error
    if dark.shape not in (grid, size):
        raise UsageError(
            f"the mask {path} has {dark.shape[0]} x {dark.shape[1]} cells; it needs {grid[0]} x {grid[1]}, one for each"
            f" patch, or {size[0]} x {size[1]}, one for each pixel"
        )
    cells = dark.reshape(grid[0], dark.shape[0] // grid[0], grid[1], dark.shape[1] // grid[1]).mean(axis=(1, 3))
    mask = torch.from_numpy((cells > 0.5).astype(np.float32)).flatten()
    if not 0 < int(mask.sum()) < len(mask):
        raise UsageError(f"the mask {path} hides {'every patch' if mask.any() else 'no patch'}")
    return mask
