"""Random variations of a whole batch at once, on the device that holds the images.

Every function is pure. Random parameters are drawn for the global batch and computed there, before a process takes
its part of them: the parts are bit for bit those of one process. They come from the generator's own device; with a
CPU generator a GPU is never waited for, and CPU and GPU runs see the same variations. Pixels stay uint8, as in
Pillow, until the last step brings them to [-1, 1]. Whatever moves in from outside an image is black.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from maelab.config import Augment
from maelab.data.batches import knows_float64, rank_slice, scale, to_device

__all__ = ["Augment", "augment", "mix"]


def augment(
    images: torch.Tensor,
    index: torch.Tensor,
    cfg: Augment,
    generator: torch.Generator,
    rank: int = 0,
    world: int = 1,
) -> torch.Tensor:
    """The images of a training step, varied.

    Args:
        images: uint8 (N, C, H, W), the training set on the training device.
        index: int64 (B,), the global batch's positions in it.
        cfg: which variations; with all off the result is `scale(images[index])`.
        generator: `step_generator(seed, step)`, anew for each part; advanced by the parameters of the whole batch.
        rank, world: the part to make, see `rank_slice`.

    Returns:
        float32 (B / world, C, H, W) in [-1, 1].
    """
    B, (H, W) = len(index), images.shape[-2:]

    def draw(columns: int) -> torch.Tensor:  # (B, columns), uniform in [0, 1)
        return torch.rand(B, columns, generator=generator, device=generator.device)

    def part(parameters: torch.Tensor) -> torch.Tensor:
        return to_device(rank_slice(parameters, rank, world), images.device)

    x = images[part(index)]  # (b, C, H, W), b = B / world
    if cfg.crop_padding:
        offset = (draw(2) * (2 * cfg.crop_padding + 1)).long()  # (B, 2): top, left
        x = _shifted_crop(x, cfg.crop_padding, part(offset))
    if cfg.flip:
        x = torch.where(part(draw(1) < 0.5)[..., None, None], x.flip(-1), x)
    affine = cfg.crop_scale < 1 or cfg.affine_degrees or cfg.affine_scale or cfg.affine_shear or cfg.affine_translate
    if affine or cfg.elastic:
        matrix = part(_crop_and_affine(draw, H, W, cfg))
        displacement = None
        if cfg.elastic:
            nodes = torch.randn(B, 2, _NODES, _NODES, generator=generator, device=generator.device)
            displacement = _displacement(part(nodes), H, W, cfg.elastic)
        x = _warp(x, matrix, displacement)
    if cfg.color_jitter:
        factors = part((1 + cfg.color_jitter * (2 * draw(3) - 1)).clamp(min=0))  # (b, 3)
        x = color(contrast(brightness(x, factors[:, 0]), factors[:, 1]), factors[:, 2])
    for _ in range(cfg.rand_augment_ops):
        jitter = torch.randn(B, generator=generator, device=generator.device)
        strength = ((cfg.rand_augment_magnitude + 0.5 * jitter) / 10).clamp(0, 1)  # timm's mstd 0.5
        x = _rand_augment_op(x, draw(2), strength, rank, world)
    x = scale(x)
    if cfg.random_erasing:
        x = x.masked_fill(_box(part(_erased(draw(5), H, W, cfg.random_erasing)), H, W), 0.0)  # mid-grey
    return x


def mix(
    images: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    generator: torch.Generator,
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    label_smoothing: float = 0.0,
    rank: int = 0,
    world: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899) and label smoothing (arXiv 1512.00567, section 7).

    Each image draws its own share and box; with both on, each image takes either with probability 1/2. Partners are
    neighbours (0 and 1, 2 and 3, ...), random because the order is, so that a process finds them in its own part; the
    last image of an odd part stays as it is.

    Args:
        images: (b, C, H, W), part `rank` of `world` of the global batch.
        labels: int64 (b,).
        generator: the one that made the images; advanced by the parameters of the whole batch.
        mixup, cutmix: alpha of Beta(alpha, alpha); 0 is off.
        label_smoothing: share of the target spread evenly over all classes.

    Returns:
        images (b, C, H, W), and targets (b, num_classes), float32: probabilities, for `F.cross_entropy`.
    """
    b, _, H, W = images.shape
    targets = F.one_hot(labels, num_classes).float() * (1 - label_smoothing) + label_smoothing / num_classes
    if not (mixup or cutmix):
        return images, targets
    B = b * world
    # torch draws no beta distribution from a given generator; numpy does.
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
    share = rng.beta(mixup, mixup, B) if mixup else np.ones(B)  # (B,): of the image itself
    blend = share  # (B,): the same, outside the box
    boxes = np.zeros((B, 4), dtype=np.int64)  # top, bottom, left, right of what comes from the partner
    if cutmix:
        cut = rng.random(B) < 0.5 if mixup else np.ones(B, dtype=bool)
        side = np.sqrt(1 - rng.beta(cutmix, cutmix, B))  # of the box, relative to the image's
        half = (np.array([[H], [W]]) * side).astype(np.int64) // 2  # (2, B)
        centre = rng.integers([[H], [W]], size=(2, B))
        low, high = np.maximum(centre - half, 0), np.minimum(centre + half, [[H], [W]])
        boxes = np.where(cut, [low[0], high[0], low[1], high[1]], 0).T
        share = np.where(cut, 1 - (high - low).prod(axis=0) / (H * W), share)  # the real area, cut at the edges
        blend = np.where(cut, 1, blend)

    def part(parameters: np.ndarray) -> torch.Tensor:
        return to_device(rank_slice(torch.from_numpy(parameters), rank, world), images.device)

    lam = part(share.astype(np.float32))[:, None]  # (b, 1)
    keep = part(blend.astype(np.float32))[:, None, None, None]
    keep = torch.where(_box(part(boxes), H, W), 0, keep)  # (b, 1, H, W)
    partner = torch.arange(b, device=images.device) ^ 1
    partner = torch.where(partner < b, partner, b - 1)
    return images * keep + images[partner] * (1 - keep), targets * lam + targets[partner] * (1 - lam)


