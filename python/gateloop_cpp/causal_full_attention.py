"""Causal attention, over all steps or a window of them: what GateLoop replaces or helps."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateloop_cpp._checks import expect, expect_packing, expect_positive, expect_sequence
from gateloop_cpp._packing import Places, pairs_of_blocks
from gateloop_cpp.distributed import Group, steps_before
from gateloop_cpp.rotary_embedding import RotaryEmbedding
from gateloop_cpp.transition import drop_imaginary, scale_gradient, transition_of

_NAME = "CausalFullAttention"

# With a window also the number of steps so far.
KeysValues = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, int]


class CausalFullAttention(nn.Module):
    """Causal attention at quadratic cost, with h heads of dim_head channels:

        o_i = Σ_{j ≤ i} w(q_i · k_j / √dim_head) v_j      w: softmax over j, or the identity

    With data-dependent relative positions each pair of channels c of a head has a transition a_c
    of its own step; q is scaled by max(Re(a_1 ... a_c), 1e-10) and k by the inverse. The paper's
    product (arXiv 2311.01927, section 3.4) runs over the steps up to t; the reference's runs over
    the channels up to c within one step. Ours does as the reference's, so that its weights keep
    their meaning. The floor decides the result for heads wider than about 60 channels.

    Args:
        dim: channels of the input and output.
        dim_head, heads: the shape of the attention.
        rotary_emb: rotary positions on q and k.
        add_swish_gating: multiply by SiLU of a projection of x.
        data_dependent_rel_pos: see above.
        frac_gradient_data_dependent_rel_pos: the share of the gradient that reaches ``to_a``.
        softmax_normalize: default: not data_dependent_rel_pos.
        window: each step attends to itself and the window - 1 steps before it. The cost and the
            cache of a step are then bounded. Default: to all steps before it.
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int = 64,
        heads: int = 8,
        rotary_emb: bool = False,
        add_swish_gating: bool = False,
        data_dependent_rel_pos: bool = False,
        frac_gradient_data_dependent_rel_pos: float = 0.5,
        softmax_normalize: bool | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        expect(window is None or window > 0, _NAME, "window", "positive or None", window)
        expect_positive(_NAME, dim=dim, dim_head=dim_head, heads=heads)
        paired = rotary_emb or data_dependent_rel_pos
        option = "rotary_emb" if rotary_emb else "data_dependent_rel_pos"
        even = not paired or dim_head % 2 == 0
        expect(even, _NAME, "dim_head", f"even with {option}", dim_head)
        dim_inner = dim_head * heads
        split = (heads, dim_head)

        self.dim = dim
        self.window = window
        self.scale = dim_head**-0.5
        if softmax_normalize is None:
            softmax_normalize = not data_dependent_rel_pos
        self.softmax_normalize = softmax_normalize
        self.data_dependent_rel_pos = data_dependent_rel_pos
        self.frac_gradient_data_dependent_rel_pos = frac_gradient_data_dependent_rel_pos

        # The reference keeps its layers inside Sequentials, which shows in the parameter names.
        self.rotary_emb = RotaryEmbedding(dim_head) if rotary_emb else None
        self.to_qkv = nn.Sequential(
            nn.Linear(dim, dim_inner * 3, bias=False), nn.Unflatten(-1, (3, *split))
        )
        if data_dependent_rel_pos:
            self.to_a = nn.Sequential(nn.Linear(dim, dim_inner, bias=False))
        self.to_gates = (
            nn.Sequential(nn.Linear(dim, dim_inner, bias=False), nn.SiLU(), nn.Unflatten(-1, split))
            if add_swish_gating
            else None
        )
        self.to_out = nn.Sequential(nn.Flatten(2), nn.Linear(dim_inner, dim))

    def forward(
        self,
        x: Tensor,
        ablate_complex: bool = False,
        ablate_state_transition: bool = False,
        cache: KeysValues | None = None,
        return_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        time_group: Group | None = None,
    ) -> Tensor | tuple[Tensor, KeysValues]:
        """x (B, T, dim) to (B, T, dim), and with return_cache the cache that continues from here.

        Args:
            x: (B, T, dim), floating point.
            ablate_complex: drop the imaginary part of the raw transition.
            ablate_state_transition: leave the relative positions out.
            cache: the keys and values of the S steps before, each (B, heads, S, dim_head). With a
                window those of its last window - 1 steps, and the number of steps before.
            cu_seqlens, mask: packed or padded sequences, see :mod:`gateloop_cpp.ops`; without a
                cache. The outputs at padding have no meaning. With a mask a window saves nothing.
            time_group: the processes that hold a block of time each, see
                :mod:`gateloop_cpp.distributed`; with a window, whose keys and values come from the
                blocks before, and without a cache or a mask.

        Raises:
            ValueError, TypeError: for an x or a cache of another shape or dtype.
        """
        expect_sequence(_NAME, x, self.dim)
        expect_packing(_NAME, x, cu_seqlens, mask, of_block=time_group is not None)
        begin = 0
        if time_group is not None:
            self._check_sharded(cache, return_cache, mask)
            _, begin = steps_before(x[:, :0], x.shape[1], 0, group=time_group)
        places = self._places(x, cu_seqlens, mask, cache, return_cache, begin)
        q, k, v = self.to_qkv(x).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        past = begin + self._check_cache(cache, k)
        if self.rotary_emb is not None:
            positions = past if places is None else places.position
            q, k = self.rotary_emb(q, positions), self.rotary_emb(k, positions)
        if self.data_dependent_rel_pos and not ablate_state_transition:
            scale = self._relative_scale(x, ablate_complex, q)
            q, k = _scale_pairs(q, scale), _scale_pairs(k, scale.reciprocal())
        steps = past + x.shape[1]
        if cache is not None:
            k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
        if time_group is not None:
            k, v = self._with_steps_before(k, v, time_group)

        if places is None:
            out = self._attend(q, k, v)
        elif time_group is not None:
            assert cu_seqlens is not None
            before = k.shape[2] - q.shape[2]
            sequence = Places.of_packed(cu_seqlens, k.transpose(1, 2)[:1], begin - before).sequence
            out = self._attend_in_blocks(q, k, v, cast(int, self.window), sequence[0])
        else:
            out = self._attend_within(q, k, v, places, blocks=mask is None)
        out = out.transpose(1, 2)  # (B, T, H, D)
        out = self.to_out(self._gated(x, out))
        if not return_cache:
            return out
        if self.window is None:
            return out, (k, v)
        # Copies: a slice would hold the memory of all steps.
        first = k.shape[2] - min(k.shape[2], self.window - 1)
        return out, (k[:, :, first:].clone(), v[:, :, first:].clone(), steps)

    def _gated(self, x: Tensor, out: Tensor) -> Tensor:
        """out (B, T, H, D)"""
        return out if self.to_gates is None else out * self.to_gates(x)

    def _check_sharded(
        self, cache: KeysValues | None, return_cache: bool, mask: Tensor | None
    ) -> None:
        expected = "None for attention without a window: it would gather all steps"
        expect(self.window is not None, _NAME, "time_group", expected, "a group")
        expect(cache is None, _NAME, "cache", "None over a time_group", cache)
        expect(not return_cache, _NAME, "return_cache", "False over a time_group", True)
        expect(mask is None, _NAME, "mask", "None over a time_group", mask)

    def _with_steps_before(self, k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """k, v (B, H, T, D) behind those of the window - 1 steps before this block."""
        time, steps = k.shape[2], cast(int, self.window) - 1
        if steps == 0:
            return k, v
        last = torch.cat((k[:, :, -steps:], v[:, :, -steps:]), 1)
        before, _ = steps_before(last.transpose(1, 2), time, steps, group=group)
        of_keys, of_values = before.transpose(1, 2).chunk(2, 1)
        return torch.cat((of_keys, k), 2), torch.cat((of_values, v), 2)

    @staticmethod
    def _places(
        x: Tensor,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        cache: KeysValues | None,
        return_cache: bool,
        begin: int,
    ) -> Places | None:
        """Where each step stands, or None in a batch of whole sequences."""
        places = None if cu_seqlens is None else Places.of_packed(cu_seqlens, x, begin)
        if mask is not None:
            places = Places.of_padded(mask)
        if places is not None:
            expect(cache is None, _NAME, "cache", "None with cu_seqlens or mask", cache)
            expect(not return_cache, _NAME, "return_cache", "False with cu_seqlens or mask", True)
        return places

    def _check_cache(self, cache: KeysValues | None, k: Tensor) -> int:
        """The number of steps before."""
        if cache is None:
            return 0
        window = self.window
        fields = ("keys", "values") if window is None else ("keys", "values", "steps")
        whole = isinstance(cache, tuple | list) and len(cache) == len(fields)
        expect(whole, _NAME, "cache", f"({', '.join(fields)})", cache)
        dense = cache[0].ndim == 4
        steps = cache[2] if len(cache) == 3 else cache[0].shape[2] if dense else 0
        counts = isinstance(steps, int) and steps >= 0
        expect(counts, _NAME, "cache[2]", "the number of steps before", steps)
        kept = "S" if window is None else min(steps, window - 1)
        batch, heads, _, channels = k.shape
        expected = f"(B, heads, S, dim_head) = ({batch}, {heads}, {kept}, {channels})"
        shape = (batch, heads, steps if window is None else kept, channels)
        for argument, t in zip(("cache[0]", "cache[1]"), cache[:2], strict=True):
            expect(t.shape == shape, _NAME, argument, expected, t)
        return steps

    def _relative_scale(self, x: Tensor, ablate_complex: bool, q: Tensor) -> Tensor:
        """max(Re(a_1 ... a_c), 1e-10) for every pair of channels c of a head, (B, H, T, D / 2)."""
        z = scale_gradient(self.to_a(x), self.frac_gradient_data_dependent_rel_pos)
        if ablate_complex:
            z = drop_imaginary(z)
        a = transition_of(z.unflatten(-1, (q.shape[1], q.shape[3])), "polar")  # (B, T, H, D / 2)
        return a.cumprod(-1).real.clamp(min=1e-10).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, T, D), k, v (B, H, S, D) with S ≥ T: the queries are the last T of S steps."""
        time, steps = q.shape[2], k.shape[2]
        past = steps - time
        window = steps if self.window is None else self.window
        if time > window:
            return self._attend_in_blocks(q, k, v, window)
        if self.softmax_normalize and past == 0:  # and time is within the window
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        visible = torch.ones(time, steps, dtype=torch.bool, device=q.device)
        return self._weigh(q, k, v, visible.tril(past).triu(past - window + 1))

    def _attend_within(
        self, q: Tensor, k: Tensor, v: Tensor, places: Places, blocks: bool
    ) -> Tensor:
        """_attend of q, k, v (B, H, T, D) within sequences, whose steps lie together if blocks."""
        window = q.shape[2] if self.window is None else self.window
        if blocks and q.shape[2] > window:
            return self._attend_in_blocks(q, k, v, window, places.sequence[0])
        return self._weigh(q, k, v, places.visible(window).unsqueeze(1))

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """q (..., T, D), k, v (..., S, D), visible bool, broadcast to (..., T, S)."""
        if not self.softmax_normalize:
            scores = q * self.scale @ k.transpose(-2, -1)
            return scores.masked_fill(visible.logical_not(), 0) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale)

    def _attend_in_blocks(
        self, q: Tensor, k: Tensor, v: Tensor, window: int, sequence: Tensor | None = None
    ) -> Tensor:
        """_attend of more steps than the window: blocks of a window's steps read themselves and the
        block before, T · 2 window scores a head instead of T². ``sequence`` (S): that of each step,
        where there are several."""
        # Padding by nothing keeps the strides, which torch.compile has taken for contiguous.
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        time, past = q.shape[2], k.shape[2] - q.shape[2]
        blocks = -(-time // window)
        missing = blocks * window - time

        def pairs(t: Tensor) -> Tensor:
            """(B, H, blocks, 2 window, D): zeros stand for steps before the first."""
            whole = F.pad(t, (0, 0, window - past, missing)).unflatten(2, (blocks + 1, window))
            return torch.cat((whole[:, :, :-1], whole[:, :, 1:]), 3)

        queries = F.pad(q, (0, 0, 0, missing)).unflatten(2, (blocks, window))
        inside = torch.ones(window, 2 * window, dtype=torch.bool, device=q.device)
        inside = inside.triu(1).tril(window)
        real = torch.arange(2 * window, device=q.device) >= window - past
        first = torch.arange(blocks, device=q.device).view(-1, 1, 1) == 0
        visible = inside & (real | ~first)
        if sequence is not None:
            visible = visible & pairs_of_blocks(sequence, past, blocks, window)
        out = self._weigh(queries, pairs(k), pairs(v), visible)
        return out.flatten(2, 3)[:, :, :time]


def _scale_pairs(t: Tensor, factor: Tensor) -> Tensor:
    """t (..., D), factor (..., D / 2): each factor scales two neighbouring channels."""
    return (t.unflatten(-1, (-1, 2)) * factor.unsqueeze(-1)).flatten(-2).to(t.dtype)
