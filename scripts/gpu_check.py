#!/usr/bin/env python3
"""Checks and measures the library on a machine with an NVIDIA GPU; needs no network.

Builds the operators against this Python's torch and runs the tests that need CUDA. Then runs a few
operators under compute-sanitizer, where it is on PATH, and the benchmark. Needs torch with CUDA,
pytest, nvcc, cmake, a C++20 compiler, Highway and nlohmann-json (libhwy-dev, nlohmann-json3-dev).
--pack takes these two along.

    scripts/gpu_check.py                          all of it, in build/gpu
    scripts/gpu_check.py --build DIR              with DIR/lib/libgateloop_ops.so, built before
    scripts/gpu_check.py --only tests,benchmark   of build, tests, sanitizer and benchmark
    scripts/gpu_check.py --pack DIR               a copy of the last commit for such a machine
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path("lib") / "libgateloop_ops.so"
STEPS = ("build", "tests", "sanitizer", "benchmark")
# Where --pack puts what the build needs beside torch and CUDA.
THIRD_PARTY = ROOT / "third_party"
TOOLS = ("memcheck", "racecheck", "initcheck")
# Both passes of each scan, in whole and in partial blocks.
OPERATORS = """
import torch, gateloop_cpp
ops = torch.ops.gateloop
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((2, 300, 64), (1, 1100, 33)):
        q, k, v = (torch.rand(shape, device="cuda").to(dtype).requires_grad_() for _ in range(3))
        z = torch.rand(*shape[:2], 2 * shape[2], device="cuda").to(dtype).requires_grad_()
        gamma = torch.ones(shape[2], device="cuda", dtype=dtype, requires_grad=True)
        results = [ops.linear_recurrence(q, k), ops.polar_gate_loop(q, k, v, z)]
        results += [ops.simple_gate_loop(q, k, v, None, True, True), (ops.rms_norm(q, gamma),)]
        for y, *_ in results:
            torch.autograd.grad(y, [q], torch.ones_like(y))
torch.cuda.synchronize()
"""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=Path, metavar="DIR", help="a build with the operators")
    parser.add_argument(
        "--only", default=",".join(STEPS), metavar="STEPS", help="these steps alone"
    )
    parser.add_argument("--pack", type=Path, metavar="DIR", help="a new folder; needs no GPU")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "build" / "gpu.json",
        metavar="FILE",
        help="the benchmark's results [build/gpu.json]",
    )
    chosen = parser.parse_args()
    chosen.only = chosen.only.split(",")
    if wrong := set(chosen.only) - set(STEPS):
        parser.error(f"--only: steps must be of {', '.join(STEPS)}, got {', '.join(sorted(wrong))}")
    if chosen.build:
        chosen.only = [step for step in chosen.only if step != "build"]
    chosen.build = (chosen.build or ROOT / "build" / "gpu").resolve()
    return chosen


def run(command: Sequence[str | Path], environment: dict[str, str]) -> bool:
    print("+", *command, flush=True)
    return (
        subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False).returncode == 0
    )


def pack(folder: Path) -> bool:
    """Copies the last commit to `folder`, with Highway and nlohmann-json as CMake finds them here.

    Highway's library is this machine's: for its processor, and for a C library of its age or newer.
    """
    if folder.exists():
        print(f"gpu_check: --pack: expected a new folder, {folder} is there", file=sys.stderr)
        return False
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "tree.tar"
        packed = (
            run(["git", "archive", "--output", archive, "HEAD"], {})
            and run(["tar", "-xf", archive, "-C", folder], {})
            and run(
                [
                    *("cmake", "-S", folder / "cmake" / "third_party", "-B"),
                    Path(scratch) / "build",
                    f"-DOUTPUT={folder / THIRD_PARTY.name}",
                ],
                {},
            )
        )
    if not packed:
        shutil.rmtree(folder)
    return packed


def configuration(folder: Path) -> list[str | Path]:
    command: list[str | Path] = ["cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release"]
    command += ["-DGATELOOP_WHEEL=ON", "-DGATELOOP_TESTS=OFF", "-DGATELOOP_CUDA=ON"]
    command += [f"-DPython_EXECUTABLE={sys.executable}"]
    if THIRD_PARTY.is_dir():
        command += [f"-DCMAKE_PREFIX_PATH={THIRD_PARTY}"]
    return command


def build(folder: Path) -> bool:
    for tool in ("cmake", "nvcc"):
        if shutil.which(tool) is None:
            print(f"gpu_check: build needs {tool} on PATH; found none", file=sys.stderr)
            return False
    return run(configuration(folder), {}) and run(
        ["cmake", "--build", folder, "--parallel", "--target", "gateloop_ops"], {}
    )


def test(environment: dict[str, str]) -> bool:
    files = ["tests/python/test_cuda.py", "tests/python/test_devices.py"]
    return run([sys.executable, "-m", "pytest", "-q", "-k", "cuda", *files], environment)


def sanitize(environment: dict[str, str]) -> bool | None:
    """None where the tool is missing."""
    if shutil.which("compute-sanitizer") is None:
        return None
    # Torch's own kernels would take most of the time; initcheck needs what they write.
    ours = ["--kernel-regex", "kns=gateloop"]
    good = []
    for tool in TOOLS:
        chosen = [] if tool == "initcheck" else ours
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *chosen]
        good.append(run([*command, sys.executable, "-c", OPERATORS], environment))
    return all(good)


def main() -> int:
    chosen = options()
    if chosen.pack:
        return 0 if pack(chosen.pack.resolve()) else 1
    try:
        import torch
    except ImportError:
        sys.exit("gpu_check: needs torch in this Python; found none")
    if not torch.cuda.is_available():
        sys.exit(f"gpu_check: needs a CUDA device; torch {torch.__version__} finds none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    if "build" in chosen.only and not build(chosen.build):
        return 1
    library = chosen.build / LIBRARY
    if not library.is_file():
        sys.exit(f"gpu_check: expected the operators at {library}; there is no such file")
    environment = {
        "GATELOOP_BUILD_DIR": str(chosen.build),
        "GATELOOP_OPS_LIBRARY": str(library),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]),
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    benchmark = [sys.executable, "-m", "benchmarks.gpu", "--out", chosen.out]
    steps: dict[str, Callable[[dict[str, str]], bool | None]] = {
        "tests": test,
        "sanitizer": sanitize,
        "benchmark": partial(run, benchmark),
    }
    done = {name: step(environment) for name, step in steps.items() if name in chosen.only}
    words = {True: "passed", False: "FAILED", None: "left out"}
    print(", ".join(f"{name} {words[good]}" for name, good in done.items()))
    return 1 if False in done.values() else 0


if __name__ == "__main__":
    sys.exit(main())
