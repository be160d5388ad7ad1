#!/usr/bin/env python3
"""Train a model and sample from it: what 'make train' runs once everything is built.

A run that was cut short goes on where it stopped. A finished one is not trained again: it is only
sampled from. Flags that this script does not know go to 'gateloop train' as they are.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BINARY = ROOT / "build" / "release" / "gateloop"
CORPORA = (ROOT / "data" / "enwik8", ROOT / "data" / "wiki_sample")
PROMPT = "The history of "


def say(message: str) -> None:
    print(f"train: {message}", flush=True)


def shown(path: Path) -> str:
    """A path as one would type it."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def gateloop(*arguments: str) -> int:
    command = [shown(BINARY), *arguments]
    print("$", shlex.join(command), flush=True)
    process = subprocess.Popen([str(BINARY), *arguments])
    # The program saves when it is told to stop, and is given the time for it. Ctrl-C reaches it by
    # itself; a SIGTERM to this script is passed on.
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            continue
        return status if status >= 0 else 128 - status


def is_finished(run: Path) -> bool:
    """Whether the last step of the run has been made: it alone has a final validation."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return "final_validation_bits_per_byte" in json.loads(lines[-1])
    except (OSError, LookupError, ValueError):
        return False


def train(options: argparse.Namespace, run: Path, flags: list[str]) -> int:
    data = Path(options.data) if options.data else None
    arguments = ["train", "--out", shown(run)]
    if (run / "config.json").exists() and "--overwrite" not in flags:
        say(f"{shown(run)} holds an unfinished run: going on with it")
        arguments.append("--resume")
    else:
        arguments += ["--preset", options.preset]
        data = data or next((c for c in CORPORA if c.exists()), None)
        if data is None:
            print("train: there is no text in data/: run 'make corpus' first", file=sys.stderr)
            return 1
    if data:
        arguments += ["--data", shown(data)]
    if options.minutes:
        arguments += ["--minutes", options.minutes]
    return gateloop(*arguments, *flags)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", default="quick", help="quick (default) or enwik8")
    parser.add_argument("--data", help="train on this file (default: what is in data/)")
    parser.add_argument("--minutes", help="how long (default: what the preset says)")
    parser.add_argument("--out", type=Path, help="where the model goes (default: runs/PRESET)")
    options, flags = parser.parse_known_args()
    run: Path = options.out or ROOT / "runs" / options.preset

    if is_finished(run) and not flags:
        say(f"{shown(run)} is trained already; to train anew: make train ARGS=--overwrite")
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
    binary, model = shown(BINARY), shown(run)
    print(
        f"\n\nThe model is in {model}. To go on:"
        f"\n  {binary} generate --checkpoint {model} --prompt 'Your text' --length 2000"
        f"\n  {binary} evaluate --checkpoint {model} --data FILE"
        f"\n  {binary} info --checkpoint {model}"
        f"\n  make train MINUTES=30 OUT=runs/longer      a longer run, better figures"
        f"\n  make train PRESET=enwik8                   the reference's experiment (days on a CPU)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
