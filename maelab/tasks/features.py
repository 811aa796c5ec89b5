"""Features of images, in a file that other tools read."""

import io
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from maelab.config import DataOptions
from maelab.data import ImageSet
from maelab.encoder import encoder_of, open_encoder, parquet_of, pyarrow_for, readable
from maelab.errors import UsageError
from maelab.inference import extract_features
from maelab.names import encodable
from maelab.runs import locate, write_atomically
from maelab.training.checkpoint import choose_part, load_matching_data


def features(
    run: Path | str,
    paths: Iterable[str | Path] = (),
    *,
    data: str | None = None,
    split: Literal["train", "val", "test"] = "test",
    pool: Literal["token", "avg"] = "avg",
    out: Path | str = Path("features.npz"),
    options: DataOptions | None = None,
) -> dict[str, Any]:
    """Write features of images for other tools.

    They are those of the encoder, unmasked. The file is an .npz of the arrays features, float32 (N, D); path, or index
    (place in the training or test images of the data set) and label, int64 (N,); class_names; encoder, which tells what
    they are of. Or a .parquet with these columns, and class_names as JSON and encoder in the metadata of its schema.

    Args:
        run: run folder or checkpoint of a classifier or a masked autoencoder.
        paths: image files, folders, globs, or on the command line - for paths from stdin; none takes a data set. What
            cannot be read is left out, and named on stderr.
        data: data set; None is the one it was trained on.
        split: which images of it; train and val as the run told them apart, whatever its --limit.
        pool: the class token, or the mean of the patch tokens.
        out: file to write: .npz, or .parquet where pyarrow is installed.
        options: where to compute.

    Returns:
        {"run", "out", "images", "dim", "unreadable"}.

    Raises:
        UsageError: if the run cannot be read, or it and the images do not fit; for parquet without pyarrow.
        RunError: if no image could be read, or the file cannot be written.
    """
    out, options = Path(out), options or DataOptions()
    if out.suffix not in (".npz", ".parquet"):
        raise UsageError(f"--out {out}: give a name that ends in .npz or .parquet")
    if out.suffix == ".parquet":
        pyarrow_for(out)
    if paths and data is not None:
        raise UsageError("give images or --data, not both")
    model, spec, engine = open_encoder(run, pool, options)

    def extracted(images: torch.Tensor) -> np.ndarray:
        return extract_features(model, ImageSet(images, None).to(engine.device), pool).cpu().numpy()

    columns: dict[str, np.ndarray] = {"encoder": np.array(encoder_of(model, pool))}
    unreadable: list[str] = []
    if paths:
        batches = [(names, extracted(images)) for names, images in readable(paths, model, spec, unreadable)]
        columns["features"] = np.concatenate([part for _, part in batches])
        columns["path"] = np.array([encodable(name) for names, _ in batches for name in names])
    else:
        dataset = load_matching_data(spec, data, options.data_dir)
        # The same cut, made on the places of the images instead of the images, says which they are: those for training,
        # then those for testing.
        sets = [part for part in (dataset.train, dataset.test) if part is not None]
        places = torch.arange(sum(map(len, sets))).split([len(part) for part in sets])
        numbered = [ImageSet(place, part.labels, part.keys) for place, part in zip(places, sets, strict=True)]
        test = numbered[1] if len(sets) > 1 else None
        part = choose_part(replace(dataset, train=numbered[0], test=test), split, locate(run), spec.data)
        rows = [part.images[torch.isin(part.images, place)] - place[0] for place in places]
        found = [extracted(one.images[row]) for one, row in zip(sets, rows, strict=True) if len(row)]
        columns |= {"features": np.concatenate(found), "index": torch.cat(rows).numpy()}
        if part.labels is not None:
            columns |= {
                "label": part.labels.numpy(),
                "class_names": np.array([encodable(name) for name in dataset.class_names]),
            }
    n, dim = columns["features"].shape
    if out.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, **columns)  # type: ignore[arg-type]
        content = buffer.getvalue()
    else:
        names, encoder = columns.pop("class_names", np.array([])).tolist(), str(columns.pop("encoder"))
        metadata = {"encoder": encoder} | ({"class_names": json.dumps(names)} if names else {})
        content = parquet_of(out, columns, metadata)
    write_atomically(out, content)
    return {"run": str(run), "out": str(out), "images": n, "dim": dim, "unreadable": len(unreadable)}
