"""`gateloop evaluate` in several processes: the figures of one, and errors that name who failed."""

import random
import re
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import thinned
from processes import Job, environment, free_port, start, torchrun, torchrun_environment

WORDS = ("the ", "gate ", "loops ", "over ", "time ", "and ", "forgets.\n")
SMALL = (
    *("--dim", "16", "--depth", "2", "--dim-head", "8", "--heads", "2", "--length", "16"),
    *("--batch", "4", "--accumulation", "1", "--threads", "1", "--sample-length", "0"),
    *("--dtype", "float32", "--learning-rate", "3e-2", "--validation-windows", "9"),
    *("--steps", "60"),
)
MODELS = {
    "gate_loop": (),
    "hybrid": (
        *("--layers", "gate_loop,attention", "--window", "40", "--rotary-emb"),
        *("--simple-gate-loop", "every"),
    ),
    "full_attention": ("--layers", "attention"),
}
# A process reads blocks of 8192 bytes: four in two processes, and a rest; two in three.
LONG = 70_001
FIGURE = re.compile(r"(windowed|carried) +([\d.]+) bits per byte, (\d+) bytes")

Evaluate = Callable[..., Job]


def figures(output: str) -> dict[str, tuple[float, int]]:
    """Bits per byte and bytes of each mode; four digits are printed."""
    return {mode: (float(bits), int(count)) for mode, bits, count in FIGURE.findall(output)}