# --- geometry -------------------------------------------------------------------------------------------------------


def _shifted_crop(x: torch.Tensor, padding: int, offset: torch.Tensor) -> torch.Tensor:
    """Pad with black and cut (H, W) out again, at `offset` (b, 2): top, left in 0 .. 2 * padding."""
    H, W = x.shape[-2:]
    windows = F.pad(x, (padding,) * 4).unfold(2, H, 1).unfold(3, W, 1)  # a view, (b, C, tops, lefts, H, W)
    return windows[torch.arange(len(x), device=x.device), :, offset[:, 0], offset[:, 1]]


def _matrix(angle: torch.Tensor, shear_x: torch.Tensor, shear_y: torch.Tensor) -> torch.Tensor:
    """Rotation (radians, counter-clockwise) times shear, (B,) each -> (B, 2, 2), from output to input positions."""
    cos, sin = angle.cos(), angle.sin()
    rows = [cos - sin * shear_y, cos * shear_x - sin, sin + cos * shear_y, sin * shear_x + cos]
    return torch.stack(rows, dim=1).unflatten(1, (2, 2))


def _crop_and_affine(draw: Callable[[int], torch.Tensor], H: int, W: int, cfg: Augment) -> torch.Tensor:
    """Random affine map, then random resized crop (Szegedy et al. 2014, arXiv 1409.4842): (B, 2, 3) for `_warp`."""
    u, v = draw(4), 2 * draw(5) - 1
    size = torch.tensor([W, H], device=u.device)
    area = cfg.crop_scale + (1 - cfg.crop_scale) * u[:, 0]
    aspect = torch.exp((2 * u[:, 1] - 1) * math.log(4 / 3) * (cfg.crop_scale < 1))
    zoom = torch.stack([area * aspect, area / aspect], dim=1).sqrt().clamp(max=1)  # (B, 2): crop / image, x and y
    shift = (u[:, 2:] - 0.5) * (1 - zoom) * size  # (B, 2): the crop's centre, pixels from the image's
    shear = torch.tan(v[:, 1] * math.radians(cfg.affine_shear))
    matrix = _matrix(v[:, 0] * math.radians(cfg.affine_degrees), shear, torch.zeros_like(shear))
    matrix = matrix / (1 + v[:, 2] * cfg.affine_scale)[:, None, None]
    shift = (matrix * shift[:, None, :]).sum(-1) + v[:, 3:] * cfg.affine_translate * size
    return torch.cat([matrix * zoom[:, None, :], shift[..., None]], dim=-1)


_NODES = 14  # a side; a smoothed field needs two nodes for each distance over which it was smoothed, and no more


def _displacement(nodes: torch.Tensor, H: int, W: int, amount: float) -> torch.Tensor:
    """Elastic distortion (Simard et al. 2003, "Best practices for convolutional neural networks applied to visual
    document analysis", section 2): random fields, smoothed by a Gaussian whose sigma is a seventh of the side.

    Args:
        nodes: (b, 2, _NODES, _NODES), normal; x and y.
        H, W: of the images.
        amount: standard deviation of the result at every pixel, as a share of W and H.

    Returns:
        (b, H, W, 2): x and y in `grid_sample`'s units, in which a side is 2.
    """

    def smoother(side: int) -> torch.Tensor:  # (side, _NODES); rows of norm 1 keep the variance, at the edges too
        pixels = (torch.arange(side, device=nodes.device) + 0.5) / side
        centres = (torch.arange(_NODES, device=nodes.device) + 0.5) / _NODES
        return F.normalize(torch.exp(-0.5 * (7 * (pixels[:, None] - centres)) ** 2), dim=1)

    return (2 * amount * (smoother(H) @ nodes @ smoother(W).T)).permute(0, 2, 3, 1)


