"""Experiments: tables are their records, records are whole, tasks are as defined, runs go on."""

import dataclasses
import json
import lzma
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import fixed_transition, flags, frame, language, records, report, synthetic, tasks
from experiments.__main__ import main
from experiments.catalogue import EXPERIMENTS
from experiments.frame import Experiment, Session, Settings, Variant
from experiments.records import RESULTS, Cell, Form, Outcome, Record

from gateloop_cpp import GateLoopedAttention

NAMES = [experiment.name for experiment in EXPERIMENTS]


def settings(folder: Path, **changed: object) -> Settings:
    plain = Settings(
        form="short",
        budget="steps",
        text="tinyshakespeare",
        data=folder / "text",
        program=folder / "none",
        runs=folder / "runs",
        threads=1,
        jobs=1,
    )
    return dataclasses.replace(plain, **changed)  # type: ignore[arg-type]


# ---- The records and the document ---------------------------------------------------------------


def test_the_document_shows_the_records() -> None:
    text = report.DOCUMENT.read_text(encoding="utf-8")
    assert report.document(text) == text, "run 'python -m experiments --tables'"
    for name in NAMES:
        assert f"<!-- about: {name}: begin -->" in text
        assert f"<!-- results: {name}: begin -->" in text


def test_a_part_without_an_end_or_an_experiment_is_refused() -> None:
    with pytest.raises(ValueError, match="not all of them end"):
        report.document("<!-- about: ablations: begin -->\n")
    with pytest.raises(ValueError, match="no experiment for about: nothing"):
        report.document("<!-- about: nothing: begin -->\n<!-- about: nothing: end -->")


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_records_are_whole(file: Path) -> None:
    found = records.load(file)
    assert found
    for record in found:
        assert not record.problems(), record.cell
        assert record.cell.experiment == file.stem
    assert len({record.cell for record in found}) == len(found)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=NAMES)
def test_records_are_of_variants_as_they_are_now(experiment: Experiment) -> None:
    flags = {variant.name: experiment.chosen_flags(variant) for variant in experiment.variants}
    for record in records.load(RESULTS / f"{experiment.name}.json"):
        cell = record.cell
        assert cell.flags == flags.get(cell.variant), cell
        assert cell.learning_rate in experiment.learning_rates, cell
        assert cell.seed in experiment.seeds, cell


def test_records_of_tasks_are_of_tasks_as_they_are_now() -> None:
    for name, task in tasks.TASKS.items():
        for record in records.load(RESULTS / f"{name}.json"):
            assert record.outcome.fingerprint == task.definition, f"run {name} --again"


def test_a_record_that_lacks_something_is_found() -> None:
    record = made(0.1, 0, 2.0)
    assert record.problems() == []
    lacking = dataclasses.replace(record.outcome, revision="", steps=0)
    machine = {"processor": "one", "cores": 2, "threads": 1}
    record = dataclasses.replace(record, outcome=lacking, machine=machine)
    assert record.problems() == ["steps", "revision", "load"]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=NAMES)
def test_an_experiment_states_itself(experiment: Experiment) -> None:
    for part in ("Question:", "Method:", f"Command: make experiments ARGS={experiment.name}"):
        assert part in experiment.document
    names = [variant.name for variant in experiment.variants]
    assert len(set(names)) == len(names)
    assert len(experiment.seeds) == 3


def test_the_last_of_equal_flags_is_kept() -> None:
    words = "--gate sigmoid --normalize-input=mean --sub-ln --layers a,b --gate polar --no-sub-ln"
    kept = "--gate polar --normalize-input=mean --no-sub-ln --layers a,b"
    assert flags.merged(words.split()) == tuple(kept.split())
    assert flags.merged(["dim=8", "gate=polar", "dim=9"]) == ("dim=9", "gate=polar")
    assert flags.merged(["--bias=-1,5", "--gate", "polar", "--bias="]) == ("--gate", "polar")
    assert flags.merged(()) == ()


# ---- The frame ----------------------------------------------------------------------------------

