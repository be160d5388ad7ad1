// What stands beside the text: the byte and the mixers.

const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const percent = (x) =>
  x > 0 && x < 5e-4 ? "<0.1 %" : `${(100 * x).toFixed(x > 0 && x < 0.0995 ? 1 : 0)} %`;
const count = (n) => n.toLocaleString("en");

function bytesLong(x) {
  if (x >= meta.halfLives[1]) return `${count(meta.halfLives[1])} bytes or more`;
  return `${x >= 100 ? count(Math.round(x)) : x.toPrecision(2)} bytes`;
}

const mixerName = ({ layer, kind }) => `${layer + 1} ${kind.replaceAll("_", " ")}`;
const channelWord = (mixer) => (mixer.isMaxHeads ? "channel" : "head");

function bars(rows, hue) {
  const list = make("div", { class: "bars", style: `--hue: var(--${hue})` });
  const longest = Math.max(...rows.map((row) => row.value), 1e-9);
  for (const { name, value, shown, hit } of rows) {
    const fill = make("i", { style: `width: ${((100 * value) / longest).toFixed(1)}%` });
    const glyph = typeof name === "string" ? [name] : name;
    list.append(
      make("span", { class: hit ? "glyph hit" : "glyph" }, ...glyph),
      make("span", { class: "track" }, fill),
      make("span", { class: hit ? "number hit" : "number" }, shown),
    );
  }
  return list;
}

function showByte(panel, view) {
  const i = view.hovered >= 0 ? view.hovered : view.selected;
  if (i < 0) {
    const hint = "Point at a byte for its numbers; click it to see the bytes that its prediction leans on.";
    panel.replaceChildren(make("h2", {}, "Byte"), make("p", { class: "quiet" }, hint));
    return;
  }
  const start = characterStart(i);
  const n = text.lengths[start];
  const part = n > 1 ? `, byte ${i - start + 1} of ${n} of this character` : "";
  panel.replaceChildren(
    make("div", { class: "what" },
      make("span", { class: "glyph" }, nameAt(i)),
      make("span", { class: "place" }, `byte ${count(i)} of ${count(T)}, 0x${HEX(data.text[i])}${part}`),
    ),
    byteFacts(i, view),
  );
  if (!view.ready) return;
  if (i > 0) panel.append(make("h3", {}, "Predicted here"), predictionBars(i));
  if (view.mixer >= 0 && data.mixers[view.mixer].rates) panel.append(...channelChart(i, view));
  if (i === view.selected && i > 0) panel.append(...leaningBars(i, view));
}

function byteFacts(i, view) {
  const facts = make("dl", { class: "facts" });
  const add = (name, value) => facts.append(make("dt", {}, name), make("dd", {}, value));
  if (i === 0) add("Surprise", "none: nothing comes before it");
  else add("Surprise", `${surpriseOf(i).toFixed(2)} bits (p = ${percent(2 ** -surpriseOf(i))})`);
  if (!view.ready) return facts;
  const mixer = data.mixers[view.mixer];
  if (!mixer) add("Erased of all states", percent(forgottenOf(i, -1, -1)));
  else if (mixer.forgotten) add(`Erased in ${mixerName(mixer)}`, percent(forgottenOf(i, view.mixer, -1)));
  if (mixer?.rates && view.channel >= 0) {
    const name = `${channelWord(mixer)} ${mixer.kept[view.channel]}`;
    add(`Half-life, ${name}`, bytesLong(halfLifeOf(i, view.mixer, view.channel)));
    add(`Erased, ${name}`, percent(forgottenOf(i, view.mixer, view.channel)));
    const held = heldBytes(i, view.mixer, view.channel);
    add("Held at ½ or more", held === 1 ? "this byte alone" : `the last ${count(held)} bytes`);
  }
  return facts;
}

function predictionBars(i) {
  const actual = data.text[i];
  const rows = predictionsOf(i).map(({ token, probability }) => ({
    name: shownToken(token), value: probability, shown: percent(probability), hit: token === actual,
  }));
  if (!rows.some((row) => row.hit)) {
    const probability = 2 ** -surpriseOf(i);
    rows.push({ name: shownToken(actual), value: probability, shown: percent(probability), hit: true });
  }
  return bars(rows, "surprise");
}

// The bytes with the largest shares, each between its neighbours.
function leaningBars(i, view) {
  const all = [...view.influence].sort((a, b) => b[1] - a[1]).slice(0, 8);
  const rows = all.map(([byte, share]) => {
    const near = (from, to) => {
      let shown = "";
      for (let k = Math.max(0, from); k < Math.min(T, to); k++) {
        if (text.lengths[k] > 0) shown += shownAs(data.text, k, text.lengths[k])[0];
      }
      return shown;
    };
    const start = characterStart(byte);
    const name = make("b", {}, nameAt(byte));
    return { name: [near(start - 4, start), name, near(start + 1, start + 5)], value: share, shown: percent(share) };
  });
  const rest = Math.max(0, all.reduce((left, [, share]) => left - share, 1));
  return [
    make("h3", {}, `This prediction leans on (${influenceName(view)})`),
    bars(rows, "influence"),
    make("p", { class: "quiet" }, `and ${percent(rest)} on other bytes`),
  ];
}

