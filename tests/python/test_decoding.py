"""A sequence cut anywhere and carried through the cache gives what one call gives."""

from typing import Any

import pytest
import torch
from parity import peer
from torch import Tensor, nn

import gateloop_cpp
from gateloop_cpp import CausalFullAttention, GateLoopedAttention, SimpleGateLoopLayer, Transformer
from gateloop_cpp.sampling import Sampler


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def layers() -> dict[str, nn.Module]:
    attention: dict[str, Any] = dict(dim_head=8, heads=2)
    sigmoid: dict[str, Any] = dict(gate="sigmoid", normalize_input=True)
    return {
        "max_heads": GateLoopedAttention(16),
        "wide_heads": GateLoopedAttention(16, heads=4, sub_ln=True),
        "sigmoid": GateLoopedAttention(16, **sigmoid),
        "sigmoid_wide_heads": GateLoopedAttention(16, heads=4, **sigmoid),
        "magnitude_phase": GateLoopedAttention(
            16, gate="magnitude_phase", normalize_input="variance"
        ),
        "per_key": GateLoopedAttention(
            16, heads=4, dim_key=12, gate="magnitude_phase", per_key_transitions=True
        ),
        "taylor": GateLoopedAttention(16, heads=4, feature_map="taylor"),
        "attention": CausalFullAttention(16, **attention),
        "rotary": CausalFullAttention(16, rotary_emb=True, **attention),
        "relative": CausalFullAttention(16, data_dependent_rel_pos=True, **attention),
        "simple": SimpleGateLoopLayer(16),
        "simple_post_ln": SimpleGateLoopLayer(16, post_ln=True, prenorm=False),
        "simple_heinsen": SimpleGateLoopLayer(16, use_heinsen=True),
    }


CUTS = {"one at a time": [1] * 20, "chunks": [7, 1, 0, 3, 9]}
ABLATIONS: list[dict[str, bool]] = [
    {},
    {"ablate_complex": True},
    {"ablate_state_transition": True},
]


def in_pieces(module: nn.Module, x: Tensor, cut: list[int], **options: Any) -> Tensor:
    pieces, cache = [], None
    for piece in x.split(cut, dim=1):
        y, cache = module(piece, cache=cache, return_cache=True, **options)
        pieces.append(y)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", layers())
def test_layers(name: str, cut: str) -> None:
    module = layers()[name].double()
    x = torch.randn(3, 20, 16, dtype=torch.float64)
    for ablation in ABLATIONS if not name.startswith("simple") else [{}]:
        # float64: nothing but the order of summation differs. (Relative positions make values of up
        # to 1e9.)
        pieces, whole = in_pieces(module, x, CUTS[cut], **ablation), module(x, **ablation)
        torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-11)


MODELS: list[dict[str, Any]] = [
    {},
    dict(gate_loop_heads=4, post_ln_norm=True),
    dict(use_gate_looped_attn=False, rotary_emb=True, dim_head=8, heads=2),
]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("options", MODELS, ids=str)
def test_transformer(options: dict[str, Any], cut: str) -> None:
    model = Transformer(16, num_tokens=32, depth=2, **options).double()
    ids = torch.randint(32, (3, 20))
    pieces = in_pieces(model, ids, CUTS[cut])
    torch.testing.assert_close(pieces, model(ids), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["max_heads", "wide_heads", "per_key", "taylor", "simple"])
def test_gradients_flow_through_the_cache(name: str) -> None:
    layer = layers()[name].double()
    x = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
    whole = torch.autograd.grad(layer(x).square().sum(), x)[0]
    pieces = torch.autograd.grad(in_pieces(layer, x, [5, 7]).square().sum(), x)[0]
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-11)


# ---- The peer's cache ----------------------------------------------------------------------------


@pytest.mark.parametrize("first", [peer, gateloop_cpp], ids=["peer first", "peer second"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_cache_crosses(first: Any, steps: int) -> None:
    theirs = peer.SimpleGateLoopLayer(16).double()
    ours = SimpleGateLoopLayer(16).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9 + steps, 16, dtype=torch.float64)
    begins, ends = (theirs, ours) if first is peer else (ours, theirs)
    _, cache = begins(x[:, :9], return_cache=True)
    y, (a, kv) = ends(x[:, 9:], cache=cache, return_cache=True)
    _, (own_a, own_kv) = ends(x, return_cache=True)
    torch.testing.assert_close(y, ends(x)[:, 9:], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kv, own_kv, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(a, own_a, rtol=1e-10, atol=1e-15)


# ---- Generation ----------------------------------------------------------------------------------


def test_greedy_generation_takes_the_likeliest() -> None:
    model = Transformer(16, num_tokens=32, depth=2)
    prompt = torch.randint(32, (2, 5))
    expected = prompt
    for _ in range(8):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    tokens = model.generate(prompt, 8, temperature=0)
    assert tokens.tolist() == expected[:, 5:].tolist()
    assert model.generate(prompt, 0).shape == (2, 0)


def test_generation_is_repeatable() -> None:
    model = Transformer(16, num_tokens=32, depth=2)
    prompt = torch.randint(32, (2, 5))
    draws = [
        model.generate(prompt, 20, generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_sampling_follows_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(20_000, 4)
    drawn = Sampler(temperature=2.0, filter_thres=0.0).draw(logits)
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    # Five standard deviations of a share of 20,000 draws.
    torch.testing.assert_close(share, (logits[0] / 2).softmax(0), rtol=0, atol=0.018)


@pytest.mark.parametrize(("threshold", "kept"), [(0.0, 10), (0.9, 1), (0.75, 3), (1.0, 1)])
def test_sampling_keeps_the_likeliest(threshold: float, kept: int) -> None:
    logits = torch.linspace(0, 1, 10).expand(2000, 10)
    drawn = Sampler(filter_thres=threshold).draw(logits)
    assert sorted(set(drawn.tolist())) == list(range(10 - kept, 10))
