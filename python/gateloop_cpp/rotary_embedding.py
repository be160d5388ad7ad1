"""Rotary position embedding (Su et al. 2021)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Channels 2i and 2i + 1 turn together by position · 10000^(-2i / dim_head).

    Parameter: freqs (dim_head / 2), not trained, float32 or wider. In a model of bfloat16 or
    float16 it stays float32, because position 300 multiplies its rounding by 300. Mixed
    precision as FSDP2's may still round it: a frequency that is the rounding of the one above is
    replaced by that.
    """

    def __init__(self, dim_head: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(_frequencies(dim_head), requires_grad=False)

    def forward(self, t: Tensor, first: int | Tensor = 0) -> Tensor:
        """Turn t (B, H, T, dim_head), whose steps are first, first + 1, ...; the same dtype.

        ``first`` may be the position of every step instead, (B, T) or (1, T).
        """
        if isinstance(first, Tensor):
            positions = first.unsqueeze(1)
        else:
            positions = torch.arange(first, first + t.shape[-2], device=t.device)
        freqs: Tensor = self.freqs
        if freqs.dtype in (torch.bfloat16, torch.float16):
            exact = _frequencies(t.shape[-1], t.device)
            freqs = torch.where(exact.to(freqs.dtype) == freqs, exact, freqs.float())
        angles = positions.unsqueeze(-1) * freqs
        cos, sin = angles.cos(), angles.sin()
        x, y = t.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((x * cos - y * sin, y * cos + x * sin), dim=-1)
        return turned.flatten(-2).to(t.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What ``to``, ``half`` and their like call with a function of each parameter."""

        def at_least_float32(t: Tensor) -> Tensor:
            moved = fn(t)
            wide = torch.promote_types(moved.dtype, torch.float32)
            return moved if moved.dtype == wide else t.to(moved.device, wide)

        return super()._apply(at_least_float32, recurse)  # type: ignore[no-untyped-call]


def _frequencies(dim_head: int, device: torch.device | None = None) -> Tensor:
    """(dim_head / 2), float32."""
    exponent = torch.arange(0, dim_head, 2, device=device).float() / dim_head
    return 1.0 / 10000**exponent
