"""Which images make up a training step, as a pure function of (seed, step): nothing has to be saved to resume."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch

from maelab.data.sets import ImageSet, UnreadImages
from maelab.errors import UsageError, out_of_memory
from maelab.progress import heartbeat

T = TypeVar("T")
_ORDER, _STEP, _MODEL = 0, 1, 2  # keep the streams apart


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches in a pass over `n` images: an incomplete last batch is left out, unless it is the only one."""
    if n < 1:
        raise UsageError("there are no images to train on")
    return max(1, n // batch_size)


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """The order in which an epoch visits `n` images: a seeded permutation, int64 (n,). Cached: do not write to it."""
    return torch.randperm(n, generator=_generator(_ORDER, seed, epoch, "cpu"))


def batch_index(n: int, batch_size: int, seed: int, step: int) -> torch.Tensor:
    """Positions of the images of a training step, all processes together.

    Args:
        n: images in the training set.
        batch_size: images per step, over all processes.
        step: steps since the start of the run, counted from 0 and on through the epochs.

    Returns:
        int64 (B,), B = min(n, batch_size).
    """
    epoch, position = divmod(step, steps_per_epoch(n, batch_size))
    return epoch_order(n, seed, epoch)[position * batch_size : (position + 1) * batch_size].clone()


def expect_batch(data: ImageSet, batch_size: int, seed: int, step: int, part: int, parts: int) -> None:
    """Begin to read the images of a part of a training step, where they are not in memory."""
    images: Any = data.images
    if isinstance(images, UnreadImages):
        images.expect(rank_slice(batch_index(len(data), batch_size, seed, step), part, parts))


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of a training step: the same for the same (seed, step), unrelated for any other."""
    return _generator(_STEP, seed, step, device)


def _generator(stream: int, seed: int, count: int, device: torch.device | str) -> torch.Generator:
    # SeedSequence hashes: neighbouring seeds and steps give unrelated states. The CPU generator uses 32 bits of it.
    state = np.random.SeedSequence((seed, count), spawn_key=(stream,)).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))


def rank_slice(x: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """Part `rank` of a global batch cut into `world` equal, contiguous parts along its first dimension.

    Accumulation cuts further: part `rank * accumulate + i` of `world * accumulate`.

    Raises:
        UsageError: the parts would not be equal, and their mean losses would not average to that of the batch.
    """
    size, rest = divmod(len(x), world)
    if rest:
        raise UsageError(
            f"a batch of {len(x)} images cannot be cut into {world} equal parts: choose a batch size"
            f" (at most the number of training images) that {world} divides"
        )
    return x[rank * size : (rank + 1) * size]


def scale(images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to the model's scale, float32 in [-1, 1]; any shape."""
    return images.to(torch.float32).div_(127.5).sub_(1.0)


def unscale(images: torch.Tensor) -> torch.Tensor:
    """The inverse of `scale`: the nearest uint8 pixels; what lies outside [-1, 1] is clipped."""
    return images.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor where it is used, sent without waiting: from pinned memory, which alone a GPU fetches by itself."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def in_batches(function: Callable[[torch.Tensor], T], data: ImageSet, batch_size: int) -> Iterator[T]:
    """What a function makes of all images in order, a batch at a time, an incomplete last one included.

    Where memory runs out, batches are halved from there on: a model that was trained in small batches is evaluated too.

    Args:
        function: of float32 (B, C, H, W) in [-1, 1], on the device of the data.
        data: the images.
        batch_size: how many at a time, at most.
    """
    start, beat = 0, heartbeat("judging images", len(data), first=5.0)
    while start < len(data):
        batch_size = min(batch_size, len(data) - start)
        try:
            result = function(scale(data.images[start : start + batch_size]))
        except (MemoryError, RuntimeError) as error:
            if batch_size == 1 or not out_of_memory(error):
                raise
            batch_size = -(-batch_size // 2)
            continue  # behind this block, so that what the failure holds is free
        start += batch_size
        beat(start)
        yield result


def part_seed(seed: int, step: int, part: int) -> int:
    """Seed for what a model draws by itself (drop path) in one part of a training step."""
    return int(np.random.SeedSequence((seed, step, part), spawn_key=(_MODEL,)).generate_state(1)[0])


def knows_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; that of Apple does not."""
    return device.type in ("cpu", "cuda")
