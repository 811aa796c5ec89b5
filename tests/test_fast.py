"""The native blocks: errors against float32 no larger than autocast's own, for outputs and every gradient."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from maelab import native
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.model.vit import Block
from maelab.native import block as native_block
from maelab.training import blocks

needs_kernels = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.reason()}")


def plain(model: nn.Module) -> None:
    """Take the blocks through plain torch from now on."""
    for block in model.modules():
        if isinstance(block, Block):
            block.fast = None


def block_with_spread(dim: int, heads: int, **options) -> Block:
    """A block whose every parameter matters: weights that give uneven attention, biases and norms off their start."""
    block = Block(dim, heads, **options)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.08 if p.ndim > 1 else 0.3)
    block.fast = blocks.run_under_autocast
    return block


def taken(block: Block, x: torch.Tensor, tail: int | None = None) -> bool:
    """Whether the kernels serve this call."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return blocks.run(block, x, tail) is not None


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


@needs_kernels
@pytest.mark.parametrize(("D", "heads", "L", "tail", "B"), SHAPES)
def test_block_matches_float32_as_well_as_autocast_does(D: int, heads: int, L: int, tail: int | None, B: int):
    torch.manual_seed(0)
    block, x = block_with_spread(D, heads), torch.randn(B, L, D) * 1.5
    assert taken(block, x, tail)
    ours = results(block, x, True, tail)
    plain(block)
    exact, autocast = results(block, x, False, tail), results(block, x, True, tail)
    for name in exact:
        assert error(ours[name], exact[name]) < 1.5 * error(autocast[name], exact[name]) + 1e-4, name


@needs_kernels
def test_no_qkv_bias_and_other_mlp_width():
    torch.manual_seed(0)
    block, x = block_with_spread(96, 3, mlp_ratio=2.0, qkv_bias=False), torch.randn(4, 20, 96)
    ours = results(block, x, True)
    plain(block)
    for name, exact in results(block, x, False).items():
        assert error(ours[name], exact) < 0.02, name


@needs_kernels
def test_drop_path_drops_the_same_samples():
    block, x = block_with_spread(96, 3, drop_path=0.5), torch.randn(16, 10, 96)
    torch.manual_seed(5)
    ours = results(block, x, True)
    plain(block)
    torch.manual_seed(5)
    for name, exact in results(block, x, False).items():
        assert error(ours[name], exact) < 0.02, name


@needs_kernels
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6])
def test_gradients_of_any_size_are_as_exact(size: float):
    torch.manual_seed(0)
    block, x = block_with_spread(96, 3), torch.randn(5, 20, 96)
    of_one = results(block, x, True)
    of_size = results(block, x, True, gradient=size)
    for name in of_one:
        scale = 1.0 if name == "y" else size
        assert error(of_size[name], scale * of_one[name]) < 0.01, name


@needs_kernels
def test_gradients_that_grow_on_the_way_back_are_as_exact():
    """Large weights, and attention so even that all tokens are alike: sums that half precision cannot hold at first."""
    torch.manual_seed(0)
    block, x = block_with_spread(96, 3), torch.randn(1, 1, 96) + 0.1 * torch.randn(5, 20, 96)
    with torch.no_grad():
        for p in block.parameters():
            p.mul_(20)
        block.attn.qkv.weight[: 2 * 96] /= 200  # queries and keys
        block.attn.qkv.bias[: 2 * 96] /= 200
    ours = results(block, x, True)
    plain(block)
    for name, exact in results(block, x, False).items():
        assert ours[name].isfinite().all() and error(ours[name], exact) < 0.05, name


@needs_kernels
def test_same_input_same_bits():
    torch.manual_seed(0)
    block, x = block_with_spread(192, 3), torch.randn(64, 65, 192)
    first, second = results(block, x, True), results(block, x, True)
    assert all(torch.equal(first[n], second[n]) for n in first)


@needs_kernels
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


@needs_kernels
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


