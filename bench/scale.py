"""What docs/scale.md reckons with: `python bench/scale.py WORK`, 3 minutes of two cores, 17 GB of disk.

Photographs of 500 x 375 from shards to 224 x 224; steps of the paper's models on them; their checkpoints; and how long
a training over very many images takes to begin, with an index made up for images that are not there. What came out is
written to bench/scale-DATE.json.
"""

import argparse
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from maelab import recipes
from maelab.config import RunOptions
from maelab.data import load, training_sets
from maelab.data.batches import epoch_order
from maelab.data.sharding import shard
from maelab.data.shards import COLUMNS, Index, read_index, write_index
from maelab.runs import Run
from maelab.runs.checkpoints import TRAINING
from maelab.tasks.pretrain import make_step, model_spec
from maelab.training.checkpoint import portable
from maelab.training.optim import build_optimizers
from maelab.training.parallel import prepare, start_engine
from maelab.training.runlog import environment

PHOTOS, SIDES, CLASSES = 600, (500, 375), 10
ENCODERS = {"ViT-S/16": (384, 12, 6), "ViT-B/16": (768, 12, 12), "ViT-L/16": (1024, 24, 16)}  # width, depth, heads
DECODER = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}  # He et al. 2021, section 4.1
BATCH, STEPS = 64, 3
MANY = 10_000_000


def make_photos(folder: Path) -> float:
    """JPEGs of blurred noise with grain, about as many bytes each as a photograph of ImageNet. Their mean size."""
    rng, sizes = np.random.default_rng(0), []
    for number in range(PHOTOS):
        rough = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize(SIDES, Image.Resampling.BICUBIC)
        pixels = np.asarray(rough, np.int16) + rng.integers(-14, 15, (SIDES[1], SIDES[0], 3))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        place = folder / f"class-{number % CLASSES}" / f"{number:04d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.getvalue())
        sizes.append(file.tell())
    return statistics.fmean(sizes)


def model_at_work(name: str, data: Any, work: Path) -> dict[str, Any]:
    """Images per second of whole training steps, and what a checkpoint takes."""
    width, depth, heads = ENCODERS[name]
    config = replace(
        recipes.pretrain_folder(images=PHOTOS, img_size=(224, 224)), patch_size=16, embed_dim=width, depth=depth,
        num_heads=heads, batch_size=BATCH, **DECODER,
    )  # fmt: skip
    train, _ = training_sets(data, config)
    few = train[torch.arange(4 * BATCH)]
    images = type(train)(few.images[:], few.labels)
    engine, spec = start_engine(RunOptions()), model_spec(config, data)
    model: Any = spec.build()
    hardware = prepare(model, engine, RunOptions())
    optimizers = build_optimizers(model, config)
    step, times = make_step(config, images, model.num_patches), []
    for number in range(STEPS):
        begun = time.perf_counter()
        with engine.autocast():
            loss = step.loss(model, *step.batch(number, 0, 1))["loss"]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
    run = Run(work / name.replace("/", "-"), {})
    run.folder.mkdir(exist_ok=True)
    state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    files: dict[str, Any] = {
        f"{kind}/{file}": content
        for file, content in portable(spec, model.state_dict()).items()
        for kind in ("best", "last")
    }
    begun = 0.0  # of the last commit
    for _ in range(2):  # a run folder holds the commit before the last too
        begun = time.perf_counter()
        run.commit(files | {f"last/{TRAINING}": lambda place: torch.save(state, place)}, {"step": STEPS})
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizer": config.optimizer,
        "hardware": hardware,
        "images_per_s": BATCH / min(times[1:]),
        "save_s": time.perf_counter() - begun,
        "checkpoint_bytes": sum(file.stat().st_size for file in run.folder.rglob("*") if file.is_file()),
    }


def make_index(folder: Path, like: Path) -> int:
    """An index of `MANY` images in shards that are as long as they should be, and empty. Its size in bytes."""
    old, rng = read_index(like), np.random.default_rng(0)
    each = 100_000
    shards = {f"train-{number:06d}.tar": each * 4096 for number in range(MANY // each)}
    folder.mkdir(exist_ok=True)
    for name, size in shards.items():
        with open(folder / name, "wb") as file:
            file.truncate(size)
    columns = {name: np.zeros(MANY, kind) for name, kind in COLUMNS.items()}
    columns["shard"][:], columns["size"][:] = np.arange(MANY) // each, 4096
    columns["offset"][:] = np.arange(MANY) % each * 4096
    columns["label"][:] = np.arange(MANY) % CLASSES
    for name in ("key", "group", "path"):
        columns[name][:] = rng.integers(-(2**63), 2**63, MANY)
    write_index(folder, Index(**(vars(old) | {"columns": columns, "shards": shards, "given": False})))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def begin(folder: Path) -> None:
    """Load an index, choose the parts and the order of an epoch, and say in JSON what that took."""
    begun = time.perf_counter()
    train, _ = training_sets(load(f"folder:{folder}", img_size=(224, 224)), recipes.pretrain_folder())
    loaded = time.perf_counter() - begun
    epoch_order(len(train), 0, 0)
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert peak is not None
    ordered = time.perf_counter() - begun - loaded
    print(json.dumps({"load_s": loaded, "order_s": ordered, "peak_gib": int(peak[1]) / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--begin", action="store_true", help="load WORK, and say what that takes")
    asked = parser.parse_args()
    if asked.begin:
        return begin(asked.work)
    photos, shards, many = (asked.work / name for name in ("photos", "shards", "many"))
    result: dict[str, Any] = {"photo_bytes": make_photos(photos)}
    if not shards.exists():
        shard(photos, shards)
    data = load(f"folder:{shards}", img_size=(224, 224))
    times = []
    for first in range(0, 480, 96):
        begun = time.perf_counter()
        data.train.images[torch.arange(first, first + 96)]
        times.append((time.perf_counter() - begun) / 96)
    result["read_images_per_s"], result["cores"] = 1 / statistics.median(times), os.cpu_count()
    print(result, flush=True)
    result["models"] = {}
    for name in ENCODERS:
        result["models"][name] = model_at_work(name, data, asked.work)
        print(name, result["models"][name], flush=True)
    result["many"] = {"images": MANY, "index_bytes": make_index(many, shards)}
    said = subprocess.run([sys.executable, __file__, many, "--begin"], stdout=subprocess.PIPE, check=True, text=True)
    result["many"] |= json.loads(said.stdout)
    result["where"] = environment(result["models"]["ViT-B/16"]["hardware"], {}, None)
    place = Path(__file__).parent / f"scale-{time.strftime('%Y-%m-%d')}.json"
    place.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