ONE = Variant("one", "--one", "One")
RATES = (0.1, 0.2, 0.4)


class Fake:
    """Scores are |learning rate - 0.2| + seed / 100; a variant's flag is its width."""

    text = "a text"

    def __init__(self, settings: Settings) -> None:
        self.ran: list[tuple[float, int, int]] = []
        self.finished: list[int] = []
        self.removed: list[tuple[float, int]] = []
        self.paced: list[str] = []

    def parameters(self, flags: Sequence[str]) -> int:
        return 1000 + 50 * flags.count("--wide")

    def steps(self, form: Form) -> int:
        return {"short": 10, "long": 100}[form]

    def pace(self, flags: Sequence[str], form: Form) -> float:
        self.paced.append(flags[-1])
        return 2.0 if "--slow" in flags else 1.0

    def run(self, cell: Cell, steps: int) -> Outcome:
        self.ran.append((cell.learning_rate, cell.seed, steps))
        score = abs(cell.learning_rate - 0.2) + cell.seed / 100
        return Outcome(1000, steps, 1.5, 80, {"bits_per_byte": score}, "none", "abc")

    def finish(self, cell: Cell, outcome: Outcome) -> Outcome:
        self.finished.append(cell.seed)
        return dataclasses.replace(outcome, results=outcome.results | {"test_256": 1.0})

    def remove(self, cell: Cell) -> None:
        self.removed.append((cell.learning_rate, cell.seed))


def experiment_of(*variants: Variant) -> Experiment:
    return Experiment(
        name="fake",
        document="Fake.",
        variants=variants,
        flags="--all",
        parameters=1000,
        learning_rates=RATES,
        seeds=(0, 1, 2),
        trainer=Fake,
    )


def session_of(tmp_path: Path, *variants: Variant, **changed: object) -> tuple[Session, Fake]:
    session = Session(
        experiment_of(*variants), settings(tmp_path, **changed), tmp_path / "r.json", lambda _: None
    )
    assert isinstance(session.trainer, Fake)
    return session, session.trainer


def made(rate: float, seed: int, score: float, variant: Variant = ONE) -> Record:
    flags = experiment_of(variant).chosen_flags(variant)
    cell = Cell("fake", variant.name, flags, "short", "steps", "a text", rate, seed)
    outcome = Outcome(1000, 10, 1.5, 80, {"bits_per_byte": score}, "none", "abc")
    machine = {"processor": "one", "cores": 2, "threads": 1, "load": 0.0}
    return Record(cell, outcome, machine, "2026-01-02T03:04:05Z")


def test_seeds_run_at_the_learning_rate_that_the_first_chose(tmp_path: Path) -> None:
    session, fake = session_of(tmp_path, ONE)
    session.run()
    chosen = [(0.2, 1, 10), (0.2, 2, 10)]
    assert fake.ran == [(rate, 0, 10) for rate in RATES] + chosen
    assert fake.finished == [0, 1, 2]
    (answer,) = frame.answers(session.experiment, records.load(session.file))
    assert (answer.learning_rate, answer.at_edge) == (0.2, False)
    assert answer.values("bits_per_byte") == [0.0, 0.01, 0.02]
    assert answer.values("test_256") == [1.0, 1.0, 1.0]


def test_a_stopped_experiment_goes_on(tmp_path: Path) -> None:
    session, _ = session_of(tmp_path, ONE)
    session.run()
    kept = [r for r in records.load(session.file) if r.cell.seed != 1]
    records.save(session.file, kept)
    session, fake = session_of(tmp_path, ONE)
    session.run()
    assert fake.ran == [(0.2, 1, 10)]
    session.remove()
    session.run()
    assert len(fake.ran) == 1 + 5


def test_removing_records_removes_the_runs_too(tmp_path: Path) -> None:
    session, fake = session_of(tmp_path, ONE, Variant("two", "--two", "Two"))
    session.remove(["one"])
    assert fake.removed == [(rate, seed) for rate in RATES for seed in (0, 1, 2)]