@needs_kernels
@pytest.mark.parametrize("class_token", [True, False])
def test_whole_models(class_token: bool):
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

    assert blocks.install(mae) == blocks.install(vit) == native.reason()
    ours = run(True)
    plain(mae)
    plain(vit)
    exact, autocast = run(False), run(True)
    assert ours.keys() == exact.keys()
    for name in exact:  # the error of a few numbers is luck: grant them more than a matrix
        slack = 5e-3 if exact[name].numel() < 16 else 1e-3
        assert error(ours[name], exact[name]) < 1.5 * error(autocast[name], exact[name]) + slack, name


def test_what_does_not_fit_takes_the_plain_path():
    block, x = block_with_spread(96, 3), torch.randn(2, 5, 96)
    assert blocks.run_under_autocast(block, x) is None  # float32
    assert not taken(block, x.double()) and not taken(block_with_spread(40, 2), torch.randn(2, 5, 40))
    for tail in (0, -1, 6):
        assert not taken(block, x, tail)
    assert not taken(block, x[:0]) and not taken(block, torch.randn(1, native.MAX_TOKENS + 1, 96))


@needs_kernels
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

    ours, again, torch_own = (run(kind) for kind in (native.Muon, native.Muon, torch.optim.Muon))
    for a, b, t in zip(ours, again, torch_own, strict=True):
        assert torch.equal(a, b)
        assert error(a, t) < 0.02  # both are five steps in bfloat16; each is off by about 0.01


def test_muon_in_float32_is_the_formula(monkeypatch):
    """Five steps of x = a x + (b G + c G G) x with G = x x^T (Jordan et al. 2024), in float64."""
    monkeypatch.setattr("maelab.native.muon.torch_multiplies_bf16", lambda: False)
    for rows, cols in [(10, 24), (24, 10), (96, 96)]:
        weight = torch.nn.Parameter(torch.randn(rows, cols))
        before, momentum = weight.detach().double(), torch.zeros(rows, cols, dtype=torch.float64)
        optimizer = native.Muon([weight], lr=0.02, weight_decay=0.1, momentum=0.95, kernels=False)
        for _ in range(2):
            weight.grad = torch.randn(rows, cols)
            optimizer.step()
            momentum = 0.95 * momentum + 0.05 * weight.grad.double()
            x = 0.05 * weight.grad.double() + 0.95 * momentum
            x /= x.norm()
            for _ in range(5):
                side = x @ x.T
                x = 3.4445 * x + (-4.7750 * side + 2.0315 * side @ side) @ x
            before = before * (1 - 0.02 * 0.1) - 0.02 * max(1, rows / cols) ** 0.5 * x
        assert error(weight.detach(), before.float()) < 1e-5
        assert optimizer.state[weight]["momentum_buffer"].dtype is torch.float32


def test_muon_takes_odd_shapes_the_plain_way(monkeypatch):
    monkeypatch.setattr("maelab.native.muon.torch_multiplies_bf16", lambda: True)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(10, 24))
    other = torch.nn.Parameter(weight.detach().clone())
    weight.grad = other.grad = torch.randn(10, 24)
    native.Muon([weight], lr=0.02).step()
    torch.optim.Muon([other], lr=0.02).step()
    torch.testing.assert_close(weight, other, rtol=0, atol=0.02 * 0.05)  # of a step of 0.02, in bfloat16


@needs_kernels
@pytest.mark.parametrize("L", [1, 4, 16, 17, 33, 49, 65])
@pytest.mark.parametrize(("D", "heads"), [(32, 2), (32, 1), (64, 4), (96, 3), (96, 6), (192, 3)])
def test_nothing_of_what_memory_held_before_reaches_a_result(D: int, heads: int, L: int, monkeypatch):
    """The workspace is never cleared: fill it with bits that mean not-a-number, and nothing may change."""
    block, x = Block(D, heads), torch.randn(5, L, D)
    block.fast = blocks.run_under_autocast
    plain_workspace, plain_empty, results = native_block.workspace, torch.empty, []
    for filling in (0, 255):

        def filled(*args, filling=filling, **options) -> torch.Tensor:
            empty = plain_empty(*args, **options)
            empty.view(torch.uint8).fill_(filling)
            return empty

        monkeypatch.setattr(torch, "empty", filled)
        monkeypatch.setattr(
            native_block, "workspace", lambda size, filling=filling: plain_workspace(size).fill_(filling)
        )
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


