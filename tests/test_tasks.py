"""Pretraining, fine-tuning, probing, evaluation and reconstruction on real images, in one process."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import drawing_nothing
from PIL import Image

from maelab import figures, recipes
from maelab.config import FinetuneConfig, PretrainConfig, ProbeConfig, RunOptions
from maelab.data import load, training_sets
from maelab.data.batches import scale
from maelab.errors import UsageError
from maelab.inference import (
    caption,
    class_probabilities,
    classification_scores,
    extract_features,
    knn_accuracy,
    masked_mse,
    visible_mean_mse,
)
from maelab.model import MaskedAutoencoderViT
from maelab.runs import Run, read_metrics
from maelab.tasks import finetune, pretrain, probe
from maelab.tasks.evaluate import evaluate
from maelab.tasks.reconstruct import reconstruct
from maelab.training.checkpoint import load_model
from maelab.training.loop import Outcome, Task, train


def options(out: Path | None = None) -> RunOptions:
    return RunOptions(out=out, device="cpu", threads=1)


def autoencoder_config(folder: Path, **changes) -> PretrainConfig:
    config = replace(
        recipes.pretrain_smoke(), data=f"folder:{folder}", precision="fp32", limit=None, batch_size=32, blr=8e-3
    )
    return replace(config, **changes)


def classifier_config(folder: Path, **changes) -> FinetuneConfig:
    config = replace(
        recipes.finetune_smoke(), data=f"folder:{folder}", precision="fp32", limit=None, batch_size=32, blr=8e-3
    )
    return replace(config, **changes)


def model_of(run: Path, which: str = "best") -> Any:
    return load_model(run / "checkpoints" / which)[0]


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


@pytest.fixture(autouse=True)
def only_what_modules_share_is_drawn() -> Iterator[None]:
    """Namely the runs that the fixtures below make, whose pictures are looked at."""
    with drawing_nothing():
        yield


@pytest.fixture(scope="module")
def autoencoder(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: 40 epochs on about 256 digits, followed by k-NN every 20."""
    out = tmp_path_factory.mktemp("runs") / "autoencoder"
    pretrain.pretrain(
        autoencoder_config(digits_folder, epochs=40, knn_every=20, optimizer="muon"), options=options(out)
    )
    return out