def _warp(x: torch.Tensor, matrix: torch.Tensor, displacement: torch.Tensor | None = None) -> torch.Tensor:
    """Resample bilinearly, uint8 (b, C, H, W). `matrix` (b, 2, 3) takes a pixel of the result, (x, y, 1) in pixels
    from the centre, to where in `x` to read it, and `displacement` (b, H, W, 2) goes on from there. Reads beyond the
    outer edges give black, as in Pillow."""
    H, W = x.shape[-2:]
    column = torch.arange(W, device=x.device) - (W - 1) / 2
    row = torch.arange(H, device=x.device) - (H - 1) / 2
    # In grid_sample's units, the half sides; (b, 1, 1, 2, 3). A tensor made of (W, H) here would wait for a GPU.
    m = torch.stack([matrix[:, 0] * (2 / W), matrix[:, 1] * (2 / H)], dim=1)[:, None, None]
    grid = m[..., 0] * column[:, None] + (m[..., 1] * row[:, None, None] + m[..., 2])  # (b, H, W, 2)
    if displacement is not None:
        grid = grid + displacement
    read = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = (grid.abs() <= 1).all(-1)[:, None]
    return (read.round_() * inside).to(torch.uint8)


def _box(edges: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """Boxes as masks: top, bottom, left, right (b, 4) in pixels, bottom and right excluded -> bool (b, 1, H, W)."""
    top, bottom, left, right = edges[:, :, None].unbind(1)  # (b, 1) each
    row, column = torch.arange(H, device=edges.device), torch.arange(W, device=edges.device)
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)  # (b, H), (b, W)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _erased(u: torch.Tensor, H: int, W: int, probability: float) -> torch.Tensor:
    """Random erasing (Zhong et al. 2017, arXiv 1708.04896, algorithm 1): boxes to erase, (B, 4) for `_box`.

    The area is 0.02 to 1/3 of the image's, the aspect ratio 0.3 to 1 / 0.3; a side longer than the image's is cut.
    """
    area = (0.02 + (1 / 3 - 0.02) * u[:, 0]) * H * W
    aspect = torch.exp((2 * u[:, 1] - 1) * math.log(1 / 0.3))
    height = (area * aspect).sqrt().round().clamp(1, H)
    width = (area / aspect).sqrt().round().clamp(1, W)
    top, left = (u[:, 2] * (H - height + 1)).floor(), (u[:, 3] * (W - width + 1)).floor()
    bottom = torch.where(u[:, 4] < probability, top + height, top)
    return torch.stack([top, bottom, left, left + width], dim=1)


# --- RandAugment ----------------------------------------------------------------------------------------------------


def _rand_augment_op(x: torch.Tensor, u: torch.Tensor, strength: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """RandAugment (Cubuk et al. 2019, arXiv 1909.13719): one operation per image, done with probability 1/2 as in timm.

    Ranges at full strength: rotation 30 degrees, shear 0.3, shift 0.45 of the side, factors 1 +- 0.9, 4 bits left.

    Args:
        x: uint8 (b, C, H, W), part `rank` of `world`.
        u: (B, 2), uniform in [0, 1): which operation, and the sign.
        strength: (B,) in [0, 1].
    """
    H, W = x.shape[-2:]
    op = (u[:, 0] * 2 * (_GEOMETRIC + len(_COLOUR))).long()  # the upper half does nothing
    signed = torch.where(u[:, 1] < 0.5, -strength, strength)
    move = signed[:, None] * (op[:, None] == torch.arange(_GEOMETRIC, device=op.device))  # (B, 5), one column is not 0
    matrix = _matrix(move[:, 0] * math.radians(30), 0.3 * move[:, 1], 0.3 * move[:, 2])
    shift = 0.45 * move[:, 3:] * torch.tensor([W, H], device=op.device)
    matrix = torch.cat([matrix, shift[..., None]], dim=-1)  # (B, 2, 3)

    op, signed, matrix = (rank_slice(v, rank, world) for v in (op, signed, matrix))
    x = x.clone()
    chosen = [op < _GEOMETRIC, *(op == _GEOMETRIC + i for i in range(len(_COLOUR)))]
    for i, mask in enumerate(chosen):
        at = mask.nonzero()[:, 0]
        if len(at) == 0:
            continue
        parameter = to_device((matrix if i == 0 else signed)[at], x.device)
        at = to_device(at, x.device)
        x[at] = _warp(x[at], parameter) if i == 0 else _COLOUR[i - 1](x[at], parameter)
    return x


_GEOMETRIC = 5  # rotate, shear x, shear y, shift x, shift y
# (images, strength in [-1, 1]) -> images
_COLOUR: tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...] = (
    lambda x, s: brightness(x, 1 + 0.9 * s),
    lambda x, s: contrast(x, 1 + 0.9 * s),
    lambda x, s: color(x, 1 + 0.9 * s),
    lambda x, s: sharpness(x, 1 + 0.9 * s),
    lambda x, s: posterize(x, 8 - (4 * s.abs()).round().long()),
    lambda x, s: solarize(x, (256 * (1 - s.abs())).long()),
    lambda x, s: autocontrast(x),
    lambda x, s: equalize(x),
    lambda x, s: 255 - x,
)


