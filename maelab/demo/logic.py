"""What the demo shows, as plain functions: drawings, masks, reconstructions, attention, guesses. No web page here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from maelab import figures
from maelab.config import ComputeOptions, ValueRange
from maelab.data import ImageSet
from maelab.data.batches import scale, unscale
from maelab.data.decode import decode_upload, to_size
from maelab.data.images import find_images
from maelab.data.layout import list_images
from maelab.data.sources import NAMES, cache_dir
from maelab.errors import MaelabError, UsageError
from maelab.inference import (
    attention_maps,
    attention_rollout,
    attention_to_patches,
    class_probabilities,
    reconstruct_images,
    visible_mean_mse,
)
from maelab.model import MaskedAutoencoderViT, VisionTransformer, patchify, unpatchify
from maelab.model.masks import MaskKind, hidden_count, hide_first, hiding_order
from maelab.names import visible
from maelab.training.checkpoint import ModelSpec, load_matching_data, load_model
from maelab.training.parallel import prepare, start_engine

SIDE = 512  # longer side of an image that is kept while its page is open, pixels
EXAMPLES = 20
DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be asked."""

    name: str
    model: VisionTransformer
    spec: ModelSpec

    @property
    def rebuilds(self) -> bool:
        return isinstance(self.model, MaskedAutoencoderViT)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.spec.class_names or tuple(map(str, range(self.model.num_classes)))

    @property
    def reads_digits(self) -> bool:
        return not self.rebuilds and self.class_names == DIGITS


def load_models(runs: Sequence[str], options: ComputeOptions) -> list[Loaded]:
    """Load runs, or checkpoints, in fp32 and on the device of the options.

    Raises:
        UsageError, RunError: if one cannot be read, is a linear probe, or takes other images than grey or
            coloured ones.
    """
    engine, models = start_engine(options, "fp32"), []
    for run in runs:
        model, spec = load_model(run)
        if not isinstance(model, VisionTransformer):
            raise UsageError(f"{run} is a linear probe; demo needs autoencoders or fine-tuned classifiers")
        if model.in_chans not in (1, 3):
            raise UsageError(
                f"{run} takes images of {model.in_chans} channels, and a page shows 1 or 3; use maelab predict"
            )
        prepare(model.to(engine.device), engine, options)
        name = visible(Path(run).name)
        models.append(Loaded(name if all(m.name != name for m in models) else visible(str(run)), model, spec))
    return models


def centre_drawing(ink: np.ndarray) -> np.ndarray | None:
    """A drawing as MNIST's digits are (LeCun et al. 1998): its box scaled, its shape kept, to fit 20 x 20, and its
    centre of mass put into the middle of 28 x 28: there that is the pixel with index 14.

    Args:
        ink: uint8 (H, W), 0 where nothing is drawn.

    Returns:
        uint8 (28, 28), or None if nothing is drawn.
    """
    drawn = ink > 25  # a tenth: the soft edge of a stroke is not its box
    if not drawn.any():
        return None
    rows, columns = (np.flatnonzero(drawn.any(axis=axis)) for axis in (1, 0))
    box = Image.fromarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    ratio = 20 / max(box.size)
    width, height = (max(1, round(side * ratio)) for side in box.size)
    small = np.asarray(box.resize((width, height), Image.Resampling.BOX))
    mass = small.astype(float)
    centre = [(mass.sum(axis=1 - axis) @ (np.arange(side) + 0.5)) / mass.sum() for axis, side in enumerate(mass.shape)]
    top, left = (int(np.clip(round(14.5 - at), 0, 28 - side)) for at, side in zip(centre, small.shape, strict=True))
    field = np.zeros((28, 28), np.uint8)
    field[top : top + height, left : left + width] = small
    return field


def read_upload(content: bytes, value_range: ValueRange | None) -> Image.Image:
    """An image that someone sent, upright, RGB, and made smaller if a side exceeds 512 pixels.

    Args:
        content: of its file.
        value_range: that the model knows, for images of more than 8 bits.

    Raises:
        UsageError: if it cannot be decoded or has too many pixels.
    """
    image = decode_upload(content, value_range)
    image.thumbnail((SIDE, SIDE))
    return image