@pytest.fixture(scope="module")
def classifier(digits_folder: Path, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: the autoencoder's encoder, fine-tuned for 6 epochs."""
    out = tmp_path_factory.mktemp("runs") / "classifier"
    config = classifier_config(digits_folder, init=str(autoencoder), epochs=6, affine_degrees=0, affine_shear=0)
    finetune.finetune(config, options=options(out))
    return out


# --- pretraining ----------------------------------------------------------------------------------------------------


def test_pretraining_beats_the_mean_of_the_visible_pixels(autoencoder, digits_folder):
    """On validation digits that it never saw, at the same hidden places."""
    result = result_of(autoencoder)
    rows = [row["loss"] for row in read_metrics(autoencoder) if row["split"] == "val"]
    assert result["val"]["loss"] == min(rows) < 0.5 * rows[0]
    config = autoencoder_config(digits_folder)
    val_set = training_sets(load(config.data), config)[1]
    noise = torch.rand(len(val_set), 16, generator=torch.Generator().manual_seed(config.split_seed))
    hidden = (noise.argsort(dim=1).argsort(dim=1) >= 4).float()
    trivial = visible_mean_mse(model_of(autoencoder), scale(val_set.images), hidden)
    assert result["val"]["masked_mse"] < 0.9 * trivial, result
    assert result["train"]["masked_mse"] < result["mean_predictor_loss"], result


def test_a_choice_of_images_is_of_every_class(digits_folder, autoencoder):
    """The images of a folder lie class by class: the first 14 would all be zeros."""
    train_set, _ = training_sets(load(f"folder:{digits_folder}"), autoencoder_config(digits_folder))
    chosen = pretrain.some(train_set, 14, seed=0)
    assert chosen.labels is not None and len(chosen) == 14 and len(chosen.labels.unique()) > 4
    everything = pretrain.some(train_set, 1000, seed=0)
    assert len(everything) == min(256, len(train_set))
    expected = masked_mse(model_of(autoencoder), everything, 0.75, seed=0)["masked_mse"]
    assert result_of(autoencoder)["train"]["masked_mse"] == pytest.approx(expected, rel=1e-5)


def test_the_validation_error_is_that_of_the_best_weights(autoencoder, digits_folder):
    config = autoencoder_config(digits_folder)
    data = load(config.data)
    train_set, val_set = training_sets(data, config)
    assert len(train_set) + len(val_set) == len(data.train) and 4 <= len(val_set) <= 30
    scores = masked_mse(model_of(autoencoder), val_set, 0.75, config.split_seed)
    reported = result_of(autoencoder)["val"]
    assert {name: reported[name] for name in scores} == pytest.approx(scores, rel=1e-5)


def test_knn_follows_every_so_many_epochs(autoencoder, digits_folder):
    rows = [row for row in read_metrics(autoencoder) if row["split"] == "val"]
    assert [row["epoch"] for row in rows if "knn_accuracy" in row] == [20, 40]
    train_set, val_set = training_sets(load(f"folder:{digits_folder}"), autoencoder_config(digits_folder))
    last = model_of(autoencoder, "last")
    features, queries = extract_features(last, train_set), extract_features(last, val_set)
    assert train_set.labels is not None and val_set.labels is not None
    expected = knn_accuracy(features, train_set.labels, queries, val_set.labels)
    assert rows[-1]["knn_accuracy"] == pytest.approx(expected) and expected > 0.3
    best = model_of(autoencoder)
    features, queries = extract_features(best, train_set), extract_features(best, val_set)
    expected = knn_accuracy(features, train_set.labels, queries, val_set.labels)
    assert result_of(autoencoder)["val"]["knn_accuracy"] == pytest.approx(expected), "whichever epoch was best"


def test_following_knn_changes_nothing_else(digits_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "KNN_IMAGES", 40)
    monkeypatch.setattr(pretrain, "KNN_QUERIES", 7)
    asked = []
    monkeypatch.setattr(pretrain, "knn_accuracy", lambda *sets: asked.append([len(x) for x in sets]) or 0.5)
    runs = {}
    for every in (0, 1):
        config = autoencoder_config(digits_folder, epochs=2, limit=64, knn_every=every)
        _, result = pretrain.pretrain(config, options=options(tmp_path / str(every)))
        assert result["val"].pop("knn_accuracy", None) == (0.5 if every else None)
        rank = result["val"].pop("effective_rank", None)
        assert rank is not None and 1 < rank <= 32 if every else rank is None
        runs[every] = (tmp_path / str(every) / "checkpoints/last/model.safetensors").read_bytes(), result["val"]
    assert runs[0] == runs[1]
    assert asked == [[40, 40, 7, 7]] * 2, "never more images than that"


def test_normalised_targets_say_what_their_pixel_error_used(cifar_folder, tmp_path):
    config = autoencoder_config(cifar_folder, patch_size=8, norm_pix_loss=True, epochs=1)
    run, result = pretrain.pretrain(config, options=options(tmp_path / "run"))
    assert result["masked_mse_uses"] == "true patch mean and deviation"
    assert (result["hidden"], result["patches"]) == (12, 16)
    assert result["val"]["masked_mse"] < 0.5 * result["val"]["loss"]  # pixels against unit variance
    assert 0.5 < result["mean_predictor_loss"] <= 1.0
    assert caption(model_of(run), 12, 0.5) == (
        "12 of 16 patches hidden, masked MSE 0.5000 (with the true mean and deviation of each patch)"
    )


def test_labels_are_not_needed_to_pretrain_and_knn_is_then_left_out(digits_folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(digits_folder.rglob("*.png"))[:40]):
        (flat / f"{i}.png").write_bytes(file.read_bytes())
    config = autoencoder_config(flat, epochs=1, knn_every=1, val_fraction=0.1, batch_size=16)
    _, result = pretrain.pretrain(config, options=options(tmp_path / "run"))
    assert result["val"].keys() == {"masked_mse", "loss"}


def test_the_mean_predictor_is_that_of_a_loop_over_places(mnist_small):
    images = scale(mnist_small.train.images)  # (600, 1, 28, 28)
    error = sum(
        float((images[:, 0, y, x] - images[:, 0, y, x].mean()).square().mean()) for y in range(28) for x in range(28)
    )
    assert pretrain.mean_predictor_mse(mnist_small.train, False, 7) == pytest.approx(error / 28**2, rel=1e-4)


def test_the_mean_predictor_of_normalised_patches(cifar_small):
    data = cifar_small.train[torch.arange(50)]
    squares = []
    for row in range(0, 32, 16):
        for column in range(0, 32, 16):
            patch = scale(data.images)[:, :, row : row + 16, column : column + 16].flatten(1)
            normal = (patch - patch.mean(1, keepdim=True)) / patch.std(1, keepdim=True)
            squares.append((normal - normal.mean(0)).square().mean())
    expected = float(torch.stack(squares).mean())
    assert pretrain.mean_predictor_mse(data, True, 16) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "--patch-size 5 does not divide the image size 28x28"),
        ({"patch_size": 14, "mask_ratio": 0.9}, "--mask-ratio 0.9 leaves no patch to see: the image has 4 patches"),
        ({"img_size": (30, 28)}, "--patch-size 7 does not divide the image size 30x28"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_any_folder_is_made(digits_folder, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        pretrain.pretrain(autoencoder_config(digits_folder, **changes), options=options(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_images_of_another_size_and_shape(digits_folder, tmp_path):
    config = autoencoder_config(digits_folder, img_size=(14, 28), epochs=1)
    run, _ = pretrain.pretrain(config, options=options(tmp_path / "run"))
    assert model_of(run).img_size == (14, 28) and model_of(run).num_patches == 8


# --- fine-tuning ----------------------------------------------------------------------------------------------------


def test_fine_tuning_overfits_64_images(digits_folder, tmp_path):
    config = classifier_config(
        digits_folder, limit=64, epochs=30, batch_size=16, label_smoothing=0.0, optimizer="muon", blr=0.16,
        affine_degrees=0, affine_scale=0, affine_translate=0, affine_shear=0,
    )  # fmt: skip
    run, result = finetune.finetune(config, options=options(tmp_path / "run"))
    assert result["train_images"] == 64
    assert result["train"]["accuracy"] == 1.0 and result["train"]["loss"] < 0.1
    assert 0.3 < result["test"]["accuracy"] < 1.0  # about 30 test digits from 64: far from chance, far from perfect
    first = next(row for row in read_metrics(run) if row["split"] == "train")
    assert first["loss"] == pytest.approx(2.3, abs=0.5)


def test_the_test_set_is_read_with_the_weights_of_the_best_epoch(digits_folder, tmp_path, monkeypatch):
    """Validation is made to prefer epoch 1 of 3, whose weights are not those of the end."""

    def prefer_first(engine: Any, run: Run, task: Task, *more: Any) -> Outcome:
        def validate(model: Any, epoch: int) -> dict[str, float]:
            return {**task.validate(model, epoch), "accuracy": 1 / epoch}

        return train(engine, run, replace(task, validate=validate), *more)

    monkeypatch.setattr(finetune, "train", prefer_first)
    config = classifier_config(digits_folder, epochs=3)
    run, result = finetune.finetune(config, options=options(tmp_path / "run"))
    assert result["best_epoch"] == 1 and result["epochs"] == 3 and result["val"]["accuracy"] == 1.0
    test = load(config.data).test
    assert test is not None and test.labels is not None
    labels = test.labels

    def scores(which: str) -> dict[str, float]:
        return classification_scores(class_probabilities(model_of(run, which), test), labels)

    assert {k: result["test"][k] for k in ("accuracy", "loss")} == pytest.approx(scores("best"), rel=1e-5)
    assert scores("last")["loss"] != pytest.approx(scores("best")["loss"], rel=1e-3)


def test_the_result_of_fine_tuning_says_what_the_contract_asks(classifier, autoencoder):
    result = result_of(classifier)
    assert result["task"] == "finetune" and result["init"] == str(autoencoder) and result["adapted"] == []
    assert result["test"].keys() == {"accuracy", "loss", "per_class", "confusion"} and result["val"].keys() >= {
        "accuracy",
        "loss",
    }
    assert 1 <= result["best_epoch"] <= result["epochs"] == 6
    assert 0 <= result["test"]["accuracy"] <= 1


def test_fine_tuning_starts_from_the_encoder_and_takes_its_shape(digits_folder, autoencoder, tmp_path):
    """With all rates at zero nothing moves."""
    config = classifier_config(digits_folder, init=str(autoencoder), epochs=1, blr=0.0, patch_size=4, depth=3)
    run, result = finetune.finetune(config, options=options(tmp_path / "run"))
    source, model = model_of(autoencoder), model_of(run)
    assert isinstance(source, MaskedAutoencoderViT) and not isinstance(model, MaskedAutoencoderViT)
    assert model.patch_size == 7 and len(model.blocks) == 2
    theirs = source.state_dict()
    for name, value in model.state_dict().items():
        if not name.startswith(("head", "fc_norm")):
            assert torch.equal(value, theirs[name]), name
    assert result["test"]["loss"] == pytest.approx(np.log(10), rel=1e-3)  # the head starts at the uniform prediction


def test_a_grey_encoder_serves_colour_images(cifar_folder, autoencoder, tmp_path):
    config = classifier_config(cifar_folder, init=str(autoencoder), epochs=1, img_size=(35, 35))
    run, result = finetune.finetune(config, options=options(tmp_path / "run"))
    assert result["adapted"] == [
        "position embedding 4x4 -> 5x5: interpolate",
        "patch embedding 1 -> 3 channels: inflate",
    ]
    assert model_of(run).in_chans == 3
    again = classifier_config(
        cifar_folder, init=str(autoencoder), epochs=1, img_size=(35, 35), adapt_patch_embed="reinit",
        adapt_pos_embed="reinit",
    )  # fmt: skip
    _, result = finetune.finetune(again, options=options(tmp_path / "again"))
    assert [phrase.split(": ")[1] for phrase in result["adapted"]] == ["reinit", "reinit"]


def test_a_share_of_the_labels_is_balanced(digits_folder, tmp_path, monkeypatch):
    seen = []

    def no_training(engine: Any, run: Run, task: Task, *more: Any) -> Outcome:
        seen.append(task.items)
        raise UsageError("enough")

    monkeypatch.setattr(finetune, "train", no_training)
    for fraction in (1.0, 0.25):
        with pytest.raises(UsageError, match="enough"):
            finetune.finetune(
                classifier_config(digits_folder, label_fraction=fraction), options=options(tmp_path / "r")
            )
    data, config = load(f"folder:{digits_folder}"), classifier_config(digits_folder)
    every, some = (training_sets(data, config, fraction=fraction)[0].labels for fraction in (1.0, 0.25))
    assert every is not None and some is not None and seen == [len(every), len(some)]
    assert (some.bincount() - every.bincount() / 4).abs().max() <= 0.5


def test_images_in_unlabelled_are_learned_from_too(classifier, digits_folder, tmp_path, capsys):
    """Every second digit loses its label."""
    few = tmp_path / "few"
    shutil.copytree(digits_folder, few)
    (few / "unlabelled").mkdir()
    for file in sorted(few.glob("*/*.png"))[::2]:
        file.rename(few / "unlabelled" / f"{file.parent.name}-{file.name}")
    left = len(list((few / "unlabelled").iterdir()))
    config = classifier_config(few, init=str(classifier), epochs=1, unlabelled=2, ema_decay=0.9)
    run, result = finetune.finetune(config, options=options(tmp_path / "run"))
    labelled = training_sets(load(config.data), config)[0]
    assert result["train_images"] == len(labelled) and result["adapted"] == ["head kept"]
    said = f"{len(labelled)} images with labels, {len(labelled) + left} without"
    assert said in capsys.readouterr().err
    (train, _) = (json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines())
    assert 0 < train["sure"] < 1


def test_without_labels_there_is_nothing_to_fine_tune_for(digits_folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(digits_folder.rglob("*.png"))[:20]):
        (flat / f"{i}.png").write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match="has no labels: to fine-tune, put the images of each class in a folder"):
        finetune.finetune(classifier_config(flat), options=options(tmp_path / "run"))


# --- probing --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probed(autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.nn.Module]]:
    """A probe's run folder, and the encoder that it worked with."""
    models: list[Any] = []

    def remember(path: Any) -> Any:
        loaded = load_model(path)
        models.append(loaded[0])
        return loaded

    out = tmp_path_factory.mktemp("runs") / "probe"
    config = ProbeConfig(
        init=str(autoencoder), epochs=20, batch_size=64, blr=0.04, neighbours=5, precision="fp32", weight_decay=0.0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "load_model", remember)
        probe.probe(config, options=options(out))
    return out, models


def test_probing_changes_no_parameter_of_the_encoder(probed, autoencoder):
    _, models = probed
    assert len(models) == 1
    before = model_of(autoencoder).state_dict()
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in models[0].parameters())


def test_the_probe_is_a_linear_classifier_on_standardised_features(probed, autoencoder, digits_folder):
    run, _ = probed
    result = result_of(run)
    data = load(f"folder:{digits_folder}")
    config = ProbeConfig(init=str(autoencoder))
    train_set, val_set = training_sets(data, config)
    model, linear = model_of(autoencoder), model_of(run)
    assert isinstance(linear, torch.nn.Linear) and data.test is not None
    seen = extract_features(model, train_set)
    mean, deviation = seen.mean(0), seen.std(0)
    for name, part in (("val", val_set), ("test", data.test)):
        features = extract_features(model, part)
        assert part.labels is not None and train_set.labels is not None
        with torch.no_grad():
            logits = ((features - mean) / deviation) @ linear.weight.T + linear.bias
        right = (logits.argmax(1) == part.labels).float().mean()
        assert result[name]["accuracy"] == pytest.approx(float(right), abs=1e-6)
        assert result[name]["loss"] == pytest.approx(float(F.cross_entropy(logits, part.labels)), rel=1e-3)
        near = knn_accuracy(seen, train_set.labels, features, part.labels, 5)
        assert result[name]["knn_accuracy"] == pytest.approx(near)
    assert result["test"]["accuracy"] > 0.25 and result["test"]["knn_accuracy"] > 0.25  # chance is 0.1
    assert result["train_images"] == len(train_set)


def test_the_probe_is_trained_until_it_is_as_good_as_logistic_regression(autoencoder, tmp_path):
    """With few labels too, where an epoch has few steps."""
    config = ProbeConfig(init=str(autoencoder), label_fraction=0.25, precision="fp32")
    _, result = probe.probe(config, options=options(tmp_path / "run"))
    data = load(json.loads((autoencoder / "config.json").read_text())["data"])
    train_set, val_set = training_sets(data, config, config.label_fraction)
    labels = train_set.labels
    assert labels is not None and val_set.labels is not None
    seen, unseen = (extract_features(model_of(autoencoder), part) for part in (train_set, val_set))
    seen, unseen = ((rows - seen.mean(0)) / (seen.std(0) + 1e-6) for rows in (seen, unseen))
    accuracies = []
    for strength in (1.0, 0.1, 0.01, 0.001):
        weight, bias = torch.zeros(10, seen.shape[1], requires_grad=True), torch.zeros(10, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure(weight=weight, bias=bias, optimizer=optimizer, strength=strength) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(seen @ weight.T + bias, labels) + strength / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        right = (unseen @ weight.T + bias).argmax(1) == val_set.labels
        accuracies.append(float(right.float().mean()))
    assert result["val"]["accuracy"] > max(accuracies) - 0.05, accuracies


def test_a_probe_for_the_class_token_needs_one(autoencoder, tmp_path):
    with pytest.raises(UsageError, match="has no class token; use --pool avg"):
        probe.probe(ProbeConfig(init=str(autoencoder), pool="token"), options=options(tmp_path / "run"))


# --- evaluation and reconstruction ----------------------------------------------------------------------------------


def test_evaluation_repeats_what_training_reported(classifier, autoencoder):
    for split in ("test", "val"):
        found = evaluate(classifier, split=split, options=options())
        reported = result_of(classifier)[split]
        # bf16 where the hardware has it: an image between two classes may change sides
        assert found["accuracy"] == pytest.approx(reported["accuracy"], abs=1.01 / found["images"])
        assert found["loss"] == pytest.approx(reported["loss"], rel=0.02)
        counts = torch.tensor(found["confusion"])
        assert counts.sum() == found["images"]
        assert counts.diag().sum() / found["images"] == pytest.approx(found["accuracy"])
        for i, share in enumerate(found["per_class"].values()):
            assert share == pytest.approx(float(counts[i, i] / counts[i].sum().clamp(min=1)))
    found = evaluate(autoencoder, split="val", options=options())
    assert found["masked_mse"] == pytest.approx(result_of(autoencoder)["val"]["masked_mse"], rel=0.02)
    assert evaluate(autoencoder, mask_ratio=0.5, options=options())["mask_ratio"] == 0.5


def test_confusion_rows_are_the_true_classes(classifier, digits_folder):
    found = evaluate(classifier, options=options())
    test = load(f"folder:{digits_folder}").test
    assert test is not None and test.labels is not None
    assert [sum(row) for row in found["confusion"]] == test.labels.bincount(minlength=10).tolist()


def test_a_linear_probe_cannot_be_evaluated_alone(probed):
    with pytest.raises(UsageError, match="is a linear probe; its figures are in its result"):
        evaluate(probed[0], options=options())


def test_reconstruction_of_files_and_of_the_data(autoencoder, digits_folder, tmp_path, monkeypatch):
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "reconstructions", lambda file, groups: drawn.append(groups))
    files = sorted(digits_folder.rglob("*.png"))[:3]
    found = reconstruct(autoencoder, files, mask_ratios=[0.5, 0.75], out=tmp_path / "a.png", options=options())
    assert found["images"] == 3 and list(found["masked_mse"]) == [0.5, 0.75]
    (groups,) = drawn
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file)))[None] for file in files])
    for title, original, masked, rebuilt in groups:
        assert "hidden, masked MSE" in title
        assert torch.equal(original, scale(pixels))
        hidden = (masked == 0) & (original != 0)
        assert torch.equal(rebuilt[~hidden & (masked != 0)], original[~hidden & (masked != 0)])
    found = reconstruct(autoencoder, count=5, seed=1, out=tmp_path / "b.png", options=options())
    assert found["images"] == 5 and list(found["masked_mse"]) == [0.75]
    assert found == reconstruct(autoencoder, count=5, seed=1, out=tmp_path / "b.png", options=options())
    assert found != reconstruct(autoencoder, count=5, seed=2, out=tmp_path / "b.png", options=options())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_ratios": [0.99]}, "--mask-ratio 0.99"),
        ({"mask_ratios": [0.0]}, "--mask-ratio must lie between 0 and 1, got 0"),
        ({"out": Path("picture.jpg")}, "the picture is a PNG; give a name that ends in .png"),
    ],
)
def test_reconstructions_that_cannot_be(autoencoder, tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        reconstruct(autoencoder, **{"out": tmp_path / "a.png", "options": options(), **arguments})


def test_a_classifier_cannot_reconstruct(classifier, tmp_path):
    with pytest.raises(UsageError, match="is a VisionTransformer; only a pretraining run can reconstruct"):
        reconstruct(classifier, out=tmp_path / "a.png", options=options())


def test_every_run_leaves_its_figures_as_png(autoencoder, classifier, probed):
    for run, names in (
        (autoencoder, {"reconstructions.png", "neighbours.png", "curves.png"}),
        (classifier, {"curves.png", "predictions.png", "confusion.png"}),
        (probed[0], {"curves.png"}),
    ):
        assert {file.name for file in (run / "figures").iterdir()} == names
        for file in (run / "figures").iterdir():
            with Image.open(file) as picture:
                assert picture.format == "PNG" and min(picture.size) > 200
