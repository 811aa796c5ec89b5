"""Any image file -> its header or its pixels.

PNG, JPEG, WebP, BMP, GIF, TIFF and AVIF, of several frames or pages the first; EXIF orientation is applied; transparent
pixels are shown on white; 16-bit grey is scaled to 8 bits. Pixels of 32 bits or floating-point ones are refused.
"""

import io
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

from maelab.data.layout import File
from maelab.data.splits import content_key
from maelab.errors import UsageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")
_Result = TypeVar("_Result")


class Header(NamedTuple):
    """What an image says of itself before its pixels."""

    height: int  # as shown, after EXIF orientation
    width: int
    mode: str
    animated: bool


def each(
    work: Callable[[Path], _Result], files: list[File], root: Path, skipped: list[str]
) -> Iterator[tuple[File, _Result]]:
    """(file, work(file.path)) in order, in threads; a file that fails goes into `skipped` with its reason instead."""

    def attempt(file: File) -> tuple[_Result | None, str]:
        try:
            return work(file.path), ""
        except Exception as error:  # decoders raise anything on damaged bytes, and one file must not end the run
            return None, why_unreadable(error, file.path)

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # of decoders, about odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow's limit refuses, not only warns
        for start in range(0, len(files), 256):  # results wait in memory
            some = files[start : start + 256]
            for file, (result, reason) in zip(some, pool.map(attempt, some), strict=True):
                if result is None:
                    skipped.append(f"{file.path.relative_to(root)} ({reason})")
                else:
                    yield file, result


def decode_each(
    files: list[File], size: tuple[int, int], channels: int, root: Path, skipped: list[str]
) -> Iterator[tuple[File, tuple[np.ndarray, bytes]]]:
    """(file, (pixels, key)) as `each`."""
    return each(lambda path: (decode(path, size, channels), content_key(path)), files, root, skipped)


def why_unreadable(error: Exception, path: Path) -> str:
    """Why an image could not be decoded."""
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more than {(Image.MAX_IMAGE_PIXELS or 0) // 1_000_000} megapixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "empty" if path.stat().st_size == 0 else f"not a {', '.join(FORMATS)} image"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def read_header(path: Path) -> Header:
    """Read no further than the header, if the format allows."""
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        # A PNG's EXIF data may follow the pixels: looking for it would decode them. A TIFF's size is that shown.
        if image.format not in ("PNG", "TIFF") and image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # on its side
            width, height = height, width
        return Header(height, width, image.mode, getattr(image, "is_animated", False))


def decode(path: Path, size: tuple[int, int], channels: int) -> np.ndarray:
    """The image as uint8 (channels, *size), upright, covering `size` and cropped around its centre."""
    with Image.open(path, formats=FORMATS) as opened:
        image = to_eight_bits(ImageOps.exif_transpose(opened), channels)
    if image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)  # (H, W) or (H, W, C)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def decode_image(content: bytes, channels: int) -> Image.Image:
    """The image that `content` holds, upright, as "L" (1 channel) or "RGB" (3), within the limits of a folder's files.

    Raises:
        UsageError: if it has more than Pillow's limit of pixels, or cannot be decoded.
    """
    limit = Image.MAX_IMAGE_PIXELS or 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which opening reads
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                if opened.width * opened.height > limit:
                    raise Image.DecompressionBombError
                return to_eight_bits(ImageOps.exif_transpose(opened), channels)
    except Image.DecompressionBombError:
        reason = f"it has more than {limit // 1_000_000} megapixels"
    except Image.UnidentifiedImageError:
        reason = f"it is no {', '.join(FORMATS)} image" if content else "it is empty"
    except Exception as error:  # decoders raise anything on damaged bytes
        reason = str(error) or type(error).__name__
    raise UsageError(f"cannot read the image: {reason}")


def to_eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """`image` as "L" (1 channel) or "RGB" (3): 16-bit grey scaled to 8 bits, transparency put on white.

    Raises:
        ValueError: if its pixels have more than 16 bits or are floating-point numbers, whose range nothing here knows.
    """
    if image.mode.startswith("I"):  # 16-bit grey: 65535 / 257 = 255
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("its pixels have more than 16 bits")
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")
