"""Packed and padded batches through the modules: the same as one sequence after the other."""

import copy
from typing import Any

import pytest
import torch
from conftest import thinned
from torch import Tensor, nn

from gateloop_cpp import (
    CausalFullAttention,
    GateLoopedAttention,
    SimpleGateLoopLayer,
    Transformer,
)
from gateloop_cpp.rotary_embedding import RotaryEmbedding

F64 = torch.float64
DIM, TOKENS = 8, 11
MODELS: dict[str, dict[str, Any]] = {
    "max_heads": {},
    "sigmoid": dict(gate="sigmoid", normalize_input=True, transition_bias=(-1.0, 5.0)),
    "joint_kv": dict(joint_kv=True, sub_ln=True, simple_gate_loop=True),
    "wide_heads": dict(gate_loop_heads=2),
    "wide_sigmoid": dict(gate_loop_heads=4, gate="sigmoid", normalize_input=True),
    "magnitude_phase": dict(gate="magnitude_phase", normalize_input="variance"),
    "per_key": dict(
        gate_loop_heads=2,
        gate_loop_dim_key=12,
        gate="magnitude_phase",
        per_key_transitions=True,
    ),
    "taylor": dict(gate_loop_heads=2, feature_map="taylor"),
    "ablated": dict(ablate_state_transition=True),
    "attention": dict(layers="attention", dim_head=4, heads=2, rotary_emb=True),
    "window": dict(layers="attention", dim_head=4, heads=2, rotary_emb=True, window=3),
    "relative": dict(layers="attention", dim_head=4, heads=2, data_dependent_rel_pos=True),
    "relative_window": dict(
        layers="attention", dim_head=4, heads=2, data_dependent_rel_pos=True, window=2
    ),
    "mixed": dict(
        layers="gate_loop,attention,none",
        dim_head=4,
        heads=2,
        window=4,
        simple_gate_loop=True,
        post_ln_norm=True,
    ),
}
CUTS = torch.tensor([0, 0, 1, 9, 14, 14, 23])
PIECES = [slice(b, e) for b, e in zip(CUTS[:-1].tolist(), CUTS[1:].tolist(), strict=True)]
MASKS = {
    "right": [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]],
    "middle": [[1, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 0, 1, 0]],
}


def transformer(name: str) -> Transformer:
    torch.manual_seed(0)
    options = {"depth": 3 if name == "mixed" else 2} | MODELS[name]
    return Transformer(DIM, num_tokens=TOKENS, **options).to(F64)


def ids(*shape: int) -> Tensor:
    return torch.randint(TOKENS, shape, generator=torch.Generator().manual_seed(1))


def mask_of(name: str) -> Tensor:
    return torch.tensor(MASKS[name], dtype=torch.bool).repeat_interleave(2, 1)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [g for g in found if g is not None]


