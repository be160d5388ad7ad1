"""Decoder gives what the modules give, faster."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gateloop_cpp import Decoder, Transformer


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Models of one operator a step, then others.
STEPPED: list[dict[str, Any]] = [
    {},
    dict(post_ln_norm=True, sub_ln=True),
    dict(dim_gate_looped_attn=24, attn_add_swish_gating=False),
    dict(attn_add_swish_gating=False),
    dict(gate="sigmoid", normalize_input=True),
]
OTHERS: list[dict[str, Any]] = [
    dict(gate_loop_heads=4),
    dict(ablate_complex=True),
    dict(use_gate_looped_attn=False, dim_head=8, heads=2, rotary_emb=True),
]


def small(**options: Any) -> Transformer:
    return Transformer(16, num_tokens=32, depth=2, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("options", STEPPED + OTHERS, ids=str)
def test_a_decoder_gives_what_the_modules_give(
    options: dict[str, Any], sequences: int, dtype: torch.dtype
) -> None:
    model = small(**options).to(dtype)
    ids = torch.randint(32, (sequences, 20))
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids)
        by_modules = model(ids)
    decoder, cache, pieces = Decoder(model), None, []
    for piece in ids.split([5] + [1] * 12 + [3], dim=1):
        logits, cache = decoder(piece, cache)
        assert logits.dtype == dtype and not logits.requires_grad
        pieces.append(logits)
    # Between reading and the logits all is float32 or wider, so that it is no further from the
    # truth than the modules are; in float64 the order of sums is all that differs. Per channel.
    error = (torch.cat(pieces, 1).double() - exact).abs().amax((0, 1))
    theirs = (by_modules.double() - exact).abs().amax((0, 1))
    floor = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert (error <= (2 * theirs).clamp_min(floor)).all()


@pytest.mark.parametrize("options", [{}, dict(gate_loop_heads=4)], ids=str)
@pytest.mark.parametrize("sequences", [1, 2])
def test_a_cache_crosses_between_decoder_and_model(options: dict[str, Any], sequences: int) -> None:
    model = small(**options).double()
    decoder, ids = Decoder(model), torch.randint(32, (sequences, 9))
    whole = model(ids)
    for first, second in ((decoder, model), (model, decoder)):
        _, cache = read(first, ids[:, :8], None)
        for _ in range(2):  # a cache is a value: reading on does not change it
            logits, _ = read(second, ids[:, 8:], cache)
            torch.testing.assert_close(logits, whole[:, 8:], rtol=1e-10, atol=1e-12)


def read(reader: Any, ids: Tensor, cache: Any) -> Any:
    if isinstance(reader, Decoder):
        return reader(ids, cache)
    with torch.no_grad():
        return reader(ids, cache=cache, return_cache=True)


def greedy(model: Transformer, prompt: Tensor, length: int) -> Tensor:
    """By the definition: the whole text anew for each token."""
    text = prompt
    for _ in range(length):
        text = torch.cat((text, model(text)[:, -1:].argmax(-1)), dim=1)
    return text[:, prompt.shape[1] :]


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("prompt", [1, 5])
def test_greedy_generation(prompt: int, sequences: int) -> None:
    model = small()
    ids = torch.randint(32, (sequences, prompt))
    assert torch.equal(model.generate(ids, 8, temperature=0), greedy(model, ids, 8))


def share_gates(model: Any) -> None:
    model.layers[1][0].fn.to_gates = model.layers[0][0].fn.to_gates


def tie_weights(model: Any) -> None:
    model.to_logits[1].weight = model.token_emb.weight


@pytest.mark.parametrize("share", [share_gates, tie_weights])
@pytest.mark.parametrize("sequences", [1, 2])
def test_shared_parameters_count_everywhere(share: Callable[[Any], None], sequences: int) -> None:
    model = small()
    share(model)
    ids = torch.randint(32, (sequences, 4))
    assert torch.equal(model.generate(ids, 6, temperature=0), greedy(model, ids, 6))


@pytest.mark.parametrize("sequences", [1, 2])
def test_generation_follows_weights_that_change(sequences: int) -> None:
    model, prompt, texts = small(), torch.randint(32, (sequences, 5)), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        for weight in model.parameters():
            nn.init.normal_(weight)
        texts.append(model.generate(prompt, 8, temperature=0))
        assert torch.equal(texts[-1], greedy(model, prompt, 8))
    assert not torch.equal(*texts)


@pytest.mark.parametrize("sequences", [1, 2])
def test_a_decoder_holds_the_weights_it_was_built_from(sequences: int) -> None:
    model, ids = small(), torch.randint(32, (sequences, 5))
    before = model(ids)
    decoder = Decoder(model)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.randn_like(p)))
    cache, pieces = None, []
    for piece in ids.split([4, 1], dim=1):
        logits, cache = decoder(piece, cache)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(ids), before, rtol=0.1)


def test_a_decoder_names_ids_that_do_not_fit() -> None:
    decoder = Decoder(small())
    _, cache = decoder(torch.zeros(1, 3, dtype=torch.int64))
    for ids in (torch.tensor([[-1]]), torch.tensor([[32]])):
        with pytest.raises(IndexError, match=r"\[0, 32\), got (-1|32)"):
            decoder(ids, cache)
    with pytest.raises(TypeError, match="ids"):
        decoder(torch.zeros(1, 1), cache)
    with pytest.raises(ValueError, match="one for each of 2 layers"):
        decoder(torch.zeros(1, 1, dtype=torch.int64), cache[:1])


# ---- The operators behind it ---------------------------------------------------------------------


def a_step() -> tuple[list[Tensor | None], list[str]]:
    """Weights of one layer, and their names."""
    good: list[Tensor | None] = [torch.randn(4, 2), torch.ones(2), torch.randn(4, 2)]
    norm, square, hidden = torch.ones(2), torch.randn(2, 2), torch.randn(8, 2)
    mixer = [norm, None, torch.randn(6, 2), torch.randn(4, 2), torch.ones(4), None, None]
    feed = [norm, None, hidden, torch.ones(8), torch.randn(2, 8), torch.ones(2)]
    names = "embedding final_norm to_logits mixer_norm mixer_norm_bias qkv transition"
    names += " transition_bias sub_norm sub_norm_bias gates out ff_norm ff_norm_bias expand"
    names += " expand_bias contract contract_bias"
    return [*good, *mixer, square, square, *feed], names.split()


def step(weights: list[Tensor | None], states: list[Tensor], token: int = 0) -> Any:
    ids = torch.full((1, 1), token)
    with torch.no_grad():
        return torch.ops.gateloop._transformer_step(ids, weights, states, False, False, False)


@pytest.mark.parametrize("index", range(18))
def test_the_step_refuses_weights_that_do_not_fit(index: int) -> None:
    weights, names = a_step()
    if index == 0:
        for wrong in (torch.ones(5), None):
            with pytest.raises(ValueError, match="embedding"):
                step([wrong, *weights[1:]], [])
        return
    if weights[index] is None and names[index] != "sub_norm":
        return  # a bias that only post-norm models have is not read
    wrong = torch.ones(7)
    with pytest.raises(RuntimeError, match=names[index]):
        step([*weights[:index], wrong, *weights[index + 1 :]], [])
    with pytest.raises(ValueError, match="one floating dtype"):
        step([*weights[:index], wrong.double(), *weights[index + 1 :]], [])


def test_the_step_refuses_states_and_ids_that_do_not_fit() -> None:
    weights, _ = a_step()
    logits, states = step(weights, [])
    assert logits.shape == (1, 1, 4) and states[0].shape == (1, 2)
    step(weights, states)
    with pytest.raises(RuntimeError, match="state 0"):
        step(weights, [torch.zeros(1, 3, dtype=torch.complex64)])
    with pytest.raises(ValueError, match="states must be one for each"):
        step(weights, [*states, *states])
    with pytest.raises(ValueError, match="weights"):
        step(weights[:-1], [])
    for token in (-1, 4):
        with pytest.raises(IndexError, match=rf"\[0, 4\), got {token}"):
            step(weights, states, token)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.no_grad():
        y: Tensor = torch.ops.gateloop._linear(x, weight, bias)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(33, 130), (512, 64), (1, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_products_are_those_of_the_layer(
    size: tuple[int, int], dtype: torch.dtype, bias: bool, packed: bool
) -> None:
    layer = nn.Linear(*size, bias=bias).to(dtype)
    weight = torch.ops.gateloop._packed(layer.weight) if packed else layer.weight
    for shape in [(1, 1, size[0]), (5, 1, size[0]), (2, 3, size[0]), (7, size[0])]:
        x = torch.randn(shape).to(dtype)
        ours = linear(x, weight, layer.bias)
        with torch.no_grad():
            exact = copy.deepcopy(layer).double()(x.double())
        assert ours.dtype == dtype and ours.shape == exact.shape
        # An ulp of the result, and for wide types some ulp of up to 512 products.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), exact, rtol=2 * eps, atol=16 * eps)


def test_a_bias_is_read_through_its_strides_and_dtype() -> None:
    weight, biases = torch.randn(6, 4), torch.randn(12)
    x = torch.randn(1, 4)
    expected = x @ weight.t() + biases[::2]
    torch.testing.assert_close(linear(x, weight, biases[::2]), expected)
    packed = torch.ops.gateloop._packed(weight)
    torch.testing.assert_close(linear(x.expand(3, 4), packed, biases[::2]), expected.expand(3, 6))
    low = weight.bfloat16()
    for rows, matrix, other in ((1, weight, low), (3, packed, torch.ops.gateloop._packed(low))):
        with pytest.raises(RuntimeError, match=r"bias|dtype"):
            linear(x.expand(rows, 4).bfloat16(), other, biases[:6])
        with pytest.raises(RuntimeError, match=r"bias|size|shape"):
            linear(x.expand(rows, 4), matrix, biases[:5])
    with pytest.raises(RuntimeError, match="x must be"):
        linear(torch.randn(3, 5), packed, None)


def test_weights_are_packed_where_that_is_faster() -> None:
    weight = torch.randn(8, 4)
    packed = torch.ops.gateloop._packed
    assert packed(weight).is_mkldnn == torch.backends.mkldnn.is_available()
    assert not packed(weight.double()).is_mkldnn
    torch.backends.mkldnn.set_flags(False, None, None)
    try:
        assert not packed(weight).is_mkldnn
    finally:
        torch.backends.mkldnn.set_flags(True, None, None)