def test_records_of_other_flags_are_made_anew(tmp_path: Path) -> None:
    session_of(tmp_path, ONE)[0].run()
    session, fake = session_of(tmp_path, dataclasses.replace(ONE, flags="--other"))
    session.run()
    assert len(fake.ran) == 5
    assert len(records.load(session.file)) == 5  # in place of the others


def test_two_sessions_lose_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_load(file: Path) -> list[Record]:
        found = load(file)
        time.sleep(0.02)  # for the other session to save in
        return found

    load = records.load
    monkeypatch.setattr(records, "load", slow_load)
    variants = (ONE, Variant("two", "--two", "Two"))
    sessions = [session_of(tmp_path, *variants)[0] for _ in variants]
    with ThreadPoolExecutor(2) as pool:
        under_way = [
            pool.submit(session.run, [variant.name])
            for session, variant in zip(sessions, variants, strict=True)
        ]
        for each in under_way:
            each.result()
    assert len(load(sessions[0].file)) == 2 * 5


def test_unequal_parameters_are_refused(tmp_path: Path) -> None:
    wide = Variant("wide", "--wide", "Wide")
    session, fake = session_of(tmp_path, ONE, wide)
    with pytest.raises(ValueError, match=r"fake, wide: expected 1,000 .* 2%, got 1,050"):
        session.run()
    assert not fake.ran
    session_of(tmp_path, dataclasses.replace(wide, unused=50))[0].run()


def test_a_failing_variant_stops_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, fake = session_of(tmp_path, ONE, Variant("bad", "--bad", "Bad"), jobs=2)
    begun = threading.Event()
    plain = fake.run

    def run(cell: Cell, steps: int) -> Outcome:
        if cell.variant == "bad":
            begun.wait(10)
            raise RuntimeError("bad failed")
        begun.set()
        time.sleep(0.2)
        return plain(cell, steps)

    monkeypatch.setattr(fake, "run", run)
    with pytest.raises(RuntimeError, match="bad failed"):
        session.run()
    assert 1 <= len(fake.ran) < 5  # the run under way ends, and is kept
    assert len(records.load(session.file)) == len(fake.ran)


def test_names_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session, _ = session_of(tmp_path, ONE)
    for action in (session.run, session.remove):
        with pytest.raises(ValueError, match="no variant other: expected one of one"):
            action(["other"])
    assert main(["nothing", "--results", str(tmp_path)]) == 1
    assert "no experiment nothing: expected one of head_to_head," in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--threads", "0"])
    assert "--threads: invalid positive value: '0'" in capsys.readouterr().err


def test_equal_time_gives_a_slow_variant_fewer_steps(tmp_path: Path) -> None:
    slow = Variant("slow", "--slow", "Slow")
    session, fake = session_of(tmp_path, ONE, slow, budget="time")
    session.run(["slow"])
    assert {steps for _, _, steps in fake.ran} == {5}
    assert {r.cell.budget for r in records.load(session.file)} == {"time"}
    assert fake.paced == ["--one", "--slow"]


def test_equal_time_keeps_the_steps_of_the_records(tmp_path: Path) -> None:
    slow = Variant("slow", "--slow", "Slow")
    session, _ = session_of(tmp_path, ONE, slow, budget="time")
    session.run()
    kept = [r for r in records.load(session.file) if (r.cell.variant, r.cell.seed) != ("slow", 1)]
    records.save(session.file, [_with_steps(r, 7) for r in kept])
    session, fake = session_of(tmp_path, ONE, slow, budget="time")
    session.run()
    assert fake.ran == [(0.2, 1, 7)]
    assert not fake.paced


def _with_steps(record: Record, steps: int) -> Record:
    return dataclasses.replace(record, outcome=dataclasses.replace(record.outcome, steps=steps))


