"""Prediction, attention and features: real PNG and JPEG files, real processes, a tiny model with random weights."""

import csv
import io
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Maelab

from maelab.config import RunOptions
from maelab.data import ImageSet, load
from maelab.data.layout import SUFFIXES
from maelab.errors import RunError, UsageError
from maelab.inference import class_probabilities, extract_features
from maelab.tasks.features import features as write_features
from maelab.tasks.predict import predict
from maelab.training.checkpoint import ModelSpec, load_model, save_model
from maelab.training.parallel import prepare, start_engine

CPU = ("--threads", 1, "--kernels", "torch")
SHAPE: dict[str, Any] = {
    "img_size": (28, 28), "patch_size": 7, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2
}  # fmt: skip
NAMES = ("nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def options() -> RunOptions:
    return RunOptions(device="cpu", threads=1)


@pytest.fixture(scope="module")
def work(tmp_path_factory, digits_folder, cifar_folder) -> Path:
    """A classifier, an autoencoder and a linear probe; digits/ with six files, photo.jpg, and files that are broken."""
    folder = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    for name, spec in {
        "classifier": ModelSpec("VisionTransformer", {**SHAPE, "num_classes": 10}, "folder:digits", NAMES),
        "mae": ModelSpec("MaskedAutoencoderViT", {**SHAPE, "decoder_embed_dim": 8, "decoder_num_heads": 2}, "mnist"),
        "linear": ModelSpec("Linear", {"in_features": 16, "out_features": 10}, "mnist", NAMES),
    }.items():
        model = spec.build()
        if name == "classifier":
            torch.nn.init.normal_(model.get_parameter("head.weight"), std=2)
        save_model(folder / name, spec, model.state_dict())
    for i, file in enumerate(sorted(digits_folder.rglob("*.png"))[::50]):
        (folder / "digits" / "sub").mkdir(parents=True, exist_ok=True)
        (folder / "digits" / ("sub" if i == 5 else "") / f"{i}.png").write_bytes(file.read_bytes())
    photo = Image.open(next((cifar_folder / "cat").iterdir())).resize((60, 40))
    exif = photo.getexif()
    exif[0x0112] = 6  # lies on its side
    photo.save(folder / "photo.jpg", exif=exif)
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "digits" / "0.png").read_bytes()[:100])
    (folder / "void").mkdir()
    return folder


DIGITS = [f"digits/{i}.png" for i in range(5)] + ["digits/sub/5.png"]


def test_images_are_prepared_as_in_training(work, tmp_path, monkeypatch):
    """Upright, scaled, cropped and grey, exactly as the loader of folders does it."""
    monkeypatch.chdir(work)
    for i, name in enumerate(files := ["photo.jpg", *DIGITS[:3]]):
        (tmp_path / f"{i}{Path(name).suffix}").symlink_to(work / name)
    data = load(f"folder:{tmp_path}", img_size=(28, 28), in_chans=1)
    model = load_model("classifier")[0]
    assert hasattr(model, "img_size")
    engine = start_engine(options())
    prepare(model, engine, options())
    with engine.autocast():
        expected = class_probabilities(model, data.train)  # type: ignore[arg-type]
    found = list(predict("classifier", files, top=10, options=options()))
    for entry, probabilities in zip(found, expected, strict=True):
        by_name = {guess["label"]: guess["probability"] for guess in entry["top"]}
        assert [by_name[name] for name in NAMES] == pytest.approx(probabilities.tolist(), abs=1e-5)
        assert [g["probability"] for g in entry["top"]] == sorted(by_name.values(), reverse=True)
        assert (entry["label"], entry["probability"]) == tuple(entry["top"][0].values())
    assert len({entry["label"] for entry in found}) > 1, "the weights tell images apart"


def test_json_has_one_entry_per_input_in_order(work, maelab: Maelab):
    inputs = ["./photo.jpg", "empty.png", "digits", "void", "nowhere.png", "digits/[34].png", "*.gif", "text.png"]
    ended = maelab.run("predict", "classifier", *inputs, "cut.png", "--top", 2, "--json", *CPU, cwd=work)
    (key, entries), *rest = ended.json().items()
    assert key == "predictions" and not rest
    errors = {
        "empty.png": "empty",
        "void": f"a folder without images ({', '.join(SUFFIXES)})",
        "nowhere.png": "No such file or directory",
        "*.gif": "matches no file",
        "text.png": "not a PNG, JPEG, WEBP, BMP, GIF, TIFF, AVIF, HEIF image",
        "cut.png": "image file is truncated",
    }
    order = ["./photo.jpg", "empty.png", *DIGITS, "void", "nowhere.png", *DIGITS[3:5], "*.gif", "text.png", "cut.png"]
    assert [entry["path"] for entry in entries] == order
    for entry in entries:
        if entry["path"] in errors:
            assert entry.keys() == {"path", "error"} and entry["error"].startswith(errors[entry["path"]])
        else:
            assert entry.keys() == {"path", "label", "probability", "top"} and len(entry["top"]) == 2
            assert entry["label"] in NAMES and 0 < entry["probability"] <= 1
    assert entries[5:7] == entries[10:12]
    lines = ended.err.splitlines()
    assert len(lines) == 7 and lines[1] == "cannot read empty.png: empty"
    assert lines[0] == "digits is the folder that classifier was trained on, so it has seen most of these images"


