// What is chosen, how it colours the text, and what keys and the pointer do.

const view = {
  mode: "surprise", mixer: -1, channel: -1, selected: -1, hovered: -1,
  ready: false, influence: new Map(), largest: 0, held: [0, 0],
};

const MOST_BITS = 8;
const HALF_LIFE_RANGE = [0.5, 512];
const LEVELS = 48;
const OPACITY = 0.72;

const palettes = {};
for (const hue of ["surprise", "erased", "halflife", "influence"]) {
  palettes[hue] = Array.from({ length: LEVELS + 1 }, (_, level) =>
    level === 0 ? "" : `rgb(var(--${hue}) / ${((OPACITY * level) / LEVELS).toFixed(3)})`);
}

const modes = {
  surprise: {
    name: "Surprise", title: "bits", ticks: [[0, "0"], [0.25, "2"], [0.5, "4"], [0.75, "6"], [1, "8+"]],
    value: (i) => (i === 0 ? 0 : surpriseOf(i) / MOST_BITS),
  },
  erased: {
    name: "Erased", title: "of what the state holds", ticks: [[0, "0"], [0.5, "50"], [1, "100 %"]],
    value: (i) => (view.ready ? forgottenOf(i, view.mixer, view.channel) : 0),
  },
  halflife: {
    name: "Half-life", title: "bytes", ticks: [[0, "½"], [0.3, "4"], [0.6, "32"], [0.9, "256"]],
    value: (i) => {
      if (!view.ready || view.channel < 0) return 0;
      const [least, most] = HALF_LIFE_RANGE;
      return Math.log(halfLifeOf(i, view.mixer, view.channel) / least) / Math.log(most / least);
    },
  },
  influence: {
    name: "Influence", title: "share", ticks: [],
    value: (i) => (view.influence.has(i) ? Math.sqrt(view.influence.get(i) / view.largest) : 0),
  },
};

function colour(i) {
  const level = Math.round(LEVELS * Math.min(1, Math.max(0, modes[view.mode].value(i))));
  return palettes[view.mode][level];
}

