"""scripts/get_corpus.py against a server on this machine: every way a download can go."""

import bz2
import hashlib
import http.server
import io
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "get_corpus.py"
SAMPLE_MEMBER = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)

# Text that hardly compresses, so that the archive has a middle to break off in.
TEXT = hashlib.shake_256(b"enwik8").hexdigest(50_000).encode()
SAMPLE = b"<mediawiki>a small sample</mediawiki>\n" * 100


def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


ARCHIVE = zipped("enwik8", TEXT)


class Server(http.server.ThreadingHTTPServer):
    """Serves `archive`, breaking off after `bytes_per_answer`; with ranges if `supports_ranges`."""

    archive = ARCHIVE
    bytes_per_answer: int | None = None
    supports_ranges = True
    status: int | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges_requested: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/enwik8.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        requested = self.headers.get("Range")
        self.server.ranges_requested.append(requested)
        if self.server.status is not None:
            self.send_error(self.server.status)
            return
        archive, start = self.server.archive, 0
        if requested and self.server.supports_ranges:
            match = re.fullmatch(r"bytes=(\d+)-", requested)
            assert match
            start = int(match.group(1))
            if start >= len(archive):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(archive) - 1}/{len(archive)}")
        else:
            self.send_response(200)
        if self.server.supports_ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(archive) - start))
        self.end_headers()
        end = None if (n := self.server.bytes_per_answer) is None else start + n
        self.wfile.write(archive[start:end])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def package_index(tmp_path: Path) -> Path:
    """A folder that pip takes for its only index; empty until a test puts a wheel there."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    return folder


def put_wheel(folder: Path, compressed: bytes) -> None:
    with zipfile.ZipFile(folder / "gensim-4.4.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(SAMPLE_MEMBER, compressed)
        info = "gensim-4.4.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gensim\nVersion: 4.4.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def run(server: Server, data: Path, package_index: Path) -> Run:
    """Runs the script on small texts that stand in for the real ones."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment |= {
        "no_proxy": "127.0.0.1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(package_index),
    }

    def call(*arguments: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
        options = {
            "data-dir": str(data),
            "timeout": "5",
            "url": url or server.url,
            "size": str(len(TEXT)),
            "sha256": hashlib.sha256(TEXT).hexdigest(),
            "sample-size": str(len(SAMPLE)),
            "sample-sha256": hashlib.sha256(SAMPLE).hexdigest(),
        }
        return subprocess.run(
            [sys.executable, SCRIPT, *(f"--{k}={v}" for k, v in options.items()), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return call


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def closed_url() -> str:
    """An address where no server listens: one that did a moment ago."""
    with Server() as gone:
        return gone.url


def test_good(run: Run, data: Path) -> None:
    result = run()
    assert result.returncode == 0, result.stderr
    assert (data / "enwik8").read_bytes() == TEXT
    assert files(data) == ["enwik8"]
    assert f"enwik8, {len(TEXT):,} bytes" in result.stdout


def test_present_asks_nobody(run: Run, data: Path, server: Server) -> None:
    assert run().returncode == 0
    requested = len(server.ranges_requested)
    result = run()
    assert result.returncode == 0
    assert "in use" in result.stdout
    assert len(server.ranges_requested) == requested


def test_wrong_hash(run: Run, data: Path, server: Server) -> None:
    server.archive = zipped("enwik8", TEXT[:-1] + b"?")
    result = run()
    assert result.returncode == 1
    assert "is not enwik8: its sha256 is" in result.stderr
    assert files(data) == []


@pytest.mark.parametrize(
    ("content", "complaint"), [(TEXT[:-1], "is truncated"), (TEXT + b"?", "holds more than")]
)
def test_wrong_size(run: Run, data: Path, server: Server, content: bytes, complaint: str) -> None:
    server.archive = zipped("enwik8", content)
    result = run()
    assert result.returncode == 1
    assert complaint in result.stderr
    assert files(data) == []


@pytest.mark.parametrize("archive", [b"<html>Please log in</html>", ARCHIVE[:-30], b""])
def test_not_a_whole_archive(run: Run, data: Path, server: Server, archive: bytes) -> None:
    server.archive = archive
    result = run()
    assert result.returncode == 1
    assert "is damaged" in result.stderr
    assert files(data) == []


def test_damaged_inside(run: Run, data: Path, server: Server) -> None:
    middle = len(ARCHIVE) // 2
    server.archive = ARCHIVE[:middle] + b"damage" + ARCHIVE[middle + 6 :]
    result = run()
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert files(data) == []


def test_truncated_by_a_server_without_ranges(run: Run, data: Path, server: Server) -> None:
    server.supports_ranges = False
    server.bytes_per_answer = 10_000
    result = run()
    assert result.returncode == 1
    assert "is truncated: 10,000 bytes came of" in result.stderr
    assert files(data) == []


def test_goes_on_when_the_connection_breaks(run: Run, data: Path, server: Server) -> None:
    server.bytes_per_answer = len(ARCHIVE) // 3 + 1
    result = run()
    assert result.returncode == 0, result.stderr
    assert len(server.ranges_requested) == 3
    assert (data / "enwik8").read_bytes() == TEXT
    assert files(data) == ["enwik8"]


def test_resumes_what_an_earlier_run_left(run: Run, data: Path, server: Server) -> None:
    data.mkdir()
    (data / "enwik8.zip.part").write_bytes(ARCHIVE[:12_345])
    result = run()
    assert result.returncode == 0, result.stderr
    assert server.ranges_requested == ["bytes=12345-"]
    assert files(data) == ["enwik8"]


def test_resumes_a_part_that_is_already_whole(run: Run, data: Path) -> None:
    data.mkdir()
    (data / "enwik8.zip.part").write_bytes(ARCHIVE)
    assert run().returncode == 0
    assert files(data) == ["enwik8"]


def test_starts_over_where_ranges_are_unknown(run: Run, data: Path, server: Server) -> None:
    server.supports_ranges = False
    data.mkdir()
    (data / "enwik8.zip.part").write_bytes(b"something older")
    assert run().returncode == 0
    assert (data / "enwik8").read_bytes() == TEXT


def test_a_part_of_another_file_is_not_kept(run: Run, data: Path) -> None:
    data.mkdir()
    (data / "enwik8.zip.part").write_bytes(b"?" * 100)
    result = run()
    assert result.returncode == 1
    assert files(data) == []
    assert run().returncode == 0


@pytest.mark.parametrize("reason", ["no server", "404"])
def test_falls_back_to_the_sample(
    run: Run, data: Path, server: Server, package_index: Path, reason: str
) -> None:
    put_wheel(package_index, bz2.compress(SAMPLE))
    server.status = 404
    url = closed_url() if reason == "no server" else None
    result = run(url=url)
    assert result.returncode == 0, result.stderr
    assert "enwik8 cannot be reached" in result.stdout
    assert "wiki_sample" in result.stdout
    assert files(data) == ["wiki_sample"]
    assert (data / "wiki_sample").read_bytes() == SAMPLE
    # The next run uses it without a request, and names it.
    requested = len(server.ranges_requested)
    assert "wiki_sample" in run(url=url).stdout
    assert len(server.ranges_requested) == requested


def test_enwik8_or_nothing(run: Run, data: Path, package_index: Path) -> None:
    put_wheel(package_index, bz2.compress(SAMPLE))
    result = run("--enwik8", url=closed_url())
    assert result.returncode == 1
    assert "Connection refused" in result.stderr
    assert files(data) == []


def test_enwik8_replaces_the_sample_when_asked_for(
    run: Run, data: Path, package_index: Path
) -> None:
    put_wheel(package_index, bz2.compress(SAMPLE))
    assert run("--sample").returncode == 0
    assert run("--enwik8").returncode == 0
    result = run()
    assert f"enwik8, {len(TEXT):,} bytes" in result.stdout


@pytest.mark.parametrize(
    "compressed", [bz2.compress(SAMPLE + b"?"), bz2.compress(SAMPLE)[:-9], b"not bzip2"]
)
def test_bad_sample(run: Run, data: Path, package_index: Path, compressed: bytes) -> None:
    put_wheel(package_index, compressed)
    result = run("--sample")
    assert result.returncode == 1
    assert "corpus: error: gensim-4.4.0" in result.stderr
    assert files(data) == []


def test_nothing_can_be_reached(run: Run, data: Path) -> None:
    result = run(url=closed_url())
    assert result.returncode == 1
    assert "pip download gensim" in result.stderr
    assert "--data PATH" in result.stderr
    assert files(data) == []


def test_a_file_that_is_not_enwik8_is_not_touched(run: Run, data: Path) -> None:
    data.mkdir()
    (data / "enwik8").write_bytes(b"mine")
    result = run()
    assert result.returncode == 1
    assert "is not enwik8" in result.stderr
    assert (data / "enwik8").read_bytes() == b"mine"
