import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from maelab.data import augment as module
from maelab.data.augment import Augment, augment, mix
from maelab.data.batches import rank_slice, scale, step_generator, unscale

EVERYTHING = Augment(
    crop_padding=3,
    crop_scale=0.3,
    flip=True,
    affine_degrees=20,
    affine_scale=0.2,
    affine_shear=10,
    affine_translate=0.1,
    elastic=0.04,
    color_jitter=0.4,
    rand_augment_ops=3,
    random_erasing=0.5,
)
OFF = {field.name: field.default for field in dataclasses.fields(Augment)}
ALONE = [
    Augment(**{name: getattr(EVERYTHING, name)}) for name in OFF if getattr(EVERYTHING, name) != OFF[name]
]  # each variation by itself
SHAPES = [(3, 16, 16), (1, 14, 14), (3, 12, 20), (1, 20, 12), (4, 9, 10)]


def noise(n: int, shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def smooth(n: int, shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    """Soft shapes of limited contrast: closer to a photograph than noise is."""
    coarse = torch.rand(n, shape[0], 4, 4, generator=torch.Generator().manual_seed(seed))
    return (20 + 190 * F.interpolate(coarse, shape[1:], mode="bicubic").clamp(0, 1)).to(torch.uint8)


def to_pillow(x: torch.Tensor) -> Image.Image:
    return Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy())


def from_pillow(image: Image.Image) -> torch.Tensor:
    array = torch.from_numpy(np.array(image))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1)


def differences(ours: torch.Tensor, theirs: list[Image.Image]) -> torch.Tensor:
    return (ours.int() - torch.stack([from_pillow(image) for image in theirs]).int()).abs()


