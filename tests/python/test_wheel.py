"""The packages as pip builds and installs them, and the README's examples on one of them."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ["transformer.py", "simple_gate_loop_layer.py"]


def install(source: Path, target: Path) -> None:
    """The package alone into a folder; what it depends on comes from this environment."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # The build that is under test is optimised: here it would take three times as long.
    plain = "--config-settings=cmake.define.CMAKE_CXX_FLAGS_RELEASE=-O0"
    result = subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", plain, "--target", target, source],
        # The kernels for CUDA take minutes; the build that is under test has them too.
        env=os.environ | {"GATELOOP_CUDA": "OFF"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of gateloop-cpp, as its build backend makes it."""
    folder = tmp_path_factory.mktemp("sdist")
    backend = "import sys, scikit_build_core.build as b; print(b.build_sdist(sys.argv[1]))"
    made = subprocess.run(
        [sys.executable, "-c", backend, folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert made.returncode == 0, made.stderr
    return folder / made.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def installed(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with gateloop-cpp, built from its source distribution alone."""
    target = tmp_path_factory.mktemp("site")
    install(sdist, target)
    return target


def run(installed: Path, *arguments: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    for library in ("GATELOOP_OPS_LIBRARY", "GATELOOP_JAX_LIBRARY"):  # of the build
        environment.pop(library, None)
    result = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_print_what_they_say(installed: Path, example: str, tmp_path: Path) -> None:
    source = ROOT / "examples" / example
    promised = re.findall(r"print\(.*\)  # (.*)", source.read_text(encoding="utf-8"))
    assert run(installed, str(source), cwd=tmp_path).splitlines() == promised


@pytest.mark.parametrize("example", EXAMPLES)
def test_readme_shows_the_examples(example: str) -> None:
    assert (ROOT / "examples" / example).read_text(encoding="utf-8") in (
        ROOT / "README.md"
    ).read_text(encoding="utf-8")


def test_the_source_distribution_holds_what_is_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    rooms = {"/".join(name.split("/")[:2]) for name in names if "/" in name}
    assert rooms >= {"src/distributed", "src/host", "src/ops", "src/recurrence", "include/gateloop"}
    assert {name for name in names if "/" not in name} == {
        "CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml",
    }  # fmt: skip
    assert not rooms & {"src/nn", "src/training", "tests/cpp"}
    # For CUDA too, which the wheel below leaves out.
    assert names >= {"cmake/cuda.cmake", "cmake/keep_ptxas_report.sh"}
    kernels = ROOT / "src" / "recurrence" / "cuda"
    assert names >= {str(file.relative_to(ROOT)) for file in kernels.iterdir()}


def files_in(folder: Path) -> set[str]:
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path) for path in files if "__pycache__" not in path.parts}


def test_nothing_else_is_installed(installed: Path, tmp_path: Path) -> None:
    package = installed / "gateloop_cpp"
    assert {path.name.split("-")[0] for path in installed.iterdir()} == {"gateloop_cpp"}
    ours = files_in(ROOT / "python" / "gateloop_cpp")
    assert "report/page.html" in ours
    assert files_in(package) == ours | {"libgateloop_ops.so"}
    where = run(installed, "-c", "import gateloop_cpp as g; print(g.__file__)", cwd=tmp_path)
    assert where.strip() == str(package / "__init__.py")


def test_gateloop_jax_runs_as_installed(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    install(ROOT / "python" / "gateloop_jax", tmp_path / "site")
    program = """
import jax.numpy as jnp
from gateloop_jax import _library, linear_recurrence
print(_library.path())
print(linear_recurrence(jnp.full((1, 3, 1), 0.5), jnp.ones((1, 3, 1)))[0].ravel().tolist())
"""
    where, values = run(tmp_path / "site", "-c", program, cwd=tmp_path).splitlines()
    assert where == str(tmp_path / "site" / "gateloop_jax" / "libgateloop_jax.so")
    assert values == "[1.0, 1.5, 1.75]"
