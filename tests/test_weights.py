"""Moving an encoder between models: exact copies, and what is adapted when channels, grid or head differ."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from maelab.errors import UsageError
from maelab.model import MaskedAutoencoderViT, VisionTransformer, sincos_pos_embed
from maelab.weights import adapt_channels, load_autoencoder, load_encoder, resize_patch_embed

SHAPE: dict[str, Any] = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER: dict[str, Any] = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}


def filled(model: VisionTransformer, seed: int) -> VisionTransformer:
    """The model with every number of its state drawn anew, so that nothing is equal by chance or by default."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        value.normal_(generator=generator)
    return model


def source(**changes) -> MaskedAutoencoderViT:
    model = filled(MaskedAutoencoderViT(**{**SHAPE, **DECODER, **changes}), seed=1)
    assert isinstance(model, MaskedAutoencoderViT)
    return model


def target(**changes) -> VisionTransformer:
    return filled(VisionTransformer(**{**SHAPE, "num_classes": 3, **changes}), seed=2)


def test_encoder_is_copied_exactly_and_the_head_is_not():
    given, model = source(), target()
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in given.state_dict().items()}
    assert load_encoder(model, given) == []
    for name, value in model.state_dict().items():
        expected = untouched[name] if name.startswith("head.") else before[name]
        assert torch.equal(value, expected), name
    for name, value in given.state_dict().items():
        assert torch.equal(value, before[name]), f"the source's {name} changed"
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(model.forward_features(images), given.forward_features(images))


def test_copies_do_not_share_memory():
    given, model = source(), target()
    load_encoder(model, given)
    with torch.no_grad():
        given.get_parameter("blocks.0.mlp.fc1.weight").zero_()
    assert model.get_parameter("blocks.0.mlp.fc1.weight").abs().sum() > 0


def test_mean_pooling_keeps_its_own_norm():
    model = target(global_pool="avg")
    own = model.get_parameter("fc_norm.weight").detach().clone()
    load_encoder(model, source())
    assert torch.equal(model.get_parameter("fc_norm.weight"), own)
    assert isinstance(model.norm, torch.nn.Identity)  # so the encoder's norm has nowhere to go
    assert torch.equal(model.get_parameter("blocks.1.norm2.bias"), source().get_parameter("blocks.1.norm2.bias"))


def test_from_one_classifier_to_another_with_other_classes():
    given, model = target(num_classes=7), target(num_classes=3)
    filled(given, seed=3)
    load_encoder(model, given)
    assert torch.equal(model.get_parameter("norm.weight"), given.get_parameter("norm.weight"))
    assert model.get_parameter("head.weight").shape == (3, 16)


@pytest.mark.parametrize(("old", "new"), [(1, 3), (3, 1), (3, 4), (4, 2)])
def test_inflated_channels_answer_a_grey_image_alike(old, new):
    given, model = source(in_chans=old), target(in_chans=new)
    assert load_encoder(model, given) == [f"patch embedding {old} -> {new} channels: inflate"]
    grey = torch.randn(2, 1, 16, 16)
    there = given.embed(given.to_patches(grey.expand(-1, old, -1, -1)))
    here = model.embed(model.to_patches(grey.expand(-1, new, -1, -1)))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_one_channel_repeats_and_divides():
    weight = torch.randn(8, 1, 4, 4)
    rgb = adapt_channels(weight, 3)
    assert rgb.shape == (8, 3, 4, 4)
    for channel in range(3):
        torch.testing.assert_close(rgb[:, channel], weight[:, 0] / 3)
    assert adapt_channels(rgb, 3) is rgb
    back = adapt_channels(rgb, 1)
    torch.testing.assert_close(back, weight)


def test_reinit_of_the_patch_embedding_keeps_the_new_one_whole():
    given, model = source(), target(in_chans=3)
    own = {name: value.clone() for name, value in model.patch_embed.state_dict().items()}
    assert load_encoder(model, given, patch_embed="reinit") == ["patch embedding 1 -> 3 channels: reinit"]
    for name, value in model.patch_embed.state_dict().items():
        assert torch.equal(value, own[name]), name
    assert torch.equal(model.get_parameter("blocks.0.attn.qkv.weight"), given.get_parameter("blocks.0.attn.qkv.weight"))
    same = target()  # with equal channels there is nothing to start anew
    load_encoder(same, given, patch_embed="reinit")
    assert torch.equal(same.patch_embed.proj.weight, given.patch_embed.proj.weight)