def words(chooser: random.Random, size: int) -> str:
    return "".join(chooser.choice(WORDS) for _ in range(size // 4))[:size]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(words(random.Random(0), LONG))
    return path


@pytest.fixture(scope="module")
def models(
    build_dir: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A run of each of MODELS, trained enough that what came before a byte matters."""
    folder = tmp_path_factory.mktemp("models")
    for name, flags in MODELS.items():
        command = (build_dir / "gateloop", "train", "--data", text, "--out", folder / name)
        with start([*command, *SMALL, *flags], 1) as job:
            job.check()
    return {name: folder / name for name in MODELS}


@pytest.fixture
def evaluate(build_dir: Path, models: dict[str, Path]) -> Evaluate:
    def evaluate(size: int, model: str, *flags: object) -> Job:
        binary = build_dir / "gateloop"
        options = ("--checkpoint", models[model], "--threads", "1", *flags)
        return start([binary, "evaluate", *options], size)

    return evaluate


def check_figures(evaluate: Evaluate, sizes: tuple[int, ...], model: str, *flags: object) -> None:
    expected: dict[str, tuple[float, int]] = {}
    for size in (1, *sizes):
        with evaluate(size, model, *flags) as job:
            outputs = job.check()
        assert outputs[1:] == [""] * (size - 1)
        found = figures(outputs[0])
        expected = expected or found
        assert found.keys() == expected.keys()
        for mode, (bits, count) in expected.items():
            assert found[mode][1] == count
            # Of the four digits the last may be rounded either way.
            assert found[mode][0] == pytest.approx(bits, abs=1.01e-4), (mode, size)
    if "carried" in expected and len(sizes) > 1:
        assert expected["carried"] != expected["windowed"]


@pytest.mark.parametrize("model", MODELS)
def test_the_figures_are_those_of_one_process(evaluate: Evaluate, text: Path, model: str) -> None:
    check_figures(evaluate, (2, 3), model, "--data", text)


def test_documents_long_and_short(evaluate: Evaluate, tmp_path: Path) -> None:
    chooser = random.Random(1)
    for number, size in enumerate((40_001, 30, 700, 1, 33_000, 5_000)):
        (tmp_path / f"{number}.txt").write_text(words(chooser, size))
    check_figures(evaluate, (2, 3), "hybrid", "--data", tmp_path, "--documents")


def test_fewer_bytes_than_processes(evaluate: Evaluate, text: Path) -> None:
    check_figures(evaluate, (3,), "hybrid", "--data", text, "--first", "2")


def test_torchrun_and_slurm_start_it(
    build_dir: Path, models: dict[str, Path], evaluate: Evaluate, text: Path
) -> None:
    flags = ("--data", text, "--mode", "carried")
    with evaluate(2, "gate_loop", *flags) as job:
        expected = figures(job.check()[0])
    command = (build_dir / "gateloop", "evaluate", "--checkpoint", models["gate_loop"], *flags)
    with Job([*torchrun(2), *command], [environment(OMP_NUM_THREADS=1)]) as job:
        assert list(map(figures, job.check())) == [expected]
    step = free_port()
    slurm = [
        environment(
            SLURM_PROCID=rank,
            SLURM_LOCALID=rank,
            SLURM_STEP_NUM_TASKS=2,
            SLURM_STEP_NODELIST="localhost",
            SLURM_JOB_ID=step,
        )
        for rank in range(2)
    ]
    with Job(command, slurm) as job:
        assert list(map(figures, job.check())) == [expected, {}]


def test_one_process_needs_no_torch(
    build_dir: Path, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """Whatever started it: the program with torch is not beside this copy."""
    alone = shutil.copy(build_dir / "gateloop", tmp_path / "gateloop")
    command = (alone, "evaluate", "--checkpoint", models["gate_loop"], "--data", text)
    for variables in ({}, {"RANK": 0, "WORLD_SIZE": 1}, {"SLURM_NTASKS": 4}):
        with Job([*command, "--first", "100"], [environment(**variables)]) as job:
            assert len(figures(job.check()[0])) == 2
    with Job(command, [torchrun_environment(0, 2, free_port())]) as job:
        ((code, _, err),) = job.outcomes()
    assert code == 1
    assert err.startswith(f"gateloop: cannot run {tmp_path}/gateloop-train: No such file or ")
    (tmp_path / "gateloop-train").write_bytes(b"")  # not to be run by anybody
    with Job(command, [torchrun_environment(0, 2, free_port())]) as job:
        ((code, _, err),) = job.outcomes()
    assert err == f"gateloop: cannot run {tmp_path}/gateloop-train: Permission denied\n"


def test_variables_of_one_process_are_checked_too(build_dir: Path, tmp_path: Path) -> None:
    command = (build_dir / "gateloop", "evaluate", "--checkpoint", tmp_path, "--data", tmp_path)
    message = 'environment variable RANK: expected a number from 0 to 0, got "5"'
    with Job(command, [environment(RANK=5, WORLD_SIZE=1)]) as job:
        assert job.outcomes() == [(2, "", f"gateloop: {message}\n")]


@pytest.mark.parametrize("victim", thinned([1, 0], 2))
def test_a_killed_process_ends_all_and_is_named(
    evaluate: Evaluate, tmp_path: Path, victim: int
) -> None:
    text = tmp_path / "long"
    text.write_text(words(random.Random(2), 100_000) * 20)
    with evaluate(3, "gate_loop", "--data", text, "--length", "64") as job:
        output = job.processes[0].stdout
        assert output is not None
        assert output.readline().startswith("windowed ")  # the carried state is on its way
        job.signal(victim, signal.SIGKILL)
        outcomes = job.outcomes()
    name = "process 0, which keeps the store," if victim == 0 else f"process {victim} of 3"
    for rank, (code, out, err) in enumerate(outcomes):
        if rank == victim:
            continue
        assert (code, figures(out)) == (1, {})
        message = f"gateloop: {name} died, or its machine cannot be reached: "
        assert err.splitlines()[-1].startswith(message)


Start = Callable[[Sequence[Sequence[object]]], list[Job]]


@pytest.fixture
def start_each(build_dir: Path) -> Iterator[Start]:
    """Starts processes together, each with flags of its own."""
    with ExitStack() as stack:

        def start_each(flags: Sequence[Sequence[object]]) -> list[Job]:
            port, size = free_port(), len(flags)
            command = (build_dir / "gateloop", "evaluate", "--threads", "1", "--timeout", "30")
            return [
                stack.enter_context(Job([*command, *own], [torchrun_environment(rank, size, port)]))
                for rank, own in enumerate(flags)
            ]

        yield start_each


def check_refused(jobs: Sequence[Job], expected: Sequence[str]) -> None:
    """Each process but 0 says `expected` of itself, and process 0 what one of them said."""
    (main,), *others = [job.outcomes() for job in jobs]
    said = []
    for rank, (((code, out, err),), text) in enumerate(zip(others, expected, strict=True), 1):
        name, here, there = text.split("|")
        said.append(
            f"{name} must be the same in all processes: {here} in process {rank}, "
            f"{there} in process 0"
        )
        assert (code, out) == (1, "")
        assert re.fullmatch(rf"gateloop: {said[-1]}\n", err), err
    code, out, err = main
    assert (code, figures(out)) == (1, {})
    ended = "|".join(said)
    assert re.fullmatch(rf"gateloop: process \d of {len(jobs)} ended: ({ended})\n", err), err


def test_a_flag_that_differs_is_named(
    start_each: Start, models: dict[str, Path], text: Path
) -> None:
    own = {
        ("--part", "valid"): "--part|valid|all",
        ("--mode", "windowed"): "--mode|windowed|both",
        ("--length", "16"): "--length|16|256",
        ("--first", "500"): "--first|500|all",
        ("--weights", "best"): "--weights|best|latest",
        ("--dtype", "int8"): "--dtype|int8|as stored",
    }
    common = ("--checkpoint", models["gate_loop"], "--data", text)
    jobs = start_each([(*common, *flags) for flags in ((), *own)])
    check_refused(jobs, list(own.values()))


def test_a_text_or_a_model_that_differs_is_named(
    start_each: Start, models: dict[str, Path], tmp_path: Path
) -> None:
    content = bytearray(words(random.Random(3), 5_000_000), "ascii")
    text, other_text = tmp_path / "text", tmp_path / "other"
    text.write_bytes(content)
    content[70_000] ^= 1  # between the samples that a run's record compares
    other_text.write_bytes(content)
    model, other_model = models["gate_loop"], tmp_path / "model"
    shutil.copytree(model, other_model)
    with (other_model / "model.safetensors").open("r+b") as weights:
        weights.seek(-4, 2)
        weights.write(struct.pack("<f", 0.5))

    def flags(data: Path, checkpoint: Path, *own: str) -> tuple[object, ...]:
        return ("--data", data, "--checkpoint", checkpoint, "--first", "100", *own)

    jobs = start_each(
        [
            flags(text, model),
            flags(text, model, "--documents"),
            flags(other_text, model),
            flags(text, model, "--split", "90,5,5"),
            flags(text, other_model),
        ]
    )
    crc, digits = "5000000 bytes, crc [0-9a-f]{8}", "checksum [0-9a-f]{16}"
    check_refused(
        jobs,
        [
            "--documents|documents apart|one text",
            f"the text of --data|{crc}|{crc}",
            "--split|90,5,5|4500000,250000,250000",
            f"the model of --checkpoint|{digits}|{digits}",
        ],
    )


def test_a_checkpoint_may_be_replaced_meanwhile(
    evaluate: Evaluate, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """The carried figure is of the weights that the windowed one was of."""
    flags = ("--data", text, "--length", "1")
    with evaluate(2, "gate_loop", *flags) as job:
        expected = figures(job.check()[0])
    models["replaced"] = shutil.copytree(models["gate_loop"], tmp_path / "replaced")
    weights = models["replaced"] / "model.safetensors"
    with evaluate(2, "replaced", *flags) as job:
        for process in job.processes:
            maps = Path(f"/proc/{process.pid}/maps")
            while process.poll() is None and str(weights) not in maps.read_text("utf-8"):
                time.sleep(0.001)
        weights.unlink()
        assert figures(job.check()[0]) == expected


def test_windows_are_read_by_sessions_however_long(evaluate: Evaluate, text: Path) -> None:
    flags = ("--mode", "windowed", "--length", "30000", "--dtype", "int8")
    check_figures(evaluate, (2,), "gate_loop", "--data", text, *flags)


def test_what_modules_do_not_read_is_refused(
    evaluate: Evaluate, build_dir: Path, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    data = ("--data", text, "--first", "50000")
    with evaluate(2, "full_attention", *data, "--mode", "carried") as job:
        for code, _, err in job.outcomes():
            assert code != 0
            assert "--mode carried needs a model without full attention" in err
    for device in ("cpu", "auto") if not torch.cuda.is_available() else ("cpu",):
        flags = ("--dtype", "int8", "--device", device)
        with evaluate(2, "gate_loop", *data, *flags) as job:
            for code, _, err in job.outcomes():
                assert code == 2
                assert "--dtype in several processes needs --mode windowed" in err
    check_figures(evaluate, (2,), "gate_loop", *data, "--dtype", "int8", "--mode", "windowed")
    small = tmp_path / "small"
    quantize = ("quantize", "--checkpoint", models["gate_loop"], "--format", "int8")
    subprocess.run([build_dir / "gateloop", *quantize, "--out", small], check=True)
    models["small"] = small
    # The session rounds activations to 16 bits beside matrices of int8, modules do not.
    check_figures(evaluate, (2,), "small", *data)