def test_table_csv_stdin_and_gallery(work, maelab: Maelab, tmp_path):
    line = ("predict", "classifier", "digits", "empty.png", "--gallery", tmp_path / "g.png")
    table = maelab.run(*line, *CPU, cwd=work, drawn=True)
    rows = [line.split() for line in table.out.splitlines()]
    assert [row[-1] for row in rows] == [*DIGITS, "empty.png"] and rows[-1] == ["unreadable", "empty.png"]
    assert all(len(row) == 7 and row[1].endswith("%") for row in rows[:-1])
    assert len({line.index(row[-1]) for line, row in zip(table.out.splitlines()[:-1], rows, strict=False)}) == 1
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height

    odd = os.fsdecode(b"odd, \xff\n.png").replace("\n", "")  # a comma, and bytes that are no text
    (tmp_path / odd).write_bytes((work / "digits/0.png").read_bytes())
    (tmp_path / "list").write_bytes(b"\n" + os.fsencode(str(tmp_path / odd)) + b"\n\ndigits/1.png\nempty.png\n")
    stdin = ("classifier", "photo.jpg", "-", "--csv", "--top", 12)
    ended = maelab.run("predict", *stdin, *CPU, cwd=work, stdin=str(tmp_path / "list"))
    said = ended.out.encode(errors="surrogateescape").decode(errors="surrogateescape")
    header, *rows = csv.reader(io.StringIO(said))
    assert header[:6] == ["path", "error", "label", "probability", "label_2", "probability_2"] and len(header) == 26
    assert [row[0] for row in rows] == ["photo.jpg", str(tmp_path / odd), "digits/1.png", "empty.png"]
    assert [row[1] for row in rows] == ["", "", "", "empty"] and all(len(row) == 26 for row in rows)
    assert sum(map(float, rows[1][3:23:2])) == pytest.approx(1, abs=1e-4) and set(rows[3][2:]) == {""}


def test_exit_status_is_1_when_nothing_could_be_read(work, maelab: Maelab):
    ended = maelab.run("predict", "classifier", "empty.png", "void", "--json", *CPU, cwd=work)
    assert ended.status == 1 and ended.err.splitlines()[-1] == "maelab: no image could be read"
    assert ended.out.startswith('{"predictions": [{"path": "empty.png", "error": "empty"}, ')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("predict mae digits", "mae is an autoencoder and knows no classes; make it a classifier with maelab finetune"),
        ("predict linear digits", "linear is a linear probe; predict needs a fine-tuned classifier"),
        (
            "predict classifier",
            "predict needs PATHS: image files, folders, globs, or on the command line - for paths from stdin",
        ),
        ("predict classifier digits --csv --json", "--csv and --json exclude each other"),
        ("predict classifier digits --top 0", "--top must be at least 1, got 0"),
        ("predict classifier digits --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("predict classifier digits --gallery g.jpg", "--gallery g.jpg: the picture is a PNG; give a name that ends"),
        ("predict classifier -", "stdin names no image"),
        ("predict nowhere digits", "no run folder or checkpoint at nowhere"),
    ],
)
def test_refusals(line, message, work, maelab: Maelab):
    ended = maelab.run(*line.split(), *CPU, cwd=work, stdin=os.devnull)
    assert ended.status == 2 and ended.error().startswith(message)


def test_any_number_of_images_a_batch_at_a_time(work, monkeypatch):
    """An endless list: results come while it is read, and no further ahead than a batch."""
    monkeypatch.chdir(work)
    taken = itertools.count()
    endless = (DIGITS[next(taken) % 6] for _ in itertools.count())
    found = list(itertools.islice(predict("classifier", endless, batch_size=4, options=options()), 10))
    assert next(taken) == 12
    assert [entry["path"] for entry in found] == (DIGITS * 2)[:10] and found[0] == found[6]
    whole = list(predict("classifier", "digits", options=options()))  # one batch; a path alone is no list of letters
    assert [entry["label"] for entry in found[:6]] == [entry["label"] for entry in whole]


def test_a_gallery_that_cannot_be_drawn_and_a_model_that_cannot_predict(work, monkeypatch):
    monkeypatch.chdir(work)
    with pytest.raises(RunError, match=r"cannot write photo.jpg/g.png: "):
        list(predict("classifier", "digits", gallery=Path("photo.jpg/g.png"), options=options()))
    with pytest.raises(UsageError, match="mae is an autoencoder"):
        predict("mae", "digits", options=options())  # at once, not when the first result is asked for