# --- augment --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_off_is_scale(shape):
    images, index = noise(9, shape), torch.tensor([4, 4, 0, 8])
    assert torch.equal(augment(images, index, Augment(), step_generator(0, 0)), scale(images[index]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "cfg", [EVERYTHING, *ALONE], ids=lambda cfg: "-".join(k for k in OFF if getattr(cfg, k) != OFF[k])
)
def test_pure_varied_in_range_and_the_same_in_parts(cfg, shape):
    images, index = noise(40, shape), torch.arange(24)
    original, global_state = images.clone(), torch.get_rng_state()
    whole = augment(images, index, cfg, step_generator(1, 7))
    assert whole.shape == (24, *shape) and whole.dtype == torch.float32
    assert whole.min() >= -1 and whole.max() <= 1
    assert torch.equal(whole, augment(images, index, cfg, step_generator(1, 7)))
    assert not torch.equal(whole, augment(images, index, cfg, step_generator(1, 8)))
    for world in (2, 8, 24):
        parts = [augment(images, index, cfg, step_generator(1, 7), rank, world) for rank in range(world)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(images, original)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_images_of_a_batch_vary_independently():
    images = smooth(1, (3, 16, 16)).expand(64, -1, -1, -1)
    varied = augment(images, torch.arange(64), EVERYTHING, step_generator(0, 0))
    assert len({image.numpy().tobytes() for image in varied}) == 64


@pytest.mark.parametrize("shape", SHAPES)
def test_crop_equals_a_loop(shape):
    images, padding = noise(200, shape), 3
    offset = torch.randint(2 * padding + 1, (200, 2), generator=torch.Generator().manual_seed(0))
    _, H, W = shape
    for x, cropped, (top, left) in zip(
        images, module._shifted_crop(images, padding, offset), offset.tolist(), strict=True
    ):
        padded = torch.zeros(shape[0], H + 2 * padding, W + 2 * padding, dtype=torch.uint8)
        padded[:, padding : padding + H, padding : padding + W] = x
        assert torch.equal(cropped, padded[:, top : top + H, left : left + W])


def test_every_crop_position_occurs_equally_often():
    images = torch.full((1, 1, 3, 3), 255, dtype=torch.uint8)
    images[0, 0] = torch.arange(1, 10).view(3, 3)
    n = 9000
    crops = augment(images, torch.zeros(n, dtype=torch.int64), Augment(crop_padding=1), step_generator(0, 0))
    counts = torch.tensor([(unscale(crops)[:, 0, 1, 1] == value).sum() for value in range(1, 10)])  # the middle pixel
    assert counts.sum() == n and (counts - 1000).abs().max() < 150  # 5 standard deviations


def test_flips_mirror_about_half():
    images = noise(1000, (3, 8, 6))
    flipped = unscale(augment(images, torch.arange(1000), Augment(flip=True), step_generator(0, 3)))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 420 < mirrored.sum() < 580


def test_resized_crops_show_parts_of_the_image_and_nothing_else():
    # Pixel values are positions: the crop must be a linear ramp inside the image, never black.
    ramp = torch.arange(10, 250, 10, dtype=torch.uint8)  # 24 columns
    images = ramp.expand(1, 1, 20, 24).contiguous()
    cfg = Augment(crop_scale=0.25)
    crops = unscale(augment(images, torch.zeros(500, dtype=torch.int64), cfg, step_generator(0, 0))).float()[:, 0]
    assert (crops == crops[:, :1]).all()  # constant along columns
    assert crops.min() == 10 and crops.max() == 240
    share = (crops[:, 0, 18] - crops[:, 0, 5]) / 130  # of the width; area 0.25 to 1, aspect 3/4 to 4/3
    assert share.min() > 0.42 and share.max() <= 1.01 and share.std() > 0.1


def test_affine_without_change_is_the_identity():
    images = noise(6, (3, 11, 14))
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(6, 2, 3)
    assert torch.equal(module._warp(images, matrix), images)


def test_affine_moves_by_whole_pixels_into_black():
    images = noise(2, (1, 5, 7))
    matrix = torch.tensor([[[1.0, 0, 2], [0, 1, 0]], [[1, 0, 0], [0, 1, -1]]])  # read 2 to the right; 1 above
    moved = module._warp(images, matrix)
    assert torch.equal(moved[0], F.pad(images[0], (0, 2))[..., 2:])
    assert torch.equal(moved[1], F.pad(images[1], (0, 0, 1, 0))[..., :-1, :])


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 28, 28), (3, 16, 24)])
def test_rotation_and_shear_equal_pillow(shape):
    images = smooth(8, shape)
    _, H, W = shape
    degrees = torch.linspace(-40, 40, 8)
    zero = torch.zeros(8)
    matrix = F.pad(module._matrix(degrees.deg2rad(), zero, zero), (0, 1))
    # On the border of the black corners one rounding decides: allow few such pixels.
    theirs = [to_pillow(x).rotate(d, Image.Resampling.BILINEAR) for x, d in zip(images, degrees.tolist(), strict=True)]
    off = differences(module._warp(images, matrix), theirs)
    assert (off > 1).float().mean() < 0.003

    shear = torch.linspace(-0.3, 0.3, 8)
    matrix = F.pad(module._matrix(zero, shear, zero), (0, 1))
    theirs = [
        to_pillow(x).transform((W, H), Image.Transform.AFFINE, (1, s, -s * H / 2, 0, 1, 0), Image.Resampling.BILINEAR)
        for x, s in zip(images, shear.tolist(), strict=True)
    ]
    assert (differences(module._warp(images, matrix), theirs) > 1).float().mean() < 0.003


