"""The batch size that a probe chooses."""

import pytest
import torch

from vlsm.segmentation.batch_size import Probe, choose_batch_size, cpu_batch_size


def gpu(rates, most=10**9, memory=lambda size: 0.1):
    """A GPU with a speed for each batch size, on which batches above `most` do not fit."""
    tried = []

    def measure(size):
        tried.append(size)
        if size > most:
            raise torch.OutOfMemoryError("too little memory")
        return Probe(rates(size), memory(size))

    return measure, tried


@pytest.mark.parametrize(
    ("rates", "options", "chosen", "num_tried"),
    [
        (lambda size: 100.0, {}, 8, 2),  # a larger batch is not faster
        (lambda size: min(size, 64), {}, 64, 5),
        (lambda size: size, {}, 256, 6),  # no larger one is tried
        (lambda size: size**0.05, {}, 8, 2),  # less than 5 % faster
        (lambda size: size, {"most": 40}, 32, 4),
        (lambda size: size, {"memory": lambda size: size / 100}, 64, 5),  # 128 would need more than 80 %
        (lambda size: size, {"most": 5}, 4, 2),
        (lambda size: size, {"most": 1}, 1, 4),
        (lambda size: size, {"memory": lambda size: 0.9}, 1, 4),  # it fits, though barely
    ],
)
def test_the_batch_doubles_while_it_is_faster_and_fits(rates, options, chosen, num_tried):
    measure, tried = gpu(rates, **options)
    assert choose_batch_size(measure) == chosen
    assert len(tried) == num_tried


def test_a_gpu_without_room_for_one_image_is_an_error():
    measure, _ = gpu(lambda size: size, most=0)
    with pytest.raises(torch.OutOfMemoryError):
        choose_batch_size(measure)


@pytest.mark.parametrize(("threads", "size"), [(1, 1), (2, 1), (5, 2), (64, 8)])
def test_on_cpus_a_batch_is_small(threads, size, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert cpu_batch_size() == size
