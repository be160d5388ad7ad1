"""Processes that end before they join the others: those end within seconds, and say why."""

import contextlib
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from processes import TIMEOUT, Job, environment, free_port, torchrun, torchrun_environment
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from gateloop_cpp import Transformer, checkpoint

SMALL = (
    *("--dim", "16", "--depth", "1", "--dim-head", "8", "--heads", "2", "--length", "16"),
    *("--batch", "3", "--accumulation", "1", "--threads", "1", "--sample-length", "0"),
    *("--dtype", "float32", "--validation-windows", "9", "--steps", "3"),
)
WRONG = ("--stepz",)
COMPLAINT = "The following argument was not expected: --stepz"

# Exit code, standard output and standard error.
Outcome = tuple[int, str, str]
# Of one launch: the flags of each process, its variables beside the launcher's.
Launch = Callable[..., list[Outcome]]


def run_all(
    commands: Sequence[Sequence[object]], environments: Sequence[dict[str, str]]
) -> list[Outcome]:
    with contextlib.ExitStack() as stack:
        jobs = [
            stack.enter_context(Job(command, [variables]))
            for command, variables in zip(commands, environments, strict=True)
        ]
        return [job.outcomes()[0] for job in jobs]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text"
    chooser = random.Random(0)
    path.write_text("".join(chooser.choice(("the ", "gate\n")) for _ in range(2000)))
    return path


@pytest.fixture(params=["process 0", "launcher"])
def keeper(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    """Variables by which processes find the store, which the launcher keeps or process 0."""
    if request.param == "process 0":
        yield {"MASTER_PORT": free_port()}
        return
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}


@pytest.fixture
def train(build_dir: Path, text: Path, tmp_path: Path, keeper: dict[str, object]) -> Launch:
    def train(*flags: Sequence[object], **variables: Sequence[object]) -> list[Outcome]:
        size = len(flags)
        command = (build_dir / "gateloop", "train", "--out", tmp_path / "run", *SMALL)
        environments = [torchrun_environment(rank, size, 0) for rank in range(size)]
        for rank, own in enumerate(environments):
            own |= {name: str(value) for name, value in keeper.items()}
            own |= {name: str(values[rank]) for name, values in variables.items()}
        data = ("--data", text)
        return run_all(
            [(*command, *(() if "--data" in own else data), *own) for own in flags], environments
        )

    return train


def assert_told(outcomes: list[Outcome], absent: int, complaint: str) -> None:
    """What libtorch logs of its own may come before."""
    size = len(outcomes)
    line = f"gateloop: process {absent} of {size} ended before it joined: {complaint}"
    for rank, (code, _, err) in enumerate(outcomes):
        if rank == absent:
            assert f"gateloop: {complaint}" in err
            assert "ended before it joined" not in err
        else:
            assert (code, err.splitlines()[-1]) == (1, line)


def assert_complain(outcomes: list[Outcome]) -> None:
    """Each alone, for as long as others may come."""
    lines = (
        f"gateloop: {COMPLAINT} (see: gateloop train --help)\n"
        "gateloop: telling the other processes why, for up to 15 s\n"
    )
    assert outcomes == [(2, "", lines)] * len(outcomes)


@pytest.mark.parametrize(("size", "absent"), [(2, 1), (3, 0), (3, 2)])
def test_a_wrong_flag_ends_all(train: Launch, tmp_path: Path, size: int, absent: int) -> None:
    outcomes = train(*(WRONG if rank == absent else () for rank in range(size)))
    assert_told(outcomes, absent, COMPLAINT)
    assert outcomes[absent][0] == 2
    assert not (tmp_path / "run").exists()


def test_missing_data_end_all(train: Launch) -> None:
    outcomes = train((), (), ("--data", "nowhere.txt"))
    assert_told(outcomes, 2, "--data: Path does not exist: nowhere.txt")


def test_a_missing_interface_ends_all(train: Launch) -> None:
    """Between the flags and the join."""
    outcomes = train((), (), (), GLOO_SOCKET_IFNAME=("lo", "lo", "missing0"))
    last = outcomes[2][2].splitlines()[-1]
    assert "missing0" in last
    assert [code for code, _, _ in outcomes] == [1, 1, 1]
    for _, _, err in outcomes[:2]:
        prefix = "gateloop: process 2 of 3 ended before it joined: "
        assert err.splitlines()[-1] == prefix + last.removeprefix("gateloop: ")


def test_a_process_that_comes_later_learns_too(
    build_dir: Path, text: Path, tmp_path: Path, keeper: dict[str, object]
) -> None:
    command = (build_dir / "gateloop", "train", "--data", text, "--out", tmp_path / "run", *SMALL)
    environments = [
        torchrun_environment(rank, 2, 0) | {name: str(value) for name, value in keeper.items()}
        for rank in range(2)
    ]
    with Job([*command, *WRONG], environments[:1]) as first:
        errors = first.processes[0].stderr
        assert errors is not None
        assert errors.readline().startswith(f"gateloop: {COMPLAINT}")
        with Job(command, environments[1:]) as second:
            ((code, _, err),) = second.outcomes()
        assert first.outcomes()[0][0] == 2
    line = f"gateloop: process 0 of 2 ended before it joined: {COMPLAINT}"
    assert (code, err.splitlines()[-1]) == (1, line)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (WRONG, COMPLAINT),
        (("--backend", "nonsense"), "--backend: nonsense not in {auto,gloo,nccl}"),
    ],
)
def test_all_may_fail_alike(train: Launch, flags: tuple[str, ...], complaint: str) -> None:
    for code, _, err in train(flags, flags, flags):
        assert code == 2
        assert err.count(f"gateloop: {complaint}") == 1
        assert "ended before it joined" not in err


