"""Any image file -> its header or its pixels.

Pictures: PNG, JPEG, WebP, BMP, GIF, TIFF, AVIF and, with the extra `heif`, HEIC; of several frames or pages the first
is taken, EXIF orientation is applied, and transparent pixels are shown on white. Arrays: `.npy` and TIFF of any number
of channels, (H, W, C) or (C, H, W): the channels are on the shorter one of the first and the last axis. Numbers of more
than 8 bits, and floating-point ones, are stretched to 8 bits by the range that `Reading` gives.
"""

import contextlib
import functools
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, IMAGEDESCRIPTION, SAMPLESPERPIXEL, TiffImageFile

from maelab.config import AS_IT_IS, Reading, ValueRange
from maelab.data.layout import HEIF, File
from maelab.data.splits import content_key
from maelab.errors import UsageError
from maelab.progress import heartbeat

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", *("HEIF",) * HEIF)
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F")
FULL_16_BITS: ValueRange = ((0.0, 65535.0),)
_NPY, _TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_EIGHT_BITS = (np.dtype(np.uint8), np.dtype(np.bool_))
RANGE_IMAGES, RANGE_PIXELS, RANGE_PERCENTILES = 256, 4096, (0.1, 99.9)
_Result = TypeVar("_Result")

for _library in ("PIL", "tifffile"):  # what is wrong with an image is said once, by whoever asked for it
    logging.getLogger(_library).addHandler(logging.NullHandler())


class Header(NamedTuple):
    """What an image says of itself before its pixels."""

    height: int  # as shown, after EXIF orientation
    width: int
    mode: str  # Pillow's, or of an array its numbers
    animated: bool
    channels: int
    deep: bool  # whether its numbers need a range to become 8 bits


def each(
    work: Callable[[Path], _Result], files: list[File], root: Path, skipped: list[str], what: str
) -> Iterator[tuple[File, _Result]]:
    """(file, work(file.path)) in order, in threads; a file that fails goes into `skipped` with its reason instead.

    Where it takes long, stderr says `what` is being done and how far it is.
    """

    def attempt(file: File) -> tuple[_Result | None, str]:
        try:
            return work(file.path), ""
        except Exception as error:  # decoders raise anything on damaged bytes, and one file must not end the run
            return None, why_unreadable(error, file.path)

    beat, done = heartbeat(what, len(files)), 0
    with careful(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), 256):  # results wait in memory
            some = files[start : start + 256]
            for file, (result, reason) in zip(some, pool.map(attempt, some), strict=True):
                beat(done := done + 1)
                if result is None:
                    skipped.append(f"{file.path.relative_to(root)} ({reason})")
                else:
                    yield file, result


