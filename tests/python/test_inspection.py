"""The numbers of gateloop_cpp.inspection beside their definition, and its bad input."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inspected import MODELS, TEXT, Array, Definition, definitions, small_model

from gateloop_cpp import checkpoint
from gateloop_cpp.inspection import Measurements, Mixer, Track, codes, measure, measuring
from gateloop_cpp.inspection.__main__ import main
from gateloop_cpp.inspection.influence import WINDOW

ROOT = Path(__file__).resolve().parents[2]

# Half a step of a code of 8 bits, and the rounding of float32 beside double.
FRACTION = 0.5 / 255 + 1e-3


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[Measurements, list[Definition]]:
    model = small_model(**MODELS[request.param])
    # Chunks of two blocks, the last one cut: states and windows go over their bounds.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "CHUNK", 2 * WINDOW)
        return measure(model, TEXT), definitions(model, TEXT)


def pairs(case: tuple[Measurements, list[Definition]]) -> list[tuple[Mixer, Definition]]:
    return list(zip(case[0].mixers, case[1], strict=True))


def with_transitions(
    case: tuple[Measurements, list[Definition]],
) -> list[tuple[Mixer, Definition, Array]]:
    return [(mixer, d, d.a) for mixer, d in pairs(case) if d.a is not None]


def test_the_definition_is_the_models(case: tuple[Measurements, list[Definition]]) -> None:
    for _, definition in pairs(case):
        if definition.read_out is None:
            continue
        for t in (0, 1, 77, 200):
            y = sum(definition.weight(t, s)[:, None] * definition.value[s] for s in range(t + 1))
            np.testing.assert_allclose(y, definition.read_out[t], rtol=1e-8, atol=1e-10)


def test_half_lives(case: tuple[Measurements, list[Definition]]) -> None:
    for mixer, definition, a in with_transitions(case):
        assert mixer.rates is not None and mixer.half_lives is not None
        expected = definition.half_lives()[:, mixer.kept].T
        found = codes.decode_half_life(mixer.rates).numpy()
        step = np.log(codes.HALF_LIVES[1] / codes.HALF_LIVES[0]) / 255
        error = np.abs(np.log(found / expected.clip(*codes.HALF_LIVES)))
        assert error.max() <= 0.5 * step + 1e-3
        mean_rate = np.abs(np.log(np.abs(a)).mean(0))
        with np.errstate(divide="ignore"):
            means = np.log(2) / mean_rate
        np.testing.assert_allclose(mixer.half_lives.numpy(), means, rtol=1e-4)
        assert mixer.kept == sorted(mixer.kept, key=lambda channel: float(means[channel]))


def test_inputs_and_phases(case: tuple[Measurements, list[Definition]]) -> None:
    for mixer, definition, a in with_transitions(case):
        if mixer.phases is None:
            assert not np.iscomplexobj(a) or np.ptp(a.imag) == 0
        else:
            error = codes.decode_phase(mixer.phases).numpy() - np.angle(a[:, mixer.kept].T)
            assert np.abs(np.exp(1j * error) - 1).max() <= np.pi / 256 + 1e-3
        assert (mixer.inputs is not None) == mixer.is_max_heads
        if mixer.inputs is not None:
            expected = np.abs(definition.key * definition.value)[:, mixer.kept, 0].T
            found = codes.decode_size(mixer.inputs).numpy()
            step = np.log(codes.SIZES[1] / codes.SIZES[0]) / 255
            large = expected > 2 * codes.SIZES[0]
            error = np.abs(np.log(found[large] / expected[large]))
            assert error.max() <= 0.5 * step + 1e-3
            assert found[~large].max(initial=0) < 3 * codes.SIZES[0]


def test_forgotten(case: tuple[Measurements, list[Definition]]) -> None:
    for mixer, definition, _ in with_transitions(case):
        assert mixer.forgotten is not None
        error = codes.decode_fraction(mixer.forgotten).numpy() - definition.forgotten()
        assert np.abs(error).max() <= FRACTION


def dense(track: Track) -> Array:
    """(T, WINDOW): the shares of a track, the last column the byte itself."""
    rows = np.repeat(np.arange(len(track.counts)), track.counts.numpy())
    shares = np.zeros((len(track.counts), WINDOW))
    shares[rows, WINDOW - 1 - track.lags.numpy()] = codes.decode_share(track.shares).numpy()
    return shares


def check_shares(found: Array, expected: Array) -> None:
    """In one window, which at the beginning of a text is cut."""
    assert not found[: WINDOW - len(expected)].any()
    found = found[WINDOW - len(expected) :]
    assert np.abs(np.sqrt(found) - np.sqrt(expected))[found > 0].max(initial=0) <= FRACTION
    assert expected[found == 0].max(initial=0) <= codes.LEAST_SHARE * 1.001
    assert found[found > 0].min(initial=1) >= codes.LEAST_SHARE * 0.96


def test_influence(case: tuple[Measurements, list[Definition]]) -> None:
    for mixer, definition in pairs(case):
        shares = dense(mixer.tracks[0])
        for t in range(len(TEXT)):
            check_shares(shares[t], definition.shares(t))


def test_influence_in_wide_heads(case: tuple[Measurements, list[Definition]]) -> None:
    for mixer, definition in pairs(case):
        tracks = mixer.tracks[1:]
        assert len(tracks) == (0 if mixer.is_max_heads else mixer.channels)
        for head, track in enumerate(tracks):
            shares = dense(track)
            for t in range(0, len(TEXT), 7):
                sizes = definition.sizes(t)[head]
                check_shares(shares[t], sizes / sizes.sum())


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(depth=2, **MODELS["magnitude and phase"])
    whole = measure(model, TEXT)
    monkeypatch.setattr(measuring, "CHUNK", WINDOW)
    cut = measure(model, TEXT)
    torch.testing.assert_close(whole.bits, cut.bits, rtol=1e-4, atol=1e-4)
    for one, other in zip(whole.mixers, cut.mixers, strict=True):
        np.testing.assert_allclose(dense(one.tracks[0]), dense(other.tracks[0]), atol=0.02)


def evaluated(build_dir: Path, model: Path, text: Path) -> tuple[float, int]:
    """Bits per byte and bytes predicted, as `gateloop evaluate` prints them."""
    files = ["--checkpoint", str(model), "--data", str(text)]
    command = [str(build_dir / "gateloop"), "evaluate", *files, "--mode", "carried"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"([\d.]+) bits per byte, (\d+) bytes", output)
    assert found
    return float(found[1]), int(found[2])


@pytest.mark.parametrize("options", ["sigmoid", "hybrid"])
def test_surprise_is_what_evaluate_reports(options: str, build_dir: Path, tmp_path: Path) -> None:
    model = small_model(**MODELS[options])
    checkpoint.save(model, tmp_path / "model")
    (tmp_path / "text").write_bytes(TEXT)
    figure, count = evaluated(build_dir, tmp_path / "model", tmp_path / "text")
    assert count == len(TEXT) - 1
    # It prints four places.
    assert measure(model, TEXT).bits_per_byte == pytest.approx(figure, abs=1e-4)


def test_names_need_not_be_utf_8(tmp_path: Path) -> None:
    model, text, page = (tmp_path / os.fsdecode(name) for name in (b"m\xff", b"t\xff", b"p\xff"))
    checkpoint.save(small_model(), model)
    text.write_bytes(TEXT)
    arguments = [f"--checkpoint={model}", f"--text={text}", f"--out={page}"]
    assert main(arguments) == 0
    shown = page.read_text(encoding="utf-8")
    assert r"<title>t\xff" in shown
    assert r"m\\xff, latest weights" in shown  # in JSON
    assert sorted(tmp_path.iterdir()) == sorted([model, text, page])
    read, write = os.pipe()  # as /dev/stdout is: no file to replace
    os.close(read)
    page.unlink()
    page.symlink_to(f"/dev/fd/{write}")
    assert main(arguments) == 1  # nobody reads
    os.close(write)
    assert page.is_symlink()


class TestDocuments:
    TEXT = TEXT.replace(b"\xff", b"!")

    @pytest.fixture
    def arguments(self, tmp_path: Path) -> list[str]:
        training = {"documents": True}
        checkpoint.save(small_model(), tmp_path / "model", training=training)
        (tmp_path / "text").write_bytes(self.TEXT)
        names = {"checkpoint": "model", "text": "text", "out": "page.html"}
        return [f"--{name}={tmp_path / file}" for name, file in names.items()]

    def said(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[float, str]:
        assert main(arguments) == 0
        output = capsys.readouterr().out
        found = re.match(r"(.* bytes.*), ([\d.]+) bits per byte", output)
        assert found
        return float(found[2]), found[1]

    def test_the_figure_is_what_evaluate_reports(
        self,
        arguments: list[str],
        build_dir: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        figure, count = evaluated(build_dir, tmp_path / "model", tmp_path / "text")
        assert count == len(self.TEXT) + 1  # the separator at the end too
        both = f"{count + 1} bytes, separators included"
        bits, length = self.said(arguments, capsys)
        assert length == both
        assert bits == pytest.approx(figure, abs=1e-4)

    def test_the_beginning_of_one_has_no_end(
        self, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        bits, length = self.said([*arguments, "--max-bytes=100"], capsys)
        assert length == f"101 bytes (the first of {len(self.TEXT)}), separators included"
        expected = measure(small_model(), b"\xff" + self.TEXT[:100]).bits_per_byte
        assert bits == pytest.approx(expected, abs=1e-4)

    def test_a_text_from_anywhere(
        self, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        bits, length = self.said([*arguments, "--no-documents"], capsys)
        assert length == f"{len(self.TEXT)} bytes"
        expected = measure(small_model(), self.TEXT).bits_per_byte
        assert bits == pytest.approx(expected, abs=1e-4)

    def test_several_are_refused(
        self, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "text").write_bytes(b"one\xfftwo")
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert "must be one document" in error and "0xFF, at byte 3" in error


def test_predictions() -> None:
    model = small_model()
    measured = measure(model, TEXT)
    with torch.no_grad():
        logits = model(torch.tensor([list(TEXT)]))[0]
    probabilities, tokens = logits.softmax(-1).topk(measuring.TOP)
    torch.testing.assert_close(measured.top_probabilities[1:], probabilities[:-1])
    assert torch.equal(measured.top_tokens[1:], tokens[:-1])
    assert measured.bits[0] == 0 and not measured.top_probabilities[0].any()


def test_some_channels_are_kept() -> None:
    measured = measure(small_model(gate="sigmoid", transition_bias=(-1.0, 5.0)), TEXT, channels=4)
    (mixer,) = measured.mixers
    assert mixer.rates is not None and mixer.rates.shape == (4, len(TEXT))
    assert mixer.half_lives is not None
    assert len(mixer.half_lives) == 12
    kept = mixer.half_lives[mixer.kept]
    assert kept[0] == mixer.half_lives.min() and kept[-1] == mixer.half_lives.max()


def test_text_of_no_more_than_the_first_two_bytes() -> None:
    measured = measure(small_model(), b"ab")
    assert measured.bits[1] > 0
    assert dense(measured.mixers[0].tracks[0])[:, -1] == pytest.approx([1.0, 1.0], abs=0.99)


NOT_SHOWN: dict[str, dict[str, Any]] = {
    "per_key_transitions": dict(per_key_transitions=True, gate_loop_heads=2),
    "feature_map=taylor": dict(feature_map="taylor", gate_loop_heads=2),
    "window=None": dict(layers="attention"),
    "window=129": dict(layers="attention", window=WINDOW + 1),
    "data_dependent_rel_pos": dict(layers="attention", data_dependent_rel_pos=True, window=9),
    "attn_softmax_normalize": dict(layers="attention", attn_softmax_normalize=False, window=9),
    "no mixer": dict(layers="none"),
}


@pytest.mark.parametrize("reason", NOT_SHOWN)
def test_layers_that_are_not_shown_are_named(reason: str) -> None:
    with pytest.raises(ValueError, match=f"measure: model must .*layer 1.*{reason}"):
        measure(small_model(**NOT_SHOWN[reason]), TEXT)
    beside = measure(small_model(simple_gate_loop=True, **NOT_SHOWN[reason]), TEXT)
    assert [mixer.kind for mixer in beside.mixers] == ["simple_gate_loop"]
    assert reason in beside.not_shown[0].reason


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="measure: text must be of 2 bytes or more, got 1"):
        measure(small_model(), b"a")
    with pytest.raises(ValueError, match=r"measure: text .* below 100, .* got 116"):
        measure(small_model(num_tokens=100), b"at")
    with pytest.raises(ValueError, match=r"measure: model must .* mixers are attention"):
        measure(small_model(layers="attention", window=9), TEXT)
    with pytest.raises(ValueError, match="measure: channels must be 1 or more, got 0"):
        measure(small_model(), TEXT, channels=0)


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, str]:
    checkpoint.save(small_model(), tmp_path / "model")
    (tmp_path / "text").write_bytes(TEXT)
    files = {"checkpoint": "model", "text": "text", "out": "page.html"}
    return {name: str(tmp_path / file) for name, file in files.items()}


def words(arguments: dict[str, str]) -> list[str]:
    return [word for name, value in arguments.items() for word in (f"--{name}", value)]


def test_the_program(arguments: dict[str, str]) -> None:
    command = [sys.executable, "-m", "gateloop_cpp.inspection", *words(arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    command += ["--max-bytes", "300"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert output.stdout.startswith("300 bytes (the first of 390), ")
    assert output.stderr == ""
    assert Path(arguments["out"]).read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("checkpoint", "/nowhere", "--checkpoint /nowhere: .*No such file"),
        ("text", "/nowhere", "--text /nowhere: No such file"),
        ("text", "/", "--text /: Is a directory"),
        ("text", "/dev/null", "--text /dev/null: must hold 2 bytes or more to predict one, got 0"),
        ("out", "/nowhere/page", "--out /nowhere/page: No such file"),
        ("out", "/", "--out /: Is a directory"),
    ],
)
def test_bad_input_is_one_line(
    arguments: dict[str, str],
    argument: str,
    value: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words(arguments | {argument: value})) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(f"inspect: {message}.*\n", output.err), output.err


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_bad_numbers(
    arguments: dict[str, str], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*words(arguments), f"--max-bytes={value}"])
    assert "--max-bytes: must be a whole number of 1 or more" in capsys.readouterr().err


def test_a_model_without_gate_loop(
    arguments: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(small_model(layers="attention"), tmp_path / "attention")
    assert main(words(arguments | {"checkpoint": str(tmp_path / "attention")})) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--checkpoint" in line and "must have a GateLoop" in line
