"""What figures say: every label, tick and number beside what it belongs to, read from the figure before it is drawn."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from maelab import figures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch):
    """The figures that would be written; they are closed in the end."""
    made: list[Figure] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, file: made.append(figure))
    yield made
    for figure in made:
        plt.close(figure)


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def texts(ax: Any) -> dict[tuple[float, float], str]:
    """(column, row) -> what is written there."""
    return {(round(text.get_position()[0]), round(text.get_position()[1])): text.get_text() for text in ax.texts}


def flat(*values: float, side: int = 8) -> np.ndarray:
    """A grey image (1, side, side) for each value, stacked."""
    return np.stack([np.full((1, side, side), value, np.float32) for value in values])


def test_confusion_has_true_classes_as_rows(drawn):
    counts = np.array([[6, 2, 0], [1, 3, 0], [5, 4, 1]])
    figures.confusion(Path("x"), counts, ["a", "b", "c"])
    (ax,) = drawn[0].axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "true")
    assert ticks(ax.xaxis) == ticks(ax.yaxis) == ["a", "b", "c"]
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.75, 0.25, 0], [0.25, 0.75, 0], [0.5, 0.4, 0.1]])
    assert texts(ax) == {
        (0, 0): "75.0%", (1, 0): "2", (0, 1): "1", (1, 1): "75.0%", (0, 2): "5", (1, 2): "4", (2, 2): "10.0%"
    }  # fmt: skip


def test_a_sweep_puts_errors_below_their_ratio(drawn):
    groups = [
        (
            f"{h} of 16 patches hidden, masked MSE {e} (with a note)",
            flat(-0.9, -0.8),
            flat(m, m + 0.1),
            flat(r, r + 0.1),
        )
        for h, e, m, r in ((4, 0.1, -0.5, 0.1), (8, 0.2, -0.3, 0.3), (12, 0.3, -0.1, 0.5))
    ]
    errors, baselines = {0.25: 0.1, 0.5: 0.2, 0.75: 0.3}, {0.25: 0.4, 0.5: 0.6, 0.75: 0.9}
    figures.ratio_sweep(Path("x"), groups, errors, baselines)
    above, below = drawn[0].axes
    lines = {line.get_label(): line for line in below.lines}
    assert list(lines["model"].get_ydata()) == [0.1, 0.2, 0.3]
    assert list(lines["mean of the visible pixels"].get_ydata()) == [0.4, 0.6, 0.9]
    assert ticks(below.xaxis) == ["original", "25% hidden", "50% hidden", "75% hidden"]
    assert list(lines["model"].get_xdata()) == list(below.get_xticks()[1:])
    assert ticks(above.yaxis) == ["masked", "rebuilt"] * 2 and above.get_title(loc="left") == "rebuilt (with a note)"
    canvas = above.images[0].get_array()
    found = [[float(canvas[round(y), round(x), 0]) * 2 - 1 for x in below.get_xticks()] for y in above.get_yticks()]
    expected = [
        [-0.9, -0.5, -0.3, -0.1], [1.0, 0.1, 0.3, 0.5], [-0.8, -0.4, -0.2, 0.0], [1.0, 0.2, 0.4, 0.6],
    ]  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_curves_name_their_split_and_mark_the_best_epoch(drawn):
    rows = [
        {"epoch": epoch, "split": split, "loss": 1 / epoch + (split == "val"), "seconds": 9.0}
        for epoch in (1, 2, 3)
        for split in ("train", "val")
    ]
    figures.curves(Path("x"), rows, best_epoch=2)
    figures.curves(Path("x"), rows)
    (ax,), (unmarked,) = (figure.axes for figure in drawn)
    lines = {str(line.get_label()): line for line in ax.lines}
    assert lines.keys() == {"train", "val", "best epoch"} and len(unmarked.lines) == 2
    assert list(lines["train"].get_xdata()) == [1, 2, 3] and list(lines["train"].get_ydata()) == [1, 1 / 2, 1 / 3]
    assert list(lines["val"].get_ydata()) == [2, 3 / 2, 4 / 3] and list(lines["best epoch"].get_xdata()) == [2, 2]
    assert lines["train"].get_color() == figures.COLOURS["train"] and lines["val"].get_color() == figures.COLOURS["val"]
    assert (ax.get_title(), ax.get_xlabel()) == ("loss", "epoch")


def test_a_gallery_says_the_guess_its_share_and_the_truth_where_it_is_another(drawn):
    shares = np.array([[0.1, 0.9, 0.0], [0.2, 0.3, 0.5], [0.6, 0.1, 0.3]])
    figures.predictions(Path("x"), flat(0, 0.1, 0.2), [1, 0, 0], shares, ["a", "b", "c"])
    (ax,) = drawn[0].axes
    assert [text.get_text() for text in ax.texts] == ["b (90%)", "c (50%)\nis a", "a (60%)"]
    for text, image in zip(ax.texts, ax.images, strict=True):
        left, right, bottom, top = image.get_extent()
        assert text.get_position()[0] == pytest.approx((left + right) / 2) and bottom < top < text.get_position()[1]
    colours = [text.get_color() for text in ax.texts]
    assert colours[0] == colours[2] == "black" != colours[1]


def test_a_heat_map_names_its_rows_and_columns(drawn):
    values = {(2, 0.5): 0.1, (2, 0.6): 0.2, (2, 0.7): None, (4, 0.5): 0.4, (4, 0.6): 0.5, (4, 0.7): 0.6}
    figures.heat_map(Path("x"), values, ("patch_size", "mask_ratio"), "val_accuracy")
    ax = drawn[0].axes[0]
    assert (ax.get_ylabel(), ax.get_xlabel(), ax.get_title()) == ("patch size", "mask ratio", "val accuracy")
    assert ticks(ax.yaxis) == ["2", "4"] and ticks(ax.xaxis) == ["0.5", "0.6", "0.7"]
    assert texts(ax) == {
        (0, 0): "0.1000", (1, 0): "0.2000", (2, 0): "none", (0, 1): "0.4000", (1, 1): "0.5000", (2, 1): "0.6000"
    }  # fmt: skip


def test_rows_and_columns_of_reconstructions_have_their_names(drawn):
    rows = flat(-0.8, -0.6), flat(-0.2, 0.0), flat(0.4, 0.6)
    figures.reconstructions(Path("x"), [("a title", *rows)], columns=["first", "second"])
    (ax,) = drawn[0].axes
    assert ticks(ax.yaxis) == ["original", "masked", "rebuilt"] and ax.get_title(loc="left") == "a title"
    assert ticks(ax.xaxis) == ["first", "second"]
    canvas = ax.images[0].get_array()
    found = [[float(canvas[round(y), round(x), 0]) * 2 - 1 for x in ax.get_xticks()] for y in ax.get_yticks()]
    np.testing.assert_allclose(found, [[-0.8, -0.6], [-0.2, 0.0], [0.4, 0.6]], atol=1e-5)


def test_an_animation_lingers_on_its_first_and_its_last_picture(tmp_path):
    frames = [(f"{i}", flat(-1), flat(-0.5 + i / 4), flat(1 - i / 4)) for i in range(4)]
    figures.animation(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as picture:
        assert getattr(picture, "n_frames", 1) == 4 and picture.info["loop"] == 0
        lasting = []
        for i in range(4):
            picture.seek(i)
            lasting.append(picture.info["duration"])
    assert lasting == [1000, 120, 120, 2500]


def test_an_overlay_is_scaled_for_each_image_and_lets_it_show_through():
    heat = np.array([[[1.0, 0.5], [0.0, 0.25]], [[0.1, 0.2], [0.0, 0.4]]])
    shown = (figures.overlay(flat(-0.2, 0.6), heat) + 1) / 2
    inferno = plt.get_cmap("inferno")
    for picture, values, grey in zip(shown, heat, (0.4, 0.8), strict=True):
        for row in range(2):
            for column in range(2):
                expected = 0.35 * grey + 0.65 * np.array(inferno(values[row, column] / values.max())[:3])
                np.testing.assert_allclose(picture[:, 4 * row + 1, 4 * column + 2], expected, atol=1e-5)
