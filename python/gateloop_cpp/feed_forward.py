"""The channel mixer."""

import torch.nn.functional as F
from torch import Tensor, nn

from gateloop_cpp._checks import expect_positive
from gateloop_cpp._projection import is_large, is_plain, project, project_activated


class FeedForward(nn.Sequential):
    """Linear(dim, dim · mult), exact GELU, Linear(dim · mult, dim): (..., dim) to (..., dim)."""

    def __init__(self, dim: int, mult: int = 4) -> None:
        expect_positive("FeedForward", dim=dim, mult=mult)
        super().__init__(nn.Linear(dim, dim * mult), nn.GELU(), nn.Linear(dim * mult, dim))

    def forward(self, x: Tensor) -> Tensor:
        expand, activation, contract = self  # GELU has no parameters
        if not (is_large(x) and is_plain(expand) and expand.bias is not None):
            return project_activated(contract, activation, project(expand, x))

        # The hidden layer is four of the fifteen arrays that a block keeps; to compute it again
        # takes a tenth of a training step.
        def hidden(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y: Tensor = activation(F.linear(x, weight, bias))
            return y

        return project_activated(contract, hidden, x, expand.weight, expand.bias)
