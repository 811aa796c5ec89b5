"""Images, masks and published data sets, as inputs to mutate."""

import contextlib
import functools
import gzip
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
import torch
from conftest import DATA
from engine import JSON_TOKENS, Target
from imagecodecs import png_encode
from PIL import Image
from small_sets import CIFAR, MNIST, MNIST_GZ, md5s, python_batch, python_batches, sha256s, tar_gz

from maelab.config import Reading
from maelab.data import decode, formats, images, load, sharding, shards, sources, unpack
from maelab.data.folder import scan
from maelab.data.layout import File, list_files
from maelab.errors import RunError, UsageError

Feed = Callable[[bytes, Path], object]
Seeds = Callable[[Path], list[bytes]]


# ------------------------------------------------------------------------------------------------------------- images


def pictures(form: str) -> Seeds:
    def seeds(place: Path) -> list[bytes]:
        noise = np.random.default_rng(0).integers(0, 255, (12, 10, 4), np.uint8)
        found = []
        for mode in ("L", "RGB", "RGBA", "P", "1", "I;16", "LA", "CMYK"):
            try:
                image = Image.fromarray(noise).convert("L" if mode == "I;16" else mode)
                image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image
                exif = Image.Exif()
                exif[0x0112] = 6
                for more in ({}, {"exif": exif}, {"save_all": True, "append_images": [image]}):
                    file = io.BytesIO()
                    image.save(file, form, **({} if form == "BMP" else more))
                    found.append(file.getvalue())
            except (OSError, ValueError, KeyError):
                continue
        assert len(found) > 2, form
        return found

    return seeds


def arrays(place: Path) -> list[bytes]:
    """Numbers of more than 8 bits and images of many channels: .npy, TIFF and PNG."""
    noise = np.random.default_rng(0).integers(0, 4095, (12, 10, 5), np.uint16)
    found = []
    for array in (noise, noise[:, :, 0], noise.astype(np.float32), noise[:, :, :2].astype(np.uint8)):
        file = io.BytesIO()
        np.save(file, array)
        found.append(file.getvalue())
        for compression in (None, "lzw", "zlib"):
            file = io.BytesIO()
            tifffile.imwrite(file, array, photometric="minisblack", compression=compression)
            found.append(file.getvalue())
    stack = io.BytesIO()
    tifffile.imwrite(stack, noise.transpose(2, 0, 1), imagej=True, metadata={"axes": "CYX"})
    return [*found, stack.getvalue(), *(bytes(png_encode(noise[:, :, :k].copy())) for k in (3, 4))]


