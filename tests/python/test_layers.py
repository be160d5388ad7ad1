"""Models of mixed layers: the table of weights, caches, windows, files, and the C++ modules."""

import copy
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from channels import channel_errors, weight_errors
from drawn_models import STEPS, drawn_ids, drawn_model
from safetensors.torch import load_file, save_file

from gateloop_cpp import CausalFullAttention, Decoder, GateLoopedAttention, Transformer, checkpoint
from gateloop_cpp._files import read_entries
from gateloop_cpp._spec import describe, stored, stored_problems

# In float64 two ways to the same number differ by the order of their sums only.
CLOSE: dict[str, Any] = dict(rtol=1e-10, atol=1e-12)
SPECS = range(24)


@pytest.mark.parametrize("seed", SPECS)
def test_the_modules_have_the_weights_of_the_table(seed: int) -> None:
    model = drawn_model(seed)
    table = describe(model.options)["weights"]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.options["tie_embeddings"]:
        assert model.get_parameter(model.logits_weight) is model.token_emb.weight
        del shapes[model.logits_weight]
    assert shapes == table


@pytest.mark.parametrize("seed", SPECS)
def test_a_sequence_cut_anywhere_gives_the_whole(seed: int) -> None:
    model, ids = drawn_model(seed).double(), drawn_ids(seed)
    narrow = copy.deepcopy(model).float()
    decoder, r = Decoder(narrow), random.Random(seed)
    with torch.no_grad():
        whole = model(ids)
        theirs = channel_errors(narrow(ids), whole)
        for most in (1, 9, STEPS):
            begin, cache, state, parts, read = 0, None, None, [], []
            while begin < STEPS:
                end = min(STEPS, begin + r.randint(1, most))
                logits, cache = model(ids[:, begin:end], cache=cache, return_cache=True)
                parts.append(logits)
                logits, state = decoder(ids[:, begin:end], state)
                read.append(logits)
                begin = end
            torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
            # Twice the error of the modules in float32, and some tens of roundings of 2^-24.
            allowed = 2 * theirs.max() + 64 * 2**-24
            assert (channel_errors(torch.cat(read, 1), whole) <= allowed).all()


