"""The page that runs in the browser alone: its files, its models beside torch's, and what a person does with it."""

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Maelab

from maelab import page as pages
from maelab.config import Reading
from maelab.data import sources
from maelab.data.batches import scale
from maelab.data.decode import decode_upload, to_size
from maelab.errors import RunError, UsageError
from maelab.export import to_onnx
from maelab.inference import (
    attention_maps,
    attention_rollout,
    attention_to_patches,
    reconstruct_images,
    visible_mean_mse,
)
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.training.checkpoint import ModelSpec, load_model, save_model

SHAPE: dict[str, Any] = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": (28, 28)}
DECODER = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
HOSTILE = ("</script><script>document.title='taken'</script>", "<img src=x onerror=alert(1)>", "\u202egnp", "plain")


def checkpoint(folder: Path, kind: str, reading: Reading | None = None, **changes: Any) -> str:
    """Weights that say different things of different images."""
    torch.manual_seed(0)
    names = changes.pop("names", ())
    arguments = SHAPE | {"in_chans": 1} | (DECODER if kind == "MaskedAutoencoderViT" else {}) | changes
    data = "mnist" if arguments["in_chans"] == 1 else "folder:~/nowhere"
    spec = ModelSpec(kind, arguments, data, names, None if names else 0.75, reading=reading or Reading())
    model = spec.build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    save_model(folder, spec, model.state_dict())
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    """Digits: an autoencoder, a classifier with patches of another size. Photographs: one of each, cut to size."""
    folder, wide = tmp_path_factory.mktemp("models"), {"in_chans": 3, "img_size": (24, 32), "patch_size": 8}
    digits = tuple("0123456789")
    return [
        checkpoint(folder / "mae", "MaskedAutoencoderViT", class_token=False),
        checkpoint(folder / "digits", "VisionTransformer", names=digits, num_classes=10, patch_size=4),
        checkpoint(folder / "photos-mae", "MaskedAutoencoderViT", **wide, norm_pix_loss=True),
        checkpoint(
            folder / "photos", "VisionTransformer", Reading(resize="pad"), **wide, names=HOSTILE, num_classes=4
        ),
    ]  # fmt: skip


def as_on_the_page(run: str) -> tuple[VisionTransformer, ModelSpec]:
    """A run's model, its matrices rounded as the page's are."""
    model, spec = load_model(run)
    assert isinstance(model, VisionTransformer)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and name.endswith("weight") and not name.startswith("head"):
                whole, step = pages.round_columns(weight.flatten(1).T.numpy())
                weight.copy_(torch.from_numpy((whole * step).T.copy()).view_as(weight))
    return model.eval(), spec


# -------------------------------------------------------------------------------------------------------- without one


def test_the_letters_of_a_script_carry_every_byte():
    for size in (0, 1, 14, 15, 16, 1000):
        content = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
        text = pages.script("x", content).decode("utf-16")
        length, letters = json.loads(text.split(" = ")[1].rstrip(";\n"))
        bits = "".join(format(ord(letter) - 0x1000, "015b") for letter in letters)
        assert length == size and bytes(int(bits[8 * i : 8 * i + 8], 2) for i in range(size)) == content
        assert all(0x1000 <= ord(letter) < 0x9000 for letter in letters)


def test_columns_are_rounded_to_a_sixty_third_of_their_largest_number():
    matrix = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32) * 10.0 ** np.arange(-3, 4)
    matrix = np.concatenate([matrix, np.zeros((50, 1), np.float32)], axis=1)
    whole, step = pages.round_columns(matrix)
    assert whole.dtype == np.int8 and np.abs(whole).max(axis=0).tolist() == [63] * 7 + [0]
    assert (np.abs(whole * step - matrix) <= step / 2 * 1.0001).all()


@pytest.mark.slow
def test_stored_in_seven_bits_a_model_computes_what_the_rounded_model_computes(runs):
    import onnxruntime

    for run, part in ((runs[2], "autoencoder"), (runs[1], "attention")):
        exact, spec = load_model(run)
        assert isinstance(exact, VisionTransformer)
        whole = to_onnx(exact, spec, part)[0]
        content, change = pages.rounded(whole)
        assert len(content) < 0.75 * len(whole) and 0.003 < change < 0.03
        model, _ = as_on_the_page(run)
        images = torch.rand(3, model.in_chans, *model.img_size) * 2 - 1
        feed = {"images": images.numpy()}
        with torch.no_grad():
            if isinstance(model, MaskedAutoencoderViT):
                order = torch.rand(3, model.num_patches).argsort(dim=1)
                feed |= {"ids_keep": order[:, :4].numpy(), "ids_restore": order.argsort(dim=1).numpy()}
                latent = model.encode(model.to_patches(images), order[:, :4])
                expected = [model.forward_decoder(latent, order.argsort(dim=1))]
            else:
                rolled = attention_rollout(attention_maps(model, images))
                expected = [model(images), attention_to_patches(model, rolled)]
        for ours, theirs in zip(expected, onnxruntime.InferenceSession(content).run(None, feed), strict=True):
            np.testing.assert_allclose(np.asarray(theirs), ours.numpy(), atol=2e-5)