@contextlib.contextmanager
def careful() -> Iterator[None]:
    """Decoders say nothing of odd metadata, and Pillow's limit of pixels refuses, not only warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode_each(
    files: list[File], size: tuple[int, int], channels: int, reading: Reading, root: Path, skipped: list[str]
) -> Iterator[tuple[File, tuple[np.ndarray, bytes]]]:
    """(file, (pixels, key)) as `each`."""

    def work(path: Path) -> tuple[np.ndarray, bytes]:
        return decode(path, size, channels, reading), content_key(path)

    return each(work, files, root, skipped, "decoding images")


def find_value_range(files: list[File], channels: int, root: Path) -> ValueRange | None:
    """The range of values of some images: their percentiles RANGE_PERCENTILES, over at most RANGE_PIXELS of each.

    Args:
        files: the images to ask.
        channels: of the model: with neither 1 nor 3 each has its own range, for they measure different things.
        root: the folder that they lie in.

    Returns:
        The range; None if no image can be read.
    """

    def sample(path: Path) -> np.ndarray:
        with open(path, "rb") as file:
            numbers = np.asarray(read_numbers(file))
        numbers = numbers.reshape(numbers.shape[0] * numbers.shape[1], -1)  # (H * W, C)
        numbers = numbers[:: max(1, len(numbers) // RANGE_PIXELS)][:RANGE_PIXELS].astype(np.float64)
        return numbers if channels not in (1, 3) else numbers.reshape(-1, 1)

    apart = channels if channels not in (1, 3) else 1
    read = each(sample, files, root, [], "looking for the range of values")
    samples = [numbers for _, numbers in read if numbers.shape[1] == apart]
    if not samples:
        return None
    ranges = []
    for values in np.concatenate(samples).T:
        values = values[np.isfinite(values)]
        low, high = np.percentile(values, RANGE_PERCENTILES).tolist() if len(values) else (0.0, 1.0)
        # A constant: white, if it is above 0.
        ranges.append((low, high) if low < high else (min(low, 0.0), max(high, 0.0) or 1.0))
    return tuple(ranges)


def why_unreadable(error: Exception, path: Path) -> str:
    """Why an image could not be decoded."""
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more than {(Image.MAX_IMAGE_PIXELS or 0) // 1_000_000} megapixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "empty" if path.stat().st_size == 0 else f"not a {', '.join(FORMATS)} image"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def read_header(path: Path) -> Header:
    """Read no further than the header, if the format allows."""
    with open(path, "rb") as file:
        return header_of(file)


def header_of(file: BinaryIO) -> Header:
    """`read_header` of an open file."""
    with _opened(file) as image:
        if isinstance(image, _Array):
            (height, width, channels), numbers = image.shape, str(image.dtype)
            mode = numbers + (f" x {channels} channels" if channels > 1 else "")
            return Header(height, width, mode, image.pages > 1, channels, image.dtype not in _EIGHT_BITS)
        width, height = image.size
        if min(image.size) < 1:  # a TIFF may say so
            raise ValueError(f"it says that it has {height} x {width} pixels")
        # A PNG's EXIF data may follow the pixels: looking for it would decode them. A TIFF's size is that shown.
        if image.format not in ("PNG", "TIFF") and image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # on its side
            width, height = height, width
        grey, deep = image.mode in GREY_MODES, image.mode[0] in "IF"
        return Header(height, width, image.mode, getattr(image, "is_animated", False), 1 if grey else 3, deep)


def decode(path: Path, size: tuple[int, int], channels: int, reading: Reading = AS_IT_IS) -> np.ndarray:
    """The image as uint8 (channels, *size), upright.

    Args:
        path: the file.
        size: height and width.
        channels: of the result; grey becomes colour and colour grey, other numbers must be those of the image.
        reading: how it comes to that size, and the range of numbers that are stretched to 8 bits.

    Raises:
        ValueError: if the channels do not fit, or nothing says how its numbers become 8 bits; besides, whatever
            decoders raise on damaged bytes.
    """
    with open(path, "rb") as file:
        return decode_file(file, size, channels, reading)


def decode_file(file: BinaryIO, size: tuple[int, int], channels: int, reading: Reading = AS_IT_IS) -> np.ndarray:
    """`decode` of an open file."""
    bands = [np.asarray(to_size(band, size, reading.resize)) for band in read(file, channels, reading.value_range)]
    return bands[0].transpose(2, 0, 1) if bands[0].ndim == 3 else np.stack(bands)


def decode_upload(content: bytes, value_range: ValueRange | None) -> Image.Image:
    """The image that `content` holds, upright, as "RGB", within the limits of a folder's files.

    Raises:
        UsageError: if it has more than Pillow's limit of pixels, more than 3 channels, or cannot be decoded.
    """
    try:
        with careful():
            return read(io.BytesIO(content), 3, value_range)[0]
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        reason = f"it has more than {(Image.MAX_IMAGE_PIXELS or 0) // 1_000_000} megapixels"
    except Image.UnidentifiedImageError:
        reason = f"it is no {', '.join(FORMATS)} image" if content else "it is empty"
    except Exception as error:  # decoders raise anything on damaged bytes
        reason = str(error) or type(error).__name__
    raise UsageError(f"cannot read the image: {reason}")


def read(file: BinaryIO, channels: int, value_range: ValueRange | None) -> list[Image.Image]:
    """The image in a file, upright and in 8 bits: one "L" (1 channel) or "RGB" (3), or an "L" for each channel.

    Raises:
        ValueError: as `decode`.
    """
    pixels = read_numbers(file)
    if isinstance(pixels, np.ndarray):
        if pixels.dtype != np.uint8:
            if value_range is None:
                raise ValueError(
                    f"it holds numbers of type {pixels.dtype}, and the model knows images of 8 bits alone: save it so"
                )
            pixels = stretch(pixels, value_range)
        if pixels.shape[2] not in (1, 3):
            if pixels.shape[2] != channels:
                raise ValueError(f"it has {pixels.shape[2]} channels and not {channels}")
            return [Image.fromarray(np.ascontiguousarray(pixels[:, :, k])) for k in range(channels)]
        pixels = Image.fromarray(np.ascontiguousarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels))
    if channels not in (1, 3):
        raise ValueError(f"it is {'grey' if pixels.mode == 'L' else 'in colour'} and has not {channels} channels")
    return [pixels.convert("L" if channels == 1 else "RGB")]


def read_numbers(file: BinaryIO) -> np.ndarray | Image.Image:
    """The image in a file, upright: a picture of 8 bits, grey or coloured, transparency on white; or numbers (H, W, C)
    of any type."""
    with _opened(file) as opened:
        if isinstance(opened, _Array):
            return opened.read()
        image = ImageOps.exif_transpose(opened)
        if image.mode[0] in "IF":  # grey of 16 bits, 32 bits or floating-point numbers
            return np.asarray(image)[:, :, None]
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if opened.mode in GREY_MODES else "RGB")


def stretch(numbers: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Numbers (H, W, C) -> uint8: the range becomes 0 to 255, what lies outside is cut off, and NaN becomes 0.

    Args:
        numbers: of any type.
        value_range: one (low, high) for all channels, or one for each.

    Raises:
        ValueError: if there are as many ranges as no image of these channels has.
    """
    if len(value_range) not in (1, numbers.shape[2]):
        raise ValueError(f"it has {numbers.shape[2]} channels and not {len(value_range)}")
    low, high = np.array(value_range, np.float64).T  # (C,) or (1,)
    with np.errstate(invalid="ignore", over="ignore"):  # of infinite numbers
        scaled = (numbers.astype(np.float64) - low) * (255 / (high - low))
    return np.nan_to_num(scaled, nan=0.0, posinf=255, neginf=0).round().clip(0, 255).astype(np.uint8)