def test_modules_in_cpp_compute_the_same(build_dir: Path, tmp_path: Path) -> None:
    models = {tmp_path / str(seed): drawn_model(seed) for seed in SPECS}
    for folder, model in models.items():
        checkpoint.save(model, folder)
        save_file({"ids": drawn_ids(int(folder.name))}, folder / "ids.safetensors")
    subprocess.run([build_dir / "model_results", *models], check=True)
    for folder, model in models.items():
        ids, cpp = drawn_ids(int(folder.name)), load_file(folder / "results.safetensors")
        model.double()
        logits, loss = model(ids), model(ids, return_loss=True)
        loss.backward()
        ours = {"logits": logits.detach(), "loss": loss.detach().view(1)}
        ours |= {f"grad/{k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
        assert cpp.keys() == ours.keys(), folder
        for name, value in ours.items():
            # A window of one step leaves the transition no gradient but roundings.
            if name.startswith("grad/"):
                error = weight_errors(cpp[name], value, least=1e-5)
            else:
                error = channel_errors(cpp[name], value)
            what = f"{json.dumps(model.options)}: {name}: {error.max()}"
            assert (error <= 1e-10).all(), what


@pytest.mark.parametrize("seed", SPECS)
def test_a_checkpoint_round_trip_changes_nothing(seed: int, tmp_path: Path) -> None:
    model, ids = drawn_model(seed), drawn_ids(seed)
    checkpoint.save(model, tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert describe(loaded.options) == describe(model.options)
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
    if model.options["tie_embeddings"]:
        assert loaded.get_parameter(loaded.logits_weight) is loaded.token_emb.weight


def test_a_quantised_model_loads_as_the_numbers_that_it_stands_for(
    build_dir: Path, tmp_path: Path
) -> None:
    model, ids = drawn_model(0), drawn_ids(0)
    checkpoint.save(model, tmp_path / "wide")
    command: list[str | Path] = [build_dir / "gateloop", "quantize", "--format", "int8"]
    command += ["--checkpoint", tmp_path / "wide", "--out", tmp_path / "narrow"]
    subprocess.run(command, check=True)
    weights = load_file(tmp_path / "narrow" / "model.safetensors")
    assert weights["layers.0.1.fn.0.weight"].dtype == torch.int8
    narrow = checkpoint.load(tmp_path / "narrow")
    for name, weight in model.state_dict().items():
        # Rounded to a 127th of the largest number of its row.
        largest = weight.abs().amax(-1, keepdim=True) if weight.ndim == 2 else weight.abs()
        assert ((narrow.state_dict()[name] - weight).abs() <= largest / 254 * 1.001).all()
    with torch.no_grad():
        assert not torch.equal(narrow(ids), model(ids))


def test_a_plain_model_is_stored_as_before(tmp_path: Path) -> None:
    checkpoint.save(Transformer(8, num_tokens=4, depth=1), tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["model"]
    assert (
        not {"joint_kv", "window", "layers", "simple_gate_loop", "tie_embeddings"} & stored.keys()
    )


@pytest.mark.parametrize(
    "layers", ["gate_loop*2,attention", ["gate_loop", "gate_loop", "attention"]]
)
def test_a_pattern_is_repeated_to_the_depth(layers: Any) -> None:
    model = Transformer(8, num_tokens=4, depth=7, heads=1, dim_head=4, layers=layers)
    mixers = [type(model.get_submodule(f"layers.{i}.0.fn")) for i in range(7)]
    period = [GateLoopedAttention, GateLoopedAttention, CausalFullAttention]
    assert mixers == [*period, *period, GateLoopedAttention]


def test_a_simple_gate_loop_may_be_of_some_layers() -> None:
    first = {"mixer": "gate_loop", "simple_gate_loop": True}
    second = {"mixer": "gate_loop", "simple_gate_loop": False}
    for simple in (False, True):
        model = Transformer(8, num_tokens=4, depth=3, simple_gate_loop=simple,
            layers=[first, second, "gate_loop"])  # fmt: skip
        has = [len(model.get_submodule(f"layers.{i}")._modules) == 3 for i in range(3)]
        assert has == [True, False, simple]
        assert describe(model.options) == describe(stored(model.options))


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("window", [1, 3, 8, 64])
def test_a_window_is_attention_over_the_last_steps(window: int, softmax: bool) -> None:
    torch.manual_seed(window)
    options: dict[str, Any] = dict(dim_head=4, heads=3, rotary_emb=True, softmax_normalize=softmax)
    full = CausalFullAttention(12, **options).double()
    local = CausalFullAttention(12, window=window, **options).double()
    local.load_state_dict(full.state_dict())
    x = torch.randn(2, 30, 12, dtype=torch.float64)
    y = local(x)
    for i in range(30):
        # Rotary positions are relative: a window alone gives the same.
        alone = full(x[:, max(0, i - window + 1) : i + 1])
        torch.testing.assert_close(y[:, i], alone[:, -1], **CLOSE)


def test_the_cache_of_a_window_is_bounded() -> None:
    local = CausalFullAttention(8, dim_head=4, heads=2, window=5)
    _, cache = local(torch.randn(3, 20, 8), return_cache=True)
    keys, values, steps = cache
    assert keys.shape == values.shape == (3, 2, 4, 4) and steps == 20
    assert keys.untyped_storage().nbytes() == keys.numel() * 4


@pytest.mark.parametrize("ablated", [False, True])
@pytest.mark.parametrize("gate", ["polar", "sigmoid"])
def test_joint_kv_is_gate_loop_with_k_of_one(gate: Any, ablated: bool) -> None:
    torch.manual_seed(3)
    joint = GateLoopedAttention(8, gate=gate, joint_kv=True).double()
    x = torch.randn(2, 19, 8, dtype=torch.float64)
    q, kv = joint.to_qkv(x).chunk(2, -1)
    z = joint.to_a(x)
    if gate == "polar":
        pairs = torch.view_as_complex(z.unflatten(-1, (-1, 2)))
        a = torch.polar(pairs.abs().sigmoid(), pairs.angle())
    else:
        a = z.sigmoid()
    if ablated:
        a = torch.ones_like(a)
    h, reads = torch.zeros_like(a[:, 0]), []
    for t in range(19):
        h = a[:, t] * h + kv[:, t]
        reads.append(q[:, t] * h.real)
    assert joint.to_gates is not None
    expected = joint.to_out(joint.to_gates(x) * torch.stack(reads, 1))
    y = joint(x, ablate_state_transition=ablated)
    torch.testing.assert_close(y, expected, **CLOSE)


@pytest.mark.parametrize("seed", SPECS)
def test_recomputed_blocks_give_the_same_gradients(seed: int) -> None:
    plain = drawn_model(seed).double()
    again = copy.deepcopy(plain)
    again.checkpoint_blocks = True
    for model in (plain, again):
        model(drawn_ids(seed), return_loss=True).backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layers="gate_loop,convolution"), r'layers must be a pattern .*"convolution" is not'),
        (dict(layers="gate_loop*0"), r"does not end in a number of layers"),
        (dict(layers="gate_loop*3"), r"more than the model's 2 layers"),
        (dict(layers=[]), r'"layers" must be a pattern or a list'),
        (dict(layers=["gate_loop"] * 3), r"at most depth 2 entries"),
        (dict(layers=[{"mixer": "attention", "gate": "polar"}]), r'unknown option "gate"'),
        (dict(layers=[{"heads": 2}]), r'objects {"mixer": name'),
        (dict(layers=[{"mixer": "none", "ff_mult": 0}]), r"mult must be positive, got 0"),
        (dict(layers="attention", window=0), r"window must be positive, got 0"),
        (dict(joint_kv=True, gate_loop_heads=4), r"joint_kv needs max heads"),
        (dict(simple_gate_loop={"norm": True}), r'unknown option "norm"'),
    ],
)
def test_layers_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transformer(8, num_tokens=4, depth=2, **options)


