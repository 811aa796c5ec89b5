"""What of an MNIST autoencoder carries over to CIFAR-10: the same fine-tuning from parts of it, with 10% of the labels.

    make results PART="mae-mnist-s0 share10-scratch-s0 share10-mnist-s0"   # and seeds 1 and 2: none of it, and all
    python results/arms.py blocks-s0 blocks-1-s0                           # ARM-sSEED; without names all of them

Each seed has an autoencoder and labelled images of its own. Prints a line of JSON for each run; runs lie in
runs/results beside those of make.py, and what was stopped goes on where it was.
"""

import json
import shlex
import subprocess
import sys

import torch
from make import SHARES, WORK

from maelab import recipes
from maelab.data import load
from maelab.model import VisionTransformer
from maelab.model.vit import patchify
from maelab.tasks.finetune import model_spec
from maelab.training.checkpoint import load_model, save_model
from maelab.weights import PATCH_WEIGHT, load_encoder

ARMS = ("embedding", "blocks", "blocks-matched", "blocks-1", "blocks-3")
PATCH_BIAS = "patch_embed.proj.bias"


def scrambled(state: dict[str, torch.Tensor], patches: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """A patch embedding that knows nothing, whose tokens have the mean and the covariance of the given one's.

    With W the given embedding and S the patches' covariance, W S^(1/2) Q S^(-1/2) has the covariance W S W^T for every
    orthogonal Q; Q is drawn evenly from all of them.

    Args:
        state: of the encoder; its patch embedding is what to imitate.
        patches: (N, p * p * C), in the order of `patchify`.
        seed: of Q.

    Returns:
        Weight and bias of the patch embedding.
    """
    D, C, p, _ = state[PATCH_WEIGHT].shape
    given = state[PATCH_WEIGHT].permute(0, 2, 3, 1).flatten(1).double()  # (D, p * p * C)
    mean, (values, axes) = patches.double().mean(0), torch.linalg.eigh(torch.cov(patches.double().T))
    root = axes * values.sqrt() @ axes.T
    drawn = torch.randn(len(root), len(root), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    new = given @ root @ (q * r.diagonal().sign()) @ torch.linalg.inv(root)
    bias = state[PATCH_BIAS].double() + (given - new) @ mean
    weight = new.reshape(D, p, p, C).permute(0, 3, 1, 2)
    return {PATCH_WEIGHT: weight.float().contiguous(), PATCH_BIAS: bias.float()}


def taken(arm: str, state: dict[str, torch.Tensor], patches: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """What of the pretrained encoder an arm begins with; the rest is drawn anew."""
    embedding = {name: value for name, value in state.items() if name.startswith("patch_embed.")}
    blocks = {name: value for name, value in state.items() if name.startswith("blocks.")}
    match arm.split("-"):
        case ["embedding"]:
            return embedding
        case ["blocks"]:
            return blocks
        case ["blocks", "matched"]:
            return blocks | scrambled(state, patches, seed)
        case ["blocks", number]:
            return embedding | {name: v for name, v in blocks.items() if int(name.split(".")[1]) < int(number)}
    raise SystemExit(f"{arm} is none of {', '.join(ARMS)}")


def origin(arm: str, seed: int) -> str:
    """Where fine-tuning begins from: a model of CIFAR-10's shape with what the arm takes."""
    folder = WORK / f"from-{arm}-s{seed}"
    data = load("cifar10")
    spec = model_spec(recipes.finetune_cifar10(), data)
    model, (source, _) = spec.build(), load_model(WORK / f"mae-mnist-s{seed}")
    assert isinstance(model, VisionTransformer) and isinstance(source, VisionTransformer)
    load_encoder(model, source)
    patches = patchify(data.train.images[:2000] / 127.5 - 1, model.patch_size).flatten(0, 1)
    torch.manual_seed(1000 + seed)  # not the seed that fine-tuning builds its model by
    fresh = spec.build().state_dict()
    save_model(folder, spec, fresh | taken(arm, model.state_dict(), patches, seed))
    return str(folder)


def main() -> None:
    for name in sys.argv[1:] or [f"{arm}-s{seed}" for seed in (0, 1, 2) for arm in ARMS]:
        arm, _, seed = name.rpartition("-s")
        line = f"finetune cifar10{SHARES['share10']} --seed {seed} --split-seed {seed} --threads 1 --json"
        words = [*shlex.split(line), "--init", origin(arm, int(seed)), "--out", str(WORK / f"arm-{name}")]
        done = subprocess.run([sys.executable, "-m", "maelab", *words], check=True, stdout=subprocess.PIPE)
        result = json.loads(done.stdout)
        figures = {"arm": arm, "seed": int(seed), "test": result["test"]["accuracy"], "val": result["val"]["accuracy"]}
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
