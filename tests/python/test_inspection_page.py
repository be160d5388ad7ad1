"""The page of gateloop_cpp.inspection: what is in the file, and what Chromium makes of it."""

import base64
import json
import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import PROGRAM, Page, opened_page
from inspected import MODELS, TEXT, Array, definitions, small_model

from gateloop_cpp.inspection import Measurements, measure, render
from gateloop_cpp.inspection.influence import WINDOW

HOSTILE = (
    b"</script><script>alert(1)</script><!-- <script> --> ]]> {{meta}} {{script}} &lt;b&gt;"
    b"\"'`\\\n"
    + bytes(range(256))
    + "ü € 漢 🙂 e\u0301 \u202eright\u202c עב \u2028 \U0010ffff\n".encode()
    + b"\xff\xc3 \xe2\x82 \xed\xa0\x80 \xc0\x80 \xf0\x9f\x99"
)
TITLE = "</title><script>alert(1)</script>"

# Codes of rates and inputs are right to 3 and 5 per cent, and errors of rates add up.
CHANNEL_SHARE = 0.03


class Elements(HTMLParser):
    """The elements of a document with their attributes, and the texts of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self.titles: list[str] = []
        self._is_open = False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._is_open = True

    def handle_data(self, text: str) -> None:
        tag, attributes = self.elements[-1] if self._is_open else ("", {})
        if tag == "script":
            name = attributes.get("id")
            self.scripts[name] = self.scripts.get(name, "") + text
        elif tag == "title":
            self.titles.append(text)

    def handle_endtag(self, tag: str) -> None:
        self._is_open = False


@pytest.fixture(scope="module")
def hostile() -> tuple[Measurements, Elements, str]:
    measured = measure(small_model(depth=2), HOSTILE)
    html = render(measured, TITLE, "</script>", whole_bytes=10_000)
    return measured, Elements(html), html


def test_nothing_is_loaded(hostile: tuple[Measurements, Elements, str]) -> None:
    _, page, html = hostile
    for tag, attributes in page.elements:
        loads = {"src", "href", "srcset", "action", "data", "background"} & attributes.keys()
        assert not loads, f"<{tag}> has {loads}"
    assert not {"link", "iframe", "img", "object"} & {tag for tag, _ in page.elements}
    # The name of SVG is an address that nothing requests.
    assert set(re.findall(r"\w+://[^\s\"'<]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in html and "url(" not in html
    policies = [a["content"] or "" for _, a in page.elements if "http-equiv" in a]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'")


def test_hostile_text_stays_text(hostile: tuple[Measurements, Elements, str]) -> None:
    _, page, html = hostile
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    arrays = [a for a in scripts if a.get("type") == "text/plain"]
    # Beside the arrays: the description, the program.
    assert len(scripts) == len(arrays) + 2
    assert "".join(page.titles) == TITLE
    meta = json.loads(page.scripts["meta"])
    assert meta["title"] == TITLE
    assert meta["summary"].startswith(f"{len(HOSTILE):,} bytes, the first of 10,000 · ")
    assert "alert" not in html.replace(TITLE, "").replace("&lt;script&gt;alert(1)", "").replace(
        "\\u003cscript>alert(1)", ""
    )


def array(page: Elements, reference: dict[str, str]) -> Array:
    content = zlib.decompress(base64.b64decode(page.scripts[reference["id"]]))
    return np.frombuffer(content, reference["type"])


def test_arrays_are_what_was_measured(hostile: tuple[Measurements, Elements, str]) -> None:
    measured, page, _ = hostile
    meta: dict[str, Any] = json.loads(page.scripts["meta"])
    assert array(page, meta["text"]).tobytes() == HOSTILE
    bits = array(page, meta["surprise"]) / meta["bitCodes"]
    # Half a step each.
    np.testing.assert_allclose(bits, measured.bits.numpy(), atol=0.5 / meta["bitCodes"])
    tokens = array(page, meta["topTokens"]).reshape(-1, meta["top"])
    assert (tokens == measured.top_tokens.numpy()).all()
    assert len(meta["mixers"]) == 2
    for found, mixer in zip(meta["mixers"], measured.mixers, strict=True):
        for name in ("forgotten", "rates", "inputs", "phases"):
            expected = getattr(mixer, name)
            assert (array(page, found[name]) == expected.numpy().ravel()).all()
        assert found["kept"] == mixer.kept
        for name in ("counts", "lags", "shares"):
            expected = getattr(mixer.tracks[0], name)
            assert (array(page, found["tracks"][0][name]) == expected.numpy()).all()


# ---- In Chromium ------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with opened_page() as page:
        yield page


@pytest.fixture(autouse=True)
def quiet(request: pytest.FixtureRequest) -> Iterator[None]:
    """Chromium reports no error and requests nothing but the file."""
    yield
    if "browser" in request.fixturenames:
        page: Page = request.getfixturevalue("browser")
        page.evaluate("1")  # what came before has been read
        assert page.complaints == []
        # "data:" is Chromium's own empty icon.
        assert all(address.startswith(("file:", "data:")) for address in page.requests)


def written(folder: Path, text: bytes, **options: Any) -> Path:
    path = folder / "page.html"
    path.write_text(render(measure(small_model(**options), text), "text", "model"), "utf-8")
    return path


def influence(page: Page, byte: int, mixer: int, channel: int) -> Array:
    """(WINDOW): shares of the bytes before one."""
    pairs = page.evaluate(f"[...inspection.influenceOn({byte}, {mixer}, {channel})]")
    shares = np.zeros(len(TEXT))
    for at, share in pairs:
        shares[at] = share
    return shares


@needs_chromium
@pytest.mark.parametrize("options", ["polar", "sigmoid", "wide", "hybrid"])
def test_numbers_in_chromium(browser: Page, options: str, tmp_path: Path) -> None:
    browser.open(written(tmp_path, TEXT, **MODELS[options]))
    model = small_model(**MODELS[options])
    measured, slow = measure(model, TEXT), definitions(model, TEXT)
    bits = browser.evaluate(f"Array.from({{length: {len(TEXT)}}}, (_, i) => surpriseOf(i))")
    assert sum(bits) == pytest.approx(measured.bits.sum().item(), abs=len(TEXT) / 4096)
    for m, (mixer, definition) in enumerate(zip(measured.mixers, slow, strict=True)):
        for byte in (1, 5, 130, len(TEXT) - 1):
            # What predicts a byte is the step before it.
            expected = definition.shares(byte - 1)
            found = influence(browser, byte, m, -1)[:byte][-WINDOW:]
            assert np.abs(found - expected)[expected > 0.02].max() < 0.02
            sizes = definition.sizes(byte - 1)
            for k in (0, len(mixer.kept) - 1):
                channel = sizes[mixer.kept[k]]
                found = influence(browser, byte, m, k)[:byte]
                recent = found[-WINDOW:]
                channel = channel / channel.sum() * (recent.sum() if mixer.is_max_heads else 1)
                assert np.abs(recent - channel)[channel > 0.02].max(initial=0) < CHANNEL_SHARE
        if definition.a is None:
            continue
        expected = definition.half_lives()[200, mixer.kept]
        halves = [browser.evaluate(f"halfLifeOf(200, {m}, {k})") for k in range(len(mixer.kept))]
        np.testing.assert_allclose(halves, expected.clip(0.05, 1e5), rtol=0.031)
        forgotten = browser.evaluate(f"forgottenOf(200, {m}, -1)")
        assert forgotten == pytest.approx(definition.forgotten()[200], abs=0.003)


def center(page: Page, byte: int) -> tuple[float, float]:
    box = page.evaluate(
        "(() => { for (const row of text.rendered.values()) for (const span of row.characters)"
        f" if (span.byte === {byte}) {{ const b = span.getBoundingClientRect();"
        " return [b.left + b.width / 2, b.top + b.height / 2]; } })()"
    )
    return box[0], box[1]


@needs_chromium
def test_a_click_colours_the_past(browser: Page, tmp_path: Path) -> None:
    browser.open(written(tmp_path, TEXT))
    assert browser.evaluate("view.mode") == "surprise"
    browser.click(*center(browser, 90))
    assert browser.evaluate("[view.mode, view.selected]") == ["influence", 90]
    coloured = browser.evaluate(
        "[...text.rendered.values()].flatMap((row) => row.characters)"
        ".filter((span) => span.style.background).map((span) => span.byte)"
    )
    assert coloured and all(90 - WINDOW <= byte < 90 for byte in coloured)
    assert set(coloured) <= set(np.flatnonzero(influence(browser, 90, -1, -1)).tolist())
    panel = browser.evaluate("document.getElementById('byte').textContent")
    assert "byte 90 of 390" in panel and "This prediction leans on" in panel
    assert "byte=90" in browser.evaluate("location.hash")


@needs_chromium
def test_pointing_at_a_byte_shows_its_numbers(browser: Page, tmp_path: Path) -> None:
    browser.open(written(tmp_path, TEXT))
    panel = "document.getElementById('byte').textContent"
    for byte in (90, 91):
        browser.point(*center(browser, byte))
        shown = browser.evaluate(panel)
        assert f"byte {byte} of {len(TEXT)}" in shown
        assert browser.evaluate(f"surpriseOf({byte}).toFixed(2)") + " bits" in shown
    assert browser.evaluate("view.selected") == -1
    browser.point(1, 1)  # outside the text
    assert "Point at a byte" in browser.evaluate(panel)


@needs_chromium
def test_keys(browser: Page, tmp_path: Path) -> None:
    path = written(tmp_path, TEXT, depth=2)
    browser.open(path, "#byte=90&mode=influence&mixer=1&channel=3")
    chosen = "[view.mode, view.selected, view.mixer, view.channel]"
    assert browser.evaluate(chosen) == ["influence", 90, 1, 3]
    for key, expected in {
        "ArrowRight": ["influence", 91, 1, 3],
        "ArrowLeft": ["influence", 90, 1, 3],
        ".": ["influence", 90, 1, 4],
        ",": ["influence", 90, 1, 3],
        "]": ["influence", 90, -1, -1],
        "[": ["influence", 90, 1, -1],
        "End": ["influence", len(TEXT) - 1, 1, -1],
        "Home": ["influence", 0, 1, -1],
        "Escape": ["surprise", -1, 1, -1],
    }.items():
        browser.press(key)
        assert browser.evaluate(chosen) == expected, key
    browser.evaluate(
        "new Promise((done) => { addEventListener('hashchange', () => done(1));"
        " location.hash = '#byte=-1&mode=nonsense&mixer=9&channel=x'; })"
    )
    assert browser.evaluate(chosen) == ["surprise", -1, -1, -1]


@needs_chromium
def test_every_mode_of_every_mixer(browser: Page, tmp_path: Path) -> None:
    browser.open(written(tmp_path, TEXT, **MODELS["hybrid"]))
    modes = browser.evaluate("Object.keys(modes)")
    assert modes == ["surprise", "erased", "halflife", "influence"]
    for mode in modes:
        for mixer in range(-1, browser.evaluate("data.mixers.length")):
            browser.evaluate(
                f"choose({{selected: 100, mode: '{mode}', mixer: {mixer}, channel: -1}})"
            )
            browser.evaluate("changeChannel(1)")
            assert "undefined" not in browser.evaluate("document.body.innerText")
            assert "NaN" not in browser.evaluate("document.body.innerText")


@needs_chromium
def test_hostile_text_in_chromium(browser: Page, tmp_path: Path) -> None:
    browser.open(written(tmp_path, HOSTILE))
    shown = browser.evaluate(
        "Array.from({length: text.rowStarts.length}, (_, r) => builtRow(r).characters)"
        ".flat().map((span) => [span.byte, span.textContent])"
    )
    by_byte = dict(shown)
    assert "".join(by_byte[i] for i in range(9)) == "</script>"
    # As many characters as a strict decoder finds, each invalid byte one of its own.
    lengths = [
        len(c.encode(errors="surrogateescape")) for c in HOSTILE.decode(errors="surrogateescape")
    ]
    starts = np.cumsum([0, *lengths[:-1]])
    assert [byte for byte, _ in shown] == starts.tolist()
    as_numbers = {text: f"U+{ord(text):X}" for text in "\u202e\u202c\u2028\U0010ffff"}
    for text, expected in ({"漢": "漢", "\u0301": "◌\u0301"} | as_numbers).items():
        assert by_byte[HOSTILE.index(text.encode())] == expected
    assert by_byte[HOSTILE.index(b"\x00")] == "00"
    assert by_byte[HOSTILE.rindex(b"\xff")] == "FF"


@needs_chromium
def test_long_text_is_drawn_where_it_is_seen(browser: Page, tmp_path: Path) -> None:
    browser.open(written(tmp_path, TEXT * 50))
    rows = browser.evaluate("text.rowStarts.length")
    assert rows > 500
    for where in (0, 0.5, 1):
        browser.evaluate(f"text.scroller.scrollTop = {where} * text.scroller.scrollHeight")
        browser.evaluate("new Promise((done) => requestAnimationFrame(() => done(1)))")
        rendered = browser.evaluate("[...text.rendered.keys()]")
        assert len(rendered) < 80
        assert min(rendered) <= where * (rows - 1) <= max(rendered)