def test_what_a_page_cannot_show_is_said_in_one_line(runs, tmp_path, maelab: Maelab):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty"):
        pages.page(runs, out=tmp_path / "full")
    bands = checkpoint(tmp_path / "bands", "VisionTransformer", in_chans=5, num_classes=2, names=("a", "b"))
    with pytest.raises(UsageError, match="takes images of 5 channels"):
        pages.page([bands], out=tmp_path / "out")
    with pytest.raises(UsageError, match=r"--images .*nothing.*: No such file"):
        pages.page(runs, out=tmp_path / "out", images=[str(tmp_path / "nothing")])
    assert "no run folder or checkpoint" in maelab.run("page", "nowhere", cwd=tmp_path).error()
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_a_runtime_of_other_bytes_is_never_used(tmp_path, monkeypatch):
    monkeypatch.setenv("MAELAB_DATA", str(tmp_path))
    (tmp_path / "npm").mkdir()
    (tmp_path / "npm" / "a-1.0.tgz").write_bytes(b"other")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RunError, match=r"could not get a@1\.0: npm is not installed; put a-1\.0\.tgz, .* into"):
        sources.obtain_package("a@1.0", "0" * 64)
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "npm").write_text(f"#!{sys.executable}\nopen('a-1.0.tgz', 'w').write('evil')\n")
    (bin / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(bin))
    with pytest.raises(RunError, match="its bytes are others than those that maelab knows"):
        sources.obtain_package("a@1.0", "0" * 64)
    assert (tmp_path / "npm" / "a-1.0.tgz").read_bytes() == b"other" and len(list((tmp_path / "npm").iterdir())) == 1


def test_no_image_of_a_folder_enters_a_page_unasked_and_none_with_what_its_file_says(runs, digits_folder, tmp_path):
    model, spec = load_model(runs[2])
    assert isinstance(model, VisionTransformer)
    spec = ModelSpec(spec.model, spec.arguments, f"folder:{digits_folder}")
    assert pages.examples(model, spec, [], None) == []
    assert len(pages.examples(model, spec, [str(digits_folder)], None)) == 20
    exif = Image.Exif()
    exif[0x010E] = "where it was taken"
    Image.effect_noise((300, 200), 80).convert("RGB").save(tmp_path / "a.jpg", exif=exif)
    (image,) = pages.examples(model, spec, [str(tmp_path / "a.jpg")], None)
    assert image.size == (300, 200)
    assert b"where" not in np.frombuffer(_content(pages._picture(image, model)), np.uint8).tobytes()


def _content(address: str) -> bytes:
    from base64 import b64decode

    return b64decode(address.partition("base64,")[2])


# ---------------------------------------------------------------------------------------------------- in the browser


@dataclass
class Open:
    """A page in a browser."""

    tab: Any
    elsewhere: list[str]  # addresses that it asked for and that are no files of its own
    problems: list[str]

    def after(self, act: Any) -> None:
        """Do something and wait until the page has shown what came of it."""
        before = self.tab.evaluate("Number(document.body.dataset.ready) || 0")
        act()
        self.tab.wait_for_function(f"document.body.dataset.ready > {before}")

    def says(self, name: str) -> dict[str, Any]:
        """The numbers behind a model's card: arrays as lists."""
        return self.tab.evaluate(
            """name => Object.fromEntries(Object.entries(maelab.says[name]).map(([key, value]) =>
            [key, ArrayBuffer.isView(value) ? Array.from(value) : value]))""", name,
        )  # fmt: skip

    def image(self) -> Image.Image:
        data = self.tab.evaluate("[maelab.image.width, maelab.image.height, Array.from(maelab.image.data)]")
        return Image.fromarray(np.array(data[2], np.uint8).reshape(data[1], data[0], 4)[:, :, :3])


