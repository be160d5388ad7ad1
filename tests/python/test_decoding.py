"""A sequence cut anywhere and carried through the cache gives what one call gives."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import peer
from torch import Tensor, nn

import gateloop_cpp
from gateloop_cpp import CausalFullAttention, GateLoopedAttention, SimpleGateLoopLayer, Transformer
from gateloop_cpp._step import decoding_step
from gateloop_cpp.feed_forward import FeedForward
from gateloop_cpp.sampling import sample


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


def test_gradients_flow_through_the_cache() -> None:
    layer = SimpleGateLoopLayer(16).double()
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


STEPPED: list[dict[str, Any]] = [
    {},
    dict(post_ln_norm=True, sub_ln=True),
    dict(dim_gate_looped_attn=24, attn_add_swish_gating=False),
    dict(attn_add_swish_gating=False),
    dict(gate="sigmoid", normalize_input=True),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", STEPPED, ids=str)
def test_a_step_of_one_sequence_is_the_forward_pass(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = Transformer(16, num_tokens=32, depth=2, **options).to(dtype)
    ids = torch.randint(32, (1, 20))
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids)[0, 5:]
        by_modules = model(ids)[0, 5:]
        step = decoding_step(model)
        assert step is not None
        _, cache = model(ids[:, :5], return_cache=True)
        pieces = []
        for i in range(5, 20):
            logits, cache = step(ids[:, i : i + 1], cache)
            pieces.append(logits[0, 0])
    # Between reading and the logits all is float32 or wider, so that it is no further from the
    # truth than the modules are; in float64 the order of sums is all that differs.
    error = float((torch.stack(pieces).double() - exact).abs().max())
    theirs = float((by_modules.double() - exact).abs().max())
    floor = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert error <= max(2 * theirs, floor)


@pytest.mark.parametrize("prompt", [1, 5])
def test_greedy_generation_of_one_sequence(prompt: int) -> None:
    model = Transformer(16, num_tokens=32, depth=2)
    expected = ids = torch.randint(32, (1, prompt))
    for _ in range(8):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert model.generate(ids, 8, temperature=0).tolist() == expected[:, prompt:].tolist()


def small(**options: Any) -> Any:
    return Transformer(16, num_tokens=32, depth=2, **options)


def changed(change: Callable[[Any], Any], **options: Any) -> Any:
    model = small(**options)
    change(model)
    return model


def layer(model: Any, index: int = 0) -> tuple[Any, Any]:
    """GateLoop and the feed-forward of a layer."""
    mix, feed = model.layers[index]
    return mix.fn, feed.fn


def share_gates(model: Any) -> None:
    layer(model, 1)[0].to_gates = layer(model)[0].to_gates


def tie_weights(model: Any) -> None:
    model.to_logits[1].weight = model.token_emb.weight


DIFFERENT: dict[str, Any] = {
    "wide heads": small(gate_loop_heads=4),
    "attention": small(use_gate_looped_attn=False),
    "ablated": small(ablate_complex=True),
    "a subclass": type("Mine", (Transformer,), {})(16, num_tokens=32, depth=1),
    "a hook": changed(lambda m: m.token_emb.register_forward_hook(lambda *_: None)),
    "a parametrization": changed(lambda m: nn.utils.parametrizations.weight_norm(m.token_emb)),
    "another width": changed(lambda m: setattr(m.layers[1][1], "fn", FeedForward(16, 2))),
    "another gate": changed(
        lambda m: setattr(m.layers[1][0], "fn", GateLoopedAttention(16, gate="sigmoid"))
    ),
    "another bias": changed(lambda m: setattr(layer(m)[0], "to_qkv", nn.Linear(16, 48))),
    "another activation": changed(lambda m: layer(m)[1].__setitem__(1, nn.GELU("tanh"))),
    "another norm": changed(
        lambda m: setattr(m.layers[0][0], "norm", nn.LayerNorm(16, bias=False)), post_ln_norm=True
    ),
    "mixed dtypes": changed(lambda m: m.token_emb.double()),
    "one layer less": changed(lambda m: m.layers.__delitem__(1)),
}


@pytest.mark.parametrize("which", DIFFERENT)
def test_a_model_that_differs_is_called_module_by_module(which: str) -> None:
    assert decoding_step(DIFFERENT[which]) is None


@pytest.mark.parametrize("share", [share_gates, tie_weights])
def test_shared_parameters_count_everywhere(share: Callable[[Any], Any]) -> None:
    model = changed(share)
    ids = torch.randint(32, (1, 4))
    expected = ids
    for _ in range(6):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert model.generate(ids, 6, temperature=0).tolist() == expected[:, 4:].tolist()


def test_where_others_are_at_work_modules_are_called() -> None:
    assert decoding_step(small()) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert decoding_step(small()) is None
    calls: list[int] = []
    model = changed(lambda m: m.token_emb.register_forward_hook(lambda *_: calls.append(1)))
    model.generate(torch.zeros(1, 1, dtype=torch.int64), 4)
    assert len(calls) == 4


def test_the_operator_refuses_weights_that_do_not_fit() -> None:
    good = [torch.randn(4, 2), torch.ones(2), torch.randn(4, 2)]
    norm, square, hidden = torch.ones(2), torch.randn(2, 2), torch.randn(8, 2)
    mixer = [norm, None, torch.randn(6, 2), torch.randn(4, 2), torch.ones(4), None, None]
    feed = [norm, None, hidden, torch.ones(8), torch.randn(2, 8), torch.ones(2)]
    weights: list[Tensor | None] = [*good, *mixer, square, square, *feed]

    def step(weights: list[Tensor | None], states: list[Tensor]) -> Any:
        ids = torch.zeros(1, 1, dtype=torch.int64)
        with torch.no_grad():
            return torch.ops.gateloop._transformer_step(ids, weights, states, False, False, False)

    logits, states = step(weights, [])
    assert logits.shape == (1, 1, 4) and states[0].shape == (1, 2)
    step(weights, states)
    for i, name in ((3, "mixer_norm"), (5, "qkv"), (6, "transition"), (16, "contract")):
        with pytest.raises(RuntimeError, match=name):
            step([*weights[:i], torch.ones(5), *weights[i + 1 :]], [])
    with pytest.raises(RuntimeError, match="state 0"):
        step(weights, [torch.zeros(1, 3, dtype=torch.complex64)])
    with pytest.raises(ValueError, match="weights"):
        step(weights[:-1], [])


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
    drawn = sample(logits, temperature=2.0, filter_thres=0.0)
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    # Five standard deviations of a share of 20,000 draws.
    torch.testing.assert_close(share, (logits[0] / 2).softmax(0), rtol=0, atol=0.018)


@pytest.mark.parametrize(("threshold", "kept"), [(0.0, 10), (0.9, 1), (0.75, 3), (1.0, 1)])
def test_sampling_keeps_the_likeliest(threshold: float, kept: int) -> None:
    logits = torch.linspace(0, 1, 10).expand(2000, 10)
    drawn = sample(logits, filter_thres=threshold)
    assert sorted(set(drawn.tolist())) == list(range(10 - kept, 10))
