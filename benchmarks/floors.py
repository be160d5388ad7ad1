"""What the machine itself allows, with the same threads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Contender, Pass


def elementwise(floats: float) -> Pass:
    """A plain pass over `floats` float32 numbers: three arrays read, one written in place. Of more
    than 512 MiB, which no cache holds, the same ones again."""
    each = max(1, round(floats / 4))
    times = -(-each // 2**25)
    q, k, v, out = (torch.ones(each // times) for _ in range(4))
    return Pass(lambda: [torch.addcmul(q, k, v, out=out) for _ in range(times)])


def products(
    rows: int, weights: Sequence[tuple[int, int]], dtype: torch.dtype, backward: bool
) -> Callable[[], None]:
    """The matrix products of linear layers alone, (out, in) each, on `rows` rows, into arrays that
    are there already; with those of the gradients of inputs and weights if `backward`."""
    inputs = {n: torch.randn(rows, n).to(dtype) for n in {n for pair in weights for n in pair}}
    outputs = {n: torch.empty_like(x) for n, x in inputs.items()}
    matrices = [torch.randn(pair).to(dtype) for pair in weights]
    gradients = [torch.empty_like(w) for w in matrices]

    def run() -> None:
        for w, dw in zip(matrices, gradients, strict=True):
            wide, narrow = w.shape
            torch.mm(inputs[narrow], w.T, out=outputs[wide])
            if backward:
                torch.mm(inputs[wide], w, out=outputs[narrow])
                torch.mm(inputs[wide].T, inputs[narrow], out=dw)

    return run


def onednn_products(
    rows: int, weights: Sequence[tuple[int, int]], backward: bool
) -> Callable[[], None]:
    """The same in float32 by torch's oneDNN, which on AMD's processors is faster than its MKL. The
    operator allocates its results, and copies for weights' gradients: some 3 % of the sum."""
    inputs = {n: torch.randn(rows, n) for n in {n for pair in weights for n in pair}}
    matrices = [torch.randn(pair) for pair in weights]

    def multiply(a: Tensor, b: Tensor) -> None:
        torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], None)

    def run() -> None:
        for w in matrices:
            wide, narrow = inputs[w.shape[0]], inputs[w.shape[1]]
            multiply(narrow, w)
            if backward:
                multiply(wide, w.T)
                multiply(wide.T, narrow.T)

    return run


def reading(floats: int, how: str) -> Callable[[], object]:
    """Reads `floats` float32 numbers once; which way is fastest depends on the machine."""
    side = 4096
    matrix = torch.ones(max(1, floats // side), side)
    vector = torch.ones(side)
    out = torch.empty(matrix.shape[0])
    flat = matrix.flatten()
    half = flat.numel() // 2
    ways: dict[str, Callable[[], object]] = {
        "matrix-vector product": lambda: torch.mv(matrix, vector, out=out),
        "dot product": lambda: torch.dot(flat[:half], flat[half : 2 * half]),
        "maximum": flat.amax,
    }
    return ways[how]


def floor(name: str, make: Callable[[Any], Mapping[str, Pass]]) -> Contender:
    return Contender(name, "floor", "floor", make)


def linear_shapes(weights: dict[str, Tensor]) -> list[tuple[int, int]]:
    """(out, in) of a model's linear layers: its matrices but the embedding."""
    return [
        (w.shape[0], w.shape[1])
        for name, w in weights.items()
        if w.ndim == 2 and not name.startswith("token_emb")
    ]
