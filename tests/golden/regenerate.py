"""Golden loss curves: the first 20 training losses of small runs, in fp32. A refactor or a speed-up keeps them.

    python tests/golden/regenerate.py "why they had to change"

writes curves.json again, with the reason in it. Tolerances are wide enough for other CPUs: measured with
ATEN_CPU_CAPABILITY=default and ONEDNN_MAX_CPU_ISA=SSE41.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import read_cifar_small, read_mnist_small

from maelab.config import FinetuneConfig, LoopConfig, PretrainConfig, RunOptions
from maelab.data import split
from maelab.runs import Run
from maelab.tasks import finetune, pretrain
from maelab.training.loop import Outcome, Task, train
from maelab.training.parallel import Engine

FILE = Path(__file__).parent / "curves.json"
STEPS = 20
"""Steps of each curve."""


@dataclass(frozen=True)
class Curve:
    """A small run.

    Args:
        config: what is trained; `data` is put in by `record`.
        images: 'mnist' or 'cifar10': which of the small sets.
        tolerance: relative, for each loss.
    """

    config: PretrainConfig | FinetuneConfig
    images: str
    tolerance: float = 1e-4


_LOOP: dict[str, Any] = {"data": "", "precision": "fp32", "batch_size": 48, "warmup_epochs": 1, "clip_grad": 1.0}
_LOOP |= {"seed": 7, "blr": 5e-3, "epochs": 4, "limit": 240}  # 5 steps an epoch
_SHAPE: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
_DECODER: dict[str, Any] = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
_PIXELS = PretrainConfig(**_LOOP, **_SHAPE, **_DECODER, patch_size=7, class_token=False, affine_degrees=10)
_NORMALISED = PretrainConfig(
    **_LOOP, **_SHAPE, **_DECODER, patch_size=8, norm_pix_loss=True, crop_padding=4, flip=True, mask_ratio=0.5
)
_CLASSIFIER = FinetuneConfig(
    **{**_LOOP, "blr": 3e-2},
    **_SHAPE,
    patch_size=7,
    layer_decay=0.75,
    drop_path=0.1,
    label_smoothing=0.1,
    mixup=0.2,
    affine_shear=5,
)
# Muon orthogonalises in bf16, whose rounding differs more between CPUs.
CURVES = {
    "pretrain-pixels-adamw": Curve(_PIXELS, "mnist"),
    "pretrain-pixels-muon": Curve(replace(_PIXELS, optimizer="muon"), "mnist", 1e-3),
    "pretrain-norm-pix-adamw": Curve(_NORMALISED, "cifar10"),
    "finetune-adamw": Curve(_CLASSIFIER, "mnist"),
    "finetune-muon": Curve(replace(_CLASSIFIER, optimizer="muon", patch_size=8, accumulate=2), "cifar10", 1e-3),
}


def record(curve: Curve, folder: Path, muon_in_bf16: bool = True) -> list[float]:
    """Train in `folder` and return the loss of each step, the mean over its parts.

    The curves are those of a Muon that multiplies in bfloat16, as it does where the processor has units for it.
    """
    whole = read_mnist_small() if curve.images == "mnist" else read_cifar_small()
    assert whole.train.labels is not None
    first = [(whole.train.labels == label).nonzero()[:30, 0] for label in range(10)]
    train_set, test_set = split(whole.train[torch.cat(first)], 0.1, seed=0)
    data = replace(whole, train=train_set, test=test_set)
    parts: list[float] = []

    def recording(engine: Engine, run: Run, task: Task, config: LoopConfig, tracker: None) -> Outcome:
        def loss(*arguments: Any) -> dict[str, torch.Tensor]:
            values = task.step.loss(*arguments)
            parts.append(float(values["loss"].detach()))
            return values

        return train(engine, run, replace(task, step=replace(task.step, loss=loss)), config, tracker)

    config = replace(curve.config, data=data.name)
    options = RunOptions(out=folder / "run", device="cpu", threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maelab.native.muon.torch_multiplies_bf16", lambda: muon_in_bf16)
        for task in (pretrain, finetune):
            patch.setattr(task, "load", lambda *_, **__: data)
        if isinstance(config, PretrainConfig):
            patch.setattr(pretrain, "train", recording)
            pretrain.pretrain(config, options=options)
        else:
            patch.setattr(finetune, "train", recording)
            finetune.finetune(config, options=options)
    k = config.accumulate
    losses = [sum(parts[i : i + k]) / k for i in range(0, len(parts), k)]
    assert len(losses) == STEPS, len(losses)
    return losses


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or len(arguments[0].split()) < 3:
        print(f'usage: python {sys.argv[0]} "why the curves had to change, in a sentence"', file=sys.stderr)
        return 2
    old = json.loads(FILE.read_text())["losses"] if FILE.exists() else {}
    losses: dict[str, list[float]] = {}
    for name, curve in CURVES.items():
        with tempfile.TemporaryDirectory() as folder:
            losses[name] = [round(loss, 7) for loss in record(curve, Path(folder))]
        pairs = zip(old.get(name, []), losses[name], strict=False)
        print(f"{name}: largest relative change {max((abs(a - b) / a for a, b in pairs), default=0):.1e}")
    about = {"reason": arguments[0], "torch": torch.__version__, "steps": STEPS}
    rows = ",\n".join(f'  "{name}": {json.dumps(curve)}' for name, curve in losses.items())
    head = json.dumps(about, indent=1, ensure_ascii=False).removesuffix("\n}")
    FILE.write_text(f'{head},\n "losses": {{\n{rows}\n }}\n}}\n')
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
