"""Figures: whole PNG files, written atomically, with the pixels that were given."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from maelab import figures

RED, GREEN, BLUE, YELLOW, PINK, CYAN = (
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)
)  # fmt: skip


@pytest.fixture(autouse=True)
def what_others_draw_is_left_alone():
    """As in a notebook, whose pictures come from pyplot and a backend of its choice."""
    plt.switch_backend("svg")
    style = dict(matplotlib.rcParams)
    yield
    assert plt.get_backend() == "svg" and not plt.get_fignums() and dict(matplotlib.rcParams) == style


def pixels(file: Path) -> np.ndarray:
    """(H, W, 3) uint8 of a PNG."""
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def area(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a picture has exactly this colour."""
    return (picture == colour).all(axis=2)


def plain(*colours: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> np.ndarray:
    """An image (3, H, W) in [-1, 1] for each colour, stacked."""
    images = [np.broadcast_to(np.array(c)[:, None, None], (3, *size)) for c in colours]
    return np.stack(images).astype(np.float32) / 127.5 - 1


def test_to_picture_clips_and_repeats_grey():
    grey = np.array([[[-3.0, -1.0, 0.0, 1.0, 3.0]]])
    assert figures.to_picture(grey).shape == (1, 5, 3)
    assert figures.to_picture(grey)[0, :, 2].tolist() == [0, 0, 0.5, 1, 1]
    assert figures.to_picture(np.zeros((4, 2, 2))).shape == (2, 2, 3)  # a fourth channel is not shown


def test_reconstructions_show_every_image_in_its_place(tmp_path):
    file = tmp_path / "new" / "folder" / "r.png"
    original, masked, rebuilt = plain(RED, GREEN), plain(BLUE, YELLOW), plain(PINK, CYAN)
    figures.reconstructions(file, [("a title", original, masked, rebuilt)])
    picture = pixels(file)
    centres = {}
    for colour in (RED, GREEN, BLUE, YELLOW, PINK, CYAN):
        where = np.argwhere(area(picture, colour))
        assert len(where) > 3000, colour
        centres[colour] = where.mean(axis=0)
        (top, left), (bottom, right) = where.min(axis=0), where.max(axis=0)
        assert len(where) == (bottom - top + 1) * (right - left + 1)  # whole: nothing lies over it
        assert abs((bottom - top) - (right - left)) <= 2  # and square
    for above, below in ((RED, BLUE), (BLUE, PINK), (GREEN, YELLOW), (YELLOW, CYAN)):
        assert centres[above][0] < centres[below][0] and abs(centres[above][1] - centres[below][1]) < 2
    for left, right in ((RED, GREEN), (BLUE, YELLOW), (PINK, CYAN)):
        assert centres[left][1] < centres[right][1] and abs(centres[left][0] - centres[right][0]) < 2


def test_groups_of_reconstructions_lie_below_each_other_and_may_be_short(tmp_path):
    groups = [
        ("first", plain(RED, RED), plain(RED, RED), plain(RED, RED)),
        ("second, with a title much longer than its only image is wide, to the end of the line", *[plain(BLUE)] * 3),
    ]
    figures.reconstructions(tmp_path / "r.png", groups)
    picture = pixels(tmp_path / "r.png")
    assert np.argwhere(area(picture, RED))[:, 0].max() < np.argwhere(area(picture, BLUE))[:, 0].min()


def test_pixels_stay_sharp_and_images_that_are_not_square_keep_their_shape(tmp_path):
    image = plain(RED, size=(4, 8))
    image[0, :, :, 4:] = plain(BLUE, size=(4, 4))[0]
    figures.reconstructions(tmp_path / "r.png", [("", image, image, image)])
    picture = pixels(tmp_path / "r.png")
    red, blue = np.argwhere(area(picture, RED)), np.argwhere(area(picture, BLUE))
    assert len(red) == pytest.approx(len(blue), rel=0.1)
    width = blue[:, 1].max() - red[:, 1].min() + 1
    row = picture[red[0][0], red[:, 1].min() : blue[:, 1].max() + 1]
    assert area(row[None], RED).sum() + area(row[None], BLUE).sum() >= width - 2  # no blur between


def test_curves_draw_training_and_validation(tmp_path):
    rows = [
        {"epoch": e, "split": split, "loss": 1 / e + (split == "val"), "seconds": 3.0, "images_per_s": 5.0}
        for e in (1, 2, 3)
        for split in ("train", "val")
    ]
    figures.curves(tmp_path / "one.png", rows)
    for colour in ("train", "val"):
        drawn = tuple(int(figures.COLOURS[colour][i : i + 2], 16) for i in (1, 3, 5))
        assert area(pixels(tmp_path / "one.png"), drawn).sum() > 200, colour  # type: ignore[arg-type]
    rows[1]["accuracy"] = 0.5
    figures.curves(tmp_path / "two.png", rows, best_epoch=2)
    assert pixels(tmp_path / "two.png").shape[1] > 1.7 * pixels(tmp_path / "one.png").shape[1]  # a second panel


def test_knn_accuracy_is_drawn_beside_the_loss(tmp_path, monkeypatch):
    titles, save = [], figures.save_figure
    monkeypatch.setattr(
        figures, "save_figure", lambda f, file: (titles.extend(ax.get_title() for ax in f.axes), save(f, file))
    )
    row = {"epoch": 1, "split": "val", "masked_mse": 0.1, "loss": 0.1, "knn_accuracy": 0.9}
    figures.curves(tmp_path / "c.png", [{"epoch": 1, "split": "train", "loss": 0.2, "lr": 1e-3}, row])
    assert titles == ["loss", "k-NN accuracy", "learning rate", "masked MSE"]


def test_curves_of_a_single_epoch(tmp_path):
    figures.curves(tmp_path / "c.png", [{"epoch": 1, "split": "train", "loss": 1.0, "lr": 1e-3}], best_epoch=1)
    assert pixels(tmp_path / "c.png").std() > 10


def test_wrong_predictions_are_marked(tmp_path):
    images = plain(RED, GREEN, BLUE)
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    red_text = (0xC4, 0x4E, 0x52)
    figures.predictions(tmp_path / "right.png", images, [0, 1, 0], probabilities, ["cat", "dog"])
    figures.predictions(tmp_path / "wrong.png", images, [0, 1, 1], probabilities, ["cat", "dog"])
    figures.predictions(tmp_path / "unknown.png", images, None, probabilities, ["cat", "dog"])
    assert area(pixels(tmp_path / "wrong.png"), red_text).sum() > 20
    assert not area(pixels(tmp_path / "right.png"), red_text).any()
    assert not area(pixels(tmp_path / "unknown.png"), red_text).any()
    assert (pixels(tmp_path / "right.png") == pixels(tmp_path / "unknown.png")).all()
    for colour in (RED, GREEN, BLUE):
        assert area(pixels(tmp_path / "wrong.png"), colour).sum() > 1000


def test_a_gallery_of_one_and_of_many_rows_with_long_names(tmp_path):
    names = ["a name much too long to stand over one image", "b"]
    for n in (1, 9):
        file = tmp_path / f"{n}.png"
        figures.predictions(file, plain(*[RED] * n), [1] * n, np.array([[0.6, 0.4]] * n), names)
        assert area(pixels(file), RED).sum() > 1000 * n
    assert pixels(tmp_path / "1.png").shape[1] < 400


def test_confusion_colours_rows_by_share_and_its_text_can_be_read(tmp_path):
    counts = np.array([[1, 999], [300, 700]])
    figures.confusion(tmp_path / "c.png", counts, ["a", "b"])
    picture = pixels(tmp_path / "c.png").astype(int)
    white = area(picture, (255, 255, 255))
    blue = (picture[:, :, 2] - picture[:, :, 0] > 60) & (picture[:, :, 0] < 60)
    columns = np.argwhere(blue)[:, 1]
    middle = np.argwhere(~white)[:, 1].mean()
    assert (columns > middle).mean() > 0.9  # both rows were mostly taken for b


def written(figure: Figure) -> dict[str, tuple[str, str]]:
    """Text in a table that is drawn -> (its row, its column), by the names at the sides."""
    ax = figure.axes[0]
    rows, columns = ([label.get_text() for label in axis.get_ticklabels()] for axis in (ax.yaxis, ax.xaxis))
    places = ((text.get_text(), text.get_position()) for text in ax.texts)
    return {text: (rows[round(y)], columns[round(x)]) for text, (x, y) in places}


@pytest.fixture
def saved(monkeypatch) -> list[Figure]:
    """The figures that are drawn in the test."""
    seen: list[Figure] = []
    save = figures.save_figure
    monkeypatch.setattr(figures, "DPI", 20)
    monkeypatch.setattr(figures, "save_figure", lambda figure, file: (seen.append(figure), save(figure, file))[1])
    return seen


def test_the_rows_of_a_confusion_matrix_are_the_true_classes(tmp_path, saved):
    figures.confusion(tmp_path / "c.png", [[6, 4, 0], [1, 6, 1], [2, 0, 6]], ["a", "b", "c"])
    shown = written(saved[0])
    assert shown == {
        "60.0%": ("a", "a"), "4": ("a", "b"), "1": ("b", "c"), "2": ("c", "a"), "75.0%": ("c", "c"),
    }  # fmt: skip
    ax = saved[0].axes[0]
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("true", "predicted")
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.6, 0.4, 0], [0.125, 0.75, 0.125], [0.25, 0, 0.75]])


