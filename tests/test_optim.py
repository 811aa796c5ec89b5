"""Learning-rate schedule, parameter groups and steps of the optimizers, on whole small models."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from maelab.config import BlocksConfig
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.training.optim import build_optimizers, keep_learning_rate, layer_index, schedule, set_learning_rate

DEPTH = 3
SHAPE: dict[str, Any] = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": DEPTH, "num_heads": 2}
SPARED = ("bias", "norm", "pos_embed", "cls_token", "mask_token")  # parts of the names that weight decay spares


def classifier(**more) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**SHAPE, num_classes=5, learned_pos_embed=True, **more)


def autoencoder(**more) -> MaskedAutoencoderViT:
    torch.manual_seed(0)
    return MaskedAutoencoderViT(
        **SHAPE, decoder_embed_dim=8, decoder_depth=2, decoder_num_heads=2, learned_pos_embed=True, **more
    )


def grouped(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, list[tuple[str, dict]]]:
    """Parameter name -> every (optimizer, group) that holds it."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, list[tuple[str, dict]]] = {name: [] for name in name_of.values()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found[name_of[id(parameter)]].append((type(optimizer).__name__, group))
    return found


def test_schedule_warms_up_linearly_and_falls_as_a_cosine():
    values = [schedule(step, total_steps=12, warmup_steps=4) for step in range(12)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4] == 1.0  # the cosine begins at the top
    for step in range(4, 12):
        assert values[step] == pytest.approx((1 + math.cos(math.pi * (step - 4) / 8)) / 2)
    assert values[8] == pytest.approx(0.5)
    assert 0 < values[-1] < 0.04  # the last step still learns; the next would not
    assert schedule(12, 12, 4) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("warmup", [0, 5, 9])
def test_schedule_is_finite_at_its_corners(warmup):
    values = [schedule(step, 5, warmup) for step in range(5)]
    assert all(0 < value <= 1 for value in values)
    assert values == sorted(values, reverse=warmup == 0)  # a warm-up of the whole run or more only rises


def test_set_learning_rate_scales_each_group_by_its_own_top():
    optimizers = build_optimizers(classifier(), BlocksConfig(optimizer="muon", batch_size=512), layer_decay=0.5)
    set_learning_rate(optimizers, 0.25)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert len({group["base_lr"] for group in groups}) > DEPTH
    for group in groups:
        assert group["lr"] == pytest.approx(group["base_lr"] / 4)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("cls_token", 0),
        ("pos_embed", 0),
        ("patch_embed.proj.weight", 0),
        ("patch_embed.proj.bias", 0),
        ("blocks.0.norm1.weight", 1),
        ("blocks.2.mlp.fc2.bias", 3),
        ("blocks.11.attn.qkv.weight", 12),
        ("norm.weight", 13),
        ("fc_norm.bias", 13),
        ("head.weight", 13),
        ("decoder_blocks.0.attn.qkv.weight", 13),
        ("decoder_pos_embed", 13),
        ("mask_token", 13),
    ],
)
def test_layer_index(name, layer):
    assert layer_index(name, depth=12) == layer


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_layer_decay_scales_the_rate_of_every_parameter(optimizer):
    model, config = classifier(global_pool="avg"), BlocksConfig(optimizer=optimizer, batch_size=512, blr=1e-3)
    for name, found in grouped(model, build_optimizers(model, config, layer_decay=0.5)).items():
        kind, group = found[0]
        below = 4  # embeddings: three blocks and the head are above
        if name.startswith("blocks."):
            below = DEPTH - int(name.split(".")[1])
        elif name.startswith(("head", "norm", "fc_norm")):
            below = 0
        top = config.muon_lr if kind == "Muon" else 2e-3  # blr * batch / 256
        assert group["base_lr"] == pytest.approx(top * 0.5**below), name
        assert group["lr"] == group["base_lr"], name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("make", [classifier, autoencoder])
def test_weight_decay_spares_norms_biases_and_embeddings(make, optimizer):
    model = make()
    config = BlocksConfig(optimizer=optimizer, weight_decay=0.3)
    for name, found in grouped(model, build_optimizers(model, config)).items():
        spared = any(part in name for part in SPARED)
        assert found[0][1]["weight_decay"] == (0.0 if spared else 0.3), name
    decayed = {"patch_embed.proj.weight", "head.weight", "decoder_embed.weight", "decoder_pred.weight"}
    assert decayed & dict(model.named_parameters()).keys(), "the rule above would hold of nothing"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("make", [classifier, autoencoder, lambda: nn.Linear(4, 3)])
def test_every_trainable_parameter_is_in_exactly_one_group(make, optimizer):
    model = make()
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    for name, found in grouped(model, build_optimizers(model, BlocksConfig(optimizer=optimizer))).items():
        assert len(found) == (0 if dict(model.named_parameters())[name] is frozen else 1), name


