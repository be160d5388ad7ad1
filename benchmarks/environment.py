"""What a measurement was made on and with."""

import os
import platform
import re
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# torch's own switch, for peers and ours alike. Without it most of what a long sequence costs is
# fresh memory: the system hands it out in pages of 4 KiB.
LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        re.findall(r"^model name\s*: (.*)$", info.read_text(encoding="utf-8"), re.M)
        if info.exists()
        else []
    )
    return str(names[0]) if names else platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0))


def compiler(build: Path) -> str:
    cache = build / "CMakeCache.txt"
    named = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache.read_text(encoding="utf-8"), re.M)
    if named is None:
        raise RuntimeError(f"{cache} names no compiler")
    return first_line(named[1], "--version")


def first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.splitlines()[0].strip()


def revision() -> str:
    """Of the checkout, with ``-dirty`` where files other than documents and records differ."""
    commit = first_line("git", "rev-parse", "--short=12", "HEAD")
    differing = ["git", "diff", "--name-only", "HEAD", "--", ".", ":!docs", ":!experiments/results"]
    done = subprocess.run(differing, capture_output=True, text=True, cwd=ROOT, check=True)
    return commit + ("-dirty" if done.stdout else "")


def package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def environment(build: Path, arguments: list[str]) -> dict[str, str]:
    return {
        "machine": f"{processor()}, {cores()} cores",
        "compiler": compiler(build),
        "torch": package("torch"),
        "jax": package("jax"),
        "peer": f"gateloop-transformer {package('gateloop-transformer')}",
        "everyone runs with": " ".join(f"{name}={value}" for name, value in LARGE_PAGES.items()),
        "revision": revision(),
        "command": shlex.join(["python", "-m", "benchmarks.run", *arguments]),
    }
