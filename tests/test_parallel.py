"""What the engine chooses is what a step runs with, and what the line on hardware says."""

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from maelab import native
from maelab.config import LoopConfig, RunOptions
from maelab.errors import UsageError
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.model.vit import Attention, Block
from maelab.runs import Run
from maelab.training.checkpoint import ModelSpec
from maelab.training.loop import Step, Task, train
from maelab.training.parallel import choose_precision, prepare, start_engine

CPU = RunOptions(device="cpu")


def tiny() -> MaskedAutoencoderViT:
    return MaskedAutoencoderViT(
        img_size=8, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2
    )


@pytest.fixture(autouse=True)
def units(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines are those of a processor on which torch is fast in bfloat16."""
    monkeypatch.setattr(native, "torch_multiplies_bf16", lambda: True)


def fast_blocks(model: nn.Module) -> int:
    """How many blocks are to run in the native kernels."""
    return sum(isinstance(m, Block) and m.fast is not None for m in model.modules())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_and_validation_run_in_the_chosen_precision(precision, tmp_path):
    seen: dict[str, set[bool]] = {"step": set(), "validation": set()}

    class Linear(nn.Linear):
        def called_by_name(self, x: torch.Tensor) -> torch.Tensor:
            seen["step"].add(self(x).dtype is torch.bfloat16)
            return super().forward(x).float()

    def loss(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": model.called_by_name(x).square().mean()}

    def validate(model, epoch):
        seen["validation"].add(model(torch.ones(4, 8)).dtype is torch.bfloat16)
        return {"loss": 1.0}

    spec = ModelSpec("Linear", {"in_features": 8, "out_features": 2}, "none")
    task = Task(Linear(8, 2), spec, 8, Step(lambda *_: (torch.ones(4, 8),), loss), validate, "loss", False)
    train(start_engine(CPU, precision), Run(tmp_path, {}), task, LoopConfig(epochs=1, batch_size=4, warmup_epochs=0))
    assert seen == {"step": {precision == "bf16"}, "validation": {precision == "bf16"}}


def test_options_force_what_the_hardware_would_choose():
    engine = start_engine(RunOptions(device="cpu", threads=1), "bf16")
    model = tiny()
    line = prepare(model, engine, RunOptions(device="cpu", kernels="torch", attention="fused"))
    assert line == "cpu, bf16, fused attention, 1 thread"
    assert fast_blocks(model) == 0
    assert {m.form for m in model.modules() if isinstance(m, Attention)} == {"fused"}
    line = prepare(model, engine, CPU)
    if native.available():
        assert (line, fast_blocks(model)) == (f"cpu, bf16, {native.reason()}, 1 thread", 3)
    else:
        assert (line, fast_blocks(model)) == (f"cpu, bf16, torch ({native.reason()}), matmul attention, 1 thread", 0)


def test_what_is_compiled_is_not_called_native(monkeypatch):
    """The compiler would pass the kernels over."""
    monkeypatch.setattr(nn.Module, "compile", lambda _: None)  # not this test's business, and slow
    engine, model = start_engine(RunOptions(device="cpu", threads=1), "bf16"), tiny()
    line = prepare(model, engine, RunOptions(device="cpu", compile="on"))
    assert (line, fast_blocks(model)) == ("cpu, bf16, matmul attention, compiled, 1 thread", 0)


LARGE: dict[str, Any] = {"img_size": 66, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}  # 1089 patches
NARROW: dict[str, Any] = {"decoder_embed_dim": 40, "decoder_depth": 1, "decoder_num_heads": 2}
WIDE: dict[str, Any] = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
REFUSED = "1090 tokens are more than 1024"


@pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.reason()}")
@pytest.mark.parametrize(
    ("model", "count", "says"),
    [
        (lambda: VisionTransformer(embed_dim=40, num_heads=2, depth=2), 0, "torch (width 40 is no multiple of 32)"),
        (
            lambda: VisionTransformer(embed_dim=64, num_heads=8, depth=2),
            0,
            "torch (the heads' width 8 is no multiple of 16)",
        ),
        (
            lambda: VisionTransformer(embed_dim=32, num_heads=2, depth=2, mlp_ratio=1.5),
            0,
            "torch (the MLP's width 48 is no multiple of 32)",
        ),
        (lambda: VisionTransformer(**LARGE), 0, f"torch ({REFUSED})"),
        (lambda: VisionTransformer(**LARGE, patch_drop_rate=0.5), 2, "{} up to 1024 tokens"),
        (
            lambda: MaskedAutoencoderViT(embed_dim=32, depth=2, num_heads=2, **NARROW),
            2,
            "{} in 2 of 3 blocks, torch in the rest (width 40 is no multiple of 32)",
        ),
        (
            lambda: MaskedAutoencoderViT(**LARGE, **WIDE),
            2,
            f"{{}} up to 1024 tokens in 2 of 3 blocks, torch in the rest ({REFUSED})",
        ),
    ],
)
def test_the_line_names_what_the_kernels_do_not_serve(model, count: int, says: str):
    """As in env.json: what is named there is what a step runs with."""
    built, engine = model(), start_engine(RunOptions(device="cpu", threads=1), "bf16")
    line = prepare(built, engine, CPU)
    attention = "" if count == len([m for m in built.modules() if isinstance(m, Block)]) else "matmul attention, "
    assert (line, fast_blocks(built)) == (f"cpu, bf16, {says.format(native.reason())}, {attention}1 thread", count)


@pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.reason()}")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda block: block.mlp.register_forward_hook(lambda *_: None), "mlp has a hook"),
        (lambda block: setattr(block.attn, "proj", nn.Sequential(block.attn.proj)), "attn.proj is a Sequential"),
        (lambda block: block.double(), "its parameters are not float32 on the CPU in their usual shapes"),
        (
            lambda block: setattr(block, "norm1", nn.LayerNorm(32, eps=1e-6, elementwise_affine=False)),
            "its parameters are not float32 on the CPU in their usual shapes",
        ),
    ],
)
def test_the_line_names_blocks_that_were_changed(change, says: str):
    model = tiny()
    change(model.blocks[1])
    line = prepare(model, start_engine(RunOptions(device="cpu", threads=1), "bf16"), CPU)
    assert f"{native.reason()} in 2 of 3 blocks, torch in the rest ({says}), matmul attention" in line
    assert prepare(nn.Linear(2, 2), start_engine(CPU, "bf16"), CPU).startswith("cpu, bf16, torch (no blocks), ")


@pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.reason()}")
def test_what_is_prepared_is_what_runs(monkeypatch):
    """No block that the line calls native falls back, in training and in use."""
    model, engine, ran = tiny(), start_engine(CPU, "bf16"), []
    prepare(model, engine, CPU)
    real = native.run_block
    monkeypatch.setattr(native, "run_block", lambda *a: ran.append(y := real(*a)) or y)
    with engine.autocast():
        model.training_loss(torch.rand(3, 3, 8, 8)).backward()
        with torch.inference_mode():
            model(torch.rand(3, 3, 8, 8))
    assert len(ran) == 6 and all(y is not None for y in ran)


def test_fp32_never_takes_the_native_kernels():
    model = tiny()
    assert prepare(model, start_engine(CPU, "fp32"), CPU).startswith("cpu, fp32, matmul attention")
    assert fast_blocks(model) == 0


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
    for units, kernels, asked, chosen in [
        (True, True, "auto", "bf16"), (True, False, "auto", "bf16"), (True, True, "torch", "bf16"),
        (False, True, "auto", "native"), (False, False, "auto", "fp32"), (False, True, "torch", "fp32"),
    ]:  # fmt: skip
        monkeypatch.setattr(native, "torch_multiplies_bf16", lambda units=units: units)
        monkeypatch.setattr(native, "available", lambda kernels=kernels: kernels)
        assert choose_precision("auto", "cpu", asked) == chosen


@pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.reason()}")
def test_without_units_for_bf16_only_the_kernels_compute_in_16_bits(monkeypatch):
    monkeypatch.setattr(native, "torch_multiplies_bf16", lambda: False)
    seen: set[torch.dtype] = set()
    model, engine = tiny(), start_engine(RunOptions(device="cpu", threads=1))
    assert prepare(model, engine, CPU) == f"cpu, fp32, blocks in 16 bits, {native.reason()}, 1 thread"
    model.decoder_embed.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    ran, real = [], native.run_block
    monkeypatch.setattr(native, "run_block", lambda *a: ran.append(y := real(*a)) or y)
    with engine.autocast():
        model.training_loss(torch.rand(3, 3, 8, 8)).backward()
    assert seen == {torch.float32} and len(ran) == 3 and all(y is not None for y in ran)
    narrow = VisionTransformer(embed_dim=40, num_heads=2, depth=2)
    said = "cpu, fp32, torch (width 40 is no multiple of 32), matmul attention, 1 thread"
    assert prepare(narrow, engine, CPU) == said and fast_blocks(narrow) == 0


def test_bf16_without_units_says_how_slow_it_is(monkeypatch):
    monkeypatch.setattr(native, "torch_multiplies_bf16", lambda: False)
    engine, torch_only = start_engine(RunOptions(device="cpu", threads=1), "bf16"), RunOptions(kernels="torch")
    line = prepare(tiny(), engine, torch_only)
    assert re.fullmatch(
        r"cpu, bf16 \(\d+ times slower than fp32 in torch on this processor\), matmul attention, 1 thread", line
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_device_is_named():
    with pytest.raises(UsageError, match="CUDA"):
        start_engine(RunOptions(device="cuda"))


def test_a_prediction_loads_little_beside_torch(tmp_path):
    """The compiler and the trackers take seconds to import, and serve nothing here."""
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    code = "import sys; from maelab.cli import main\n"
    code += f"assert main(['predict', 'maelab:mnist-classifier', {str(tmp_path / 'a.png')!r}]) == 0\n"
    code += "heavy = {'torch._dynamo', 'torch._inductor', 'tensorboard', 'sympy'}\n"
    code += "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
