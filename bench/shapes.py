"""Speed over batch sizes and shapes: where the native kernels serve, where they refuse, and what that costs.

    python bench/shapes.py [FILE.json]

prints images per second of whole training steps, medians of turns in one process: maelab as it chooses, maelab in torch
alone (`--kernels torch`), and Hugging Face's model of the same shape in float32.
"""

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from maelab import bench, native
from maelab.config import FinetuneConfig, PretrainConfig

TURNS = 3
MAE, MNIST = bench.cases()["mae-vit-t-32"], bench.cases()["mae-mnist"]
CASES: dict[str, PretrainConfig | FinetuneConfig] = {
    **{f"ViT-T autoencoder, batch {b}": dataclasses.replace(MAE, batch_size=b) for b in (16, 64, 256, 512)},
    **{f"recipe mnist, batch {b}": dataclasses.replace(MNIST, batch_size=b) for b in (16, 128, 512)},
    "width 160, 5 heads": dataclasses.replace(MAE, embed_dim=160, num_heads=5, batch_size=64),
    "width 200, 5 heads: refused": dataclasses.replace(MAE, embed_dim=200, num_heads=5, batch_size=64),
    "width 192, heads of 24: refused": dataclasses.replace(MAE, num_heads=8, batch_size=64),
    "width 384, 6 heads": dataclasses.replace(MAE, embed_dim=384, num_heads=6, batch_size=32),
    "patches of 2, 257 tokens": dataclasses.replace(MAE, patch_size=2, depth=4, batch_size=32),
}  # fmt: skip


def measure(config: PretrainConfig | FinetuneConfig) -> dict[str, float]:
    """Images per second of each contestant, by name."""
    data = bench.noise_images(config, "cpu")
    steps = {"maelab": bench.our_step(config, data, "cpu")}
    steps["torch alone"] = bench.our_step(config, data, "cpu", kernels="torch")
    steps["Hugging Face"] = bench._peer_step(config, data, "cpu", bf16=False)
    times: dict[str, list[float]] = {who: [] for who in steps}
    for turn in range(TURNS + 1):
        for who, step in steps.items():
            begun, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - begun < 1:
                step(turn)
                count += 1
            times[who].append((time.perf_counter() - begun) / count)
    return {who: config.batch_size / statistics.median(taken[1:]) for who, taken in times.items()}


def main(arguments: list[str]) -> None:
    print(f"{native.reason()}, {torch.get_num_threads()} threads")
    results = {}
    for name, config in CASES.items():
        results[name] = {who: round(rate, 1) for who, rate in measure(config).items()}
        print(name, results[name], flush=True)
    if arguments:
        held = {"kernels": native.reason(), "threads": torch.get_num_threads(), "images_per_s": results}
        Path(arguments[0]).write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
