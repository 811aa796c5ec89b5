import math
from typing import Any

import pytest
import torch
from hugging_face import gradients, randomize, to_hugging_face
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from maelab.model import VisionTransformer, patchify, unpatchify
from maelab.model.vit import Block, DropPath

SMALL: dict[str, Any] = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5)


def small(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**{**SMALL, **changes})
    randomize(model)
    return model


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Patches


@pytest.mark.parametrize(("shape", "p"), [((2, 3, 8, 8), 4), ((1, 1, 4, 6), 2), ((2, 4, 9, 3), 3), ((1, 2, 5, 5), 1)])
def test_patchify_and_back(shape, p):
    imgs = images(*shape)
    B, C, H, W = shape
    patches = patchify(imgs, p)
    assert patches.shape == (B, (H // p) * (W // p), p * p * C)
    for b in range(B):
        for y in range(H):
            for x in range(W):
                for c in range(C):
                    place = (y // p) * (W // p) + x // p
                    assert patches[b, place, ((y % p) * p + x % p) * C + c] == imgs[b, c, y, x]
    assert torch.equal(unpatchify(patches, p, (H // p, W // p)), imgs)


def test_patch_embedding_is_the_convolution():
    model, imgs = small(in_chans=2), images(2, 2, 16, 16)
    expected = model.patch_embed.proj(imgs).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.patch_embed(patchify(imgs, 4)), expected, atol=1e-5, rtol=1e-5)


# Parity


@pytest.mark.parametrize(
    ("img_size", "p", "channels", "qkv_bias"),
    [((16, 16), 4, 3, True), ((28, 28), 7, 1, True), ((8, 12), 2, 4, False)],
)
def test_class_token_logits_and_gradients_equal_hugging_face(img_size, p, channels, qkv_bias):
    ours = small(img_size=img_size, patch_size=p, in_chans=channels, qkv_bias=qkv_bias, learned_pos_embed=True)
    theirs = ViTForImageClassification(
        ViTConfig(
            image_size=img_size, patch_size=p, num_channels=channels, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=128, qkv_bias=qkv_bias, layer_norm_eps=1e-6,
            num_labels=5,  # pyright: ignore[reportCallIssue]
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict(to_hugging_face(ours.state_dict()), strict=True)
    imgs, weights = images(3, channels, *img_size), images(3, 5, seed=2)

    logits, expected = ours(imgs), theirs(imgs, output_hidden_states=True)
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # the fused kernel
        torch.testing.assert_close(ours(imgs), expected.logits, atol=1e-5, rtol=1e-5)
    tokens = theirs.vit(imgs).last_hidden_state
    torch.testing.assert_close(ours.forward_features(imgs), tokens, atol=1e-5, rtol=1e-5)

    grads = to_hugging_face(gradients(ours, (logits * weights).sum()))
    expected_grads = gradients(theirs, (expected.logits * weights).sum())
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_hidden_width_comes_back_from_its_ratio():
    assert int(224 * (1952 / 224)) == 1951
    assert Block(224, 7, 1952 / 224).mlp.fc1.out_features == 1952 and Block(96, 3, 3.33).mlp.fc1.out_features == 319


@pytest.mark.parametrize("class_token", [True, False])
def test_average_pooling_by_hand(class_token):
    model, imgs = small(global_pool="avg", class_token=class_token), images(2, 3, 16, 16)
    x = model.embed(patchify(imgs, 4))
    for block in model.blocks:
        x = block(x)
    mean = torch.stack([x[:, i] for i in range(int(class_token), x.shape[1])]).sum(dim=0) / 16  # after no norm
    centred = mean - mean.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    assert isinstance(model.fc_norm, nn.LayerNorm)
    assert isinstance(model.head, nn.Linear)
    normed = normed * model.fc_norm.weight + model.fc_norm.bias
    expected = normed @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(imgs), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(model.norm, nn.Identity)
    assert not any(name.startswith("norm.") for name in model.state_dict())


def test_pool_picks_the_class_token_or_the_mean():
    tokens = images(2, 17, 32)
    model = small()
    assert torch.equal(model.pool(tokens), tokens[:, 0])
    assert torch.equal(model.pool(tokens, "avg"), tokens[:, 1:].mean(dim=1))
    assert torch.equal(small(global_pool="avg").pool(tokens, "token"), tokens[:, 0])


def test_without_classes_the_tokens_are_normalised():
    model, imgs = small(num_classes=0), images(2, 3, 16, 16)
    tokens = model.forward_features(imgs)
    assert tokens.shape == (2, 17, 32)
    assert torch.equal(model(imgs), tokens[:, 0])
    assert not any(name.startswith("head") for name in model.state_dict())
    plain = VisionTransformer(**{**SMALL, "num_classes": 0}).forward_features(imgs)
    torch.testing.assert_close(plain.mean(dim=-1), torch.zeros(2, 17), atol=1e-5, rtol=0)


def test_features_of_an_image_do_not_depend_on_its_batch_or_the_call():
    model, imgs = small(drop_path_rate=0.5).eval(), images(4, 3, 16, 16)
    features = model.forward_features(imgs)
    assert torch.equal(model.forward_features(imgs), features)
    torch.testing.assert_close(model.forward_features(imgs[2:3]), features[2:3], atol=1e-5, rtol=1e-5)


# Blocks


@pytest.mark.parametrize("tail", [0, 1, 4, 9])
def test_block_with_tail_gives_the_last_rows(tail):
    torch.manual_seed(0)
    block = Block(16, 4)
    randomize(block)
    x = images(3, 9, 16)
    full, last = block(x), block(x, tail=tail)
    assert last.shape == (3, tail, 16)
    torch.testing.assert_close(last, full[:, 9 - tail :], atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(block(x, tail=tail), full[:, 9 - tail :], atol=1e-6, rtol=1e-6)


def test_attention_attends_to_every_token():
    block, x = Block(16, 4), images(1, 5, 16).requires_grad_()
    (grad,) = torch.autograd.grad(block(x, tail=1).sum(), x)
    assert bool(grad.abs().sum(dim=-1).gt(0).all())


# Stochastic depth


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    drop = DropPath(0.3).train()
    y = drop(torch.ones(20000, 2, 3))
    per_sample = y[:, 0, 0]
    assert torch.equal(y, per_sample[:, None, None].expand_as(y))
    kept = per_sample != 0
    torch.testing.assert_close(per_sample[kept], torch.full_like(per_sample[kept], 1 / 0.7))
    assert abs(kept.float().mean().item() - 0.7) < 0.015
    assert abs(per_sample.mean().item() - 1) < 0.02


def test_drop_path_is_the_identity_in_eval_and_at_rate_zero():
    x = images(4, 2, 3)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0).train()(x) is x


def test_drop_path_rates_rise_to_the_last_block():
    rates = [block.drop_path.rate for block in small(depth=5, drop_path_rate=0.2).blocks]  # type: ignore[union-attr]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_drop_path_acts_on_training_only():
    imgs, plain, dropping = images(8, 3, 16, 16), small(), small(drop_path_rate=0.5)
    dropping.load_state_dict(plain.state_dict())
    assert torch.equal(dropping.eval()(imgs), plain(imgs))
    assert not torch.allclose(dropping.train()(imgs), plain(imgs), atol=1e-3)


def test_a_dropped_block_leaves_tokens_alone():
    torch.manual_seed(0)
    block, x = Block(16, 4, drop_path=0.5).train(), images(64, 3, 16)
    same = (block(x) == x).flatten(1).all(dim=1).float().mean().item()
    assert 0.1 < same < 0.4  # both branches dropped: 0.5 ** 2


# Patch drop


def test_patch_drop_leaves_patches_out_of_training_alone():
    model, imgs = small(patch_drop_rate=0.3), images(8, 3, 16, 16)
    plain = small()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(imgs), plain(imgs))
    imgs.requires_grad_()
    (grad,) = torch.autograd.grad(model.train()(imgs).sum(), imgs)
    seen = patchify(grad, 4).abs().sum(dim=-1) > 0  # (8, 16)
    assert seen.sum(dim=1).tolist() == [int(16 * 0.7)] * 8
    assert len({tuple(row) for row in seen.tolist()}) == 8  # others for each image


def test_patch_drop_keeps_places_and_the_class_token():
    model, imgs = small(depth=0, patch_drop_rate=0.99), images(4, 3, 16, 16)
    whole, kept = model.eval().forward_features(imgs), model.train().forward_features(imgs)
    assert kept.shape == (4, 2, 32)  # one patch stays, however few are asked for
    assert torch.equal(kept[:, 0], whole[:, 0])
    same = (kept[:, 1:] - whole[:, 1:]).abs().amax(dim=-1) < 1e-6  # (4, 16): which of all tokens it is
    assert same.sum(dim=1).tolist() == [1] * 4


# Training


@pytest.mark.parametrize(("pool", "class_token"), [("token", True), ("avg", True), ("avg", False)])
@pytest.mark.parametrize("learned", [False, True])
def test_every_trainable_parameter_gets_a_gradient(pool, class_token, learned):
    torch.manual_seed(0)
    kind = {"global_pool": pool, "class_token": class_token, "reg_tokens": 2 * class_token}
    model = VisionTransformer(**SMALL, **kind, learned_pos_embed=learned)
    loss = nn.functional.cross_entropy(model(images(4, 3, 16, 16)), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    for name, parameter in model.named_parameters():
        if name == "pos_embed" and not learned:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_training_starts_at_the_uniform_prediction():
    torch.manual_seed(0)
    loss = nn.functional.cross_entropy(VisionTransformer(**SMALL)(images(4, 3, 16, 16)), torch.tensor([0, 1, 2, 3]))
    assert loss.item() == pytest.approx(math.log(5), abs=1e-3)


def test_start_of_the_weights():
    torch.manual_seed(0)
    model = VisionTransformer(embed_dim=128, num_heads=4, depth=2)
    for weight in (model.patch_embed.proj.weight.flatten(1), *(p for n, p in model.named_parameters() if "mlp" in n)):
        if weight.dim() == 2:
            bound = math.sqrt(6 / sum(weight.shape))
            assert weight.abs().max().item() <= bound
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        else:
            assert not weight.any()
    assert model.cls_token is not None
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert 0 < model.head.weight.abs().max().item() < 2e-4  # type: ignore[union-attr]


def test_bfloat16_autocast_is_close_to_float32():
    model, imgs = small(), images(4, 3, 16, 16)
    full = model(imgs)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(imgs)
        with torch.no_grad():
            fused = model(imgs)
    assert half.dtype == torch.bfloat16
    for logits in (half, fused):
        error = (logits.float() - full).norm() / full.norm()
        assert 0 < error.item() < 0.03


def test_no_weight_decay_names_exist():
    model = small()
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    model = small(reg_tokens=2)
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "reg_token"}
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


# Impossible sizes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "patch_size 5 does not divide the image size 16x16"),
        ({"img_size": (16, 18)}, "patch_size 4 does not divide the image size 16x18"),
        ({"num_heads": 5}, "num_heads 5 does not divide embed_dim 32"),
        ({"embed_dim": 30, "num_heads": 3}, "4 divides, got 30"),
        ({"class_token": False}, "global_pool='token' needs class_token=True"),
        ({"class_token": False, "global_pool": "avg", "reg_tokens": 2}, "reg_tokens needs class_token=True"),
    ],
)
def test_impossible_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{**SMALL, **changes})