function influenceName(view) {
  const mixer = data.mixers[view.mixer];
  if (!mixer) return "mean of all mixers";
  if (view.channel < 0) return mixerName(mixer);
  return `${mixerName(mixer)}, ${channelWord(mixer)} ${mixer.kept[view.channel]}`;
}

// The kept channels' half-lives at a byte as dots, over their means as dashes.
function channelChart(i, view) {
  const mixer = data.mixers[view.mixer];
  const [width, height, left] = [350, 92, 34];
  const chart = draw("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img" });
  const y = (halfLife) => {
    const x = Math.log(halfLife / 0.1) / Math.log(1e4);
    return height - 6 - Math.min(1, Math.max(0, x)) * (height - 14);
  };
  for (const tick of [0.1, 1, 10, 100, 1000]) {
    chart.append(
      draw("line", { class: "grid", x1: left, x2: width, y1: y(tick), y2: y(tick) }),
      draw("text", { x: left - 6, y: y(tick) + 3.5, "text-anchor": "end" }, count(tick)),
    );
  }
  const step = (width - left) / mixer.kept.length;
  mixer.kept.forEach((channel, k) => {
    const x = left + (k + 0.5) * step;
    const mean = y(mixer.halfLives[channel]);
    const half = Math.min(step / 2, 7);
    const dot = draw("circle", {
      class: k === view.channel ? "now chosen" : "now", cx: x, cy: y(halfLifeOf(i, view.mixer, k)),
      r: Math.min(4.5, Math.max(1.6, step / 3)),
    });
    dot.append(draw("title", {}, `${channelWord(mixer)} ${channel}`));
    dot.addEventListener("click", () => choose({ channel: k }));
    chart.append(draw("line", { class: "mean", x1: x - half, x2: x + half, y1: mean, y2: mean }), dot);
  });
  return [make("h3", {}, `Half-life of each ${channelWord(mixer)} at this byte (dash: its mean), bytes`), chart];
}

// A strip for each mixer: its channels on one axis of half-lives.
const AXIS = [0.1, 1, 10, 100, 1000, 10000];
const onAxis = (halfLife) => {
  const x = Math.log(halfLife / AXIS[0]) / Math.log(AXIS[AXIS.length - 1] / AXIS[0]);
  return `${(100 * Math.min(1, Math.max(0, x))).toFixed(2)}%`;
};

function showMixers(panel, view) {
  panel.replaceChildren(make("h2", {}, "Half-life of every channel"), axis());
  const all = make("button", { class: "mixer", "aria-pressed": view.mixer < 0 }, "All layers", make("span"));
  all.addEventListener("click", () => choose({ mixer: -1, channel: -1 }));
  panel.append(all);
  meta.mixers.forEach((mixer, m) => panel.append(strip(mixer, m, view)));
  for (const { layer, kind, reason } of meta.notShown) {
    panel.append(make("p", { class: "absent" }, `${mixerName({ layer, kind })}: not shown, ${reason}`));
  }
  const chosen = meta.mixers[view.mixer];
  if (chosen) panel.append(channelChoice(chosen, view));
}

function axis() {
  const scale = draw("svg", { class: "chart" });
  for (const tick of AXIS) {
    const anchor = tick === AXIS[AXIS.length - 1] ? "end" : "middle";
    const shown = tick < 1000 ? count(tick) : `${tick / 1000}k`;
    scale.append(draw("text", { x: onAxis(tick), y: 11, "text-anchor": anchor }, shown));
  }
  return make("div", { class: "axis" }, make("span", {}, "bytes"), scale);
}

function strip(mixer, m, view) {
  const row = make("button", { class: "mixer", "aria-pressed": m === view.mixer });
  row.append(mixerName(mixer));
  if (mixer.halfLives) {
    const ticks = draw("svg");
    const kept = new Set(mixer.kept);
    mixer.halfLives.forEach((halfLife, channel) => {
      const isChosen = m === view.mixer && mixer.kept[view.channel] === channel;
      const kind = isChosen ? "tick chosen" : kept.has(channel) ? "tick kept" : "tick";
      const [y1, y2] = isChosen ? [0, 20] : kept.has(channel) ? [4, 18] : [8, 16];
      ticks.append(draw("line", { class: kind, x1: onAxis(halfLife), x2: onAxis(halfLife), y1, y2 }));
    });
    row.append(ticks);
  } else {
    row.append(make("span", { class: "quiet" }, "no state that decays"));
  }
  row.addEventListener("click", () => choose({ mixer: m, channel: -1 }));
  return row;
}

function channelChoice(mixer, view) {
  const word = channelWord(mixer);
  const box = make("select");
  box.append(make("option", { value: -1 }, `all ${mixer.channels} ${word}s together`));
  mixer.kept.forEach((channel, k) => {
    const halfLife = mixer.halfLives ? `: ${bytesLong(mixer.halfLives[channel])}` : "";
    box.append(make("option", { value: k }, `${word} ${channel}${halfLife}`));
  });
  box.value = view.channel;
  box.addEventListener("change", () => choose({ channel: Number(box.value) }));
  const some = mixer.kept.length < mixer.channels ? `; ${mixer.kept.length} are kept byte by byte, the tall ticks` : "";
  const order = mixer.halfLives ? ", by half-life" : "";
  return make("label", {}, `${word[0].toUpperCase()}${word.slice(1)}${order}${some}`, box);
}
