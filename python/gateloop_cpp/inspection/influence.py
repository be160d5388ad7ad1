"""How much of a mixer's output each of the last bytes contributes.

With S_t = a_t S_{t-1} + k_t^T v_t and y_t = q_t Re(S_t), y_t is a sum over the steps s ≤ t. The
contributions are w(t, s) v_s, weighted as surrogate attention (arXiv 2311.01927, section 3.3)

    w(t, s) = q_t · k_s Re(a_{s+1} ... a_t)        of each head; with max heads v_s is in k_s

The size of a step's contribution is its Euclidean length over all channels, and its share is

    share(t, s) = size(t, s) / Σ_{t - WINDOW < r ≤ t} size(t, r)

Attention has softmax weights in place of w.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

#: Steps that a share can go to, the last one included. Steps come in blocks of as many.
WINDOW = 128

# A step that keeps less than e^-9 of a channel counts as one that keeps as much.
_MAX_RATE = 9.0
# Steps that are computed as one product: with squares of queries, e^(_TILE · _MAX_RATE) = 2e31 is
# within float32.
_TILE = 8


def max_head_sizes(query: Tensor, key: Tensor, rate: Tensor, phase: Tensor | None) -> Tensor:
    """Sizes (T - WINDOW, WINDOW), of the steps from WINDOW on; the last column is s = t.

    query, key, rate, phase: (T, C), T a multiple of WINDOW. Squares of sizes are

        Σ_c q_t² k_s² |a_{s+1} ... a_t|² cos²(φ_{s+1} + ... + φ_t)

    with cos² x = (1 + cos 2x) / 2: each is a sum of products of a factor of t and one of s.
    """
    queries, keys = _features(query, key, phase)
    rate = rate.clamp(max=_MAX_RATE).mul_(2)
    if phase is not None:
        rate = rate.repeat(1, 3)
    squares = _decayed_products(queries, keys, rate)
    return squares.clamp_(min=0).sqrt_()


def _features(query: Tensor, key: Tensor, phase: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors (T, C), or with phases (T, 3 C), whose products are the squares without decay."""
    query, key = query.square(), key.square()
    if phase is None:
        return query, key
    # Sums of phases grow with T: in float32 they would lose 1e-3 at 1e4 radians.
    angle = (2 * phase.double().cumsum(0)).remainder(2 * torch.pi).to(phase.dtype)
    waves = torch.cat((torch.ones_like(angle), angle.cos(), angle.sin()), 1)
    return query.repeat(1, 3).mul_(waves).div_(2), waves.mul_(key.repeat(1, 3))


