"""What the training tasks hand to the loop and to the drawings of a run, on sets on which no two of them agree."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maelab import figures, recipes
from maelab.config import ProbeConfig, RunOptions
from maelab.data import load, training_sets
from maelab.data.batches import scale
from maelab.errors import UsageError
from maelab.inference import class_probabilities, extract_features, knn_accuracy, reconstruct_images
from maelab.model.masks import make_mask
from maelab.runs import Run
from maelab.tasks import finetune, pretrain, probe
from maelab.training.checkpoint import ModelSpec, load_model, save_model
from maelab.training.loop import Outcome, Step, Task, train

SMALL: dict[str, Any] = {"precision": "fp32", "limit": 64, "batch_size": 16, "epochs": 2, "val_fraction": 0.2}


def options(out: Path) -> RunOptions:
    return RunOptions(out=out, device="cpu", threads=1, kernels="torch")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is given to the functions that draw."""
    calls: dict[str, Any] = {}
    for name in ("curves", "predictions", "confusion", "reconstructions"):
        monkeypatch.setattr(figures, name, lambda *given, name=name: calls.update({name: given}))
    return calls


def test_balanced_classes_weigh_alike_in_the_loss(digits_folder):
    """One class has three images, another fifteen; labels are smoothed."""
    data = load(f"folder:{digits_folder}")
    labels = data.train.labels
    assert labels is not None
    rows = torch.cat([(labels == k).nonzero()[: (3, 15)[k], 0] for k in (0, 1)])
    train_set = data.train[rows]
    config = replace(recipes.finetune_smoke(), class_weights="balanced", batch_size=18, label_smoothing=0.1)
    step, plain = (finetune.make_step(replace(config, class_weights=w), train_set, 2) for w in ("balanced", "none"))
    logits = torch.randn(18, 2, generator=torch.Generator().manual_seed(0))
    images, targets = step.batch(0, 0, 1)
    weight = [18 / (2 * 3), 18 / (2 * 15)]
    expected = (
        sum(-weight[k] * float(targets[i, k]) * float(logits[i].log_softmax(0)[k]) for i in range(18) for k in range(2))
        / 18
    )
    assert float(step.loss(lambda _: logits, images, targets)["loss"]) == pytest.approx(expected, rel=1e-5)
    unweighted = float(torch.nn.functional.cross_entropy(logits, targets))
    assert float(plain.loss(lambda _: logits, images, targets)["loss"]) == pytest.approx(unweighted)
    assert finetune.balanced_weights(torch.tensor([0, 0, 2]), 3).tolist() == pytest.approx([0.5, 0.0, 1.0])


def test_the_figures_of_a_fine_tuning_show_its_test_images(digits_folder, tmp_path, drawn, monkeypatch):
    """Validation prefers epoch 1; of 3 images one was taken for another class."""

    def prefer_first(engine: Any, run: Run, task: Task, *more: Any) -> Outcome:
        def validate(model: Any, epoch: int) -> dict[str, float]:
            return {**task.validate(model, epoch), "accuracy": 1 / epoch}

        return train(engine, run, replace(task, validate=validate), *more)

    monkeypatch.setattr(finetune, "train", prefer_first)
    monkeypatch.setattr(finetune, "PICTURED", 3)
    config = replace(recipes.finetune_smoke(), data=f"folder:{digits_folder}", blr=0.02, label_smoothing=0.0, **SMALL)
    run, result = finetune.finetune(config, options=options(tmp_path / "run"))
    test, names = load(config.data).test, tuple("0123456789")
    assert test is not None and test.labels is not None
    model: Any = load_model(run)[0]
    probabilities = class_probabilities(model, test)
    guesses = probabilities.argmax(1)
    counts = torch.zeros(10, 10, dtype=torch.int64)
    for truth, guess in zip(test.labels.tolist(), guesses.tolist(), strict=True):
        counts[truth, guess] += 1
    assert result["test"]["confusion"] == counts.tolist() != counts.T.tolist()
    assert drawn["confusion"][1] == counts.tolist() and drawn["confusion"][2] == names

    _, rows, best = drawn["curves"]
    assert best == result["best_epoch"] == 1 and [row["epoch"] for row in rows] == [1, 1, 2, 2]
    _, images, truth, shares, class_names = drawn["predictions"]
    assert len(images) == len(truth) == len(shares) == 3 and class_names == names
    known = {image.numpy().tobytes(): i for i, image in enumerate(scale(test.images))}
    places = torch.tensor([known[image.numpy().tobytes()] for image in images])
    assert len(places.unique()) == 3 and truth == test.labels[places].tolist()
    torch.testing.assert_close(shares, probabilities[places], atol=1e-4, rtol=0)
    right = (guesses == test.labels)[places].tolist()
    assert right == [True, True, False], "right ones first"