def assert_same_gradients(model: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    assert_near(ours, theirs)
    for our, their in zip(gradients(model, ours), gradients(model, theirs), strict=True):
        assert_near(our, their)


# ---- Transformer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_equal_each_alone(name: str) -> None:
    model, x = transformer(name), ids(1, 23)
    packed = model(x, cu_seqlens=CUTS)
    alone = torch.cat([model(x[:, piece]) for piece in PIECES], 1)
    assert_near(packed, alone)
    weights = torch.randn_like(alone)
    assert_same_gradients(model, (packed * weights).sum(), (alone * weights).sum())


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_padding_makes_no_difference(name: str, where: str) -> None:
    model, mask = transformer(name), mask_of(where)
    x = ids(*mask.shape)
    padded = model(x, mask=mask)[mask]
    alone = torch.cat([model(x[b : b + 1, real])[0] for b, real in enumerate(mask)])
    assert_near(padded, alone)
    weights = torch.randn_like(alone)
    assert_same_gradients(model, (padded * weights).sum(), (alone * weights).sum())


def mean_loss(model: Transformer, sequences: list[Tensor]) -> Tensor:
    """Over all tokens of all sequences but the first of each."""
    counts = [max(s.shape[1] - 1, 0) for s in sequences]
    losses = [
        model(s, return_loss=True) * n for s, n in zip(sequences, counts, strict=True) if n > 0
    ]
    return torch.stack(losses).sum() / sum(counts)


@pytest.mark.parametrize("name", MODELS)
def test_loss(name: str) -> None:
    model, x = transformer(name), ids(1, 23)
    packed = model(x, return_loss=True, cu_seqlens=CUTS)
    assert_same_gradients(model, packed, mean_loss(model, [x[:, piece] for piece in PIECES]))
    for where in MASKS:
        mask = mask_of(where)
        x = ids(*mask.shape)
        padded = model(x, return_loss=True, mask=mask)
        rows = [x[b : b + 1, real] for b, real in enumerate(mask)]
        assert_same_gradients(model, padded, mean_loss(model, rows))


@pytest.mark.parametrize(
    "name", ["max_heads", "sigmoid", "joint_kv", "magnitude_phase", "per_key", "taylor", "ablated"]
)
def test_a_cache_of_packed_or_padded_sequences_goes_on(name: str) -> None:
    model = transformer(name).eval()
    prompt, more = ids(1, 23), ids(len(PIECES), 2)
    _, cache = model(prompt, cu_seqlens=CUTS, return_cache=True)
    logits = model(more, cache=cache)
    for n, piece in enumerate(PIECES):
        whole = torch.cat((prompt[:, piece], more[n : n + 1]), 1)
        assert_near(logits[n : n + 1], model(whole)[:, -2:])
    # And packed again, by sequences of other lengths.
    again = torch.tensor([0, 2, 4, 6, 8, 10, 12])
    packed = model(more.view(1, -1), cu_seqlens=again, cache=cache)
    assert_near(packed.view_as(logits), logits)

    mask = mask_of("left")
    prompt, more = ids(*mask.shape), ids(2, 3)
    _, cache = model(prompt, mask=mask, return_cache=True)
    logits = model(more, cache=cache)
    for b, real in enumerate(mask):
        whole = torch.cat((prompt[b : b + 1, real], more[b : b + 1]), 1)
        assert_near(logits[b : b + 1], model(whole)[:, -3:])


def test_checkpointed_blocks() -> None:
    model, x = transformer("mixed"), ids(1, 23)
    plain = model(x, return_loss=True, cu_seqlens=CUTS)
    expected = gradients(model, plain)
    model.checkpoint_blocks = True
    for ours, theirs in zip(
        gradients(model, model(x, return_loss=True, cu_seqlens=CUTS)), expected, strict=True
    ):
        assert_near(ours, theirs)


@pytest.mark.parametrize("name", thinned(["attention", "max_heads", "mixed"], 3))
def test_compile(name: str) -> None:
    torch.compiler.reset()
    model = transformer(name)
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for cuts in ([0, 3, 12], [0, 9, 9, 31]):
        x = ids(1, cuts[-1])
        for packing in (
            {"cu_seqlens": torch.tensor(cuts)},
            {"mask": torch.arange(cuts[-1]).unsqueeze(0) % 3 > 0},
        ):
            ours, theirs = (m(x, return_loss=True, **packing) for m in (compiled, model))
            assert_near(ours, theirs)
            for our, their in zip(gradients(compiled, ours), gradients(model, theirs), strict=True):
                assert_near(our, their)


# A layer that somebody put in place of ours need not have arguments that are not used.
def test_absent_arguments_do_not_reach_the_layers() -> None:
    model = transformer("mixed")
    seen: list[set[str]] = []
    for module in model.modules():
        if isinstance(module, GateLoopedAttention | CausalFullAttention | SimpleGateLoopLayer):
            module.register_forward_pre_hook(
                lambda _module, _args, kwargs: seen.append(set(kwargs)), with_kwargs=True
            )
    model(ids(1, 5))
    assert len(seen) == 5
    assert not set.union(*seen) & {"cu_seqlens", "mask"}
    seen.clear()
    model(ids(1, 5), cu_seqlens=torch.tensor([0, 5]))
    assert all("cu_seqlens" in kwargs and "mask" not in kwargs for kwargs in seen)


# ---- Layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_simple_gate_loop_layer(reverse: bool) -> None:
    torch.manual_seed(0)
    layer = SimpleGateLoopLayer(DIM, reverse=reverse).to(F64)
    x = torch.randn(1, 23, DIM, dtype=F64)
    assert_near(layer(x, cu_seqlens=CUTS), torch.cat([layer(x[:, piece]) for piece in PIECES], 1))
    mask = mask_of("middle")
    x = torch.randn(*mask.shape, DIM, dtype=F64)
    padded = layer(x, mask=mask)
    assert padded[~mask].eq(0).all()
    alone = [layer(x[b : b + 1, real])[0] for b, real in enumerate(mask)]
    assert_near(padded[mask], torch.cat(alone))


def test_cache_of_the_simple_gate_loop_layer() -> None:
    torch.manual_seed(0)
    layer = SimpleGateLoopLayer(DIM).to(F64)
    x = torch.randn(1, 23, DIM, dtype=F64)
    _, first = layer(x, return_cache=True, cu_seqlens=CUTS)
    _, second = layer(x, cache=first, return_cache=True, cu_seqlens=CUTS)
    alone = [layer(x[:, piece].repeat(1, 2, 1), return_cache=True)[1] for piece in PIECES]
    for ours, theirs in zip(second, zip(*alone, strict=True), strict=True):
        assert_near(ours, torch.cat(theirs))
    mask = mask_of("middle")
    x = torch.randn(*mask.shape, DIM, dtype=F64)
    _, cache = layer(x, return_cache=True, mask=mask)
    alone = [layer(x[b : b + 1, real], return_cache=True)[1] for b, real in enumerate(mask)]
    for ours, theirs in zip(cache, zip(*alone, strict=True), strict=True):
        assert_near(ours, torch.cat(theirs))


def test_padding_before_attention_may_come_first() -> None:
    """A step of padding without a real one before it has nothing to attend to but itself."""
    layer = CausalFullAttention(DIM, dim_head=4, heads=2)
    x = torch.randn(1, 6, DIM, requires_grad=True)
    mask = torch.tensor([[False, False, False, True, True, False]])
    y = layer(x, mask=mask)
    assert y.isfinite().all()
    y[mask].square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad[~mask].eq(0).all()


def test_rotary_positions_of_each_step() -> None:
    rotary = RotaryEmbedding(4)
    t = torch.randn(2, 3, 5, 4)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 0, 3, 3, 1]])
    turned = rotary(t, positions)
    torch.testing.assert_close(turned[:1], rotary(t[:1]), rtol=0, atol=0)
    for step, position in enumerate(positions[1].tolist()):
        expected = rotary(t[1:, :, step : step + 1], position)
        torch.testing.assert_close(turned[1:, :, step : step + 1], expected, rtol=0, atol=0)


