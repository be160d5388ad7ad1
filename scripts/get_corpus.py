#!/usr/bin/env python3
"""Get the training text into data/.

enwik8 (the first 100,000,000 bytes of an English Wikipedia dump) comes from its public home. Where
that cannot be reached, a sample of 6 million bytes is taken. It is in the test data of the gensim
package, and comes by a Python package index. Either way the text is checked against a known SHA-256
before it gets its name. So a file called data/enwik8 or data/wiki_sample is always whole.

Needs nothing but Python's standard library.
"""

import argparse
import bz2
import hashlib
import http.client
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 1 << 20


@dataclass(frozen=True)
class Text:
    """A file that is known byte for byte."""

    name: str
    what: str
    size: int
    sha256: str


ENWIK8 = Text(
    "enwik8",
    "English Wikipedia, March 2006",
    100_000_000,
    "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
)
ENWIK8_URLS = ["https://mattmahoney.net/dc/enwik8.zip", "http://mattmahoney.net/dc/enwik8.zip"]

SAMPLE = Text(
    "wiki_sample",
    "206 pages of English Wikipedia",
    6_089_746,
    "34c1c63050c87cc8477b9ae36b1cb0edf372612c92938b742e579a7109c20fa4",
)
SAMPLE_MEMBER = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
# The wheel is opened, never installed, so one for any machine will do. It is requested for this
# platform, whatever machine and Python run the script.
SAMPLE_REQUEST = [
    "gensim==4.4.0",
    *("--no-deps", "--only-binary=:all:", "--python-version=3.11"),
    *("--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_24_x86_64"),
]


class CorpusError(Exception):
    """Something is wrong that another source would not mend."""


class UnreachableError(Exception):
    """This source cannot be had from here; another may."""


def say(message: str) -> None:
    print(f"corpus: {message}", flush=True)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def write_checked(chunks: Iterator[bytes], text: Text, path: Path, source: str) -> None:
    """Write chunks to path by way of a temporary file if they are exactly the text."""
    temporary = path.with_name(path.name + ".tmp")
    digest, size = hashlib.sha256(), 0
    try:
        with temporary.open("wb") as out:
            for chunk in chunks:
                size += len(chunk)
                if size > text.size:
                    raise CorpusError(
                        f"{source} holds more than the {text.size:,} bytes of {text.name}; removed"
                    )
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        if size != text.size:
            raise CorpusError(
                f"{source} is truncated: {size:,} bytes instead of {text.size:,}; removed"
            )
        if digest.hexdigest() != text.sha256:
            raise CorpusError(
                f"{source} is not {text.name}: its sha256 is {digest.hexdigest()}"
                f" instead of {text.sha256}; removed"
            )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


def is_whole(path: Path, text: Text) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if path.stat().st_size != text.size or digest != text.sha256:
        raise CorpusError(
            f"{path} is not {text.name} ({text.size:,} bytes, sha256 {text.sha256[:8]}…):"
            f" remove it to get it again, or train on it with --data {path}"
        )
    return True


