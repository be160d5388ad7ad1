"""Decoding one sequence: a whole Transformer as one operator."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gateloop_cpp import GateLoopedAttention, Transformer
from gateloop_cpp._step import decoding_step
from gateloop_cpp.feed_forward import FeedForward


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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


# What the options of a model that the operator does not know are, and what was changed after.
DIFFERENT: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "wide heads": (dict(gate_loop_heads=4), lambda m: None),
    "attention": (dict(use_gate_looped_attn=False), lambda m: None),
    "ablated": (dict(ablate_complex=True), lambda m: None),
    "a hook": ({}, lambda m: m.token_emb.register_forward_hook(lambda *_: None)),
    "a parametrization": ({}, lambda m: nn.utils.parametrizations.weight_norm(m.token_emb)),
    "another width": ({}, lambda m: setattr(m.layers[1][1], "fn", FeedForward(16, 2))),
    "another gate": (
        {},
        lambda m: setattr(m.layers[1][0], "fn", GateLoopedAttention(16, gate="sigmoid")),
    ),
    "another bias": ({}, lambda m: setattr(layer(m)[0], "to_qkv", nn.Linear(16, 48))),
    "another activation": ({}, lambda m: layer(m)[1].__setitem__(1, nn.GELU("tanh"))),
    "another norm": (
        dict(post_ln_norm=True),
        lambda m: setattr(m.layers[0][0], "norm", nn.LayerNorm(16, bias=False)),
    ),
    "mixed dtypes": ({}, lambda m: m.token_emb.double()),
    "one layer less": ({}, lambda m: m.layers.__delitem__(1)),
    "a shared module": ({}, share_gates),
}


@pytest.mark.parametrize("which", DIFFERENT)
def test_a_model_that_differs_is_called_module_by_module(which: str) -> None:
    options, change = DIFFERENT[which]
    assert decoding_step(changed(change, **options)) is None


def test_a_subclass_is_called() -> None:
    class Mine(Transformer):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            calls.append(1)
            return super().forward(*arguments, **options)

    calls: list[int] = []
    Mine(16, num_tokens=32, depth=1).generate(torch.zeros(1, 1, dtype=torch.int64), 4)
    assert len(calls) == 4


def test_tied_weights_are_one_operator() -> None:
    assert decoding_step(changed(tie_weights)) is not None


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