def test_random_affine_keeps_within_its_limits():
    # A dot in the middle stays within the largest shift; the other limits leave it where it is.
    images = torch.zeros(1, 1, 41, 41, dtype=torch.uint8)
    images[..., 20, 20] = 255
    index = torch.zeros(300, dtype=torch.int64)
    turned = augment(images, index, Augment(affine_degrees=30, affine_scale=0.2, affine_shear=10), step_generator(0, 0))
    assert (turned.flatten(1).argmax(1) == 20 * 41 + 20).all()
    moved = augment(images, index, Augment(affine_translate=0.1), step_generator(0, 0)).flatten(1).argmax(1)
    offset = torch.stack([moved // 41, moved % 41]) - 20
    assert offset.min() == -4 and offset.max() == 4


def test_elastic_distortion_moves_neighbours_together_by_its_share():
    # Ramps show how far each pixel was read from its place: to the right, and (transposed) down.
    ramp = (torch.arange(28, dtype=torch.uint8) * 9).expand(1, 1, 28, 28).contiguous()
    index = torch.zeros(3000, dtype=torch.int64)
    for images in (ramp, ramp.transpose(2, 3).contiguous()):
        varied = unscale(augment(images, index, Augment(elastic=0.04), step_generator(0, 0)))
        moved = ((varied - images.float()) / 9)[:, 0, 8:20, 8:20]  # (3000, 12, 12), pixels; from here none leaves
        assert moved.std(0).min() > 0.04 * 28 * 0.93 and moved.std(0).max() < 0.04 * 28 * 1.07
        assert moved.mean(0).abs().max() < 0.1
        # White noise smoothed by a Gaussian of sigma 4 has the correlation exp(-(d / 2 sigma)^2) at distance d.
        for d in (2, 4, 8):
            for other in (moved[:, 2, 2 + d], moved[:, 2 + d, 2]):
                correlation = torch.corrcoef(torch.stack([moved[:, 2, 2], other]))[0, 1]
                assert abs(correlation - np.exp(-((d / 8) ** 2))) < 0.06
    displaced = module._displacement(torch.randn(3000, 2, 14, 14), 28, 12, 0.04)  # the edges move as far
    assert displaced.shape == (3000, 28, 12, 2)
    assert displaced.std(0).min() > 0.075 and displaced.std(0).max() < 0.085


def test_random_erasing_greys_one_rectangle_with_its_probability():
    images = torch.full((1, 3, 30, 40), 255, dtype=torch.uint8)
    varied = augment(images, torch.zeros(2000, dtype=torch.int64), Augment(random_erasing=0.25), step_generator(0, 0))
    erased = varied == 0
    assert torch.equal(varied, torch.where(erased, 0.0, 1.0))
    assert (erased == erased[:, :1]).all()  # all channels alike
    erased = erased[:, 0]
    hit = erased.flatten(1).any(1)
    assert 0.2 < hit.float().mean() < 0.3
    rows, columns = erased[hit].any(2), erased[hit].any(1)
    assert torch.equal(erased[hit], rows[:, :, None] & columns[:, None, :])
    assert ((rows.int().diff(dim=1) == 1).sum(1) <= 1).all() and ((columns.int().diff(dim=1) == 1).sum(1) <= 1).all()
    area = erased[hit].float().mean(dim=(1, 2))
    aspect = rows.sum(1) / columns.sum(1)
    assert area.min() > 0.015 and area.max() < 0.36 and area.std() > 0.05
    assert aspect.min() > 0.2 and aspect.max() < 4.5 and (aspect > 1).any() and (aspect < 1).any()


def test_colour_jitter_stays_within_its_share():
    grey = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)  # only brightness shows on flat grey
    varied = unscale(
        augment(grey, torch.zeros(500, dtype=torch.int64), Augment(color_jitter=0.4), step_generator(0, 0))
    )
    assert varied.min() >= 58 and varied.max() <= 140 and varied.float().std() > 15


def test_rand_augment_leaves_half_alone_and_uses_every_operation(monkeypatch):
    images = smooth(1, (3, 16, 16))
    index = torch.zeros(2000, dtype=torch.int64)
    used = dict.fromkeys(range(len(module._COLOUR)), 0)
    signs: list[torch.Tensor] = []

    def counting(i, function):
        def counted(x, strength):
            used[i] += len(x)
            assert strength.abs().max() <= 1
            signs.append(strength.sign())
            return function(x, strength)

        return counted

    monkeypatch.setattr(module, "_COLOUR", tuple(counting(i, f) for i, f in enumerate(module._COLOUR)))
    varied = unscale(augment(images, index, Augment(rand_augment_ops=1), step_generator(0, 0)))
    unchanged = (varied == images).flatten(1).all(1).float().mean()
    assert 0.45 < unchanged < 0.56
    assert min(used.values()) > 40 and max(used.values()) < 110  # 2000 / 28 = 71 each
    assert torch.cat(signs).mean().abs() < 0.2


# --- colour ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 28, 28), (3, 16, 24)])
@pytest.mark.parametrize("make", [noise, smooth])
@pytest.mark.parametrize("name", ["brightness", "contrast", "color", "sharpness"])
def test_blends_equal_pillow(name, make, shape):
    images = make(8, shape)
    factors = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0, 1.2, 1.6, 1.9])
    enhance = getattr(ImageEnhance, name.capitalize())
    theirs = [enhance(to_pillow(x)).enhance(f) for x, f in zip(images, factors.tolist(), strict=True)]
    off = differences(getattr(module, name)(images, factors), theirs)
    assert off.max() <= 1 and (off > 0).float().mean() < 0.001


