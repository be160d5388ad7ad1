"""Large outputs lie in memory that is kept for the next: no result may depend on it."""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gateloop_cpp.ops import linear_recurrence, release_unused_memory

SHAPE = (1, 20_000, 512)  # 39 MiB, above malloc's largest pool
SIZE = 40 << 20  # in large pages


@pytest.fixture(autouse=True)
def fresh_pool() -> Iterator[None]:
    release_unused_memory()
    yield
    release_unused_memory()


def sums(x: Tensor) -> Tensor:
    return linear_recurrence(torch.ones(()).expand(x.shape), x)[0]


def test_memory_is_used_again() -> None:
    x = torch.ones(SHAPE)
    first = sums(x)
    address = first.data_ptr()
    second = sums(x)
    assert second.data_ptr() != address
    row = first[:, 5]  # keeps all of it
    del first
    third = sums(x)
    assert third.data_ptr() not in (address, second.data_ptr())
    assert (row == 6).all()
    del row
    assert sums(x).data_ptr() == address
    assert (second[0, :, 0] == torch.arange(1, SHAPE[1] + 1)).all()


def test_unused_memory_goes_back() -> None:
    assert release_unused_memory() == 0
    y = sums(torch.ones(SHAPE))
    assert release_unused_memory() == 0
    del y
    assert release_unused_memory() == SIZE
    assert release_unused_memory() == 0


def test_small_outputs_are_torchs() -> None:
    y = sums(torch.ones(1, 1000, 512))
    del y
    assert release_unused_memory() == 0


def test_a_pooled_tensor_is_a_tensor() -> None:
    y = sums(torch.ones(SHAPE))
    assert y.is_contiguous() and y.device.type == "cpu" and y.data_ptr() % 64 == 0
    assert torch.equal(pickle.loads(pickle.dumps(y)), y)
    assert torch.equal(copy.deepcopy(y), y)
    shared = y.numpy()
    del y
    assert release_unused_memory() == 0  # numpy holds it
    assert shared[0, -1, 0] == SHAPE[1]
    del shared

    y = sums(torch.ones(SHAPE))
    y.resize_(2, *SHAPE[1:])  # takes another block
    assert (y[0, :, 0] == torch.arange(1, SHAPE[1] + 1)).all()
    y.resize_(3, 4)
    y.fill_(7)
    assert y.sum() == 84
    y = sums(torch.ones(SHAPE)).share_memory_()
    assert y[0, 9, 0] == 10


def test_gradients_and_inference_mode() -> None:
    x = torch.ones(SHAPE, requires_grad=True)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(sums(x).sum(), x)
        assert (gradient[0, :, 0] == torch.arange(SHAPE[1], 0, -1)).all()
    with torch.inference_mode():
        assert sums(x).is_inference()
