"""Rotary position embedding (Su et al. 2021)."""

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Channels 2i and 2i + 1 turn together by position · 10000^(-2i / dim_head).

    Parameter: freqs (dim_head / 2), not trained.
    """

    def __init__(self, dim_head: int) -> None:
        super().__init__()
        exponent = torch.arange(0, dim_head, 2).float() / dim_head
        self.freqs = nn.Parameter(1.0 / 10000**exponent, requires_grad=False)

    def forward(self, t: Tensor, first: int = 0) -> Tensor:
        """Turn t (B, H, T, dim_head), whose steps are first, first + 1, ...; the same dtype."""
        # Positions lose their last digits below float32.
        wide = torch.float64 if self.freqs.dtype == torch.float64 else torch.float32
        positions = torch.arange(first, first + t.shape[-2], device=t.device, dtype=wide)
        angles = positions.unsqueeze(-1) * self.freqs.to(wide)
        cos, sin = angles.cos(), angles.sin()
        x, y = t.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((x * cos - y * sin, y * cos + x * sin), dim=-1)
        return turned.flatten(-2).to(t.dtype)
