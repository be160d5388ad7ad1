"""Every class over a grid of all its options, against the installed peer."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from parity import assert_parity, forward_backward, gradients, peer, small_phases
from torch import Tensor, nn

import gateloop_cpp

BOTH = (False, True)
Options = dict[str, Any]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def grid(**choices: tuple[Any, ...]) -> Iterator[Options]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def show(options: Options) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items() if v is not None and v is not False)


def sequences(batch: int, time: int, dim: int) -> tuple[Tensor, Tensor]:
    """x and dy."""
    return torch.randn(batch, time, dim), torch.randn(batch, time, dim)


ABLATIONS = list(grid(ablate_complex=BOTH, ablate_state_transition=BOTH))

# ---- GateLoopedAttention -------------------------------------------------------------------------

GATE_LOOPED = list(
    grid(
        heads=(None, 4),
        dim_inner=(None, 24),
        checkpoint_gate_looped_attn=BOTH,
        add_swish_gating=BOTH,
        sub_ln=BOTH,
        frac_gradient_state_transition=(0.9, 1.0),
    )
)


@pytest.mark.parametrize("options", GATE_LOOPED, ids=show)
def test_gate_looped_attention(options: Options) -> None:
    x, dy = sequences(2, 19, 16)
    for ablation in ABLATIONS:
        theirs = peer.GateLoopedAttention(16, **options)
        ours = gateloop_cpp.GateLoopedAttention(16, **options)
        assert_parity(theirs, ours, partial(forward_backward, x=x, dy=dy, **ablation))


# ---- CausalFullAttention -------------------------------------------------------------------------

FULL = list(
    grid(
        rotary_emb=BOTH,
        add_swish_gating=BOTH,
        data_dependent_rel_pos=BOTH,
        softmax_normalize=(None, False, True),
        frac_gradient_data_dependent_rel_pos=(0.5, 1.0),
    )
)


@pytest.mark.parametrize("options", FULL, ids=show)
def test_causal_full_attention(options: Options) -> None:
    x, dy = sequences(2, 19, 16)
    for ablation in ABLATIONS:
        theirs = peer.CausalFullAttention(16, dim_head=8, heads=3, **options)
        ours = gateloop_cpp.CausalFullAttention(16, dim_head=8, heads=3, **options)
        small_phases(theirs.named_parameters())
        assert_parity(theirs, ours, partial(forward_backward, x=1 + 0.3 * x, dy=dy, **ablation))


# ---- SimpleGateLoopLayer -------------------------------------------------------------------------

SIMPLE = list(grid(prenorm=BOTH, post_ln=BOTH, reverse=BOTH))


def scans() -> list[Options]:
    """Our three ways to scan. The peer's is its plain one each time: its own logarithms are good to
    six digits at best (they are complex64 whatever the input). Its JAX scan needs jax2torch."""
    return [{}, {"use_heinsen": True}, {"use_jax_associative_scan": True}]


@pytest.mark.parametrize("scan", scans(), ids=lambda scan: show(scan) or "fused")
@pytest.mark.parametrize("options", SIMPLE, ids=show)
def test_simple_gate_loop_layer(options: Options, scan: Options) -> None:
    if scan.get("use_jax_associative_scan"):
        pytest.importorskip("jax")
    theirs = peer.SimpleGateLoopLayer(16, **options)
    ours = gateloop_cpp.SimpleGateLoopLayer(16, **options, **scan)
    x, dy = sequences(2, 19, 16)
    assert_parity(theirs, ours, partial(forward_backward, x=x, dy=dy))


# ---- Transformer ---------------------------------------------------------------------------------

GATE_LOOP_MODEL: Options = dict(dim=16, num_tokens=32, depth=2)
ATTENTION_MODEL = dict(GATE_LOOP_MODEL, use_gate_looped_attn=False, dim_head=8, heads=3)
# A second layer's inputs have any sign, and its phases reach the floor (see small_phases).
RELATIVE_MODEL = dict(ATTENTION_MODEL, depth=1, data_dependent_rel_pos=True)
TRANSFORMERS = [
    *(
        dict(GATE_LOOP_MODEL, **options)
        for options in grid(
            gate_loop_heads=(None, 4),
            dim_gate_looped_attn=(None, 24),
            post_ln_norm=BOTH,
            sub_ln=BOTH,
            attn_add_swish_gating=BOTH,
        )
    ),
    dict(GATE_LOOP_MODEL, ff_mult=2),
    dict(GATE_LOOP_MODEL, depth=0),
    dict(GATE_LOOP_MODEL, gate_loop_heads=4, checkpoint_gate_looped_attn=False),
    dict(GATE_LOOP_MODEL, frac_gradient_state_transition=0.5),
    dict(GATE_LOOP_MODEL, ablate_complex=True),
    dict(GATE_LOOP_MODEL, ablate_state_transition=True),
    *(
        dict(model, **options)
        for model in (ATTENTION_MODEL, RELATIVE_MODEL)
        for options in grid(rotary_emb=BOTH, post_ln_norm=BOTH, attn_add_swish_gating=BOTH)
    ),
    dict(ATTENTION_MODEL, attn_softmax_normalize=False),
    dict(RELATIVE_MODEL, attn_softmax_normalize=True),
]


def logits_and_loss(model: nn.Module, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(ids, return_loss=True, **options)
    loss.backward()
    with torch.no_grad():
        logits = model(ids, **options)
    return {"loss": loss.detach().reshape(1), "logits": logits, **gradients(model)}


@pytest.mark.parametrize("options", TRANSFORMERS, ids=show)
def test_transformer(options: Options) -> None:
    theirs, ours = peer.Transformer(**options), gateloop_cpp.Transformer(**options)
    if options.get("data_dependent_rel_pos"):
        small_phases(theirs.named_parameters())
    ids = torch.randint(32, (2, 20))
    assert_parity(theirs, ours, partial(logits_and_loss, ids=ids))


@pytest.mark.parametrize("ablation", ABLATIONS[1:], ids=show)
def test_transformer_ablated_at_the_call(ablation: Options) -> None:
    theirs, ours = (m.Transformer(**GATE_LOOP_MODEL) for m in (peer, gateloop_cpp))
    ids = torch.randint(32, (2, 20))
    assert_parity(theirs, ours, partial(logits_and_loss, ids=ids, **ablation))


def test_one_seed_gives_both_the_same_weights() -> None:
    for options in TRANSFORMERS:
        models = []
        for module in (peer, gateloop_cpp):
            torch.manual_seed(3)
            models.append(module.Transformer(**options))
        for theirs, ours in zip(*(m.state_dict().values() for m in models), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# ---- Shapes --------------------------------------------------------------------------------------

LAYERS: dict[str, Options] = {
    "GateLoopedAttention": {},
    "GateLoopedAttention-heads": dict(heads=4),
    "CausalFullAttention": dict(dim_head=8, heads=2),
    "CausalFullAttention-plain": dict(dim_head=8, heads=2, softmax_normalize=False),
    "SimpleGateLoopLayer": {},
    "SimpleGateLoopLayer-reverse": dict(reverse=True),
    "SimpleGateLoopLayer-heinsen": dict(use_heinsen=True),
}


def layer(package: Any, name: str) -> nn.Module:
    options = LAYERS[name]
    if package is peer:
        options = {k: v for k, v in options.items() if k != "use_heinsen"}
    made: nn.Module = getattr(package, name.split("-")[0])(16, **options)
    return made


@pytest.mark.parametrize("time", [1, 2, 3, 255, 257])
@pytest.mark.parametrize("name", LAYERS)
def test_lengths(name: str, time: int) -> None:
    x, dy = sequences(2, time, 16)
    theirs, ours = layer(peer, name), layer(gateloop_cpp, name)
    assert_parity(theirs, ours, partial(forward_backward, x=x, dy=dy))


@pytest.mark.parametrize(("batch", "time"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", LAYERS)
def test_nothing_in_nothing_out(name: str, batch: int, time: int) -> None:
    module = layer(gateloop_cpp, name)
    results = forward_backward(module, *sequences(batch, time, 16))
    assert results["y"].shape == (batch, time, 16)
    for key, gradient in results.items():
        assert gradient.eq(0).all(), key


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_transformer_on_nothing(shape: tuple[int, int]) -> None:
    model = gateloop_cpp.Transformer(**GATE_LOOP_MODEL)
    assert model(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, 32)


@pytest.mark.parametrize("name", LAYERS)
def test_any_strides(name: str) -> None:
    module = layer(gateloop_cpp, name)
    x, dy = sequences(3, 40, 16)
    plain = forward_backward(module, x, dy)
    wide = torch.randn(3, 40, 32)
    wide[..., ::2] = x
    for strided in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        wide[..., ::2],
        x[:1].expand(3, 40, 16),
    ):
        same = strided.stride() == (0, *x.stride()[1:])
        results = forward_backward(module, strided, dy)
        expected = forward_backward(module, strided.contiguous(), dy) if same else plain
        for key, value in expected.items():
            # The matrix products may sum in another order.
            torch.testing.assert_close(results[key], value, rtol=1e-5, atol=1e-5)
