"""First steps of a user: set-up messages, make train, the installed package."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import TIMEOUT, environment, records

ROOT = Path(__file__).resolve().parents[2]
Result = subprocess.CompletedProcess[str]


def run(*command: str | Path, **environment: str) -> Result:
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def executable(path: Path, script: str) -> None:
    path.write_text(script, encoding="utf-8")
    path.chmod(0o755)


# ---- scripts/setup -------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder of programs that stands in for a machine on which Highway is missing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "dirname", "sed", "env", "make", "cmake", "ninja"):
        found = shutil.which(tool)
        assert found, tool
        (folder / tool).symlink_to(found)
    executable(folder / "python3", f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    executable(folder / "c++", "#!/usr/bin/env bash\necho libhwy-dev\n")
    executable(folder / "sudo", "#!/usr/bin/env bash\nexit 1\n")
    return folder


def test_setup_names_what_to_install(machine: Path) -> None:
    executable(machine / "apt-get", "#!/usr/bin/env bash\nexit 100\n")
    result = run(ROOT / "scripts" / "setup", PATH=str(machine))
    assert result.returncode == 1
    assert "could not be installed from here: libhwy-dev\n" in result.stderr
    assert "sudo apt-get update && sudo apt-get install libhwy-dev\n" in result.stderr


def test_setup_without_apt_names_the_libraries(machine: Path) -> None:
    result = run(ROOT / "scripts" / "setup", PATH=str(machine))
    assert result.returncode == 1
    assert "Google Highway" in result.stderr
    assert "apt-get" not in result.stderr


def test_setup_done_already_does_nothing() -> None:
    result = run(ROOT / "scripts" / "setup")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_requirements_are_pinned() -> None:
    for name in ("requirements-torch.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            assert not line or line.startswith("#") or re.fullmatch(r"[\w-]+==[\w.]+", line), line


# ---- scripts/train.py ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [("make", "help"), (sys.executable, "scripts/train.py", "--help")]
)
def test_every_preset_is_named(build_dir: Path, command: tuple[str, ...]) -> None:
    def output(*words: str) -> str:
        return subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    presets = re.search(
        r"--preset ([\w|]+)", output(str(build_dir / "gateloop"), "train", "--help")
    )
    assert presets
    line = next(line for line in output(*command).splitlines() if "quick (default)" in line)
    for name in presets[1].split("|"):
        assert name in line


Train = Callable[..., Result]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """scripts/train.py in a tree whose gateloop writes down how it was called."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "train.py", tmp_path / "scripts")
    (tmp_path / "build" / "release").mkdir(parents=True)
    executable(
        tmp_path / "build" / "release" / "gateloop",
        """#!/usr/bin/env bash
        echo "called: $*"
        if [[ $1 == train && $* != *--help* ]]; then
          mkdir -p -- "$3" && cd -- "$3"
          echo '{"training": {"minutes": 5}}' >config.json
          echo '{"step": 1}' >metrics.jsonl
          [[ -z $STOP ]] || exit 130
          echo '{"step": 2, "final_validation_bits_per_byte": 2.5}' >>metrics.jsonl
          touch model.safetensors
        fi
        """,
    )

    def call(*arguments: str, stop: bool = False, stdout: int = subprocess.PIPE) -> Result:
        return subprocess.run(
            # A shell cannot trap what it finds ignored: a job in the background, SIGQUIT.
            ["env", "--default-signal", sys.executable, "scripts/train.py", *arguments],
            cwd=tmp_path,
            env=os.environ | {"STOP": "yes" if stop else ""},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            errors="surrogateescape",
            timeout=60,
        )

    return call


def pasted(command: str, folder: Path) -> Result:
    """Of a make command in a shell. The variables of a make around these tests would print more."""
    outside = {n: value for n, value in environment().items() if not n.startswith("MAKE")}
    return subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=outside,
        capture_output=True,
        text=True,
        errors="replace",  # samples of bytes
        timeout=TIMEOUT,
    )


def called(result: Result) -> list[str]:
    return re.findall(r"^called: (.*)$", result.stdout, re.MULTILINE)


def test_train_trains_and_samples(train: Train) -> None:
    result = train("--data", "text", "--minutes", "3", "--seed", "7")
    assert result.returncode == 0, result.stderr
    first, second = called(result)
    assert first == "train --out runs/quick --preset quick --data text --minutes 3 --seed 7"
    assert second.startswith("generate --checkpoint runs/quick")
    assert "To go on:" in result.stdout


def test_train_goes_on_with_an_unfinished_run(train: Train) -> None:
    stopped = train("--data", "text", stop=True)
    assert stopped.returncode == 130
    assert "run the same command again" in stopped.stdout
    assert called(train())[0] == "train --out runs/quick --resume"