def to_size(image: Image.Image, size: tuple[int, int], resize: str = "crop") -> Image.Image:
    """The image at `size` (height, width), bicubic and antialiased.

    Args:
        image: of any size.
        size: height and width.
        resize: crop: scale until the image covers the size, and cut off what exceeds it around the centre; pad: scale
            until it fits, on black; squash: scale either side by itself.
    """
    box = (size[1], size[0])
    if image.size == box:
        return image
    if resize == "crop":
        return ImageOps.fit(image, box, Image.Resampling.BICUBIC)
    if resize == "pad":
        return ImageOps.pad(image, box, Image.Resampling.BICUBIC)
    return image.resize(box, Image.Resampling.BICUBIC)


# -------------------------------------------------------------------------------------------------------------- arrays


class _Array(NamedTuple):
    """An image that Pillow cannot give whole: of colours it has 8 bits alone, and at most four channels."""

    shape: tuple[int, int, int]  # H, W, C
    dtype: np.dtype[Any]
    pages: int
    read: Callable[[], np.ndarray]  # (H, W, C)


@contextlib.contextmanager
def _opened(file: BinaryIO) -> Iterator[Image.Image | _Array]:
    """What a file holds, its pixels unread."""
    if HEIF:
        _register_heif()
    magic = file.read(6)
    file.seek(0)
    if magic == _NPY:
        yield _npy(file)
        return
    try:
        opened = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        if magic[:4] not in _TIFF:
            raise
        file.seek(0)
        yield _tiff(file)
        return
    with opened as image:
        if isinstance(image, TiffImageFile) and _has_more(image):
            file.seek(0)
            yield _tiff(file)
        elif isinstance(image, PngImageFile) and image.mode[0] != "I" and ";16" in (raw := str(image.tile)):
            yield _deep_png(file, (image.height, image.width, 1 if "LA;16" in raw else 3))
        else:
            yield image


def _has_more(image: TiffImageFile) -> bool:
    """Whether a TIFF has more than Pillow gives: of colours of 16 bits it has the upper 8, of other channels the first,
    and ImageJ writes each channel as a page."""
    samples, bits = image.tag_v2.get(SAMPLESPERPIXEL, 1), image.tag_v2.get(BITSPERSAMPLE, (1,))
    stack = re.match(r"ImageJ=.*^channels=", str(image.tag_v2.get(IMAGEDESCRIPTION, "")), re.DOTALL | re.MULTILINE)
    return samples > 4 or (samples > 1 and max(bits) > 8) or bool(stack)


@functools.cache
def _register_heif() -> None:
    from pillow_heif import register_heif_opener

    register_heif_opener(thumbnails=False)