# --- attention and features -----------------------------------------------------------------------------------------


def test_attention(work, maelab: Maelab, tmp_path):
    line = ("attention", "classifier", "digits", "photo.jpg", "--out", tmp_path / "a.png")
    result = maelab.run(*line, "--json", *CPU, cwd=work, drawn=True).json()
    predicted = [entry["label"] for entry in predict(work / "classifier", work / "digits", options=options())]
    assert result["labels"][:6] == predicted and (result["images"], result["of"]) == (7, "the class token")
    ended = maelab.run("attention", "mae", "digits/0.png", "--out", tmp_path / "b.png", *CPU, cwd=work, drawn=True)
    assert ended.out == f"attention of the class token, over 1 images\n{tmp_path / 'b.png'}\n"
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and picture.height > 100


def test_features_of_files(work, maelab: Maelab, tmp_path):
    line = ("features", "mae", "digits", "empty.png", "photo.jpg", "--pool", "token", *CPU, "--json")
    ended = maelab.run(*line, "--out", tmp_path / "f.npz", cwd=work)
    assert ended.json().items() >= {"images": 7, "dim": 16, "unreadable": 1}.items()
    assert ended.err.splitlines() == ["cannot read empty.png: empty"]
    with np.load(tmp_path / "f.npz") as found:  # no pickle in it
        assert set(found) == {"features", "path", "encoder"} and list(found["path"]) == [*DIGITS, "photo.jpg"]
        features = found["features"]
    model: Any = load_model(work / "mae")[0]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(work / name)))[None] for name in DIGITS])
    expected = extract_features(model, ImageSet(pixels, None), "token").numpy()
    assert features.dtype == np.float32 and features.shape == (7, 16)
    np.testing.assert_allclose(features[:6], expected, rtol=1e-4, atol=1e-5)
    parquet = pytest.importorskip("pyarrow.parquet")
    maelab.run(*line, "--out", tmp_path / "f.parquet", cwd=work).json()
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table["path"].to_pylist() == [*DIGITS, "photo.jpg"]
    np.testing.assert_allclose(np.array(table["features"].to_pylist()), features, rtol=1e-6)


def test_features_of_a_data_set_say_which_images_they_are(work, digits_folder, tmp_path):
    (work / "run").mkdir(exist_ok=True)
    config = {"task": "finetune", "val_fraction": 0.2, "split_seed": 5, "limit": 10}
    (work / "run" / "config.json").write_text(json.dumps(config))
    if not (work / "run" / "checkpoints").exists():
        shutil.copytree(work / "classifier", work / "run" / "checkpoints" / "best")
    about = work / "run" / "checkpoints" / "best" / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"data": f"folder:{digits_folder}"}))
    data = load(f"folder:{digits_folder}")
    assert data.test is not None
    seen = set()
    parts: tuple[Any, ...] = (("train", data.train), ("val", data.train), ("test", data.test))
    for split, source in parts:
        write_features(work / "run", data=data.name, split=split, out=tmp_path / "f.npz", options=options())
        with np.load(tmp_path / "f.npz") as found:
            index = torch.from_numpy(found["index"])
            features = extract_features(load_model(work / "classifier")[0], source[index]).numpy()  # type: ignore[arg-type]
            np.testing.assert_allclose(found["features"], features, rtol=1e-4, atol=1e-5)
            assert source.labels is not None and found["label"].tolist() == source.labels[index].tolist()
            assert tuple(found["class_names"]) == data.class_names
            seen |= {(source is data.test, i) for i in index.tolist()}
        assert len(index) > {"train": 180, "val": 25, "test": 15}[split]
    assert len(seen) == 300, "the parts are disjoint, and together they are everything"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("attention linear digits", "linear is a Linear without attention; name the run that it judged"),
        ("attention mae digits --out a.gif", "--out a.gif: the picture is a PNG; give a name that ends in .png"),
        ("attention mae nowhere.png", "cannot read the image nowhere.png: No such file or directory"),
        ("features linear digits", "linear is a linear probe; name the run that it judged"),
        ("features mae digits --out f.csv", "--out f.csv: give a name that ends in .npz or .parquet"),
        ("features mae digits --data mnist", "give images or --data, not both"),
        ("features mae --data folder:digits/sub --split val", "--split val needs a run folder: its config.json says"),
    ],
)
def test_refusals_of_attention_and_features(line, message, work, maelab: Maelab):
    ended = maelab.run(*line.split(), *CPU, cwd=work)
    assert ended.status == 2 and ended.error().startswith(message)


def test_features_of_nothing_and_parquet_without_pyarrow(work, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="no image could be read"):
        write_features(work / "mae", [work / "empty.png"], out=tmp_path / "f.npz", options=options())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"needs pyarrow \(pip install 'maelab\[parquet\]'\); or choose .npz"):
        write_features(work / "mae", [work / "digits"], out=tmp_path / "f.parquet", options=options())
    assert not list(tmp_path.iterdir())