def test_train_only_samples_from_a_finished_run(train: Train) -> None:
    train("--data", "text")
    result = train()
    assert result.returncode == 0
    assert "trained already; to train anew: make train ARGS=--overwrite" in result.stdout
    assert [call.split()[0] for call in called(result)] == ["generate"]


def test_train_anew(train: Train) -> None:
    train("--data", "text")
    first, _ = called(train("--data", "text", "--overwrite"))
    assert first == "train --out runs/quick --preset quick --data text --overwrite"


@pytest.mark.parametrize(
    "name", ["two words", "it's $HOME", "-dash", "n\u00e4me", "\udcff", "100%"]
)
def test_commands_that_train_prints_work_as_they_are(
    train: Train, tmp_path: Path, name: str
) -> None:
    printed = train("--data=text", f"--out={name}").stdout.rpartition("To go on:\n")[2]
    commands = [line for line in printed.splitlines() if "--checkpoint" in line]
    assert len(commands) == 3
    result = subprocess.run(
        ["sh", "-e"],
        input="\n".join(commands),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        errors="surrogateescape",
    )
    assert result.returncode == 0, result.stderr
    model = f"--checkpoint ./{name}" if name == "-dash" else f"--checkpoint {name}"
    assert [model in call for call in called(result)] == [True] * 3, result.stdout