def test_another_life_is_not_ended(train: Launch, keeper: dict[str, object]) -> None:
    """Of a launcher that keeps the store across restarts (torchrun --max-restarts)."""
    assert_told(train((), WRONG), 1, COMPLAINT)
    assert_told(train(WRONG, ()), 0, COMPLAINT)
    assert [code for code, _, _ in train((), ())] == [0, 0]


@pytest.mark.long
def test_an_absence_that_none_heard_is_forgotten(
    build_dir: Path, text: Path, tmp_path: Path
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environments = [torchrun_environment(rank, 2, store.port) for rank in range(2)]
    for variables in environments:
        variables["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    command = (build_dir / "gateloop", "train", "--data", text, "--out", tmp_path / "run", *SMALL)
    began = time.monotonic()
    # Of the second nobody keeps the store.
    unheard = [environments[1], torchrun_environment(1, 2, free_port())]
    assert_complain(run_all([(*command, *WRONG)] * 2, unheard))
    assert time.monotonic() - began < 19
    outcomes = run_all([command, command], environments)
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes


def test_torchrun(build_dir: Path, text: Path, tmp_path: Path) -> None:
    """It sends SIGTERM to the others as soon as one has ended, to one that starts late too."""
    command = (build_dir / "gateloop", "train", "--data", text, "--out", tmp_path / "run", *SMALL)
    script = """
        if [ "$RANK" = 1 ]; then exec "$@" --stepz; fi
        if [ "$RANK" = 2 ]; then sleep 3; fi
        exec "$@"
    """
    launch = (*torchrun(3), "sh", "-c", script, "sh", *command)
    began = time.monotonic()
    with Job(launch, [environment(OMP_NUM_THREADS=1)]) as job:
        ((code, _, err),) = job.outcomes()
    assert code == 1
    assert time.monotonic() - began < 15
    assert err.count(f"gateloop: {COMPLAINT}") == 1
    assert err.count(f"gateloop: process 1 of 3 ended before it joined: {COMPLAINT}\n") == 2


class Cable:
    """Between a port of its own and another, until it is cut: then all goes silent, as on a
    machine that has lost its power."""

    def __init__(self, port: int) -> None:
        self.far_end = port
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.server.getsockname()[1]
        self.is_cut = threading.Event()
        self.sockets = [self.server]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.server.accept()
                far = socket.create_connection(("127.0.0.1", self.far_end))
                self.sockets += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self.carry, args=ends, daemon=True).start()

    def carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (message := source.recv(4096)) and not self.is_cut.is_set():
                sink.sendall(message)

    def __enter__(self) -> "Cable":
        return self

    def __exit__(self, *_: object) -> None:
        for end in self.sockets:
            end.close()


@pytest.mark.long
@pytest.mark.parametrize(("rank", "limit"), [(0, 21), (1, 12)])
def test_a_store_that_is_cut_off_while_it_is_asked(
    build_dir: Path, text: Path, tmp_path: Path, rank: int, limit: int
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = (build_dir / "gateloop", "train", "--data", text, "--out", tmp_path / "run", *SMALL)
    with Cable(store.port) as cable:
        variables = torchrun_environment(rank, 2, cable.port)
        variables["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        with Job((*command, "--timeout", "1"), [variables]) as job:
            if rank == 0:
                store.set("gateloop/token/1", "token")
            asks = "gateloop/life/1/token" if rank == 0 else "gateloop/token/1"
            store.wait([asks], timedelta(seconds=TIMEOUT))
            cable.is_cut.set()
            began = time.monotonic()
            ((code, _, err),) = job.outcomes()
    assert time.monotonic() - began < limit + 5
    assert code == 1
    line = f"gateloop: process {rank} of 2 did not reach the others at 127.0.0.1:{cable.port}: "
    assert err.splitlines()[-1].startswith(line + "no answer within")


Evaluate = Callable[..., list[Outcome]]


@pytest.fixture
def evaluate(build_dir: Path, tmp_path: Path) -> Evaluate:
    """In as many processes as texts are given, of a model of 98 tokens."""
    torch.manual_seed(0)
    model = Transformer(16, num_tokens=98, depth=1, dim_head=8, heads=2)
    checkpoint.save(model, tmp_path / "model")

    def evaluate(*texts: object) -> list[Outcome]:
        command = (build_dir / "gateloop", "evaluate", "--checkpoint", tmp_path / "model")
        port, size = free_port(), len(texts)
        several = [torchrun_environment(rank, size, port) for rank in range(size)]
        return run_all(
            [(*command, "--threads", "1", "--data", text) for text in texts],
            several if size > 1 else [environment()],
        )

    return evaluate


def test_missing_data_end_an_evaluation(evaluate: Evaluate, text: Path) -> None:
    outcomes = evaluate(text, "nowhere.txt")
    assert_told(outcomes, 1, "--data: Path does not exist: nowhere.txt")


def test_several_end_with_the_code_of_one(evaluate: Evaluate, text: Path) -> None:
    for outcome in (*evaluate(text), *evaluate(text, text)):
        assert outcome[0] == 1
        assert "must be in [0, 98), got 116" in outcome[2]


@pytest.mark.parametrize("command", [("train", "--data", "nowhere"), ("evaluate", "--stepz")])
def test_an_error_is_one_write(build_dir: Path, command: tuple[str, ...]) -> None:
    """The lines of several processes would mix on one terminal."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.settimeout(TIMEOUT)
        code = subprocess.run(
            [build_dir / "gateloop", *command],
            env=environment(),
            stderr=theirs.fileno(),
            timeout=TIMEOUT,
        ).returncode
        line = ours.recv(100_000).decode()
    assert code == 2
    assert line.startswith("gateloop: ")
    assert line.endswith("--help)\n")
