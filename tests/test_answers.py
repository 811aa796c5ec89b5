"""What predict, evaluate, attention and reconstruct answer, against loops over single images: with models of random
weights, on sets of which no class, image or parameter gives what another gives."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_sets import MNIST, publish_small_sets

from maelab import figures
from maelab.config import AS_IT_IS, RunOptions
from maelab.data import ImageSet, load
from maelab.data.batches import scale
from maelab.data.images import read_all
from maelab.errors import RunError, UsageError
from maelab.inference import (
    attention_maps,
    attention_rollout,
    attention_to_patches,
    class_probabilities,
    masked_mse,
    reconstruct_images,
    visible_mean_mse,
)
from maelab.model.masks import make_mask
from maelab.tasks import predict as predicting
from maelab.tasks import reconstruct as reconstructing
from maelab.tasks.attention import attention
from maelab.tasks.evaluate import evaluate
from maelab.tasks.features import features
from maelab.tasks.predict import predict
from maelab.tasks.reconstruct import reconstruct
from maelab.training import parallel
from maelab.training.checkpoint import ModelSpec, load_model, save_model

SHAPE: dict[str, Any] = {
    "img_size": (28, 28), "patch_size": 7, "in_chans": 1, "embed_dim": 16, "depth": 3, "num_heads": 2
}  # fmt: skip
CPU = RunOptions(device="cpu", threads=1, kernels="torch")


@pytest.fixture(scope="module")
def work(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a classifier and an autoencoder of `digits_folder`."""
    folder = tmp_path_factory.mktemp("answers")
    torch.manual_seed(3)
    names, data = tuple(map(str, range(10))), f"folder:{digits_folder}"
    decoder = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    classes = {**SHAPE, "num_classes": 10}
    without = {**classes, "class_token": False, "global_pool": "avg"}
    for name, spec in {
        "classifier": ModelSpec("VisionTransformer", classes, data, names),
        "headless": ModelSpec("VisionTransformer", without, data, names),
        "mae": ModelSpec("MaskedAutoencoderViT", SHAPE | decoder, data, mask_ratio=0.6),
    }.items():
        model = spec.build()
        for matrix in (p for p in model.parameters() if p.ndim > 1 and p.requires_grad):
            torch.nn.init.normal_(matrix, std=0.5)
        save_model(folder / name, spec, model.state_dict())
    return folder


