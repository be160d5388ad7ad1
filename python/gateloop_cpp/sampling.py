"""Drawing the next token."""

import math

import torch
from torch import Tensor

from gateloop_cpp._checks import expect

_NAME = "sample"


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    filter_thres: float = 0.9,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token for each row of logits (B, num_tokens): (B,) int64.

    The likeliest (1 - filter_thres) · num_tokens tokens, at least one, share the probability in
    proportion to exp(logit / temperature); temperature 0 takes the likeliest.
    """
    expect(logits.ndim == 2, _NAME, "logits", "(B, num_tokens)", logits)
    valid = math.isfinite(temperature) and temperature >= 0
    expect(valid, _NAME, "temperature", "zero or more, and finite", temperature)
    expect(0 <= filter_thres <= 1, _NAME, "filter_thres", "in [0, 1]", filter_thres)
    if temperature == 0:
        return logits.argmax(dim=-1)
    keep = max(1, math.ceil((1 - filter_thres) * logits.shape[-1]))
    likeliest, tokens = logits.float().topk(keep, dim=-1)
    # Less the largest, so that a small temperature overflows nothing.
    scaled = (likeliest - likeliest[:, :1]) / temperature
    chosen = torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)
    return tokens.gather(-1, chosen).squeeze(-1)
