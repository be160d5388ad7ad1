"""Drawing the next token: the sampler of the C++ core."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gateloop_cpp import _library as _library  # loads the operators


class Sampler:
    """Draws tokens from logits; the same seed, prompt and logits draw the same as in C++.

    The rules apply in this order; at their defaults all but filter_thres change nothing.

    Args:
        repetition_penalty: at least 1. The logits of tokens read or drawn before are divided by it
            where positive, else multiplied (Keskar et al. 2019, section 4.1).
        temperature: divides the logits; 0 takes the likeliest token.
        filter_thres: in [0, 1]: only the ceil((1 - filter_thres) · num_tokens) likeliest tokens,
            and at least one, can be drawn.
        top_k: only so many of the likeliest; 0: all.
        top_p: in (0, 1]: the likeliest that together have this probability (Holtzman et al. 2020).
        min_p: in [0, 1]: those at least this times as probable as the likeliest.
        stop: a sequence ends after the first of these token sequences that it ends in.
        seed: in [-2^63, 2^63); default: drawn from ``generator``, or else from torch's.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    #: What a sequence that has ended draws.
    ENDED = -1

    def __init__(
        self,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[Sequence[int]] = (),
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if seed is None:
            device = "cpu" if generator is None else generator.device
            seed = int(torch.randint(2**62, (), generator=generator, device=device))
        stops = [[int(token) for token in tokens] for tokens in stop]
        self._sampler: Any = torch.classes.gateloop.Sampler(
            repetition_penalty, temperature, filter_thres, top_k, top_p, min_p, stops, seed
        )

    def read(self, ids: Tensor, cu_seqlens: Tensor | None = None) -> None:
        """Tokens (B, T) that count as read by the repetition penalty.

        With cu_seqlens (N + 1) they are (1, T), of N sequences packed one after another.
        """
        self._sampler.read(ids.cpu(), None if cu_seqlens is None else cu_seqlens.cpu())

    def draw(self, logits: Tensor) -> Tensor:
        """Logits (B, num_tokens) to tokens (B,) int64 on the CPU, ENDED in sequences that ended.

        RuntimeError where a row's largest logit is not finite.
        """
        return torch.as_tensor(self._sampler.draw(logits))

    def ended(self) -> bool:
        """Whether every sequence has ended in a stop."""
        return bool(self._sampler.ended())
