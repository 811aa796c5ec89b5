"""Everything runs on a device that is not the CPU; see tests/device.py for one that is as strict as the real ones."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from device import COPIES, DEVICE, aten, device
from torch.utils._python_dispatch import TorchDispatchMode

from maelab import encoder, recipes
from maelab.config import ProbeConfig, RunOptions
from maelab.runs import read_metrics
from maelab.tasks import (
    attention,
    evaluate,
    features,
    finetune,
    odd,
    predict,
    pretrain,
    probe,
    reconstruct,
    similar,
)
from maelab.training.parallel import Engine

pytestmark = pytest.mark.usefixtures("nothing_drawn")
AUGMENT: dict[str, Any] = {
    "crop_padding": 2, "crop_scale": 0.8, "flip": True, "affine_degrees": 10, "elastic": 0.05, "color_jitter": 0.2,
    "rand_augment_ops": 2, "random_erasing": 0.5,
}  # fmt: skip


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for task in (attention, encoder, evaluate, finetune, predict, pretrain, probe, reconstruct):
        monkeypatch.setattr(task, "start_engine", lambda *_: Engine(DEVICE, "fp32"))
    with device():
        yield


def options(out: Path) -> RunOptions:
    return RunOptions(out=out, device="cpu", threads=1, attention="matmul")


def small(config: Any, folder: Path, **changes: Any) -> Any:
    fixed: dict[str, Any] = {"precision": "fp32", "limit": 64, "batch_size": 16, "epochs": 2, "val_fraction": 0.1}
    return replace(config, data=f"folder:{folder}", **{**fixed, **changes})


def test_the_device_is_strict(strict: None):
    x = torch.ones(3).to(DEVICE)
    assert (x + 1).device == DEVICE and (x + 1).sum().item() == 6
    for refused in (
        lambda: x.double(),
        lambda: x + torch.ones(3),
        lambda: torch.ones(3, device=DEVICE).cumsum(0, dtype=torch.float64),
    ):
        with pytest.raises((TypeError, RuntimeError), match=r"no float64|same device"):
            refused()


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_goes_on(optimizer: str, digits_folder: Path, tmp_path: Path, monkeypatch):
    """And ends where the CPU does."""
    config = small(recipes.pretrain_smoke(), digits_folder, optimizer=optimizer, ema_decay=0.9, clip_grad=1.0)
    pretrain.pretrain(config, options=options(tmp_path / "cpu"))
    monkeypatch.setattr(pretrain, "start_engine", lambda *_: Engine(DEVICE, "fp32"))
    made = pretrain.make_step

    def failing(*arguments: Any) -> Any:
        step = made(*arguments)

        def fails(number: int, *more: Any) -> Any:
            if number == 5:
                raise KeyboardInterrupt
            return step.batch(number, *more)

        return replace(step, batch=fails)

    with device():
        monkeypatch.setattr(pretrain, "make_step", failing)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(config, options=options(tmp_path / "device"))
        monkeypatch.setattr(pretrain, "make_step", made)
        pretrain.pretrain(config, options=options(tmp_path / "device"))
    ours, theirs = (
        [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("device", "cpu")
    )
    assert ours == pytest.approx(theirs, rel=1e-3 if optimizer == "muon" else 1e-5) and len(ours) == 4


class _Recording(TorchDispatchMode):
    """What a graph cannot hold: a number read back, a shape that depends on numbers, a way to the CPU or back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default):
            raise AssertionError(f"{func} waits for the device")
        result = func(*args, **(kwargs or {}))
        if func in COPIES and result.device != args[1 if func is aten.copy_.default else 0].device:
            raise AssertionError(f"{func} leaves the device")
        return result


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_what_is_captured_stays_on_the_device(optimizer: str, digits_folder: Path, tmp_path: Path, monkeypatch):
    """And its rates follow the schedule: it ends where the plain steps do."""
    steps = []

    def captured(step: Any) -> Any:
        def run(*batch: torch.Tensor) -> Any:
            steps.append([x.shape for x in batch])
            with _Recording():
                return step(*batch)

        return run

    monkeypatch.setattr("maelab.training.loop.captured", captured)
    changes: dict[str, Any] = {"optimizer": optimizer, "ema_decay": 0.9, "clip_grad": 1.0}
    before = small(recipes.pretrain_smoke(), digits_folder, **changes)
    after = small(recipes.finetune_smoke(), digits_folder, **changes, drop_path=0.1, mixup=0.8, random_erasing=0.5)
    losses = []
    for captures in (True, False):
        engine = Engine(DEVICE, "fp32", captures=captures)
        monkeypatch.setattr(pretrain, "start_engine", lambda *_, engine=engine: engine)
        monkeypatch.setattr(finetune, "start_engine", lambda *_, engine=engine: engine)
        with device():
            for name, task, config in (("mae", pretrain.pretrain, before), ("classifier", finetune.finetune, after)):
                folder, _ = task(config, options=options(tmp_path / f"{name}-{captures}"))  # type: ignore[operator]
                losses += [row["loss"] for row in read_metrics(folder) if "loss" in row]
    # Muon rounds to 16 bits where the processor has units for them: one other rounding shows in the fifth digit.
    rel = 2e-4 if optimizer == "muon" else 1e-5
    assert losses[: len(losses) // 2] == pytest.approx(losses[len(losses) // 2 :], rel=rel)
    assert len(steps) > 4 and all(shapes == steps[0] for shapes in steps[: len(steps) // 4])


@pytest.mark.slow
def test_every_task_runs_there(strict: None, digits_folder: Path, tmp_path: Path):
    run, out = tmp_path / "mae", tmp_path / "picture.png"
    config = small(recipes.pretrain_smoke(), digits_folder, norm_pix_loss=True, epochs=1, **AUGMENT)
    _, result = pretrain.pretrain(config, options=options(run))
    assert "knn_accuracy" in result["val"]
    probing = ProbeConfig(init=str(run), precision="fp32", limit=64, batch_size=16, epochs=1)
    assert "knn_accuracy" in probe.probe(probing, options=options(tmp_path / "probe"))[1]["test"]
    mixed = {"mixup": 0.5, "cutmix": 0.5, "label_smoothing": 0.1, "drop_path": 0.1, "patch_drop": 0.25}
    tuning = small(recipes.finetune_smoke(), digits_folder, init=str(run), epochs=1, ema_decay=0.9, **mixed, **AUGMENT)
    _, result = finetune.finetune(tuning, options=options(tmp_path / "tuned"))

    nowhere = options(tmp_path)
    assert evaluate.evaluate(tmp_path / "tuned", options=nowhere)["accuracy"] == result["test"]["accuracy"]
    assert evaluate.evaluate(run, options=nowhere)["masked_mse"] > 0
    image = sorted(digits_folder.rglob("*.png"))[0]
    assert [row["path"] for row in predict.predict(tmp_path / "tuned", image, options=nowhere)] == [str(image)]
    assert features.features(run, [image], out=tmp_path / "features.npz", options=nowhere)["images"] == 1
    assert features.features(run, out=tmp_path / "features.npz", options=nowhere)["images"] > 1
    for model in (run, tmp_path / "tuned"):
        assert similar.similar(model, [image], in_=digits_folder, out=out, options=nowhere)["images"] > 1
        assert odd.odd(model, digits_folder, masks=2, out=out, options=nowhere)["images"] > 1
        assert attention.attention(model, [image], out=out, options=nowhere)["images"] == 1
    for kind in ("random", "block", "grid"):
        assert reconstruct.reconstruct(run, [image], mask_kind=kind, out=out, options=nowhere)["images"] == 1