def example_images(chosen: Loaded, paths: Sequence[str], data_dir: Path | None) -> list[Image.Image]:
    """Up to 20 images to pick from: the ones named, else digits that maelab ships for a model of MNIST, else test
    images of the data that the model was trained on, if they lie on this machine. Nothing is downloaded.

    Raises:
        UsageError: if one that is named cannot be read.
    """
    if paths:
        images = []
        for path, problem in find_images(paths):
            if problem:
                raise UsageError(f"--images {path}: {problem}")
            try:
                images.append(read_upload(Path(path).read_bytes(), chosen.spec.reading.value_range))
            except (UsageError, OSError) as error:
                raise UsageError(f"--images {path}: {getattr(error, 'strerror', None) or error}") from error
            if len(images) == EXAMPLES:
                break
        return images
    data = chosen.spec.data
    if data == "mnist":
        sheet = np.asarray(Image.open(Path(__file__).with_name("digits.png")))  # (28, 20 x 28)
        return [Image.fromarray(digit) for digit in np.split(sheet, sheet.shape[1] // 28, axis=1)]
    if data.startswith("folder:"):
        root = Path(data.removeprefix("folder:")).expanduser()
        files = [str(file) for file in list_images(root)] if root.is_dir() else []
        return example_images(chosen, files[:: max(1, len(files) // EXAMPLES)], None) if files else []
    if data not in NAMES:
        return []
    try:
        test = load_matching_data(chosen.spec, None, data_dir or cache_dir() / data).test
    except MaelabError:
        return []
    assert test is not None
    rows = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:EXAMPLES]
    return [Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy()) for x in test.images[rows]]


def fit(chosen: Loaded, image: Image.Image) -> torch.Tensor:
    """The image as the model takes it, at its size, grey or coloured: uint8 (1, C, H, W), on its device."""
    model = chosen.model
    image = image.convert("L" if model.in_chans == 1 else "RGB")
    image = to_size(image, model.img_size, chosen.spec.reading.resize)
    pixels = torch.from_numpy(np.array(image)).reshape(*model.img_size, model.in_chans)
    return pixels.permute(2, 0, 1)[None].to(model.pos_embed.device)


def choose_mask(kind: MaskKind, grid: tuple[int, int], ratio: float, seed: int) -> torch.Tensor:
    """A mask (1, L) of about this share of the patches, 1 = hidden; at least one is hidden and one is not. A larger
    ratio of the same seed hides what a smaller one does, and more."""
    total = grid[0] * grid[1]
    return hide_first(hiding_order(kind, grid, 1, seed), min(max(1, hidden_count(kind, grid, ratio)), total - 1))


def parse_mask(cells: object, total: int) -> torch.Tensor:
    """The mask (1, total) that a page sends as a text of 0 and 1.

    Raises:
        UsageError: if it is none.
    """
    if not isinstance(cells, str) or len(cells) != total or cells.strip("01"):
        raise UsageError("the mask does not fit the model; reload the page")
    return torch.tensor([[float(cell) for cell in cells]])


def move_mask(mask: torch.Tensor, grid: tuple[int, int], to: tuple[int, int]) -> torch.Tensor:
    """A mask (1, L) of one grid of patches on another: hidden is what was hidden for the larger part."""
    return (F.adaptive_avg_pool2d(mask.view(1, 1, *grid), to) > 0.5).float().flatten(1)


def hide(model: VisionTransformer, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Images (1, C, H, W) in [-1, 1] with grey in the hidden places."""
    patches = patchify(x, model.patch_size) * (1 - mask.to(x.device))[:, :, None]
    return unpatchify(patches, model.patch_size, model.grid_size)


@dataclass(frozen=True)
class Rebuilt:
    """What an autoencoder makes of a masked image: pictures (C, H, W) in [-1, 1] and errors over the hidden pixels."""

    picture: torch.Tensor
    error: np.ndarray  # uint8 (H, W): square root of the absolute error, 255 = from black to white
    masked_mse: float
    visible_mean_mse: float  # of guessing the mean of the visible pixels


def rebuild(chosen: Loaded, image: Image.Image, mask: torch.Tensor) -> Rebuilt:
    """Rebuild an image's hidden patches.

    Args:
        chosen: an autoencoder.
        image: of any size.
        mask: (1, L) on the model's grid, 1 = hidden.

    Raises:
        UsageError: if every patch is hidden, or none.
    """
    if not 0 < int(mask.sum()) < mask.numel():
        raise UsageError("every patch is hidden: show one" if mask.any() else "no patch is hidden: hide one")
    assert isinstance(chosen.model, MaskedAutoencoderViT)
    x = scale(fit(chosen, image))
    _, rebuilt, error = reconstruct_images(chosen.model, x, mask)
    apart = ((rebuilt - x).abs().mean(dim=1)[0] / 2).sqrt() * 255  # (H, W); the root shows small errors too
    mean = visible_mean_mse(chosen.model, x, mask)
    return Rebuilt(rebuilt[0].cpu(), apart.round().to(torch.uint8).cpu().numpy(), error, mean)


def guess(
    chosen: Loaded, image: Image.Image, mask: torch.Tensor | None = None, top: int = 10
) -> list[tuple[str, float]]:
    """Classes and their probabilities: all in their order if there are at most `top`, else the likeliest first.

    Args:
        chosen: a classifier.
        image: of any size.
        mask: (1, L): grey is put over these patches first.
        top: how many classes.
    """
    x = fit(chosen, image)
    if mask is not None:
        x = unscale(hide(chosen.model, scale(x), mask))
    probabilities = class_probabilities(chosen.model, ImageSet(x, None))[0].tolist()
    shares = list(zip(chosen.class_names, probabilities, strict=True))
    return shares if len(shares) <= top else sorted(shares, key=lambda pair: -pair[1])[:top]


@torch.no_grad()
def look(chosen: Loaded, image: Image.Image, of: Literal["last", "rollout"] = "rollout") -> np.ndarray:
    """The image in grey below colours that tell where the encoder looks, unmasked: (3, H, W) in [-1, 1].

    Args:
        chosen: a classifier, or an autoencoder, of which the encoder is used.
        image: of any size.
        of: the last block's attention, its heads averaged, or attention rollout.
    """
    x = scale(fit(chosen, image))
    maps = attention_maps(chosen.model, x)
    attention = maps[-1].mean(dim=1) if of == "last" else attention_rollout(maps)
    return figures.overlay(x.cpu(), attention_to_patches(chosen.model, attention).cpu())[0]