@pytest.fixture(scope="module")
def digits(digits_folder: Path) -> list[Path]:
    return sorted(digits_folder.rglob("*.png"))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32, whatever the hardware would rather have."""
    monkeypatch.setattr(parallel, "choose_precision", lambda *_: "fp32")


def model_of(run: Path) -> Any:
    return load_model(run)[0]


# --- predict --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1, 2, 9, 10, 12])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 8])
def test_predictions_are_those_of_each_image_alone(top, batch_size, work, digits, exact, tmp_path):
    """Seven inputs, the fourth of which is no image, in batches that it begins, ends and lies in."""
    (tmp_path / "none.png").write_text("no image")
    inputs = [*digits[:90:30], tmp_path / "none.png", *digits[100:250:50]]
    found = list(predict(work / "classifier", inputs, top=top, batch_size=batch_size, options=CPU))
    assert [entry["path"] for entry in found] == [str(path) for path in inputs] and found[3].keys() == {"path", "error"}
    model = model_of(work / "classifier")
    for path, entry in zip(inputs, found, strict=True):
        if "error" in entry:
            continue
        shares = class_probabilities(model, ImageSet(read_all([path], (28, 28), 1, AS_IT_IS), None))[0].tolist()
        expected = sorted(zip(shares, "0123456789", strict=True), reverse=True)[:top]
        assert [guess["label"] for guess in entry["top"]] == [name for _, name in expected]
        assert [guess["probability"] for guess in entry["top"]] == pytest.approx(
            [share for share, _ in expected], abs=1e-5
        )
        assert (entry["label"], entry["probability"]) == (entry["top"][0]["label"], entry["top"][0]["probability"])
    assert len({entry["label"] for entry in found if "label" in entry}) > 2


def test_a_gallery_shows_the_first_64_with_their_own_probabilities(work, digits, exact, tmp_path, monkeypatch):
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "predictions", lambda *given: drawn.append(given))
    chosen = digits[::4]
    list(predict(work / "classifier", chosen, batch_size=30, gallery=tmp_path / "g.png", options=CPU))
    assert [len(images) for _, images, *_ in drawn] == [30, 60, 64] and predicting.PICTURED == 64
    file, images, labels, probabilities, names = drawn[-1]
    pixels = read_all(chosen[:64], (28, 28), 1, AS_IT_IS)
    assert file == tmp_path / "g.png" and labels is None and names == tuple("0123456789")
    assert torch.equal(images, scale(pixels))
    expected = class_probabilities(model_of(work / "classifier"), ImageSet(pixels, None))
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=0)


# --- evaluate -------------------------------------------------------------------------------------------------------


def test_confusion_counts_the_true_class_by_row_and_the_guess_by_column(work, digits_folder, exact):
    found = evaluate(work / "classifier", options=CPU)
    test = load(f"folder:{digits_folder}").test
    assert test is not None and test.labels is not None
    guesses = class_probabilities(model_of(work / "classifier"), test).argmax(1).tolist()
    counts = [[0] * 10 for _ in range(10)]
    for truth, guess in zip(test.labels.tolist(), guesses, strict=True):
        counts[truth][guess] += 1
    assert found["confusion"] == counts and counts != [list(column) for column in zip(*counts, strict=True)]
    recalls = [counts[i][i] / max(1, sum(counts[i])) for i in range(10)]
    assert found["per_class"] == pytest.approx(dict(zip("0123456789", recalls, strict=True)))
    precisions = [counts[i][i] / max(1, sum(row[i] for row in counts)) for i in range(10)]
    assert recalls != pytest.approx(precisions) and 0 < found["accuracy"] < 1


def test_an_autoencoder_is_judged_at_the_ratio_asked_for_or_at_its_own(work, digits_folder, exact):
    test = load(f"folder:{digits_folder}").test
    assert test is not None
    errors = set()
    for asked, ratio in ((None, 0.6), (0.3, 0.3), (0.75, 0.75)):
        found = evaluate(work / "mae", mask_ratio=asked, options=CPU)
        expected = masked_mse(model_of(work / "mae"), test, ratio, seed=0)
        assert found["mask_ratio"] == ratio and found["images"] == len(test)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        errors.add(round(found["masked_mse"], 4))
    assert len(errors) == 3


def test_classes_of_other_names_are_refused(work, digits_folder, tmp_path):
    for name in ("zero", "one"):
        (tmp_path / name).symlink_to(digits_folder / ("0" if name == "zero" else "1"))
    with pytest.raises(
        UsageError, match=r"has other classes than .*: 2 \(one, zero, \.\.\.\) instead of 10 \(0, 1, 2, \.\.\.\)"
    ):
        evaluate(work / "classifier", data=f"folder:{tmp_path}", options=CPU)


# --- features -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_features_of_a_data_set_are_pooled_as_asked(pool, work, digits_folder, tmp_path):
    test = load(f"folder:{digits_folder}").test
    assert test is not None and test.labels is not None
    features(work / "mae", split="test", pool=pool, out=tmp_path / "f.npz", options=CPU)
    model = model_of(work / "mae")
    with torch.no_grad():
        tokens = model.forward_features(scale(test.images))
    expected = tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(dim=1)
    with np.load(tmp_path / "f.npz") as found:
        np.testing.assert_allclose(found["features"], expected, rtol=1e-3, atol=1e-4)
        assert found["label"].tolist() == test.labels.tolist() and found["index"].tolist() == list(range(len(test)))


def test_a_table_of_features_names_the_classes_of_its_labels(work, digits_folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    features(work / "mae", split="test", out=tmp_path / "f.parquet", options=CPU)
    table, data = parquet.read_table(tmp_path / "f.parquet"), load(f"folder:{digits_folder}")
    assert data.test is not None and data.test.labels is not None
    assert json.loads(table.schema.metadata[b"class_names"]) == list("0123456789")
    assert table["label"].to_pylist() == data.test.labels.tolist()
    assert table["index"].to_pylist() == list(range(len(data.test)))


def test_features_of_more_images_than_a_batch_and_of_broken_ones(work, digits, tmp_path, capsys):
    broken = [tmp_path / f"{i}.png" for i in range(2)]
    for path in broken:
        path.write_text("no image")
    given = [*digits[:255], broken[0], *digits[255:], broken[1]]
    said = features(work / "mae", given, out=tmp_path / "f.npz", options=CPU)
    assert (said["images"], said["unreadable"]) == (300, 2) and capsys.readouterr().err.count("cannot read") == 2
    with np.load(tmp_path / "f.npz") as found:
        assert found["path"].tolist() == [str(path) for path in digits]
        rows = found["features"]
    features(work / "mae", digits[254:257], out=tmp_path / "g.npz", options=CPU)
    with np.load(tmp_path / "g.npz") as found:
        np.testing.assert_allclose(rows[254:257], found["features"], rtol=1e-3, atol=1e-4)
    assert len(np.unique(rows.round(3), axis=0)) > 290


def test_a_class_token_that_is_not_there_is_said(work, digits, tmp_path):
    with pytest.raises(UsageError, match="has no class token; use --pool avg"):
        features(work / "headless", digits[:2], pool="token", out=tmp_path / "f.npz", options=CPU)


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is given to the functions that draw."""
    calls: list[Any] = []
    for name in ("reconstructions", "ratio_sweep"):
        monkeypatch.setattr(figures, name, lambda *given: calls.append(given))
    monkeypatch.setattr(figures, "animation", lambda file, frames: calls.append((file, list(frames))))
    return calls


