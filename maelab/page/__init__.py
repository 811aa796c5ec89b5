"""`maelab page` and `maelab demo`: models in a page that computes in the browser alone, with no server.

A page is a folder of plain files, which opens from the disk and from any static host. onnxruntime-web runs the models;
it comes from npm, of one version, and its bytes are known beforehand.
"""

import contextlib
import gzip
import json
import os
import sys
import tarfile
import tempfile
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maelab.data.sources import NAMES, cache_dir, obtain_package
from maelab.errors import MaelabError, RunError, UsageError
from maelab.export import to_onnx
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.names import visible
from maelab.runs import write_atomically
from maelab.training.checkpoint import ModelSpec, load_matching_data, load_model

SHIPPED = ("maelab:mnist-mae", "maelab:mnist-classifier", "maelab:cifar10-mae")
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
SCRIPT, BINARY = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
FILES = ("index.html", "page.css", "page.js", "licence.txt")
LEVELS = 63  # of a weight's size: with its sign, 7 bits
EXAMPLES = 20
SIDE = 96  # longer side of an example picked from files, pixels at most; a model of larger images keeps its own size
HERE = Path(__file__).parent


def page(
    runs: Sequence[str] = (),
    *,
    out: Path | str = Path("maelab-page"),
    images: Sequence[str] = (),
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """Write a page to hide and rebuild patches, draw digits and see what models make of them, in the browser alone.

    The folder needs no server: open its index.html, or put it on any static host. The models compute with float32
    numbers, of weights rounded to 7 bits a number, with a scale for each output of a matrix.

    Args:
        runs: run folders or checkpoints of autoencoders and classifiers; none takes weights that maelab ships.
        out: folder to write, new or empty.
        images: file, folder or glob of images to pick from, which become a part of the page; may be given several
            times. None takes digits that maelab ships for models of MNIST, test images of a built-in data set, where
            they are on this machine, and never images of a folder.
        data_dir: folder that holds the data set's files already.

    Returns:
        {"out", "open": its index.html, "bytes": of all files, "models": [{"name", "bytes", "rounding": RMS change of
        the rounded weights over their RMS}]}.

    Raises:
        UsageError: if a package is missing, `out` exists, or a model or an image cannot be shown.
        RunError: if a model is damaged, or the runtime cannot be had.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists and is not empty; remove it or choose another name")
    models = [_load(run) for run in runs or SHIPPED]
    shown, files, sets = [], {name: (HERE / name).read_bytes() for name in FILES}, {}
    for number, (run, model, spec) in enumerate(models):
        part = "autoencoder" if isinstance(model, MaskedAutoencoderViT) else "attention"
        content, rounding = rounded(to_onnx(model, spec, part)[0])
        asset = f"model-{number}"
        files[f"{asset}.js"] = script(asset, gzip.compress(content, mtime=0))
        name = _name(run, [other["name"] for other in shown])
        shown.append(_about(model, spec) | {"name": name, "asset": asset, "rounding": rounding})
        group = shown[-1]["group"]
        sets.setdefault(group, [])
        if not sets[group]:
            sets[group] = [_picture(image, model) for image in examples(model, spec, images, data_dir)]
    about = {"models": shown, "examples": sets}
    files["about.js"] = f"const ABOUT = {json.dumps(about)};\n".encode()
    files |= _runtime()
    for name, content in reversed(files.items()):  # index.html last: what was cut short does not open
        write_atomically(out / name, content)
    listed = [{"name": m["name"], "bytes": len(files[f"{m['asset']}.js"]), "rounding": m["rounding"]} for m in shown]
    return {
        "out": str(out), "open": str(out / FILES[0]), "bytes": sum(map(len, files.values())), "models": listed,
    }  # fmt: skip


def demo(runs: Sequence[str] = (), *, images: Sequence[str] = (), data_dir: Path | None = None) -> Iterator[str]:
    """Open a page in the browser to draw digits, hide and rebuild patches, compare models.

    It is the page of `maelab page`, in a folder here that vanishes when the command is interrupted. There is no server:
    nobody else can reach it.

    Args:
        runs: run folders or checkpoints of autoencoders and classifiers; none takes weights that maelab ships.
        images: as for `maelab page`.
        data_dir: folder that holds the data set's files already.

    Yields:
        The page's address, open in the browser if this machine has one.

    Raises:
        UsageError, RunError: as `page`.
    """
    try:  # not in /tmp: browsers that Ubuntu installs as snaps have a /tmp of their own, and see no hidden folder
        folder = tempfile.TemporaryDirectory(prefix="maelab-demo-", dir=Path.cwd())
    except OSError as error:
        raise UsageError(f"cannot write a page here: {error.strerror or error}; go to a folder of your own") from error
    with folder as place:
        opened = Path(page(runs, out=place, images=images, data_dir=data_dir)["open"]).as_uri()
        if sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():  # else one of text alone
            webbrowser.open(opened)
        yield opened
        with contextlib.suppress(KeyboardInterrupt):  # the usual end
            threading.Event().wait()


# --------------------------------------------------------------------------------------------------------------- models


def _load(run: str) -> tuple[str, VisionTransformer, ModelSpec]:
    model, spec = load_model(run)
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"{run} is a linear probe; a page shows autoencoders and fine-tuned classifiers")
    if model.in_chans not in (1, 3):
        raise UsageError(f"{run} takes images of {model.in_chans} channels; a page shows 1 or 3, maelab predict any")
    if not isinstance(model, MaskedAutoencoderViT) and not (model.num_classes and len(model.blocks)):
        raise UsageError(f"{run} has no {'blocks' if model.num_classes else 'classes'}, so a page has nothing to show")
    return run, model, spec


def _name(run: str, taken: Sequence[str]) -> str:
    name = visible(Path(run).name.removeprefix("maelab:") or str(run))
    return name if name not in taken else f"{name} ({len(taken) + 1})"


def _about(model: VisionTransformer, spec: ModelSpec) -> dict[str, Any]:
    """What the page has to know of a model beside its weights."""
    height, width = model.img_size
    names = spec.class_names or tuple(map(str, range(model.num_classes)))
    colours = "grey" if model.in_chans == 1 else "in colour"
    return {
        "group": f"{visible(spec.data).partition(':')[0] or 'images'}, {height} x {width}, {colours}",
        "rebuilds": isinstance(model, MaskedAutoencoderViT),
        "channels": model.in_chans,
        "height": height,
        "width": width,
        "patch": model.patch_size,
        "resize": spec.reading.resize,
        "ratio": spec.mask_ratio or 0.75,
        "normalised": getattr(model, "norm_pix_loss", False),
        "classes": [visible(name) for name in names],
        "digits": spec.data == "mnist" and model.in_chans == 1,
    }


def round_columns(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (in, out) as whole numbers of 7 bits and a scale for each column, that of its largest number.

    Returns:
        int8 (in, out) and float32 (1, out); their product is the rounded matrix.
    """
    scale = np.maximum(np.abs(matrix).max(axis=0, keepdims=True), 1e-30).astype(np.float32) / LEVELS
    return np.rint(matrix / scale).astype(np.int8), scale


def rounded(content: bytes) -> tuple[bytes, float]:
    """An ONNX model whose matrices are stored in 7 bits a number (see `round_columns`) and are unpacked when it is
    loaded, and the RMS change of these over their RMS."""
    import onnx
    from onnx import helper, numpy_helper

    graph = (proto := onnx.load_from_string(content)).graph
    factors = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    unpacking, change, size = [], 0.0, 0.0
    for tensor in [t for t in graph.initializer if t.name in factors]:
        matrix = numpy_helper.to_array(tensor)
        name = tensor.name
        whole, scale = round_columns(matrix)
        change += float(np.square(whole * scale - matrix).sum())
        size += float(np.square(matrix).sum())
        tensor.CopyFrom(numpy_helper.from_array(whole, f"{name}.whole"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
        unpacking.append(helper.make_node("Cast", [f"{name}.whole"], [f"{name}.cast"], to=onnx.TensorProto.FLOAT))
        unpacking.append(helper.make_node("Mul", [f"{name}.cast", f"{name}.scale"], [name]))
    nodes = [*unpacking, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return proto.SerializeToString(), float(np.sqrt(change / size)) if size else 0.0


# --------------------------------------------------------------------------------------------------------------- images


def examples(
    model: VisionTransformer, spec: ModelSpec, paths: Sequence[str], data_dir: Path | None
) -> list[Image.Image]:
    """Up to 20 images to pick from: see `page`. Nothing is downloaded.

    Raises:
        UsageError: if one that is named cannot be read.
    """
    from maelab.data.decode import decode_upload
    from maelab.data.images import find_images

    found: list[Image.Image] = []
    for path, problem in find_images(paths) if paths else ():
        try:
            if problem:
                raise UsageError(problem)
            found.append(decode_upload(Path(path).read_bytes(), spec.reading.value_range))
        except (UsageError, OSError) as error:
            raise UsageError(f"--images {path}: {getattr(error, 'strerror', None) or error}") from error
        if len(found) == EXAMPLES:
            break
    if found or spec.data not in NAMES:
        return found
    if spec.data == "mnist":
        sheet = np.asarray(Image.open(HERE / "digits.png"))  # (28, 20 x 28)
        return [Image.fromarray(digit) for digit in np.split(sheet, sheet.shape[1] // 28, axis=1)]
    try:
        test = load_matching_data(spec, None, data_dir or cache_dir() / spec.data).test
    except MaelabError:
        return []
    assert test is not None
    rows = np.random.default_rng(0).permutation(len(test))[:EXAMPLES]
    return [Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy()) for x in test.images[rows.tolist()]]


def _picture(image: Image.Image, model: VisionTransformer) -> str:
    """An image as the address of a PNG that holds it, made smaller if it is far larger than the model's."""
    from base64 import b64encode

    side = max(SIDE, 2 * max(model.img_size))
    image.thumbnail((side, side))
    image = Image.fromarray(np.asarray(image))  # the pixels alone: a file may say where and by whom it was taken
    image.save(file := BytesIO(), "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


# ---------------------------------------------------------------------------------------------------------------- files


def script(name: str, content: bytes) -> bytes:
    """A script that holds bytes, for `bytesOf` of page.js: a page that is opened from the disk may read no other files.

    UTF-16, with a mark at its beginning that no host can overrule; each of its letters, U+1000 to U+8FFF, carries 15
    bits.
    """
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    bits = np.pad(bits, (0, -len(bits) % 15)).reshape(-1, 15)
    letters = (bits @ (1 << np.arange(14, -1, -1)) + 0x1000).astype("<u2").tobytes()
    before = f'\ufeff(self.ASSETS ??= {{}})["{name}"] = [{len(content)}, "'
    return before.encode("utf-16-le") + letters + '"];\n'.encode("utf-16-le")


def _runtime() -> dict[str, bytes]:
    """onnxruntime-web as two scripts. Raises RunError."""
    with tarfile.open(fileobj=BytesIO(obtain_package(RUNTIME, RUNTIME_SHA256))) as archive:
        parts = []
        for name in (SCRIPT, BINARY):
            member = archive.extractfile(f"package/dist/{name}")
            if member is None:
                raise RunError(f"{RUNTIME} lacks {name}")
            parts.append(gzip.compress(member.read(), mtime=0))
    names = "runtime-code", "runtime-wasm"
    return {f"{name}.js": script(name, part) for name, part in zip(names, parts, strict=True)}
