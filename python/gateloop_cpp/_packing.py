"""Where each step stands, in a batch of packed or padded sequences."""

from typing import NamedTuple, TypedDict

import torch
import torch.distributed as dist
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
    def of_packed(cu_seqlens: Tensor, x: Tensor, begin: int = 0) -> "Places":
        """In x (1, T, ...), on its device; where time is sharded ``begin`` steps come before x."""
        steps = torch.arange(x.shape[1], dtype=cu_seqlens.dtype, device=cu_seqlens.device) + begin
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


def next_tokens(
    x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, begin: int = 0
) -> Tensor:
    """For ids x (B, T), what follows in its sequence after each step but the last of T. Where time
    is sharded ``begin`` steps come before x.

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
        sequence = Places.of_packed(cu_seqlens, x, begin).sequence
        tokens = tokens.masked_fill(sequence[:, 1:] != sequence[:, :-1], IGNORED)
    return tokens


def next_tokens_over(
    group: dist.ProcessGroup, x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of a block x (B, T) of the ids that a group holds.

    Returns:
        What follows each step in its sequence, in this block or a later one: (B, T) int64, IGNORED
        as in next_tokens. And the number of all that is not ignored, over all blocks, ().
    """
    x = x.long()
    batch, time = x.shape
    real = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    # Of each row the first token that is no padding, if there is one; then the length.
    first = x.new_full((batch, 1), IGNORED)
    if time > 0:
        first = x.gather(1, real.int().argmax(1, keepdim=True))
        first = first.masked_fill(~real.any(1, keepdim=True), IGNORED)
    mine = torch.cat((first.flatten(), first.new_tensor([time])))
    blocks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(blocks, mine, group)
    rank = dist.get_rank(group)
    begin = sum(int(block[-1]) for block in blocks[:rank])
    following = torch.full_like(mine[:-1], IGNORED)
    for block in reversed(blocks[rank + 1 :]):
        following = torch.where(block[:-1] >= 0, block[:-1], following)
    following = following.unsqueeze(1)
    exists = following >= 0

    longer = torch.cat((x, following.clamp(min=0)), 1)
    tokens = next_tokens(
        longer, cu_seqlens, None if mask is None else torch.cat((mask, exists), 1), begin
    )
    tokens = torch.cat((tokens[:, :-1], tokens[:, -1:].masked_fill(~exists, IGNORED)), 1)
    targets = (tokens != IGNORED).sum()
    dist.all_reduce(targets, group=group)
    return tokens, targets


def pairs_of_blocks(sequence: Tensor, past: int, blocks: int, window: int) -> Tensor:
    """(blocks, window, 2 window) bool: whether a step and one of its block, or of the block before
    it, are of one sequence; of ``sequence`` (past + T), where blocks begin after the past."""
    missing = blocks * window + past - sequence.shape[0]
    padding = (window - past, missing)
    whole = F.pad(sequence, padding, value=-1).unflatten(0, (blocks + 1, window))
    keys = torch.cat((whole[:-1], whole[1:]), 1)
    return whole[1:].unsqueeze(2) == keys.unsqueeze(1)
