"""Where each step stands, in a batch of packed or padded sequences."""

from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

# What torch's cross-entropy leaves out.
IGNORED = -100


class Packing(TypedDict):
    """Arguments of the scans, see gateloop_cpp.ops."""

    cu_seqlens: Tensor | None
    mask: Tensor | None


class Places(NamedTuple):
    """Of each step. Steps of padding are sequences of their own, numbered below zero."""

    sequence: Tensor  # (B, T) int64
    position: Tensor  # (B, T) int64, in its sequence

    @staticmethod
    def of_packed(cu_seqlens: Tensor, x: Tensor) -> "Places":
        """In x (1, T, ...), on its device."""
        steps = torch.arange(x.shape[1], dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens, steps, right=True) - 1
        position = steps - cu_seqlens[sequence]
        return Places(*(t.long().unsqueeze(0).to(x.device) for t in (sequence, position)))

    @staticmethod
    def of_padded(mask: Tensor) -> "Places":
        steps = torch.arange(mask.shape[1], device=mask.device)
        sequence = torch.where(mask, 0, -1 - steps)
        return Places(sequence, (mask.cumsum(1) - 1).clamp(min=0))

    def visible(self, window: int) -> Tensor:
        """(B, T, T) bool: of each step itself and the window - 1 before it in its sequence."""
        sequence, position = self
        time = sequence.shape[1]
        same = sequence.unsqueeze(2) == sequence.unsqueeze(1)
        near = position.unsqueeze(2) - position.unsqueeze(1) < window
        return same & near & same.new_ones(time, time).tril()


def next_tokens(x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> Tensor:
    """For ids x (B, T), what follows in its sequence after each step but the last of T.

    Returns:
        (B, T - 1) int64, IGNORED after padding and where nothing follows.
    """
    x = x.long()
    if mask is not None:
        time = x.shape[1]
        real = torch.arange(time, device=x.device).expand_as(x).masked_fill(~mask, time)
        following = real.flip(1).cummin(1).values.flip(1)[:, 1:]
        tokens = x.gather(1, following.clamp(max=time - 1))
        return tokens.masked_fill(~mask[:, :-1] | (following == time), IGNORED)
    tokens = x[:, 1:]
    if cu_seqlens is not None:
        sequence = Places.of_packed(cu_seqlens, x).sequence
        tokens = tokens.masked_fill(sequence[:, 1:] != sequence[:, :-1], IGNORED)
    return tokens


def pairs_of_blocks(sequence: Tensor, blocks: int, window: int) -> Tensor:
    """(blocks, window, 2 window) bool: whether a step and one of its block, or of the block before
    it, are of one sequence; of ``sequence`` (T)."""
    missing = blocks * window - sequence.shape[0]
    whole = F.pad(sequence, (window, missing), value=-1).unflatten(0, (blocks + 1, window))
    keys = torch.cat((whole[:-1], whole[1:]), 1)
    return whole[1:].unsqueeze(2) == keys.unsqueeze(1)