# --- colour: uint8 (b, C, H, W) and one parameter per image (b,) -> uint8, as Pillow's ImageEnhance, ImageOps ------


def brightness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with black."""
    return _blend(torch.zeros(1, device=x.device), x, factor)


def contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with the mean grey."""
    total = _gray(x).long().sum(dim=(1, 2, 3), keepdim=True)  # of integers: no order of addition shows
    n = x[0, 0].numel()
    return _blend(((total + n // 2) // n).float(), x, factor)  # rounded, a half upwards


def color(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with the image in grey; nothing happens to one channel."""
    return x if x.shape[1] == 1 else _blend(_gray(x).float(), x, factor)


def sharpness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with the image smoothed by a 3 x 3 kernel of ones with 5 in the middle; the outermost pixels stay."""
    smooth = x.float()
    if min(x.shape[-2:]) >= 3:
        inner = smooth[..., 1:-1, 1:-1]
        box = F.avg_pool2d(smooth, kernel_size=3, stride=1, divisor_override=1)
        inner.copy_(((box + 4 * inner) / 13 + 0.5).floor())
    return _blend(smooth, x, factor)


def posterize(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Keep the highest `bits` of each pixel, int64 in 0 to 8."""
    return x & (256 - (1 << (8 - bits))).to(torch.uint8)[:, None, None, None]


def solarize(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Invert the pixels that are at or above `threshold`."""
    return torch.where(x < threshold[:, None, None, None], x, 255 - x)


def autocontrast(x: torch.Tensor) -> torch.Tensor:
    """Stretch each channel to 0 .. 255; a flat channel stays."""
    flat = x.flatten(0, 1).flatten(1)  # (b * C, H * W)
    low, high = flat.amin(dim=1, keepdim=True), flat.amax(dim=1, keepdim=True)
    if not knows_float64(x.device):
        low, high = low.cpu(), high.cpu()
    low, high = low.double(), high.double()
    gain = torch.full_like(low, 255) / (high - low).clamp(min=1)  # 255 / x would multiply by a rounded 1 / x
    levels = torch.arange(256, dtype=torch.float64, device=low.device)
    table = torch.where(high > low, (levels * gain - low * gain).clamp(0, 255), levels).to(torch.uint8)  # (b * C, 256)
    return table.to(x.device).gather(1, flat.long()).view_as(x)


def equalize(x: torch.Tensor) -> torch.Tensor:
    """Spread the histogram of each channel evenly; a channel of too few pixels or one value stays."""
    flat = x.flatten(0, 1).flatten(1).long()  # (b * C, H * W)
    count = flat.new_zeros(len(flat), 256).scatter_add_(1, flat, torch.ones_like(flat))
    step = (flat.shape[1] - count.gather(1, flat.amax(dim=1, keepdim=True))) // 255  # the brightest are left out
    below = count.cumsum(1) - count
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(1, flat), flat).to(torch.uint8).view_as(x)


def _gray(x: torch.Tensor) -> torch.Tensor:
    """Luma (ITU-R BT.601) of three channels in Pillow's integer arithmetic, else the mean channel: (b, 1, H, W)."""
    if x.shape[1] != 3:
        return x.float().mean(dim=1, keepdim=True).round()
    r, g, b = x.int().unbind(1)
    return ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16)[:, None]


def _blend(degenerate: torch.Tensor, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """degenerate + factor * (x - degenerate), clipped and truncated."""
    return (degenerate + factor[:, None, None, None] * (x - degenerate)).clamp_(0, 255).to(torch.uint8)
