"""Each variation against a loop over images, with parameters that all differ: a factor, side or sign that reaches the
wrong operation shows. The parameters are drawn again here, from a generator in the same state."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from test_augment import differences, noise, smooth, to_pillow

from maelab.config import Augment
from maelab.data import augment as module
from maelab.data.augment import augment, mix
from maelab.data.batches import scale, step_generator, unscale

SHAPE = (3, 20, 28)


def varied(images: torch.Tensor, cfg: Augment, seed: int = 0) -> torch.Tensor:
    return unscale(augment(images, torch.arange(len(images)), cfg, step_generator(seed, 0)))


def test_colour_jitter_gives_each_operation_its_own_factor():
    images = smooth(12, SHAPE)
    factors = 1 + 0.8 * (2 * torch.rand(12, 3, generator=step_generator(3, 0)) - 1)
    expected = []
    for x, (bright, contrast, colour) in zip(images, factors.tolist(), strict=True):
        picture = ImageEnhance.Brightness(to_pillow(x)).enhance(bright)
        picture = ImageEnhance.Contrast(picture).enhance(contrast)
        expected.append(ImageEnhance.Color(picture).enhance(colour))
    off = differences(varied(images, Augment(color_jitter=0.8), seed=3), expected)
    assert off.max() <= 3 and off.float().mean() < 0.05


def test_flips_go_by_a_number_below_one_half():
    images = noise(300, (1, 2, 4))
    mirrored = torch.rand(300, 1, generator=step_generator(0, 0))[:, 0] < 0.5
    assert torch.equal(
        varied(images, Augment(flip=True)), torch.where(mirrored[:, None, None, None], images.flip(3), images)
    )


# --- RandAugment ----------------------------------------------------------------------------------------------------

STRENGTH = 0.8


def moved(picture: Image.Image, a: float, b: float, c: float, d: float, x: float, y: float) -> Image.Image:
    """The pixel at (column, row) from the centre is read from (a column + b row + x, c column + d row + y)."""
    mid_x, mid_y = picture.width / 2, picture.height / 2
    shift_x, shift_y = mid_x - a * mid_x - b * mid_y + x, mid_y - c * mid_x - d * mid_y + y
    data = (a, b, shift_x, c, d, shift_y)
    return picture.transform(picture.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)


def operations(sign: int) -> dict[str, Callable[[Image.Image], Image.Image]]:
    """What each operation does to a picture at STRENGTH, in the order of the numbers that choose them."""
    s = sign * STRENGTH
    cos, sin = math.cos(math.radians(30 * s)), math.sin(math.radians(30 * s))
    factor = 1 + 0.9 * s
    return {
        "rotate": lambda p: moved(p, cos, -sin, sin, cos, 0, 0),
        "shear x": lambda p: moved(p, 1, 0.3 * s, 0, 1, 0, 0),
        "shear y": lambda p: moved(p, 1, 0, 0.3 * s, 1, 0, 0),
        "shift x": lambda p: moved(p, 1, 0, 0, 1, 0.45 * s * p.width, 0),
        "shift y": lambda p: moved(p, 1, 0, 0, 1, 0, 0.45 * s * p.height),
        "brightness": lambda p: ImageEnhance.Brightness(p).enhance(factor),
        "contrast": lambda p: ImageEnhance.Contrast(p).enhance(factor),
        "colour": lambda p: ImageEnhance.Color(p).enhance(factor),
        "sharpness": lambda p: ImageEnhance.Sharpness(p).enhance(factor),
        "posterize": lambda p: ImageOps.posterize(p, 8 - round(4 * STRENGTH)),
        "solarize": lambda p: ImageOps.solarize(p, int(256 * (1 - STRENGTH))),
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
        "invert": ImageOps.invert,
    }


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", operations(1))
def test_each_operation_of_rand_augment(name, sign):
    names = list(operations(sign))
    images = (smooth if names.index(name) < 5 else noise)(4, SHAPE, seed=1)
    chosen = (names.index(name) + 0.5) / (2 * len(names))
    u = torch.tensor([chosen, 0.25 if sign < 0 else 0.75]).expand(4, 2)
    ours = module._rand_augment_op(images, u, torch.full((4,), STRENGTH), 0, 1)
    off = differences(ours, [operations(sign)[name](to_pillow(x)) for x in images])
    assert (off > 1).float().mean() < 0.01, "on the border of the black corners one rounding decides"
    assert not torch.equal(ours, images)


def test_the_upper_half_of_the_numbers_does_nothing():
    images = smooth(50, SHAPE)
    u = torch.stack([torch.linspace(0.5, 0.9999, 50), torch.rand(50)], dim=1)
    assert torch.equal(module._rand_augment_op(images, u, torch.ones(50), 0, 1), images)


@pytest.mark.parametrize("magnitude", [9.0, 4.0])
def test_operations_follow_one_another_at_the_strength_asked_for(magnitude):
    """A tenth of the magnitude, with a deviation of 0.05, and never beyond full strength."""
    images, generator = smooth(200, (3, 12, 12)), step_generator(5, 0)
    expected, strengths = images, []
    for _ in range(3):
        jitter = torch.randn(200, generator=generator)
        strengths.append(((magnitude + 0.5 * jitter) / 10).clamp(0, 1))
        expected = module._rand_augment_op(expected, torch.rand(200, 2, generator=generator), strengths[-1], 0, 1)
    cfg = Augment(rand_augment_ops=3, rand_augment_magnitude=magnitude)
    assert torch.equal(varied(images, cfg, seed=5), expected)


# --- geometry -------------------------------------------------------------------------------------------------------


def test_crop_and_affine_compose_as_matrices_do():
    """crop_scale, affine_degrees, _scale, _shear and _translate all differ, and so do height and width."""
    cfg = Augment(
        crop_scale=0.4, affine_degrees=25, affine_scale=0.15, affine_shear=12, affine_translate=0.07
    )  # fmt: skip
    H, W, n = 30, 44, 40
    generator, columns = torch.Generator().manual_seed(0), []

    def draw(k: int) -> torch.Tensor:
        columns.append(torch.rand(n, k, generator=generator, dtype=torch.float64))
        return columns[-1].float()

    ours = module._crop_and_affine(draw, H, W, cfg).double()
    for i in range(n):
        area, aspect, across, down = columns[0][i].tolist()
        turn, lean, zoom, right, low = (2 * columns[1][i] - 1).tolist()
        area, aspect = 0.4 + 0.6 * area, math.exp((2 * aspect - 1) * math.log(4 / 3))
        wide, high = min(1, math.sqrt(area * aspect)), min(1, math.sqrt(area / aspect))
        angle, lean = math.radians(25 * turn), math.tan(math.radians(12 * lean))
        crop = np.array(
            [[wide, 0, (across - 0.5) * (1 - wide) * W], [0, high, (down - 0.5) * (1 - high) * H], [0, 0, 1]]
        )
        rotation = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
        shear = np.array([[1, lean, 0], [0, 1, 0], [0, 0, 1]])
        larger = np.diag([1 / (1 + 0.15 * zoom), 1 / (1 + 0.15 * zoom), 1])
        shift = np.array([[1, 0, 0.07 * right * W], [0, 1, 0.07 * low * H], [0, 0, 1]])
        expected = (shift @ rotation @ shear @ larger @ crop)[:2]
        np.testing.assert_allclose(ours[i].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_boxes_to_erase_equal_a_loop():
    """Algorithm 1 of the paper: 2% to a third of the area, sides in the ratio 0.3 to 1 / 0.3."""
    u = torch.rand(200, 5, generator=torch.Generator().manual_seed(0))
    for box, (area, aspect, down, across, chance) in zip(
        module._erased(u, 40, 60, 0.6).tolist(), u.tolist(), strict=True
    ):
        area = (0.02 + (1 / 3 - 0.02) * area) * 40 * 60
        aspect = math.exp(math.log(0.3) + aspect * (math.log(1 / 0.3) - math.log(0.3)))
        height, width = (
            min(40, max(1, round(math.sqrt(area * aspect)))),
            min(60, max(1, round(math.sqrt(area / aspect)))),
        )
        top, left = math.floor(down * (40 - height + 1)), math.floor(across * (60 - width + 1))
        assert box == [top, top + height if chance < 0.6 else top, left, left + width]


# --- mixing ---------------------------------------------------------------------------------------------------------


def mixed_from_black_and_white(n: int = 2000, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of a black and a white image, mixed: (n, 32, 32), and the share of white in the targets, (n,)."""
    labels = torch.arange(n) % 2
    images = labels.float()[:, None, None, None].expand(n, 1, 32, 32)
    mixed, targets = mix(images, labels, 2, step_generator(0, 0), **options)  # type: ignore[arg-type]
    return mixed[:, 0], targets[:, 1]


