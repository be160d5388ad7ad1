"""The packages as pip builds and installs them, and the README's examples.

Building gateloop-cpp takes minutes, most of it for libtorch's headers: `make test` configures what
its source distribution holds, and `make test-long` builds it.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
JAX = ROOT / "python" / "gateloop_jax"
EXAMPLES = ["transformer.py", "simple_gate_loop_layer.py"]


def source_distribution(project: Path, folder: Path, **settings: str) -> Path:
    """The archive that the build backend of a project makes; `settings` are the backend's."""
    backend = (
        "import sys, json, scikit_build_core.build as b;"
        "print(b.build_sdist(sys.argv[1], json.loads(sys.argv[2])))"
    )
    made = subprocess.run(
        [sys.executable, "-c", backend, folder, json.dumps(settings)],
        cwd=project,
        env=os.environ | {"GATELOOP_CUDA": "OFF"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr
    return folder / made.stdout.splitlines()[-1]


# Kernels for the oldest processor alone, which take half a minute to compile and not two.
JAX_FLAGS = "-O0 -DHWY_COMPILE_ONLY_STATIC"


def pip_install(sdist: Path, *options: str | Path, python: str | Path, flags: str) -> None:
    """Builds and installs; optimised as the build that is under test, it would take three times
    as long."""
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    plain = f"--config-settings=cmake.define.CMAKE_CXX_FLAGS_RELEASE={flags}"
    result = subprocess.run(
        [*pip, plain, *options, sdist],
        # The kernels for CUDA take minutes; the build that is under test has them too.
        env=os.environ | {"GATELOOP_CUDA": "OFF"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr


def install(sdist: Path, target: Path, flags: str = "-O0") -> Path:
    """The package alone into a folder; what it depends on comes from this environment."""
    options = ("--no-deps", "--no-build-isolation", "--target", target)
    pip_install(sdist, *options, python=sys.executable, flags=flags)
    return target


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of gateloop-cpp."""
    return source_distribution(ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def installed(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with gateloop-cpp, built from its source distribution alone."""
    return install(sdist, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def jax_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of gateloop-jax."""
    pytest.importorskip("jax")
    # Configures the checkout too, as `pip install python/gateloop_jax` does.
    settings = {"sdist.cmake": "true"}
    return source_distribution(JAX, tmp_path_factory.mktemp("jax_sdist"), **settings)


@pytest.fixture(scope="session")
def jax_installed(jax_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with gateloop-jax, built from its source distribution alone."""
    return install(jax_sdist, tmp_path_factory.mktemp("jax_site"), JAX_FLAGS)


def output(*command: str | Path, **options: Any) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def run(installed: Path, *arguments: str | Path, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    for library in ("GATELOOP_OPS_LIBRARY", "GATELOOP_JAX_LIBRARY"):  # of the build
        environment.pop(library, None)
    return output(sys.executable, *arguments, env=environment, cwd=cwd)


def promised(example: Path) -> list[str]:
    return re.findall(r"print\(.*\)  # (.*)", example.read_text(encoding="utf-8"))


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_print_what_they_say(example: str, tmp_path: Path) -> None:
    source = ROOT / "examples" / example
    checkout = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    printed = output(sys.executable, source, env=checkout, cwd=tmp_path)
    assert printed.splitlines() == promised(source)


@pytest.mark.long
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run_as_installed(installed: Path, example: str, tmp_path: Path) -> None:
    source = ROOT / "examples" / example
    assert run(installed, source, cwd=tmp_path).splitlines() == promised(source)


@pytest.mark.parametrize("example", EXAMPLES)
def test_readme_shows_the_examples(example: str) -> None:
    assert (ROOT / "examples" / example).read_text(encoding="utf-8") in (
        ROOT / "README.md"
    ).read_text(encoding="utf-8")


def files_in(folder: Path) -> set[str]:
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path) for path in files if "__pycache__" not in path.parts}


def files_of(sdist: Path) -> dict[str, bytes]:
    """Contents by name in the archive, without its one folder."""
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
        # A link to the rest of the repository leads nowhere on a user's disk.
        assert [member.name for member in members if not member.isfile()] == []
        return {
            member.name.partition("/")[2]: content.read()
            for member in members
            if (content := archive.extractfile(member))
        }


@pytest.mark.parametrize(
    ("made", "project", "package", "rooms"),
    [
        (
            "sdist", ROOT, "python/gateloop_cpp",
            ["distributed", "host", "model", "ops", "recurrence", "runtime"],
        ),
        ("jax_sdist", JAX, "gateloop_jax", ["host", "jax", "model", "recurrence"]),
    ],
)  # fmt: skip
def test_a_source_distribution_holds_what_is_built(
    request: pytest.FixtureRequest, made: str, project: Path, package: str, rooms: list[str]
) -> None:
    files = files_of(request.getfixturevalue(made))
    at_top = {"CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    folders = ["cmake", "include/gateloop", *(f"src/{room}" for room in rooms)]
    # Kernels for CUDA too, which the builds below leave out.
    sources = {f"{name}/{file}" for name in folders for file in files_in(ROOT / name)}
    modules = {f"{package}/{file}" for file in files_in(project / package)}
    assert set(files) == at_top | sources | modules
    for module in modules:
        assert files[module] == (project / module).read_bytes(), module


def test_a_source_distribution_configures(sdist: Path, tmp_path: Path) -> None:
    """CMake names every file that it misses."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "GATELOOP_CUDA": "OFF",
        "GATELOOP_TESTS": "OFF",
        "GATELOOP_WHEEL": "ON",
        "Python_EXECUTABLE": sys.executable,
    }
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    output("cmake", "-G", "Ninja", "-B", "build", *defined, cwd=source)


@pytest.mark.parametrize(
    ("where", "package", "library"),
    [
        pytest.param(
            "installed", ROOT / "python" / "gateloop_cpp", "libgateloop_ops.so",
            marks=pytest.mark.long,
        ),
        ("jax_installed", JAX / "gateloop_jax", "libgateloop_jax.so"),
    ],
)  # fmt: skip
def test_nothing_else_is_installed(
    request: pytest.FixtureRequest, where: str, package: Path, library: str, tmp_path: Path
) -> None:
    site: Path = request.getfixturevalue(where)
    name = package.name
    assert {path.name.split("-")[0] for path in site.iterdir()} == {name}
    assert files_in(site / name) == files_in(package) | {library}
    (information,) = site.glob("*.dist-info")
    assert "licenses/LICENSE" in files_in(information)
    found = run(site, "-c", f"import {name}; print({name}.__file__)", cwd=tmp_path)
    assert found.strip() == str(site / name / "__init__.py")


JAX_PROGRAM = """
import jax, jax.numpy as jnp
from gateloop_jax import GateLoopTransformer, _library, linear_recurrence
from gateloop_jax import load_checkpoint, save_checkpoint
print(_library.path())
print(linear_recurrence(jnp.full((1, 3, 1), 0.5), jnp.ones((1, 3, 1)))[0].ravel().tolist())
model = GateLoopTransformer(7, 8, 1, jax.random.key(0), architecture="pytorch")
save_checkpoint("model", model)
ids = jnp.arange(7)[None]
print(bool((load_checkpoint("model")(ids) == model(ids)).all()))
"""


def test_gateloop_jax_runs_as_installed(jax_installed: Path, tmp_path: Path) -> None:
    where, values, same = run(jax_installed, "-c", JAX_PROGRAM, cwd=tmp_path).splitlines()
    assert where == str(jax_installed / "gateloop_jax" / "libgateloop_jax.so")
    assert (values, same) == ("[1.0, 1.5, 1.75]", "True")


@pytest.mark.long
def test_a_fresh_environment_builds_and_runs_both(
    sdist: Path, jax_sdist: Path, tmp_path: Path
) -> None:
    """As a user does: pip fetches what building and running need, and nothing else is there."""
    environment = tmp_path / "environment"
    output(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GATELOOP_")}
    plain.pop("PYTHONPATH", None)
    pip_install(sdist, python=python, flags="-O0")
    example = ROOT / "examples" / "transformer.py"
    printed = output(python, example, env=plain, cwd=tmp_path)
    assert printed.splitlines() == promised(example)
    pip_install(jax_sdist, python=python, flags=JAX_FLAGS)
    where, *_, same = output(python, "-c", JAX_PROGRAM, env=plain, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(environment)
    assert same == "True"
