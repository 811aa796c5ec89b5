"""Training steps as CUDA graphs: the GPU takes all kernels of a step from one command, and waits for Python no more."""

from collections.abc import Callable

import torch

WARM_UP = 3  # steps before the capture, in which the optimizers make their state and libraries their workspaces

Captured = Callable[..., dict[str, torch.Tensor]]


def captured(step: Captured) -> Captured:
    """A training step that is recorded at its fourth call and replayed from then on.

    Args:
        step: (*batch) -> tensors; it reads no number back from the device, and what else it reads or writes (weights,
            optimizer state, rates in tensors) stays in place. Its random numbers are those of the default generator,
            seeded outside.

    Returns:
        The same function. Every batch has the shapes of the first. From the fourth call on, it returns the same
        tensors, overwritten by the next call.
    """
    side = torch.cuda.Stream()
    calls, graph = 0, torch.cuda.CUDAGraph()
    places: tuple[torch.Tensor, ...] = ()
    values: dict[str, torch.Tensor] = {}

    def run(*batch: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal calls, places, values
        calls += 1
        if calls <= WARM_UP:  # on another stream, as a capture asks
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                values = step(*batch)
            torch.cuda.current_stream().wait_stream(side)
            return values
        if calls == WARM_UP + 1:
            places = tuple(tensor.clone() for tensor in batch)
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                values = step(*places)
        for place, tensor in zip(places, batch, strict=True):
            place.copy_(tensor)
        graph.replay()
        return values

    return run
