"""Weights that come with maelab, a folder each, meant by maelab:NAME; and how a finished run becomes one.

python -m maelab.pretrained RUN NAME
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from maelab import runs
from maelab.errors import UsageError
from maelab.runs import checkpoints

LARGEST = 8_000_000  # bytes of model.safetensors: a package is no place for more


def ship(run: str | Path, name: str, root: Path | None = None) -> Path:
    """Copy the best checkpoint of a finished run to where maelab:NAME is looked for, with a model card.

    Weights that are too large in float32 are rounded to float16; models are float32 again when they are loaded.

    Args:
        run: run folder of a pretraining or a fine-tuning.
        name: lower-case letters, digits and hyphens.
        root: where such folders lie; None is the package itself.

    Returns:
        The new folder: model.safetensors, config.json and README.md.

    Raises:
        UsageError: if the run is unfinished or of another kind, the weights too large, or the name taken or no name.
        RunError: if a file of the run is damaged, or the folder cannot be written.
    """
    run, folder = Path(run), (root or checkpoints.PRETRAINED) / name
    config, result = runs.config_of(run), runs.result_of(run)
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise UsageError(f"{name!r} is no name for weights: use lower-case letters, digits and hyphens")
    if folder.exists():
        raise UsageError(f"{folder} exists; choose another name, or remove it first")
    if config.get("task") not in ("pretrain", "finetune") or not result:
        raise UsageError(f"{run} is not the folder of a finished pretraining or fine-tuning")
    if Path(config.get("init", "none")).is_absolute():
        config |= {"init": Path(config["init"]).name}  # where it lay says nothing elsewhere
    best = runs.find_checkpoint(run)
    checkpoint, _ = runs.read_checkpoint(best)
    weights = best.model.read_bytes()
    if halved := len(weights) > LARGEST:
        weights = save({key: value.astype(np.float16) for key, value in load(weights).items()})
    if len(weights) > LARGEST:
        size = f"{len(weights) / 1e6:.1f} MB in float16"
        raise UsageError(f"{best.model} has {size}; at most {LARGEST / 1e6:.0f} are shipped")
    text = card(name, config, runs.environment_of(run), result, checkpoint, halved)
    runs.write_atomically(folder / "README.md", text.encode())
    about = runs.read_json(best.config) | {"sha256": hashlib.sha256(weights).hexdigest()}
    runs.write_json(folder / best.config.name, about)
    runs.write_atomically(folder / best.model.name, weights)  # last: with it the name is there
    return folder


def card(
    name: str,
    config: dict[str, Any],
    env: dict[str, Any],
    result: dict[str, Any],
    checkpoint: dict[str, Any],
    halved: bool,
) -> str:
    """A model card: what the weights are, how they were made, what they reach, licence and limits.

    Args:
        name: of maelab:NAME.
        config, env, result: the run's config.json, env.json and result.json.
        checkpoint: the fields that `maelab.runs.read_checkpoint` gives.
        halved: whether the weights were rounded to float16.
    """
    height, width = checkpoint["arguments"]["img_size"]
    channels, val = checkpoint["arguments"]["in_chans"], result["val"]
    held_out = "validation images"
    if "validation" not in env.get("data_md5", {}):  # of the data itself
        held_out += f", {config['val_fraction']:.0%} of the training images by split seed {config['split_seed']}"
    if config["task"] == "pretrain":
        what, load = "A masked autoencoder", f"maelab finetune RECIPE --init maelab:{name}"
        scores = {
            f"masked MSE, {held_out}; {config['mask_ratio']:.0%} hidden; {result['masked_mse_uses']}": "masked_mse",
            "k-NN accuracy of the unmasked encoder (mean of the patch tokens, 20 neighbours) on at most 1,000 of"
            " these, among at most 2,000 training images": "knn_accuracy",
        }
        rows = [f"| {text} | {val[key]:.4f} |" for text, key in scores.items() if key in val]
    else:
        what, load = f"A classifier of {len(checkpoint['class_names'])} classes", f"maelab predict maelab:{name} IMAGE"
        rows = [f"| accuracy on {held_out} | {val['accuracy']:.4f} |"]
        if "accuracy" in result.get("test", {}):
            rows.insert(0, f"| accuracy on the test images, read once | {result['test']['accuracy']:.4f} |")
    rounded = "\n\nMeasured before the weights were rounded to float16." if halved else ""
    return f"""# maelab:{name}

{what} of {result["params"]:,} parameters, trained on {result["data"]} by maelab.

    {load}

- Data: {result["data"]}; {json.dumps(env.get("data_md5", {}))} (MD5)
- Command: `{runs.command(config)}`
- Recipe {config["recipe"]}, seed {config["seed"]}, epoch {result["best_epoch"]} of {result["epochs"]}, the best on
  validation; {result["train_time_s"]:.0f} s, {env.get("hardware", "unknown hardware")}, {env.get("cpu", "unknown CPU")}
- maelab {env.get("maelab")} (commit {env.get("git_commit")}), torch {env.get("torch")}, Python {env.get("python")}

| measured | |
|---|---|
{chr(10).join(rows)}{rounded}

Limits: one run of one seed, so no spread is known. It has seen {result["data"]} alone, {height}x{width} pixels with
{channels} channel{"s" * (channels > 1)} scaled to [-1, 1]; what it makes of other images is not tested.
Do not base decisions about people on it.

Licence of the weights: MIT, as maelab. The images have the licence of their source.

The whole config:

```json
{json.dumps(config, indent=1)}
```
"""
