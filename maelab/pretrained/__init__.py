"""Weights that come with maelab, a folder each, meant by maelab:NAME; and how a finished run becomes one.

python -m maelab.pretrained RUN NAME [OTHER...]
"""

import hashlib
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from maelab import runs
from maelab.errors import UsageError
from maelab.runs import checkpoints

LARGEST = 8_000_000  # bytes of model.safetensors: a package is no place for more
_MAY_DIFFER = ("seed", "split_seed", "init")  # between runs of the same by other seeds


def ship(run: str | Path, name: str, others: Sequence[str | Path] = (), root: Path | None = None) -> Path:
    """Copy the best checkpoint of a finished run to where maelab:NAME is looked for, with a model card.

    Weights that are too large in float32 are rounded to float16; models are float32 again when they are loaded.

    Args:
        run: run folder of a pretraining or a fine-tuning.
        name: lower-case letters, digits and hyphens.
        others: finished runs of the same by other seeds, for the card to say the mean and the spread.
        root: where such folders lie; None is the package itself.

    Returns:
        The new folder: model.safetensors, config.json and README.md.

    Raises:
        UsageError: if the run is unfinished or of another kind, or another run not the same by another seed; if the
            weights are too large, or the name is taken or no name.
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
    seeds = {config["seed"]: result}
    for other in map(Path, others):
        theirs, came_to = runs.config_of(other), runs.result_of(other)
        differ = sorted(
            k for k in config.keys() | theirs.keys() if config.get(k) != theirs.get(k) and k not in _MAY_DIFFER
        )
        if not came_to or differ or theirs["seed"] in seeds:
            why = f"differs in {', '.join(differ)}" if differ else "has the same seed"
            why = why if came_to else "is unfinished"
            raise UsageError(f"{other} is not the same as {run} by another seed: it {why}")
        seeds[theirs["seed"]] = came_to
    best = runs.find_checkpoint(run)
    checkpoint, _ = runs.read_checkpoint(best)
    weights = best.model.read_bytes()
    if halved := len(weights) > LARGEST:
        weights = save({key: value.astype(np.float16) for key, value in load(weights).items()})
    if len(weights) > LARGEST:
        size = f"{len(weights) / 1e6:.1f} MB in float16"
        raise UsageError(f"{best.model} has {size}; at most {LARGEST / 1e6:.0f} are shipped")
    text = card(name, config, runs.environment_of(run), seeds, checkpoint, halved)
    runs.write_atomically(folder / "README.md", text.encode())
    about = runs.read_json(best.config) | {"sha256": hashlib.sha256(weights).hexdigest()}
    runs.write_json(folder / best.config.name, about)
    runs.write_atomically(folder / best.model.name, weights)  # last: with it the name is there
    return folder


def card(
    name: str,
    config: dict[str, Any],
    env: dict[str, Any],
    seeds: dict[int, dict[str, Any]],
    checkpoint: dict[str, Any],
    halved: bool,
) -> str:
    """A model card: what the weights are, how they were made, what they reach, licence and limits.

    Args:
        name: of maelab:NAME.
        config, env: the run's config.json and env.json.
        seeds: seed -> result.json, of the run itself first, then of the same by other seeds.
        checkpoint: the fields that `maelab.runs.read_checkpoint` gives.
        halved: whether the weights were rounded to float16.
    """
    height, width = checkpoint["arguments"]["img_size"]
    channels, result = checkpoint["arguments"]["in_chans"], seeds[config["seed"]]
    held_out = "validation images"
    if "validation" not in env.get("data_md5", {}):  # of the data itself
        held_out += f", {config['val_fraction']:.0%} of the training images by split seed {config['split_seed']}"
    if config["task"] == "pretrain":
        what, load = "A masked autoencoder", f"maelab finetune RECIPE --init maelab:{name}"
        metric, sign = "masked_mse", -1
        scores = {
            f"masked MSE, {held_out}; {config['mask_ratio']:.0%} hidden; {result['masked_mse_uses']}": ("val", metric),
            "k-NN accuracy of the unmasked encoder (mean of the patch tokens, 20 neighbours) on at most 1,000 of"
            " these, among at most 2,000 training images": ("val", "knn_accuracy"),
        }
    else:
        what, load = f"A classifier of {len(checkpoint['class_names'])} classes", f"maelab predict maelab:{name} IMAGE"
        metric, sign = "accuracy", 1
        scores = {
            "accuracy on the test images, read once": ("test", metric),
            f"accuracy on {held_out}": ("val", metric),
        }
    head, rows, limits = "| measured | |\n|---|---|", [], "one run of one seed, so no spread is known."
    for text, (part, key) in scores.items():
        values = [of.get(part, {}).get(key) for of in seeds.values()]
        if values[0] is not None:
            rows.append(f"| {text} | {values[0]:.4f} |")
            if None in values:
                rows[-1] += " - |"
            elif len(seeds) > 1:
                rows[-1] += f" {statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f} |"
    if len(seeds) > 1:
        spread = f"mean ± standard deviation of seeds {', '.join(map(str, sorted(seeds)))}"
        if len(inits := {Path(of.get("init", "none")).name for of in seeds.values()}) == 1 and inits != {"none"}:
            spread += " of the fine-tuning alone"
        head = f"| measured | | {spread} |\n|---|---|---|"
        best = max(sign * of["val"][metric] for of in seeds.values()) == sign * result["val"][metric]
        limits = f"{'the best on validation' if best else 'one'} of {len(seeds)} seeds"
        limits += ", so its own figures may be better than the next run's." if best else "."
    rounded = "\n\nMeasured before the weights were rounded to float16." if halved else ""
    return f"""# maelab:{name}

{what} of {result["params"]:,} parameters, trained on {result["data"]} by maelab.

    {load}

- Data: {result["data"]}; {json.dumps(env.get("data_md5", {}))} (MD5)
- Command: `{runs.command(config)}`
- Recipe {config["recipe"]}, seed {config["seed"]}, epoch {result["best_epoch"]} of {result["epochs"]}, the best on
  validation; {result["train_time_s"]:.0f} s, {env.get("hardware", "unknown hardware")}, {env.get("cpu", "unknown CPU")}
- maelab {env.get("maelab")} (commit {env.get("git_commit")}), torch {env.get("torch")}, Python {env.get("python")}

{head}
{chr(10).join(rows)}{rounded}

Limits: {limits} It has seen {result["data"]} alone, {height}x{width} pixels with
{channels} channel{"s" * (channels > 1)} scaled to [-1, 1]; what it makes of other images is not tested.
Do not base decisions about people on it.

Licence of the weights: MIT, as maelab. The images have the licence of their source.

The whole config:

```json
{json.dumps(config, indent=1)}
```
"""
