"""examples/train_distributed.py in one and two processes, beside the C++ trainer."""

import argparse
import bz2
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stop_signals
import torch
import train_distributed
from byte_batches import batch_at, check_lengths, mix, open_tokenizer, read, tokenized, windows

import gateloop_cpp
from gateloop_cpp import _histories, checkpoint, watch

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
SIZES = "--dim 32 --depth 1 --length 64 --batch 4 --seed 3 --warmup-steps 4 --validate-every 25"
SECONDS = 240  # a run takes five, most of it imports; a machine may be busy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a text in it."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "text").write_bytes(b"".join(b"%d times the gate, " % (i * i) for i in range(900)))
    return folder


@contextmanager
def started(processes: int, folder: Path, out: str, *arguments: str) -> Iterator[Any]:
    launch = [sys.executable]
    if processes > 1:
        # --standalone: at a free port, as others may be training here.
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc-per-node", str(processes)]
    launch += [str(ROOT / "examples" / "train_distributed.py"), "--data", "text", "--out", out]
    source = str(Path(gateloop_cpp.__file__).parents[1])
    process = subprocess.Popen(
        [*launch, *SIZES.split(), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:  # which closes its pipes
        try:
            yield process
        finally:
            process.terminate()  # torchrun ends its processes with it


def run(processes: int, folder: Path, out: str, *arguments: str) -> str:
    with started(processes, folder, out, *arguments) as process:
        stdout, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, stderr
    return str(stdout)


def program(build_dir: Path, folder: Path, *arguments: str) -> None:
    command = [str(build_dir / "gateloop"), *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, timeout=SECONDS)
    assert result.returncode == 0, result.stderr


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict[str, Any]]:
    """What one process writes, in float64."""
    printed = run(1, folder, "alone", "--steps", str(STEPS), "--dtype", "float64")
    assert "step 25  " in printed and f"ended after step {STEPS}" in printed
    return metrics(folder / "alone")


def assert_same_losses(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("train_bits_per_byte", "gradient_norm", "learning_rate"):
        # float64, sums in another order; Adam magnifies what differs in small gradients.
        values, expected = ([line[name] for line in lines] for lines in (ours, theirs))
        assert values == pytest.approx(expected, rel=1e-9), name


def test_the_metrics_are_those_of_the_cpp_trainer(alone: list[dict[str, Any]]) -> None:
    """The fields of src/training/metrics.cpp."""
    always = {"step", "train_bits_per_byte", "learning_rate", "gradient_norm"}
    always |= {"tokens_per_second", "elapsed_seconds"}
    validated = {"validation_bits_per_byte"}
    assert [line["step"] for line in alone] == list(range(1, STEPS + 1))
    assert alone[0].keys() == always
    assert alone[24].keys() == alone[49].keys() == always | validated
    assert alone[-1].keys() == always | validated | {"final_validation_bits_per_byte"}
    assert alone[0]["train_bits_per_byte"] > 7.5  # 256 bytes, equally likely: 8 bits
    assert alone[-1]["final_validation_bits_per_byte"] < 5


# Without --shard, tokens of a tokenizer are trained on below.
@pytest.mark.parametrize(
    "flags", [pytest.param([], marks=pytest.mark.long), ["--shard"]], ids=["DDP", "FSDP2"]
)
def test_two_processes_train_as_one(
    flags: list[str], folder: Path, alone: list[dict[str, Any]], build_dir: Path
) -> None:
    out = "-".join(["two", *flags])
    printed = run(2, folder, out, "--steps", str(STEPS), "--dtype", "float64", *flags)
    assert printed.count("ended after step") == 1
    ours = metrics(folder / out)
    assert_same_losses(ours, alone)
    for name in ("validation_bits_per_byte", "final_validation_bits_per_byte"):
        assert ours[-1][name] == pytest.approx(alone[-1][name], rel=1e-9)
    model, expected = (checkpoint.load(folder / name) for name in (out, "alone"))
    # Rounded to float32 when they were saved.
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-6, atol=1e-8)
    program(build_dir, folder, "generate", "--checkpoint", out, "--length", "5")


def children(process: Any) -> list[int]:
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text(encoding="utf-8").split()]