def test_mixup_and_cutmix_draw_from_their_own_distributions():
    """Beta(100, 100) is near one half, Beta(0.1, 0.1) near 0 or 1: either way round, an image shows whose it had."""
    for mixup, cutmix in ((100.0, 0.1), (0.1, 100.0)):
        mixed, _ = mixed_from_black_and_white(mixup=mixup, cutmix=cutmix)
        grey = ((mixed > 0) & (mixed < 1)).flatten(1).any(1)
        near = ((mixed[grey].mean(dim=(1, 2)) - 0.5).abs() < 0.12).double().mean()
        assert near > 0.99 if mixup > 1 else near < 0.2, "mixup's"
        pasted = ((mixed == 0).flatten(1).any(1) & (mixed == 1).flatten(1).any(1)).double().mean()
        assert 0.45 < pasted < 0.55 if cutmix > 1 else pasted < 0.4, "cutmix's"


@pytest.mark.parametrize("alpha", [0.3, 1.0, 5.0])
def test_the_side_of_a_box_follows_the_distribution_asked_for(alpha):
    """1 - side ** 2 is drawn from Beta(alpha, alpha); where no edge cuts the box, its sides show it."""
    mixed, _ = mixed_from_black_and_white(cutmix=alpha)
    own = (torch.arange(len(mixed)) % 2)[:, None, None]
    boxes = mixed != own
    heights, widths = boxes.any(2).sum(1), boxes.any(1).sum(1)
    side = torch.maximum(heights, widths).double() / 32
    # The longer of the two sides that the edges left: at least as small as what was drawn.
    drawn = np.sqrt(1 - np.random.default_rng(0).beta(alpha, alpha, 20_000))
    centre = np.random.default_rng(1).integers(32, size=(20_000, 2))
    half = (32 * drawn).astype(int) // 2
    cut = [np.minimum(c + half, 32) - np.maximum(c - half, 0) for c in centre.T]
    expected = np.maximum(*cut) / 32
    assert side.mean() == pytest.approx(expected.mean(), abs=0.03)
    assert side.std() == pytest.approx(expected.std(), abs=0.02)


def test_with_both_on_each_is_taken_by_half_the_images():
    mixed, _ = mixed_from_black_and_white(8000, mixup=100.0, cutmix=100.0)
    blended = ((mixed > 0) & (mixed < 1)).flatten(1).any(1).double().mean()
    assert blended == pytest.approx(0.5, abs=0.025)  # 4.5 standard deviations


def test_targets_are_smoothed_before_they_are_mixed():
    """The share of each partner, spread as `label_smoothing` asks: 0.2 over four classes leaves 0.85 and 0.05."""
    labels = torch.tensor([0, 3])
    images = scale(noise(2, (1, 8, 8)))
    mixed, targets = mix(images, labels, 4, step_generator(0, 3), mixup=1.0, label_smoothing=0.2)
    for i in range(2):
        share = ((mixed[i] - images[1 - i]) / (images[i] - images[1 - i])).median()
        wanted = [0.05, 0.05, 0.05, 0.05]
        wanted[int(labels[i])] += 0.8 * float(share)
        wanted[int(labels[1 - i])] += 0.8 * (1 - float(share))
        torch.testing.assert_close(targets[i], torch.tensor(wanted), atol=1e-5, rtol=0)