@pytest.mark.parametrize("run", ["classifier", "mae"])
def test_attention_draws_the_last_block_and_then_the_rollout(run, work, digits, tmp_path, drawn):
    chosen = digits[::70]
    said = attention(work / run, chosen, out=tmp_path / "a.png", options=CPU)
    ((_, [(_, x, last, rolled)], names, titles),) = drawn
    model, pixels = model_of(work / run), read_all(chosen, (28, 28), 1, AS_IT_IS)
    with torch.no_grad():
        maps = attention_maps(model, scale(pixels))
        of_last = attention_to_patches(model, maps[-1].mean(dim=1))
        rollout = attention_to_patches(model, attention_rollout(maps))
    assert torch.equal(x, scale(pixels)) and names == ("image", "last block", "rollout")
    for ours, heat in ((last, of_last), (rolled, rollout)):
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(figures.overlay(x, heat)), atol=0.02, rtol=0)
    assert abs(torch.as_tensor(last) - torch.as_tensor(rolled)).max() > 0.3
    if run == "classifier":
        shares, best = class_probabilities(model, ImageSet(pixels, None)).max(dim=1)
        assert said["labels"] == [str(i) for i in best.tolist()]
        pairs = zip(said["labels"], shares.tolist(), strict=True)
        assert titles == [f"{label} ({share:.0%})" for label, share in pairs] and len({*titles}) > 3
    else:
        assert said["labels"] == titles == []


def test_attention_to_images_of_the_data_set_by_seed_and_count(work, digits_folder, tmp_path, drawn):
    test = load(f"folder:{digits_folder}").test
    assert test is not None
    for seed, count in ((0, 3), (5, 4)):
        said = attention(work / "mae", count=count, seed=seed, out=tmp_path / "a.png", options=CPU)
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
        assert said["images"] == count and torch.equal(drawn[-1][1][0][1], scale(test.images[order[:count]]))