def test_a_heat_map_has_the_first_setting_down_and_the_second_across(tmp_path, saved):
    values = {(2, 0.5): 0.1, (2, 0.7): 0.2, (2, 0.9): 0.3, (4, 0.5): 0.4, (4, 0.7): 0.5, (4, 0.9): 0.6}
    figures.heat_map(tmp_path / "h.png", values, ("patch_size", "mask_ratio"), "k-NN")
    assert written(saved[0]) == {f"{v:.4f}": (str(row), str(column)) for (row, column), v in values.items()}
    assert (saved[0].axes[0].get_ylabel(), saved[0].axes[0].get_xlabel()) == ("patch size", "mask ratio")


@pytest.mark.parametrize("n", [2, 10, 21, 60])
def test_confusion_of_any_number_of_classes(tmp_path, n):
    counts = np.eye(n, dtype=int) * 5
    counts[0] = 0  # a class without test images
    figures.confusion(tmp_path / "c.png", counts, [f"a class with a very long name {i}" for i in range(n)])
    height, width, _ = pixels(tmp_path / "c.png").shape
    assert 300 < height < 3000 and 300 < width < 3000


def test_text_on_the_diagonal_contrasts_with_its_ground(tmp_path, monkeypatch):
    drawn: dict[str, str] = {}
    monkeypatch.setattr(figures, "save_figure", lambda figure, file: drawn.update(
        {text.get_text(): str(text.get_color()) for text in figure.axes[0].texts}))  # fmt: skip
    figures.confusion(tmp_path / "c.png", np.array([[10, 90, 0], [0, 100, 0], [3, 0, 0]]), ["a", "b", "c"])
    assert drawn == {"10.0%": "black", "90": "white", "100%": "white", "3": "white", "0.0%": "black"}


