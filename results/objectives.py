"""Which pretraining objective is best for a minute of a core: each gets the same wall time, then the same fine-tuning.

    python results/objectives.py time          # what a step of each takes beside the recipe's, in turns; time NAME ...
    python results/objectives.py run           # all of it, two at a time, each on one thread; run cifar10
    python results/objectives.py table         # results/objectives.json as a table

An objective differs from the recipe of the data set in one thing, or two. It sees as many images as take as long as the
recipe's do; its encoder then learns from few labels, those of the seed, and validation images judge it. Runs lie in
runs/results; what was stopped goes on where it was.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from make import WORK

from maelab import bench, recipes
from maelab.config import FinetuneConfig, PretrainConfig, RunOptions
from maelab.files import read_json
from maelab.model import MaskedAutoencoderViT
from maelab.model.vit import take_tokens
from maelab.runs import write_json
from maelab.tasks.finetune import finetune
from maelab.tasks.pretrain import pretrain

OUTCOMES = Path(__file__).parent / "objectives.json"
SEEDS = (0, 1, 2)
VAL_FRACTION, BINS, TEMPERATURE, TURNS, STEPS = 0.1, 9, 0.2, 9, 4
FAR = 0.015  # of accuracy behind the recipe
PASSES = 2  # of the recipe over the images
IMAGES = {"mnist": 54_000, "cifar10": 45_000}  # without those for validation
FEW: dict[str, dict[str, Any]] = {  # labels, and how long to learn from them
    "mnist": {"label_fraction": 0.02, "epochs": 20, "batch_size": 64},
    "cifar10": {"label_fraction": 0.1, "epochs": 6, "batch_size": 128},
}


@dataclass(frozen=True)
class Objective:
    """What is not the recipe's: fields of its config, which patches are hidden, and what is compared there."""

    changes: dict[str, Any] = field(default_factory=dict)
    hide: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor] | None = None  # noise (B, L) and grid -> (B, L)
    target: Callable[[torch.Tensor, int], torch.Tensor] | None = None  # images and patch size -> (B, L, n)
    decoded: float = 1.0  # share of the hidden patches that are decoded
    visible: float = 0.0  # weight of the visible patches' loss, where the hidden ones have 1
    views: int = 0  # of each image, varied anew; 0 takes the recipe's
    contrast: float = 0.0  # weight of telling images apart by two views