def test_a_variant_is_shown_once_its_learning_rate_is_chosen() -> None:
    scores = dict(zip(RATES, (2.0, 3.0, 4.0), strict=True))
    experiment = experiment_of(ONE)
    grid = [made(rate, 0, score) for rate, score in scores.items()]
    assert report.all_results(experiment, []) == "Not run yet."
    shown = report.all_results(experiment, grid[:2])
    assert shown.startswith("### a text, short form, equal steps\n\nNo variant has run at every")
    unfinished = report.results_table(experiment, [*grid, made(0.1, 1, 2.5), made(0.2, 2, 1.0)])
    assert "(`one`) | 1,000 | 0.1 * | 2 | 2.250 (2.000 to 2.500) | 10 | 2 | 53 |" in unfinished
    assert "Not all runs of these variants are there yet: `one`." in unfinished
    whole = report.results_table(experiment, [*grid, made(0.1, 1, 2.5), made(0.1, 2, 2.2)])
    assert "| 0.1 * | 3 | 2.233 (2.000 to 2.500) |" in whole
    assert "Not all" not in whole
    tested = dataclasses.replace(
        grid[0],
        outcome=dataclasses.replace(
            grid[0].outcome, results={"bits_per_byte": 2.0, "test_256": 3.0}
        ),
    )
    partly = [tested, *grid[1:], made(0.1, 1, 2.5), made(0.1, 2, 2.2)]
    assert "yet: `one`." in report.results_table(experiment, partly)  # of one seed alone
    unequal = [*grid, _with_steps(made(0.1, 1, 2.5), 1200)]
    assert "| 10 to 1,200 | 2 |" in report.results_table(experiment, unequal)


def test_at_equal_time_a_table_has_the_relative_time_of_a_step() -> None:
    slow = Variant("slow", "--slow", "Slow")
    experiment = experiment_of(ONE, slow)

    def of_time(variant: Variant, steps: int) -> list[Record]:
        grid = [_with_steps(made(rate, 0, rate, variant), steps) for rate in RATES]
        return [
            dataclasses.replace(r, cell=dataclasses.replace(r.cell, budget="time")) for r in grid
        ]

    shown = report.all_results(experiment, [*of_time(ONE, 10), *of_time(slow, 4)])
    assert "| steps | seconds | tokens a second | relative time of a step |" in shown
    assert "| 10 | 2 | 53 | 1.00 |" in shown
    assert "| 4 | 2 | 53 | 2.50 |" in shown
    assert "| 4 | 2 | 53 | – |" in report.all_results(experiment, of_time(slow, 4))
    assert "relative time of a step" not in report.all_results(
        experiment, [made(r, 0, r) for r in RATES]
    )


def test_a_table_of_several_texts_is_refused() -> None:
    one = made(0.1, 0, 2.0)
    other = dataclasses.replace(one, outcome=dataclasses.replace(one.outcome, fingerprint="more"))
    with pytest.raises(ValueError, match="fake, a text: expected records of one text, got more; n"):
        report.all_results(experiment_of(ONE), [one, other])


def test_an_interrupted_save_leaves_the_file(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    records.save(file, [made(0.1, 0, 2.0)])
    assert records.load(file) == [made(0.1, 0, 2.0)]
    assert list(tmp_path.iterdir()) == [file]
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"r\.json: not records of experiments"):
        records.load(file)


# ---- Text ---------------------------------------------------------------------------------------

SMALL = "--dim 16 --depth 1 --simple-gate-loop none --batch 2 --length 16"


