"""`gateloop train` in two and three processes: the losses of one, whole files after every fault."""

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import thinned
from processes import (
    TIMEOUT,
    Job,
    environment,
    free_port,
    records,
    saved_step,
    start,
    torchrun,
    torchrun_environment,
    wait_for_step,
)

WORDS = ("the ", "gate ", "loops ", "over ", "time ", "and ", "forgets.\n")
# A step takes about a millisecond; the time goes into starting processes.
SMALL = (
    *("--dim", "16", "--depth", "2", "--dim-head", "8", "--heads", "2", "--length", "16"),
    *("--batch", "7", "--accumulation", "1", "--threads", "1", "--sample-length", "0"),
    *("--dtype", "float32", "--learning-rate", "3e-3", "--validation-windows", "9"),
)
# Runs that a test stops; no machine reaches it meanwhile.
ENDLESS = ("--steps", "1000000000")

Train = Callable[..., Job]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text"
    chooser = random.Random(0)
    path.write_text("".join(chooser.choice(WORDS) for _ in range(8000)))
    return path


@pytest.fixture(scope="module")
def binary(build_dir: Path) -> Path:
    return build_dir / "gateloop"


@pytest.fixture(scope="module")
def train(text: Path, binary: Path) -> Iterator[Train]:
    with contextlib.ExitStack() as jobs:

        def train(size: int, out: Path, *flags: str, small: tuple[str, ...] = SMALL) -> Job:
            command = (binary, "train", "--data", text, "--out", out, *small, *flags)
            return jobs.enter_context(start(command, size))

        yield train


@pytest.fixture(scope="module")
def unbroken(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run of one, of two and of three processes, of the same length."""
    runs = {}
    for size in (1, 2, 3):
        runs[size] = tmp_path_factory.mktemp("unbroken") / str(size)
        flags = ("--steps", "200", "--validate-every", "20", "--checkpoint-every", "50")
        train(size, runs[size], *flags).check()
    return runs


def assert_close(
    found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float
) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=tolerance)


# Sums over 7 rows as 3 + 4 or 2 + 2 + 3 differ in their last bits, 6e-8; 200 updates of Adam carry
# that to some 1e-5 here.
ROUNDING = 2e-4


@pytest.mark.parametrize("size", [2, 3])
def test_losses_are_those_of_one_process(unbroken: dict[int, Path], size: int) -> None:
    ours, one = records(unbroken[size]), records(unbroken[1])
    assert_close(ours[:5], one[:5], 1e-6)
    assert_close(ours, one, ROUNDING)
    assert ours != one  # they did share the rows


def test_documents_are_read_by_all_processes(binary: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    words = text.read_text(encoding="utf-8").split()
    for name, part in (("a.jsonl", words[:3000]), ("b.jsonl", words[3000:])):
        lines = (json.dumps({"text": " ".join(part[i : i + 9])}) for i in range(0, len(part), 9))
        (folder / name).write_text("\n".join(lines))
    flags = ("--field", "text", "--documents", "--steps", "5", "--validate-every", "5")
    runs = []
    for size in (1, 2):
        runs.append(tmp_path / str(size))
        command = (binary, "train", "--data", folder, "--out", runs[-1], *SMALL, *flags)
        with start(command, size) as job:
            job.check()
    one, two = (records(run) for run in runs)
    assert_close(two, one, 1e-6)


def test_diagnostics_are_those_of_one_process(train: Train, tmp_path: Path) -> None:
    flags = ("--steps", "3", "--diagnostics-every", "3", "--shard-optimizer")
    layers = []
    for size in (1, 2):
        train(size, tmp_path / str(size), *flags).check()
        last = json.loads((tmp_path / str(size) / "metrics.jsonl").read_text().splitlines()[-1])
        layers.append(last["diagnostics"]["layers"])
    for one, two in zip(*layers, strict=True):
        assert two.keys() == one.keys()
        for name, expected in one.items():
            assert two[name] == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING), name


def test_models_with_constants_and_checkpointed_blocks(train: Train, tmp_path: Path) -> None:
    flags = ("--layers", "gate_loop,attention", "--rotary-emb", "--steps", "5")
    for size in (1, 2):
        train(size, tmp_path / str(size), *flags).check()
    one, two = (records(tmp_path / name) for name in "12")
    assert_close(two, one, 1e-6)
    train(2, tmp_path / "checkpointed", *flags, "--checkpoint-blocks").check()
    assert records(tmp_path / "checkpointed") == two


def test_the_log_says_how_many_trained(unbroken: dict[int, Path]) -> None:
    for size, run in unbroken.items():
        provenance = json.loads((run / "config.json").read_text())["provenance"]
        assert [entry.get("processes", 1) for entry in provenance] == [size]


def test_same_bits_on_every_run_however_often_it_was_broken(
    train: Train, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ("--validate-every", "20", "--checkpoint-every", "50", "--steps", "200")
    job = train(3, run, *flags)
    wait_for_step(run, 60, job)
    job.signal(1, signal.SIGKILL)
    job.outcomes()
    job = train(3, run, "--resume", small=())
    wait_for_step(run, 110, job)
    job.signal(2, signal.SIGTERM)
    job.outcomes()
    train(3, run, "--resume", small=()).check()
    assert records(run) == records(unbroken[3])
    for file in ("model.safetensors", "model.best.safetensors"):
        assert tensors(run / file) == tensors(unbroken[3] / file)


def tensors(path: Path) -> dict[str, bytes]:
    """What a safetensors file holds, without its metadata, which name the run."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__")
    return {name: data[8 + size :][slice(*entry["data_offsets"])] for name, entry in header.items()}