@pytest.fixture(scope="module")
def opened(runs, runtime, browser, tmp_path_factory) -> Iterator[Open]:
    folder = tmp_path_factory.mktemp("page") / "out"
    pages.page(runs, out=folder)
    tab = browser.new_page(viewport={"width": 1280, "height": 1000}, has_touch=True)
    tab.set_default_timeout(150_000)
    own, elsewhere, problems = (folder.as_uri(), "data:", "blob:"), [], []
    tab.on("request", lambda asked: None if asked.url.startswith(own) else elsewhere.append(asked.url))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    tab.goto((folder / "index.html").as_uri())
    tab.wait_for_function("document.body.dataset.ready > 0")
    yield Open(tab, elsewhere, problems)
    assert elsewhere == [] and problems == []


def pixels(image: Image.Image, model: VisionTransformer, spec: ModelSpec) -> torch.Tensor:
    """An image as maelab prepares it: (1, C, H, W) in [-1, 1]."""
    image = to_size(image.convert("L" if model.in_chans == 1 else "RGB"), model.img_size, spec.reading.resize)
    x = torch.from_numpy(np.array(image)).reshape(*model.img_size, model.in_chans)
    return scale(x.permute(2, 0, 1)[None])


def check_rebuilding(opened: Open, run: str, atol: float = 1e-4) -> None:
    model, spec = as_on_the_page(run)
    assert isinstance(model, MaskedAutoencoderViT)
    x, mask = pixels(opened.image(), model, spec), torch.tensor([opened.tab.evaluate("maelab.hidden")]).float()
    said = opened.says(Path(run).name)
    with torch.no_grad():
        _, pred, _ = model(x, mask=mask)
    np.testing.assert_allclose(np.array(said["pred"]).reshape(pred.shape), pred.numpy(), atol=atol)
    _, rebuilt, error = reconstruct_images(model, x, mask)
    assert said["error"] == pytest.approx(error, rel=1e-3)
    assert said["guess"] == pytest.approx(visible_mean_mse(model, x, mask), rel=1e-3)
    shown = np.array(said["rebuilt"]).reshape(*model.img_size, model.in_chans)
    np.testing.assert_allclose(shown, rebuilt[0].permute(1, 2, 0).numpy(), atol=atol)


def check_classifying(opened: Open, run: str, atol: float = 1e-4) -> None:
    model, spec = as_on_the_page(run)
    x, said = pixels(opened.image(), model, spec), opened.says(Path(run).name)
    with torch.no_grad():
        probabilities = model(x).softmax(dim=1)[0]
        looks = attention_to_patches(model, attention_rollout(attention_maps(model, x)))
    np.testing.assert_allclose(said["probabilities"], probabilities.numpy(), atol=atol)
    np.testing.assert_allclose(said["attention"], looks.flatten().numpy(), atol=atol)


@pytest.mark.browser
def test_masks_and_digits_as_in_torch_and_by_keyboard(opened, runs):
    tab = opened.tab
    opened.after(lambda: tab.click("#groups button:nth-child(1)"))
    assert tab.evaluate("maelab.hidden.reduce((a, b) => a + b)") == 12  # of 16, the share of training
    check_rebuilding(opened, runs[0])
    check_classifying(opened, runs[1])
    opened.after(lambda: tab.click("#thumbs button:nth-child(8)"))
    opened.after(lambda: tab.click("#block"))
    check_rebuilding(opened, runs[0])
    check_classifying(opened, runs[1])
    hidden = tab.evaluate("maelab.hidden")
    tab.focus("#cells button:nth-child(1)")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")  # the sixth patch
    opened.after(lambda: tab.keyboard.press("Space"))
    hidden[5] = 1 - hidden[5]
    assert tab.evaluate("maelab.hidden") == hidden and "of 16 patches hidden" in tab.inner_text("#count")
    assert tab.get_attribute("#cells button:nth-child(6)", "aria-pressed") == str(bool(hidden[5])).lower()
    opened.after(lambda: tab.click("#cells button:nth-child(6)"))
    assert tab.evaluate("maelab.hidden")[5] == 1 - hidden[5]
    check_rebuilding(opened, runs[0])
    opened.after(lambda: tab.click("#none"))
    assert tab.inner_text("#results article:nth-child(1) .said") == "Hide a patch."


