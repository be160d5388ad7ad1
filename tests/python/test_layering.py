"""What each room may include (HACKING.md has the map)."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = ROOT / "include" / "gateloop"

# Room -> rooms it may use besides itself. Nothing points back.
ARROWS = {
    "recurrence": set(),
    "model": set(),
    "runtime": {"model", "recurrence"},
    "host": {"recurrence"},
    "corpus": {"model"},
    "ops": {"recurrence", "host", "model", "runtime"},
    "distributed": {"ops"},
    "nn": {"ops", "distributed", "model", "runtime"},
    "checkpoint": {"nn", "model"},
    "training": {"nn", "checkpoint", "distributed", "model", "corpus", "runtime", "ops"},
    "app": {"nn", "checkpoint", "distributed", "training", "model", "runtime", "corpus"},
    "jax": {"recurrence", "host", "model"},
}
# Room -> what it may include from outside, as beginnings of angled includes. The C++ standard
# library is everyone's.
TORCH = ("torch/", "ATen/", "c10/")
SYSTEM = ("fcntl.h", "unistd.h", "sys/", "sched.h")
OUTSIDE: dict[str, tuple[str, ...]] = {
    # xmmintrin.h: the mode of subnormal numbers.
    "recurrence": ("hwy/", "xmmintrin.h", "cuda/", "cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h"),
    "model": (*SYSTEM, "nlohmann/"),
    "runtime": (*SYSTEM, "stddef.h", "stdint.h"),  # the latter: for C
    "host": ("pthread.h", "sys/mman.h"),
    "ops": TORCH,
    "nn": TORCH,
    "checkpoint": (*TORCH, *SYSTEM, "nlohmann/"),
    "distributed": TORCH,
    "corpus": ("zlib.h", "archive.h", "archive_entry.h", "nlohmann/"),
    "training": (*TORCH, *SYSTEM, "nlohmann/"),
    "app": (*TORCH, *SYSTEM, "CLI/"),
    "jax": ("xla/ffi/",),
}
# Public header -> the room it is the door of; those in a folder belong to the room of that name.
DOORS = {
    "recurrence.h": "recurrence",
    "recurrence_cuda.h": "recurrence",
    "model.h": "model",
    "runtime.h": "runtime",
    "gateloop.h": "runtime",
    "ops.h": "ops",
    "distributed_ops.h": "distributed",
    "nn.h": "nn",
    "checkpoint.h": "checkpoint",
    "distributed.h": "distributed",
    "launch.h": "distributed",
    "training.h": "training",
    "evaluation.h": "training",
    "generation.h": "runtime",
    "corpus.h": "corpus",
}

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
# foreach_target.h of Highway includes the file that this macro names.
TARGET_INCLUDE = re.compile(r'^\s*#\s*define\s+HWY_TARGET_INCLUDE\s+"([^"]+)"', re.MULTILINE)


def sources(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


def includes(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8")
    return INCLUDE.findall(text) + TARGET_INCLUDE.findall(text)


def room_of(file: Path) -> str:
    parts = file.relative_to(ROOT).parts
    if parts[0] == "apps":
        return "app"
    if parts[0] == "src":
        return parts[1]
    assert parts[:2] == ("include", "gateloop"), f"{file} lies in no room"
    if len(parts) > 3:
        return parts[2]
    assert parts[2] in DOORS, f"say in DOORS which room {parts[2]} is the door of"
    return DOORS[parts[2]]


def ours(name: str, includer: Path) -> Path | None:
    """The file of ours that an include names."""
    places = [ROOT / "include", ROOT / "src", ROOT / "apps" / "gateloop", includer.parent]
    return next((p / name for p in places if (p / name).is_file()), None)


ALL = [file for folder in ("src", "apps", "include") for file in sources(ROOT / folder)]


@pytest.mark.parametrize("file", ALL, ids=lambda file: str(file.relative_to(ROOT)))
def test_arrows(file: Path) -> None:
    room = room_of(file)
    for name in includes(file):
        target = ours(name, file)
        if target is not None:
            allowed = {room, *ARROWS[room]}
            assert room_of(target) in allowed, f"{room} may not include {name}"
        else:
            standard = re.fullmatch(r"[a-z_0-9]+", name) is not None
            assert standard or name.startswith(OUTSIDE[room]), f"{room} may not include {name}"


@pytest.mark.parametrize("file", sources(PUBLIC), ids=lambda file: str(file.relative_to(ROOT)))
def test_public_headers_include_only_public_headers(file: Path) -> None:
    for name in includes(file):
        target = ours(name, file)
        assert target is None or target.is_relative_to(PUBLIC), f"{name} is not installed"


@pytest.mark.parametrize(
    "file", sources(ROOT / "examples"), ids=lambda file: str(file.relative_to(ROOT))
)
def test_examples_use_public_headers_only(file: Path) -> None:
    for name in includes(file):
        target = ours(name, file)
        assert target is None or target.is_relative_to(PUBLIC), f"{name} is not installed"


def test_the_python_package_knows_torch_only() -> None:
    """And what some files need for what they alone do: JAX, safetensors, trackers."""
    allowed = {"torch", "gateloop_cpp", *sys.stdlib_module_names}
    extra = {
        "jax_scan.py": {"jax"},
        "checkpoint.py": {"safetensors"},
        "_files.py": {"safetensors"},
        # Each where it is included.
        "track.py": {"tensorboard", "wandb", "mlflow"},
        "_runs.py": {"safetensors"},
        "_page.py": {"jinja2", "markupsafe", "plotly"},
        "watch.py": {"plotille", "rich"},
    }
    for file in (ROOT / "python" / "gateloop_cpp").rglob("*.py"):
        for name in re.findall(
            r"^\s*(?:import|from) (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE
        ):
            assert name in allowed | extra.get(file.name, set()), f"{file.name} imports {name}"


def test_rooms_are_known() -> None:
    rooms = {path.name for path in (ROOT / "src").iterdir() if path.is_dir()}
    assert rooms == ARROWS.keys() - {"app"}


@pytest.mark.parametrize(
    "example", ["transformer.cpp", "simple_gate_loop_layer.cpp", "jax_transformer.py"]
)
def test_readme_shows_the_examples_as_compiled(example: str) -> None:
    assert (ROOT / "examples" / example).read_text(encoding="utf-8") in (
        ROOT / "README.md"
    ).read_text(encoding="utf-8")
