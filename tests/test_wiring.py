"""Every field of every config reaches what it is for: changed alone, it changes what a run comes to.

The runs are real and tiny, on folders of coloured images of 12 x 12 pixels; only their pictures are not drawn.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maelab import figures
from maelab.config import FinetuneConfig, PretrainConfig, ProbeConfig, RunOptions
from maelab.tasks.finetune import finetune
from maelab.tasks.pretrain import pretrain
from maelab.tasks.probe import probe

Config = PretrainConfig | FinetuneConfig | ProbeConfig
TIMES = {"train_time_s", "images_per_s", "seconds"}


@dataclass(frozen=True)
class Place:
    """Where things lie: two folders of images, runs of autoencoders (`mae`, `other` of another seed, `grey`) and of
    a `classifier`."""

    images: str
    others: str
    mae: str
    other: str
    grey: str
    classifier: str


@pytest.fixture(scope="module")
def place(cifar_small, tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("wiring")
    draw_nothing = pytest.MonkeyPatch()
    with draw_nothing.context() as patch:
        _draw_nothing(patch)
        for name, start, mode in (("images", 0, "RGB"), ("others", 24, "RGB"), ("grey", 0, "L")):
            for label in range(3):
                (root / name / "abc"[label]).mkdir(parents=True)
                for i in (cifar_small.train.labels == label).nonzero()[start // 4 : start // 4 + 24, 0].tolist():
                    pixels = Image.fromarray(cifar_small.train.images[i].permute(1, 2, 0).numpy())
                    pixels.resize((12, 12)).convert(mode).save(root / name / "abc"[label] / f"{i}.png")
        for name, data, seed in (("mae", "images", 0), ("other", "images", 5), ("grey-mae", "grey", 0)):
            config = replace(PRETRAIN, data=f"folder:{root / data}", seed=seed)
            pretrain(config, options=RunOptions(out=root / name, device="cpu", threads=1))
        tuning = replace(FINETUNE, data=f"folder:{root / 'images'}")
        finetune(tuning, options=RunOptions(out=root / "classifier", device="cpu", threads=1))
    folders = [f"folder:{root / name}" for name in ("images", "others")]
    return Place(*folders, *(str(root / name) for name in ("mae", "other", "grey-mae", "classifier")))


def _draw_nothing(patch: pytest.MonkeyPatch) -> None:
    for name in ("curves", "reconstructions", "predictions", "confusion", "rows"):
        patch.setattr(figures, name, lambda *_, **__: None)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    _draw_nothing(monkeypatch)


_LOOP: dict[str, Any] = {"epochs": 2, "batch_size": 16, "blr": 1e-2, "warmup_epochs": 0.5, "val_fraction": 0.25}
_SHAPE: dict[str, Any] = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "precision": "fp32"}
_DECODER: dict[str, Any] = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
PRETRAIN = PretrainConfig(data="", **_LOOP, **_SHAPE, **_DECODER)
FINETUNE = FinetuneConfig(data="", **_LOOP, **_SHAPE)
_PROBE: dict[str, Any] = _LOOP | {"epochs": 4, "precision": "fp32"}
PROBE = ProbeConfig(init="", **_PROBE)

# Field -> what it is changed to; with a second entry, what else both runs have, without which the field means nothing.
Change = tuple[Any] | tuple[Any, dict[str, Any]]
DATA: dict[str, Change] = {"val_fraction": (0.4,), "split_seed": (1,), "limit": (20,)}
READING: dict[str, Change] = {"resize": ("squash", {"img_size": (8, 16)}), "group": ("[0-5]+",)}
LOOP: dict[str, Change] = {
    "seed": (1,), "epochs": (3,), "batch_size": (8,), "blr": (2e-2,), "weight_decay": (5.0,), "beta2": (0.5,),
    "warmup_epochs": (1.0,), "clip_grad": (1e-3,), "ema_decay": (0.9,), "precision": ("bf16",),
}  # fmt: skip
MUON: dict[str, Change] = {"optimizer": ("muon",), "muon_lr": (0.2, {"optimizer": "muon"})}
SHAPE: dict[str, Change] = {
    "img_size": ((16, 16),), "patch_size": (6,), "embed_dim": (24,), "depth": (3,), "num_heads": (4,),
    "mlp_ratio": (2.0,), "class_token": (False,), "learned_pos_embed": (True,),
}  # fmt: skip
AUGMENT: dict[str, Change] = {
    "crop_padding": (2,), "crop_scale": (0.3,), "flip": (True,), "affine_degrees": (90.0,), "affine_scale": (0.5,),
    "affine_shear": (40.0,), "affine_translate": (0.3,), "elastic": (0.2,), "color_jitter": (0.9,),
    "rand_augment_ops": (2,), "rand_augment_magnitude": (1.0, {"rand_augment_ops": 2}), "random_erasing": (0.9,),
}  # fmt: skip
CHANGES: dict[str, dict[str, Change]] = {
    "pretrain": DATA | READING | LOOP | MUON | SHAPE | AUGMENT | {
        "init": ("mae",), "mask_ratio": (0.5,), "norm_pix_loss": (True,), "decoder_embed_dim": (24,),
        "decoder_depth": (2,), "decoder_num_heads": (1,), "knn_every": (2,),
    },
    "finetune": DATA | READING | LOOP | MUON | SHAPE | AUGMENT | {
        "init": ("mae",), "adapt_patch_embed": ("reinit", {"init": "grey"}),
        "adapt_pos_embed": ("reinit", {"init": "mae", "img_size": (16, 16), "learned_pos_embed": True}),
        "label_fraction": (0.5,), "unlabelled": (2, {"label_fraction": 0.5, "ema_decay": 0.5, "init": "classifier"}),
        "class_weights": ("balanced", {"limit": 30}), "global_pool": ("token",),
        "layer_decay": (0.3,), "drop_path": (0.5,), "reg_tokens": (2,),
        "patch_drop": (0.5,), "label_smoothing": (0.5,), "mixup": (0.8,), "cutmix": (0.8,),
        "patience": (1, {"blr": 0.0, "epochs": 4}), "keep": ("last", {"blr": 0.0, "epochs": 4}),
    },
    "probe": DATA | LOOP | {
        "init": ("other",), "label_fraction": (0.4,), "pool": ("token",), "neighbours": (1,),
    },
}  # fmt: skip
# A field of its own below; tests/test_data_table.py; tests/test_loop.py: it changes no more than rounding.
ELSEWHERE = {"data", "labels", "accumulate"}
TASKS: dict[str, tuple[Config, Callable[..., tuple[Path, dict[str, Any]]]]] = {
    "pretrain": (PRETRAIN, pretrain), "finetune": (FINETUNE, finetune), "probe": (PROBE, probe),
}  # fmt: skip


def outcome(name: str, place: Place, out: Path, **changes: Any) -> dict[str, Any]:
    """What a run comes to: its measurements, its result and its last weights, without times and paths."""
    base, task = TASKS[name]
    named = {"data": "same" if name == "probe" else place.images} | ({"init": "mae"} if name == "probe" else {})
    told = {field: getattr(place, value) if field == "init" else value for field, value in (named | changes).items()}
    folder, result = task(replace(base, **told), options=RunOptions(out=out, device="cpu", threads=1))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = (folder / "checkpoints" / "last" / "model.safetensors").read_bytes()
    kept = [{k: v for k, v in row.items() if k not in TIMES} for row in (*rows, result)]
    kept[-1] = {k: v for k, v in kept[-1].items() if k not in ("init", "seed", "mask_ratio", "patch_size", "epochs")}
    return {"rows": kept, "weights": hashlib.sha256(weights).hexdigest()}


BASES: dict[tuple[Any, ...], dict[str, Any]] = {}


@pytest.mark.parametrize(("task", "field"), [(task, field) for task, changes in CHANGES.items() for field in changes])
def test_a_field_changes_what_a_run_comes_to(task: str, field: str, place: Place, tmp_path: Path) -> None:
    value, *beside = CHANGES[task][field]
    both = beside[0] if beside else {}
    key = (task, *sorted(both.items()))
    if key not in BASES:
        BASES[key] = outcome(task, place, tmp_path / "base", **both)
    changed = outcome(task, place, tmp_path / "changed", **both, **{field: value})
    assert changed["rows"] != BASES[key]["rows"], f"{field} is lost between the config and its reader"


@pytest.mark.parametrize("task", TASKS)
def test_the_same_twice_is_the_same(task: str, place: Place, tmp_path: Path) -> None:
    """Without which the test above would say nothing."""
    assert outcome(task, place, tmp_path / "a") == outcome(task, place, tmp_path / "b")


@pytest.mark.parametrize("task", TASKS)
def test_other_images_change_what_a_run_comes_to(task: str, place: Place, tmp_path: Path) -> None:
    one, other = outcome(task, place, tmp_path / "a"), outcome(task, place, tmp_path / "b", data=place.others)
    assert one["rows"][0] != other["rows"][0]


@pytest.mark.parametrize("task", TASKS)
def test_the_table_has_every_field(task: str) -> None:
    fields = {field.name for field in dataclasses.fields(TASKS[task][0])}
    assert fields - ELSEWHERE == CHANGES[task].keys()
