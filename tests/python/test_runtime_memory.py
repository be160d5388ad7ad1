"""What a session takes of memory: its states and scratch; processes share the weights' file."""

import re
import subprocess
from pathlib import Path

import torch

from gateloop_cpp import Transformer, checkpoint

MIB = 2**20


def smaps(process: int) -> dict[str, dict[str, int]]:
    """Bytes of every field of /proc/PID/smaps by what is mapped, summed; "": of no file."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in Path(f"/proc/{process}/smaps").read_text(encoding="utf-8").splitlines():
        if header := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+\s*(.*)$", line):
            name = header[1]
        elif field := re.match(r"(\w+):\s+(\d+) kB$", line):
            fields = found.setdefault(name, {})
            fields[field[1]] = fields.get(field[1], 0) + int(field[2]) * 1024
    return found


def test_two_processes_share_the_weights(build_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint.save(Transformer(512, num_tokens=256, depth=4), tmp_path)
    file = str(tmp_path / "model.safetensors")
    size = Path(file).stat().st_size
    assert size > 50 * MIB
    command = [str(build_dir / "gateloop"), "generate", "--checkpoint", str(tmp_path)]
    command += ["--length", "100000000"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None and len(process.stdout.read(20)) == 20
        for process in processes:
            maps = smaps(process.pid)
            weights = maps.pop(file)
            assert weights["Shared_Clean"] >= 0.99 * size
            assert weights["Private_Clean"] + weights["Private_Dirty"] <= 0.01 * size
            private = sum(m.get("Private_Dirty", 0) for m in maps.values())
            # States are 16 KiB here; libraries and scratch take the most.
            assert private < 12 * MIB, private
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_the_program_needs_no_torch(build_dir: Path) -> None:
    """The loader of libtorch alone takes most of a second; without it all starts in 30 ms."""
    program = build_dir / "gateloop"
    libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert not re.search("libtorch|libc10|libgomp", libraries), libraries
