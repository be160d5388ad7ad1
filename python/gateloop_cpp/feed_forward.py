"""The channel mixer."""

from torch import nn

from gateloop_cpp._checks import expect_positive


def FeedForward(dim: int, mult: int = 4) -> nn.Sequential:  # noqa: N802  (the reference's name)
    """Linear(dim, dim · mult), exact GELU, Linear(dim · mult, dim): (..., dim) to (..., dim)."""
    expect_positive("FeedForward", dim=dim, mult=mult)
    return nn.Sequential(nn.Linear(dim, dim * mult), nn.GELU(), nn.Linear(dim * mult, dim))