def test_a_run_of_the_program_is_a_record(
    tmp_path: Path, build_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, content = tmp_path / "text.xz", bytes(range(32, 128)) * 200
    with lzma.open(text, "wb") as file:
        file.write(content)
    split = language.Split("17000,1000,1000", zlib.crc32(content[:19000]))
    monkeypatch.setitem(language.SPLITS, "tinyshakespeare", split)
    monkeypatch.setitem(language.STEPS, "short", 4)
    monkeypatch.setitem(language.BYTES_TESTED, "short", 500)
    chosen = settings(tmp_path, data=text, program=build_dir / "gateloop")
    experiment = dataclasses.replace(
        experiment_of(Variant("small", "", "Small")),
        flags=SMALL,
        parameters=11_936,
        learning_rates=(0.001, 0.01),
        seeds=(0, 1),
        trainer=lambda given: language.Language(given, windows=(16, 64)),
    )
    session = Session(experiment, chosen, tmp_path / "r.json", lambda _: None)
    session.run()
    found = records.load(session.file)
    assert len(found) == 3
    for record in found:
        assert not record.problems()
        assert (record.outcome.steps, record.outcome.bytes) == (4, 4 * 2 * 16)
    (answer,) = frame.answers(experiment, found)
    assert len(answer.values("test_16")) == len(answer.values("test_64")) == 2
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
    # A length more to test on, when the weights are gone: trained again, to the same losses.
    wider = dataclasses.replace(experiment, trainer=lambda g: language.Language(g, (16, 64, 128)))
    Session(wider, chosen, tmp_path / "r.json", lambda _: None).run()
    for before, after in zip(found, records.load(session.file), strict=True):
        assert before.outcome.results.items() <= after.outcome.results.items()
    (answer,) = frame.answers(wider, records.load(session.file))
    assert len(answer.values("test_128")) == 2
    assert len(list((tmp_path / "runs").rglob("metrics.jsonl"))) == 3
    # A run of other steps is no answer, and a removed one leaves nothing to go on from.
    cell, trainer = found[0].cell, session.trainer
    assert [trainer.run(cell, steps).steps for steps in (4, 2)] == [4, 2]
    assert list((tmp_path / "runs").rglob("*.safetensors"))
    session.remove()
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


@pytest.mark.parametrize("packed", [open, *language.UNPACK.values()])
def test_another_text_is_refused(
    packed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(200))
    monkeypatch.setitem(
        language.SPLITS, "tinyshakespeare", language.Split("100,20,30", zlib.crc32(content[:150]))
    )
    text = tmp_path / "text"
    expected = r"text: expected tinyshakespeare, plain or packed.* 150 bytes or more"
    for came, is_right in (
        (content, True),
        (content[:150], True),
        (content[:149], False),
        (content[:149] + b"\0", False),
    ):
        with packed(text, "wb") as file:
            file.write(came)
        if is_right:
            language.Language(settings(tmp_path))
        else:
            with pytest.raises(ValueError, match=expected):
                language.Language(settings(tmp_path))


def test_a_text_packed_by_half_is_named(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(lzma.compress(bytes(range(200)))[:-30])
    with pytest.raises(ValueError, match=r"text: (cannot be unpacked|expected tinyshakespeare)"):
        language.Language(settings(tmp_path))


def test_records_of_texts_are_of_these_texts() -> None:
    for name in NAMES:
        for record in records.load(RESULTS / f"{name}.json"):
            if split := language.SPLITS.get(record.cell.text):
                size, _, crc = record.outcome.fingerprint.partition(" bytes, crc ")
                # Of a longer file the trainer reads a part in many places.
                if int(size) == sum(map(int, split.sizes.split(","))):
                    assert int(crc, 16) == split.crc, f"run {name} --again"


def test_the_file_follows_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["head_to_head", "--results", str(tmp_path), "--program", str(tmp_path / "none")]
    assert main([*flags, "--text", "tinyshakespeare", "--runs", str(tmp_path)]) == 1
    assert "data/tinyshakespeare" in capsys.readouterr().err


def test_the_program_failing_is_an_error(
    tmp_path: Path, build_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, content = tmp_path / "text", bytes(20000)
    with pytest.raises(FileNotFoundError, match="text: no such text"):
        language.Language(settings(tmp_path))
    text.write_bytes(content)
    split = language.Split("17000,1000,1000", zlib.crc32(content[:19000]))
    monkeypatch.setitem(language.SPLITS, "tinyshakespeare", split)
    trainer = language.Language(settings(tmp_path, program=build_dir / "gateloop"))
    with pytest.raises(RuntimeError, match=r"gateloop train .*: exit code"):
        trainer.parameters(["--no-such-flag"])
    with pytest.raises(ValueError, match="--text: expected enwik8 or tinyshakespeare, got other"):
        language.Language(settings(tmp_path, text="other"))


# ---- Tasks --------------------------------------------------------------------------------------


def test_memory_horizon_is_the_sum_since_the_last_reset() -> None:
    batch = tasks.memory_horizon(20, 50, 0.2, torch.Generator().manual_seed(1))
    assert batch.tokens.shape == batch.targets.shape == batch.spans.shape == (20, 50)
    assert (batch.tokens[:, 0] == tasks.RESET).all()
    assert set(batch.tokens.unique().tolist()) == set(range(tasks.NUMBERS + 1))
    rows = zip(batch.tokens.tolist(), batch.targets.tolist(), batch.spans.tolist(), strict=True)
    for tokens, targets, spans in rows:
        total = span = 0
        for token, target, needed in zip(tokens, targets, spans, strict=True):
            total, span = (0, 0) if token == tasks.RESET else (total + token, span + 1)
            assert (target, needed) == (total % tasks.NUMBERS, span)


def test_resets_come_as_often_as_asked() -> None:
    batch = tasks.memory_horizon(400, 101, 0.25, torch.Generator().manual_seed(2))
    share = (batch.tokens[:, 1:] == tasks.RESET).double().mean()
    assert share == pytest.approx(0.25, abs=0.01)  # five deviations of 40,000 draws


def test_associative_recall_is_what_followed_the_last_time() -> None:
    batch = tasks.associative_recall(20, 40, 6, torch.Generator().manual_seed(3))
    rows = zip(batch.tokens.tolist(), batch.targets.tolist(), batch.spans.tolist(), strict=True)
    for tokens, targets, spans in rows:
        for step, (target, span) in enumerate(zip(targets, spans, strict=True)):
            before = [at for at in range(step) if tokens[at] == tokens[step]]
            if before:
                assert (target, span) == (tokens[before[-1] + 1], step - before[-1])
            else:
                assert (target, span) == (tasks.IGNORED, 0)


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.name)
def test_tasks_are_the_same_for_the_same_seed(task: tasks.Task) -> None:
    def drawn(seed: int) -> torch.Tensor:
        return task.draw(3, torch.Generator().manual_seed(seed)).tokens

    assert drawn(0).equal(drawn(0))
    assert not drawn(0).equal(drawn(1))
    assert drawn(0).shape == (3, task.length)


def test_fixed_transitions_do_not_depend_on_the_data() -> None:
    model = fixed_transition.make_model(
        6, ["dim=8", "depth=2", "gate=magnitude_phase", "transition=fixed"]
    )
    layers = [m for m in model.modules() if isinstance(m, GateLoopedAttention)]
    assert len(layers) == 2
    ids = torch.randint(6, (2, 5))
    for layer in layers:
        raw = layer.to_a(torch.randn(2, 5, 8))
        assert raw.shape == (2, 5, 16)
        assert (raw == raw[0, 0]).all()
    model(ids, return_loss=True).backward()
    for layer in layers:
        (bias,) = layer.to_a.parameters()
        assert bias.grad is not None
        assert bias.grad.abs().max() > 0


def test_flags_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="expected NAME=VALUE, got 'dim'"):
        fixed_transition.make_model(6, ["dim"])
    with pytest.raises(ValueError, match="expected data or fixed, got 'other'"):
        fixed_transition.make_model(6, ["dim=8", "depth=1", "transition=other"])


def test_a_small_model_learns_a_task() -> None:
    model = ["dim=16", "depth=1", "gate=sigmoid"]
    learned = synthetic.train("memory_horizon", model, 30, 1, learning_rate=0.02)
    repeated = synthetic.train("memory_horizon", model, 30, 1, learning_rate=0.02)
    assert learned.results == repeated.results
    # The first targets after a reset are the tokens themselves; chance is 0.2.
    assert learned.results["1 to 4"] > 0.25
    assert learned.bytes == 30 * 16 * 256
    assert json.loads(json.dumps(dataclasses.asdict(learned)))["steps"] == 30
