import itertools
from typing import Any

import pytest
import torch
from hugging_face import gradients, randomize, to_hugging_face
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from maelab.model import MaskedAutoencoderViT, VisionTransformer, patchify, random_masking

SMALL: dict[str, Any] = dict(
    img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4,
    decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2,
)  # fmt: skip


def small(**changes) -> MaskedAutoencoderViT:
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**{**SMALL, **changes})
    randomize(model)
    return model


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(B: int = 3, L: int = 16, seed: int = 2) -> torch.Tensor:
    return torch.rand(B, L, generator=torch.Generator().manual_seed(seed))


def hidden_pixels(mask: torch.Tensor, patch_size: int, imgs: torch.Tensor) -> torch.Tensor:
    """A boolean (B, C, H, W) of the pixels of hidden patches, by loops."""
    result, columns = torch.zeros_like(imgs, dtype=torch.bool), imgs.shape[3] // patch_size
    for b, place in mask.nonzero().tolist():
        y, x = place // columns * patch_size, place % columns * patch_size
        result[b, :, y : y + patch_size, x : x + patch_size] = True
    return result


# Masking


@pytest.mark.parametrize(
    ("L", "ratio", "len_keep"), [(16, 0.75, 4), (16, 0.6, 6), (49, 0.75, 12), (11, 0.75, 2), (5, 0.0, 5), (7, 0.99, 0)]
)
def test_random_masking_is_the_naive_loop(L, ratio, len_keep):
    x, n = images(3, L, 2), noise(3, L)
    visible, mask, ids_restore = random_masking(x, ratio, n)
    assert visible.shape == (3, len_keep, 2)
    assert mask.dtype == torch.float32
    for b in range(3):
        order = sorted(range(L), key=lambda i, b=b: n[b, i].item())
        assert torch.equal(visible[b], x[b, order[:len_keep]])
        assert mask[b].tolist() == [float(i not in order[:len_keep]) for i in range(L)]  # 1 = hidden
        assert [order[i] for i in ids_restore[b].tolist()] == list(range(L))


def test_ids_restore_puts_tokens_back():
    x, n = images(3, 16, 2), noise()
    visible, mask, ids_restore = random_masking(x, 0.5, n)
    joined = torch.cat([visible, torch.full((3, 8, 2), 9.0)], dim=1)
    back = torch.stack([row[ids] for row, ids in zip(joined, ids_restore, strict=True)])
    assert torch.equal(back, torch.where(mask[..., None] == 1, 9.0, x))


def test_random_masking_draws_its_own_noise_per_sample():
    torch.manual_seed(0)
    x = images(64, 16, 1)
    masks = random_masking(x, 0.75)[1]
    assert torch.equal(masks.sum(dim=1), torch.full((64,), 12.0))
    assert len({tuple(row) for row in masks.tolist()}) > 50
    assert bool(((masks.mean(dim=0) - 0.75).abs() < 0.25).all())  # every place is hidden and shown
    assert not torch.equal(random_masking(x, 0.75)[1], masks)