def tiles(side: int) -> Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]:
    """Hide squares of side x side patches, as Pixio does with 4 x 4; those at the border are cut."""

    def hide(noise: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        cells = noise.unflatten(1, grid)  # (B, rows, columns)
        coarse = cells[:, ::side, ::side].repeat_interleave(side, 1).repeat_interleave(side, 2)
        return (coarse[:, : grid[0], : grid[1]] + 1e-4 * cells).flatten(1)

    return hide


def one_block(noise: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Hide one square around a random place: the patches that are nearest to it."""
    rows, columns = (torch.arange(side, device=noise.device) for side in grid)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)  # (L, 2)
    away = (places - places[noise.argmax(1)][:, None]).abs().amax(-1)  # (B, L)
    return 1e-4 * noise - away


def oriented_gradients(imgs: torch.Tensor, p: int) -> torch.Tensor:
    """For each patch and channel, how strong edges of nine directions are, of length 1 (HOG, as in MaskFeat, Wei et al.
    2021, section 3.1): images (B, C, H, W) -> (B, L, 9 * C)."""
    padded = F.pad(imgs, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    bins = ((torch.atan2(down, across) / torch.pi * BINS).floor() % BINS).long()
    votes = torch.zeros(*imgs.shape[:2], BINS, *imgs.shape[2:], device=imgs.device)
    votes.scatter_(2, bins[:, :, None], across.hypot(down)[:, :, None])  # (B, C, 9, H, W)
    cells = F.avg_pool2d(votes.flatten(1, 2), p).unflatten(1, (-1, BINS))
    return F.normalize(cells, dim=2).flatten(1, 2).flatten(2).mT


def view(imgs: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) varied anew: cut to 30 to 100 % of their area; coloured ones mirrored, brighter or darker,
    with more or less contrast and colour, a fifth of them grey; others turned by up to 15 degrees."""
    B, C = imgs.shape[:2]
    low, coloured = torch.tensor([0.3, -1, -1, -1, 0.6, 0.6, 0.0, 0.0]), C == 3
    high = torch.tensor([1.0, 1, 1, 1, 1.4, 1.4, 1.4, 1.0])
    area, right, down, turn, brightness, contrast, colour, fifth = (low + (high - low) * torch.rand(B, 8)).T
    side = area.sqrt()
    across = side * turn.sign() if coloured else side
    angle = torch.zeros(B) if coloured else turn * torch.pi / 12
    theta = torch.stack([
        across * angle.cos(), -side * angle.sin(), right * (1 - side),
        across * angle.sin(), side * angle.cos(), down * (1 - side),
    ], 1).view(B, 2, 3)  # fmt: skip
    grid = F.affine_grid(theta.to(imgs), list(imgs.shape), align_corners=False)
    imgs = F.grid_sample(imgs, grid, padding_mode="border", align_corners=False)
    if not coloured:
        return imgs
    brightness, contrast, colour = (
        v.view(B, 1, 1, 1).to(imgs) for v in (brightness, contrast, torch.where(fifth < 0.2, 0.0, colour))
    )
    imgs = (imgs + 1) * brightness - 1
    mean = imgs.mean((1, 2, 3), keepdim=True)
    imgs = mean + contrast * (imgs - mean)
    grey = imgs.mean(1, keepdim=True)
    return (grey + colour * (imgs - grey)).clamp(-1, 1)


def told_apart(x: torch.Tensor) -> torch.Tensor:
    """How badly each image is found by its other view among the batch's: InfoNCE (van den Oord et al. 2018) both ways.

    x: (2 * B, D), the first views of B images and then the second ones.
    """
    one, other = F.normalize(x.float(), dim=1).chunk(2)
    logits = one @ other.T / TEMPERATURE
    right = torch.arange(len(logits), device=x.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


OBJECTIVES = {
    "mnist": {"normalised pixels": Objective({"norm_pix_loss": True})},
    "cifar10": {"pixels as they are": Objective({"norm_pix_loss": False})},
}
for _own in OBJECTIVES.values():
    _own |= {
        "recipe": Objective(),
        **{f"{ratio:.0%} hidden": Objective({"mask_ratio": ratio}) for ratio in (0.5, 0.6, 0.9)},
        "squares of 2 x 2 patches hidden": Objective(hide=tiles(2)),
        "squares of 4 x 4 patches hidden": Objective(hide=tiles(4)),
        "one block hidden": Objective(hide=one_block),
        **{f"decoder of {depth}": Objective({"decoder_depth": depth}) for depth in (1, 4)},
        "half of the hidden decoded": Objective(decoded=0.5),
        "visible patches compared at 0.1": Objective(visible=0.1),
        "decoder of 1, 90% hidden": Objective({"decoder_depth": 1, "mask_ratio": 0.9}),
        "decoder of 1, visible patches compared at 0.1": Objective({"decoder_depth": 1}, visible=0.1),
        "oriented gradients": Objective(target=oriented_gradients),
        "stronger views": Objective(views=1),
        "two views, told apart at 0.1": Objective(views=2, contrast=0.1),
        "two views, told apart at 1": Objective(views=2, contrast=1.0),
    }
SCRATCH = "no pretraining, as much more fine-tuning"


def loss_of(objective: Objective) -> Callable[..., torch.Tensor]:
    """`MaskedAutoencoderViT.training_loss` for an objective."""

    def training_loss(
        self: MaskedAutoencoderViT, imgs: torch.Tensor, mask_ratio: float, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        if objective.views:
            imgs = torch.cat([view(imgs) for _ in range(objective.views)])
            noise = torch.cat([noise, torch.rand(len(imgs) - len(noise), self.num_patches, device=imgs.device)])
        noise = objective.hide(noise, self.grid_size) if objective.hide else noise
        ids, keep = self._ids(imgs, mask_ratio, noise, None)
        patches = self.to_patches(imgs)  # (B, L, p * p * C)
        x = self.decoder_embed(self.encode(patches, ids[:, :keep]))
        apart = objective.contrast * told_apart(x.mean(1)) if objective.contrast else 0.0
        hidden = round(objective.decoded * (self.num_patches - keep))
        ids = ids[:, : keep + hidden]  # those that are decoded, the visible ones first
        x = torch.cat([x, self.mask_token.expand(len(x), hidden, -1).to(x.dtype)], dim=1)
        x = x + self.decoder_pos_embed[0][ids].to(x.dtype)
        tail = x.shape[1] if objective.visible else hidden
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, tail=tail)
        target = objective.target(imgs, self.patch_size) if objective.target else self.target(patches)
        target = take_tokens(target, ids[:, -tail:])
        pred = self.decoder_pred(self.decoder_norm(x)).float()[..., : target.shape[-1]]
        losses = (pred - target).square().mean(-1)  # (B, tail)
        if objective.visible:
            weight = torch.full_like(losses[0], objective.visible)
            weight[keep:] = 1
            losses = losses * weight / weight.mean()
        return losses.mean() + apart

    return training_loss


@contextmanager
def swapped(objective: Objective) -> Iterator[None]:
    """While it lasts, masked autoencoders learn by this objective."""
    own = MaskedAutoencoderViT.training_loss
    MaskedAutoencoderViT.training_loss = loss_of(objective)
    try:
        yield
    finally:
        MaskedAutoencoderViT.training_loss = own


def pretraining(data: str, objective: Objective, images: int, seed: int = 0) -> PretrainConfig:
    """The recipe with an objective, to see so many images: some of them in whole passes."""
    recipe = recipes.pretrain_mnist() if data == "mnist" else recipes.pretrain_cifar10()
    epochs = -(-images // IMAGES[data])
    return replace(
        recipe, **objective.changes, seed=seed, split_seed=seed, val_fraction=VAL_FRACTION, knn_every=0, batch_size=128,
        epochs=epochs, limit=images // epochs, warmup_epochs=0.1 * epochs,
    )  # fmt: skip


def finetuning(data: str, init: str, seed: int, more: float = 1.0) -> FinetuneConfig:
    recipe = recipes.finetune_mnist() if data == "mnist" else recipes.finetune_cifar10()
    few = FEW[data] | {"epochs": round(more * FEW[data]["epochs"])}
    return replace(
        recipe, init=init, seed=seed, split_seed=seed, val_fraction=VAL_FRACTION, keep="last", **few
    )  # fmt: skip


def measure(data: str, *names: str) -> dict[str, float]:
    """Seconds an image takes of a core by each objective, and in fine-tuning, or by those named: the recipe's, times
    the median over turns of the ratio to the recipe's steps just before and after."""
    recipe = pretraining(data, OBJECTIVES[data]["recipe"], IMAGES[data])
    noise, few = bench.noise_images(recipe, "cpu"), finetuning(data, "none", 0)
    steps = {name: (each, replace(recipe, **each.changes)) for name, each in OBJECTIVES[data].items()}
    steps |= {SCRATCH: (Objective(), few)}
    steps = {name: steps[name] for name in {"recipe": None} | dict.fromkeys(names or steps)}
    ready = {name: (each, bench.our_step(config, noise, "cpu"), config) for name, (each, config) in steps.items()}

    def seconds(name: str) -> float:
        objective, step, config = ready[name]
        with swapped(objective):
            begun = time.perf_counter()
            for number in range(STEPS):
                step(number)
        return (time.perf_counter() - begun) / STEPS / config.batch_size

    ratios: dict[str, list[float]] = {name: [] for name in ready}
    recipes_own = [seconds("recipe") for _ in range(3)]
    for _ in range(TURNS):
        for name in ready:
            own = seconds(name)
            recipes_own.append(seconds("recipe"))
            ratios[name].append(2 * own / sum(recipes_own[-2:]))
    base = statistics.median(recipes_own)
    return {name: base * statistics.median(values[1:]) for name, values in ratios.items()}


def train(data: str, name: str, seed: int) -> None:
    """Pretrain and fine-tune, or go on with it."""
    seconds = read_json(OUTCOMES)["seconds"][data]
    folder = WORK / "objectives" / data / name.replace(" ", "-").replace("%", "") / f"s{seed}"
    budget = PASSES * IMAGES[data] * seconds["recipe"]  # seconds
    if name == SCRATCH:
        few = FEW[data]
        more = 1 + budget / seconds[SCRATCH] / (few["label_fraction"] * IMAGES[data] * few["epochs"])
        config = finetuning(data, "none", seed, more)
    else:
        objective = OBJECTIVES[data][name]
        with swapped(objective):
            config = pretraining(data, objective, int(budget / seconds[name]), seed)
            pretrain(config, options=RunOptions(out=folder / "pretrain", threads=1))
        config = finetuning(data, str(folder / "pretrain"), seed)
    _, result = finetune(config, options=RunOptions(out=folder / "finetune", threads=1))
    print(json.dumps({"data": data, "objective": name, "seed": seed, "accuracy": result["val"]["accuracy"]}))


def run_all(*sets: str, jobs: int = 2) -> None:
    """What is not known yet of these data sets, one seed after the other; who is far behind with the first gets no
    other."""
    outcomes = read_json(OUTCOMES)
    known: dict[str, dict[str, dict[str, float]]] = outcomes.setdefault("accuracy", {})

    def wanted(data: str, name: str, seed: int) -> bool:
        of = known.setdefault(data, {}).setdefault(name, {})
        behind = seed > SEEDS[0] and known[data]["recipe"]["0"] - of.get("0", 0) > FAR
        return str(seed) not in of and not behind

    def accuracy(task: tuple[str, str, int]) -> float:
        words = [sys.executable, __file__, "one", *map(str, task)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])["accuracy"]

    for seed in SEEDS:
        every = [(data, name, seed) for data in sets for name in [*OBJECTIVES[data], SCRATCH]]
        todo = [task for task in every if wanted(*task)]
        with ThreadPoolExecutor(jobs) as pool:
            for (data, name, _), reached in zip(todo, pool.map(accuracy, todo), strict=True):
                known[data][name][str(seed)] = reached
                write_json(OUTCOMES, outcomes)


def table() -> str:
    """Markdown: the time an image takes, and how many points of accuracy each objective gains over the recipe with the
    same images and labels, mean ± standard deviation (seeds); of the recipe its accuracy."""
    outcomes = read_json(OUTCOMES)
    heads = [f"{data}: {what}" for data in OBJECTIVES for what in ("time an image", "points")]
    lines = ["| objective | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for name in [*dict.fromkeys(name for data in OBJECTIVES for name in [*OBJECTIVES[data], SCRATCH])]:
        cells = []
        for data in OBJECTIVES:
            seconds, accuracy = outcomes["seconds"][data], outcomes["accuracy"][data]
            recipe = accuracy["recipe"]
            values = {seed: value for seed, value in accuracy.get(name, {}).items() if seed in recipe}
            gains = [100 * (value - recipe[seed]) for seed, value in values.items()]
            shown = f"{statistics.mean(gains):+.1f}" if gains else "-"
            shown += f" ± {statistics.stdev(gains):.1f}" if len(gains) > 1 else ""
            shown = ", ".join(f"{value:.4f}" for value in values.values()) if name == "recipe" else shown
            cost = f"{seconds[name] / seconds['recipe']:.2f}" if name in seconds and name != SCRATCH else "-"
            cells += [cost, f"{shown} ({len(values)})" if gains else "-"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    match sys.argv[1:]:
        case ["time", *names]:
            torch.set_num_threads(1)
            outcomes = read_json(OUTCOMES)
            before = outcomes.setdefault("seconds", {})
            for data in OBJECTIVES:
                seconds = measure(data, *names)
                if names:  # those that were measured before stay as they are
                    base = before[data]["recipe"] / seconds["recipe"]
                    seconds = before[data] | {name: base * seconds[name] for name in names}
                before[data] = seconds
            write_json(OUTCOMES, outcomes)
        case ["one", data, name, seed]:
            train(data, name, int(seed))
        case ["run", *sets]:
            run_all(*(sets or OBJECTIVES))
        case ["table"]:
            print(table())
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