IMAGE_TOKENS = {
    "array": (b"\x93NUMPY", b"\x01\0", b"'<u2'", b"'|O'", b"(12, 10, 5)", b"(9999999, 9999999)", b"ImageJ="),
    "PNG": (b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"eXIf", b"zTXt", b"iTXt"),
    "JPEG": (b"\xff\xd8", b"\xff\xd9", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xda", b"\xff\xe1", b"Exif\0\0"),
    "WEBP": (b"RIFF", b"WEBP", b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"EXIF", b"ICCP"),
    "GIF": (b"GIF89a", b"GIF87a", b"\x21\xf9\x04", b"\x2c", b"\x3b", b"\x21\xff\x0b"),
    "TIFF": (b"II*\0", b"MM\0*", b"\x00\x01\x03\x00", b"\x11\x01", b"\x15\x01", b"\x03\x01\x03\x00", b"\x52\x01"),
    "AVIF": (b"ftyp", b"avif", b"meta", b"iloc", b"iinf", b"iprp", b"ispe", b"mdat", b"av1C"),
    "BMP": (b"BM", b"\x28\0\0\0", b"\x01\0\0\0", b"\x03\0\0\0", b"\x08\0", b"\x20\0"),
}  # fmt: skip


def feed_image(content: bytes, place: Path) -> None:
    """As an upload, and as a file of a folder."""
    (place / "image.png").write_bytes(content)
    for value_range in (None, decode.FULL_16_BITS):
        with contextlib.suppress(UsageError):
            assert decode.decode_upload(content, value_range).mode == "RGB"
    reading = Reading("pad", decode.FULL_16_BITS)
    ((_, image),) = next(images.read_batches([place / "image.png"], (8, 8), 3, reading, 1))
    if isinstance(image, str):
        raise RunError(image)
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8


def feed_table(suffix: str) -> Feed:
    def feed(content: bytes, place: Path) -> None:
        for name in ("a.png", "b.png"):
            Image.new("L", (4, 4)).save(place / name)
        (place / f"labels{suffix}").write_bytes(content)
        list_files(place, Reading(labels=f"labels{suffix}"))

    return feed


def rows(place: Path) -> list[bytes]:
    return [b"file,label\na.png,cat\nb.png,dog\n", b'"file";"class";split\n"a.png";x;train\n"b.png";y;test\n']


def json_rows(place: Path) -> list[bytes]:
    return [b'{"file_name": "a.png", "label": "cat"}\n{"file_name": "b.png", "label": "dog"}\n']


def packed(suffix: str) -> Seeds:
    """Archives of four images in two classes."""

    def seeds(place: Path) -> list[bytes]:
        png, found = io.BytesIO(), []
        Image.new("L", (4, 4)).save(png, "PNG")
        files = {f"{name}/{i}.png": png.getvalue() for name in ("cat", "dog") for i in range(2)}
        shard = {f"{i}.{end}": content for i in range(2) for end, content in (("png", png.getvalue()), ("cls", b"1"))}
        for members in (files, shard):
            file = io.BytesIO()
            if suffix == ".zip":
                with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                    for name, content in members.items():
                        archive.writestr(name, content)
            elif suffix == ".parquet":
                images = [{"bytes": content, "path": None} for content in files.values()]
                pq.write_table(pa.table({"image": images, "label": [0, 0, 1, 1]}), file)
            else:
                with tarfile.open(fileobj=file, mode="w") as archive:
                    for name, content in members.items():
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
            found.append(file.getvalue())
        return found

    return seeds


def feed_packed(suffix: str) -> Feed:
    def feed(content: bytes, place: Path) -> None:
        before = {path for path in place.parent.rglob("*") if path.is_file()}
        os.environ["MAELAB_DATA"] = str(place / "cache")
        (place / f"x{suffix}").write_bytes(content)
        root = unpack.unpacked(place / f"x{suffix}")
        after = {path for path in place.parent.rglob("*") if path.is_file() and not path.is_relative_to(place)}
        assert after <= before and root.is_relative_to(place / "cache")

    return feed


def shard_index(place: Path) -> list[bytes]:
    for number, name in enumerate(("cat", "cat", "dog", "dog", "dog")):
        (place / "own" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(place / "own" / name / f"{number}.png")
    sharding.shard(place / "own", place / "shards")
    return [(place / "shards" / shards.INDEX).read_bytes()]


def feed_shard_index(content: bytes, place: Path) -> None:
    (place / shards.INDEX).write_bytes(content)
    (place / "train-000000.tar").write_bytes(bytes(10_240))
    data = load(f"folder:{place}")
    assert len(data.train) and max(data.train.images.shape[1:]) <= 2**14
    scan(f"folder:{place}")


def feed_header(content: bytes, place: Path) -> None:
    file, skipped = File(place / "image.png", -1, "train"), list[str]()
    file.path.write_bytes(content)
    for _, header in decode.each(decode.read_header, [file], place, skipped, "looking"):
        assert header.height > 0 and header.width > 0
    scan(f"folder:{place}")


def seeds_of_masks(place: Path) -> list[bytes]:
    texts = [b"01\n10\n", b"0,1\r\n1,0\r\n", b"0 0 1 1\n" * 4, b"10;01\n\n01;10", b"0" * 8 + b"\n" + b"1" * 8 + b"\n"]
    return texts + pictures("PNG")(place) + pictures("BMP")(place)


def feed_mask(content: bytes, place: Path) -> None:
    (place / "mask").write_bytes(content)
    mask = images.read_mask(place / "mask", (2, 2), (8, 8))
    assert mask.shape == (4,) and set(mask.tolist()) == {0.0, 1.0}


# ---------------------------------------------------------------------------------------------- published data formats


def small_idx(place: Path) -> list[bytes]:
    pixels, labels = MNIST["t10k-images-idx3-ubyte"], MNIST["t10k-labels-idx1-ubyte"]
    few = pixels[:4] + (3).to_bytes(4, "big") + pixels[8 : 16 + 3 * 784]
    zipped = MNIST_GZ["t10k-labels-idx1-ubyte.gz"]
    return [few, labels, zipped]


def feed_arrays(read: Callable[[bytes], Any]) -> Feed:
    def feed(content: bytes, place: Path) -> None:
        found = read(content)
        assert sum(part.nbytes for part in (found if isinstance(found, tuple) else (found,))) <= 1 << 27

    return feed


def small_pickle() -> bytes:
    """A whole batch of three images."""
    return python_batch(b"testing batch 1 of 1", CIFAR["test_batch.bin"][: 3 * 3073])


def feed_gzip(content: bytes, place: Path) -> None:
    assert len(formats.gunzip(content)) <= formats.MAX_FILE


def publish_all() -> None:
    """The small sets instead of the full ones, and no source that could be asked over a network."""
    sources.FILES, sums = _sums()
    sources.SHA256 = {name: dict(files) for name, files in sums.items()}
    sources.SOURCES = dict.fromkeys(sources.NAMES, ())


@functools.cache
def _sums() -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    stored = {"mnist": MNIST, "fashion-mnist": MNIST_GZ, "cifar10": CIFAR}
    published = {**stored, "mnist": MNIST | MNIST_GZ}
    return {k: md5s(v) for k, v in stored.items()}, {k: sha256s(v) for k, v in published.items()}


def feed_published(name: str, file: str, beside: dict[str, bytes] | None = None) -> Feed:
    """A file of a set's folder, whose sum is made to be the published one; what it becomes is compared all the same."""

    def feed(content: bytes, place: Path) -> None:
        publish_all()
        folder = place / "set"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for other, bytes_ in ({file: content} | (beside or {})).items():
            (folder / other).write_bytes(bytes_)
            sources.SHA256[name] |= sha256s({other: bytes_})
        sources.read(name, folder)

    return feed


def seeds_of_archive(place: Path) -> list[bytes]:
    small = {
        "data_batch_1.bin": CIFAR["data_batch_1.bin"][: 3 * 3073],
        "../../test_batch.bin": CIFAR["test_batch.bin"][:3073],
    }
    whole = tar_gz({f"cifar/{file}": data[: 2 * 3073] for file, data in CIFAR.items()})
    return [tar_gz(small), whole, gzip.compress(gzip.decompress(tar_gz(small)), 0)]


def seeds_of_sheet(place: Path) -> list[bytes]:
    found = pictures("PNG")(place)
    for mode in ("RGB", "RGBA"):
        file = io.BytesIO()
        Image.new(mode, (1024, 10_000)).save(file, "PNG")
        found += [file.getvalue()] * (mode == "RGB")
    return found


def seeds_of(form: str) -> Seeds:
    return arrays if form == "array" else pictures(form)


LABELS = json.dumps([i % 10 for i in range(50)]).encode()

# libtiff writes about damaged images by itself, and nothing in Pillow or Python can stop it.
SAYS_OF_IMAGES = (
    "maelab: ", "TIFF", "_TIFF", "ZIPDecode", "LZWDecode", "tempfile.tif: ", "Fax", "JPEG", "PackBits", "Old",
    "MissingRequired", "EstimateStrip", "PNG warning",
)  # fmt: skip

TARGETS: dict[str, Target] = {
    "labels.csv": Target(rows, feed_table(".csv"), (b",", b";", b'"', b"\n", b"a.png", b"label", b"split", b"test")),
    "labels.jsonl": Target(json_rows, feed_table(".jsonl"), JSON_TOKENS),
    "zip": Target(
        packed(".zip"), feed_packed(".zip"), (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"../x.png", b"/x.png")
    ),
    "tar": Target(packed(".tar"), feed_packed(".tar"), (b"ustar", b"../x.png", b"/x.png", b"x.cls", b"0000777")),
    "shards": Target(shard_index, feed_shard_index, (b"train-000000.tar", b"../", b"found", b"I32", b"null", b"999")),
    "parquet": Target(
        packed(".parquet"), feed_packed(".parquet"), (b"PAR1", b"image", b"label", b"bytes"), mebibytes=1024
    ),
    **{
        form: Target(seeds_of(form), feed_image, tokens, SAYS_OF_IMAGES, 5, 1536)
        for form, tokens in IMAGE_TOKENS.items()
    },
    **{
        f"{form} header": Target(seeds_of(form), feed_header, tokens, SAYS_OF_IMAGES, mebibytes=512)
        for form, tokens in IMAGE_TOKENS.items()
    },
    "mask": Target(seeds_of_masks, feed_mask, (b"0", b"1", b"\n", b",", *IMAGE_TOKENS["PNG"]), mebibytes=1536),
    "IDX": Target(small_idx, feed_arrays(formats.read_idx), (b"\0\0\x08\x01", b"\0\0\x08\x03", b"\x1f\x8b")),
    "CIFAR binary": Target(lambda place: [CIFAR["test_batch.bin"][: 3 * 3073]], feed_arrays(formats.read_cifar_binary)),
    "CIFAR pickle": Target(
        lambda place: [batch[:20_000] for batch in python_batches().values()] + [small_pickle()],
        feed_arrays(formats.read_cifar_pickle),
        (b"U\x06labelsq\x04]q\x05(", b"K\x01", b"e(", b"\x89T", b"cos\nsystem\n"),
    ),
    "gzip": Target(
        lambda place: [MNIST_GZ["t10k-labels-idx1-ubyte.gz"], (DATA / "cifar10-test.bin.gz").read_bytes()[:5000]],
        feed_gzip,
        (b"\x1f\x8b\x08", b"\0\0\xff\xff"),
    ),
    "tar.gz": Target(
        seeds_of_archive,
        feed_published("cifar10", "cifar-10-binary.tar.gz"),
        (b"ustar", b"\x1f\x8b\x08", b"data_batch_1.bin", b"../../x"),
    ),
    "PNG sheet": Target(
        seeds_of_sheet,
        feed_published("cifar10", "data_batch_1.png", {"train_lables.json": LABELS}),
        IMAGE_TOKENS["PNG"],
        mebibytes=512,
    ),
    "label list": Target(
        lambda place: [LABELS], feed_published("cifar10", "train_lables.json", {"data_batch_1.png": b""}), JSON_TOKENS
    ),
}
