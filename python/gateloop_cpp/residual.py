"""A residual connection and its norm around a layer ``fn``."""

from typing import Any

from torch import Tensor, nn

from gateloop_cpp.rms_norm import RMSNorm


class PreNorm(nn.Module):
    """fn(RMSNorm(x)) + x; what fn returns beside its output is passed on."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = RMSNorm(dim)

    def forward(self, x: Tensor, **options: Any) -> Any:
        y = self.fn(self.norm(x), **options)
        return (y[0] + x, *y[1:]) if isinstance(y, tuple) else y + x


class PostNorm(nn.Module):
    """LayerNorm(fn(x) + x); what fn returns beside its output is passed on."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, **options: Any) -> Any:
        y = self.fn(x, **options)
        return (self.norm(y[0] + x), *y[1:]) if isinstance(y, tuple) else self.norm(y + x)