def test_a_run_goes_on_in_another_number_of_processes(
    train: Train, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ("--validate-every", "20", "--checkpoint-every", "50", "--steps", "200")
    for size, step in ((3, 30), (1, 90), (2, 140)):
        job = train(size, run, *(("--resume",) if run.exists() else flags), small=SMALL)
        wait_for_step(run, step, job)
        job.signal(0, signal.SIGTERM)
        assert [code for code, _, _ in job.outcomes()] == [128 + signal.SIGTERM] * size
    train(3, run, "--resume").check()
    assert_close(records(run), records(unbroken[1]), ROUNDING)


def test_sharded_optimizer_is_the_same_run(
    train: Train, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ("--validate-every", "20", "--checkpoint-every", "50", "--steps", "200")
    job = train(3, run, *flags, "--shard-optimizer")
    wait_for_step(run, 60, job)
    job.signal(0, signal.SIGTERM)
    job.outcomes()
    train(3, run, "--resume").check()
    assert records(run) == records(unbroken[3])
    state = "training_state.safetensors"
    assert tensors(run / state) == tensors(unbroken[3] / state)


def test_compressed_gradients_are_rounded_and_train(
    train: Train, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ("--validate-every", "20", "--checkpoint-every", "50", "--steps", "200")
    train(2, run, *flags, "--gradient-compression", "bfloat16").check()
    ours, exact = records(run), records(unbroken[2])
    # bfloat16 keeps 8 bits: a norm is off by less than 2**-8, and by more than float32's rounding.
    assert ours[0]["gradient_norm"] == pytest.approx(exact[0]["gradient_norm"], rel=2**-8)
    assert ours[0]["gradient_norm"] != pytest.approx(exact[0]["gradient_norm"], rel=1e-6)
    last = "final_validation_bits_per_byte"
    assert ours[-1][last] == pytest.approx(exact[-1][last], rel=0.02)


# How a process is said to have died: the latter where it did while a message to it was sent.
LOST = "died, or its machine cannot be reached"
LATE = "did not answer within the time-out"


@pytest.mark.parametrize("victim", thinned([1, 0, 2], 3))
def test_a_killed_process_ends_all_and_is_named(train: Train, tmp_path: Path, victim: int) -> None:
    run = tmp_path / "run"
    timeout = 30
    job = train(3, run, *ENDLESS, "--checkpoint-every", "20", "--timeout", str(timeout))
    wait_for_step(run, 45, job)
    job.signal(victim, signal.SIGKILL)
    began = time.monotonic()
    outcomes = job.outcomes()
    # The store of process 0 is given up after 16 s; the rest is a busy machine's.
    assert time.monotonic() - began < timeout + 20
    # Process 0 keeps the store by which processes tell one another.
    name = "process 0, which keeps the store," if victim == 0 else f"process {victim} of 3"
    for rank, (code, _, err) in enumerate(outcomes):
        if rank == victim:
            continue
        assert code == 1
        # Before it may come what libtorch logs of its own.
        last = err.splitlines()[-1]
        assert last.startswith(tuple(f"gateloop: {name} {how}: " for how in (LOST, LATE)))
    job = train(1, run, "--resume")
    wait_for_step(run, 46, job)


@contextlib.contextmanager
def replaced_files(folder: Path) -> Iterator[Callable[[], list[str]]]:
    """A function that returns the names that files of `folder` were renamed to since the scope
    began, in order: the kernel counts them (inotify(7))."""
    libc = ctypes.CDLL(None)
    moved_to, header = 0x80, struct.Struct("iIII")  # IN_MOVED_TO; without the name
    queue = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert queue >= 0
    try:
        assert libc.inotify_add_watch(queue, os.fsencode(folder), moved_to) >= 0

        def names() -> list[str]:
            found = []
            with contextlib.suppress(BlockingIOError):
                while events := os.read(queue, 1 << 16):
                    while events:
                        end = header.size + header.unpack_from(events)[3]
                        found.append(events[header.size : end].rstrip(b"\0").decode())
                        events = events[end:]
            return found

        yield names
    finally:
        os.close(queue)


def test_a_signal_to_one_process_ends_all_saved_once(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = train(3, run, *ENDLESS, "--checkpoint-every", "0", "--validate-every", "0")
    wait_for_step(run, 10, job)
    assert saved_step(run) == 0
    with replaced_files(run) as replaced:
        job.signal(2, signal.SIGUSR1)
        outcomes = job.outcomes()
        assert replaced() == ["training_state.safetensors", "model.safetensors"]
    assert [code for code, _, _ in outcomes] == [128 + signal.SIGUSR1] * 3
    step = saved_step(run)
    assert step == records(run)[-1]["step"]
    assert outcomes[0][1].count(f"Stopped by SIGUSR1 after step {step}; saved.") == 1
    assert [out for _, out, _ in outcomes[1:]] == ["", ""]


def test_a_second_launch_is_refused(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train(2, run, *ENDLESS, "--checkpoint-every", "20")
    wait_for_step(run, 21, first)
    outcomes = train(2, run, "--resume").outcomes()
    assert [code for code, _, _ in outcomes] == [1, 1]
    message = f"{run}: another process is training there\n"
    assert outcomes[0][2] == f"gateloop: {message}"
    assert outcomes[1][2] == f"gateloop: process 0: {message}"


def test_why_one_process_ends_all_learn(binary: Path, text: Path, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / text.name).write_text("Another text than that of process 0. " * 500)
    command = (binary, "train", "--data", text.name, "--out", tmp_path / "run", *SMALL, *ENDLESS)
    here, there = [torchrun_environment(rank, 2, port) for rank in range(2)]
    with Job(command, [here], cwd=text.parent) as job, Job(command, [there], cwd=tmp_path) as other:
        (code, _, err), (other_code, _, other_err) = job.outcomes()[0], other.outcomes()[0]
    assert (code, other_code) == (1, 1)
    assert "is not the corpus of this run" in other_err
    assert err == "gateloop: process 1 of 2 ended: " + other_err.removeprefix("gateloop: ")


def test_options_are_those_of_process_0(
    binary: Path, text: Path, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    port = free_port()
    first, second = [torchrun_environment(rank, 2, port) for rank in range(2)]
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    command = (binary, "train", "--data", text, "--out")
    flags = ("--validate-every", "20", "--checkpoint-every", "50", "--steps", "200")
    # Without SMALL: the sizes of a larger preset.
    others = (
        *("--preset", "hybrid", "--seed", "7", "--learning-rate", "0.1", "--steps", "5"),
        *("--shard-optimizer", "--gradient-compression", "bfloat16", "--threads", "1"),
    )
    with (
        Job([*command, run, *SMALL, *flags], [first]) as job,
        Job([*command, elsewhere, *others], [second]) as other,
    ):
        job.check()
        other.check()
    assert records(run) == records(unbroken[2])
    assert tensors(run / "model.safetensors") == tensors(unbroken[2] / "model.safetensors")
    assert not elsewhere.exists()


def test_minutes_are_those_of_process_0(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(3, run, "--minutes", "0.05", "--validate-every", "50").check()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Steps are timed on a machine that other tests share.
    assert lines[-1]["elapsed_seconds"] == pytest.approx(3, abs=1.5)
    assert (
        lines[-1]["step"]
        == json.loads((run / "config.json").read_text())["training"]["plan"][-1][1]
    )


def test_gloo_by_its_name(train: Train, unbroken: dict[int, Path], tmp_path: Path) -> None:
    flags = ("--validate-every", "20", "--checkpoint-every", "50", "--steps", "200")
    train(2, tmp_path / "run", *flags, "--backend", "gloo").check()
    assert records(tmp_path / "run") == records(unbroken[2])


def test_more_processes_than_rows(train: Train, tmp_path: Path) -> None:
    few = (*SMALL[: SMALL.index("--batch")], "--batch", "1", "--accumulation", "2")
    outcomes = train(3, tmp_path / "run", *ENDLESS, small=few).outcomes()
    words = "batch x accumulation must be at least the number of processes, 3, not 2"
    assert outcomes[0][0] == 2
    assert outcomes[0][2].startswith(f"gateloop: {words}")
    assert (outcomes[1][0], outcomes[1][2]) == (1, f"gateloop: process 0: {words}\n")


def test_torchrun_goes_on_by_itself_after_a_death(
    binary: Path, text: Path, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = (
        *torchrun(2, "--max-restarts", "1"),
        *(binary, "train", "--data", text, "--out", run, *SMALL),
        *("--validate-every", "20", "--checkpoint-every", "50", "--steps", "200"),
    )
    with Job(command, [environment(OMP_NUM_THREADS=1)]) as job:
        wait_for_step(run, 60, job)
        workers = children(job.processes[0].pid)
        assert len(workers) == 2
        subprocess.run(["kill", "-KILL", str(workers[1])], check=True)
        job.check()
    assert records(run) == records(unbroken[2])
    assert len(json.loads((run / "config.json").read_text())["provenance"]) == 2


@pytest.mark.long
def test_torchrun_does_not_take_up_a_run_of_others(
    train: Train, binary: Path, text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = train(2, run, *ENDLESS, "--checkpoint-every", "20")
    wait_for_step(run, 25, job)
    job.signal(0, signal.SIGTERM)
    job.outcomes()
    before = records(run)
    command = (
        *torchrun(2, "--max-restarts", "1"),
        *(binary, "train", "--data", text, "--out", run, *SMALL, *ENDLESS),
    )
    with Job(command, [environment(OMP_NUM_THREADS=1)]) as job:
        ((code, _, err),) = job.outcomes()
    assert code == 1
    assert err.count(f"gateloop: {run} holds a run already") == 2  # of both lives
    assert records(run) == before


def test_a_process_that_is_busy_is_not_called_dead(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = train(2, run, *ENDLESS, "--timeout", "1")
    wait_for_step(run, 5, job)
    job.signal(1, signal.SIGSTOP)
    time.sleep(3)
    job.signal(1, signal.SIGCONT)
    outcomes = job.outcomes()
    assert [code for code, _, _ in outcomes] == [1, 1]
    # Continued, it may find its own time-out over too.
    assert not any("died" in err for _, _, err in outcomes)
    assert "Timed out" in outcomes[0][2]


def test_a_path_that_names_gloo_is_no_lost_connection(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "gloo" / "run"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}", encoding="utf-8")
    outcomes = train(2, run, *ENDLESS).outcomes()
    assert outcomes[0][0] == 2
    assert outcomes[0][2].startswith(f"gateloop: {run} holds a run already")


# 1.4 million parameters, 5 buckets and more: 6 MB of gradients.
LARGER = (
    *("--dim", "160", "--depth", "2", "--length", "16", "--batch", "6", "--accumulation", "1"),
    *("--threads", "1", "--sample-length", "0", "--dtype", "bfloat16", "--validation-windows", "9"),
    *("--steps", "12", "--checkpoint-every", "5", "--validate-every", "4"),
)


@pytest.mark.long
@pytest.mark.parametrize("sharded", [(), ("--shard-optimizer",)])
def test_several_buckets_resume_bit_for_bit(
    train: Train, tmp_path: Path, sharded: tuple[str, ...]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(3, whole, *sharded, small=LARGER).check()
    job = train(3, broken, *sharded, small=LARGER)
    wait_for_step(broken, 6, job)
    job.signal(1, signal.SIGKILL)
    job.outcomes()
    train(3, broken, "--resume", small=()).check()
    assert records(broken) == records(whole)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_bytes().split()]


def test_slurm_needs_no_flag(
    binary: Path, text: Path, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    environments = [
        environment(
            SLURM_PROCID=rank,
            SLURM_LOCALID=rank,
            SLURM_STEP_NUM_TASKS=2,
            SLURM_NTASKS=2,
            SLURM_STEP_NODELIST="localhost",
            SLURM_JOB_ID=free_port(),
        )
        for rank in range(2)
    ]
    for variables in environments:
        variables["SLURM_JOB_ID"] = environments[0]["SLURM_JOB_ID"]
    command = (
        *(binary, "train", "--data", text, "--out", run, *SMALL),
        *("--validate-every", "20", "--checkpoint-every", "50", "--steps", "200"),
    )
    with Job(command, environments) as job:
        job.check()
    assert records(run) == records(unbroken[2])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RANK": 2, "WORLD_SIZE": 2},
            'RANK: expected a number from 0 to 1, got "2"',
        ),
        (
            {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"},
            'MASTER_PORT: expected a value, as launchers of several processes set it, got ""',
        ),
        (
            {"RANK": 0, "WORLD_SIZE": "two"},
            'WORLD_SIZE: expected a number from 1 to 1048576, got "two"',
        ),
    ],
)
def test_wrong_variables_are_named(
    binary: Path, text: Path, tmp_path: Path, variables: dict[str, object], message: str
) -> None:
    command = (binary, "train", "--data", text, "--out", tmp_path / "run", *SMALL, *ENDLESS)
    with Job(command, [environment(**variables)]) as job:
        assert job.outcomes() == [(2, "", f"gateloop: environment variable {message}\n")]


def test_absent_processes_are_waited_for_until_the_time_out(
    binary: Path, text: Path, tmp_path: Path
) -> None:
    command = (binary, "train", "--data", text, "--out", tmp_path / "run", *SMALL, *ENDLESS)
    began = time.monotonic()
    with Job([*command, "--timeout", "2"], [torchrun_environment(0, 2, free_port())]) as job:
        ((code, _, err),) = job.outcomes()
    assert time.monotonic() - began < 20
    assert code == 1
    assert "gateloop: process 0 of 2 did not reach the others at 127.0.0.1:" in err
    assert err.endswith(": process 1 of 2 did not come within the time-out\n")
    assert not (tmp_path / "run").exists()


def has_namespaces() -> bool:
    """Whether this process may make hosts of its own: as root, where the kernel allows it."""
    made = subprocess.run(["ip", "netns", "add", "gateloop-probe"], capture_output=True)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "delete", "gateloop-probe"], check=True)
    return made.returncode == 0


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two hosts with an address each, 10.77.0.1 and 10.77.0.2, on one cable."""
    if shutil.which("ip") is None or not has_namespaces():
        pytest.skip("no network namespaces here: they need root and iproute2")
    names = [f"gateloop-{os.getpid()}-{number}" for number in (1, 2)]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ends = [("name", "cable", "netns", name) for name in names]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


# A process calls another dead after 5 s; that of the second host gives up the store 11 s later.
@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.long)])
def test_two_hosts_a_killed_process_and_a_cut_cable(
    binary: Path,
    text: Path,
    unbroken: dict[int, Path],
    hosts: list[str],
    tmp_path: Path,
    thorough: bool,
) -> None:
    run = tmp_path / "run"

    def begin(*flags: str) -> Job:
        port = free_port()
        environments = [torchrun_environment(rank, 2, port) for rank in range(2)]
        for variables in environments:
            variables |= {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "cable"}
        prefixes = [("ip", "netns", "exec", host) for host in hosts]
        command = (binary, "train", "--data", text, "--out", run, *flags)
        return Job(command, environments, prefixes)

    flags = ("--validate-every", "20", "--checkpoint-every", "50", "--steps", "200")
    with begin(*SMALL, *flags, "--timeout", "2") as job:
        wait_for_step(run, 60, job)
        job.signal(1, signal.SIGKILL)
        (code, _, err), _ = job.outcomes()
    assert code == 1
    assert any(f"process 1 of 2 {how}: " in err for how in (LOST, LATE))
    with begin("--resume", "--timeout", "2") as job:
        wait_for_step(run, 110, job)
        cut = ("ip", "-n", hosts[1], "link", "set", "cable", "down")
        subprocess.run(cut, check=True)
        job.processes[0].wait(TIMEOUT)
        if not thorough:
            job.signal(1, signal.SIGKILL)
        (code, _, err), (other_code, _, other_err) = job.outcomes()
    assert code == 1
    assert f"process 1 of 2 {LATE}: it is busy, stopped, dead or cut off" in err
    if thorough:
        assert other_code == 1
        assert f"process 0, which keeps the store, {LATE}" in other_err
    subprocess.run((*cut[:-1], "up"), check=True)
    with begin("--resume") as job:
        job.check()
    assert records(run) == records(unbroken[2])