def _checked(shape: tuple[int, ...], dtype: np.dtype[Any], what: str) -> tuple[int, int, int]:
    """Height, width and channels of an array of this shape. Raises ValueError if it is no image, or too large."""
    if dtype.kind not in "uifb" or dtype.hasobject:
        raise ValueError(f"{what} holds no numbers ({str(dtype)[:30]})")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"{what} has the shape {shape}; an image has (H, W), (H, W, C) or (C, H, W)")
    height, width, channels = (*shape, 1) if len(shape) == 2 else shape if _last(shape) else (*shape[1:], shape[0])
    limit = Image.MAX_IMAGE_PIXELS or sys.maxsize
    if height * width > limit:
        raise Image.DecompressionBombError
    if height * width * channels * dtype.itemsize > 4 * limit:  # bytes of the largest picture
        raise ValueError(f"{what} has more than {4 * limit // 1_000_000} megabytes")
    return height, width, channels


def _last(shape: tuple[int, ...]) -> bool:
    """Whether the channels are on the last axis: on the shorter one of the first and the last."""
    return shape[2] <= shape[0]


def _as_image(array: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (H, W, C), of truth values uint8."""
    array = array[:, :, None] if array.ndim == 2 else array if _last(array.shape) else array.transpose(1, 2, 0)
    return array.astype(np.uint8) * 255 if array.dtype == bool else array


def _npy(file: BinaryIO) -> _Array:
    version = np.lib.format.read_magic(file)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in headers:
        raise ValueError("an .npy file of structured data")
    shape, fortran, dtype = headers[version](file)
    image = _checked(shape, dtype, "the array")
    start = file.tell()
    needed = int(np.prod(shape)) * dtype.itemsize
    if file.seek(0, io.SEEK_END) - start < needed:
        raise ValueError("the .npy file breaks off")

    def read() -> np.ndarray:
        file.seek(start)
        array = np.frombuffer(file.read(needed), dtype)
        return _as_image(array.reshape(shape[::-1]).T if fortran else array.reshape(shape))

    return _Array(image, dtype, 1, read)


def _tiff(file: BinaryIO) -> _Array:
    """The first page of a TIFF, or of one by ImageJ that holds one image channel by channel, all of them."""
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        page = cast(tifffile.TiffPage, tiff.pages.first)
        compression = tifffile.COMPRESSION(page.compression).name
        alpha = page.photometric == tifffile.PHOTOMETRIC.RGB and page.samplesperpixel == 4
        pages = 2 if len(tiff.pages) > 1 else 1
        shape, dtype = page.shape, page.dtype
        if stack := bool(tiff.is_imagej and tiff.series[0].axes == "CYX"):
            pages, shape = 1, tiff.series[0].shape
    if dtype is None:
        raise ValueError("a TIFF whose numbers have an unknown type")
    image = _checked(shape, dtype, "the TIFF")
    image = (*image[:2], 3) if alpha else image

    def read() -> np.ndarray:
        file.seek(0)
        with tifffile.TiffFile(file) as tiff:
            source = tiff.series[0] if stack else cast(tifffile.TiffPage, tiff.pages.first)
            try:
                array = _as_image(source.asarray(maxworkers=1))
            except ValueError as error:
                raise ValueError(_without_codecs(error, compression)) from error
        return _on_white(array) if alpha else array

    return _Array(image, dtype, pages, read)


def _without_codecs(error: Exception, what: str) -> str:
    return f"{what} compression needs pip install 'maelab[codecs]'" if "imagecodecs" in str(error) else str(error)


def _deep_png(file: BinaryIO, shape: tuple[int, int, int]) -> _Array:
    """A PNG with colours or opacity of 16 bits."""

    def read() -> np.ndarray:
        try:
            from imagecodecs import png_decode
        except ImportError:
            raise ValueError("colours of 16 bits need pip install 'maelab[codecs]'") from None
        file.seek(0)
        array = _as_image(np.asarray(png_decode(file.read())))
        return _on_white(array) if array.shape[2] in (2, 4) else array

    return _Array(_checked(shape, np.dtype(np.uint16), "the PNG"), np.dtype(np.uint16), 1, read)


def _on_white(array: np.ndarray) -> np.ndarray:
    """(H, W, C + 1) whose last channel is opacity -> (H, W, C), of the same integers."""
    white = np.iinfo(array.dtype).max if array.dtype.kind in "ui" else 1
    share = array[:, :, -1:] / white
    return (array[:, :, :-1] * share + white * (1 - share)).round().astype(array.dtype)
