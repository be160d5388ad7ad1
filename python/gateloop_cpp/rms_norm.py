"""RMSNorm with the reference's floor."""

from typing import cast

import torch
from torch import Tensor, nn

from gateloop_cpp import _library as _library  # loads the operators
from gateloop_cpp._checks import expect_positive


class RMSNorm(nn.Module):
    """y = x / max(‖x‖₂, ε) · √dim · gamma over the last dimension, so that zeros give zeros.

    x (..., dim), any floating dtype, to the same shape, in the wider dtype of x and gamma. ε is the
    reference's 1e-12, and in float16, where that is zero, the least positive number, 2^-24.
    Parameter: gamma (dim), ones.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        expect_positive("RMSNorm", dim=dim)
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.gateloop.rms_norm(x, self.gamma))
