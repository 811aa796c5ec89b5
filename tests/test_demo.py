"""The demo: its functions by themselves, and its page in a real browser."""

import io
import os
import re
import shutil
import signal
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Maelab

from maelab.config import RunOptions
from maelab.data.batches import scale
from maelab.demo import demo, logic
from maelab.errors import UsageError
from maelab.inference import reconstruct_images
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.training.checkpoint import ModelSpec, save_model

SHAPE: dict[str, Any] = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """An autoencoder and a classifier of digits, untrained, which say different things of different images."""
    folder = tmp_path_factory.mktemp("models")
    decoder = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    grey = {"img_size": (28, 28), "in_chans": 1}
    mae = ModelSpec("MaskedAutoencoderViT", SHAPE | grey | decoder, "mnist", mask_ratio=0.75)
    classifier = ModelSpec("VisionTransformer", SHAPE | grey, "mnist", logic.DIGITS)
    torch.manual_seed(0)
    for name, spec in (("mae", mae), ("classifier", classifier)):
        model = spec.build()
        if isinstance(model, VisionTransformer) and name == "classifier":
            torch.nn.init.normal_(model.head.weight, std=0.3)  # type: ignore[arg-type]
        save_model(folder / name, spec, model.state_dict())
    return folder / "mae", folder / "classifier"


@pytest.fixture(scope="module")
def models(runs) -> list[logic.Loaded]:
    return logic.load_models([str(run) for run in runs], RunOptions(device="cpu"))


@pytest.fixture(scope="module")
def digit(mnist_small) -> Image.Image:
    return Image.fromarray(mnist_small.test.images[0, 0].numpy())


# ----------------------------------------------------------------------------------------------------------- drawings


@pytest.mark.parametrize(("zoom", "top", "left"), [(4, 10, 20), (3, 50, 0), (2, 80, 84)])
def test_a_digit_drawn_anywhere_at_any_size_becomes_that_of_mnist(mnist_small, zoom, top, left):
    board = np.zeros((140, 140), np.uint8)
    apart = []
    for original in mnist_small.test.images[:40, 0].numpy():
        board[:] = 0
        board[top : top + 28 * zoom, left : left + 28 * zoom] = original.repeat(zoom, 0).repeat(zoom, 1)
        digit = logic.centre_drawing(board)
        assert digit is not None and digit.shape == (28, 28) and digit.dtype == np.uint8
        apart.append(np.corrcoef(digit.flat, original.flat)[0, 1])
    assert np.mean(apart) > 0.98 and min(apart) > 0.95


def test_a_drawing_keeps_its_shape_in_20_by_20_around_its_centre_of_mass():
    board = np.zeros((140, 140), np.uint8)
    board[5:105, 30:50] = 255  # 100 x 20
    board[85:105, 30:110] = 255  # an L: its mass lies low and left of the middle
    digit = logic.centre_drawing(board)
    assert digit is not None
    rows, columns = (np.flatnonzero((digit > 60).any(axis=axis)) for axis in (1, 0))
    assert (len(rows), len(columns)) == (20, 16)  # 100 x 80
    mass = digit.astype(float)
    for axis in (0, 1):
        centre = mass.sum(axis=1 - axis) @ (np.arange(28) + 0.5) / mass.sum()
        assert abs(centre - 14.5) <= 0.5


def test_a_long_stroke_and_a_point_stay_within_and_nothing_is_none():
    board = np.zeros((140, 140), np.uint8)
    assert logic.centre_drawing(board) is None
    board[70, :] = 255
    line = logic.centre_drawing(board)
    assert line is not None and (line > 100).any(axis=0).sum() == 20 and (line > 0).any(axis=1).sum() == 1
    board[:] = 0
    board[3, 137] = 255
    assert logic.centre_drawing(board) is not None


# --------------------------------------------------------------------------------------------------- images and masks


