"""Bad input is refused by name: the module, the argument, what was expected and what came."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gateloop_cpp
from gateloop_cpp import CausalFullAttention, GateLoopedAttention, SimpleGateLoopLayer, Transformer
from gateloop_cpp.ops import gate_loop, linear_recurrence

X = torch.zeros(2, 5, 16)
IDS = torch.zeros(2, 5, dtype=torch.int64)
WIDE = X.unflatten(2, (4, 4))
STATE = torch.zeros(3, 16)  # of a batch of 3


def model(**options: Any) -> Transformer:
    return Transformer(16, num_tokens=8, depth=1, **options)


Bad = tuple[str, Callable[[], Any], type[Exception], str]
ATTENTION = dict(dim_head=8, heads=2)
CASES: list[Bad] = [
    ("rank", lambda: SimpleGateLoopLayer(16)(X[0]), ValueError, r"Layer: x must be \(B, T, 16\)"),
    ("width", lambda: GateLoopedAttention(8)(X), ValueError, r"x must be \(B, T, 8\), got .*16"),
    ("integers", lambda: SimpleGateLoopLayer(16)(X.long()), TypeError, r"x must be floating"),
    ("attention rank", lambda: CausalFullAttention(16)(X[0]), ValueError, r"Attention: x must be"),
    (
        "heads",
        lambda: GateLoopedAttention(16, heads=5),
        ValueError,
        r"heads must divide dim_inner, got 5",
    ),
    ("no dim", lambda: SimpleGateLoopLayer(0), ValueError, r"dim must be positive, got 0"),
    ("gate", lambda: GateLoopedAttention(16, gate="tanh"), ValueError, r"\"gate\" must be .*tanh"),  # type: ignore[arg-type]
    (
        "phase_bias",
        lambda: GateLoopedAttention(16, phase_bias=(0, 1)),
        ValueError,
        r"phase_bias needs the magnitude_phase gate, got polar",
    ),
    (
        "dim_key",
        lambda: GateLoopedAttention(16, heads=4, dim_key=6),
        ValueError,
        r"heads must divide dim_key, got 4 heads for dim_key 6",
    ),
    (
        "odd dim_head",
        lambda: CausalFullAttention(16, dim_head=7, rotary_emb=True),
        ValueError,
        r"dim_head must be even with rotary_emb, got 7",
    ),
    (
        "two scans",
        lambda: SimpleGateLoopLayer(16, use_heinsen=True, use_jax_associative_scan=True),
        ValueError,
        r"use_jax_associative_scan must be off with use_heinsen",
    ),
    (
        "cache of another batch",
        lambda: SimpleGateLoopLayer(16)(X, cache=(torch.zeros(48, 1), torch.zeros(48, 1))),
        ValueError,
        r"cache\.a must be \(B · dim, 1\) = \(32, 1\), got .*\(48, 1\)",
    ),
    ("half a cache", lambda: SimpleGateLoopLayer(16)(X, cache=(None, None)), ValueError, r"cache"),
    (
        "cache of a reversed layer",
        lambda: SimpleGateLoopLayer(16, reverse=True)(X, return_cache=True),
        ValueError,
        r"reverse must be False to use a cache",
    ),
    (
        "state of another batch",
        lambda: GateLoopedAttention(16)(X, cache=STATE),
        ValueError,
        r"cache must be \(2, 16\), got .*\(3, 16\)",
    ),
    (
        "keys of another batch",
        lambda: CausalFullAttention(16, **ATTENTION)(X, cache=(torch.zeros(3, 2, 4, 8),) * 2),  # type: ignore[arg-type]
        ValueError,
        r"cache\[0\] must be .*\(2, 2, S, 8\)",
    ),
    ("float ids", lambda: model()(X), TypeError, r"Transformer: x must be int64 or int32 ids"),
    ("ids rank", lambda: model()(IDS[0]), ValueError, r"Transformer: x must be \(B, T\)"),
    ("ids range", lambda: model()(IDS + 8), IndexError, r"x must be in \[0, 8\), got 8"),
    ("negative ids", lambda: model()(IDS - 1), IndexError, r"x must be in \[0, 8\), got -1"),
    ("loss of one", lambda: model()(IDS[:, :1], return_loss=True), ValueError, r"T >= 2"),
    ("caches", lambda: model()(IDS, cache=(None, None)), ValueError, r"cache must be one entry"),
    (
        "loss and cache",
        lambda: model()(IDS, return_loss=True, return_cache=True),
        ValueError,
        r"return_loss must be False",
    ),
    ("empty prompt", lambda: model().generate(IDS[:, :0], 3), ValueError, r"prompt must be .*T >="),
    ("length", lambda: model().generate(IDS, -1), ValueError, r"length must be zero or more"),
    ("temperature", lambda: model().generate(IDS, 1, -1.0), ValueError, r"temperature must be"),
    ("gate_loop rank", lambda: gate_loop(X[0], X, X, X), ValueError, r"gate_loop: q must be"),
    ("gate_loop k", lambda: gate_loop(X, X[:, :2], X, X), ValueError, r"gate_loop: k must be"),
    ("gate_loop v", lambda: gate_loop(X, X, X[:1], X), ValueError, r"gate_loop: v must be"),
    (
        "gate_loop wide v",
        lambda: gate_loop(WIDE, WIDE, WIDE[:, :, :1], WIDE[..., 0]),
        ValueError,
        r"gate_loop: v must be Float \(B, T, H, V\)",
    ),
    (
        "gate_loop wide a",
        lambda: gate_loop(WIDE, WIDE, WIDE, WIDE[..., :-1]),
        ValueError,
        r"gate_loop: a must be ComplexFloat or Float \(B, T, H\) or \(B, T, H, K\) where q is",
    ),
    (
        "gate_loop mix",
        lambda: gate_loop(X, X.double(), X, X),
        TypeError,
        r"k must be Float .*, got torch.DoubleTensor",
    ),
    (
        "gate_loop a",
        lambda: gate_loop(X, X, X, X.double()),
        TypeError,
        r"a must be ComplexFloat or",
    ),
    (
        "gate_loop state",
        lambda: gate_loop(X, X, X, X, STATE),
        ValueError,
        r"initial_state must be Float \[2, 16\]",
    ),
    ("integers in an op", lambda: linear_recurrence(X, X.long()), TypeError, r"x must be one of"),
]


@pytest.mark.parametrize(
    ("call", "kind", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_is_refused_by_name(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


# ---- Without jax, without a library --------------------------------------------------------------


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(gateloop_cpp.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": source, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_jax(build_dir: Path) -> None:
    code = """
import sys
sys.modules["jax"] = None
from gateloop_cpp import SimpleGateLoopLayer
SimpleGateLoopLayer(4, use_jax_associative_scan=True)
"""
    library = build_dir / "lib" / "libgateloop_ops.so"
    result = python(code, GATELOOP_OPS_LIBRARY=str(library))
    assert (
        "ImportError: SimpleGateLoopLayer: use_jax_associative_scan=True needs jax" in result.stderr
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "libgateloop_ops.so is not in"),
        ({"GATELOOP_OPS_LIBRARY": "/nowhere.so"}, "GATELOOP_OPS_LIBRARY names /nowhere.so"),
        ({"GATELOOP_OPS_LIBRARY": __file__}, "does not load with torch"),
    ],
)
def test_without_the_library(environment: dict[str, str], message: str) -> None:
    result = python("import gateloop_cpp", **environment)
    assert "ImportError: gateloop_cpp: " in result.stderr
    assert message in result.stderr
