"""The Equinox Transformer of mixed layers: PyTorch's numbers and files, states, errors."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from channels import channel_errors, weight_errors
from conftest import thinned
from drawn_models import STEPS, TOKENS, draw, drawn_ids, drawn_model
from safetensors.numpy import load_file, save_file

from gateloop_cpp import Transformer, checkpoint
from gateloop_cpp._files import read_entries
from gateloop_cpp._spec import describe, stored_problems
from gateloop_jax import GateLoopTransformer, load_checkpoint, save_checkpoint
from gateloop_jax._attention import RotaryEmbedding
from gateloop_jax._weights import to_tensors

KEY = jax.random.key(0)
# XLA compiles three programs for each. They have every mixer with each of its options on and off.
SPECS = (2, 22, 271, 850, 951, 1118, 1122, 1457, 2689, 2720, 2789)
PIECE = 11  # longer than some windows, as long as one, shorter than others


def widened(model: GateLoopTransformer) -> GateLoopTransformer:
    wide: GateLoopTransformer = jax.tree.map(lambda w: jnp.asarray(np.float64(w)), model)
    return wide


def drawn(options: dict[str, Any]) -> GateLoopTransformer:
    """By one program; a program for each operation takes longer to compile."""
    return jax.jit(lambda key: GateLoopTransformer.from_options(options, key))(KEY)


@pytest.fixture(scope="module")
def plain() -> GateLoopTransformer:
    return drawn(dict(num_tokens=8, dim=4, depth=1))


@eqx.filter_jit
def logits_and_gradients(model: GateLoopTransformer, ids: Any) -> tuple[Any, Any]:
    def loss(model: GateLoopTransformer) -> tuple[Any, Any]:
        logits = model(ids)
        log_p = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_p, ids[:, 1:, None], -1)), logits

    gradients, logits = jax.grad(loss, has_aux=True)(model)
    return logits, gradients


@pytest.mark.parametrize("seed", thinned(SPECS, 2))
def test_equals_pytorch_whole_and_in_pieces(x64: None, seed: int, tmp_path: Path) -> None:
    theirs, ids = drawn_model(seed), drawn_ids(seed)
    checkpoint.save(theirs, tmp_path)
    ours, own_ids = widened(load_checkpoint(tmp_path)), jnp.asarray(ids.numpy())
    whole, gradients = logits_and_gradients(ours, own_ids)

    theirs.double()
    theirs(ids, return_loss=True).backward()
    expected = {"logits": theirs(ids).detach().numpy()}
    for name, weight in theirs.named_parameters():
        expected[name] = np.zeros(weight.shape) if weight.grad is None else weight.grad.numpy()
    given = {"logits": np.asarray(whole), **to_tensors(gradients, ours.weights())}
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        # In float64 they differ by the order of their sums. Where relative positions cancel, as in
        # a window of one step, both are zero but for that.
        if name == "logits":
            error = channel_errors(given[name], value)
        else:
            error = weight_errors(given[name], value, least=1e-5)
        assert (error <= 1e-10).all(), f"{json.dumps(theirs.options)}: {name}: {error.max()}"

    r = random.Random(seed)
    state = ours.initial_state(len(ids), STEPS)
    shapes = jax.eval_shape(lambda: state)
    begin, parts = 0, []
    while begin < STEPS:
        if begin + PIECE <= STEPS and r.random() < 0.5:
            logits, state = ours.advance(own_ids[:, begin : begin + PIECE], state)
        else:
            logits, state = ours.step(own_ids[:, begin], state)
            logits = logits[:, None]
        parts.append(logits)
        begin += logits.shape[1]
        assert jax.eval_shape(lambda s=state: s) == shapes  # constant, and so is the cost
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_states_keep_their_shapes_and_dtypes(dtype: str) -> None:
    def run(key: Any, options: dict[str, Any]) -> Any:
        model = GateLoopTransformer.from_options(options, key)
        model = jax.tree.map(lambda w: w.astype(dtype), model)
        state = model.initial_state(2, STEPS)
        return state, model.advance(jnp.zeros((2, PIECE), int), state)

    for seed in SPECS:
        before, (logits, after) = jax.eval_shape(functools.partial(run, options=draw(seed)), KEY)
        assert logits.dtype == dtype and logits.shape == (2, PIECE, TOKENS)
        assert after == before, draw(seed)


@pytest.mark.parametrize("seed", range(24))
def test_a_checkpoint_comes_back_unchanged(seed: int, tmp_path: Path) -> None:
    theirs = drawn_model(seed)
    checkpoint.save(theirs, tmp_path / "theirs")
    save_checkpoint(tmp_path / "ours", load_checkpoint(tmp_path / "theirs"))
    sent, returned = (load_file(tmp_path / d / "model.safetensors") for d in ("theirs", "ours"))
    assert sent.keys() == returned.keys()
    for name, tensor in sent.items():
        np.testing.assert_array_equal(tensor, returned[name])
    again = checkpoint.load(tmp_path / "ours")
    assert describe(again.options) == describe(theirs.options)


def test_a_plain_model_is_stored_as_by_version_0_1(
    plain: GateLoopTransformer, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, plain)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model"]
    later = {"joint_kv", "window", "layers", "simple_gate_loop", "tie_embeddings"}
    later |= {"gate_loop_dim_key", "per_key_transitions", "feature_map", "phase_bias"}
    assert not later & stored.keys()
    assert stored.keys() | later == Transformer(4, num_tokens=8, depth=1).options.keys()


def test_initial_weights_have_pytorchs_distributions(tmp_path: Path) -> None:
    # With all that has weights: biases of transitions, both positions, a tied embedding.
    seed = 12816
    options = draw(seed)
    save_checkpoint(tmp_path, drawn(options))
    torch.manual_seed(seed)
    theirs = Transformer(**options).state_dict()
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        expected = theirs[name].numpy()
        varies = expected.ndim == 2 or "fn.0.bias" in name or "fn.2.bias" in name
        if varies or "to_out.1.bias" in name:
            # Eight standard errors of a deviation of this many numbers.
            np.testing.assert_allclose(tensor.std(), expected.std(), rtol=8 / expected.size**0.5)
            assert abs(tensor).max() < 1.5 * abs(expected).max(), name
        elif "to_a" not in name or options.get("transition_bias"):
            np.testing.assert_allclose(tensor, expected, rtol=1e-6)


def test_the_cost_of_a_window_grows_with_the_length_only() -> None:
    options = dict(num_tokens=8, dim=4, depth=1, layers="attention", window=8)

    def logits(key: Any, ids: Any) -> Any:
        return GateLoopTransformer.from_options(options, key)(ids)

    def flops(length: int) -> float:
        ids = jax.ShapeDtypeStruct((1, length), "int32")
        cost: Any = jax.jit(logits).lower(KEY, ids).cost_analysis()
        return float(cost["flops"])

    assert flops(2048) < 2.1 * flops(1024)


# ---- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(dim=0),
        dict(depth=-1),
        dict(ff_mult=0),
        dict(layers="gate_loop,convolution"),
        dict(layers="gate_loop*3"),
        dict(layers=["gate_loop"] * 3),
        dict(layers=[{"mixer": "attention", "gate": "polar"}]),
        dict(layers="attention", window=0),
        dict(layers="attention", heads=0),
        dict(layers="attention", rotary_emb=True, dim_head=3),
        dict(joint_kv=True, gate_loop_heads=4),
        dict(gate_loop_heads=3),
        dict(gate="complex"),
        dict(normalize_input="median"),
        dict(phase_bias=(0.0, 1.0)),
        dict(gate_loop_heads=4, gate_loop_dim_key=6),
        dict(transition_bias=(0.0, 1.0)),
        dict(simple_gate_loop={"norm": True}),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused_in_the_same_words(options: dict[str, Any]) -> None:
    options = dict(dim=8, num_tokens=4, depth=2) | options
    with pytest.raises(ValueError) as theirs:
        Transformer(**options)
    with pytest.raises(ValueError) as ours:
        GateLoopTransformer(**options, key=KEY, architecture="pytorch")
    assert str(ours.value) == str(theirs.value)


def test_options_of_the_other_architecture_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 'pytorch' for the options window, got 'jax'"):
        GateLoopTransformer(8, 4, 1, KEY, window=3)
    with pytest.raises(ValueError, match='unknown option "windows"'):
        GateLoopTransformer(8, 4, 1, KEY, architecture="pytorch", windows=3)
    with pytest.raises(TypeError, match="options must be numbers, words and lists"):
        GateLoopTransformer(8, 4, 1, KEY, architecture="pytorch", window=object())


def test_weights_that_do_not_fit_are_refused_in_the_same_words(tmp_path: Path) -> None:
    model = drawn_model(0)
    checkpoint.save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["token_emb.weight"]
    tensors |= {"extra": np.zeros((2, 3)), "layers.0.1.fn.0.bias": np.zeros(5)}
    save_file(tensors, file)
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path)
    assert str(error.value) == f"{file}: {stored_problems(model.options, read_entries(file))}"


def test_arrays_that_are_not_those_of_the_options_are_not_saved(
    plain: GateLoopTransformer, tmp_path: Path
) -> None:
    wider = eqx.tree_at(lambda m: m.embedding, plain, jnp.ones((8, 5)))
    with pytest.raises(ValueError, match=r"token_emb.weight is \(8, 5\), the model's is \(8, 4\)"):
        save_checkpoint(tmp_path, wider)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "batch", "length", "message"),
    [
        (dict(layers="attention"), 2, None, r"initial_state needs the length of the longest"),
        (dict(layers="attention"), 2, 2, r"state must have room for 3 steps, got a state of 2"),
        (
            dict(layers="attention", window=3),
            1,
            None,
            r"keys must be \(2, 2, 2, 4\), got shape \(1,",
        ),
        (
            dict(gate_loop_heads=2),
            1,
            None,
            r"GateLoop: state must be \(2, 2, 4, 4\), got shape \(1,",
        ),
        (dict(gate="sigmoid"), 1, None, r"GateLoop: state must be \(2, 8\), got shape \(1, 8\)"),
        (dict(layers="none", simple_gate_loop=True), 1, None, r"initial_state must be \(B, D\)"),
    ],
    ids=str,
)
def test_states_that_do_not_fit_are_refused(
    options: dict[str, Any], batch: int, length: int | None, message: str
) -> None:
    def run(key: Any) -> Any:
        model = GateLoopTransformer(
            8, 8, 1, key, architecture="pytorch", heads=2, dim_head=4, **options
        )
        return model.advance(jnp.zeros((2, 3), int), model.initial_state(batch, length))

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, KEY)


def test_more_steps_than_the_state_has_room_for_give_no_number() -> None:
    model = drawn(dict(num_tokens=TOKENS, dim=8, depth=1, layers="attention"))
    ids = jnp.arange(3)
    logits, state = model.advance(ids, model.initial_state(length=5))
    assert jnp.isfinite(logits).all()
    logits, _ = model.advance(ids, state)
    assert jnp.isnan(logits).all()


def test_a_model_in_half_precision_turns_by_exact_frequencies(tmp_path: Path) -> None:
    options: Any = dict(layers="attention", rotary_emb=True, dim_head=8)
    model = GateLoopTransformer(4, 8, 1, KEY, architecture="pytorch", **options)
    rotary: Any = jax.tree.leaves(model, is_leaf=lambda m: isinstance(m, RotaryEmbedding))
    (exact,) = [leaf for leaf in rotary if isinstance(leaf, RotaryEmbedding)]
    t = jax.random.normal(KEY, (1, 1, 2, 8))
    positions = jnp.array([[3000, 3001]])
    for dtype in (jnp.bfloat16, jnp.float16):
        cast = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), exact)
        assert jnp.allclose(cast(t, positions), exact(t, positions), atol=1e-5)
        whole = jax.tree.map(
            lambda x, dtype=dtype: x.astype(dtype) if eqx.is_inexact_array(x) else x, model
        )
        save_checkpoint(tmp_path, whole)
        stored = load_file(tmp_path / "model.safetensors")
        (frequencies,) = (numbers for name, numbers in stored.items() if name.endswith("freqs"))
        np.testing.assert_array_equal(frequencies, exact.freqs)
        learned = eqx.tree_at(lambda r: r.freqs, cast, cast.freqs * 1.5)  # no rounding of those
        assert not jnp.allclose(learned(t, positions), exact(t, positions), atol=0.1)


@pytest.mark.parametrize("window", [None, 3, 100])
def test_attention_over_no_steps_or_no_sequences(window: int | None) -> None:
    model = drawn(dict(num_tokens=8, dim=4, depth=1, layers="attention", window=window, heads=2))
    for batch, time in [(2, 0), (0, 5), (0, 2)]:
        ids = jnp.zeros((batch, time), int)
        assert model(ids).shape == model(ids, ids).shape == (batch, time, 8)
        logits, state = model.advance(ids, model.initial_state(batch, 5))
        assert logits.shape == (batch, time, 8)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(
            jnp.shape, model.initial_state(batch, 5)
        )
