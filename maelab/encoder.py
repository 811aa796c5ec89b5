"""An encoder at work on image files: opened, told from others, and fed; and its features in a Parquet file."""

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from maelab.config import ComputeOptions
from maelab.data.batches import scale
from maelab.data.images import read_batches
from maelab.errors import RunError, UsageError
from maelab.model import VisionTransformer
from maelab.names import visible
from maelab.progress import heartbeat
from maelab.training.checkpoint import ModelSpec, load_model, weights_sha256
from maelab.training.parallel import Engine, prepare, start_engine
from maelab.training.runlog import say


def open_encoder(
    run: Path | str, pool: Literal["token", "avg"], options: ComputeOptions
) -> tuple[VisionTransformer, ModelSpec, Engine]:
    """The model of a run, ready to compute features in float32, its description, and where it computes.

    Raises:
        UsageError, RunError: if the run cannot be read, is no encoder, or has no class token to pool.
    """
    model, spec = load_model(run)
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"{run} is a linear probe; name the run that it judged")
    if pool == "token" and not model.num_prefix_tokens:
        raise UsageError(f"{run} has no class token; use --pool avg")
    engine = start_engine(options, "fp32")
    prepare(model.to(engine.device), engine, options)
    return model, spec, engine


def encoder_of(model: VisionTransformer, pool: str) -> str:
    """What features are of: the weights, by their SHA-256, and the pooling."""
    return f"{weights_sha256(model)} {pool}"


def pictures(paths: Iterable[str], model: VisionTransformer, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Image files as the model sees them, (C, H, W) in [-1, 1]; those that cannot be read are left out."""
    batches = read_batches(paths, model.img_size, model.in_chans, spec.reading, 256)
    return {path: scale(image) for batch in batches for path, image in batch if not isinstance(image, str)}


def readable(
    paths: Iterable[str | Path], model: VisionTransformer, spec: ModelSpec, unreadable: list[str]
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Image files, prepared for the model, a batch at a time: their paths, and uint8 (n, C, H, W).

    What cannot be read is named on stderr, and its path put into `unreadable`.

    Raises:
        RunError: if none can be read.
    """
    beat, done = heartbeat("images"), 0
    for batch in read_batches(paths, model.img_size, model.in_chans, spec.reading, 256):
        for path, problem in batch:
            if isinstance(problem, str):
                unreadable.append(path)
                say(visible(f"cannot read {path}: {problem}"))
        good = [(path, image) for path, image in batch if not isinstance(image, str)]
        if good:
            yield [path for path, _ in good], torch.stack([image for _, image in good])
            done += len(good)
            beat(done)
    if not done:
        raise RunError("no image could be read")


def parquet_of(out: Path, columns: Mapping[str, Any], metadata: dict[str, str]) -> bytes:
    """The content of a Parquet file of these columns, in which `features` (N, D) is a list of D numbers a row.

    Raises:
        UsageError: if pyarrow is missing; it names `out`.
    """
    pyarrow = pyarrow_for(out)
    features = columns["features"]
    flat = pyarrow.array(features.reshape(-1))
    table = {"features": pyarrow.FixedSizeListArray.from_arrays(flat, features.shape[1])}
    table |= {name: pyarrow.array(column) for name, column in columns.items() if name != "features"}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(table, metadata=metadata), buffer)
    return buffer.getvalue()


def pyarrow_for(out: Path) -> Any:
    """pyarrow, if it is installed.

    Raises:
        UsageError: if not; it names `out`.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"--out {out} needs pyarrow (pip install 'maelab[parquet]'); or choose .npz") from None
    return pyarrow