def test_sharpness_smooths_with_pillows_kernel():
    images = noise(4, (3, 9, 11))
    ours = module.sharpness(images, torch.zeros(4))
    assert differences(ours, [to_pillow(x).filter(ImageFilter.SMOOTH) for x in images]).max() <= 1
    tiny = noise(2, (1, 2, 5))
    assert torch.equal(module.sharpness(tiny, torch.tensor([0.1, 1.9])), tiny)


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 28, 28), (3, 16, 24)])
@pytest.mark.parametrize("make", [noise, smooth])
def test_pointwise_operations_equal_pillow(make, shape):
    images = make(9, shape)
    images[0] = 77  # flat
    images[1] = images[1].clamp(100, 101)
    pictures = [to_pillow(x) for x in images]

    def check(ours: torch.Tensor, theirs: list[Image.Image]) -> None:
        assert differences(ours, theirs).max() == 0

    check(module.autocontrast(images), [ImageOps.autocontrast(p) for p in pictures])
    check(module.equalize(images), [ImageOps.equalize(p) for p in pictures])
    bits = torch.arange(9).clamp(1, 8)
    check(
        module.posterize(images, bits), [ImageOps.posterize(p, b) for p, b in zip(pictures, bits.tolist(), strict=True)]
    )
    thresholds = torch.linspace(0, 256, 9).long()
    check(
        module.solarize(images, thresholds),
        [ImageOps.solarize(p, t) for p, t in zip(pictures, thresholds.tolist(), strict=True)],
    )


def test_equalize_of_few_pixels_equals_pillow():
    images = noise(6, (1, 3, 5))  # fewer than 255 pixels: left alone
    assert torch.equal(module.equalize(images), images)
    images = noise(6, (1, 20, 20))
    images[:, :, :, :3] = 255  # most pixels are the brightest
    assert differences(module.equalize(images), [ImageOps.equalize(to_pillow(x)) for x in images]).max() == 0


def test_color_leaves_grayscale_alone():
    images = noise(3, (1, 8, 8))
    assert torch.equal(module.color(images, torch.tensor([0.0, 0.5, 2.0])), images)


# --- mix ------------------------------------------------------------------------------------------------------------


