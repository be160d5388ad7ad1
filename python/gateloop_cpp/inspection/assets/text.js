// The text as rows of characters, of which those in sight are in the document.

const ROW_HEIGHT = 25;
const OVERSCAN = 12;
const WIDE = /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6]|\p{Emoji_Presentation}/u;
const HEX = (byte) => byte.toString(16).toUpperCase().padStart(2, "0");

const text = {
  lengths: null, // of the character that begins at a byte; 0 inside of one
  rowStarts: [0],
  rendered: new Map(),
  scroller: document.getElementById("scroller"),
  rows: document.getElementById("rows"),
};

// Bytes that are no UTF-8 are characters of one byte.
function characterLengths(bytes) {
  const lengths = new Uint8Array(bytes.length);
  for (let i = 0; i < bytes.length; i += lengths[i]) lengths[i] = lengthAt(bytes, i);
  return lengths;
}

function lengthAt(bytes, i) {
  const b = bytes[i];
  const n = b < 0xc2 ? 1 : b < 0xe0 ? 2 : b < 0xf0 ? 3 : b < 0xf5 ? 4 : 1;
  if (i + n > bytes.length) return 1;
  for (let k = 1; k < n; k++) if ((bytes[i + k] & 0xc0) !== 0x80) return 1;
  const code = codePoint(bytes, i, n);
  const least = [0, 0, 0x80, 0x800, 0x10000][n];
  const isSurrogate = code >= 0xd800 && code < 0xe000;
  return n > 1 && (code < least || code > 0x10ffff || isSurrogate) ? 1 : n;
}

function codePoint(bytes, i, n) {
  let code = n === 1 ? bytes[i] : bytes[i] & (0xff >> (n + 1));
  for (let k = 1; k < n; k++) code = (code << 6) | (bytes[i + k] & 0x3f);
  return code;
}

// What is shown for n bytes, and how: "", "special" for a stand-in, "hex" for a number.
function shownAs(bytes, i, n) {
  const b = bytes[i];
  if (n === 1) {
    if (b === 10) return ["↵", "special"];
    if (b === 9) return ["→", "special"];
    return b > 31 && b < 127 ? [String.fromCharCode(b), ""] : [HEX(b), "hex"];
  }
  const code = codePoint(bytes, i, n);
  const character = String.fromCodePoint(code);
  if (/[\p{C}\p{Z}]/u.test(character)) return [`U+${code.toString(16).toUpperCase()}`, "hex"];
  return [/\p{M}/u.test(character) ? `◌${character}` : character, ""];
}

function shownToken(token) {
  if (token > 255) return `#${token}`;
  const [shown, kind] = shownAs([token], 0, 1);
  return token === 32 ? "␣" : kind === "hex" ? `0x${shown}` : shown;
}

// The bytes of a character as a person names them.
function nameAt(i) {
  const start = characterStart(i);
  const n = text.lengths[start];
  const [shown, kind] = shownAs(data.text, start, n);
  if (n === 1) return data.text[start] === 32 ? "␣" : kind === "hex" ? `0x${shown}` : shown;
  return shown;
}

function characterStart(i) {
  while (text.lengths[i] === 0) i--;
  return i;
}

function layOut() {
  const probe = document.createElement("div");
  probe.className = "row";
  probe.innerHTML = '<span class="at">0</span><span class="c">' + "x".repeat(100) + "</span>";
  text.rows.append(probe);
  const margin = probe.firstChild.getBoundingClientRect().right - text.rows.getBoundingClientRect().left;
  const width = probe.lastChild.getBoundingClientRect().width / 100;
  probe.remove();
  const columns = Math.max(8, Math.floor((text.rows.clientWidth - margin - 10) / width));
  text.rowStarts = rowStarts(columns);
  text.rows.style.height = `${text.rowStarts.length * ROW_HEIGHT}px`;
  for (const row of text.rendered.values()) row.remove();
  text.rendered.clear();
}