def test_a_heat_map_shows_every_cell_and_what_is_missing(tmp_path):
    values = {(2, 0.5): 0.91, (2, 0.75): 0.93, (4, 0.5): None, (4, 0.75): 0.95}
    figures.heat_map(tmp_path / "h.png", values, ("patch_size", "mask_ratio"), "finetune_accuracy")
    picture = pixels(tmp_path / "h.png")
    low, high = (68, 1, 84), (253, 231, 36)  # viridis
    first, last = np.argwhere(area(picture, low)), np.argwhere(area(picture, high))
    assert len(first) > 1000 and len(last) > 1000
    assert (first.mean(axis=0) < last.mean(axis=0)).all()  # lowest top left, highest bottom right


def test_a_figure_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "c.png"
    rows = [{"epoch": 1, "split": "train", "loss": 1.0}]
    figures.curves(file, rows)
    before = file.read_bytes()

    def fails(self: object, target: Path, **_: object) -> None:
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", fails)
    with pytest.raises(KeyboardInterrupt):
        figures.curves(file, [*rows, {"epoch": 2, "split": "train", "loss": 0.5}])
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]


def test_an_overlay_is_bright_where_attention_is():
    heat = np.array([[[0.0, 1.0, 2.0], [4.0, 0.0, 0.0]]])
    shown = figures.overlay(np.zeros((1, 1, 8, 12)), heat)
    assert shown.shape == (1, 3, 8, 12) and shown.min() >= -1 and shown.max() <= 1
    light = shown[0].mean(axis=0)
    patches = light.reshape(2, 4, 3, 4).transpose(0, 2, 1, 3).reshape(6, 16)
    assert np.ptp(patches, axis=1).max() < 1e-6 and list(np.argsort(patches[:, 0])[-3:]) == [1, 2, 3]


def test_importing_maelab_chooses_no_backend():
    """Whoever imports it may draw with another; pyplot itself is not even loaded."""
    code = "import os, sys; os.environ['MPLBACKEND'] = 'template'\n"
    code += "from maelab.tasks import attention, evaluate, features, finetune, predict, pretrain, probe, reconstruct\n"
    code += "import maelab.fitting, maelab.sweep, maelab.report.figures, matplotlib\n"
    code += "assert 'matplotlib.pyplot' not in sys.modules and matplotlib.get_backend() == 'template'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