@pytest.mark.parametrize("ratio", [0.5, 0.65, 0.75])
def test_the_model_masks_as_random_masking(ratio):
    model, imgs = small(), images(3, 3, 16, 16)
    latent, mask, ids_restore = model.forward_encoder(imgs, ratio, noise())
    _, expected, expected_ids = random_masking(patchify(imgs, 4), ratio, noise())
    assert torch.equal(mask, expected)
    assert torch.equal(ids_restore, expected_ids)
    assert latent.shape == (3, 1 + int(16 * (1 - ratio)), 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_the_callers_mask_is_used(dtype):
    model, imgs = small(), images(3, 3, 16, 16)
    mask = random_masking(patchify(imgs, 4), 0.5, noise())[1]
    loss, pred, given = model(imgs, mask=mask.to(dtype))
    assert torch.equal(given, mask)
    expected_loss, expected_pred, _ = model(imgs, 0.5, noise())  # the order among the visible does not matter
    torch.testing.assert_close(pred, expected_pred, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    latent = model.forward_encoder(imgs, mask=mask.to(dtype).reshape(3, 4, 4))[0]
    assert latent.shape == (3, 9, 32)


def test_unequal_masks_are_refused():
    mask = torch.zeros(2, 16)
    mask[0, :4] = mask[1, :5] = 1
    with pytest.raises(ValueError, match="hide the same number of patches"):
        small()(images(2, 3, 16, 16), mask=mask)


# Parity


@pytest.mark.parametrize(
    ("size", "p", "channels", "ratio", "qkv_bias"),
    [(16, 4, 3, 0.75, True), (28, 7, 1, 0.65, True), (12, 2, 4, 0.75, False), (24, 8, 3, 0.5, True)],
)
@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_prediction_mask_latent_and_gradients_equal_hugging_face(size, p, channels, ratio, qkv_bias, norm_pix):
    ours = small(img_size=size, patch_size=p, in_chans=channels, qkv_bias=qkv_bias, norm_pix_loss=norm_pix)
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=size, patch_size=p, num_channels=channels, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=128, qkv_bias=qkv_bias, layer_norm_eps=1e-6,
            decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
            decoder_intermediate_size=64, mask_ratio=ratio, norm_pix_loss=norm_pix,
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict(to_hugging_face(ours.state_dict()), strict=True)

    imgs, n = images(3, channels, size, size), noise(3, (size // p) ** 2)
    loss, pred, mask = ours(imgs, ratio, n)
    latent, _, ids_restore = ours.forward_encoder(imgs, ratio, n)
    expected = theirs(imgs, noise=n)
    encoder = theirs.vit(imgs, noise=n)
    assert torch.equal(mask, expected.mask)
    assert torch.equal(ids_restore, encoder.ids_restore)
    torch.testing.assert_close(latent, encoder.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pred, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)

    expected_grads = gradients(theirs, expected.loss)
    for grads in (gradients(ours, loss), gradients(ours, ours.training_loss(imgs, ratio, n))):
        grads = to_hugging_face(grads)
        assert grads.keys() == expected_grads.keys()
        for name, grad in expected_grads.items():
            torch.testing.assert_close(grads[name], grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# Loss


@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_is_the_naive_loop_over_hidden_patches(norm_pix):
    model, imgs = small(norm_pix_loss=norm_pix, img_size=(8, 12), in_chans=2), images(3, 2, 8, 12)
    loss, pred, mask = model(imgs, 0.5, noise(3, 6))
    errors = []
    for b, place in itertools.product(range(3), range(6)):
        if mask[b, place] == 1:
            y, x = place // 3 * 4, place % 3 * 4
            pixels = imgs[b, :, y : y + 4, x : x + 4].permute(1, 2, 0).flatten()
            if norm_pix:
                mean = pixels.sum() / 32
                variance = (pixels - mean).square().sum() / 31  # unbiased
                pixels = (pixels - mean) / (variance + 1e-6).sqrt()
            errors.append((pred[b, place] - pixels).square().sum() / 32)
    assert len(errors) == 9
    torch.testing.assert_close(loss, torch.stack(errors).mean(), atol=1e-6, rtol=1e-6)


def test_norm_pix_of_a_flat_patch_is_zero():
    model = small(norm_pix_loss=True)
    assert not model.target(torch.full((2, 3, 48), 0.5)).any()


def test_loss_ignores_predictions_of_visible_patches():
    model, imgs = small(), images(3, 3, 16, 16)
    loss, pred, mask = model(imgs, 0.75, noise())
    elsewhere = pred + 100 * (1 - mask)[..., None]
    torch.testing.assert_close(model.forward_loss(imgs, elsewhere, mask), loss)
    assert model.forward_loss(imgs, pred + 100 * mask[..., None], mask).item() > 1000


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("decoder_depth", [0, 1, 2])
def test_training_loss_equals_forward(decoder_depth, norm_pix, class_token):
    model = small(
        decoder_depth=decoder_depth, norm_pix_loss=norm_pix, class_token=class_token, learned_pos_embed=True,
        img_size=(12, 16),
    )  # fmt: skip
    imgs, n = images(3, 3, 12, 16), noise(3, 12)
    torch.testing.assert_close(model.training_loss(imgs, 0.7, n), model(imgs, 0.7, n)[0], atol=0, rtol=1e-5)

    model, imgs = model.double(), imgs.double()  # so that the order of sums does not show
    expected, loss = model(imgs, 0.7, n)[0], model.training_loss(imgs, 0.7, n)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    grads, expected_grads = gradients(model, loss), gradients(model, expected)
    for name, grad in expected_grads.items():
        error = (grads[name] - grad).norm().item()
        assert error <= 1e-6 * grad.norm().item(), name
    # Without a decoder block the hidden tokens cannot see the visible ones: the encoder learns nothing.
    assert bool(expected_grads["patch_embed.proj.weight"].any()) is (decoder_depth > 0)


def test_training_loss_draws_noise_as_forward_does():
    model, imgs = small(), images(3, 3, 16, 16)
    torch.manual_seed(5)
    loss = model.training_loss(imgs)
    torch.manual_seed(5)
    torch.testing.assert_close(model(imgs)[0], loss, atol=0, rtol=1e-5)
    assert model.training_loss(imgs).item() != pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("learned", [False, True])
def test_every_trainable_parameter_gets_a_gradient(learned, class_token):
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**SMALL, learned_pos_embed=learned, class_token=class_token)
    model.training_loss(images(4, 3, 16, 16)).backward()
    for name, parameter in model.named_parameters():
        if name.endswith("pos_embed") and not learned:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and bool(parameter.grad.any()), name


# What a hidden pixel may reach


def test_hidden_pixels_reach_only_the_loss():
    model, imgs = small(), images(3, 3, 16, 16)
    loss, pred, mask = model(imgs, 0.75, noise())
    latent = model.forward_encoder(imgs, 0.75, noise())[0]
    others = torch.where(hidden_pixels(mask, 4, imgs), images(3, 3, 16, 16, seed=9), imgs)
    other_loss, other_pred, _ = model(others, 0.75, noise())
    assert torch.equal(model.forward_encoder(others, 0.75, noise())[0], latent)
    assert torch.equal(other_pred, pred)
    assert other_loss.item() != loss.item()


def test_every_visible_pixel_reaches_the_prediction():
    model, imgs = small(), images(3, 3, 16, 16).requires_grad_()
    _, pred, mask = model(imgs, 0.75, noise())
    (grad,) = torch.autograd.grad((pred * images(*pred.shape, seed=4)).sum(), imgs)
    assert torch.equal(grad == 0, hidden_pixels(mask, 4, imgs))
    visible = (mask[0] == 0).nonzero()[0].item()
    changed = imgs.detach().clone()
    changed[0, 0, int(visible) // 4 * 4, int(visible) % 4 * 4] += 0.5
    changed_pred = model(changed, 0.75, noise())[1]
    assert not torch.allclose(changed_pred[0], pred[0], atol=1e-4)
    torch.testing.assert_close(changed_pred[1:], pred[1:])  # the other samples of the batch


def test_masked_positions_are_told_apart_by_position_alone():
    """Two hidden patches of one image differ in prediction; with the positions removed they do not."""
    model, imgs = small(), images(1, 3, 16, 16)
    hidden = model(imgs, 0.75, noise(1))[2][0] == 1
    pred = model(imgs, 0.75, noise(1))[1][0, hidden]
    assert not torch.allclose(pred[0], pred[1], atol=1e-4)
    model.decoder_pos_embed.data.zero_()
    pred = model(imgs, 0.75, noise(1))[1][0, hidden]
    torch.testing.assert_close(pred, pred[:1].expand_as(pred), atol=1e-5, rtol=1e-5)


# The encoder on its own


@pytest.mark.parametrize("class_token", [True, False])
def test_features_are_unmasked_and_deterministic(class_token):
    model, imgs = small(class_token=class_token), images(3, 3, 16, 16)
    features = model.forward_features(imgs)
    assert features.shape == (3, 16 + class_token, 32)
    assert torch.equal(model.forward_features(imgs), features)
    ordered = torch.arange(16).expand(3, 16) / 16  # nothing hidden, in grid order
    torch.testing.assert_close(model.forward_encoder(imgs, 0.0, ordered)[0], features, atol=1e-6, rtol=1e-6)


def test_the_encoder_is_a_vision_transformer():
    model, imgs = small(), images(3, 3, 16, 16)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=0)
    missing, unexpected = vit.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith(("decoder_", "mask_token")) for name in unexpected)
    assert torch.equal(vit.forward_features(imgs), model.forward_features(imgs))


# Numbers


@pytest.mark.parametrize("norm_pix", [True, False])
def test_bfloat16_autocast_is_close_to_float32(norm_pix):
    model, imgs = small(norm_pix_loss=norm_pix), images(3, 3, 16, 16)
    loss, pred, _ = model(imgs, 0.75, noise())
    with torch.autocast("cpu", torch.bfloat16):
        half_loss, half_pred, _ = model(imgs, 0.75, noise())
        training_loss = model.training_loss(imgs, 0.75, noise())
    assert half_pred.dtype == torch.bfloat16
    assert 0 < ((half_pred.float() - pred).norm() / pred.norm()).item() < 0.03
    for value in (half_loss, training_loss):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(loss.item(), rel=0.01)
    grads = gradients(model, loss)
    for name, grad in gradients(model, training_loss).items():
        assert (grad - grads[name]).norm().item() < 0.1 * grads[name].norm().item() + 1e-4, name


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    model, imgs = MaskedAutoencoderViT(**SMALL), images(8, 3, 16, 16) * 0.1 + 0.5
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model.training_loss(imgs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_no_weight_decay_names_exist():
    model = small()
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "mask_token", "decoder_pos_embed"}
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "patch_size 5 does not divide the image size 16x16"),
        ({"num_heads": 5}, "num_heads 5 does not divide embed_dim 32"),
        ({"decoder_num_heads": 3}, "decoder_num_heads 3 does not divide decoder_embed_dim 16"),
        ({"decoder_embed_dim": 18}, "4 divides, got 18"),
    ],
)
def test_impossible_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoderViT(**{**SMALL, **changes})
