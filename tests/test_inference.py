"""Features, neighbours, errors and reconstructions, each against the same thing computed plainly."""

import math
from typing import Any

import pytest
import torch

from maelab import inference
from maelab.data import Dataset, ImageSet
from maelab.data.batches import scale
from maelab.inference import (
    attention_maps,
    attention_rollout,
    attention_to_patches,
    class_probabilities,
    classification_scores,
    count_parameters,
    denormalise,
    effective_rank,
    extract_features,
    knn_accuracy,
    masked_mse,
    reconstruct_images,
    visible_mean_mse,
)
from maelab.model import MaskedAutoencoderViT, VisionTransformer, patchify
from maelab.model.masks import make_mask

SHAPE: dict[str, Any] = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER: dict[str, Any] = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}


def autoencoder(**changes) -> MaskedAutoencoderViT:
    torch.manual_seed(0)
    return MaskedAutoencoderViT(**{**SHAPE, **DECODER, **changes})


def classifier(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**{**SHAPE, "num_classes": 10, **changes})
    torch.nn.init.normal_(model.head.weight)  # type: ignore[arg-type]
    return model


def first(data: Dataset, n: int) -> ImageSet:
    return data.train[torch.arange(n)]


def test_count_parameters_leaves_out_what_is_frozen():
    model = torch.nn.Linear(3, 4)
    assert count_parameters(model) == 16
    model.bias.requires_grad_(False)
    assert count_parameters(model) == 12


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_features_equal_a_pass_by_hand_and_are_deterministic(mnist_small, monkeypatch, pool):
    monkeypatch.setattr(inference, "EVAL_BATCH", 4)  # 10 images: two whole batches and a part
    data, model = first(mnist_small, 10), classifier(drop_path_rate=0.9)
    features = extract_features(model.train(), data, pool)
    assert features.shape == (10, 16) and features.dtype == torch.float32 and not features.requires_grad
    for i in range(10):
        x = model.embed(patchify(data.images[i : i + 1].float() / 127.5 - 1, 7))
        for block in model.blocks:
            x = block(x)
        x = model.norm(x)[0]
        expected = x[0] if pool == "token" else x[1:].sum(dim=0) / 16
        torch.testing.assert_close(features[i], expected, rtol=1e-4, atol=1e-5)
    torch.manual_seed(99)
    assert torch.equal(extract_features(model.train(), data, pool), features)


def test_features_of_an_autoencoder_see_every_patch(mnist_small):
    data, model = first(mnist_small, 3), autoencoder()
    features = extract_features(model, data)
    for row, column in ((0, 0), (13, 20), (27, 27)):
        changed = ImageSet(data.images.clone(), None)
        changed.images[:, :, row, column] ^= 255
        moved = (extract_features(model, changed) - features).abs().sum(dim=1)
        assert (moved > 0).all(), f"nothing was seen of the patch at {row}, {column}"


def test_the_class_token_cannot_be_taken_where_there_is_none(mnist_small):
    with pytest.raises(ValueError, match="no class token; use pool='avg'"):
        extract_features(autoencoder(class_token=False), first(mnist_small, 2), "token")


def naive_knn(features, labels, queries, query_labels, k) -> float:
    """One query and one neighbour at a time, in float64."""
    centre = [sum(f[d] for f in features) / len(features) for d in range(len(features[0]))]

    def unit(v):
        v = [a - b for a, b in zip(v, centre, strict=True)]
        length = math.sqrt(sum(a * a for a in v))
        return [a / length for a in v]

    features, right = [unit(f) for f in features], 0
    for query, truth in zip(map(unit, queries), query_labels, strict=True):
        near = sorted(
            ((sum(a * b for a, b in zip(query, f, strict=True)), c) for f, c in zip(features, labels, strict=True)),
            reverse=True,
        )
        votes: dict[int, float] = {}
        for similarity, label in near[:k]:
            votes[label] = votes.get(label, 0) + math.exp(similarity / 0.07)
        right += max(votes, key=lambda label: votes[label]) == truth
    return right / len(query_labels)


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
def test_knn_equals_a_naive_loop(mnist_small, k):
    train, test = first(mnist_small, 80), mnist_small.test[torch.arange(60)]
    features, queries = extract_features(autoencoder(), train), extract_features(autoencoder(), test)
    assert train.labels is not None and test.labels is not None
    expected = naive_knn(features.tolist(), train.labels.tolist(), queries.tolist(), test.labels.tolist(), k)
    assert 0.15 < expected < 1 or k == 1000
    assert knn_accuracy(features, train.labels, queries, test.labels, k) == pytest.approx(expected)