@pytest.mark.browser
def test_a_drawing_becomes_a_digit_as_those_of_mnist(opened, runs):
    tab = opened.tab
    opened.after(lambda: tab.click("#groups button:nth-child(1)"))
    box = tab.locator("#ink").bounding_box()
    assert box
    tab.locator("#ink").scroll_into_view_if_needed()
    box = tab.locator("#ink").bounding_box()

    def draw() -> None:
        tab.mouse.move(box["x"] + 20, box["y"] + 20)
        tab.mouse.down()
        tab.mouse.move(box["x"] + 20, box["y"] + 120, steps=5)
        tab.mouse.move(box["x"] + 90, box["y"] + 120, steps=5)
        tab.mouse.up()

    opened.after(draw)
    tab.wait_for_timeout(500)
    digit = np.asarray(opened.image().convert("L")).astype(float)
    rows, columns = (np.flatnonzero((digit > 60).any(axis=axis)) for axis in (1, 0))
    assert len(rows) == 20 and 12 <= len(columns) <= 16  # an L, its shape kept, within 20 by 20
    for axis in (0, 1):
        assert abs(digit.sum(axis=1 - axis) @ (np.arange(28) + 0.5) / digit.sum() - 14.5) <= 0.5
    check_classifying(opened, runs[1])
    tab.click("#clear")
    board = "document.querySelector('#ink').getContext('2d').getImageData(0, 0, 280, 280).data"
    assert not tab.evaluate(f"{board}.some((value) => value)")


@pytest.mark.browser
@pytest.mark.parametrize("size", [(61, 40), (20, 75), (24, 32), pytest.param((300, 301), marks=pytest.mark.slow)])
def test_a_photograph_of_any_shape_is_prepared_as_by_maelab(opened, runs, size, tmp_path):
    tab = opened.tab
    opened.after(lambda: tab.click("#groups button:nth-child(2)"))
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 3 + 1, size[0] // 3 + 1, 4), np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR).save(tmp_path / "a.png")  # RGBA
    opened.after(lambda: tab.set_input_files("#file", tmp_path / "a.png"))
    ours = np.asarray(decode_upload((tmp_path / "a.png").read_bytes(), None)).astype(int)
    assert np.abs(np.asarray(opened.image()).astype(int) - ours).max() <= 2  # transparency on white
    check_rebuilding(opened, runs[2], 8e-3)  # a byte may be rounded the other way: a 128th of the range
    check_classifying(opened, runs[3], 2e-3)


@pytest.mark.browser
def test_names_are_words_and_what_is_no_image_is_said(opened, tmp_path):
    tab = opened.tab
    opened.after(lambda: tab.click("#groups button:nth-child(2)"))
    said = tab.inner_text("#results")
    assert (
        HOSTILE[0] in said
        and "\\u202egnp" in said
        and "\u202e" not in said
        and tab.title() == "A masked autoencoder in your browser"
    )
    (tmp_path / "<b>.png").write_bytes(b"no image")
    tab.set_input_files("#file", tmp_path / "<b>.png")
    tab.wait_for_selector("#problem:not([hidden])")
    assert "cannot read <b>.png as an image" in tab.inner_text("#problem")
    opened.after(lambda: tab.click("#groups button:nth-child(1)"))
    assert tab.is_hidden("#problem")


@pytest.mark.browser
def test_it_fits_a_telephone_and_touch_hides_patches(opened):
    tab = opened.tab
    tab.set_viewport_size({"width": 390, "height": 844})
    opened.after(lambda: tab.click("#groups button:nth-child(1)"))
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    before = tab.evaluate("maelab.hidden")
    opened.after(lambda: tab.tap("#cells button:nth-child(4)"))
    assert tab.evaluate("maelab.hidden") == [*before[:3], 1 - before[3], *before[4:]]
    tab.set_viewport_size({"width": 1280, "height": 1000})


@pytest.mark.slow
def test_the_demo_is_a_page_that_vanishes(maelab: Maelab, tmp_path, runs, runtime):
    started = maelab.start("demo", runs[0], cwd=tmp_path, temp=str(tmp_path))
    started.wait_for(started.out)
    page = Path(url2pathname(started.out.read_text().split()[0].removeprefix("file://")))
    assert page.name == "index.html" and (page.parent / "model-0.js").exists()
    started.signal(signal.SIGINT)
    ended = started.wait()
    assert ended.status == 0 and "Traceback" not in ended.err and not page.parent.exists()


@pytest.mark.slow
def test_the_shipped_page_is_under_12_megabytes(tmp_path, runtime):
    result = pages.page(out=tmp_path / "page")
    files = list((tmp_path / "page").iterdir())
    assert sum(file.stat().st_size for file in files) == result["bytes"] < 12e6
    assert {model["name"] for model in result["models"]} == {"mnist-mae", "mnist-classifier", "cifar10-mae"}
