"""Training from shards with many small images: `python bench/shards.py WORK --images 1000000`.

It makes so many images of 32 x 32, writes them into shards, reads batches from them, trains for a minute, is killed and
goes on. What came out is written to bench/shards-DATE.json. WORK needs 5 GB of disk for each million, and 2 to 3 hours
of two cores; what is there already is used again.
"""

import argparse
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from maelab import recipes
from maelab.config import RunOptions
from maelab.data import load, training_sets
from maelab.data.batches import batch_index
from maelab.tasks.pretrain import make_step, model_spec
from maelab.training.parallel import prepare, start_engine
from maelab.training.runlog import environment

CLASSES = 100


def make_images(folder: Path, first: int, last: int) -> None:
    """PNGs of blurred noise in colours, as large as photographs of this size; a comment makes each another file."""
    rng, pictures = np.random.default_rng(first), []
    for _ in range(200):
        rough = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        pixels = np.asarray(rough, np.int16) + rng.integers(-8, 9, (32, 32, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
        pictures.append(file.getvalue())
    for number in range(first, last):
        place = folder / f"class-{number % CLASSES:02d}" / f"{number // 10_000:03d}"
        if number < first + CLASSES:
            place.mkdir(parents=True, exist_ok=True)
        content, text = pictures[number % len(pictures)], b"tEXtComment\0%d" % number
        comment = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
        (place / f"{number:07d}.png").write_bytes(content[:-12] + comment + content[-12:])


def run(*command: object, seconds: float | None = None, kill: bool = False) -> dict[str, Any]:
    """Run a command; after `seconds` interrupt or kill it. Its wall time, its peak memory, and its last lines."""
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "maelab", *map(str, command)], stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status")
        if status.exists() and (found := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
            peak = max(peak, int(found[1]))
        if seconds is not None and time.monotonic() - begun > seconds:
            process.send_signal(signal.SIGKILL if kill else signal.SIGINT)
            seconds = None
        time.sleep(0.2)
    assert process.stderr is not None
    lines = process.stderr.read().splitlines()
    return {
        "seconds": time.monotonic() - begun,
        "peak_gib": peak / 2**20,
        "status": process.returncode,
        "said": lines[-3:],
    }


def read_batches(data: Any, batch: int, count: int) -> list[float]:
    times = []
    for step in range(count):
        index = batch_index(len(data), batch, 0, step)
        begun = time.perf_counter()
        data.images[index]
        times.append(time.perf_counter() - begun)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--images", type=int, default=1_000_000)
    asked = parser.parse_args()
    own, shards = asked.work / "images", asked.work / "shards"
    result: dict[str, Any] = {"images": asked.images}
    if not (asked.work / "made").exists():
        begun = time.monotonic()
        step = 10_000
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            starts = range(0, asked.images, step)
            list(pool.map(make_images, [own] * len(starts), starts, [min(s + step, asked.images) for s in starts]))
        (asked.work / "made").touch()
        print(f"made {asked.images} images in {time.monotonic() - begun:.0f} s", flush=True)
    if not shards.exists():
        result["write"] = run("data", "shard", own, shards)
        print(result["write"], flush=True)
    result["bytes"] = sum(file.stat().st_size for file in shards.iterdir())

    config = recipes.pretrain_cifar10()
    begun = time.monotonic()
    data = load(f"folder:{shards}", img_size=(32, 32))
    train, _ = training_sets(data, config)
    result["load_s"] = time.monotonic() - begun
    engine = start_engine(RunOptions())
    spec = model_spec(config, data)
    model: Any = spec.build()
    result["where"] = environment(prepare(model, engine, RunOptions()), {}, None)
    few = train[torch.arange(2_000)]
    memory = type(train)(few.images[:], few.labels)
    seconds: dict[str, list[float]] = {"shards": [], "memory": []}
    for turn in range(4):  # in turn, and the first is for warming up
        for name, images in (("shards", train), ("memory", memory)):
            step = make_step(config, images, model.num_patches)
            for number in range(6):
                begun = time.perf_counter()
                loss = step.loss(model, *step.batch(100 * turn + number, 0, 1))["loss"]
                loss.backward()
                seconds[name] += [time.perf_counter() - begun] if turn and number else []
    alone = read_batches(train, config.batch_size, 20)
    result["step_s"] = {name: statistics.median(times) for name, times in seconds.items()}
    result["batch"], result["read_batch_s"] = config.batch_size, statistics.median(alone)
    result["read_images_per_s"] = config.batch_size / result["read_batch_s"]
    print(result, flush=True)
    line = ("pretrain", "folder", "--data", f"folder:{shards}", "--knn-every", 0, "--out", asked.work / "run")
    result["train"] = run(*line, seconds=180)
    result["killed"] = run(*line, seconds=60, kill=True)
    result["again"] = run(*line, seconds=60)
    place = Path(__file__).parent / f"shards-{time.strftime('%Y-%m-%d')}.json"
    place.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
