"""The channel mixer."""

from torch import nn

from gateloop_cpp._checks import expect_positive


class FeedForward(nn.Sequential):
    """Linear(dim, dim · mult), exact GELU, Linear(dim · mult, dim): (..., dim) to (..., dim)."""

    def __init__(self, dim: int, mult: int = 4) -> None:
        expect_positive("FeedForward", dim=dim, mult=mult)
        super().__init__(nn.Linear(dim, dim * mult), nn.GELU(), nn.Linear(dim * mult, dim))