def test_uploads_become_small_upright_rgb_or_one_clear_line():
    def sent(image: Image.Image, kind: str, **more: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **more)
        return file.getvalue()

    image = logic.read_upload(sent(Image.new("RGBA", (1024, 256), (255, 0, 0, 128)), "PNG"), None)
    assert (image.mode, image.size) == ("RGB", (512, 128))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    assert logic.read_upload(sent(Image.new("RGB", (40, 20)), "JPEG", exif=exif), None).size == (20, 40)
    whole = sent(Image.effect_noise((64, 64), 90), "PNG")
    for content, why in (
        (b"", "empty"),
        (b"GIF89a not", "no PNG, JPEG, WEBP, BMP, GIF, TIFF, AVIF, HEIF image"),
        (whole[: len(whole) // 2], "cannot read the image"),
        (sent(Image.new("1", (20_000, 10_000)), "PNG"), "more than 89 megapixels"),
    ):
        with pytest.raises(UsageError, match=why) as caught:
            logic.read_upload(content, None)
        assert "\n" not in str(caught.value)


def test_examples_come_from_named_files_or_the_package_or_the_disk_and_from_no_network(models, digits_folder, tmp_path):
    shipped = logic.example_images(models[0], [], None)
    assert len(shipped) == 20 and {image.size for image in shipped} == {(28, 28)}
    assert len(logic.example_images(models[0], [str(digits_folder)], None)) == 20
    with pytest.raises(UsageError, match=r"--images .*nothing.*: No such file"):
        logic.example_images(models[0], [str(tmp_path / "nothing")], None)
    (tmp_path / "bad.png").write_bytes(b"bad")
    with pytest.raises(UsageError, match=r"--images .*bad\.png: cannot read"):
        logic.example_images(models[0], [str(tmp_path / "bad.png")], None)

    def of(data: str) -> logic.Loaded:
        return logic.Loaded("m", models[0].model, ModelSpec("VisionTransformer", dict(models[0].spec.arguments), data))

    assert logic.example_images(of("fashion-mnist"), [], tmp_path) == []
    assert len(logic.example_images(of(f"folder:{digits_folder}"), [], None)) == 20
    assert logic.example_images(of("folder:/nowhere"), [], None) == []


def test_a_model_gets_its_own_size_and_channels(models, cifar_small):
    colours = Image.fromarray(cifar_small.test.images[0].permute(1, 2, 0).numpy())
    fitted = logic.fit(models[0], colours)
    assert fitted.shape == (1, 1, 28, 28) and fitted.dtype == torch.uint8
    wide = VisionTransformer(img_size=(16, 32), patch_size=8, embed_dim=8, depth=1, num_heads=1)
    assert logic.fit(replace(models[0], model=wide), colours).shape == (1, 3, 16, 32)
    exact = logic.fit(models[0], Image.fromarray(np.arange(784, dtype=np.uint8).reshape(28, 28)))
    assert exact.flatten().tolist() == [i % 256 for i in range(784)]


def test_masks_grow_with_the_ratio_and_never_hide_all_or_nothing():
    for kind in ("random", "block", "grid"):
        masks = [logic.choose_mask(kind, (4, 4), ratio, seed=3) for ratio in (0, 0.25, 0.5, 0.75, 1)]
        counts = [int(mask.sum()) for mask in masks]
        assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] <= 15
        assert all(bool((a <= b).all()) for a, b in pairwise(masks))


def test_masks_move_between_grids_and_only_good_ones_are_taken():
    mask = logic.parse_mask("1100110000000000", 16)
    assert mask.tolist() == [[1, 1, 0, 0, 1, 1] + [0] * 10]
    assert logic.move_mask(mask, (4, 4), (2, 2)).tolist() == [[1, 0, 0, 0]]
    assert logic.move_mask(mask, (4, 4), (4, 4)).equal(mask)
    assert logic.move_mask(logic.move_mask(mask, (4, 4), (8, 8)), (8, 8), (4, 4)).equal(mask)
    for bad in ("110", "2" * 16, None, ["1"] * 16, "1" * 17):
        with pytest.raises(UsageError, match="reload the page"):
            logic.parse_mask(bad, 16)


# -------------------------------------------------------------------------------------------------------- the models


def test_rebuilding_agrees_with_the_command_and_says_what_it_cannot(models, digit):
    mae = models[0]
    mask = logic.choose_mask("random", (4, 4), 0.5, 0)
    rebuilt = logic.rebuild(mae, digit, mask)
    x = scale(logic.fit(mae, digit))
    assert isinstance(mae.model, MaskedAutoencoderViT)
    _, expected, error = reconstruct_images(mae.model, x, mask)
    assert rebuilt.masked_mse == error and rebuilt.picture.equal(expected[0])
    assert rebuilt.error.shape == (28, 28) and rebuilt.error.dtype == np.uint8
    hidden = mask.view(4, 4).repeat_interleave(7, 0).repeat_interleave(7, 1).numpy()
    assert rebuilt.error[hidden == 0].max() == 0 < rebuilt.error[hidden == 1].max()
    for cells, why in ((torch.ones(1, 16), "every patch is hidden"), (torch.zeros(1, 16), "no patch is hidden")):
        with pytest.raises(UsageError, match=why):
            logic.rebuild(mae, digit, cells)


def test_guesses_are_probabilities_of_what_can_be_seen(models, digit):
    shares = logic.guess(models[1], digit)
    assert [name for name, _ in shares] == list("0123456789") and abs(sum(p for _, p in shares) - 1) < 1e-5
    assert logic.guess(models[1], digit, torch.zeros(1, 16)) == shares
    assert logic.guess(models[1], digit, torch.ones(1, 16)) != shares
    likeliest = logic.guess(models[1], digit, top=3)
    assert likeliest == sorted(shares, key=lambda pair: -pair[1])[:3]


def test_attention_is_a_picture_of_the_image_for_both_kinds(models, digit):
    pictures = [logic.look(chosen, digit, of) for chosen in models for of in ("last", "rollout")]
    assert all(picture.shape == (3, 28, 28) and np.abs(picture).max() <= 1 for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_two_runs_of_one_name_are_told_apart(runs):
    names = [chosen.name for chosen in logic.load_models([str(runs[0])] * 2, RunOptions(device="cpu"))]
    assert names == ["mae", str(runs[0])]


# -------------------------------------------------------------------------------------------------------- the command


def test_a_missing_gradio_is_one_line_that_names_the_extra(monkeypatch, runs):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UsageError, match=r"needs Gradio: .*pip install 'maelab\[demo\]'"):
        next(demo([str(runs[0])]))


@pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
def test_what_cannot_be_served_is_said_in_one_line(maelab, runs, tmp_path):
    assert "no run folder or checkpoint" in maelab.run("demo", "nowhere", cwd=tmp_path).error()
    assert "--port must lie between" in maelab.run("demo", runs[0], "--port", 70000, cwd=tmp_path).error()
    assert "cannot listen on" in maelab.run("demo", runs[0], "--host", "192.0.2.1", cwd=tmp_path).error()


# ----------------------------------------------------------------------------------------------------------- the page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_missing = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ["Chromium"] * (CHROMIUM is None)
in_browser = pytest.mark.skipif(bool(_missing), reason=f"{', '.join(_missing)} not installed")


@dataclass
class Open:
    """The page, open in a browser."""

    url: str
    page: Any
    elsewhere: list[str]  # addresses that it asked for on other hosts
    problems: list[str]  # that its scripts had, and addresses of its own host that it was refused
    temp: Path  # where the server may write

    def shown(self, place: str) -> str:
        """Words, pictures and pressed patches of a place."""
        return self.page.evaluate(SHOWN, place)

    def until_other(self, place: str, before: str) -> str:
        """Wait until a place shows something else than before, and for what it shows."""
        self.page.wait_for_function(f"([place, before]) => ({SHOWN})(place) !== before", arg=[place, before])
        return self.shown(place)


SHOWN = """place => {
  const e = document.querySelector(place);
  const cells = [...e.querySelectorAll("[aria-pressed]")].map(c => c.ariaPressed);
  const text = (e.querySelector(".prose") ?? e).innerText;  // without Gradio's clock
  return [text, ...[...e.querySelectorAll("img")].map(i => i.src), ...cells].join("|");
}"""


@pytest.fixture(scope="module")
def opened(maelab: Maelab, runs, tmp_path_factory) -> Iterator[Open]:
    from playwright.sync_api import sync_playwright

    temp = tmp_path_factory.mktemp("temp")
    server = maelab.start("demo", *runs, "--port", 0, cwd=tmp_path_factory.mktemp("demo"), temp=str(temp))
    server.wait_for(server.out)
    url = server.out.read_text().split()[0]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(150_000)
        own = (url, "data:", "blob:")
        elsewhere: list[str] = []
        problems: list[str] = []
        page.on("request", lambda request: None if request.url.startswith(own) else elsewhere.append(request.url))
        page.on("response", lambda response: problems.append(response.url) if response.status >= 400 else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        yield Open(url, page, elsewhere, problems, temp)
        browser.close()
    server.signal(signal.SIGINT)
    ended = server.wait()
    assert ended.status == 0 and "Traceback" not in ended.err, ended
    assert list(temp.iterdir()) == []


def _stroke(opened: Open, *points: tuple[int, int]) -> None:
    box = opened.page.locator("canvas").bounding_box()
    for number, (x, y) in enumerate(points):
        opened.page.mouse.move(box["x"] + x, box["y"] + y, steps=3)
        if number == 0:
            opened.page.mouse.down()
    opened.page.mouse.up()


@pytest.mark.browser
@in_browser
def test_drawing_changes_the_probabilities_and_clearing_takes_them_away(opened):
    opened.page.wait_for_selector("canvas")
    nothing = opened.shown("#shares")
    assert "Draw a digit" in nothing
    _stroke(opened, (80, 60), (240, 60), (150, 260))
    opened.page.wait_for_selector("#shares .bar")
    first = opened.shown("#shares")
    numbers = [float(number) for number in re.findall(r"([\d.]+)%", first)]
    assert len(numbers) == 10 and abs(sum(numbers) - 100) < 1
    _stroke(opened, (60, 200), (280, 200))
    assert opened.until_other("#shares", first) != nothing
    assert opened.page.locator("#seen img").count() == 3
    opened.page.get_by_role("button", name="Clear").click()
    opened.page.wait_for_selector("#shares .bar", state="detached")
    _stroke(opened, (160, 40), (160, 280))
    opened.page.wait_for_selector("#shares .bar")


def _look(opened: Open) -> None:
    opened.page.get_by_role("tab", name="Hide and rebuild").click()
    opened.page.wait_for_selector("#look-patches .cells", state="visible")


@pytest.mark.browser
@in_browser
def test_moving_the_slider_changes_mask_and_pictures(opened):
    _look(opened)
    before = opened.shown("#look-result-0")
    assert "12 of 16 patches hidden" in before
    opened.page.locator("#look-ratio input[type=range]").fill("0.25")
    assert "4 of 16 patches hidden" in opened.until_other("#look-result-0", before)
    assert opened.page.locator("#look-patches [aria-pressed=true]").count() == 4
    before = opened.shown("#look-patches")
    opened.page.get_by_role("button", name="Another mask").first.click()
    opened.until_other("#look-patches", before)
    assert opened.page.locator("#look-patches [aria-pressed=true]").count() == 4


@pytest.mark.browser
@in_browser
def test_a_click_toggles_a_patch(opened):
    _look(opened)
    cell = opened.page.locator("#look-patches .cells button").nth(5)
    was = cell.get_attribute("aria-pressed") == "true"
    count = opened.page.locator("#look-patches [aria-pressed=true]").count()
    for now in (not was, was):
        before = opened.shown("#look-result-0")
        cell.click()
        assert (cell.get_attribute("aria-pressed") == "true") is now
        expected = count + (now - was)
        assert f"{expected} of 16 patches hidden" in opened.until_other("#look-result-0", before)


@pytest.mark.browser
@in_browser
def test_pictures_come_from_examples_the_board_and_files_and_bad_files_say_why(opened, digits_folder, tmp_path):
    _look(opened)
    upload = opened.page.locator("#look-sources input[type=file]")
    (tmp_path / "bad.png").write_bytes(b"no image at all")
    shown = opened.shown("#look-patches")
    upload.set_input_files(tmp_path / "bad.png")
    alert = opened.page.locator("#look-problem [role=alert]")
    alert.wait_for()
    formats = "PNG, JPEG, WEBP, BMP, GIF, TIFF, AVIF, HEIF"
    assert alert.inner_text() == f"bad.png: cannot read the image: it is no {formats} image"
    (tmp_path / "large.png").write_bytes(bytes(11 << 20))
    upload.set_input_files(tmp_path / "large.png")
    opened.page.wait_for_function("() => document.querySelector('#look-problem').innerText.includes('at most 10 MB')")
    assert opened.shown("#look-patches") == shown
    for pick in (
        lambda: upload.set_input_files(next(digits_folder.rglob("*.png"))),
        lambda: opened.page.locator("#look-sources [data-index='7']").click(),
        lambda: opened.page.locator("#look-sources [data-index='-1']").click(),
    ):
        pick()
        shown = opened.until_other("#look-patches", shown)
        opened.page.wait_for_selector("#look-problem [role=alert]", state="detached")


@pytest.mark.browser
@in_browser
def test_two_models_answer_side_by_side(opened):
    opened.page.get_by_role("tab", name="Compare").click()
    opened.page.wait_for_selector("#compare-result-1 .bar", state="visible")
    assert "patches hidden" in opened.shown("#compare-result-0") and "whole image" in opened.shown("#compare-result-1")
    before = opened.shown("#compare-result-0"), opened.shown("#compare-result-1")
    opened.page.locator("#compare-sources [data-index='3']").click()
    for column in (0, 1):
        opened.until_other(f"#compare-result-{column}", before[column])


@pytest.mark.browser
@in_browser
def test_the_page_asks_no_other_host_and_stores_nothing(opened):
    straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with straight.open(opened.url) as response:
        html, policy = response.read().decode(), response.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'") and "http" not in policy
    with straight.open(opened.url + "theme.css") as response:
        css = response.read().decode()
    loading = r"""(?:<(?:script|link|img|iframe)[^>]*(?:src|href)=|url\(|@import )\s*["']?(?:https?:)?//[^"')\s>]*"""
    assert re.findall(loading, html + css) == []
    assert "fonts.googleapis" not in html + css
    assert opened.elsewhere == [] and opened.problems == []
    folders = list(opened.temp.iterdir())
    assert len(folders) >= 1
    assert [file for folder in folders for file in folder.rglob("*") if file.is_file()] == []


def test_names_of_classes_are_no_markup_and_can_be_sent(tmp_path):
    pytest.importorskip("gradio")
    from maelab.demo import page

    names = ("<img src=x onerror=alert(1)>", os.fsdecode(b"caf\xe9"))
    spec = ModelSpec("VisionTransformer", {**SHAPE, "img_size": (28, 28), "in_chans": 1, "num_classes": 2}, "x", names)
    save_model(tmp_path / "<b>\n", spec, spec.build().state_dict())
    (chosen,) = logic.load_models([str(tmp_path / "<b>\n")], RunOptions(device="cpu", threads=1))
    html = page.scene(chosen, Image.new("L", (28, 28)), torch.zeros(1, 16))
    assert html.encode() and names[0] not in html and r"caf\xe9" in html and chosen.name == r"<b>\n"
