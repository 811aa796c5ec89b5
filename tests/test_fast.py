"""The native blocks: errors against float32 no larger than autocast's own, for outputs and every gradient."""

import os
import subprocess
import sys

import pytest
import torch

from maelab.model import MaskedAutoencoderViT, VisionTransformer, fast
from maelab.model.vit import Block

native = pytest.mark.skipif(not fast.available(), reason=f"no native kernels: {fast.reason()}")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch):
    """Call it to take the blocks through plain torch from then on."""
    return lambda: monkeypatch.setattr(fast, "usable", lambda *_: False)


def block_with_spread(dim: int, heads: int, **options) -> Block:
    """A block whose every parameter matters: weights that give uneven attention, biases and norms off their start."""
    block = Block(dim, heads, **options)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.08 if p.ndim > 1 else 0.3)
    return block


def results(
    block: torch.nn.Module, x: torch.Tensor, autocast: bool, *args, gradient: float = 1.0
) -> dict[str, torch.Tensor]:
    """Output and all gradients for a fixed gradient of the output, of the size `gradient`."""
    x = x.clone().requires_grad_()
    block.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = block(x, *args)
    y.float().backward(gradient * torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in block.named_parameters()}  # type: ignore[dict-item]


def error(a: torch.Tensor, exact: torch.Tensor) -> float:
    return float((a.double() - exact).norm() / exact.double().norm().clamp_min(1e-30))


SHAPES = [  # D, heads, L, tail, B
    (192, 3, 17, None, 40),
    (192, 3, 65, 48, 9),
    (192, 3, 65, None, 5),
    (96, 3, 17, None, 5),
    (96, 6, 50, 12, 3),
    (96, 2, 50, 16, 3),
    (64, 4, 7, None, 1),
    (64, 1, 1, None, 3),
    (128, 2, 33, 1, 2),
    (256, 2, 197, None, 2),
    (512, 8, 17, None, 3),
    (768, 12, 50, 20, 3),
]


@native
@pytest.mark.parametrize(("D", "heads", "L", "tail", "B"), SHAPES)
def test_block_matches_float32_as_well_as_autocast_does(plain, D: int, heads: int, L: int, tail: int | None, B: int):
    torch.manual_seed(0)
    block, x = block_with_spread(D, heads), torch.randn(B, L, D) * 1.5
    with torch.autocast("cpu", torch.bfloat16):
        assert fast.usable(block, x)
    native = results(block, x, True, tail)
    plain()
    exact, autocast = results(block, x, False, tail), results(block, x, True, tail)
    for name in exact:
        assert error(native[name], exact[name]) < 1.5 * error(autocast[name], exact[name]) + 1e-4, name


@native
def test_no_qkv_bias_and_other_mlp_width(plain):
    torch.manual_seed(0)
    block, x = block_with_spread(96, 3, mlp_ratio=2.0, qkv_bias=False), torch.randn(4, 20, 96)
    native = results(block, x, True)
    plain()
    for name, exact in results(block, x, False).items():
        assert error(native[name], exact) < 0.02, name


@native
def test_drop_path_drops_the_same_samples(plain):
    block, x = block_with_spread(96, 3, drop_path=0.5), torch.randn(16, 10, 96)
    torch.manual_seed(5)
    native = results(block, x, True)
    plain()
    torch.manual_seed(5)
    for name, exact in results(block, x, False).items():
        assert error(native[name], exact) < 0.02, name


@native
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6])
def test_gradients_of_any_size_are_as_exact(size: float):
    torch.manual_seed(0)
    block, x = block_with_spread(96, 3), torch.randn(5, 20, 96)
    of_one = results(block, x, True)
    of_size = results(block, x, True, gradient=size)
    for name in of_one:
        scale = 1.0 if name == "y" else size
        assert error(of_size[name], scale * of_one[name]) < 0.01, name


@native
def test_same_input_same_bits():
    torch.manual_seed(0)
    block, x = block_with_spread(192, 3), torch.randn(64, 65, 192)
    first, second = results(block, x, True), results(block, x, True)
    assert all(torch.equal(first[n], second[n]) for n in first)