def test_position_embedding_is_interpolated_and_its_class_token_kept():
    given, model = source(), target(img_size=(24, 16))
    assert load_encoder(model, given) == ["position embedding 4x4 -> 6x4: interpolate"]
    old = given.pos_embed[:, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    grid = F.interpolate(old, size=(6, 4), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed[:, 1:], grid)
    assert torch.equal(model.pos_embed[:, :1], given.pos_embed[:, :1])


def test_fixed_positions_interpolate_close_to_the_fixed_ones_of_a_finer_grid():
    """Bicubic resampling of sines is good within; at 1.5 times the size a wave is 1.5 times as long."""
    given = MaskedAutoencoderViT(**{**SHAPE, **DECODER, "img_size": 32})  # 8 x 8 patches
    model = VisionTransformer(**{**SHAPE, "img_size": 48, "num_classes": 3})  # 12 x 12
    load_encoder(model, given)
    column = torch.sin((torch.arange(12) + 0.5) / 1.5 - 0.5)  # the fastest sine, at the new patches' centres
    found = model.pos_embed[0, 1:, 0].detach().reshape(12, 12)
    torch.testing.assert_close(found[6, 2:-2], column[2:-2], rtol=0, atol=0.05)


def test_reinit_of_positions_keeps_the_new_ones():
    given = source()
    model = VisionTransformer(**{**SHAPE, "img_size": 24, "num_classes": 3})
    assert load_encoder(model, given, pos_embed="reinit") == ["position embedding 4x4 -> 6x6: reinit"]
    assert torch.equal(model.pos_embed, sincos_pos_embed(16, (6, 6)))
    assert torch.equal(model.get_parameter("cls_token"), given.get_parameter("cls_token"))


def test_a_class_token_may_be_new_or_left_out():
    with_token, without = source(), source(class_token=False)
    model = target(class_token=False, global_pool="avg")
    load_encoder(model, with_token)
    assert torch.equal(model.pos_embed, with_token.pos_embed[:, 1:])

    model = target()
    token, place = model.get_parameter("cls_token").clone(), model.pos_embed[:, :1].clone()
    load_encoder(model, without)
    assert torch.equal(model.get_parameter("cls_token"), token)
    assert torch.equal(model.pos_embed[:, :1], place)
    assert torch.equal(model.pos_embed[:, 1:], without.pos_embed)


def test_larger_patches_answer_enlarged_patches_exactly():
    """What the pseudo-inverse promises (FlexiViT, section 3.4); plain resampling answers four times as loud."""
    weight, patch = torch.randn(8, 3, 4, 4), torch.randn(1, 3, 4, 4)
    enlarged = F.interpolate(patch, size=(8, 8), mode="bilinear", align_corners=False)
    new = resize_patch_embed(weight, 8)
    assert new.shape == (8, 3, 8, 8) and resize_patch_embed(weight, 4) is weight
    torch.testing.assert_close(F.conv2d(enlarged, new), F.conv2d(patch, weight), rtol=1e-4, atol=1e-4)


def test_smaller_patches_answer_as_if_enlarged():
    weight, patch = torch.randn(8, 3, 16, 16), torch.randn(2, 3, 4, 4)
    enlarged = F.interpolate(patch, size=(16, 16), mode="bilinear", align_corners=False)
    new = resize_patch_embed(weight, 4)
    torch.testing.assert_close(F.conv2d(patch, new), F.conv2d(enlarged, weight), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(resize_patch_embed(resize_patch_embed(new, 16), 4), new, rtol=1e-4, atol=1e-4)


def test_patches_channels_and_grid_at_once():
    given, model = source(img_size=32, in_chans=3, patch_size=8), target(img_size=(8, 16), patch_size=2, in_chans=1)
    assert load_encoder(model, given, patch_embed="resize") == [
        "position embedding 4x4 -> 4x8: interpolate",
        "patches 8x8 -> 2x2 pixels: resize",
        "patch embedding 3 -> 1 channels: resize",
    ]
    expected = adapt_channels(resize_patch_embed(given.patch_embed.proj.weight, 2), 1)
    torch.testing.assert_close(model.patch_embed.proj.weight, expected)


def test_channels_and_grid_at_once():
    """What the transfer from MNIST to CIFAR-10 does: 1 x 28 x 28 in 7 x 7 patches to 3 x 32 x 32 in 8 x 8."""
    given, model = source(img_size=28), target(img_size=32, in_chans=3)
    assert load_encoder(model, given) == [
        "position embedding 7x7 -> 8x8: interpolate",
        "patch embedding 1 -> 3 channels: inflate",
    ]
    assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 32}, "the initial weights have embed_dim 16, the new model 32; they must be equal"),
        ({"depth": 3}, "have depth 2, the new model 3"),
        ({"patch_size": 8}, "have patch_size 4, the new model 8"),
        ({"num_heads": 4}, "have num_heads 2, the new model 4"),
        ({"mlp_ratio": 2.0}, "have MLP width 64, the new model 32"),
    ],
)
def test_what_cannot_fit_is_refused_and_nothing_is_changed(change, message):
    model = target(**change)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=message):
        load_encoder(model, source())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("old", "new"), [(1, 3), (3, 1), (1, 13)])