def _decayed_products(query: Tensor, key: Tensor, rate: Tensor) -> Tensor:
    """Σ_c query_t key_s exp(-(rate_{s+1} + ... + rate_t)) as (T - WINDOW, WINDOW).

    Pairs of a tile are one product, of factors that carry the decay to its middle. Then tiles are
    joined two by two up to WINDOW: factors carry the decay to the boundary between them, so that
    none exceeds its query or key.
    """
    steps, channels = query.shape
    tiles = rate.view(-1, _TILE, channels).cumsum(1)
    total = tiles[:, -1].clone()
    middle = total.unsqueeze(1) / 2
    of_query = (middle - tiles).exp_().mul_(query.view(-1, _TILE, channels))
    of_key = tiles.sub_(middle).exp_().mul_(key.view(-1, _TILE, channels))
    blocks = query.new_zeros(steps // WINDOW, WINDOW, 2 * WINDOW)
    inside = blocks[:, :, WINDOW:]
    # What is above the diagonal may overflow; no window reads it.
    _fill(_diagonal(inside, _TILE), _products(of_query, of_key))
    to_boundary = middle.neg_().exp_()
    of_query *= to_boundary
    of_key *= to_boundary
    size = _TILE
    while size < WINDOW:
        early, late = (t.view(-1, 2, size, channels) for t in (of_key, of_query))
        products = _products(late[:, 1], early[:, 0])
        _fill(_diagonal(inside, 2 * size)[:, size:, :size], products)
        total = total.view(-1, 2, channels)
        late[:, 1] *= (-total[:, :1]).exp()
        early[:, 0] *= (-total[:, 1:]).exp()
        total, size = total.sum(1), 2 * size
    of_query, of_key = (t.view(-1, WINDOW, channels) for t in (of_query, of_key))
    blocks[1:, :, :WINDOW] = _products(of_query[1:], of_key[:-1])
    return _windows(blocks)


def _products(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.transpose(1, 2)


def _fill(squares: Tensor, products: Tensor) -> None:
    """Products (N M, S, S) to M squares of each block, (N, S, S, M)."""
    size, count = squares.shape[1], squares.shape[-1]
    squares.copy_(products.view(-1, count, size, size).permute(0, 2, 3, 1))


def _diagonal(blocks: Tensor, size: int) -> Tensor:
    """The (size, size) squares on the diagonals of (N, WINDOW, WINDOW), the last axis over them."""
    squares = blocks.unflatten(1, (-1, size)).unflatten(3, (-1, size))
    return squares.diagonal(dim1=1, dim2=3)


def _windows(blocks: Tensor) -> Tensor:
    """Pairs (N, WINDOW, 2 WINDOW) of a block and, before it, the one before, to the windows.

    The first block is left out. Row t of a block has its window in columns t + 1 to t + WINDOW.
    """
    rows = blocks[1:]
    count = rows.shape[0]
    stride = 2 * WINDOW
    view = rows.as_strided(
        (count, WINDOW, WINDOW), (WINDOW * stride, stride + 1, 1), rows.storage_offset() + 1
    )
    return view.reshape(-1, WINDOW)


def head_sizes(
    query: Tensor, key: Tensor, value: Tensor, rate: Tensor, phase: Tensor | None
) -> Tensor:
    """Sizes of each head, (H, T - WINDOW, WINDOW), for query, key (T, H, K) and value (T, H, V)."""
    scores = _scores(query, key)  # (H, N, WINDOW, WINDOW)
    of_step = _past(rate.T)  # (H, N, 2 WINDOW), sums from the start of the block before
    sums = of_step.cumsum(-1)
    decay = (-_differences(sums)).exp()
    if phase is not None:
        decay = decay * _differences(_past(phase.T).cumsum(-1)).cos()
    return (scores * decay).abs_() * _lengths(value)


def attention_sizes(query: Tensor, key: Tensor, value: Tensor, begin: int, window: int) -> Tensor:
    """Sizes of each head as head_sizes gives them; step ``begin`` is the first of the text.

    query is scaled. ``begin`` steps of padding come first.
    """
    scores = _scores(query, key)
    count = scores.shape[1]
    # Column j of a window is WINDOW - 1 - j steps back.
    column = torch.arange(WINDOW, device=query.device)
    row = torch.arange(WINDOW, (count + 1) * WINDOW, device=query.device).view(count, WINDOW, 1)
    hidden = (column < WINDOW - window) | (row - (WINDOW - 1) + column < begin)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) * _lengths(value)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """q_t · k_s in windows: (H, N, WINDOW, WINDOW)."""
    query, key = (t.transpose(0, 1).unflatten(1, (-1, WINDOW)) for t in (query, key))
    both = torch.cat((key[:, :-1], key[:, 1:]), 2)
    return _skewed(query[:, 1:] @ both.transpose(2, 3))


def _lengths(value: Tensor) -> Tensor:
    """‖v_s‖ in windows."""
    lengths = _past(torch.linalg.vector_norm(value, dim=-1).T)
    return _skewed(lengths.unsqueeze(2).expand(-1, -1, WINDOW, -1).contiguous())


def _past(t: Tensor) -> Tensor:
    """(H, T) to (H, N, 2 WINDOW): every block but the first behind the one before it."""
    blocks = t.reshape(t.shape[0], -1, WINDOW)
    return torch.cat((blocks[:, :-1], blocks[:, 1:]), 2)


def _differences(sums: Tensor) -> Tensor:
    """sums_t - sums_s in windows, of (H, N, 2 WINDOW) whose second half holds t."""
    return _skewed(sums[:, :, WINDOW:].unsqueeze(3) - sums.unsqueeze(2))


def _skewed(pairs: Tensor) -> Tensor:
    """(H, N, WINDOW, 2 WINDOW) to its windows (H, N, WINDOW, WINDOW)."""
    pairs = pairs.contiguous()
    heads, count, rows, columns = pairs.shape
    strides = (count * rows * columns, rows * columns, columns + 1, 1)
    return pairs.as_strided((heads, count, rows, WINDOW), strides, pairs.storage_offset() + 1)


def padded(t: Tensor, steps: int) -> Tensor:
    """t (T, ...) with zeros behind it up to a multiple of ``steps``."""
    missing = -t.shape[0] % steps
    return F.pad(t, (0, 0) * (t.ndim - 1) + (0, missing)) if missing else t
