"""What is computed again, in blocks, for one row or with packed weights is the same."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing._internal.two_tensor import TwoTensor

from gateloop_cpp import SimpleGateLoopLayer, Transformer, _projection
from gateloop_cpp import simple_gate_loop_layer as layer_module

# Float64: what differs is the order of sums.
assert_close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def layer(**options: bool) -> nn.Module:
    torch.manual_seed(0)
    return SimpleGateLoopLayer(6, **options).double()


def model(**options: Any) -> Callable[[Tensor], Tensor]:
    """A function of embeddings through all layers but the first and last of a Transformer."""
    torch.manual_seed(0)
    blocks = Transformer(6, num_tokens=5, depth=2, **options).double().layers

    def function(h: Tensor) -> Tensor:
        for block in blocks:
            mix, feed = cast(nn.ModuleList, block)
            h = feed(mix(h))
        return h

    return function


def saved(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Numbers that the forward pass keeps for the backward pass, of each storage once."""
    sizes: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        kept.append(function(x))
    return sum(sizes.values())


@pytest.mark.parametrize("function", [layer(), layer(post_ln=True), model()])
def test_recomputed_activations_have_the_same_gradients(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)

    def gradients() -> tuple[Tensor, Tensor]:
        (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return first, second

    kept = saved(function, x), gradients()
    monkeypatch.setattr(_projection, "LEAST_BYTES", 0)
    again = saved(function, x), gradients()
    assert again[0] < kept[0]
    for ours, expected in zip(again[1], kept[1], strict=True):
        assert_close(ours, expected)


@pytest.mark.parametrize(
    "options", [{}, dict(post_ln_norm=True), dict(gate="sigmoid", normalize_input=True)], ids=str
)
def test_large_blocks_keep_less_and_have_the_same_gradients(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_projection, "LEAST_BYTES", 0)
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    function = model(**options)
    kept = saved(function, x), torch.autograd.grad(function(x).square().sum(), x)[0]
    monkeypatch.setattr(_projection, "LARGE_BYTES", 0)
    again = saved(function, x), torch.autograd.grad(function(x).square().sum(), x)[0]
    # The hidden layers, 4 arrays each, and the read-outs with their states, one in 16.
    assert again[0] <= kept[0] - 2 * 5 * x.nbytes
    assert_close(again[1], kept[1])


@pytest.mark.parametrize("which", ["layer", "model"])
def test_recomputation_uses_the_parameters_of_the_forward_pass(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """functional_call has put the module's own back when the backward pass runs."""
    torch.manual_seed(0)
    module = layer() if which == "layer" else Transformer(6, num_tokens=6, depth=1).double()
    given = {
        name: torch.randn_like(parameter).requires_grad_()
        for name, parameter in module.named_parameters()
    }
    x = torch.randint(6, (2, 9)) if which == "model" else torch.randn(2, 9, 6).double()

    def gradients() -> tuple[Tensor, ...]:
        y: Tensor = functional_call(module, given, (x,))
        return torch.autograd.grad(y.square().sum(), [*given.values()])

    kept = gradients()
    monkeypatch.setattr(_projection, "LEAST_BYTES", 0)
    monkeypatch.setattr(_projection, "LARGE_BYTES", 0)
    for ours, expected in zip(gradients(), kept, strict=True):
        assert_close(ours, expected)


def test_a_layer_with_a_hook_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_projection, "LEAST_BYTES", 0)
    module = layer()
    seen: list[torch.Size] = []
    module.get_submodule("to_qkva.0").register_forward_hook(lambda m, x, y: seen.append(y.shape))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            module(torch.randn(1, 1, 6, dtype=torch.float64))
    assert seen == [torch.Size((1, 1, 18))] * 2


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 9, 6), (3, 9, 6), (9, 3, 6)])
def test_inference_in_blocks_gives_what_one_call_gives(
    shape: tuple[int, int, int], reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = layer(reverse=reverse, post_ln=True)
    x = torch.randn(shape, dtype=torch.float64)
    whole = module(x)
    monkeypatch.setattr(layer_module, "_BLOCK_ROWS", 4)
    with torch.no_grad():
        assert_close(module(x), whole.detach())


def in_training_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_module, "_BLOCK_ROWS", 8)
    monkeypatch.setattr(layer_module, "_LEAST_STEPS", 1)


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"prenorm": False}, {"post_ln": True}])
@pytest.mark.parametrize("shape", [(1, 37, 6), (3, 9, 6)])
def test_training_in_blocks_gives_what_one_call_gives(
    shape: tuple[int, int, int], options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = layer(**options)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(shape, dtype=torch.float64)
    tensors = [x, *module.parameters()]

    def gradients() -> tuple[Tensor, ...]:
        y = module(x)
        first = torch.autograd.grad(y, tensors, dy, create_graph=True)
        squares = torch.stack([g.square().sum() for g in first])
        second = torch.autograd.grad(squares.sum(), tensors, materialize_grads=True)
        return y, *first, *second, *torch.autograd.grad(module(x), tensors, dy)

    whole = gradients()
    in_training_blocks(monkeypatch)
    assert "TrainedInBlocks" in str(layer(**(options | {"post_ln": False}))(x).grad_fn)
    for ours, expected in zip(gradients(), whole, strict=True):
        assert_close(ours, expected)


def test_training_in_blocks_differentiates_the_state_and_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = layer()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    state = torch.randn(12, 1, dtype=torch.float64, requires_grad=True)
    cache = (torch.ones_like(state), state)
    dy = torch.randn_like(x)
    (whole,) = torch.autograd.grad(module(x, cache=cache), state, dy)
    in_training_blocks(monkeypatch)
    (ours,) = torch.autograd.grad(module(x, cache=cache), state, dy)
    assert_close(ours, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_in_blocks_sums_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = layer().to(dtype)
    x = torch.randn(1, 800, 6).to(dtype)
    whole = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    in_training_blocks(monkeypatch)
    blocks = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    exact = torch.autograd.grad(module.double()(x.double()).sum(), list(module.parameters()))
    for ours, theirs, expected in zip(blocks, whole, exact, strict=True):
        error, allowed = ((g - expected).norm() / expected.norm() for g in (ours, theirs))
        assert error <= max(2 * allowed, 4 * torch.finfo(dtype).eps)


def test_training_in_blocks_does_not_count_a_cache_of_its_own_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_training_blocks(monkeypatch)
    module = layer()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    weights = list(module.parameters())

    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        _, cache = module(x[:, :2], return_cache=True)
        y = module(x, cache=cache)
        return torch.autograd.grad(y.sum(), weights, create_graph=create_graph)

    for ours, expected in zip(gradients(True), gradients(False), strict=True):
        assert_close(ours, expected)


@pytest.mark.parametrize("prenorm", [False, True])
def test_training_in_blocks_gives_many_gradients_at_once(
    prenorm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_training_blocks(monkeypatch)
    module = layer(prenorm=prenorm)
    x = torch.randn(1, 20, 6, dtype=torch.float64, requires_grad=True)
    tensors = [x, *module.parameters()]
    dys = torch.randn(3, *x.shape, dtype=torch.float64)
    y = module(x)
    together = torch.autograd.grad(y, tensors, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        alone = torch.autograd.grad(y, tensors, dy, retain_graph=True)
        for ours, expected in zip(together, alone, strict=True):
            assert_close(ours[i], expected)


@pytest.mark.parametrize("frozen", ["norm.gamma", "to_qkva.0.weight", "x"])
def test_training_in_blocks_leaves_out_what_is_frozen(
    frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_training_blocks(monkeypatch)
    module = layer()
    x = torch.randn(1, 20, 6, dtype=torch.float64)
    tensors = dict(module.named_parameters()) | {"x": x}
    wanted = {name: t.requires_grad_() for name, t in tensors.items() if name != frozen}
    whole = torch.autograd.grad(module(x).sum(), list(wanted.values()))
    tensors[frozen].requires_grad_(False)
    for ours, expected in zip(
        torch.autograd.grad(module(x).sum(), list(wanted.values())), whole, strict=True
    ):
        assert_close(ours, expected)


def test_what_blocks_do_not_know_runs_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    in_training_blocks(monkeypatch)
    x = torch.randn(1, 20, 6)
    module = layer().float()
    y = module(x)
    torch.testing.assert_close(torch.func.vmap(module)(x[None]), y[None])
    with torch.no_grad():
        weights = {name: torch.stack([p, p]) for name, p in module.named_parameters()}
        call = torch.func.vmap(lambda weights: functional_call(module, weights, (x,)))
        torch.testing.assert_close(call(weights)[1], y)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    low = x.bfloat16().requires_grad_()
    assert module(low).dtype == torch.float32
    module(low).sum().backward()
    assert low.grad is not None and low.grad.isfinite().all()
    assert module.to("meta")(x.to("meta")).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_one_row_is_projected_as_by_the_layer(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(33, 130, bias=bias).to(dtype)
    x = torch.randn(1, 1, 33).to(dtype)
    with torch.no_grad():
        ours, exact = _projection.project(linear, x), linear.double()(x.double())
    assert ours.dtype == dtype
    # Half an ulp of the result, and for wide types some ulp of 33 products.
    tolerance = max(torch.finfo(dtype).eps, 16 * torch.finfo(torch.float64).eps)
    torch.testing.assert_close(ours.double(), exact, rtol=2 * tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(33, 130), (512, 64), (1, 1)])
def test_packed_weights_give_what_the_layer_gives(
    size: tuple[int, int], dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(*size, bias=bias).to(dtype)
    for shape in [(5, 1, size[0]), (2, 3, size[0]), (7, size[0])]:
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            with _projection.packed_weights(linear):
                ours = _projection.project(linear, x)
            again, theirs = _projection.project(linear, x), linear(x)
        assert ours.dtype == dtype and ours.shape == theirs.shape
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=2 * eps, atol=16 * eps)
        assert torch.equal(again, theirs)


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


def test_weights_that_are_more_than_their_numbers_are_left_to_the_layer() -> None:
    linear = nn.Linear(8, 4)
    weight = linear.weight.detach()
    linear.weight = nn.Parameter(TwoTensor(weight, 2 * weight))
    with torch.no_grad(), _projection.packed_weights(linear):
        for rows in (1, 3):
            x = torch.randn(rows, 8)
            y = _projection.project(linear, x)
            assert isinstance(y, TwoTensor)
            torch.testing.assert_close(y.b, F.linear(x, 2 * weight, linear.bias))


def test_generation_follows_weights_that_change() -> None:
    model = Transformer(16, num_tokens=32, depth=2)
    prompt = torch.randint(32, (2, 5))
    texts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        for weight in model.parameters():
            nn.init.normal_(weight)
        text = prompt
        for _ in range(8):
            text = torch.cat((text, model(text)[:, -1:].argmax(-1)), dim=1)
        assert model.generate(prompt, 8, temperature=0).tolist() == text[:, 5:].tolist()
        texts.append(text)
    assert not torch.equal(*texts)


def test_autocast_decides_the_dtype_with_packed_weights_too() -> None:
    linear = nn.Linear(8, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), _projection.packed_weights(linear):
        assert _projection.project(linear, torch.randn(2, 8)).dtype == torch.bfloat16


def test_autocast_decides_the_dtype_of_one_row_too() -> None:
    linear = nn.Linear(8, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert _projection.project(linear, torch.randn(1, 8)).dtype == torch.bfloat16