def test_an_autoencoder_goes_on_with_other_channels(old, new):
    """A grey image is rebuilt as before: alike in every new channel, as the mean of the old ones."""
    given, model = source(in_chans=old), MaskedAutoencoderViT(**{**SHAPE, **DECODER, "in_chans": new})
    filled(model, seed=3)
    assert load_autoencoder(model, given) == [f"patch embedding {old} -> {new} channels: inflate"]
    grey, noise = torch.randn(2, 1, 16, 16), torch.rand(2, 16)
    there = given(grey.expand(-1, old, -1, -1), 0.5, noise)[1].unflatten(2, (16, old))  # (B, L, p * p, C)
    here = model(grey.expand(-1, new, -1, -1), 0.5, noise)[1].unflatten(2, (16, new))
    expected = there.mean(dim=3, keepdim=True).expand_as(here)
    torch.testing.assert_close(here, expected, rtol=1e-3, atol=1e-3)


def test_an_autoencoder_goes_on_at_another_size():
    given = MaskedAutoencoderViT(**SHAPE, **DECODER)
    model = filled(MaskedAutoencoderViT(**{**SHAPE, **DECODER, "img_size": (24, 16)}), seed=3)
    assert load_autoencoder(model, given) == ["position embedding 4x4 -> 6x4: interpolate"]  # type: ignore[arg-type]
    positions = model.state_dict()["decoder_pos_embed"]
    assert positions.shape == (1, 25, 8) and torch.equal(positions[:, 0], given.decoder_pos_embed[:, 0])
    between = positions[0, 1:].reshape(6, 4, 8)[:, :, :4]  # what encodes the column is alike in every row
    torch.testing.assert_close(between, given.decoder_pos_embed[0, 1:5, :4].expand(6, 4, 4), rtol=0, atol=1e-5)
    given_pred = given.decoder_pred.weight
    assert torch.equal(model.get_parameter("decoder_pred.weight"), given_pred)


@pytest.mark.parametrize("given", [target(), source(decoder_depth=2), source(decoder_num_heads=1)])
def test_pretraining_goes_on_from_an_encoder_alone_with_its_own_decoder(given):
    model = filled(MaskedAutoencoderViT(**SHAPE, **DECODER), seed=3)
    own = model.get_parameter("decoder_pred.weight").detach().clone()
    assert load_autoencoder(model, given) == ["a new decoder"]  # type: ignore[arg-type]
    assert torch.equal(model.get_parameter("decoder_pred.weight"), own)
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(model.forward_features(images), given.forward_features(images))