// The colours of n bytes side by side.
function stripes(i, n) {
  const colours = Array.from({ length: n }, (_, k) => colour(i + k));
  if (!colours.some(Boolean)) return "";
  const at = (k) => `${((100 * k) / n).toFixed(1)}%`;
  const stops = colours.map((shown, k) => `${shown || "transparent"} ${at(k)} ${at(k + 1)}`);
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

function paint(span) {
  const i = span.byte;
  const n = text.lengths[i];
  span.style.background = n === 1 ? colour(i) : stripes(i, n);
  span.classList.toggle("selected", view.selected >= i && view.selected < i + n);
  span.classList.toggle("held", i >= view.held[0] && i < view.held[1]);
}

// Changes what is chosen, and then everything that shows it.
function choose(changes) {
  Object.assign(view, changes);
  const chosen = data.mixers[view.mixer];
  if (view.mode === "halflife" && view.ready && view.channel < 0) chooseSomeChannel();
  if (chosen && !chosen.rates && view.mode !== "surprise") view.mode = "influence";
  view.influence = view.ready && view.selected > 0
    ? influenceOn(view.selected, view.mixer, view.channel) : new Map();
  view.largest = Math.max(0, ...view.influence.values());
  view.held = heldRange();
  document.documentElement.dataset.mode = view.mode;
  showModes();
  showLegend();
  showMixers(document.getElementById("mixers"), view);
  showByte(document.getElementById("byte"), view);
  repaint(paint);
  if (view.ready) remember();
}

// Half-lives are a channel's: the longest of the first mixer that has some, unless one is chosen.
function chooseSomeChannel() {
  const withRates = (mixer) => mixer?.rates;
  const mixer = withRates(data.mixers[view.mixer]) ? view.mixer : data.mixers.findIndex(withRates);
  Object.assign(view, { mixer, channel: data.mixers[mixer].kept.length - 1 });
}

function heldRange() {
  const shows = view.ready && view.mode === "halflife" && view.channel >= 0 && view.selected >= 0;
  if (!shows) return [0, 0];
  const held = heldBytes(view.selected, view.mixer, view.channel);
  return [view.selected - held + 1, view.selected + 1];
}

function showModes() {
  const group = document.getElementById("modes");
  group.replaceChildren(...Object.entries(modes).map(([mode, { name }]) => {
    const button = make("button", {
      type: "button", role: "radio", "aria-checked": mode === view.mode, style: `--hue: var(--${mode})`,
    }, name);
    button.addEventListener("click", () => choose({ mode }));
    return button;
  }));
}

function showLegend() {
  const { title, ticks } = modes[view.mode];
  const legend = document.getElementById("legend");
  if (view.mode === "influence" && view.influence.size === 0) {
    legend.replaceChildren("click a byte to see what its prediction leans on");
    return;
  }
  const shown = view.mode === "influence"
    ? [[0, "0"], [0.5, percent(view.largest / 4)], [1, percent(view.largest)]] : ticks;
  const full = `rgb(var(--${view.mode}) / ${OPACITY})`;
  const bar = make("div", { class: "bar", style: `background: linear-gradient(to right, transparent, ${full})` });
  const marks = make("div", { class: "ticks" });
  for (const [x, label] of shown) marks.append(make("span", { style: `left: ${100 * x}%` }, label));
  legend.replaceChildren(make("span", { class: "scale" }, bar, marks), make("span", {}, legendName(title)));
}

function legendName(title) {
  if (view.mode === "surprise") return title;
  if (view.mode === "influence") return `${title}, ${influenceName(view)}`;
  const mixer = meta.mixers[view.mixer];
  const where = !mixer ? "mean of all layers"
    : view.channel < 0 ? mixerName(mixer) : `${mixerName(mixer)}, ${channelWord(mixer)} ${mixer.kept[view.channel]}`;
  return `${title}, ${where}`;
}

// The address holds what is chosen, so that it can be sent along.
function remember() {
  const chosen = new URLSearchParams();
  if (view.selected >= 0) chosen.set("byte", view.selected);
  if (view.mode !== "surprise") chosen.set("mode", view.mode);
  if (view.mixer >= 0) chosen.set("mixer", view.mixer);
  if (view.channel >= 0) chosen.set("channel", view.channel);
  history.replaceState(null, "", `#${chosen}`);
}

function remembered() {
  const chosen = new URLSearchParams(location.hash.slice(1));
  const within = (name, end) => {
    const value = Number(chosen.get(name) ?? -1);
    return Number.isInteger(value) && value >= 0 && value < end ? value : -1;
  };
  const mixer = within("mixer", data.mixers.length);
  const channels = data.mixers[mixer]?.kept.length ?? 0;
  const mode = chosen.get("mode");
  return {
    selected: within("byte", T), mixer, channel: within("channel", channels),
    mode: Object.hasOwn(modes, mode) ? mode : "surprise",
  };
}

function select(i) {
  choose({ selected: i, mode: view.mode === "halflife" || view.mode === "erased" ? view.mode : "influence" });
}

function move(i) {
  select(Math.min(T - 1, Math.max(0, i)));
  scrollToByte(view.selected);
  renderRows(paint);
}

function changeMixer(by) {
  const mixers = data.mixers.length;
  choose({ mixer: ((view.mixer + 1 + by + mixers + 1) % (mixers + 1)) - 1, channel: -1 });
}

function changeChannel(by) {
  const mixer = data.mixers[view.mixer];
  if (!mixer) return;
  const channels = mixer.kept.length;
  choose({ channel: ((view.channel + 1 + by + channels + 1) % (channels + 1)) - 1 });
}

const page = () => Math.max(1, Math.floor(text.scroller.clientHeight / ROW_HEIGHT) - 2);
const keys = {
  ArrowLeft: () => move(view.selected - 1), ArrowRight: () => move(view.selected + 1),
  ArrowUp: () => move(byteBelow(Math.max(0, view.selected), -1)),
  ArrowDown: () => move(view.selected < 0 ? 0 : byteBelow(view.selected, 1)),
  PageUp: () => move(byteBelow(Math.max(0, view.selected), -page())),
  PageDown: () => move(byteBelow(Math.max(0, view.selected), page())),
  Home: () => move(0), End: () => move(T - 1),
  "[": () => changeMixer(-1), "]": () => changeMixer(1),
  ",": () => changeChannel(-1), ".": () => changeChannel(1),
  Escape: () => choose({ selected: -1, mode: "surprise" }),
};

function onKey(event) {
  const isTyped = event.target.closest?.("select, button, summary") && event.key.length > 1;
  if (event.ctrlKey || event.metaKey || event.altKey || isTyped || !keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
}

function listen() {
  let isDue = false;
  text.scroller.addEventListener("scroll", () => renderRows(paint), { passive: true });
  text.rows.addEventListener("click", (event) => {
    const i = byteUnder(event);
    if (i >= 0) select(i);
  });
  text.rows.addEventListener("pointermove", (event) => {
    const i = byteUnder(event);
    if (i < 0 || i === view.hovered) return;
    view.hovered = i;
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => {
      isDue = false;
      showByte(document.getElementById("byte"), view);
    });
  });
  text.scroller.addEventListener("pointerleave", () => {
    view.hovered = -1;
    showByte(document.getElementById("byte"), view);
  });
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => view.ready && choose(remembered()));
  let width = text.rows.clientWidth;
  new ResizeObserver(() => {
    if (text.rows.clientWidth !== width) {
      width = text.rows.clientWidth;
      const first = text.rowStarts[Math.floor(text.scroller.scrollTop / ROW_HEIGHT)] ?? 0;
      layOut();
      text.scroller.scrollTop = rowOf(first) * ROW_HEIGHT;
    }
    renderRows(paint);
  }).observe(text.scroller);
}

function showKeys() {
  const parts = [["← → ↑ ↓", "move"], ["[ ]", "layer"], [", .", "channel"], ["Esc", "surprise"]];
  document.getElementById("keys").replaceChildren(
    ...parts.flatMap(([key, does]) => [make("kbd", {}, key), ` ${does}  `]));
}

async function start() {
  document.getElementById("title").textContent = meta.title;
  document.getElementById("summary").textContent = meta.summary;
  await loadText();
  text.lengths = characterLengths(data.text);
  layOut();
  showKeys();
  listen();
  choose({});
  renderRows(paint);
  await loadMixers();
  view.ready = true;
  choose(remembered());
  if (view.selected >= 0) scrollToByte(view.selected);
  renderRows(paint);
}

// For whoever reads the numbers by program: the tests do. Resolved when all is loaded.
const inspection = { ready: start(), view, surpriseOf, predictionsOf, forgottenOf, halfLifeOf, heldBytes, influenceOn };