def check_like_torch(block: Block, x: torch.Tensor) -> None:
    """Output and gradients within bfloat16's error of those of plain torch."""
    ours = results(block, x, True)
    plain(block)
    for name, exact in results(block, x, False).items():
        assert error(ours[name], exact) < 0.02, name


@needs_kernels
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("attn.qkv.weight", lambda p: p.T.contiguous().T),
        ("mlp.fc2.weight", lambda p: torch.cat([p, p], dim=1)[:, : p.shape[1]]),
        ("mlp.fc1.bias", lambda p: p[:1].expand(p.shape)),
        ("norm1.weight", lambda p: torch.stack([p, p], dim=1)[:, 0]),
        ("mlp.fc1.weight", lambda p: torch.cat([p[0, :1], p.flatten()])[1:].view(p.shape)),
    ],
    ids=["transposed", "columns", "expanded", "every second", "at an odd address"],
)
def test_parameters_in_any_layout(name: str, change):
    torch.manual_seed(0)
    block, x = block_with_spread(96, 3), torch.randn(4, 9, 96)
    layer, _, parameter = name.rpartition(".")
    setattr(block.get_submodule(layer), parameter, nn.Parameter(change(block.get_parameter(name).detach())))
    assert taken(block, x)
    check_like_torch(block, x)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "shape"), [("attn.proj.weight", (96, 64)), ("mlp.fc1.bias", (96,)), ("norm2.bias", (1,))]
)
def test_parameters_of_another_shape_are_never_read(name: str, shape: tuple[int, ...]):
    block = block_with_spread(96, 3)
    layer, _, parameter = name.rpartition(".")
    setattr(block.get_submodule(layer), parameter, nn.Parameter(torch.zeros(shape)))
    assert not taken(block, torch.randn(4, 9, 96))


@needs_kernels
def test_tokens_that_are_not_contiguous():
    torch.manual_seed(0)
    block, x = block_with_spread(96, 3), torch.randn(9, 4, 96).transpose(0, 1)
    assert taken(block, x)
    check_like_torch(block, x)


