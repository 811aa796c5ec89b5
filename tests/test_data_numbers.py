"""Images of more than 8 bits and of any number of channels: one range, found in the data and kept by the model."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from imagecodecs import png_encode
from PIL import Image

from maelab import recipes
from maelab.config import AS_IT_IS, Reading, RunOptions
from maelab.data import ImageSet, load
from maelab.data.decode import decode, read_header
from maelab.data.folder import scan
from maelab.data.images import read_all
from maelab.data.splits import content_key
from maelab.errors import RunError, UsageError
from maelab.export import export
from maelab.inference import extract_features
from maelab.model import VisionTransformer
from maelab.tasks.evaluate import evaluate
from maelab.tasks.features import features
from maelab.tasks.finetune import finetune
from maelab.tasks.predict import predict
from maelab.tasks.pretrain import pretrain
from maelab.tasks.reconstruct import reconstruct
from maelab.training.checkpoint import load_model

RANGE = ((0.0, 4095.0),)
SIZE = (16, 24)  # height, width


def scene(seed: int, channels: int = 1, top: int = 4095) -> np.ndarray:
    """uint16 (H, W, C) of 12 bits: a bright half, on the left or on the right."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, top // 3, (*SIZE, channels))
    half = slice(0, SIZE[1] // 2) if seed % 2 else slice(SIZE[1] // 2, None)
    numbers[:, half] += 2 * top // 3
    return numbers.astype(np.uint16)


def write(file: Path, numbers: np.ndarray) -> Path:
    """Numbers (H, W, C) as the file's name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    numbers = numbers[:, :, 0] if numbers.shape[2] == 1 else numbers
    if file.suffix == ".npy":
        np.save(file, numbers)
    elif file.suffix == ".tif":
        tifffile.imwrite(file, numbers, photometric="minisblack" if numbers.ndim == 2 else None)
    else:
        file.write_bytes(png_encode(np.ascontiguousarray(numbers)))
    return file


def folder(root: Path, suffix: str, channels: int = 1, n: int = 30, top: int = 4095) -> Path:
    for seed in range(n):
        write(root / ("right", "left")[seed % 2] / f"{seed}.{suffix}", scene(seed, channels, top))
    return root


@pytest.mark.parametrize("suffix", ["png", "tif", "npy"])
@pytest.mark.parametrize("channels", [1, 3])
def test_twelve_bits_are_seen_and_not_black(suffix: str, channels: int, tmp_path: Path) -> None:
    data = load(f"folder:{folder(tmp_path / 'images', suffix, channels)}")
    assert data.train.images.shape[1:] == (channels, *SIZE) and data.reading.value_range is not None
    ((low, high),) = data.reading.value_range
    assert 0 <= low < 60 and 4000 < high <= 4095
    assert data.train.images.amin() == 0 and data.train.images.amax() == 255
    assert data.train.images.float().mean() == pytest.approx(127, abs=12)  # a fixed 16th of it would be 8


@pytest.mark.parametrize("suffix", ["png", "tif", "npy"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_range_is_that_of_the_data_set_and_not_of_the_image(suffix: str, channels: int, tmp_path: Path) -> None:
    for value in (1000, 2000, 3000):
        write(tmp_path / f"{value}.{suffix}", np.full((8, 8, channels), value, np.uint16))
    values = load(f"folder:{tmp_path}", img_size=(8, 8)).train.images.float().mean(dim=(1, 2, 3)).tolist()
    assert values == pytest.approx([0, 127.5, 255], abs=1)


def test_a_stretched_number_is_what_the_formula_says(tmp_path: Path) -> None:
    numbers = np.array([[-5.0, 0.0, 0.25, 0.5], [1.0, 7.0, np.nan, np.inf]], np.float32)
    np.save(tmp_path / "x.npy", numbers)
    pixels = decode(tmp_path / "x.npy", (2, 4), 1, Reading(value_range=((0.0, 1.0),)))
    assert pixels.tolist() == [[[0, 0, 64, 128], [255, 255, 0, 255]]]


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "int32", "float16", "float32", "float64", ">i2"])
@pytest.mark.parametrize("suffix", ["tif", "npy"])
def test_every_type_of_number(dtype: str, suffix: str, tmp_path: Path) -> None:
    numbers = scene(1).astype(dtype)
    write(tmp_path / f"x.{suffix}", numbers)
    write(tmp_path / "y.npy", scene(1))
    one, other = (decode(tmp_path / name, SIZE, 1, Reading(value_range=RANGE)) for name in (f"x.{suffix}", "y.npy"))
    assert np.abs(one.astype(int) - other).max() <= 1  # float16 rounds
    assert read_header(tmp_path / f"x.{suffix}").deep


@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_of_any_kind(compression: str | None, channels: int, planar: str, tmp_path: Path) -> None:
    numbers = scene(1, channels)
    stored = numbers.transpose(2, 0, 1) if planar == "separate" else numbers
    kind = "rgb" if channels == 3 else "minisblack"
    stored, planar_is = (numbers[:, :, 0], None) if channels == 1 else (stored, planar)
    tifffile.imwrite(tmp_path / "x.tif", stored, photometric=kind, planarconfig=planar_is, compression=compression)
    header = read_header(tmp_path / "x.tif")
    assert (header.height, header.width, header.channels, header.deep) == (*SIZE, channels, True)
    np.save(tmp_path / "x.npy", numbers)
    reading = Reading(value_range=RANGE)
    one, other = (decode(tmp_path / f"x.{end}", SIZE, channels, reading) for end in ("tif", "npy"))
    assert np.array_equal(one, other)


def test_the_channels_are_on_the_shorter_of_the_first_and_last_axis(tmp_path: Path) -> None:
    numbers = scene(1, 4).astype(np.uint8)
    np.save(tmp_path / "last.npy", numbers)
    np.save(tmp_path / "first.npy", numbers.transpose(2, 0, 1))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(numbers))
    for name in ("last", "first", "fortran"):
        assert np.array_equal(decode(tmp_path / f"{name}.npy", SIZE, 4), numbers.transpose(2, 0, 1))
    said = scan(f"folder:{tmp_path}").lines()
    assert any("(H, W, C) or (C, H, W)" in line and "4 channels" in line for line in said)


def test_an_imagej_stack_of_channels_is_one_image_and_other_pages_are_counted(tmp_path: Path) -> None:
    numbers = scene(1, 5).transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "stack.tif", numbers, imagej=True, metadata={"axes": "CYX"})
    assert read_header(tmp_path / "stack.tif")[:5] == (*SIZE, "uint16 x 5 channels", False, 5)
    assert decode(tmp_path / "stack.tif", SIZE, 5, Reading(value_range=RANGE)).shape == (5, *SIZE)
    tifffile.imwrite(tmp_path / "pages.tif", numbers, photometric="minisblack")
    assert read_header(tmp_path / "pages.tif").animated and read_header(tmp_path / "pages.tif").channels == 1


def test_opacity_of_16_bits_is_put_on_white(tmp_path: Path) -> None:
    numbers = np.full((8, 8, 4), 1000, np.uint16)
    numbers[..., 3] = 0
    (tmp_path / "grey.png").write_bytes(png_encode(np.ascontiguousarray(numbers[..., 2:])))
    assert read_header(tmp_path / "grey.png").channels == 1
    assert (decode(tmp_path / "grey.png", (8, 8), 1, Reading(value_range=RANGE)) == 255).all()
    (tmp_path / "x.png").write_bytes(png_encode(numbers))
    tifffile.imwrite(tmp_path / "x.tif", numbers, photometric="rgb", extrasamples=["unassalpha"])
    for end in ("png", "tif"):
        assert (decode(tmp_path / f"x.{end}", (8, 8), 3, Reading(value_range=RANGE)) == 255).all()


def test_truth_values_and_bytes_need_no_range(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.eye(8, dtype=bool))
    np.save(tmp_path / "y.npy", np.full((8, 8), 7, np.uint8))
    data = load(f"folder:{tmp_path}")
    assert data.reading.value_range is None and data.train.images[1].unique().tolist() == [7]
    assert data.train.images[0, 0].tolist() == (255 * np.eye(8, dtype=int)).tolist()


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 3, 4, 5)), "the shape"),
        (np.zeros(7), "the shape"),
        (np.zeros((0, 8)), "the shape"),
        (np.zeros((8, 8), complex), "holds no numbers"),
        (np.zeros((8, 8), "S3"), "holds no numbers"),
        (np.zeros((8, 8), [("a", "u1"), ("b", "u1")]), "holds no numbers"),
    ],
)
def test_what_is_no_image_is_named(array: np.ndarray, reason: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    np.save(tmp_path / "y.npy", np.zeros((8, 8), np.uint8))
    (skipped,) = load(f"folder:{tmp_path}").skipped
    assert skipped.startswith("x.npy (") and reason in skipped


def test_hostile_arrays_allocate_and_run_nothing(tmp_path: Path) -> None:
    for name, shape in (("huge", (1 << 20, 1 << 20)), ("short", (100, 100)), ("under", (8, -8))):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        (tmp_path / f"{name}.npy").write_bytes(file.getvalue() + b"abc")
    np.save(tmp_path / "pickle.npy", np.array([[{}]], object), allow_pickle=True)
    np.save(tmp_path / "y.npy", np.zeros((8, 8), np.uint8))
    skipped = load(f"folder:{tmp_path}").skipped
    for line, why in zip(skipped, ("megapixels", "no numbers", "breaks off", "the shape"), strict=True):
        assert why in line


@pytest.mark.parametrize("group", [None, r"g\d+_"])
def test_images_held_out_for_testing_have_no_say_in_the_range(group: str | None, tmp_path: Path) -> None:
    """Bright images, of which only those stay that are held out, by their content or by their group."""
    root, reading = folder(tmp_path / "images", "npy", n=40), Reading(group=group)
    bright = [root / ("right", "left")[k % 2] / f"g{k // 2}_{k % 2}.npy" for k in range(80)]
    for k, file in enumerate(bright):
        write(file, np.full((*SIZE, 1), 60_000, np.uint16) + scene(k))
    test = load(f"folder:{root}", reading=reading).test
    assert test is not None and test.keys is not None
    held = set(test.keys.tolist())
    kept = [file for file in bright if int.from_bytes(content_key(file), "little", signed=True) in held]
    assert 0 < len(kept) < 30
    for file in {*bright} - {*kept}:
        file.unlink()
    value_range = load(f"folder:{root}", reading=reading).reading.value_range
    assert value_range is not None and value_range[0][1] <= 4095


def test_a_test_folder_has_no_say_in_the_range(tmp_path: Path) -> None:
    for seed in range(8):
        write(tmp_path / "train" / ("right", "left")[seed % 2] / f"{seed}.npy", scene(seed))
        write(tmp_path / "test" / ("right", "left")[seed % 2] / "x.npy", scene(seed) + np.uint16(50_000))
    value_range = load(f"folder:{tmp_path}").reading.value_range
    assert value_range is not None and value_range[0][1] <= 4095


def test_channels_of_many_have_a_range_each(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for seed in range(12):
        numbers = scene(seed, 4).astype(np.float32) * [1, 10, 0.001, -1]
        write(root / ("right", "left")[seed % 2] / f"{seed}.npy", numbers.astype(np.float32))
    data = load(f"folder:{root}")
    assert data.reading.value_range is not None and len(data.reading.value_range) == 4
    means = data.train.images.float().mean(dim=(0, 2, 3))
    assert data.train.images.shape[1] == 4 and ((means - 127).abs() < 15).all()


def test_images_of_other_channels_are_skipped_and_named(tmp_path: Path) -> None:
    for seed in range(4):
        write(tmp_path / f"{seed}.npy", scene(seed, 5))
    write(tmp_path / "9.npy", scene(9, 4))
    Image.new("RGB", (24, 16)).save(tmp_path / "colour.png")
    data = load(f"folder:{tmp_path}")
    assert data.train.images.shape[:2] == (4, 5)
    assert [line.partition(" ")[0] for line in data.skipped] == ["9.npy", "colour.png"]
    assert "4 channels and not 5" in data.skipped[0] and "in colour" in data.skipped[1]


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
def test_how_an_image_comes_to_its_size(resize: str, tmp_path: Path) -> None:
    pixels = np.full((10, 40), 50, np.uint8)
    pixels[:, 15:25] = 200  # the middle square
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    found = decode(tmp_path / "wide.png", (20, 20), 1, Reading(resize))[0]  # type: ignore[arg-type]
    if resize == "crop":
        assert (found[:, 4:16] > 190).all()
    if resize == "pad":
        assert not found[:7].any() and not found[13:].any() and (found[10, [1, 18]] == 50).all() and found[10, 10] > 190
    if resize == "squash":
        assert found.shape == (20, 20) and found[:, 10].min() > 190 and (found[:, :6] == 50).all()
    bands = np.stack([pixels, pixels, pixels, pixels], axis=2)
    np.save(tmp_path / "wide.npy", bands)
    assert np.array_equal(decode(tmp_path / "wide.npy", (20, 20), 4, Reading(resize))[2], found)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- what a model does with it


@pytest.fixture(scope="module", params=[1, 4], ids=["grey", "four channels"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A folder of 12-bit images, the run folder of a classifier, and the number of channels."""
    place, channels = tmp_path_factory.mktemp("deep"), request.param
    root = folder(place / "images", "npy", channels, n=60)
    config = replace(
        recipes.finetune_smoke(), data=f"folder:{root}", img_size=SIZE, patch_size=8, limit=None, epochs=8,
        batch_size=8, val_fraction=0.2, resize="pad", blr=0.02, affine_degrees=0, affine_translate=0,
    )  # fmt: skip
    run, _ = finetune(config, options=RunOptions(out=place / "run"))
    return root, run, channels


def test_a_model_keeps_the_range_and_asks_no_image_for_it(trained: tuple[Path, Path, int], tmp_path: Path) -> None:
    root, run, channels = trained
    _, spec = load_model(run)
    data = load(f"folder:{root}", img_size=SIZE, reading=Reading("pad"))
    assert spec.reading == data.reading and spec.reading.value_range is not None
    assert evaluate(run)["accuracy"] == 1
    files = sorted(root.rglob("*.npy"))
    model, _ = load_model(run)
    assert isinstance(model, VisionTransformer)
    features(run, files[:4], out=tmp_path / "x.npz")
    read = ImageSet(read_all(files[:4], SIZE, channels, spec.reading), None)
    with np.load(tmp_path / "x.npz") as kept:
        assert np.allclose(kept["features"], extract_features(model, read).numpy(), atol=1e-4)
    found = [*predict(run, files)]
    assert [entry["label"] for entry in found] == [Path(entry["path"]).parent.name for entry in found]
    dark, bright = (write(tmp_path / f"{k}.npy", np.full((*SIZE, channels), k, np.uint16)) for k in (1000, 3000))
    one, other = read_all([dark, bright], SIZE, channels, spec.reading).float().mean(dim=(1, 2, 3)).tolist()
    assert (one, other) == (pytest.approx(62, abs=4), pytest.approx(187, abs=4))  # alone, each would be stretched alike


def test_another_run_of_the_same_folder_repeats_it(trained: tuple[Path, Path, int], tmp_path: Path) -> None:
    root = trained[0]
    config = replace(
        recipes.pretrain_smoke(), data=f"folder:{root}", img_size=SIZE, patch_size=8, limit=None, epochs=1,
        batch_size=8, val_fraction=0.2,
    )  # fmt: skip
    before, result = pretrain(config, options=RunOptions(out=tmp_path / "before"))
    assert result["val"]["masked_mse"] > 0 and load_model(before)[1].reading.value_range is not None
    picture = tmp_path / "x.png"
    reconstruct(before, out=picture)
    with Image.open(picture) as image:
        assert np.asarray(image.convert("RGB")).std() > 20


def test_images_of_8_bits_and_a_model_of_them_refuse_what_nothing_gives_a_range(tmp_path: Path) -> None:
    root = tmp_path / "bytes"
    for seed in range(20):
        write(root / ("right", "left")[seed % 2] / f"{seed}.npy", (scene(seed) >> 4).astype(np.uint8))
    config = replace(recipes.finetune_smoke(), data=f"folder:{root}", img_size=SIZE, patch_size=8, limit=None, epochs=1,
                     batch_size=8, val_fraction=0.2)  # fmt: skip
    run, _ = finetune(config, options=RunOptions(out=tmp_path / "run"))
    assert load_model(run)[1].reading == AS_IT_IS
    deep = folder(tmp_path / "deep", "npy")
    (entry,) = predict(run, [deep / "left" / "1.npy"])
    assert "8 bits" in entry["error"]
    with pytest.raises(UsageError, match="of more than 8 bits"):
        evaluate(run, data=f"folder:{deep}")


def test_the_example_server_prepares_images_as_the_model_does(trained: tuple[Path, Path, int], tmp_path: Path) -> None:
    root, run, _ = trained
    export(run, out=tmp_path / "x.onnx")
    files = sorted(root.rglob("*.npy"))[::7]
    server = Path(__file__).parents[1] / "examples" / "serve_onnx.py"
    done = subprocess.run([sys.executable, server, tmp_path / "x.onnx", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    ours = [*predict(run, files)]
    assert [row[1] for row in rows] == [entry["label"] for entry in ours]
    assert [float(row[2]) for row in rows] == pytest.approx([entry["probability"] for entry in ours], abs=0.02)


@pytest.mark.parametrize(
    "value",
    [[], "x", [[1]], [[2, 1]], [[1, 1]], [[0, float("inf")]], [[0, True]], [[0, 1]] * 70_000, {"a": 1}],
    ids=str,
)
def test_a_checkpoint_with_a_wrong_range_is_refused(
    value: object, trained: tuple[Path, Path, int], tmp_path: Path
) -> None:

    export(trained[1], format="safetensors", out=tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    about = json.loads(file.read_text())
    about["reading"]["value_range"] = value
    file.write_text(json.dumps(about))
    with pytest.raises(RunError, match="damaged"):
        load_model(tmp_path / "model")
