"""Another revision of our code, built beside this one."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import ROOT, cores, first_line


@dataclass(frozen=True)
class Base:
    revision: str
    tree: Path

    @property
    def build(self) -> Path:
        return self.tree / "build" / "release"


def built(revision: str) -> Base:
    """The operators' library and the kernel benchmark of `revision`, in build/base/."""
    commit = first_line("git", "rev-parse", "--short=12", f"{revision}^{{commit}}")
    tree = ROOT / "build" / "base" / commit
    if not tree.exists():
        run("git", "worktree", "prune")  # after `make clean` git still lists the folder
        run("git", "worktree", "add", "--detach", str(tree), commit)
        (tree / ".venv").symlink_to(ROOT / ".venv")  # libtorch comes from there
    run("cmake", "--preset", "release", cwd=tree)
    targets = ("gateloop_ops", "recurrence_benchmark")
    jobs = ("--parallel", str(cores()))
    run("cmake", "--build", "--preset", "release", *jobs, "--target", *targets, cwd=tree)
    return Base(commit, tree)


def run(*command: str, cwd: Path = ROOT) -> None:
    subprocess.run(command, cwd=cwd, check=True)