// Rows end behind a newline, else behind the last space that fits, else where they are full.
function rowStarts(columns) {
  const starts = [0];
  let used = 0;
  let space = -1;
  for (let i = 0; i < T; i += text.lengths[i]) {
    const n = text.lengths[i];
    const width = columnsOf(i, n);
    if (used + width > columns) {
      const next = space > starts[starts.length - 1] ? space : i;
      starts.push(next);
      used = 0;
      for (let k = next; k < i; k += text.lengths[k]) used += columnsOf(k, text.lengths[k]);
      space = -1;
    }
    used += width;
    if (data.text[i] === 32) space = i + 1;
    if (data.text[i] === 10 && i + 1 < T) {
      starts.push(i + 1);
      used = 0;
      space = -1;
    }
  }
  return starts;
}

function columnsOf(i, n) {
  if (n === 1 && data.text[i] > 31 && data.text[i] < 127) return 1;
  const [shown, kind] = shownAs(data.text, i, n);
  return kind === "hex" ? shown.length : WIDE.test(shown) ? 2 : 1;
}

function rowOf(i) {
  let low = 0;
  let high = text.rowStarts.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (text.rowStarts[middle] <= i) low = middle;
    else high = middle;
  }
  return low;
}

// Puts the rows in sight into the document and takes the others out.
function renderRows(paint) {
  const { scroller, rendered } = text;
  const first = Math.max(0, Math.floor(scroller.scrollTop / ROW_HEIGHT) - OVERSCAN);
  const last = Math.min(
    text.rowStarts.length,
    Math.ceil((scroller.scrollTop + scroller.clientHeight) / ROW_HEIGHT) + OVERSCAN,
  );
  for (const [r, row] of rendered) {
    if (r < first || r >= last) { row.remove(); rendered.delete(r); }
  }
  const fresh = document.createDocumentFragment();
  for (let r = first; r < last; r++) {
    if (rendered.has(r)) continue;
    const row = builtRow(r);
    for (const span of row.characters) paint(span);
    rendered.set(r, row);
    fresh.append(row);
  }
  text.rows.append(fresh);
}

function builtRow(r) {
  const row = document.createElement("div");
  row.className = "row";
  row.style.top = `${r * ROW_HEIGHT}px`;
  const at = document.createElement("span");
  at.className = "at";
  at.textContent = text.rowStarts[r].toLocaleString("en");
  row.append(at);
  row.characters = [];
  const end = r + 1 < text.rowStarts.length ? text.rowStarts[r + 1] : T;
  for (let i = text.rowStarts[r]; i < end; i += text.lengths[i]) {
    const [shown, kind] = shownAs(data.text, i, text.lengths[i]);
    const span = document.createElement("span");
    span.className = kind ? `c ${kind}` : "c";
    span.textContent = shown;
    span.byte = i;
    row.characters.push(span);
  }
  row.append(...row.characters);
  return row;
}

function repaint(paint) {
  for (const row of text.rendered.values()) for (const span of row.characters) paint(span);
}

// The byte under a pointer: a character of n bytes has n equal parts.
function byteUnder(event) {
  const span = event.target.closest?.(".c");
  if (!span) return -1;
  const box = span.getBoundingClientRect();
  const n = text.lengths[span.byte];
  const part = Math.floor((n * (event.clientX - box.left)) / box.width);
  return span.byte + Math.min(n - 1, Math.max(0, part));
}

function scrollToByte(i) {
  const { scroller } = text;
  const top = rowOf(i) * ROW_HEIGHT;
  if (top < scroller.scrollTop + ROW_HEIGHT) scroller.scrollTop = top - 2 * ROW_HEIGHT;
  if (top + 3 * ROW_HEIGHT > scroller.scrollTop + scroller.clientHeight) {
    scroller.scrollTop = top + 3 * ROW_HEIGHT - scroller.clientHeight;
  }
}

// The byte as many rows further, at about the same place in its row.
function byteBelow(i, rows) {
  const row = rowOf(i);
  const target = Math.min(text.rowStarts.length - 1, Math.max(0, row + rows));
  if (target === row) return rows < 0 ? 0 : T - 1;
  const end = target + 1 < text.rowStarts.length ? text.rowStarts[target + 1] : T;
  return Math.min(end - 1, text.rowStarts[target] + (i - text.rowStarts[row]));
}