@pytest.mark.long
def test_a_signal_to_one_process_stops_all_and_others_go_on(
    folder: Path, alone: list[dict[str, Any]]
) -> None:
    """Two replicas until a SIGTERM, then two shards: the losses of an unbroken run."""
    common = ("--steps", str(STEPS), "--dtype", "float64", "--resume", "--checkpoint-every", "7")
    log = folder / "stopped" / "metrics.jsonl"
    with started(2, folder, "stopped", *common) as process:
        until = time.monotonic() + SECONDS
        while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.001)
        os.kill(children(process)[1], signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert "stopped after step" in stdout, stderr
    first = metrics(folder / "stopped")
    assert 3 <= len(first) < STEPS
    with log.open("a", encoding="utf-8") as file:  # steps after the checkpoint are made again
        file.write(json.dumps(first[-1] | {"step": len(first) + 1}) + "\n")

    printed = run(2, folder, "stopped", *common, "--shard")
    assert f"going on after step {len(first)}" in printed
    assert_same_losses(metrics(folder / "stopped"), alone)


def test_signals_are_recorded_but_for_ignored_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signals, "received", received := [0])
    before = [(number, signal.getsignal(number)) for number in stop_signals.STOP]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop_signals.record_signals()
        for number, _ in before:
            signal.raise_signal(number)
        assert received == [signal.SIGINT]  # the first that is not ignored
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def test_a_hangup_after_the_reader_of_the_output_has_gone_saves(folder: Path) -> None:
    log = folder / "hangup" / "metrics.jsonl"
    flags = ("--steps", "1000000", "--validate-every", "1", "--validation-windows", "1")
    with started(1, folder, "hangup", *flags) as process:
        process.stdout.close()
        until = time.monotonic() + SECONDS
        while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        begun = _histories.read(log.parent)  # under way
        assert (begun.training["data"], begun.bytes_per_step) == (str(folder / "text"), 4 * 64)
        assert watch.state(begun, time.time()).endswith(" left")
        process.send_signal(signal.SIGHUP)
        assert process.wait(SECONDS) == 128 + signal.SIGHUP
    before = begun.run.id
    begun.advance()
    assert begun.run.id == before
    assert [record.step for record in begun.records] == list(range(1, begun.last.step + 1))
    state = torch.load(folder / "hangup" / "training_state.pt", weights_only=True)
    assert state["step"] == len(metrics(folder / "hangup"))
    checkpoint.load(folder / "hangup")


@pytest.mark.long
def test_a_run_is_not_begun_twice_unasked(folder: Path, alone: list[dict[str, Any]]) -> None:
    for arguments, words in (
        (("--steps", "1"), "holds a run already: pass --resume"),
        (("--steps", "1", "--batch", "3"), "--batch must be a multiple of the 2 processes"),
    ):
        with started(2, folder, "alone", *arguments) as process:
            _, stderr = process.communicate(timeout=SECONDS)
        assert process.returncode != 0
        assert words in stderr
    assert metrics(folder / "alone") == alone


def test_bfloat16_shards_learn(folder: Path, alone: list[dict[str, Any]]) -> None:
    run(2, folder, "low", "--steps", str(STEPS), "--dtype", "bfloat16", "--shard")
    ours = metrics(folder / "low")
    # bfloat16 has 8 bits: a relative error of 2^-9 of logits of order 1, averaged over 256 bytes.
    assert ours[0]["train_bits_per_byte"] == pytest.approx(
        alone[0]["train_bits_per_byte"], rel=1e-3
    )
    final = "final_validation_bits_per_byte"
    assert ours[-1][final] == pytest.approx(alone[-1][final], rel=0.02)