def test_make_train_takes_names_as_they_are(train: Train, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    options = ("--data=my text", "--out=it's a $run")
    (tmp_path / "my").touch()
    (tmp_path / "my text").touch()  # one path
    train(*options)
    command = re.search(r"train anew: (.*)", train(*options).stdout)
    assert command
    result = pasted(f"{command[1]} --assume-old=build", tmp_path)
    assert called(result)[:1] == [
        "train --out it's a $run --preset quick --data my text --overwrite"
    ], result.stderr


@pytest.mark.parametrize(
    ("data", "paths"),
    [
        ("my text", ["my text"]),
        ("books notes.txt", ["books", "notes.txt"]),
        ("books gone", ["books", "gone"]),  # which gateloop names
        ("'my text' books", ["my text", "books"]),
        ("it's gone", ["it's gone"]),
        ("all gone", ["all gone"]),
        ("books " * 900, ["books"] * 900),  # longer than any path
        ("bo*s *.txt", ["books", "notes.txt"]),
        ("*.gone books", ["*.gone", "books"]),
    ],
)
def test_make_train_takes_several_paths(
    train: Train, tmp_path: Path, data: str, paths: list[str]
) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("my text", "books", "notes.txt"):
        (tmp_path / name).touch()
    script = '#!/usr/bin/env bash\nprintf "<%s>" "$@"\necho\n'
    executable(tmp_path / "build" / "release" / "gateloop", script)
    result = pasted(f"make train --assume-old=build DATA={shlex.quote(data)}", tmp_path)
    given = "".join(f"<{path}>" for path in paths)
    assert f"<--preset><quick><--data>{given}\n" in result.stdout, result.stderr


def test_make_train_shares_each_step(train: Train, build_dir: Path, tmp_path: Path) -> None:
    """The build's own program and torchrun, in the tree of the script."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    program = tmp_path / "build" / "release" / "gateloop"
    program.unlink()
    program.symlink_to(build_dir.resolve() / "gateloop")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    torchrun = Path(sys.executable).with_name("torchrun")
    (tmp_path / ".venv" / "bin" / "torchrun").symlink_to(torchrun)
    (tmp_path / "text").write_text("".join(f"gate {i} of the loop\n" for i in range(400)))
    small = (
        "--dim 16 --depth 1 --dim-head 8 --heads 2 --length 16 --batch 4 --accumulation 1"
        " --threads 1 --dtype float32 --sample-length 0 --validation-windows 9 --steps 9"
    )
    runs = [tmp_path / "one", tmp_path / "two"]
    for processes, run in enumerate(runs, 1):
        flags = f"DATA=text OUT={run.name} PROCESSES={processes} ARGS='{small}'"
        result = pasted(f"make train --assume-old=build {flags}", tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("Finished: 9 steps") == 1
        assert "To go on:" in result.stdout.partition("train: a sample:")[2]
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        assert config["training"]["rows_per_pass"] * processes == 4
        assert config["provenance"][0].get("processes", 1) == processes
    alone, together = map(records, runs)
    assert [record["step"] for record in together] == [*range(1, 10)]
    assert "final_validation_bits_per_byte" in together[-1]
    # Sums over 4 rows as 2 + 2 differ in their last bit, 6e-8, through nine updates of AdamW.
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)


@pytest.mark.parametrize("processes", ["0", "-1", "x", "1.5"])
def test_make_train_refuses_other_counts(train: Train, tmp_path: Path, processes: str) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    command = f"make train --assume-old=build DATA=text PROCESSES={processes}"
    result = pasted(command, tmp_path)
    assert result.returncode == 2
    assert f"--processes: must be a whole number, 1 or more, got '{processes}'" in result.stderr
    assert called(result) == []


def test_make_train_refuses_an_empty_path(train: Train) -> None:
    result = train("--data=books '' more")
    assert result.returncode == 1 and "DATA holds an empty path" in result.stderr


@pytest.mark.parametrize(
    ("out", "runs"),
    [("runs/quick", "runs"), ("two words", "two words"), ("it's a $run", "it's a $run")],
)
def test_train_names_the_report_of_its_run(
    train: Train, tmp_path: Path, out: str, runs: str
) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    script = '#!/usr/bin/env bash\nprintf "<%s>" "$@"\n'
    executable(tmp_path / ".venv" / "bin" / "python", script)
    printed = train("--data=text", f"--out={out}").stdout
    command = re.search(r"^  (make report.*?) +its curves", printed, re.MULTILINE)
    assert command
    result = pasted(f"{command[1]} --assume-old=build", tmp_path)
    assert result.stdout == f"<-m><gateloop_cpp.report><{runs}><--out><runs>", result.stderr


def test_train_without_a_reader(train: Train, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = train("--data=text", stdout=writer)
    os.close(writer)
    assert (tmp_path / "runs" / "quick" / "model.safetensors").exists()
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", ["HUP", "QUIT", "TERM", "USR1", "USR2", "XCPU"])
def test_train_relays_the_signals_at_which_gateloop_saves(
    train: Train, tmp_path: Path, number: str
) -> None:
    """The program signals its parent, scripts/train.py, and prints that the signal was relayed."""
    executable(
        tmp_path / "build" / "release" / "gateloop",
        f"""#!/usr/bin/env bash
        trap 'echo saved; exit 99' {number}
        kill -{number} $PPID
        for ((i = 0; i < 1000000; ++i)); do :; done
        """,
    )
    result = train("--data=text")
    assert (result.returncode, result.stdout.count("saved")) == (99, 1), result.stderr


def test_train_without_a_text(train: Train) -> None:
    result = train()
    assert result.returncode == 1
    assert "run 'make corpus' first" in result.stderr


def test_train_help_neither_trains_nor_samples(train: Train) -> None:
    train("--data", "text")  # there is a model to sample from
    result = train("--data", "text", "--no-such-flag", "--help")
    assert (result.returncode, called(result)) == (0, [])
    assert result.stdout.startswith("usage:")


# ---- gateloop watch, track, report, inspect ------------------------------------------------------


@pytest.mark.parametrize("name", ["watch", "track", "report", "inspect"])
def test_gateloop_runs_the_programs_of_the_python_package(
    tmp_path: Path, build_dir: Path, name: str
) -> None:
    program = build_dir / "gateloop"
    missing = run(program, name, "runs", PATH=str(tmp_path))
    assert missing.returncode == 1
    assert f"cannot run gateloop-{name}" in missing.stderr and "gateloop-cpp" in missing.stderr

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, function = project["scripts"][f"gateloop-{name}"].split(":")
    # As pip writes them.
    executable(
        tmp_path / f"gateloop-{name}",
        f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\n"
        f"sys.exit({function}())\n",
    )
    shown = run(program, name, "--help", PATH=str(tmp_path), PYTHONPATH=str(ROOT / "python"))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: ")
    refused = run(program, name, "--no-such", PATH=str(tmp_path), PYTHONPATH=str(ROOT / "python"))
    assert refused.returncode == 2


# ---- make build ----------------------------------------------------------------------------------


def test_make_build_builds_the_program_alone() -> None:
    """Its libraries go with it; tests, examples and benchmarks take several times as long."""
    printed = pasted("make --dry-run build", ROOT)
    assert printed.returncode == 0, printed.stderr
    builds = re.findall(r"^cmake --build (.*?) *(?:--parallel \d+)?$", printed.stdout, re.MULTILINE)
    assert builds == ["--preset release --target gateloop"]


# ---- cmake ---------------------------------------------------------------------------------------


def test_a_build_without_gloo_says_so(tmp_path: Path) -> None:
    """Then with it, by the same folder."""
    options = ["-DGATELOOP_TESTS=OFF", "-DGATELOOP_JAX=OFF", "-DGATELOOP_CUDA=OFF"]
    options += ["-DGATELOOP_UNITY=OFF", "-DGLOO_INCLUDE=OFF"]
    without = run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options)
    assert without.returncode == 0, without.stderr
    said = "GateLoop: one process only, gloo's headers are not there (Debian: libgloo-dev)"
    assert said in without.stdout

    def compiled() -> set[str]:
        commands = json.loads((tmp_path / "compile_commands.json").read_text(encoding="utf-8"))
        files = (Path(command["file"]) for command in commands)
        return {file.name for file in files if file.parent.name == "distributed"}

    assert "no_gloo.cpp" in compiled() and "gloo.cpp" not in compiled()
    there = run("cmake", "-UGLOO_INCLUDE", tmp_path)
    assert there.returncode == 0, there.stderr
    assert said not in there.stdout
    assert "gloo.cpp" in compiled() and "no_gloo.cpp" not in compiled()


# ---- scripts/gpu_check.py --pack -----------------------------------------------------------------


def found_packages(build: Path) -> dict[str, str]:
    """The folders in which CMake found Highway and nlohmann-json."""
    cache = (build / "CMakeCache.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^(hwy_DIR|nlohmann_json_DIR):PATH=(.*)$", cache, re.MULTILINE))


def test_a_packed_copy_builds_without_the_systems_libraries(tmp_path: Path) -> None:
    """Where git's commit and this machine's Highway and nlohmann-json were packed and moved."""
    first, packed, build = (tmp_path / name for name in ("first", "packed", "build"))
    result = run(sys.executable, ROOT / "scripts" / "gpu_check.py", "--pack", first)
    assert result.returncode == 0, result.stdout + result.stderr
    first.rename(packed)
    run("cmake", "-S", ROOT / "cmake" / "third_party", "-B", tmp_path / "b", f"-DOUTPUT={tmp_path}")
    here = found_packages(tmp_path / "b")

    specification = importlib.util.spec_from_file_location(
        "packed_gpu_check", packed / "scripts" / "gpu_check.py"
    )
    assert specification and specification.loader
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    # On Debian /lib is a link to /usr/lib, and CMake looks at both.
    hidden = [path for folder in here.values() for path in (folder, folder.removeprefix("/usr"))]
    more = [f"-DCMAKE_IGNORE_PATH={';'.join(hidden)}", "-DGATELOOP_CUDA=OFF"]
    more += ["-GNinja", "-DGATELOOP_UNITY=OFF"]  # an object file each
    result = run(*script.configuration(tmp_path / "without"), *more, "-DCMAKE_PREFIX_PATH=")
    assert result.returncode != 0 and 'provided by "hwy"' in result.stderr
    result = run(*script.configuration(build), *more)
    assert result.returncode == 0, result.stdout + result.stderr
    there = found_packages(build)
    assert there.keys() == here.keys() == {"hwy_DIR", "nlohmann_json_DIR"}
    assert all(Path(folder).is_relative_to(packed) for folder in there.values())

    files = {
        "hwy/highway.h": "src/recurrence/CMakeFiles/gateloop_recurrence.dir/cpu/target.cpp.o",
        "nlohmann/json.hpp": "src/model/CMakeFiles/gateloop_model.dir/options_json.cpp.o",
    }
    result = run("cmake", "--build", build, "--target", *files.values())
    assert result.returncode == 0, result.stdout + result.stderr
    for header, file in files.items():
        read = run("ninja", "-C", build, "-t", "deps", file).stdout.split()
        assert str(packed / "third_party" / "include" / header) in read
        assert not any(path.endswith(header) and not path.startswith(str(packed)) for path in read)


def test_packing_leaves_a_folder_alone_that_is_there(tmp_path: Path) -> None:
    result = run(sys.executable, ROOT / "scripts" / "gpu_check.py", "--pack", tmp_path)
    assert (result.returncode, list(tmp_path.iterdir())) == (1, [])
    assert f"--pack: expected a new folder, {tmp_path} is there" in result.stderr


# ---- cmake --install -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(build_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree that cmake --install makes, moved to another place afterwards."""
    folder = tmp_path_factory.mktemp("install")
    result = run("cmake", "--install", build_dir, "--prefix", folder / "first")
    assert result.returncode == 0, result.stderr
    return (folder / "first").rename(folder / "moved")


def test_the_installed_program_finds_its_libraries(installed: Path) -> None:
    result = run(installed / "bin" / "gateloop", "--help")
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout


def test_every_public_header_is_installed(installed: Path) -> None:
    def headers(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob("*.h")}

    assert headers(installed / "include") == headers(ROOT / "include")


def test_the_package_names_no_path_but_libtorch(installed: Path) -> None:
    for file in (installed / "lib" / "cmake" / "gateloop").iterdir():
        for line in file.read_text(encoding="utf-8").splitlines():
            assert str(ROOT) not in line or "Torch_DIR" in line, f"{file.name}: {line}"