@pytest.mark.parametrize("front", ["python", "cpp"])
def test_weights_that_do_not_fit_are_named_in_the_same_words(
    front: str, build_dir: Path, tmp_path: Path
) -> None:
    model = drawn_model(0)
    checkpoint.save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["token_emb.weight"]
    tensors["extra"] = torch.zeros(2, 3)
    name = "layers.0.1.fn.0.bias"
    tensors[name] = torch.zeros(5)
    save_file(tensors, file)
    expected = stored_problems(model.options, read_entries(file))
    assert "missing token_emb.weight (17, 12)" in expected
    assert "unexpected extra (2, 3)" in expected and f"{name} is (5)" in expected
    if front == "python":
        with pytest.raises(ValueError) as error:
            checkpoint.load(tmp_path)
        text = str(error.value)
    else:
        command: list[str | Path] = [build_dir / "gateloop", "generate", "--checkpoint", tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        text = done.stderr
    assert f"{file}: {expected}" in text


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ((None,), r"one entry for each of 2 layers"),
        ((None, torch.zeros(3)), r"a pair of caches"),
    ],
)
def test_caches_of_other_layers_are_refused(cache: Any, message: str) -> None:
    model = Transformer(8, num_tokens=4, depth=2, simple_gate_loop=True)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


@pytest.mark.parametrize(
    "cache",
    [
        (torch.zeros(1, 2, 4, 4),) * 2,
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), 9.0),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 9),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), 3),
    ],
)
def test_caches_of_other_windows_are_refused(cache: Any) -> None:
    local = CausalFullAttention(8, dim_head=4, heads=2, window=5)
    with pytest.raises(ValueError, match="cache"):
        local(torch.zeros(1, 1, 8), cache=cache)
