#!/usr/bin/env python3
"""Train a model and sample from it: what 'make train' runs once everything is built.

A run that was cut short goes on where it stopped. A finished one is not trained again: it is only
sampled from. Flags that are not of this script go to 'gateloop train' as they are.
"""

import argparse
import contextlib
import glob
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BINARY = ROOT / "build" / "release" / "gateloop"
TORCHRUN = ROOT / ".venv" / "bin" / "torchrun"
CORPORA = (ROOT / "data" / "enwik8", ROOT / "data" / "wiki_sample")
PROMPT = "The history of "
# At these 'gateloop train' saves and ends. Ctrl-C reaches it without this script.
RELAYED = (
    *(signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)


def put(text: str) -> None:
    """Print; where standard output has no reader any more, print nothing from then on."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(message: str) -> None:
    put(f"train: {message}")


def shown(path: Path) -> str:
    """A path as one would type it, and never as a flag."""
    path = path.resolve()
    text = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return f"./{text}" if text.startswith("-") else text


def exists(path: str) -> bool:
    try:
        return path != "" and Path(path).exists()
    except OSError:  # several paths, too long for the name of one
        return False


def expanded(word: str) -> list[Path]:
    """What a shell makes of ~ and wildcards; the word itself where nothing has such a name."""
    if word == "":
        sys.exit("train: DATA holds an empty path: expected names of files and folders, got ''")
    if exists(word):
        return [Path(word)]
    # As a shell, and unlike pathlib: no hidden files, and an unknown ~user is kept.
    names = glob.glob(os.path.expanduser(word))  # noqa: PTH111, PTH207
    return sorted(map(Path, names)) or [Path(word)]


def paths_of(data: str) -> list[Path]:
    """One path, or several as words for the shell where not the whole but one of them is there."""
    if not exists(data):
        with contextlib.suppress(ValueError):  # a quote that is part of a name
            paths = [path for word in shlex.split(data) for path in expanded(word)]
            if any(exists(str(path)) for path in paths):
                return paths
    return [Path(data)]


def count(text: str) -> int:
    """Of processes."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text!r}")


def launcher(processes: int) -> list[str]:
    """The words before a command that run it in so many processes: torchrun's."""
    if processes == 1:
        return []
    # Without it each process has one thread.
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # At others torchrun ends without its processes.
    names = [signal.Signals(number).name for number in (signal.SIGINT, *RELAYED)]
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", ",".join(names))
    torchrun = [shown(TORCHRUN), "--standalone", "--nproc-per-node", str(processes)]
    return [*torchrun, "--no-python"]


def gateloop(*arguments: str, processes: int = 1) -> int:
    command = [*launcher(processes), shown(BINARY), *arguments]
    put("$ " + shlex.join(command))
    came: list[int] = []
    relayed: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def relay(*signals: int) -> None:
        came.extend(signals)
        while started and came:
            relayed.append(came.pop(0))
            started[0].send_signal(relayed[-1])

    for number in RELAYED:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as with nohup
            signal.signal(number, lambda number, _: relay(number))
    started.append(subprocess.Popen(command))
    relay()  # what came before the program was there
    while True:
        try:
            status = started[0].wait()
        except KeyboardInterrupt:
            relayed.append(signal.SIGINT)
            continue
        if relayed and processes > 1:  # torchrun ends with 1
            return 128 + relayed[0]
        return status if status >= 0 else 128 - status


def is_finished(run: Path) -> bool:
    """Whether the last step of the run has been made: it alone has a final validation."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return "final_validation_bits_per_byte" in json.loads(lines[-1])
    except (OSError, LookupError, ValueError):
        return False


def train(options: argparse.Namespace, run: Path, flags: list[str]) -> int:
    data = paths_of(options.data) if options.data else []
    arguments = ["train", "--out", shown(run)]
    if (run / "config.json").exists() and "--overwrite" not in flags:
        kind = "a finished" if is_finished(run) else "an unfinished"
        say(f"{shown(run)} holds {kind} run: going on with it")
        arguments.append("--resume")
    else:
        arguments += ["--preset", options.preset]
        data = data or [c for c in CORPORA if c.exists()][:1]
        if not data:
            print("train: there is no text in data/: run 'make corpus' first", file=sys.stderr)
            return 1
    if data:
        arguments += ["--data", *map(shown, data)]
    if options.minutes:
        arguments += ["--minutes", options.minutes]
    return gateloop(*arguments, *flags, processes=options.processes)


def make_command(options: argparse.Namespace, flags: str) -> str:
    """The 'make train' that trains what these options name."""
    values = {"OUT": options.out, "DATA": options.data, "MINUTES": options.minutes}
    if options.processes > 1:
        values["PROCESSES"] = str(options.processes)
    if options.preset != "quick":
        values["PRESET"] = options.preset
    words = [f"{name}={value}" for name, value in values.items() if value]
    return shlex.join(["make", "train", *(word.replace("$", "$$") for word in words), flags])


def report_command(run: Path) -> str:
    """The 'make report' whose page has the run."""
    if run.resolve().parent == ROOT / "runs":
        return "make report"
    words = shlex.quote(shown(run)).replace("$", "$$")
    return shlex.join(["make", "report", f"RUNS={words}"])


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names are any bytes
            stream.reconfigure(errors="surrogateescape")
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", default="quick", help="quick (default), hybrid or enwik8")
    parser.add_argument(
        "--data", help="train on these files and folders, words for a shell (default: data/)"
    )
    parser.add_argument("--minutes", help="how long (default: what the preset says)")
    parser.add_argument("--out", type=Path, help="where the model goes (default: runs/PRESET)")
    parser.add_argument("--processes", type=count, default=1, help="share each step among so many")
    options, flags = parser.parse_known_args()
    run: Path = options.out or ROOT / "runs" / options.preset

    if is_finished(run) and not flags:
        anew = make_command(options, "ARGS=--overwrite")
        say(f"{shown(run)} is trained already; to train anew: {anew}")
    elif status := train(options, run, flags):
        if status > 128:  # Ended by a signal.
            say("to go on from the last checkpoint, run the same command again")
        return status

    say("a sample:")
    if status := gateloop(
        *("generate", "--checkpoint", shown(run), "--prompt", PROMPT),
        *("--echo-prompt", "--length", "500"),
    ):
        return status
    binary, model = shlex.quote(shown(BINARY)), shlex.quote(shown(run))
    put(
        f"\n\nThe model is in {model}. To go on:"
        f"\n  {binary} generate --checkpoint {model} --prompt 'Your text' --length 2000"
        f"\n  {binary} evaluate --checkpoint {model} --data PATH"
        f"\n  {binary} info --checkpoint {model}"
        f"\n  {report_command(run):42} its curves, figures and samples on one page"
        f"\n  make train MINUTES=30 OUT=runs/longer      a longer run, better figures"
        f"\n  make train PRESET=enwik8                   the reference's experiment (days on a CPU)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
