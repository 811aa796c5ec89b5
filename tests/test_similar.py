"""Nearest images and odd ones, beside plain numpy; real folders, index files that are stale or hostile."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Maelab

from maelab.config import ComputeOptions, DataOptions
from maelab.data.batches import scale
from maelab.errors import MaelabError, RunError, UsageError
from maelab.inference import patch_errors
from maelab.model import MaskedAutoencoderViT, patchify
from maelab.tasks.features import features
from maelab.tasks.odd import NEIGHBOURS, odd
from maelab.tasks.similar import similar
from maelab.training.checkpoint import load_model

KINDS = ("patch", "error")
RUN, CPU, DATA = "maelab:mnist-mae", ComputeOptions(threads=1), DataOptions(threads=1)


@pytest.fixture(scope="module")
def digits(mnist_small, tmp_path_factory) -> Path:
    """60 digits, and one whose name means something to those who draw."""
    folder = tmp_path_factory.mktemp("digits")
    for i, image in enumerate(mnist_small.train.images[:60]):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:02}.png")
    (folder / "00.png").rename(folder / "$\\x$\n.png")
    return folder


def unit(x: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return (x - centre) / np.linalg.norm(x - centre, axis=1, keepdims=True)


def kept(file: Path) -> tuple[list[str], np.ndarray]:
    with np.load(file) as found:
        return found["path"].tolist(), found["features"]


def test_neighbours_are_those_of_the_features(digits, tmp_path):
    features(RUN, [digits], out=tmp_path / "f.npz", options=DATA)
    paths, rows = kept(tmp_path / "f.npz")
    vectors = unit(rows, rows.mean(axis=0))
    queries = [str(digits / "07.png"), str(digits / "31.png")]
    found = similar(RUN, queries, in_=digits, top=4, out=tmp_path / "s.png", options=CPU)
    assert found["images"] == 60 and [entry["path"] for entry in found["found"]] == queries
    for entry in found["found"]:
        own = paths.index(entry["path"])
        likeness = vectors @ vectors[own]
        order = [i for i in np.argsort(-likeness) if i != own][:4]  # an image does not find itself
        assert [one["path"] for one in entry["similar"]] == [paths[i] for i in order]
        np.testing.assert_allclose([one["similarity"] for one in entry["similar"]], likeness[order], atol=1e-4)
    again = similar(RUN, queries, in_=tmp_path / "f.npz", top=4, out=tmp_path / "t.png", options=CPU)
    assert [[one["path"] for one in e["similar"]] for e in again["found"]] == [
        [one["path"] for one in e["similar"]] for e in found["found"]
    ]
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.width > picture.height > 100


@pytest.mark.slow
def test_a_copy_elsewhere_is_found_and_may_vanish_again(digits, tmp_path, capsys):
    copy = tmp_path / "copy.png"
    copy.write_bytes((digits / "07.png").read_bytes())
    (tmp_path / "broken.png").write_text("no image")
    looked = [copy, tmp_path / "broken.png"]
    found = similar(RUN, looked, in_=digits, top=100, out=tmp_path / "s.png", options=CPU)
    assert "cannot read" in capsys.readouterr().err and found["unreadable"] == 1 and len(found["found"]) == 1
    nearest = found["found"][0]["similar"]
    assert len(nearest) == 60 and nearest[0]["path"] == str(digits / "07.png")
    assert nearest[0]["similarity"] == pytest.approx(1, abs=1e-4)
    features(RUN, [digits, copy], out=tmp_path / "f.npz", options=DATA)
    copy.unlink()
    query = [digits / "07.png"]
    found = similar(RUN, query, in_=tmp_path / "f.npz", out=tmp_path / "t.png", options=CPU)
    assert found["found"][0]["similar"][0]["path"] == str(copy) and (tmp_path / "t.png").exists()


def test_an_index_of_another_model_is_refused(digits, tmp_path):
    features("maelab:mnist-classifier", [digits], out=tmp_path / "other.npz", options=DATA)
    with pytest.raises(UsageError, match="of another model or pooling; write it again"):
        similar(RUN, [digits / "07.png"], in_=tmp_path / "other.npz", out=tmp_path / "s.png", options=CPU)
    assert not (tmp_path / "s.png").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"no archive",
        {"features": np.zeros((2, 192), np.float32), "path": np.array(["a"]), "encoder": np.array("x")},
        {"features": np.zeros((1, 192), np.float32), "path": np.array([3]), "encoder": np.array("x")},
        {"features": np.zeros((0, 192), np.float32), "path": np.array([], str), "encoder": np.array("x")},
        {"features": np.array([["a"] * 192]), "path": np.array(["a"]), "encoder": np.array("x")},
        {"features": np.array([None] * 192), "path": np.array(["a"]), "encoder": np.array("x")},
        {"features": np.zeros((1, 192), np.float32)},
    ],
)
def test_what_is_no_index_is_refused(content, digits, tmp_path):
    file = tmp_path / "f.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.savez(file, allow_pickle=True, **content)
    with pytest.raises(RunError, match=r"f\.npz holds no features of image files"):
        similar(RUN, [digits / "07.png"], in_=file, out=tmp_path / "s.png", options=CPU)


def test_a_compressed_index_is_not_blown_up(digits, tmp_path):
    rows = np.zeros((1_000, 192), np.float32)
    np.savez_compressed(tmp_path / "f.npz", features=rows, path=np.array(["a"] * 1_000), encoder=np.array("x"))
    with pytest.raises(RunError, match="it is compressed, and might be of any size"):
        similar(RUN, [digits / "07.png"], in_=tmp_path / "f.npz", out=tmp_path / "s.png", options=CPU)


def test_the_commands(digits, maelab: Maelab, tmp_path):
    said = maelab.run("similar", RUN, digits / "07.png", "--in", digits, "--top", 2, "--threads", 1, cwd=tmp_path)
    lines = said.out.splitlines()
    assert lines[0] == f"{digits}/07.png: like" and len(lines) == 4 and lines[-1] == "similar.png"
    result = maelab.run("odd", RUN, digits, "--masks", 2, "--threads", 1, "--json", cwd=tmp_path).json()
    assert result["images"] == len(result["ranked"]) == 60 and (tmp_path / "odd.png").exists()
    shown = maelab.run("odd", RUN, digits, "--masks", 2, "--top", 3, "--threads", 1, cwd=tmp_path).out.splitlines()
    assert len(shown) == 4 and shown[0].endswith(")") and shown[-1] == "odd.png"
    error = maelab.run("similar", RUN, digits / "07.png", "--in", "gone.npz", cwd=tmp_path).error()
    assert error == "--in gone.npz: no such file"
    error = maelab.run("similar", RUN, digits / "07.png", cwd=tmp_path).error()
    assert "--in" in error


@pytest.mark.slow
def test_what_does_not_belong_is_the_oddest(digits, tmp_path):
    strange = tmp_path / "with"
    strange.mkdir()
    for file in sorted(digits.glob("[0-9]*.png"))[:40]:
        (strange / file.name).write_bytes(file.read_bytes())
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(pixels).save(strange / "noise.png")
    for like in (None, digits):
        found = odd(RUN, strange, like=like, out=tmp_path / "odd.png", options=CPU)
        assert Path(found["ranked"][0]["path"]).name == "noise.png"
        scores = [one["score"] for one in found["ranked"]]
        assert scores == sorted(scores, reverse=True) and scores[0] > 2 * scores[1]
    alone = odd("maelab:mnist-classifier", strange, out=tmp_path / "odd.png", options=CPU)  # it has no decoder
    assert alone["ranked"][0].keys() == {"path", "distance", "patch", "score"}
    few = tmp_path / "few"
    few.mkdir()
    (few / "noise.png").write_bytes((strange / "noise.png").read_bytes())
    assert len(odd(RUN, few, like=digits, out=tmp_path / "odd.png", options=CPU)["ranked"]) == 1
    with pytest.raises(UsageError, match=f"has 1 images; {NEIGHBOURS + 1} are the least to compare with"):
        odd(RUN, few, out=tmp_path / "odd.png", options=CPU)


def test_a_distance_is_the_mean_to_five_neighbours_and_a_score_in_deviations(digits, tmp_path):
    features(RUN, [digits], out=tmp_path / "f.npz", options=DATA)
    paths, rows = kept(tmp_path / "f.npz")
    vectors = unit(rows, rows.mean(axis=0))
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -2)
    expected = dict(zip(paths, 1 - np.sort(likeness, axis=1)[:, -5:].mean(axis=1), strict=True))
    found = odd(RUN, digits, masks=2, out=tmp_path / "odd.png", options=CPU)["ranked"]
    np.testing.assert_allclose([one["distance"] for one in found], [expected[one["path"]] for one in found], atol=1e-4)

    def deviations(values: list[float]) -> np.ndarray:
        x = np.array(values)
        median = np.sort(x)[(len(x) - 1) // 2]
        return (x - median) / (1.4826 * np.sort(np.abs(x - median))[(len(x) - 1) // 2])

    scores = np.stack([deviations([one["distance"] for one in found]), *([one[k] for one in found] for k in KINDS)])
    np.testing.assert_allclose([one["score"] for one in found], scores.max(axis=0), rtol=1e-3, atol=1e-3)


def test_the_worst_patches_are_far_from_those_of_other_images(digits, tmp_path):
    """Beside a plain search through all patches of the 40 images, of which there are fewer than are compared."""
    folder = tmp_path / "some"
    folder.mkdir()
    for file in sorted(digits.glob("[0-9]*.png"))[:40]:
        (folder / file.name).write_bytes(file.read_bytes())
    found = odd(RUN, folder, masks=1, out=tmp_path / "odd.png", options=CPU)["ranked"]
    images = {file.name: np.asarray(Image.open(file), np.float64) / 127.5 - 1 for file in sorted(folder.iterdir())}
    cut = {n: x.reshape(7, 4, 7, 4).transpose(0, 2, 1, 3).reshape(49, 16) for n, x in images.items()}
    far = {}
    for name, own in cut.items():
        others = np.concatenate([patches for other, patches in cut.items() if other != name])
        far[name] = np.linalg.norm(own[:, None] - others[None], axis=2).min(axis=1)
    maps = np.stack([far[Path(one["path"]).name] for one in found])
    low = (len(maps) - 1) // 2
    centre = np.sort(maps, axis=0)[low]
    spread = 1.4826 * np.sort(np.abs(maps - centre), axis=0)[low]
    worst = np.sort((maps - centre) / np.maximum(spread, spread.mean()), axis=1)[:, -3:].mean(axis=1)
    order = np.argsort(-worst)
    own = np.argsort([-one["patch"] for one in found])
    assert order[:5].tolist() == own[:5].tolist()


def test_the_error_of_a_patch(mnist_small):
    model, _ = load_model(RUN)
    assert isinstance(model, MaskedAutoencoderViT)
    images = scale(mnist_small.train.images[:3])
    mask = torch.zeros(3, 49)
    mask[:, [5, 11, 40]] = 1
    with torch.no_grad():
        _, predicted, _ = model(images, mask=mask)
        errors = patch_errors(model, images, mask)
    patches = patchify(images, 4)
    for image, patch in ((0, 5), (1, 11), (2, 40)):
        difference = predicted[image, patch] - patches[image, patch]
        assert float(errors[image, patch]) == pytest.approx(float((difference**2).mean()), rel=1e-4)


def test_a_probe_and_a_picture_of_another_kind_are_refused(digits, tmp_path):
    for call in (lambda out: similar(RUN, [digits], in_=digits, out=out), lambda out: odd(RUN, digits, out=out)):
        with pytest.raises(UsageError, match=r"--out x\.jpg: the picture is a PNG"):
            call("x.jpg")
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(MaelabError):
        odd(tmp_path, digits, out=tmp_path / "odd.png", options=CPU)