@native
def test_frozen_parameters_get_no_gradient():
    block = block_with_spread(96, 3)
    for p in block.attn.parameters():
        p.requires_grad_(False)
    gradients = results(block, torch.randn(3, 9, 96), True)
    assert all((gradients[n] is None) == (not p.requires_grad) for n, p in block.named_parameters())
    block.requires_grad_(False)
    block.zero_grad()
    x = torch.randn(3, 9, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        block(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in block.parameters())


@native
def test_gradients_accumulate():
    torch.manual_seed(0)
    block, x = block_with_spread(96, 3), torch.randn(6, 9, 96)
    with torch.autocast("cpu", torch.bfloat16):
        block(x).square().sum().backward()
        whole = [p.grad.clone() for p in block.parameters() if p.grad is not None]
        block.zero_grad()
        for half in x.split(3):
            block(half).square().sum().backward()
    for p, g in zip(block.parameters(), whole, strict=True):
        assert p.grad is not None and error(p.grad, g) < 1e-2


@native
@pytest.mark.parametrize("class_token", [True, False])
def test_whole_models(plain, class_token: bool):
    torch.manual_seed(0)
    mae = MaskedAutoencoderViT(
        img_size=28, patch_size=4, in_chans=1, embed_dim=96, depth=3, num_heads=3, decoder_embed_dim=64,
        decoder_depth=2, decoder_num_heads=4, class_token=class_token,
    )  # fmt: skip
    vit = VisionTransformer(
        img_size=(32, 16), embed_dim=96, depth=3, num_classes=5, class_token=class_token,
        global_pool="token" if class_token else "avg",
    )  # fmt: skip
    torch.nn.init.normal_(vit.head.weight, std=0.1)  # type: ignore[arg-type]
    imgs, noise = torch.rand(12, 1, 28, 28) * 2 - 1, torch.rand(12, 49)
    photos = torch.rand(12, 3, 32, 16) * 2 - 1

    def run(autocast: bool) -> dict[str, torch.Tensor]:
        mae.zero_grad()
        vit.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = mae.training_loss(imgs, noise=noise) + vit(photos).float().square().sum()
        loss.backward()
        grads = {n: p.grad for model in (mae, vit) for n, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **grads}

    native = run(True)
    plain()
    exact, autocast = run(False), run(True)
    assert native.keys() == exact.keys()
    for name in exact:  # the error of a few numbers is luck: grant them more than a matrix
        slack = 5e-3 if exact[name].numel() < 16 else 1e-3
        assert error(native[name], exact[name]) < 1.5 * error(autocast[name], exact[name]) + slack, name


def test_float32_never_takes_the_native_path():
    block, x = Block(96, 3), torch.randn(2, 5, 96)
    assert not fast.usable(block, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fast.usable(block, x.double())
        assert not fast.usable(Block(40, 2), torch.randn(2, 5, 40))


@pytest.mark.parametrize("setting", [{"CC": "no-such-compiler"}, {"MAELAB_NATIVE": "0"}])
def test_without_kernels_the_plain_path_runs_and_says_why(tmp_path, setting: dict[str, str]):
    code = (
        "import torch; from maelab.model import fast; from maelab.model.vit import Block\n"
        "with torch.autocast('cpu', torch.bfloat16): print(Block(96, 3)(torch.randn(2, 5, 96)).shape)\n"
        "print(fast.reason()); assert not fast.available()"
    )
    environment = {**os.environ, "MAELAB_DATA": str(tmp_path), **setting}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 2 and not done.stderr


NO_AMX = "-mno-amx-tile -mno-amx-bf16"
OTHERS = {  # what leaves the compiler only these, and what the processor must have
    "AVX-512 FP16": (NO_AMX, "avx512_fp16"),
    "AVX-512 BF16": (f"{NO_AMX} -mno-avx512fp16 -DFAST_BF16", "avx512_bf16"),
    "AVX-512": (f"{NO_AMX} -mno-avx512bf16 -mno-avx512fp16", "avx512f"),
}


@native
@pytest.mark.parametrize("units", OTHERS)
def test_the_same_holds_on_lesser_units(tmp_path, units: str):
    options, needed = OTHERS[units]
    if needed not in fast._cpu_flags():
        pytest.skip(f"this processor has no {needed}")
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec cc "$@" {options}\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "MAELAB_DATA": str(tmp_path / "cache"), "CC": str(compiler)}
    code = "from maelab.model import fast; print(fast.reason())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"native kernels on {units}\n"
    chosen = "block_matches or any_size or muon_steps or same_bits or memory_held"
    tests = [sys.executable, "-m", "pytest", "-n", "0", "-k", chosen, __file__]
    done = subprocess.run(tests, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@native
def test_processes_that_build_at_once_all_get_the_kernels(tmp_path):
    compiler = tmp_path / "cc"  # slow enough for all to be in it, and quick enough for a test
    compiler.write_text(f'#!/bin/sh\nsleep 1\nfor last; do :; done\ncp "{fast._load()[0]._name}" "$last"\n')  # type: ignore[union-attr]
    compiler.chmod(0o755)
    code = "from maelab.model import fast; print(fast.available())"
    environment = {**os.environ, "MAELAB_DATA": str(tmp_path / "cache"), "CC": str(compiler)}
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in running] == ["True\n", "True\n"]
    assert [path.suffix for path in (tmp_path / "cache" / "native").iterdir()] == [".so"]


@native
def test_muon_steps_like_torch():
    shapes = [(96, 288), (288, 96), (96, 96), (384, 96), (64, 32)]

    def run(kind: type[torch.optim.Muon]) -> list[torch.Tensor]:
        """What two steps change."""
        generator = torch.Generator().manual_seed(1)
        weights = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.05) for s in shapes]
        before = [w.detach().clone() for w in weights]
        optimizer = kind(weights, lr=0.02, weight_decay=0.05)
        for _ in range(2):
            for w in weights:
                w.grad = torch.randn(w.shape, generator=generator) * 1e-3
            optimizer.step()
        return [(w - b).detach() for w, b in zip(weights, before, strict=True)]

    native, again, torch_own = (run(kind) for kind in (fast.Muon, fast.Muon, torch.optim.Muon))
    for a, b, t in zip(native, again, torch_own, strict=True):
        assert torch.equal(a, b)
        assert error(a, t) < 0.02  # both are five steps in bfloat16; each is off by about 0.01