@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize("kind", ["random", "block", "grid"])
def test_reconstructions_hide_what_kind_ratio_and_seed_say(kind, seed, work, digits, exact, tmp_path, drawn):
    chosen = digits[::90]
    said = reconstruct(work / "mae", chosen, mask_kind=kind, seed=seed, out=tmp_path / "r.png", options=CPU)
    ((_, [(title, x, masked, rebuilt)]),) = drawn
    mask = make_mask(kind, (4, 4), len(chosen), 0.6, seed)
    model = model_of(work / "mae")
    expected = reconstruct_images(model, x, mask)
    assert torch.equal(masked, expected[0])
    torch.testing.assert_close(rebuilt, expected[1], atol=1e-4, rtol=0)
    hidden = int(mask[0].sum())
    ratio = hidden / 16 if kind == "grid" else 0.6
    assert said["hidden"] == {ratio: hidden} and title.startswith(f"{hidden} of 16 patches hidden")
    assert said["masked_mse"] == {ratio: pytest.approx(expected[2], rel=1e-4)}
    assert said["visible_mean_mse"] == {ratio: pytest.approx(visible_mean_mse(model, x, mask), rel=1e-4)}


def test_a_sweep_goes_from_a_tenth_to_nine_tenths(work, digits, exact, tmp_path, drawn):
    said = reconstruct(work / "mae", digits[:2], sweep=True, out=tmp_path / "s.png", options=CPU)
    ((_, groups, errors, baselines),) = drawn
    hidden = {tenths / 10: 16 - int(16 * (1 - tenths / 10)) for tenths in range(1, 10)}
    assert said["hidden"] == hidden and list(errors) == list(baselines) == list(hidden) and len(groups) == 9
    assert errors == said["masked_mse"] and baselines == said["visible_mean_mse"] and errors != baselines


def test_an_animation_hides_one_patch_after_the_other_within_60_frames(
    work, digits, exact, tmp_path, drawn, monkeypatch
):
    said = reconstruct(work / "mae", digits[:2], sweep=True, seed=2, out=tmp_path / "s.gif", options=CPU)
    ((_, frames),) = drawn
    assert list(said["hidden"].values()) == list(range(1, 16)) and len(frames) == 15
    for (_, x, before, _), (_, _, after, _) in itertools.pairwise(frames):
        assert not ((before == 0) & (after != 0)).any(), "each mask lies within the next"
        assert torch.equal(x, frames[0][1])
    monkeypatch.setattr(reconstructing, "FRAMES", 5)
    reconstruct(work / "mae", digits[:2], sweep=True, seed=2, out=tmp_path / "s.gif", options=CPU)
    assert [title.split(" ")[0] for title, *_ in drawn[1][1]] == ["1", "4", "8", "12", "15"], "from one to all but one"


def test_reconstructions_of_the_data_set_are_of_its_test_images_by_seed_and_count(work, digits_folder, tmp_path, drawn):
    test = load(f"folder:{digits_folder}").test
    assert test is not None
    for seed, count in ((0, 3), (5, 4)):
        reconstruct(work / "mae", count=count, seed=seed, out=tmp_path / "r.png", options=CPU)
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(drawn[-1][1][0][1], scale(test.images[order[:count]]))


def test_a_data_set_in_a_folder_of_the_persons_is_read_from_there(work, tmp_path, monkeypatch, drawn):
    """Nothing is in the cache, and no source is known."""
    publish_small_sets(tmp_path / "cache", monkeypatch)
    (tmp_path / "data").mkdir()
    for name, content in MNIST.items():
        (tmp_path / "data" / name).write_bytes(content)
    shutil.copytree(work / "mae", tmp_path / "mae")
    file = tmp_path / "mae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": "mnist"}))
    options = RunOptions(device="cpu", threads=1, kernels="torch", data_dir=tmp_path / "data")
    assert evaluate(tmp_path / "mae", options=options)["images"] == 200
    assert features(tmp_path / "mae", out=tmp_path / "f.npz", options=options)["images"] == 200
    assert attention(tmp_path / "mae", count=2, out=tmp_path / "a.png", options=options)["images"] == 2
    assert reconstruct(tmp_path / "mae", count=2, out=tmp_path / "r.png", options=options)["images"] == 2
    with pytest.raises(RunError):
        evaluate(tmp_path / "mae", options=CPU)
