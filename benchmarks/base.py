"""Another revision of our code, built beside this one."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import ROOT, cores, first_line

TARGETS = ("gateloop_ops", "gateloop_runtime", "gateloop", "recurrence_benchmark")


@dataclass(frozen=True)
class Base:
    revision: str
    tree: Path

    @property
    def build(self) -> Path:
        return self.tree / "build" / "release"


def built(revision: str) -> Base:
    """What is measured of `revision`, as far as it has it, in build/base/."""
    commit = first_line("git", "rev-parse", "--short=12", f"{revision}^{{commit}}")
    tree = ROOT / "build" / "base" / commit
    if not tree.exists():
        run("git", "worktree", "prune")  # after `make clean` git still lists the folder
        run("git", "worktree", "add", "--detach", str(tree), commit)
        (tree / ".venv").symlink_to(ROOT / ".venv")  # libtorch comes from there
    run("cmake", "--preset", "release", cwd=tree)
    base = Base(commit, tree)
    build = ("cmake", "--build", "--preset", "release", "--parallel", str(cores()), "--target")
    run(*build, *targets(base.build), cwd=tree)
    return base


def targets(build: Path) -> list[str]:
    """Those of TARGETS that a configured build has."""
    # CMake's own list, --target help, leaves out programs at the top of the build.
    command = ["ninja", "-C", str(build), "-t", "targets", "all"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    known = set(re.findall(r"^([\w-]+):", listed, re.M))
    return [target for target in TARGETS if target in known]


def run(*command: str, cwd: Path = ROOT) -> None:
    subprocess.run(command, cwd=cwd, check=True)
