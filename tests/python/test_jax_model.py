"""The Equinox Transformer against both models of gateloop-transformer, and its checkpoints."""

import json
import math
import re
import subprocess
import warnings
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from interrupted import interruptions, synced_renames
from jax import Array
from safetensors.numpy import load_file, save_file

from gateloop_jax import GateLoopTransformer, _checkpoint, load_checkpoint, save_checkpoint

with warnings.catch_warnings():
    # The peer uses torch.jit.script and equinox.static_field, both deprecated and both working.
    warnings.simplefilter("ignore")
    from gateloop_transformer import Transformer
    from gateloop_transformer.gateloop_transformer_jax import GateLoopTransformer as Peer

SIZES: dict[str, Any] = dict(num_tokens=50, dim=24, depth=2)
KEY = jax.random.key(0)
IDS = np.random.default_rng(0).integers(0, 50, (3, 21))


def loss(model: Any, ids: Any) -> Array:
    log_p = jax.nn.log_softmax(model(ids[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(log_p, ids[:, 1:, None], -1))


def leaves(tree: Any) -> dict[str, Array]:
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in named}


def widened(model: Any) -> Any:
    return jax.tree.map(lambda w: w.astype("float64"), model)


# ---- The JAX model of the package ----------------------------------------------------------------


def test_names_and_initial_weights_are_the_peers() -> None:
    ours, theirs = (leaves(make(**SIZES, key=KEY)) for make in (GateLoopTransformer, Peer))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_equals_the_peer_in_float32() -> None:
    ours, theirs = GateLoopTransformer(**SIZES, key=KEY), Peer(**SIZES, key=KEY)
    # Logits of order 0.1: sums of 24 products and scans of 21 steps. They are rounded at 6e-8 of
    # numbers that the standard normal weights make large.
    np.testing.assert_allclose(ours(IDS), theirs(IDS), atol=1e-5)


def test_equals_the_peer_in_float64_and_its_gradients(x64: None) -> None:
    ours = widened(GateLoopTransformer(**SIZES, key=KEY))
    theirs = widened(Peer(**SIZES, key=KEY))
    np.testing.assert_allclose(ours(IDS), theirs(IDS), rtol=1e-10, atol=1e-10)
    given, expected = (leaves(jax.jit(jax.grad(loss))(m, IDS)) for m in (ours, theirs))
    assert given.keys() == expected.keys()
    for name in given:
        np.testing.assert_allclose(given[name], expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("architecture", ["jax", "pytorch"])
def test_without_a_batch_equals_a_batch_of_one(architecture: Any) -> None:
    model = GateLoopTransformer(**SIZES, key=KEY, architecture=architecture)
    # The products may be summed in another order.
    np.testing.assert_allclose(model(IDS[0]), model(IDS)[0], atol=1e-5)


# ---- State ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("architecture", ["jax", "pytorch"])
def test_prompt_and_steps_equal_the_whole(x64: None, architecture: Any, batch: int | None) -> None:
    model = widened(GateLoopTransformer(**SIZES, key=KEY, architecture=architecture))
    ids = jnp.asarray(IDS if batch else IDS[0])
    logits, state = model.advance(ids[..., :9], model.initial_state(batch))
    shapes = jax.eval_shape(lambda: state)
    parts = [logits]
    for t in range(9, 21):
        logits, state = model.step(ids[..., t], state)
        parts.append(logits[..., None, :])
        assert jax.eval_shape(lambda s=state: s) == shapes  # constant, and so is the cost
    np.testing.assert_allclose(jnp.concatenate(parts, -2), model(ids), rtol=1e-9, atol=1e-9)


def test_errors_name_the_argument() -> None:
    model = GateLoopTransformer(**SIZES, key=KEY)
    with pytest.raises(ValueError, match=r"ids must be integers .*, got float32 of shape \(3,\)"):
        model(jnp.ones(3))
    with pytest.raises(ValueError, match=r"ids must be .*, got int32 of shape \(1, 1, 1\)"):
        model(jnp.ones((1, 1, 1), int))
    with pytest.raises(ValueError, match="state must have one entry for each of 2 layers, got 1"):
        model.advance(IDS, model.initial_state(3)[:1])
    with pytest.raises(ValueError, match=r"initial_state must be \(B, D\) = \(3, 24\)"):
        model.advance(IDS, model.initial_state(2))
    with pytest.raises(ValueError, match="dim must be positive, got 0"):
        GateLoopTransformer(50, 0, 2, KEY)
    with pytest.raises(ValueError, match="architecture must be 'jax' or 'pytorch', got 'torch'"):
        GateLoopTransformer(**SIZES | dict(key=KEY, architecture="torch"))


# ---- The PyTorch model, C++ and their checkpoints ------------------------------------------------


@pytest.fixture
def peer() -> Transformer:
    torch.manual_seed(0)
    return Transformer(**SIZES, checkpoint_gate_looped_attn=False)


def write(directory: Path, options: dict[str, Any], tensors: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(
        json.dumps({"format": 1, "model": options}), encoding="utf-8"
    )
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture
def checkpoint(tmp_path: Path, peer: Transformer) -> Path:
    tensors = {name: w.numpy() for name, w in peer.state_dict().items()}
    return write(tmp_path / "peer", SIZES, tensors)


def test_pytorch_weights_give_pytorchs_logits_and_gradients(
    checkpoint: Path, peer: Transformer
) -> None:
    model = load_checkpoint(checkpoint)
    # Logits of order 1, rounded some hundred times at 6e-8.
    theirs = peer(torch.from_numpy(IDS)).detach()
    np.testing.assert_allclose(model(IDS), theirs, atol=1e-5)

    peer(torch.from_numpy(IDS), return_loss=True).backward()
    given = jax.grad(loss)(model, IDS)
    mix, feed_forward = given.layers[1]
    reference: Any = dict(peer.named_parameters())
    at = "layers.1.0.fn"
    to_a = reference[f"{at}.to_a.0.weight"].grad.T  # of which nine tenths are let through
    for ours, expected in (
        (mix.wk, reference[f"{at}.to_qkv.weight"].grad.T[:, 24:48]),
        (mix.wa, torch.cat([to_a[:, 0::2], to_a[:, 1::2]], 1)),
        (feed_forward.proj_in.bias, reference["layers.1.1.fn.0.bias"].grad),
        (given.embedding, reference["token_emb.weight"].grad),
        (given.head, reference["to_logits.1.weight"].grad.T),
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_weights_come_back_unchanged(checkpoint: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ours", load_checkpoint(checkpoint))
    sent = load_file(checkpoint / "model.safetensors")
    returned = load_file(tmp_path / "ours" / "model.safetensors")
    assert sent.keys() == returned.keys()
    for name in sent:
        np.testing.assert_array_equal(sent[name], returned[name])


def test_cpp_reads_what_we_save(tmp_path: Path, build_dir: Path) -> None:
    model = GateLoopTransformer(
        256, 24, 2, KEY, ff_mult=2, architecture="pytorch", frac_gradient_state_transition=0.5
    )
    save_checkpoint(tmp_path, model)
    (written,) = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["provenance"]
    assert written["jax"] == jax.__version__ and "revision" in written
    text = Path(__file__).read_bytes()[:1025]
    (tmp_path / "text").write_bytes(text)
    command = [build_dir / "gateloop", "evaluate", "--checkpoint", tmp_path, "--length", "128"]
    command += ["--data", tmp_path / "text", "--split", "0,0,1025", "--part", "test"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    found = re.search(r"([\d.]+) bits", result.stdout)
    assert found, result.stdout
    ids = np.stack([np.frombuffer(text, np.uint8)[i : i + 129] for i in range(0, 1024, 128)])
    # Printed with four decimals.
    assert float(found[1]) == pytest.approx(float(loss(model, ids)) / math.log(2), abs=2e-4)


def test_an_option_of_later_is_refused_by_name(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    write(checkpoint, SIZES | dict(an_option_of_later=1), tensors)
    with pytest.raises(ValueError, match=r'config.json: .* unknown option "an_option_of_later"'):
        load_checkpoint(checkpoint)


def test_max_heads_by_number_are_max_heads(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    idle = dict(gate_loop_heads=24, dim_gate_looped_attn=24, rotary_emb=True, heads=3)
    write(checkpoint, SIZES | idle, tensors)
    assert len(load_checkpoint(checkpoint).layers) == 2


def test_damaged_checkpoints_are_refused(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["extra"] = tensors.pop("to_logits.0.gamma")
    tensors["layers.1.0.norm.gamma"] = np.ones(5, np.float32)
    write(checkpoint, SIZES, tensors)
    with pytest.raises(ValueError, match=r"missing to_logits.0.gamma \(24\); .* extra") as error:
        load_checkpoint(checkpoint)
    assert "layers.1.0.norm.gamma is (5), the model's is (24)" in str(error.value)
    with pytest.raises(ValueError, match="weights must be 'latest' or 'best', got 'last'"):
        load_checkpoint(checkpoint, "last")
    (checkpoint / "config.json").write_text('{"format": 2, "model": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match="format 2; this package reads format 1"):
        load_checkpoint(checkpoint)
    (checkpoint / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config.json: not a model configuration"):
        load_checkpoint(checkpoint)


def test_matrices_of_int8_are_the_numbers_that_they_stand_for(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    name, scale = "layers.1.1.fn.0.weight", "layers.1.1.fn.0.weight.scale"
    scales = np.abs(tensors[name]).max(1) / np.float32(127)
    integers = np.round(tensors[name] / scales[:, None]).astype(np.int8)
    stored = tensors | {name: integers, scale: scales}
    write(checkpoint, SIZES, stored)
    loaded = load_checkpoint(checkpoint).layers[1][1].proj_in.weight
    assert loaded.dtype == jnp.float32
    np.testing.assert_array_equal(loaded, (integers * scales[:, None]).T)
    needed = re.escape(f"{name} is I8 and needs {scale}, F32 (96)")
    for bad in (None, scales[:5], scales.astype(np.float64)):
        damaged = {n: x for n, x in (stored | {scale: bad}).items() if x is not None}
        write(checkpoint, SIZES, damaged)
        with pytest.raises(ValueError, match=f"model.safetensors: {needed}"):
            load_checkpoint(checkpoint)


def test_a_tied_head_is_saved(checkpoint: Path, tmp_path: Path) -> None:
    model = load_checkpoint(checkpoint)
    tied = eqx.tree_at(lambda m: m.head, model, np.asarray(model.embedding).T)
    save_checkpoint(tmp_path / "tied", tied)
    loaded = load_checkpoint(tmp_path / "tied")
    np.testing.assert_array_equal(loaded.head, loaded.embedding.T)
    np.testing.assert_array_equal(loaded.embedding, model.embedding)


def test_an_interrupted_save_leaves_one_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {dim: GateLoopTransformer(8, dim, 1, KEY, architecture="pytorch") for dim in (8, 16)}
    found = []
    for calls in interruptions(
        monkeypatch,
        lambda: save_checkpoint(tmp_path, models[8]),
        lambda: save_checkpoint(tmp_path, models[16], training={"steps": 3}),
        (_checkpoint, "save_file"),
        stays=True,
    ):
        loaded = load_checkpoint(tmp_path)
        dim = loaded.embedding.shape[1]
        assert eqx.tree_equal(loaded, models[dim])
        found.append(dim)
        assert calls < 100
    assert found == sorted(found)  # the old one, and from some call on the new one
    assert set(found) == {8, 16}


def test_a_saved_model_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GateLoopTransformer(8, 8, 1, KEY, architecture="pytorch")
    targets = synced_renames(monkeypatch, lambda: save_checkpoint(tmp_path, model))
    assert targets == [tmp_path / "model.safetensors", tmp_path / "config.json"]


def test_the_jax_architecture_is_not_saved(tmp_path: Path) -> None:
    model = GateLoopTransformer(**SIZES, key=KEY)
    with pytest.raises(ValueError, match="tied embedding, eps in the norms, approximate GELU"):
        save_checkpoint(tmp_path, model)
    assert not list(tmp_path.iterdir())


def test_trains_under_jit_with_donation() -> None:
    model = GateLoopTransformer(**SIZES, key=KEY, architecture="pytorch")

    @eqx.filter_jit(donate="all-except-first")
    def step(ids: Any, model: GateLoopTransformer) -> tuple[GateLoopTransformer, Array]:
        nats, gradient = eqx.filter_value_and_grad(loss)(model, ids)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradient)), nats

    losses = []
    for _ in range(10):
        model, nats = step(jnp.asarray(IDS), model)
        losses.append(float(nats))
    assert losses[-1] < losses[0] - 0.1
