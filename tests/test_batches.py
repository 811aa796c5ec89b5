import pytest
import torch

from maelab.data import ImageSet
from maelab.data.batches import (
    batch_index,
    epoch_order,
    in_batches,
    rank_slice,
    scale,
    step_generator,
    steps_per_epoch,
    unscale,
)
from maelab.errors import UsageError


def test_an_epoch_visits_each_image_once_and_differently_each_time():
    orders = [epoch_order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(100))
    assert len({tuple(order.tolist()) for order in orders}) == 4
    epoch_order.cache_clear()
    assert torch.equal(epoch_order(100, 0, 0), orders[0])


def test_steps_walk_through_the_epochs():
    assert (steps_per_epoch(10, 3), steps_per_epoch(9, 3), steps_per_epoch(2, 3)) == (3, 3, 1)
    for step in range(7):
        epoch, position = divmod(step, 3)
        expected = epoch_order(10, 5, epoch)[3 * position : 3 * position + 3]
        assert torch.equal(batch_index(10, 3, 5, step), expected)


def test_fewer_images_than_a_batch_make_one_whole_batch():
    assert torch.equal(batch_index(5, 8, 0, 3).sort().values, torch.arange(5))


def test_a_batch_may_be_written_to_without_changing_the_epoch():
    before = batch_index(10, 5, 0, 0)
    batch_index(10, 5, 0, 0).zero_()
    assert torch.equal(batch_index(10, 5, 0, 0), before)


def test_no_images_is_an_error():
    with pytest.raises(UsageError, match="no images"):
        steps_per_epoch(0, 8)


def test_step_generators_are_stateless_and_unrelated():
    def first(seed: int, step: int) -> float:
        return torch.rand((), generator=step_generator(seed, step), dtype=torch.float64).item()

    assert first(3, 4) == first(3, 4)
    values = torch.tensor([[first(seed, step) for step in range(40)] for seed in range(40)])
    assert values.unique().numel() == 1600
    assert abs(values.mean() - 0.5) < 0.03  # 4 standard deviations of 1600 uniform numbers
    assert torch.corrcoef(torch.stack([values[:, :-1].flatten(), values[:, 1:].flatten()]))[0, 1].abs() < 0.1


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    batch_index(50, 10, 0, 2)
    torch.rand(3, generator=step_generator(0, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_rank_slices_join_to_the_whole():
    x = torch.arange(24).view(12, 2)
    assert torch.equal(torch.cat([rank_slice(x, rank, 3) for rank in range(3)]), x)
    parts = [rank_slice(rank_slice(x, rank, 2), i, 3) for rank in range(2) for i in range(3)]
    assert all(torch.equal(part, rank_slice(x, k, 6)) for k, part in enumerate(parts))


def test_unequal_parts_are_an_error():
    with pytest.raises(UsageError, match="10 images cannot be cut into 4"):
        rank_slice(torch.zeros(10), 0, 4)


def test_scale_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    scaled = scale(pixels)
    assert scaled.dtype == torch.float32 and scaled.min() == -1 and scaled.max() == 1
    assert torch.equal(scaled, pixels.float() / 127.5 - 1)
    assert torch.equal(unscale(scaled), pixels)
    assert unscale(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_batches_are_in_order_and_complete():
    images = torch.randint(256, (7, 1, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batches = list(in_batches(lambda x: x, ImageSet(images, None), 3))
    assert [len(x) for x in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), scale(images))


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
     RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried")],
)  # fmt: skip
def test_batches_are_halved_where_memory_runs_out(error):
    images, tried = torch.arange(11, dtype=torch.uint8).view(11, 1, 1, 1), []

    def function(x: torch.Tensor) -> torch.Tensor:
        tried.append(len(x))
        if len(x) > 3:
            raise error
        return x

    assert torch.equal(torch.cat(list(in_batches(function, ImageSet(images, None), 9))), scale(images))
    assert tried == [9, 5, 3, 3, 3, 2]
    with pytest.raises(type(error)):
        next(in_batches(lambda x: function(x.repeat(4, 1, 1, 1)), ImageSet(images, None), 9))
    with pytest.raises(RuntimeError, match="shapes"):
        next(in_batches(lambda x: x @ torch.ones(3, 2), ImageSet(images, None), 9))
