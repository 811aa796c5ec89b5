"""Which images of a folder are most like an image."""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from maelab import figures
from maelab.config import ComputeOptions, check_count
from maelab.data import ImageSet
from maelab.encoder import encoder_of, open_encoder, pictures, readable
from maelab.errors import RunError, UsageError
from maelab.inference import extract_features
from maelab.model import VisionTransformer
from maelab.training.checkpoint import ModelSpec

PICTURED = 16


def similar(
    run: Path | str,
    images: Iterable[str | Path],
    *,
    in_: Path | str,
    top: int = 8,
    pool: Literal["token", "avg"] = "avg",
    out: Path | str = Path("similar.png"),
    options: ComputeOptions | None = None,
) -> dict[str, Any]:
    """Find the images of a folder that are most like an image.

    Similarity is the cosine between the encoder's features, less the mean of the folder's. An image does not find
    itself.

    Args:
        run: run folder or checkpoint of a classifier or a masked autoencoder.
        images: image files, folders or globs to look for.
        in_: where to look: a folder, or for many searches in a large one the .npz that `maelab features RUN FOLDER`
            wrote.
        top: how many to find for each image.
        pool: the class token, or the mean of the patch tokens.
        out: picture to write, of the first 16 images and what was found for them.
        options: where to compute.

    Returns:
        {"run", "out", "images" (to look in), "unreadable", "found": [{"path", "similar": [{"path", "similarity"}]}]}.

    Raises:
        UsageError: if the run cannot be read, or the .npz is of another encoder.
        RunError: if no image can be read, or the picture cannot be written.
    """
    out = figures.png(out)
    check_count("--top", top, 1, 1_000)
    model, spec, engine = open_encoder(run, pool, options or ComputeOptions())
    unreadable: list[str] = []

    def encoded(paths: Iterable[str | Path]) -> tuple[list[str], torch.Tensor]:
        names, parts = [], []
        for batch, read in readable(paths, model, spec, unreadable):
            names += batch
            parts.append(extract_features(model, ImageSet(read, None).to(engine.device), pool).cpu())
        return names, torch.cat(parts)

    in_ = Path(in_)
    paths, features = _index(in_, model, pool) if in_.suffix == ".npz" else encoded([in_])
    queries, wanted = encoded(images)
    centre = features.mean(dim=0)
    features, wanted = F.normalize(features - centre), F.normalize(wanted - centre)
    places = [os.path.realpath(path) for path in paths]
    found = []
    for query, vector in zip(queries, wanted, strict=True):
        itself = os.path.realpath(query)
        nearest = (features @ vector).topk(min(len(paths), top + places.count(itself)))
        ranked = [(i, s) for s, i in zip(*(x.tolist() for x in nearest), strict=True) if places[i] != itself][:top]
        found.append({"path": query, "similar": [{"path": paths[i], "similarity": s} for i, s in ranked]})
    _draw(out, found[:PICTURED], model, spec)
    return {"run": str(run), "out": str(out), "images": len(paths), "unreadable": len(unreadable), "found": found}


def _index(file: Path, model: VisionTransformer, pool: str) -> tuple[list[str], torch.Tensor]:
    """Paths and features (N, D) that `maelab features` wrote."""
    try:
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, and might be of any size")
        with np.load(file, allow_pickle=False) as kept:
            names, values, encoder = kept["path"].tolist(), kept["features"], str(kept["encoder"])
        features = torch.from_numpy(values.astype(np.float32))
        if features.shape != (len(names), model.embed_dim) or not len(names) or not isinstance(names[0], str):
            raise ValueError("paths and features do not go together")
    except FileNotFoundError:
        raise UsageError(f"--in {file}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, MemoryError, zipfile.BadZipFile) as error:
        why = f"holds no features of image files ({error}); maelab features writes them"
        raise RunError(f"--in {file} {why}") from error
    if encoder != encoder_of(model, pool):
        raise UsageError(f"--in {file} has features of another model or pooling; write it again with maelab features")
    return names, features


def _draw(out: Path, found: list[dict[str, Any]], model: VisionTransformer, spec: ModelSpec) -> None:
    """A row for each image: itself, then what was found; what is no longer there stays empty."""
    paths = {path for entry in found for path in (entry["path"], *(one["path"] for one in entry["similar"]))}
    read = pictures(paths, model, spec)
    rows = []
    for entry in found:
        titled = [(one["path"], f"{one['similarity']:.2f} {Path(one['path']).name}") for one in entry["similar"]]
        titled = [(entry["path"], Path(entry["path"]).name), *titled]
        rows.append([(title, read.get(path)) for path, title in titled])
    figures.rows(out, rows)