@pytest.mark.parametrize(("nearer", "winner"), [(0.851, 0), (0.846, 1)])
def test_knn_weighs_votes_by_a_temperature_of_7_percent(nearer, winner):
    """One neighbour outvotes two at a similarity of 0.8 if it is more than 0.07 ln 2 = 0.0485 nearer."""
    cosines = torch.tensor([nearer, 0.8, 0.8])
    near = torch.stack([cosines, (1 - cosines**2).sqrt() * torch.tensor([1, 1, -1])], dim=1)
    features, labels = torch.cat([near, -near]), torch.tensor([0, 1, 1, 2, 2, 2])  # the mean is 0
    assert knn_accuracy(features, labels, torch.tensor([[1.0, 0.0]]), torch.tensor([winner]), k=3) == 1.0


def test_knn_counts_every_chunk_of_queries():
    features = torch.eye(3).repeat(2, 1)
    labels = torch.arange(3).repeat(2)
    queries = torch.eye(3).repeat(1000, 1)  # 3000: two whole chunks and a part
    assert knn_accuracy(features, labels, queries, torch.arange(3).repeat(1000), k=2) == 1.0
    assert knn_accuracy(features, labels, queries, torch.full((3000,), 2), k=2) == pytest.approx(1 / 3)


def test_knn_of_a_class_without_neighbours_is_wrong_and_no_error():
    assert knn_accuracy(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 7]), k=1) == 0.5


