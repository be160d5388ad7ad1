#!/usr/bin/env python3
"""Run clang-tidy on our C++, file by file, as the dev build compiles it.

A file that passed is checked again only when it, a header of ours, .clang-tidy or its compile
command changed. Files named as arguments are checked without looking at that.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src", "apps", "examples", "benchmarks")
WORK = ROOT / "build" / "tidy"


@dataclass(frozen=True)
class Unit:
    file: Path
    command: list[str]

    @property
    def name(self) -> str:
        return str(self.file.relative_to(ROOT))


def for_clang(command: str) -> list[str]:
    """The compiler's command line without GCC's precompiled header, which clang cannot read."""
    kept: list[str] = []
    words = iter(shlex.split(command))
    for word in words:
        if word == "-include":
            header = next(words)
            if "cmake_pch" not in header:
                kept += [word, header]
        elif word != "-Winvalid-pch":
            kept.append(word)
    return kept


def units(database: Path) -> list[Unit]:
    found = []
    for entry in json.loads(database.read_text(encoding="utf-8")):
        file = Path(entry["file"])
        # clang-tidy cannot read nvcc's command lines; the tests compile the bodies as C++.
        if file.suffix != ".cu" and any(file.is_relative_to(ROOT / folder) for folder in FOLDERS):
            found.append(Unit(file, for_clang(entry["command"])))
    return sorted(found, key=lambda unit: unit.file)


def settings_digest() -> bytes:
    """Of all that any file's result hangs on: the checks and our headers."""
    digest = hashlib.sha256((ROOT / ".clang-tidy").read_bytes())
    for folder in ("include", *FOLDERS):
        for header in sorted((ROOT / folder).rglob("*.h")):
            digest.update(header.read_bytes())
    return digest.digest()


def check(unit: Unit, settings: bytes, always: bool) -> str | None:
    """None when the file passes, else what clang-tidy says."""
    key = hashlib.sha256(settings + unit.file.read_bytes() + repr(unit.command).encode())
    passed = WORK / "passed" / key.hexdigest()
    if passed.exists() and not always:
        return None
    result = subprocess.run(
        ["clang-tidy", "--quiet", f"-p={WORK}", str(unit.file)],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        return result.stdout + result.stderr
    passed.parent.mkdir(parents=True, exist_ok=True)
    passed.touch()
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "dev")
    parser.add_argument("file", type=Path, nargs="*")
    options = parser.parse_args()

    database = options.build / "compile_commands.json"
    if not database.exists():
        print(f"tidy: {database} is missing: run 'cmake --preset dev' first", file=sys.stderr)
        return 2
    chosen = units(database)
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "compile_commands.json").write_text(
        json.dumps(
            [
                {"directory": str(options.build), "file": str(u.file), "arguments": u.command}
                for u in chosen
            ]
        ),
        encoding="utf-8",
    )
    if options.file:
        wanted = {file.resolve() for file in options.file}
        chosen = [unit for unit in chosen if unit.file in wanted]

    settings = settings_digest()
    failures = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        complaints = pool.map(lambda unit: check(unit, settings, bool(options.file)), chosen)
        for unit, complaint in zip(chosen, complaints, strict=True):
            if complaint is not None:
                failures += 1
                print(f"tidy: {unit.name}\n{complaint}", flush=True)
    print(f"tidy: {len(chosen) - failures} of {len(chosen)} files pass")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