def fetch_rest(url: str, part: Path, timeout: float) -> bool:
    """Append what is missing of url to part; true when that completed it.

    False: the connection broke, and the rest can be requested. UnreachableError: nothing came.
    """
    have = size_of(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if have and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return True  # Nothing lies beyond what we have.
        raise UnreachableError(f"{url} answered {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(f"{url}: {getattr(error, 'reason', None) or error}") from None

    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        length = response.headers.get("Content-Length")
        total = int(length) + (have if resumed else 0) if length else None
        can_resume = resumed or response.headers.get("Accept-Ranges") == "bytes"
        try:
            with part.open("ab" if resumed else "wb") as out:
                while chunk := response.read(CHUNK):
                    out.write(chunk)
                    show_progress(out.tell(), total)
        except (OSError, http.client.HTTPException):
            pass  # Broken off: found by the size below.
    if total is not None and size_of(part) >= total:
        return True
    if total is None and zipfile.is_zipfile(part):
        return True
    if not can_resume:
        got = size_of(part)
        part.unlink(missing_ok=True)
        raise CorpusError(
            f"{url} is truncated: {got:,} bytes came of {total or 'unknown'}; removed"
        )
    return False


def show_progress(done: int, total: int | None) -> None:
    if sys.stderr.isatty():
        percent = f" ({100 * done // total}%)" if total else ""
        print(f"\r  {done / 1e6:.1f} MB{percent}\033[K", end="", file=sys.stderr, flush=True)
        if done == total:
            print(file=sys.stderr)


def download(url: str, part: Path, timeout: float) -> None:
    """Bring url to part, going on after breaks as long as each try brings something."""
    while True:
        before = size_of(part)
        if before:
            say(f"going on with {url} at byte {before:,}")
        if fetch_rest(url, part, timeout):
            return
        if size_of(part) <= before:
            raise CorpusError(
                f"{url} broke off at byte {size_of(part):,}; run this again to go on from there"
            )


def get_enwik8(text: Text, urls: list[str], path: Path, timeout: float) -> None:
    archive = path.with_name("enwik8.zip")
    part = path.with_name("enwik8.zip.part")
    reasons = []
    for url in urls:
        try:
            if not size_of(part):
                say(f"asking for {url}")
            download(url, part, timeout)
            break
        except UnreachableError as error:
            reasons.append(str(error))
    else:
        raise UnreachableError(reasons[-1])
    try:
        part.replace(archive)
        with zipfile.ZipFile(archive) as opened, opened.open("enwik8") as member:
            write_checked(read_chunks(member), text, path, url)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise CorpusError(f"{url} is damaged ({error}); removed") from None
    finally:
        archive.unlink(missing_ok=True)


def get_sample(text: Text, path: Path) -> None:
    venv_python = ROOT / ".venv" / "bin" / "python"
    python = venv_python if venv_python.exists() else Path(sys.executable)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".sample-") as folder:
        command = [str(python), "-m", "pip", "download", "-q", "-d", folder, *SAMPLE_REQUEST]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or ["no message"]
            raise UnreachableError(f"pip download gensim: {lines[-1]}") from None
        except subprocess.TimeoutExpired:
            raise UnreachableError("pip download gensim: no answer in 15 minutes") from None
        wheel = next(Path(folder).glob("gensim-*.whl"))
        try:
            with (
                zipfile.ZipFile(wheel) as opened,
                opened.open(SAMPLE_MEMBER) as member,
                bz2.open(member) as plain,
            ):
                write_checked(read_chunks(plain), text, path, wheel.name)
        except (zipfile.BadZipFile, KeyError, EOFError, OSError) as error:
            raise CorpusError(f"{wheel.name} is damaged ({error}); removed") from None


def get(options: argparse.Namespace) -> None:
    folder: Path = options.data_dir
    folder.mkdir(parents=True, exist_ok=True)
    enwik8 = Text(ENWIK8.name, ENWIK8.what, options.size, options.sha256)
    sample = Text(SAMPLE.name, SAMPLE.what, options.sample_size, options.sample_sha256)
    enwik8_path, sample_path = folder / enwik8.name, folder / sample.name

    if is_whole(enwik8_path, enwik8):
        announce(enwik8_path, enwik8)
        return
    wants_enwik8 = options.enwik8 or not sample_path.exists()
    if wants_enwik8 and not options.sample:
        try:
            get_enwik8(enwik8, options.url or ENWIK8_URLS, enwik8_path, options.timeout)
            announce(enwik8_path, enwik8)
            return
        except UnreachableError as error:
            if options.enwik8:
                raise
            say(f"enwik8 cannot be reached ({error})")
    if not is_whole(sample_path, sample):
        say("asking the package index for the sample in gensim's test data")
        get_sample(sample, sample_path)
    announce(sample_path, sample)
    say("figures on it do not compare with those on enwik8 (scripts/get_corpus.py --enwik8)")


def announce(path: Path, text: Text) -> None:
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    say(f"in use: {shown}, {text.size:,} bytes ({text.what}), checked")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--enwik8", action="store_true", help="enwik8 or nothing")
    which.add_argument(
        "--sample", action="store_true", help="the sample, without asking for enwik8"
    )
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where the text goes")
    parser.add_argument("--timeout", type=float, default=10, help="seconds without an answer (10)")
    source = parser.add_argument_group("another source (a mirror, or the tests of this script)")
    source.add_argument("--url", action="append", help="address of enwik8.zip")
    source.add_argument("--size", type=int, default=ENWIK8.size, help="bytes unpacked")
    source.add_argument("--sha256", default=ENWIK8.sha256, help="SHA-256 unpacked")
    source.add_argument("--sample-size", type=int, default=SAMPLE.size)
    source.add_argument("--sample-sha256", default=SAMPLE.sha256)
    try:
        get(parser.parse_args())
    except (CorpusError, UnreachableError, OSError) as error:
        print(f"corpus: error: {error}", file=sys.stderr)
        print("corpus: any other file will do too: gateloop train --data PATH", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncorpus: stopped; run this again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