class Adapted(nn.Module):
    """A linear layer with a low-rank addition, as LoRA puts one in place of the layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.weight, self.bias, self.out_features = base.weight, base.bias, base.out_features
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def twice_as_much(*given):
    output = given[-1]
    return tuple(2 * o for o in output) if isinstance(output, tuple) else 2 * output


def doubled(block: Block) -> None:
    block.attn.proj.__class__ = Doubled


def own_forward(block: Block) -> None:
    forward = block.mlp.forward
    block.mlp.forward = lambda x: 2 * forward(x)


def frozen_norm(block: Block) -> None:
    block.norm2 = nn.LayerNorm(96, eps=0.5)


CHANGES = {
    "wrapped": lambda block: setattr(block.attn, "qkv", Adapted(block.attn.qkv)),
    "subclass": doubled,
    "no MLP": lambda block: setattr(block, "mlp", nn.Identity()),
    "no drop path": lambda block: setattr(block, "drop_path", nn.Identity()),
    "parametrized": lambda block: parametrizations.weight_norm(block.mlp.fc1),
    "own forward": own_forward,
    "other eps": frozen_norm,
    "forward hook": lambda block: block.attn.register_forward_hook(twice_as_much),
    "forward pre-hook": lambda block: block.mlp.fc1.register_forward_pre_hook(lambda _, given: (2 * given[0],)),
    "backward hook": lambda block: block.norm1.register_full_backward_hook(lambda *given: twice_as_much(given[1])),
    "backward pre-hook": lambda block: block.attn.qkv.register_full_backward_pre_hook(
        lambda *given: twice_as_much(given[1])
    ),
}


@needs_kernels
@pytest.mark.parametrize("change", CHANGES)
def test_blocks_that_were_changed_take_the_plain_path(change: str):
    torch.manual_seed(0)
    block, x = block_with_spread(96, 3), torch.randn(3, 9, 96)
    assert taken(block, x)
    CHANGES[change](block)
    ours = results(block, x, True)
    plain(block)
    torch_own = results(block, x, True)
    assert all(torch.equal(ours[name], torch_own[name]) for name in torch_own), change


@needs_kernels
def test_a_hook_on_all_modules_is_called():
    block, seen = block_with_spread(96, 3), []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: seen.append(type(layer)))
    try:
        results(block, torch.randn(2, 5, 96), True)
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 4


@needs_kernels
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_the_gradients_are_the_same(reentrant: bool):
    torch.manual_seed(0)
    stack = nn.ModuleList(block_with_spread(96, 3) for _ in range(3))
    x = torch.randn(6, 9, 96)

    def run(saving: bool) -> list[torch.Tensor]:
        stack.zero_grad()
        y = leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            for block in stack:
                y = checkpoint(block, y, use_reentrant=reentrant) if saving else block(y)
        rubbish = [torch.full((n,), float("nan")) for n in (1 << 16, 1 << 18, 1 << 20)]  # in place of what was freed
        del rubbish
        y.square().sum().backward()
        return [leaf.grad, *(p.grad for p in stack.parameters())]  # type: ignore[list-item]

    whole = [g.clone() for g in run(False)]
    assert all(torch.equal(a, b) for a, b in zip(whole, run(True), strict=True))


@needs_kernels
def test_what_is_saved_may_be_moved_meanwhile():
    torch.manual_seed(0)
    block, x = block_with_spread(96, 3), torch.randn(6, 9, 96)
    whole = {n: g.clone() for n, g in results(block, x, True).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), lambda a: torch.from_numpy(a.copy())):
        moved = results(block, x, True)
    assert all(torch.equal(whole[n], moved[n]) for n in whole)


@needs_kernels
def test_backward_twice_gives_the_same_and_a_second_derivative_is_refused():
    torch.manual_seed(0)
    block, x = block_with_spread(96, 3), torch.randn(6, 9, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = block(x).square().sum()
    of = [x, *block.parameters()]
    first, second = (torch.autograd.grad(loss, of, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@needs_kernels
@pytest.mark.parametrize("by", ["hand", "Muon"])
def test_a_parameter_changed_before_the_backward_pass_is_noticed(by: str):
    block, x = block_with_spread(96, 3), torch.randn(6, 9, 96)
    weight = block.mlp.fc1.weight
    with torch.autocast("cpu", torch.bfloat16):
        loss = block(x).sum()
    weight.grad = torch.randn_like(weight)
    if by == "hand":
        with torch.no_grad():
            weight.mul_(2)
    else:
        native.Muon([weight], lr=0.02).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_kernels
def test_muon_reads_no_state_of_another_layout(monkeypatch):
    """As a checkpoint file may hold it."""
    monkeypatch.setattr("maelab.native.muon.torch_multiplies_bf16", lambda: True)
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 32))
    other = copy.deepcopy(weight)
    for kind, parameter in ((native.Muon, weight), (torch.optim.Muon, other)):
        optimizer = kind([parameter], lr=0.02)
        optimizer.state[parameter]["momentum_buffer"] = (
            torch.arange(64.0)[:, None].expand(64, 32).clone().T.contiguous().T
        )
        parameter.grad = torch.ones(64, 32)
        optimizer.step()
    torch.testing.assert_close(weight, other, rtol=0, atol=0.02 * 0.05)  # of a step of 0.02, in bfloat16


@needs_kernels
def test_defaults_of_torch_change_nothing():
    block, x = block_with_spread(96, 3), torch.randn(3, 9, 96)
    whole = {n: g.clone() for n, g in results(block, x, True).items()}
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(block(x), whole["y"])
    finally:
        torch.set_default_dtype(torch.float32)