def handed_to_the_loop(module: Any, start: Any, config: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    tasks: list[Task] = []

    def no_training(engine: Any, run: Run, task: Task, *more: Any) -> Outcome:
        tasks.append(task)
        raise UsageError("enough")

    monkeypatch.setattr(module, "train", no_training)
    with pytest.raises(UsageError, match="enough"):
        start(config, options=options(out))
    return tasks[0]


def test_the_loop_of_a_fine_tuning_gets_its_patience_and_decay_and_smooths(digits_folder, tmp_path, monkeypatch):
    config = replace(
        recipes.finetune_smoke(), data=f"folder:{digits_folder}", patience=3, layer_decay=0.6, label_smoothing=0.4,
        drop_path=0.1, patch_drop=0.2, **SMALL,
    )  # fmt: skip
    task = handed_to_the_loop(finetune, finetune.finetune, config, tmp_path / "run", monkeypatch)
    assert (task.patience, task.layer_decay, task.metric, task.higher_is_better) == (3, 0.6, "accuracy", True)
    assert (task.spec.arguments["drop_path_rate"], task.spec.arguments["patch_drop_rate"]) == (0.1, 0.2)

    class Sure(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[9.0, *[0.0] * 9]]).expand(len(x), -1)

    train_set, _ = training_sets(load(config.data), config)
    assert train_set.labels is not None

    def loss_of(step: Step, part: int, parts: int) -> float:
        return float(step.loss(Sure(), *step.batch(0, part, parts))["loss"])

    step = finetune.make_step(config, train_set, 10)
    losses = [loss_of(step, part, 2) for part in (0, 1)]
    whole = loss_of(step, 0, 1)
    assert sum(losses) / 2 == pytest.approx(whole, rel=1e-5) and losses[0] != pytest.approx(losses[1], rel=1e-3)
    mixing = finetune.make_step(replace(config, mixup=0.8, cutmix=1.0), train_set, 10)
    mixed = [loss_of(mixing, part, parts) for part, parts in ((0, 2), (1, 2), (0, 1))]
    assert sum(mixed[:2]) / 2 == pytest.approx(mixed[2], rel=1e-5) and mixed[2] != pytest.approx(whole, rel=1e-3)
    first = torch.tensor([9.0, *[0.0] * 9]).log_softmax(0)
    smooth = -(0.6 * first + 0.4 * first.mean())  # by class: the loss of an image of it
    assert min(abs(whole - float((k * smooth[0] + (16 - k) * smooth[1]) / 16)) for k in range(17)) < 1e-4


def test_images_without_labels_teach_what_the_averaged_model_is_sure_of(digits_folder):
    """A model that looks at ten pixels, and a teacher that looks at others, against a loop over images."""
    changes: dict[str, Any] = {"batch_size": 8, "limit": None, "affine_degrees": 40.0, "ema_decay": 0.9}
    config = replace(recipes.finetune_smoke(), data=f"folder:{digits_folder}", unlabelled=3, **changes)
    data = load(config.data)
    train_set, _ = training_sets(data, config, 0.2)
    others, _ = training_sets(data, config)
    step = finetune.make_step(config, train_set, 10, others)
    assert step.teacher and len(others) > len(train_set)

    def model(x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, 12, 9:19] * 2

    def teacher(x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, 9:19, 14] * 3

    total = sure = 0.0
    for part in (0, 1):
        images, targets, varied, plain = step.batch(5, part, 2)
        assert (len(images), len(varied), len(plain)) == (4, 12, 12)
        assert not torch.equal(varied, plain)
        assert all((scale(others.images[:]) == one).flatten(1).all(1).any() for one in plain)
        expected = 0.0
        for image, target in zip(images, targets, strict=True):
            expected -= float((target * model(image[None])[0].log_softmax(0)).sum()) / 4
        for seen, before in zip(varied, plain, strict=True):
            ranked = teacher(before[None])[0].softmax(0).sort(descending=True)
            margin = float(ranked.values[0] - ranked.values[1])
            expected -= margin * float(model(seen[None])[0].log_softmax(0)[ranked.indices[0]]) / 12
            sure += margin
        found = step.loss(model, teacher, images, targets, varied, plain)
        assert float(found["loss"]) == pytest.approx(expected, rel=1e-4)
        total += float(found["sure"]) * 12
    assert 1 < sure == pytest.approx(total, rel=1e-4) and sure < 23


