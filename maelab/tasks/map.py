"""All images of a folder in one table, for a map on which labelling begins from clusters."""

import io
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from maelab import figures
from maelab.config import ComputeOptions
from maelab.data import ImageSet
from maelab.data.batches import scale
from maelab.encoder import encoder_of, open_encoder, parquet_of, readable
from maelab.errors import RunError, UsageError
from maelab.inference import extract_features
from maelab.names import encodable, shell_word
from maelab.runs import write_atomically

VIEWER = "embedding-atlas"


def map_images(
    run: Path | str,
    folder: Path | str,
    *,
    pool: Literal["token", "avg"] = "avg",
    out: Path | str = Path("map.parquet"),
    open_: bool = False,
    options: ComputeOptions | None = None,
) -> dict[str, Any]:
    """Lay out the images of a folder by their features, to label clusters instead of images.

    It writes a .parquet that embedding-atlas opens (columns path; class, the name of the folder that an image lies in;
    image, as the model sees it; features), and beside it a picture, OUT.png: two principal components, each by rank.

    Args:
        run: run folder or checkpoint of a classifier or a masked autoencoder.
        folder: images: a folder, or an archive of one.
        pool: the class token, or the mean of the patch tokens.
        out: file to write, .parquet.
        open_: open it with embedding-atlas, which serves it to this machine's browser until Ctrl-C.
        options: where to compute.

    Returns:
        {"run", "out", "picture", "images", "dim", "unreadable", "open" (the command that opens it)}.

    Raises:
        UsageError: if the run cannot be read, or pyarrow or, for `open_`, embedding-atlas is missing.
        RunError: if no image could be read, or a file cannot be written.
    """
    out = Path(out)
    if out.suffix != ".parquet":
        raise UsageError(f"--out {out}: give a name that ends in .parquet")
    viewer = shutil.which(VIEWER)
    if open_ and viewer is None:
        raise UsageError(f"--open needs {VIEWER}: pip install {VIEWER}")
    model, spec, engine = open_encoder(run, pool, options or ComputeOptions())
    unreadable: list[str] = []
    paths: list[str] = []
    thumbnails: list[bytes] = []
    parts: list[torch.Tensor] = []
    for batch, images in readable([folder], model, spec, unreadable):
        paths += batch
        parts.append(extract_features(model, ImageSet(images, None).to(engine.device), pool).cpu())
        thumbnails += map(_png, scale(images))
    features = torch.cat(parts)
    columns = {
        "path": [encodable(path) for path in paths],
        "class": [encodable(Path(path).parent.name) for path in paths],
    }
    columns |= {"image": [{"bytes": png} for png in thumbnails], "features": features.numpy()}
    write_atomically(out, parquet_of(out, columns, {"encoder": encoder_of(model, pool)}))
    picture = out.with_name(f"{out.name}.png")  # a name that nobody else's file is likely to have
    figures.mosaic(picture, thumbnails, _places(features))
    asked = ["--vector", "features", "--image", "image"]
    if viewer is not None and open_:
        status = subprocess.run([viewer, str(out.absolute()), *asked]).returncode
        if status not in (0, 130, -2):  # the last two are Ctrl-C
            raise RunError(f"{VIEWER} ended with status {status}")
    return {
        "run": str(run),
        "out": str(out),
        "picture": str(picture),
        "images": len(paths),
        "dim": features.shape[1],
        "unreadable": len(unreadable),
        "open": " ".join([VIEWER, shell_word(str(out)), *asked]),
    }


def _png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    pixels = (255 * figures.to_picture(image.numpy())).round().astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _places(features: torch.Tensor) -> np.ndarray:
    """Where on the picture, (N, 2) from 0 to 1: two principal components (Pearson 1901), each by rank."""
    centred = (features - features.mean(dim=0)).double()
    _, directions = torch.linalg.eigh(centred.T @ centred)  # rising
    ranks = (centred @ directions[:, -2:].flip(1)).argsort(dim=0, stable=True).argsort(dim=0)
    return (ranks / max(1, len(features) - 1)).numpy()