@pytest.mark.parametrize("make", [classifier, autoencoder])
def test_muon_gets_exactly_the_matrices_of_the_blocks(make):
    model = make()
    found = grouped(model, build_optimizers(model, BlocksConfig(optimizer="muon")))
    stacks = ["blocks", "decoder_blocks"] if isinstance(model, MaskedAutoencoderViT) else ["blocks"]
    expected = {
        f"{stack}.{i}.{matrix}.weight"
        for stack in stacks
        for i in range(len(model.get_submodule(stack)))  # type: ignore[arg-type]
        for matrix in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert {name for name, [(kind, _)] in found.items() if kind == "Muon"} == expected
    assert {kind for [(kind, _)] in found.values()} == {"Muon", "AdamW"}


def test_adamw_alone_without_muon():
    assert [type(o).__name__ for o in build_optimizers(classifier(), BlocksConfig())] == ["AdamW"]


def test_adamw_steps_as_written_in_the_paper():
    """Against the update of Loshchilov and Hutter (arXiv 1711.05101, algorithm 2), in float64 and by hand."""
    model = classifier()
    config = BlocksConfig(blr=0.5, batch_size=128, weight_decay=0.1, beta2=0.9)
    (optimizer,) = build_optimizers(model, config, layer_decay=0.5)
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    scale = {"patch_embed.proj.weight": 0.5**4, "blocks.0.norm1.bias": 0.5**3, "head.weight": 1.0}
    decay = {"patch_embed.proj.weight": 0.1, "blocks.0.norm1.bias": 0.0, "head.weight": 0.1}
    first = {name: torch.zeros_like(p) for name, p in before.items()}
    second = {name: torch.zeros_like(p) for name, p in before.items()}
    generator = torch.Generator().manual_seed(1)
    for t, factor in enumerate((0.5, 1.0, 0.8), start=1):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rate([optimizer], factor)
        optimizer.step()
        for name in scale:
            grad = model.get_parameter(name).grad
            assert grad is not None
            lr = 0.25 * factor * scale[name]  # blr * batch_size / 256, on schedule
            first[name] = 0.9 * first[name] + 0.1 * grad.double()
            second[name] = 0.9 * second[name] + 0.1 * grad.double() ** 2
            step = (first[name] / (1 - 0.9**t)) / ((second[name] / (1 - 0.9**t)).sqrt() + 1e-8)
            before[name] = before[name] * (1 - lr * decay[name]) - lr * step
            torch.testing.assert_close(model.get_parameter(name).double(), before[name], rtol=1e-5, atol=1e-6)


def test_muon_moves_a_matrix_by_a_nearly_orthogonal_update_and_decays_it():
    model = classifier()
    optimizers = build_optimizers(model, BlocksConfig(optimizer="muon", muon_lr=0.1, weight_decay=0.5))
    matrix = model.get_parameter("blocks.0.mlp.fc1.weight")  # (64, 16)
    before = matrix.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    matrix.grad = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * 1e-3  # its size must not matter
    for optimizer in optimizers:
        optimizer.step()
    update = (before * (1 - 0.1 * 0.5) - matrix.detach()) / (0.1 * math.sqrt(64 / 16))
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.5 and singular.max() < 1.4, singular  # five Newton-Schulz steps do not go further
    other = model.get_parameter("blocks.1.mlp.fc1.weight").detach()
    torch.testing.assert_close(other, classifier().get_parameter("blocks.1.mlp.fc1.weight").detach() * 0.95)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_in_tensors_step_as_rates_in_numbers(optimizer):
    """A captured step reads them where they were when it was recorded."""

    def run(device: torch.device | None) -> tuple[list[torch.Tensor], list[Any]]:
        model, rates = classifier(), []
        optimizers = build_optimizers(model, BlocksConfig(optimizer=optimizer, blr=0.1, weight_decay=0.3))
        keep_learning_rate(optimizers, device)
        for step in range(3):
            set_learning_rate(optimizers, schedule(step, 3, 1))
            rates.append([group["lr"] for o in optimizers for group in o.param_groups])
            model(torch.ones(2, 1, 8, 8)).square().sum().backward()
            for o in optimizers:
                o.step()
                o.zero_grad()
        keep_learning_rate(optimizers, None)
        assert all(type(group["lr"]) is float for o in optimizers for group in o.param_groups)
        return [p.detach() for p in model.parameters()], rates

    (ours, places), (theirs, numbers) = run(torch.device("cpu")), run(None)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert all(a is b for first in places for a, b in zip(first, places[0], strict=True))
    assert numbers[0] != numbers[2]