def test_the_picture_of_a_pretraining_hides_what_its_training_hides(digits_folder, tmp_path, drawn):
    config = replace(
        recipes.pretrain_smoke(), data=f"folder:{digits_folder}", mask_ratio=0.4, norm_pix_loss=True, knn_every=0,
        split_seed=2, seed=5, **SMALL,
    )  # fmt: skip
    run, result = pretrain.pretrain(config, options=options(tmp_path / "run"))
    (_, [(title, shown, masked, rebuilt)]) = drawn["reconstructions"]
    val = training_sets(load(config.data), config)[1]
    assert torch.equal(shown, scale(pretrain.some(val, pretrain.PICTURED, 2).images))
    model: Any = load_model(run)[0]
    expected = reconstruct_images(model, shown, make_mask("random", (4, 4), len(shown), 0.4, 5))
    assert torch.equal(masked, expected[0]) and title.startswith("7 of 16 patches hidden, masked MSE ")
    torch.testing.assert_close(rebuilt, expected[1], atol=1e-4, rtol=0)
    assert result["hidden"] == 7 and result["val"]["loss"] != pytest.approx(result["val"]["masked_mse"], rel=0.05)


def test_the_loop_of_a_pretraining_chooses_by_the_loss_that_is_trained(digits_folder, tmp_path, monkeypatch):
    config = replace(recipes.pretrain_smoke(), data=f"folder:{digits_folder}", **SMALL)
    task = handed_to_the_loop(pretrain, pretrain.pretrain, config, tmp_path / "run", monkeypatch)
    assert (task.metric, task.higher_is_better, task.patience, task.items) == ("loss", False, 0, 64)


def test_the_mean_predictor_reads_ten_thousand_images_at_most_and_fewer_of_large_ones(mnist_small, monkeypatch):
    for pixels in (2**27, 100 * 784, 7 * 784):
        monkeypatch.setattr(pretrain, "_MEAN_OF", pixels)
        some = pretrain.some(mnist_small.train, min(600, pixels // 784), 0)
        expected = scale(some.images).var(dim=0, correction=0).mean()
        assert pretrain.mean_predictor_mse(mnist_small.train, False, 7) == pytest.approx(float(expected), rel=1e-4)


def test_a_probe_tells_validation_from_test_and_counts_its_neighbours(digits_folder, tmp_path, monkeypatch):
    """k-NN with one, three and all neighbours; the linear classifier that the loop gets, set to random weights."""
    torch.manual_seed(3)
    arguments = {"img_size": (28, 28), "patch_size": 7, "in_chans": 1, "num_classes": 0, "embed_dim": 16, "depth": 1,
                 "num_heads": 2}  # fmt: skip
    spec = ModelSpec("VisionTransformer", arguments, f"folder:{digits_folder}")
    save_model(tmp_path / "encoder", spec, spec.build().state_dict())
    encoder: Any = load_model(tmp_path / "encoder")[0]
    data = load(spec.data)
    config = ProbeConfig(init=str(tmp_path / "encoder"), val_fraction=0.3, split_seed=4, batch_size=32, epochs=1,
                         precision="fp32")  # fmt: skip
    known, val = training_sets(data, config)
    parts = {"val": val, "test": data.test}
    found: dict[int, list[float]] = {}

    def random_weights(engine: Any, run: Run, task: Task, *more: Any) -> Outcome:
        assert (task.metric, task.higher_is_better, task.items) == ("accuracy", True, len(known))
        with torch.no_grad():
            torch.nn.init.normal_(task.model.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
            return Outcome(1, 1, task.validate(task.model, 1), {}, 1.0, 1.0)

    monkeypatch.setattr(probe, "train", random_weights)
    monkeypatch.setattr(figures, "curves", lambda *_: None)
    for k in (1, 3, len(known)):
        _, result = probe.probe(replace(config, neighbours=k), options=options(tmp_path / f"run{k}"))
        features = extract_features(encoder, known)
        mean, deviation = features.mean(0), features.std(0)
        weight = torch.nn.init.normal_(torch.empty(10, 16), generator=torch.Generator().manual_seed(0))
        bias = load_bias(config.seed)
        for name, part in parts.items():
            assert part is not None and part.labels is not None and known.labels is not None
            rows = extract_features(encoder, part)
            expected = knn_accuracy(features, known.labels, rows, part.labels, k)
            assert result[name]["knn_accuracy"] == pytest.approx(expected)
            logits = ((rows - mean) / deviation) @ weight.T + bias
            right = (logits.argmax(1) == part.labels).float().mean()
            assert result[name]["accuracy"] == pytest.approx(float(right))
            expected_loss = torch.nn.functional.cross_entropy(logits, part.labels)
            assert result[name]["loss"] == pytest.approx(float(expected_loss), rel=1e-3)
            found.setdefault(k, []).append(expected)
    assert len({tuple(pair) for pair in found.values()}) == 3 and all(len(set(pair)) == 2 for pair in found.values())


def load_bias(seed: int) -> torch.Tensor:
    """What a linear layer of 16 features and 10 classes starts from."""
    torch.manual_seed(seed)
    return torch.nn.Linear(16, 10).bias.detach()
