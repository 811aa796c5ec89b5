"""What bfloat16 does to training: loss curves from the same start, images and masks in float32, under torch's own
autocast, and with maelab's kernels. `python bench/precision.py [--steps 200] [--threads 2]` prints one JSON object."""

import argparse
import json
import sys
from dataclasses import replace

import torch

from maelab import recipes
from maelab.bench import VIT_T
from maelab.config import PretrainConfig
from maelab.data import load
from maelab.data.augment import augment
from maelab.data.batches import batch_index, step_generator
from maelab.tasks.pretrain import model_spec
from maelab.training import blocks
from maelab.training.optim import build_optimizers, schedule, set_learning_rate

MODES = ("fp32", "autocast", "native")
WINDOW = 20  # steps that are averaged: single ones scatter


def losses(config: PretrainConfig, mode: str, steps: int) -> list[float]:
    """The loss of every step of a run from scratch."""
    data = load(config.data)
    torch.manual_seed(config.seed)
    model = model_spec(config, data).build().train()
    if mode == "native":
        blocks.install(model)
    optimizers = build_optimizers(model, config)
    curve = []
    for step in range(steps):
        set_learning_rate(optimizers, schedule(step, steps, steps // 10))
        generator = step_generator(config.seed, step)
        index = batch_index(len(data.train), config.batch_size, config.seed, step)
        images = augment(data.train.images, index, config, generator)
        noise = torch.rand(len(images), model.num_patches, generator=generator)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16, enabled=mode != "fp32"):
            loss = model.training_loss(images, config.mask_ratio, noise)  # type: ignore[operator]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        curve.append(float(loss.detach()))
        if step % WINDOW == WINDOW - 1:
            print(f"{config.data} {mode} step {step + 1}: {curve[-1]:.4f}", file=sys.stderr)
    return curve


def deviation(curve: list[float], reference: list[float]) -> float:
    """Largest relative difference of the means over WINDOW steps."""
    windows = [slice(i, i + WINDOW) for i in range(0, len(curve), WINDOW)]
    return max(abs(sum(curve[w]) / sum(reference[w]) - 1) for w in windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = {
        "mae-mnist": recipes.pretrain_mnist(),
        "mae-vit-t-32": replace(PretrainConfig(data="cifar10", **VIT_T), batch_size=32),
    }
    result = {}
    for name, config in cases.items():
        curves = {mode: losses(config, mode, arguments.steps) for mode in MODES}
        result[name] = {mode: round(deviation(curves[mode], curves["fp32"]), 5) for mode in MODES[1:]}
    print(json.dumps({"steps": arguments.steps, "window": WINDOW, "largest_deviation_from_fp32": result}))


if __name__ == "__main__":
    main()
