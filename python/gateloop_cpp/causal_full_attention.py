"""Causal attention over all steps, the mixer that GateLoop replaces or helps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateloop_cpp._checks import expect, expect_positive, expect_sequence
from gateloop_cpp.rotary_embedding import RotaryEmbedding
from gateloop_cpp.transition import drop_imaginary, polar_gate, scale_gradient

_NAME = "CausalFullAttention"

KeysValues = tuple[Tensor, Tensor]


class CausalFullAttention(nn.Module):
    """Causal attention at quadratic cost, with h heads of dim_head channels:

        o_i = Σ_{j ≤ i} w(q_i · k_j / √dim_head) v_j      w: softmax over j, or the identity

    With data-dependent relative positions each pair of channels c of a head has a transition a_c
    of its own step; q is scaled by max(Re(a_1 ... a_c), 1e-10) and k by the inverse. The paper's
    product (arXiv 2311.01927, section 3.4) runs over the steps up to t; the reference's runs over
    the channels up to c within one step, and ours does as the reference's so that its weights keep
    their meaning. The floor decides the result for heads wider than about 60 channels.

    Args:
        dim: channels of the input and output.
        dim_head, heads: the shape of the attention.
        rotary_emb: rotary positions on q and k.
        add_swish_gating: multiply by SiLU of a projection of x.
        data_dependent_rel_pos: see above.
        frac_gradient_data_dependent_rel_pos: the share of the gradient that reaches ``to_a``.
        softmax_normalize: default: not data_dependent_rel_pos.
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
    ) -> None:
        super().__init__()
        expect_positive(_NAME, dim=dim, dim_head=dim_head, heads=heads)
        paired = rotary_emb or data_dependent_rel_pos
        option = "rotary_emb" if rotary_emb else "data_dependent_rel_pos"
        even = not paired or dim_head % 2 == 0
        expect(even, _NAME, "dim_head", f"even with {option}", dim_head)
        dim_inner = dim_head * heads
        split = (heads, dim_head)

        self.dim = dim
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
    ) -> Tensor | tuple[Tensor, KeysValues]:
        """x (B, T, dim) to (B, T, dim), and with return_cache the cache that continues from here.

        Args:
            x: (B, T, dim), floating point.
            ablate_complex: drop the imaginary part of the raw transition.
            ablate_state_transition: leave the relative positions out.
            cache: the keys and values of the S steps before, each (B, heads, S, dim_head).

        Raises:
            ValueError, TypeError: for an x or a cache of another shape or dtype.
        """
        expect_sequence(_NAME, x, self.dim)
        q, k, v = self.to_qkv(x).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        self._check_cache(cache, k)
        past = 0 if cache is None else cache[0].shape[2]
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(q, past), self.rotary_emb(k, past)
        if self.data_dependent_rel_pos and not ablate_state_transition:
            scale = self._relative_scale(x, ablate_complex, q)
            q, k = _scale_pairs(q, scale), _scale_pairs(k, scale.reciprocal())
        if cache is not None:
            k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)

        out = self._attend(q, k, v).transpose(1, 2)  # (B, T, H, D)
        if self.to_gates is not None:
            out = out * self.to_gates(x)
        out = self.to_out(out)
        return (out, (k, v)) if return_cache else out

    def _check_cache(self, cache: KeysValues | None, k: Tensor) -> None:
        if cache is None:
            return
        batch, heads, _, channels = k.shape
        for argument, t in zip(("cache[0]", "cache[1]"), cache, strict=True):
            fits = t.ndim == 4 and (*t.shape[:2], t.shape[3]) == (batch, heads, channels)
            shape = f"(B, heads, S, dim_head) = ({batch}, {heads}, S, {channels})"
            expect(fits and t.shape == cache[0].shape, _NAME, argument, shape, t)

    def _relative_scale(self, x: Tensor, ablate_complex: bool, q: Tensor) -> Tensor:
        """max(Re(a_1 ... a_c), 1e-10) for every pair of channels c of a head, (B, H, T, D / 2)."""
        z = scale_gradient(self.to_a(x), self.frac_gradient_data_dependent_rel_pos)
        if ablate_complex:
            z = drop_imaginary(z)
        a = polar_gate(z.unflatten(-1, (q.shape[1], q.shape[3])))  # (B, T, H, D / 2)
        return a.cumprod(-1).real.clamp(min=1e-10).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, T, D), k, v (B, H, S, D) with S ≥ T: the queries are the last T of S steps."""
        time, past = q.shape[2], k.shape[2] - q.shape[2]
        if not self.softmax_normalize:
            return (q * self.scale @ k.transpose(-2, -1)).tril(past) @ v
        if past == 0:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        visible = torch.ones(time, past + time, dtype=torch.bool, device=q.device).tril(past)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale)


def _scale_pairs(t: Tensor, factor: Tensor) -> Tensor:
    """t (..., D), factor (..., D / 2): each factor scales two neighbouring channels."""
    return (t.unflatten(-1, (-1, 2)) * factor.unsqueeze(-1)).flatten(-2).to(t.dtype)