def test_the_cpp_trainer_trains_the_same(folder: Path, build_dir: Path) -> None:
    """From the same seed the same weights, windows, schedule and Adam."""
    run(1, folder, "float32", "--steps", "12")
    flags = "--preset enwik8 --no-post-ln-norm --gate-loop-heads 32 --accumulation 1 --steps 12"
    flags += " --schedule linear --learning-rate 4e-3 --clip 1 --beta2 0.98 --dtype float32"
    program(
        build_dir, folder, "train", "--data", "text", "--out", "cpp", *flags.split(), *SIZES.split()
    )
    ours, theirs = (metrics(folder / out) for out in ("float32", "cpp"))
    assert ours[-1].keys() == theirs[-1].keys() - {"sample", "sample_prime"}
    for name in ("train_bits_per_byte", "gradient_norm", "learning_rate"):
        # float32 through twelve steps.
        expected = pytest.approx([line[name] for line in theirs], rel=1e-4)
        assert [line[name] for line in ours] == expected, name


def test_tokens_of_a_tokenizer_are_trained_on(
    folder: Path,
    build_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bits per byte, one process as two, and a checkpoint from which tokens are drawn."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=alphabet,
        special_tokens=["[CLS]", "[SEP]"],
        show_progress=False,
    )
    tokenizer.train([str(folder / "text")], trainer)
    marks = [("[CLS]", tokenizer.token_to_id("[CLS]")), ("[SEP]", tokenizer.token_to_id("[SEP]"))]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=marks
    )
    tokenizer.save(str(folder / "tokens.json"))
    common = ("--tokenizer", "tokens.json", "--steps", "20", "--dtype", "float64", "--length", "24")
    for processes in (1, 2):
        run(processes, folder, f"tokens-{processes}", *common)
    history = _histories.read(folder / "tokens-1")
    assert history.planned_steps == 20
    per_token = history.bytes_per_token
    assert 1 < per_token < 10
    assert history.bytes_per_step == round(4 * 24 * per_token)
    ours, theirs = (metrics(folder / f"tokens-{processes}") for processes in (1, 2))
    assert_same_losses(ours, theirs)
    # The run keeps its tokenizer.
    resumed = run(2, folder, "tokens-1", *common[2:], "--steps", "21", "--resume")
    assert "going on after step 20" in resumed
    kept = [(folder / f"tokens-{number}" / "tokenizer.json").read_bytes() for number in (1, 2)]
    assert kept[0] == kept[1]
    further = metrics(folder / "tokens-1")
    assert_same_losses(further[:20], ours)
    # One step at a small learning rate, from the same weights in both processes.
    name = "final_validation_bits_per_byte"
    assert further[20][name] == pytest.approx(ours[-1][name], rel=0.01)

    read_back = tokenizers.Tokenizer.from_file(str(folder / "tokens-2" / "tokenizer.json"))
    train, held_out = read(folder / "text", None)
    tokens = tokenized(held_out, read_back, "text")
    assert read_back.decode(tokens.tolist()).encode() == held_out.tobytes()
    # Before the first update 300 tokens are about as likely as each other.
    per_token = len(train) / len(tokenized(train, read_back, "text"))
    assert per_token > 1.5
    assert ours[0]["train_bits_per_byte"] == pytest.approx(np.log2(300) / per_token, rel=0.1)

    model = checkpoint.load(folder / "tokens-2")
    assert model.options["num_tokens"] == 300
    rows = torch.from_numpy(windows(tokens, 4096, 24)).long()
    with torch.no_grad():
        logits = model(rows[:, :-1]).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())
    bits = float(loss) / np.log(2) * len(tokens) / len(held_out)
    assert ours[-1]["final_validation_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    # The program of the document draws from it, after the prompt alone.
    document = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    lines = document[document.index("    import torch\n") :].splitlines()
    code = takewhile(lambda line: not line or line.startswith("    "), lines)
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(textwrap.dedent("\n".join(code)).replace('"DIR', '"tokens-2'), found)
    assert read_back.decode(found["prompt"][0].tolist(), False) == "Once upon a time"
    assert len(capsys.readouterr().out) > 100
    # And the programs of bytes take no such model.
    command = [str(build_dir / "gateloop"), "generate", "--checkpoint", "tokens-2"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert refused.returncode == 2 and "tokens of its tokenizer.json" in refused.stderr


def test_long_texts_are_tokenized_in_pieces_of_lines() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"a": 0, "b": 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    text = np.frombuffer(b"a b\n" * 700_000, np.uint8)  # three pieces
    np.testing.assert_array_equal(tokenized(text, tokenizer, "text"), np.tile([0, 1], 700_000))
    cut = np.frombuffer("äa bä".encode()[1:-1], np.uint8)
    np.testing.assert_array_equal(tokenized(cut, tokenizer, "text"), [0, 1])
    with pytest.raises(SystemExit, match=r"text: a tokenizer takes UTF-8, .* position 0"):
        tokenized(np.array([255], np.uint8), tokenizer, "text")


def word_level(path: Path, vocabulary: dict[str, int], **sections: Any) -> Path:
    """A tokenizer.json of words between spaces, with sections that the format has beside them."""
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": next(iter(vocabulary))}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}}
    path.write_text(json.dumps(content | empty | {"model": model} | sections), encoding="utf-8")
    return path


def text_of(
    data: Path, tokenizer: Path | None, length: int = 4, split: str | None = None
) -> train_distributed.Text:
    options = argparse.Namespace(data=data, length=length, split=split)
    return train_distributed.Text(options, tokenizer and open_tokenizer(tokenizer))


def test_a_part_holds_a_sequence_and_its_last_target(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    data = tmp_path / "text"
    data.write_bytes(b"a b " * 100)
    tokenizer = word_level(tmp_path / "tokens.json", {"a": 0, "b": 1})
    for split, words in (
        ("28,400", "the split is larger than the file of 400 bytes"),
        ("40,40", "the part to train on holds 20 tokens, --length 20 needs 21: use a longer"),
        ("42,40", "the part to validate on holds 20 tokens, --length 20 needs 21: use a longer"),
        ("42,0", "the part to validate on holds 0 tokens, --length 20 needs 21: use a longer"),
    ):
        with pytest.raises(SystemExit) as ended:
            text_of(data, tokenizer, 20, split)
        assert str(ended.value).startswith(f"{data}: {words}")
    enough = text_of(data, tokenizer, 20, "42,42")
    assert batch_at(enough.train, 0, range(8), 20, 0).shape == (8, 21)
    assert windows(enough.held_out, 8, 20).shape == (1, 21)
    with pytest.raises(SystemExit, match="the part to validate on holds 20 bytes, --length 20"):
        text_of(data, None, 20, "360,20")
    text = np.zeros(21, np.uint8)
    check_lengths((text, text), data, 20, "bytes")
    with pytest.raises(SystemExit, match="the part to train on holds 20 bytes"):
        check_lengths((text[1:], text), data, 20, "bytes")


def test_truncation_padding_and_dropout_are_left_out(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    cut = {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    pad: dict[str, Any] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
    }
    pad |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "b"}
    words = {"a": 0, "b": 1}
    path = word_level(tmp_path / "tokens.json", words, truncation=cut, padding=pad)
    data = tmp_path / "text"
    data.write_bytes(b"a b\n" * 300_000)  # two pieces, of unequal length
    text = text_of(data, path, split="1160000,40000")
    np.testing.assert_array_equal(text.train, np.tile([0, 1], 290_000))
    np.testing.assert_array_equal(text.held_out, np.tile([0, 1], 10_000))
    assert text.train_bytes_per_token == 2

    words = {"a": 0, "b": 1, "ab": 2}
    merges = tokenizers.models.BPE(vocab=words, merges=[("a", "b")], dropout=0.5)
    tokenizers.Tokenizer(merges).save(str(path))
    data.write_bytes(b"ab" * 100)
    np.testing.assert_array_equal(text_of(data, path, split="160,40").train, [2] * 80)


def test_ids_of_a_vocabulary_may_have_gaps(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    data = tmp_path / "text"
    data.write_bytes(b"a b " * 100)
    text = text_of(data, word_level(tmp_path / "tokens.json", {"a": 0, "b": 286}))
    assert (text.num_tokens, text.train.max()) == (287, 286)


def test_a_run_keeps_its_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    first = word_level(tmp_path / "first.json", {"a": 0, "b": 1})
    other = word_level(tmp_path / "other.json", {"a": 1, "b": 0})

    def chosen(flag: Path | None, state: dict[str, Any] | None) -> Any:
        options = argparse.Namespace(tokenizer=flag, out=tmp_path)
        return train_distributed.choose_tokenizer(options, state)

    bytes_state, state = ({"tokenizer": of} for of in (None, open_tokenizer(first).to_str()))
    assert chosen(None, None) is None and chosen(None, bytes_state) is None
    for flag, of in ((first, None), (None, state), (first, state)):
        assert chosen(flag, of).get_vocab() == {"a": 0, "b": 1}
    indented = tmp_path / "indented.json"
    tokenizers.Tokenizer.from_file(str(first)).save(str(indented), pretty=True)
    assert indented.read_bytes() != first.read_bytes() and chosen(indented, state) is not None
    for flag, of, words in (
        (other, state, f"differs from the tokenizer of the run, {tmp_path / 'tokenizer.json'}: go"),
        (first, bytes_state, f"the run in {tmp_path} reads bytes: go on without --tokenizer"),
    ):
        with pytest.raises(SystemExit) as ended:
            chosen(flag, of)
        assert str(ended.value).startswith(f"--tokenizer {flag}: {words}")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokens.json"
    with pytest.raises(SystemExit, match=f"^--tokenizer {path}: no such file"):
        open_tokenizer(path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match=f"^--tokenizer {path}: not a tokenizer.json: "):
        open_tokenizer(path)


def test_packed_texts_are_read_by_what_they_hold(tmp_path: Path) -> None:
    text, file = b"The quick brown fox. " * 40, tmp_path / "text"
    for pack in (bytes, gzip.compress, lzma.compress, bz2.compress):
        file.write_bytes(pack(text))
        assert read(file, f"{len(text)},0")[0].tobytes() == text
    for head in (b"PK\3\4", b"\x28\xb5\x2f\xfd"):
        file.write_bytes(head + text)
        with pytest.raises(SystemExit, match="unpack it first"):
            read(file, None)


def test_batches_and_windows(tmp_path: Path) -> None:
    # The first number of SplitMix64 from seed 0.
    assert mix(0) == 0xE220A8397B1DCDAF
    text = np.arange(1000, dtype=np.int32)
    ids = batch_at(text, 3, range(64), 10, 0)
    assert ids.shape == (64, 11)
    np.testing.assert_array_equal(np.diff(ids), 1)
    assert len(set(ids[:, 0])) > 40
    np.testing.assert_array_equal(batch_at(text, 3, range(16, 24), 10, 0), ids[16:24])
    spaced = windows(text, 4, 10)
    np.testing.assert_array_equal(spaced[:, 0], [0, 240, 490, 740])
    assert windows(text, 4096, 10).shape == (99, 11)
    (tmp_path / "text").write_bytes(bytes(range(200)))
    train, valid = read(tmp_path / "text", None)
    assert (len(train), len(valid), valid[0]) == (180, 10, 180)
    with pytest.raises(SystemExit, match="larger than the file of 200 bytes"):
        read(tmp_path / "text", "190,20")
