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
from maelab.data.images import read_batches
from maelab.errors import RunError, UsageError
from maelab.inference import extract_features
from maelab.model import VisionTransformer
from maelab.names import encodable, visible
from maelab.runs import locate, write_atomically
from maelab.training.checkpoint import choose_part, load_matching_data, load_model
from maelab.training.parallel import prepare, start_engine
from maelab.training.runlog import say


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
    (place in the training or test images of the data set) and label, int64 (N,); class_names. Or a .parquet with these
    columns, and class_names as JSON in the metadata of its schema.

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
        _pyarrow(out)
    if paths and data is not None:
        raise UsageError("give images or --data, not both")
    model, spec = load_model(run)
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"{run} is a linear probe; name the run that it judged")
    if pool == "token" and not model.num_prefix_tokens:
        raise UsageError(f"{run} has no class token; use --pool avg")
    engine = start_engine(options, "fp32")
    prepare(model.to(engine.device), engine, options)

    def extracted(images: torch.Tensor) -> np.ndarray:
        return extract_features(model, ImageSet(images, None).to(engine.device), pool).cpu().numpy()

    columns: dict[str, np.ndarray] = {}
    unreadable = 0
    if paths:
        parts, read = [np.empty((0, model.embed_dim), np.float32)], []
        for batch in read_batches(paths, model.img_size, model.in_chans, spec.reading, 256):
            for path, problem in batch:
                if isinstance(problem, str):
                    unreadable += 1
                    say(visible(f"cannot read {path}: {problem}"))
            good = [(path, image) for path, image in batch if not isinstance(image, str)]
            if good:
                read += [encodable(path) for path, _ in good]
                parts.append(extracted(torch.stack([image for _, image in good])))
        if not read:
            raise RunError("no image could be read")
        columns |= {"features": np.concatenate(parts), "path": np.array(read)}
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
    buffer = io.BytesIO()
    if out.suffix == ".npz":
        np.savez(buffer, **columns)  # type: ignore[arg-type]
    else:
        pyarrow = _pyarrow(out)
        names = columns.pop("class_names", np.array([])).tolist()
        flat = pyarrow.array(columns.pop("features").reshape(-1))
        table = {"features": pyarrow.FixedSizeListArray.from_arrays(flat, dim)}
        table |= {name: pyarrow.array(column) for name, column in columns.items()}
        metadata = {"class_names": json.dumps(names)} if names else None
        pyarrow.parquet.write_table(pyarrow.table(table, metadata=metadata), buffer)
    write_atomically(out, buffer.getvalue())
    return {"run": str(run), "out": str(out), "images": n, "dim": dim, "unreadable": unreadable}


def _pyarrow(out: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"--out {out} needs pyarrow (pip install 'maelab[parquet]'); or choose .npz") from None
    return pyarrow