def test_muon_takes_odd_shapes_the_plain_way():
    weight = torch.nn.Parameter(torch.randn(10, 24))
    other = torch.nn.Parameter(weight.detach().clone())
    weight.grad = other.grad = torch.randn(10, 24)
    fast.Muon([weight], lr=0.02).step()
    torch.optim.Muon([other], lr=0.02).step()
    assert torch.equal(weight, other)


@native
@pytest.mark.parametrize("L", [1, 4, 16, 17, 33, 49, 65])
@pytest.mark.parametrize(("D", "heads"), [(32, 2), (32, 1), (64, 4), (96, 3), (96, 6), (192, 3)])
def test_nothing_of_what_memory_held_before_reaches_a_result(D: int, heads: int, L: int, monkeypatch):
    """The workspace is never cleared: fill it with bits that mean not-a-number, and nothing may change."""
    block, x = Block(D, heads), torch.randn(5, L, D)
    plain_workspace, plain_empty, results = fast._workspace, torch.empty, []
    for filling in (0, 255):

        def filled(*args, filling=filling, **options) -> torch.Tensor:
            empty = plain_empty(*args, **options)
            empty.view(torch.uint8).fill_(filling)
            return empty

        monkeypatch.setattr(torch, "empty", filled)
        monkeypatch.setattr(fast, "_workspace", lambda size, filling=filling: plain_workspace(size).fill_(filling))
        for tail in (None, max(1, L // 2)):
            block.zero_grad()
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = block(leaf, tail)
            y.square().sum().backward()
            results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters() if p.grad is not None)])
    for clean, dirty in zip(results[:2], results[2:], strict=True):
        for a, b in zip(clean, dirty, strict=True):
            assert torch.isfinite(a).all() and torch.equal(a, b)
