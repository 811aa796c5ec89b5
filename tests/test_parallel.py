"""What the engine chooses is what a step runs with, and what the line on hardware says."""

import pytest
import torch
from torch import nn

from maelab.config import LoopConfig, RunOptions
from maelab.errors import UsageError
from maelab.model import MaskedAutoencoderViT, fast
from maelab.model.vit import Attention, Block
from maelab.training.checkpoint import ModelSpec
from maelab.training.loop import Task, train
from maelab.training.parallel import choose_precision, prepare, start_engine

CPU = RunOptions(device="cpu")


def tiny() -> MaskedAutoencoderViT:
    return MaskedAutoencoderViT(
        img_size=8, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_and_validation_run_in_the_chosen_precision(precision, tmp_path):
    seen: dict[str, set[bool]] = {"step": set(), "validation": set()}

    class Linear(nn.Linear):
        def called_by_name(self, x: torch.Tensor) -> torch.Tensor:
            seen["step"].add(self(x).dtype is torch.bfloat16)
            return super().forward(x).float()

    def step_loss(model, step, part, parts):
        return {"loss": model.called_by_name(torch.ones(4, 8)).square().mean()}

    def validate(model, epoch):
        seen["validation"].add(model(torch.ones(4, 8)).dtype is torch.bfloat16)
        return {"loss": 1.0}

    spec = ModelSpec("Linear", {"in_features": 8, "out_features": 2}, "none")
    task = Task(Linear(8, 2), spec, 8, step_loss, validate, "loss", False, methods=("called_by_name",))
    train(start_engine(CPU, precision), tmp_path, task, LoopConfig(epochs=1, batch_size=4, warmup_epochs=0))
    assert seen == {"step": {precision == "bf16"}, "validation": {precision == "bf16"}}


def test_options_force_what_the_hardware_would_choose():
    engine = start_engine(RunOptions(device="cpu", threads=1), "bf16")
    model = tiny()
    line = prepare(model, engine, RunOptions(device="cpu", kernels="torch", attention="fused"))
    assert line == "cpu, bf16, fused attention, 1 thread"
    assert not any(m.native for m in model.modules() if isinstance(m, Block))
    assert {m.form for m in model.modules() if isinstance(m, Attention)} == {"fused"}
    line = prepare(model, engine, CPU)
    assert line == f"cpu, bf16, {fast.reason() if fast.available() else 'matmul attention'}, 1 thread"
    assert {m.native for m in model.modules() if isinstance(m, Block)} == {fast.available()}


def test_fp32_never_takes_the_native_kernels():
    model = tiny()
    assert prepare(model, start_engine(CPU, "fp32"), CPU).startswith("cpu, fp32, matmul attention")
    assert not any(m.native for m in model.modules() if isinstance(m, Block))


def test_forms_of_attention_agree():
    torch.manual_seed(0)
    model, imgs, noise = tiny(), torch.rand(3, 3, 8, 8), torch.rand(3, 4)
    losses = []
    for form in ("matmul", "fused"):
        prepare(model, start_engine(CPU, "fp32"), RunOptions(device="cpu", attention=form))
        losses.append(model.training_loss(imgs, 0.5, noise).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bf16_is_chosen_only_where_there_are_units_for_it(monkeypatch):
    assert choose_precision("fp32", "cpu") == "fp32" and choose_precision("bf16", "cpu") == "bf16"
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(fast, "available", lambda: False)
        assert choose_precision("auto", "cpu") == ("bf16" if amx else "fp32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_device_is_named():
    with pytest.raises(UsageError, match="CUDA"):
        start_engine(RunOptions(device="cuda"))