def test_knn_is_exact_under_bf16_autocast():
    """Neighbours closer together than bf16 can tell."""
    torch.manual_seed(0)
    features = torch.eye(2, 16).repeat(4, 1) + 0.01 * torch.randn(8, 16)  # cosines of 0.998 beside those of 1
    labels = torch.arange(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert knn_accuracy(features, labels, features, labels, k=1) == 1.0


def by_hand(model: MaskedAutoencoderViT, images: torch.Tensor, ratio: float, noise: torch.Tensor) -> list[float]:
    """Squared errors of every hidden pixel, one pixel at a time."""
    _, pred, mask = model.eval()(images, ratio, noise)
    p, columns = model.patch_size, model.grid_size[1]
    errors = []
    for i, patch in mask.nonzero().tolist():
        row, column = patch // columns * p, patch % columns * p
        for a in range(p):
            for b in range(p):
                for c in range(model.in_chans):
                    guess = pred[i, patch, (a * p + b) * model.in_chans + c]
                    errors.append(float((guess - images[i, c, row + a, column + b]) ** 2))
    return errors


@torch.no_grad()
def test_masked_mse_equals_a_loop_over_hidden_pixels(mnist_small, monkeypatch):
    monkeypatch.setattr(inference, "EVAL_BATCH", 4)
    data, model = first(mnist_small, 6), autoencoder()
    scores = masked_mse(model, data, 0.75, seed=3)
    generator = torch.Generator().manual_seed(3)
    noise = torch.cat([torch.rand(4, 16, generator=generator), torch.rand(2, 16, generator=generator)])
    errors = by_hand(model, scale(data.images), 0.75, noise)
    assert len(errors) == 6 * 12 * 49
    assert scores["masked_mse"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert scores["loss"] == pytest.approx(scores["masked_mse"], rel=1e-5)
    assert masked_mse(model, data, 0.75, seed=3) == scores
    assert masked_mse(model, data, 0.75, seed=4) != scores


def test_masked_mse_of_a_normalised_target_is_in_pixels(cifar_small):
    """It takes the true mean and deviation of each patch; loss stays on the target's scale."""
    data, model = first(cifar_small, 6), autoencoder(img_size=32, patch_size=8, in_chans=3, norm_pix_loss=True)
    scores = masked_mse(model, data, 0.5, seed=0)
    images = scale(data.images)
    noise = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss, pred, mask = model.eval()(images, 0.5, noise)
    errors = []
    for i, patch in mask.nonzero().tolist():
        truth = patchify(images, 8)[i, patch]
        n = truth.numel()
        mean = truth.sum() / n
        variance = ((truth - mean) ** 2).sum() / (n - 1)
        errors.append(float((((pred[i, patch] * (variance + 1e-6).sqrt() + mean) - truth) ** 2).mean()))
    assert scores["masked_mse"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert scores["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert scores["loss"] > 2 * scores["masked_mse"]  # so the two scales cannot be mistaken for each other here


def test_denormalise_undoes_the_normalised_target():
    patches = torch.randn(2, 5, 12)
    model = autoencoder(norm_pix_loss=True)
    torch.testing.assert_close(denormalise(model, model.target(patches), patches), patches)
    assert torch.equal(denormalise(autoencoder(), patches * 2, patches), patches * 2)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstructions_paste_the_originals_exactly(cifar_small, norm_pix_loss):
    model = autoencoder(img_size=32, patch_size=8, in_chans=3, norm_pix_loss=norm_pix_loss)
    data = first(cifar_small, 5)
    images = scale(data.images)
    masked, rebuilt, error = reconstruct_images(model, images, make_mask("random", (4, 4), 5, 0.75, seed=2))
    noise = torch.rand(5, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        _, pred, mask = model.eval()(images, 0.75, noise)
    hidden = (
        mask.reshape(5, 1, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3).bool().expand(-1, 3, -1, -1)
    )
    assert torch.equal(masked[~hidden], images[~hidden]) and torch.equal(rebuilt[~hidden], images[~hidden])
    assert (masked[hidden] == 0).all()
    assert not torch.equal(rebuilt[hidden], images[hidden])
    assert rebuilt.min() >= -1 and rebuilt.max() <= 1
    i, patch = mask.nonzero()[7].tolist()
    row, column = patch // 4 * 8, patch % 4 * 8
    truth = patchify(images, 8)
    expected = denormalise(model, pred, truth)[i, patch].clamp(-1, 1).reshape(8, 8, 3).permute(2, 0, 1)
    torch.testing.assert_close(rebuilt[i, :, row : row + 8, column : column + 8], expected)
    assert error == pytest.approx(masked_mse(model, data, 0.75, seed=2)["masked_mse"], rel=1e-5)


def test_the_mean_of_the_visible_pixels(cifar_small):
    model, images = autoencoder(img_size=32, patch_size=8, in_chans=3), scale(first(cifar_small, 3).images)
    mask = make_mask("random", (4, 4), 3, 0.75, seed=0)
    hidden = mask.reshape(3, 1, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3).bool()[:, 0]
    errors = []
    for image, where in zip(images, hidden, strict=True):
        for channel in image:
            errors += ((channel[where] - channel[~where].mean()) ** 2).tolist()
    assert visible_mean_mse(model, images, mask) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_probabilities_are_the_softmax_in_order(mnist_small, monkeypatch):
    monkeypatch.setattr(inference, "EVAL_BATCH", 4)
    data, model = first(mnist_small, 10), classifier(drop_path_rate=0.9)
    probabilities = class_probabilities(model.train(), data)
    assert probabilities.shape == (10, 10) and probabilities.dtype == torch.float32
    for i in range(10):
        logits = model(scale(data.images[i : i + 1]))[0].tolist()
        total = sum(math.exp(v) for v in logits)
        assert probabilities[i].tolist() == pytest.approx([math.exp(v) / total for v in logits], rel=1e-3, abs=1e-6)


def test_scores_equal_a_naive_loop():
    torch.manual_seed(0)
    probabilities = (3 * torch.randn(50, 4)).softmax(dim=1)
    labels = torch.randint(4, (50,))
    right = sum(max(range(4), key=lambda c: row[c]) == y for row, y in zip(probabilities, labels, strict=True))
    loss = -sum(math.log(row[y]) for row, y in zip(probabilities.tolist(), labels.tolist(), strict=True)) / 50
    assert 0 < right < 50
    scores = classification_scores(probabilities, labels)
    assert scores == {"accuracy": right / 50, "loss": pytest.approx(loss, rel=1e-5)}


def test_a_certain_and_wrong_answer_costs_much_but_not_infinity():
    scores = classification_scores(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert scores["accuracy"] == 0 and 20 < scores["loss"] < 30


@pytest.mark.parametrize("class_token", [True, False])
@torch.no_grad()
def test_attention_maps_are_those_that_the_blocks_use(mnist_small, class_token):
    model = classifier(class_token=class_token, global_pool="avg", drop_path_rate=0.5)
    for parameter in model.parameters():  # far from uniform attention
        parameter.add_(0.3 * torch.randn_like(parameter))
    images = scale(first(mnist_small, 3).images)
    maps = attention_maps(model.train(), images)
    tokens = 16 + class_token
    assert maps.shape == (2, 3, 2, tokens, tokens) and maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 3, 2, tokens))
    assert maps.std() > 0.01
    x = model.embed(patchify(images, 7))
    for block, weights in zip(model.blocks, maps, strict=True):
        block: Any
        before, y = x, block.norm1(x)
        q, k, v = (
            y @ w.T + b for w, b in zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True)
        )
        heads = []
        for h in range(2):  # of width 8
            part = slice(8 * h, 8 * h + 8)
            for image in range(3):
                for i in range(tokens):
                    score = [float(q[image, i, part] @ k[image, j, part]) / math.sqrt(8) for j in range(tokens)]
                    total = sum(math.exp(s) for s in score)
                    expected = torch.tensor([math.exp(s) / total for s in score])
                    torch.testing.assert_close(weights[image, h, i], expected, rtol=1e-4, atol=1e-6)
            heads.append(weights[:, h] @ v[:, :, part])
        after = before + block.attn.proj(torch.cat(heads, dim=2))
        x = after + block.mlp(block.norm2(after))
        torch.testing.assert_close(x, block(before), rtol=1e-4, atol=1e-4)


def test_rollout_multiplies_layer_after_layer():
    """Of two layers: the second mixes what the first has mixed."""
    maps = torch.rand(3, 2, 4, 5, 5).softmax(dim=-1)
    rolled = attention_rollout(maps)
    torch.testing.assert_close(rolled.sum(dim=-1), torch.ones(2, 5))
    for b in range(2):
        expected = torch.eye(5)
        for layer in maps[:, b]:
            expected = (0.5 * layer.mean(dim=0) + 0.5 * torch.eye(5)) @ expected
        torch.testing.assert_close(rolled[b], expected)


def test_attention_is_that_of_the_class_token_only_where_it_is_read():
    attention = torch.rand(2, 17, 17)
    by_token = attention_to_patches(classifier(global_pool="token"), attention)
    assert torch.equal(by_token, attention[:, 0, 1:].reshape(2, 4, 4))
    by_patches = attention_to_patches(classifier(global_pool="avg"), attention)
    torch.testing.assert_close(by_patches, attention[:, 1:, 1:].mean(dim=1).reshape(2, 4, 4))
    none = attention_to_patches(classifier(global_pool="avg", class_token=False), attention[:, 1:, 1:])
    torch.testing.assert_close(none, by_patches)


@torch.no_grad()
def test_too_little_memory_for_a_batch_changes_nothing_but_rounding(mnist_small, monkeypatch):
    """Down to batches as small as those of training, so that a smaller --batch-size helps."""
    data, mae, classes = first(mnist_small, 10), autoencoder(), classifier()
    expected = masked_mse(mae, data, 0.75, seed=3), class_probabilities(classes, data), extract_features(mae, data)
    whole = VisionTransformer.to_patches

    def small(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(model, images)

    monkeypatch.setattr(VisionTransformer, "to_patches", small)
    assert masked_mse(mae, data, 0.75, seed=3) == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(class_probabilities(classes, data), expected[1])
    torch.testing.assert_close(extract_features(mae, data), expected[2])


def test_the_effective_rank_counts_directions_that_are_used_alike():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 6))[0]  # (200, 6), columns orthonormal
    assert effective_rank(basis) == pytest.approx(6, rel=1e-4)
    assert effective_rank(basis[:, :1] * torch.ones(1, 5)) == pytest.approx(1, rel=1e-3)
    values = torch.tensor([4.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    shares = [4 / 7, 2 / 7, 1 / 7]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    turned = basis * values @ torch.linalg.qr(torch.randn(6, 6))[0]
    assert effective_rank(turned) == pytest.approx(expected, rel=1e-3), "whichever way the axes lie"
    assert math.isnan(effective_rank(torch.full((3, 2), math.nan)))