def test_without_mixing_only_the_labels_are_smoothed():
    images = scale(noise(4, (3, 8, 8)))
    labels = torch.tensor([0, 2, 1, 2])
    mixed, targets = mix(images, labels, 3, step_generator(0, 0), label_smoothing=0.1)
    assert torch.equal(mixed, images)
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_targets_follow_the_pixels(alpha):
    n, classes = 64, 5
    labels = torch.arange(n) % classes
    images = scale(noise(n, (3, 6, 8)))
    mixed, targets = mix(images, labels, classes, step_generator(0, 1), mixup=alpha)
    shares = []
    for i in range(n):
        partner = i + 1 if i % 2 == 0 else i - 1
        share = targets[i, labels[i]].item()
        torch.testing.assert_close(mixed[i], share * images[i] + (1 - share) * images[partner])
        torch.testing.assert_close(targets[i, labels[partner]].item(), 1 - share, atol=1e-6, rtol=0)
        shares.append(share)
    spread = (1 / (4 * (2 * alpha + 1))) ** 0.5  # standard deviation of Beta(alpha, alpha)
    assert abs(np.mean(shares) - 0.5) < 0.17 and abs(np.std(shares) - spread) < 0.1


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 10, 18)])
def test_cutmix_targets_follow_the_box(shape):
    n, classes = 64, 4
    labels = torch.arange(n) % classes
    images = torch.arange(n).float()[:, None, None, None].expand(n, *shape) / n  # each image has its own value
    mixed, targets = mix(images, labels, classes, step_generator(0, 2), cutmix=1.0)
    shares = []
    for i in range(n):
        partner = i + 1 if i % 2 == 0 else i - 1
        own = mixed[i] == images[i]
        assert torch.equal(own, mixed[i] != images[partner])
        pasted = ~own[0]
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns[None, :])
        share = own[0].float().mean().item()
        assert targets[i, labels[i]].item() == pytest.approx(share)
        assert targets[i, labels[partner]].item() == pytest.approx(1 - share)
        shares.append(share)
    assert min(shares) < 0.4 and max(shares) > 0.9


def test_both_take_turns():
    n = 400
    images = (torch.arange(n) % 2).float()[:, None, None, None].expand(n, 1, 8, 8)
    mixed, targets = mix(images, torch.arange(n) % 2, 2, step_generator(0, 0), mixup=1.0, cutmix=1.0)
    pasted = ((mixed == 0) | (mixed == 1)).flatten(1).all(1)
    assert 0.4 < pasted.float().mean() < 0.6
    torch.testing.assert_close(targets.sum(1), torch.ones(n))
    torch.testing.assert_close(targets[:, 1], mixed.mean(dim=(1, 2, 3)))  # class 1 is white: its share is the mean


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mix_is_pure_and_the_same_in_parts(options):
    images, labels = scale(noise(24, (3, 8, 12))), torch.arange(24) % 7
    original, global_state = images.clone(), torch.get_rng_state()
    options = {**options, "label_smoothing": 0.1}
    whole = mix(images, labels, 7, step_generator(0, 5), **options)
    for again, same in ((mix(images, labels, 7, step_generator(0, s), **options), s == 5) for s in (5, 6)):
        assert torch.equal(whole[0], again[0]) is same
    for world in (2, 3, 12):
        parts = [
            mix(
                rank_slice(images, rank, world),
                rank_slice(labels, rank, world),
                7,
                step_generator(0, 5),
                rank=rank,
                world=world,
                **options,
            )
            for rank in range(world)
        ]
        assert torch.equal(torch.cat([x for x, _ in parts]), whole[0])
        assert torch.equal(torch.cat([y for _, y in parts]), whole[1])
    assert torch.equal(images, original)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_the_odd_image_out_stays():
    images, labels = scale(noise(5, (3, 8, 8))), torch.arange(5)
    mixed, targets = mix(images, labels, 5, step_generator(0, 0), mixup=1.0, cutmix=1.0)
    torch.testing.assert_close(mixed[4], images[4])
    torch.testing.assert_close(targets[4], F.one_hot(labels, 5)[4].float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_sees_the_same_variations():
    images, index = smooth(32, (3, 16, 16)), torch.arange(32)
    cpu = augment(images, index, EVERYTHING, step_generator(0, 0))
    cuda = augment(images.cuda(), index, EVERYTHING, step_generator(0, 0)).cpu()
    assert ((cpu - cuda).abs() > 0.02).float().mean() < 0.02
    labels = index % 10
    on_cpu = mix(cpu, labels, 10, step_generator(0, 1), mixup=0.8, cutmix=1.0)
    on_cuda = mix(cpu.cuda(), labels.cuda(), 10, step_generator(0, 1), mixup=0.8, cutmix=1.0)
    for a, b in zip(on_cpu, on_cuda, strict=True):
        torch.testing.assert_close(a, b.cpu())