# ---- Errors --------------------------------------------------------------------------------------

X = torch.randn(1, 4, DIM)
HALVES = torch.tensor([0, 2, 4])
REAL = torch.ones(1, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("layer", "given", "message"),
    [
        (
            GateLoopedAttention(DIM),
            {"cu_seqlens": HALVES, "cache": torch.zeros(1, DIM, dtype=torch.complex64)},
            r"GateLoopedAttention: cache must be \(2, 8\), got",
        ),
        (
            SimpleGateLoopLayer(DIM, use_heinsen=True),
            {"mask": REAL},
            "SimpleGateLoopLayer: mask must be None with another scan than the fused one, got",
        ),
        (
            CausalFullAttention(DIM, dim_head=4, heads=2),
            {"mask": REAL, "return_cache": True},
            "CausalFullAttention: return_cache must be False with cu_seqlens or mask, got True",
        ),
        (
            CausalFullAttention(DIM, dim_head=4, heads=2),
            {"cu_seqlens": torch.tensor([0, 3])},
            r"CausalFullAttention: cu_seqlens must be 0 to T = 4, never decreasing, got \[0, 3\]",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_a_layer_does_not_take_is_refused(
    layer: nn.Module, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layer(X, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cu_seqlens": HALVES, "mask": REAL}, "mask must be None with cu_seqlens, got"),
        ({"mask": REAL[:, 1:]}, r"mask must be bool of shape \(B, T\) = \(1, 4\), got"),
        ({"mask": REAL.long()}, "mask must be bool of .*, got torch.int64"),
        ({"cu_seqlens": HALVES.double()}, "cu_seqlens must be int64 or int32, got torch.float64"),
        ({"cu_seqlens": HALVES.view(1, -1)}, r"cu_seqlens must be \(N \+ 1\) .*, got .* \(1, 3\)"),
        ({"cu_seqlens": torch.tensor([1, 4])}, r"cu_seqlens must be 0 to T = 4, .*, got \[1, 4\]"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, r"never decreasing, got \[0, 3, 2, 4\]"),
    ],
)
def test_bad_arguments_of_the_transformer(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"Transformer: .*{message}"):
        transformer("attention")(ids(1, 4), **given)


def test_a_packed_batch_is_one() -> None:
    with pytest.raises(ValueError, match="Transformer: x must be a batch of one with cu_seqlens"):
        transformer("attention")(ids(2, 4), cu_seqlens=HALVES)
