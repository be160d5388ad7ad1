"""Decoder reads what the modules read: the runtime of C++ programs on a module's weights."""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from gateloop_cpp import Decoder, DecoderState, Sampler, Transformer, checkpoint


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


MODELS: list[dict[str, Any]] = [
    {},
    dict(post_ln_norm=True, sub_ln=True),
    dict(dim_gate_looped_attn=24, attn_add_swish_gating=False),
    dict(gate="sigmoid", normalize_input=True),
    dict(gate_loop_heads=4),
    dict(ablate_complex=True),
    dict(ablate_state_transition=True),
    dict(use_gate_looped_attn=False, dim_head=8, heads=2, rotary_emb=True),
    dict(layers="gate_loop,attention", dim_head=8, heads=2, window=6, simple_gate_loop=True),
    dict(joint_kv=True, tie_embeddings=True),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def small(**options: Any) -> Transformer:
    return Transformer(16, num_tokens=32, depth=2, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("options", MODELS, ids=str)
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
        assert logits.dtype == torch.float32 and not logits.requires_grad
        pieces.append(logits)
    # All between the weights and the logits is float32. So it is no further from the truth than the
    # modules are. Per channel.
    error = (torch.cat(pieces, 1).double() - exact).abs().amax((0, 1))
    theirs = (by_modules.double() - exact).abs().amax((0, 1))
    assert (error <= (2 * theirs).clamp_min(2e-6)).all()
    last, _ = decoder(ids, last_only=True)
    torch.testing.assert_close(last, logits[:, -1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_a_state_is_a_value(options: dict[str, Any], tmp_path: Path) -> None:
    decoder, ids = Decoder(small(**options)), torch.randint(32, (2, 9))
    _, state = decoder(ids)
    assert (state.batch, state.position) == (2, 9) and state.nbytes > 0
    state.save(tmp_path / "state")
    ends = torch.randint(32, (2, 2, 3))
    expected = [decoder(end, state)[0] for end in ends]
    for again in (state, DecoderState.load(tmp_path / "state")):
        for end, logits in zip(ends, expected, strict=True):
            assert torch.equal(decoder(end, again)[0], logits)
    (tmp_path / "state").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="not a state"):
        DecoderState.load(tmp_path / "state")


LENGTHS = (5, 1, 12, 2)
CUTS = torch.tensor((0, 5, 6, 18, 20))


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_packed_prompts_give_what_each_gives(options: dict[str, Any]) -> None:
    model = small(**options)
    decoder = Decoder(model)
    ids, more = torch.randint(32, (1, 20)), torch.randint(32, (4, 3))
    logits, state = decoder(ids, cu_seqlens=CUTS)
    last, _ = decoder(ids, last_only=True, cu_seqlens=CUTS.int())
    assert state.positions == list(LENGTHS) and state.position == 12
    after, _ = decoder(more, state)
    _, one = decoder(more[:1], decoder(ids[:, :5])[1])
    joined = DecoderState.join([state.select([2, 0]), one])
    assert joined.positions == [12, 5, 8]
    step, _ = decoder(more[:3, :1], joined)
    prompts = ids[0].split(LENGTHS)
    for b, prompt in enumerate(prompts):
        expected, own = decoder(prompt[None])
        close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(logits[:, CUTS[b] : CUTS[b + 1]], expected, **close)
        torch.testing.assert_close(last[b : b + 1], expected[:, -1:], **close)
        torch.testing.assert_close(after[b : b + 1], decoder(more[b : b + 1], own)[0], **close)
    texts = (prompts[2], prompts[0], torch.cat((ids[0, :5], more[0])))
    for b, text in enumerate(texts):
        expected, _ = decoder(torch.cat((text, more[b, :1]))[None], last_only=True)
        torch.testing.assert_close(step[b : b + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("touched", [False, True])
def test_packed_prompts_are_continued_each(options: dict[str, Any], touched: bool) -> None:
    model = small(**options)
    if touched:
        model.token_emb.register_forward_hook(lambda *_: None)
    ids = torch.randint(32, (1, 20))
    rules: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.5}
    if touched and "dim_head" in options:  # attention
        with pytest.raises(ValueError, match="cu_seqlens"):
            model.generate(ids, 6, cu_seqlens=CUTS, **rules)
        return
    drawn = model.generate(ids, 6, cu_seqlens=CUTS, **rules)
    for b, prompt in enumerate(ids[0].split(LENGTHS)):
        assert torch.equal(drawn[b : b + 1], model.generate(prompt[None], 6, **rules))
    assert model.generate(ids, 0, cu_seqlens=CUTS).shape == (4, 0)


def test_a_file_need_not_be_named_in_utf_8(tmp_path: Path) -> None:
    decoder, file = Decoder(small()), tmp_path / os.fsdecode(b"bad\xff")
    _, state = decoder(torch.zeros(1, 3, dtype=torch.int64))
    state.save(file)
    assert DecoderState.load(file).position == 3
    for fail in (DecoderState.load, state.save):
        with pytest.raises(RuntimeError, match=re.escape(f"{file}/")):
            fail(file / "absent")


def greedy(model: Transformer, prompt: Tensor, length: int) -> Tensor:
    """By the definition: the whole text anew for each token."""
    text = prompt
    for _ in range(length):
        text = torch.cat((text, model(text)[:, -1:].argmax(-1)), dim=1)
    return text[:, prompt.shape[1] :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("prompt", [1, 5])
def test_greedy_generation(prompt: int, sequences: int, dtype: torch.dtype) -> None:
    model = small().to(dtype)
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


def test_generation_follows_weights_that_change() -> None:
    model, prompt, texts = small(), torch.randint(32, (2, 5)), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        for weight in model.parameters():
            nn.init.normal_(weight)
        texts.append(model.generate(prompt, 8, temperature=0))
        assert torch.equal(texts[-1], greedy(model, prompt, 8))
    assert not torch.equal(*texts)


def test_a_decoder_keeps_the_weights_it_reads() -> None:
    model, ids = small(), torch.randint(32, (2, 5))
    decoder, before = Decoder(model), model(ids)
    del model
    torch.testing.assert_close(decoder(ids)[0], before, rtol=1e-4, atol=1e-5)


def test_a_decoder_reads_parameters_past_hooks_of_saving() -> None:
    model: Any = small()

    def smooth(_: nn.Module, state: dict[str, Tensor], *__: object) -> None:
        for name in state:
            state[name] = torch.zeros_like(state[name])

    model._register_state_dict_hook(smooth)
    ids = torch.randint(32, (2, 5))
    torch.testing.assert_close(Decoder(model)(ids)[0], model(ids), rtol=1e-4, atol=1e-5)


def test_a_lazily_negated_parameter_has_its_sign() -> None:
    model, ids = small(), torch.randint(32, (2, 5))
    to_logits: Any = model.to_logits
    linear = to_logits[1]
    linear.weight = nn.Parameter(torch._neg_view(linear.weight.detach()))
    torch.testing.assert_close(Decoder(model)(ids)[0], model(ids), rtol=1e-4, atol=1e-5)


def test_several_threads_share_a_decoder_and_a_sampler() -> None:
    decoder, sampler = Decoder(small(gate_loop_heads=4), threads=1), Sampler(temperature=0)
    ids = torch.randint(32, (4, 40))

    def read(row: int) -> list[Tensor]:
        logits, state = decoder(ids[row : row + 1, :3])
        found = [logits]
        for t in range(3, ids.shape[1]):
            logits, state = decoder(ids[row : row + 1, t : t + 1], state)
            assert torch.equal(sampler.draw(logits[:, -1]), logits[:, -1].argmax(-1))
            found.append(logits)
        return found

    alone = [read(row) for row in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for ours, theirs in zip(pool.map(read, range(4)), alone, strict=True):
                assert all(map(torch.equal, ours, theirs))


def test_a_decoder_names_what_does_not_fit() -> None:
    decoder = Decoder(small())
    _, state = decoder(torch.zeros(1, 3, dtype=torch.int64))
    for ids in (torch.tensor([[-1]]), torch.tensor([[32]])):
        with pytest.raises(ValueError, match=r"\[0, 32\), got (-1|32)"):
            decoder(ids, state)
    for ids in (torch.zeros(1, 1), torch.zeros(3, dtype=torch.int64), torch.zeros(1, 0).long()):
        with pytest.raises(ValueError, match="ids must be"):
            decoder(ids, state)
    with pytest.raises(ValueError, match="of 1 sequences, got 2"):
        decoder(torch.zeros(2, 1, dtype=torch.int64), state)
    with pytest.raises(ValueError, match="another model"):
        Decoder(small())(torch.zeros(1, 1, dtype=torch.int64), state)
    with pytest.raises(ValueError, match=r"parameters of torch\.float64"):
        Decoder(small().double())
    with pytest.raises(ValueError, match="threads must be"):
        Decoder(small(), threads=-1)


# ---- Drawing -------------------------------------------------------------------------------------


def test_python_and_the_program_draw_the_same(build_dir: Path, tmp_path: Path) -> None:
    model = Transformer(16, num_tokens=128, depth=2, layers="gate_loop,attention", window=8)
    checkpoint.save(model, tmp_path)
    rules: dict[str, Any] = dict(temperature=0.8, filter_thres=0.5, top_k=40, top_p=0.9)
    rules |= dict(min_p=0.01, repetition_penalty=1.1)
    prompt = torch.tensor([list(b"The ")])
    drawn = model.generate(prompt, 60, seed=7, **rules)
    command = [str(build_dir / "gateloop"), "generate", "--checkpoint", str(tmp_path)]
    command += ["--prompt", "The ", "--length", "60", "--seed", "7", "--top-k-threshold", "0.5"]
    command += ["--temperature", "0.8", "--top-k", "40", "--top-p", "0.9", "--min-p", "0.01"]
    command += ["--repetition-penalty", "1.1"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert list(done.stdout) == drawn[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # runtime, modules
def test_sequences_end_at_their_stops(dtype: torch.dtype) -> None:
    model, prompt = small().to(dtype), torch.randint(32, (2, 3))
    free = model.generate(prompt, 12, seed=3)
    stop = free[0, 4:6].tolist()
    cut = model.generate(prompt, 12, seed=3, stop=[stop])
    text = free[0].tolist()
    end = next(i for i in range(11) if text[i : i + 2] == stop) + 2
    assert cut[0, :end].tolist() == text[:end]
    assert (cut[0, end:] == Sampler.ENDED).all()
    alone = model.generate(prompt[:1], 12, temperature=0, stop=[[int(greedy(model, prompt, 1)[0])]])
    assert alone.shape == (1, 1)


def test_a_seed_is_drawn_from_the_generator() -> None:
    model, prompt = small(), torch.randint(32, (1, 3))
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(prompt, 20).tolist())
        generator = torch.Generator().manual_seed(seed)
        assert model.generate(prompt, 20, generator=generator).tolist() == texts[-1]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-1.0), "temperature must be"),
        (dict(temperature=float("nan")), "temperature must be"),
        (dict(filter_thres=1.5), "filter_thres must be"),
        (dict(top_k=-1), "top_k must be"),
        (dict(top_p=0.0), "top_p must be"),
        (dict(min_p=1.5), "min_p must be"),
        (dict(repetition_penalty=0.5), "repetition_penalty must be"),
        (dict(stop=[[]]), "stop must be"),
    ],
)
def test_rules_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**options)


def test_logits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="logits must be"):
        Sampler().draw(torch.zeros(3))
    with pytest.raises(RuntimeError, match="not finite"):
        Sampler().draw(torch.tensor([[0.0, float("nan")]]))


FORKS = """
import os, torch
from gateloop_cpp import Decoder, Transformer
model = Transformer(16, num_tokens=32, depth=1)
ids = torch.zeros(1, 3, dtype=torch.int64)
expected, _ = Decoder(model, threads=2)(ids)
child = os.fork()
if child == 0:
    logits, _ = Decoder(model, threads=2)(ids)
    os._exit(0 if torch.equal(logits, expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_builds_a_decoder_of_its_own() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=120, env=environment)
