"""The simplified, real GateLoop as a layer of its own."""

import torch
from torch import Tensor, nn

from gateloop_cpp._adjoint import Scan
from gateloop_cpp._checks import (
    expect,
    expect_packing,
    expect_positive,
    expect_sequence,
    expect_wide,
)
from gateloop_cpp._packing import Packing
from gateloop_cpp.distributed import Group, recurrences
from gateloop_cpp.heinsen import heinsen_scan
from gateloop_cpp.ops import linear_recurrence
from gateloop_cpp.rms_norm import RMSNorm

_NAME = "SimpleGateLoopLayer"

Cache = tuple[Tensor, Tensor]


class SimpleGateLoopLayer(nn.Module):
    """h_t = σ(z_t) h_{t-1} + kv_t, y_t = q_t h_t, for q, kv, z = chunks of Linear(RMSNorm(x)).

    No residual connection. By default the gate, the recurrence and the read-out are one fused
    operator. It is the fastest and the most exact of the three scans. The other two are there
    because the reference offers them.

    Args:
        dim: channels of the input and output.
        prenorm: RMSNorm before the projection.
        use_heinsen: compute the recurrence in log space (:mod:`gateloop_cpp.heinsen`).
        use_jax_associative_scan: compute it with ``jax.lax.associative_scan``
            (:mod:`gateloop_cpp.jax_scan`); ImportError without jax.
        post_ln: LayerNorm after the read-out.
        reverse: run from the last step to the first.
    """

    def __init__(
        self,
        dim: int,
        prenorm: bool = True,
        use_heinsen: bool = False,
        use_jax_associative_scan: bool = False,
        post_ln: bool = False,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        expect_positive(_NAME, dim=dim)
        one = not (use_heinsen and use_jax_associative_scan)
        expect(one, _NAME, "use_jax_associative_scan", "off with use_heinsen", True)
        self.dim = dim
        self.reverse = reverse
        self.use_heinsen = use_heinsen
        self.use_jax = use_jax_associative_scan
        self.norm = RMSNorm(dim) if prenorm else nn.Identity()
        # The reference keeps the projection inside a Sequential, which shows in its name.
        self.to_qkva = nn.Sequential(nn.Linear(dim, dim * 3, bias=False))
        self.maybe_post_ln = nn.LayerNorm(dim) if post_ln else nn.Identity()
        self._scan = _scan(use_heinsen, use_jax_associative_scan)

    def forward(
        self,
        x: Tensor,
        cache: Cache | None = None,
        return_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        time_group: Group | None = None,
    ) -> Tensor | tuple[Tensor, Cache]:
        """x (B, T, dim) to (B, T, dim), and with return_cache the cache that continues from here.

        Args:
            x: (B, T, dim), floating point. Any number of steps, with a cache too.
            cache: (a, kv), each (B · dim, 1), the reference's layout: the product of all
                transitions so far, and the state h. float32 where x is bfloat16 or float16.
            cu_seqlens, mask: packed or padded sequences, see :mod:`gateloop_cpp.ops`; with the
                fused operator. The cache of N packed sequences is (N · dim, 1). The outputs at
                padding have no meaning.
            time_group: the processes that hold a block of time each, see
                :mod:`gateloop_cpp.distributed`; with the fused operator and without a cache.

        Raises:
            ValueError, TypeError: for an x or a cache of another shape or dtype, and for a cache
                with a reversed layer.
        """
        expect_sequence(_NAME, x, self.dim)
        if cache is not None or return_cache:
            expect(not self.reverse, _NAME, "reverse", "False to use a cache", self.reverse)
        expect_packing(_NAME, x, cu_seqlens, mask, of_block=time_group is not None)
        packing = Packing(cu_seqlens=cu_seqlens, mask=mask)
        if time_group is not None:
            carries = cache is not None or return_cache
            expect(
                not carries, _NAME, "return_cache", "False without cache over a time_group", True
            )
        for argument, given in (*packing.items(), ("time_group", time_group)):
            alone = self._scan is None or given is None
            expect(alone, _NAME, argument, "None with another scan than the fused one", given)
        self._check_cache(cache, x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        initial = None if cache is None else cache[1].view(-1, self.dim).to(wide)
        q, kv, z = self.to_qkva(self.norm(x)).chunk(3, dim=-1)
        if self._scan is None:
            scan = recurrences(time_group).simple_gate_loop
            y, final = scan(q, kv, z, initial, self.reverse, **packing)
        else:
            y, final = self._read(self._scan, q, kv, z, initial)
        y = self.maybe_post_ln(y)
        if not return_cache:
            return y
        a = _product(z.to(wide).sigmoid(), packing).view(-1, 1)
        if cache is not None:
            a = a * cache[0].to(wide)
        return y, (a, final.reshape(-1, 1))

    def _read(
        self, scan: Scan, q: Tensor, kv: Tensor, z: Tensor, initial: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The read-out around a scan without half precision, direction or initial state."""
        wide = torch.promote_types(z.dtype, torch.float32)
        a, x = z.to(wide).sigmoid(), kv.to(wide)
        if self.reverse:
            a, x = a.flip(1), x.flip(1)
        if initial is not None:
            # h_0 enters as the input of a step before the first.
            a = torch.cat((torch.ones_like(initial).unsqueeze(1), a), 1)
            x = torch.cat((initial.unsqueeze(1), x), 1)
        h = scan(a, x)
        final = h[:, -1] if h.shape[1] else torch.zeros_like(h.sum(1))
        if initial is not None:
            h = h[:, 1:]
        if self.reverse:
            h = h.flip(1)
        return (q.to(wide) * h).to(q.dtype), final

    def _check_cache(self, cache: Cache | None, batch: int) -> None:
        if cache is None:
            return
        pair = isinstance(cache, tuple | list) and len(cache) == 2
        expect(pair, _NAME, "cache", "a pair (a, kv)", cache)
        for field, tensor in zip(("a", "kv"), cache, strict=True):
            shape = (batch * self.dim, 1)
            fits = isinstance(tensor, Tensor) and tensor.shape == shape
            expect(fits, _NAME, f"cache.{field}", f"(B · dim, 1) = {shape}", tensor)
            expect_wide(_NAME, f"cache.{field}", tensor)


def _product(a: Tensor, packing: Packing) -> Tensor:
    """Over the steps of each sequence of a (B, T, D): (B, D), or (N, D) of packed ones."""
    cu_seqlens = packing["cu_seqlens"]
    if cu_seqlens is None and packing["mask"] is None:
        return a.prod(1)
    # What is left of a state of one.
    sequences = a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    one = a.new_ones(sequences, a.shape[2])
    return linear_recurrence(a, torch.zeros_like(a), one, **packing)[1]


def _scan(use_heinsen: bool, use_jax: bool) -> Scan | None:
    """The scan that the options name in place of the fused operator."""
    if use_heinsen:
        return heinsen_scan
    if use_jax:
        from gateloop_cpp.jax_scan import jax_associative_scan  # imports jax, if there is one

        return jax_associative_scan
    return None
