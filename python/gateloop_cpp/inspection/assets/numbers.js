"use strict";
// The numbers of the page: arrays from base64, codes to values, shares of influence.

const meta = JSON.parse(document.getElementById("meta").textContent);
const T = meta.bytes;
const LN2 = Math.log(2);

const table = (f) => Float64Array.from({ length: 256 }, (_, code) => f(code / 255, code));
const logarithmic = ([least, most]) => (x) => least * Math.exp(x * Math.log(most / least));
const HALF_LIFE = table(logarithmic(meta.halfLives));
const SIZE = table((x, code) => (code === 0 ? 0 : logarithmic(meta.sizes)(x)));
const RATE = HALF_LIFE.map((halfLife) => LN2 / halfLife);
const SHARE = table((x) => x * x);

// A channel's influence reaches back until 1/256 of a memory is left, or so many bytes.
const LEAST_DECAY = Math.log(256);
const LONGEST_REACH = 4096;

async function loaded(reference) {
  if (reference === null) return null;
  const node = document.getElementById(reference.id);
  const text = node.textContent;
  const packed = Uint8Array.fromBase64
    ? Uint8Array.fromBase64(text)
    : Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  node.remove();
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  return reference.type === "uint16" ? new Uint16Array(buffer) : new Uint8Array(buffer);
}

const data = { text: null, bits: null, topTokens: null, topShares: null, mixers: [] };

async function loadText() {
  data.text = await loaded(meta.text);
  data.bits = await loaded(meta.surprise);
}

async function loadMixers() {
  data.topTokens = await loaded(meta.topTokens);
  data.topShares = await loaded(meta.topProbabilities);
  for (const description of meta.mixers) {
    const mixer = { ...description, tracks: [] };
    for (const name of ["forgotten", "rates", "inputs", "phases"]) {
      mixer[name] = await loaded(description[name]);
    }
    for (const track of description.tracks) {
      const counts = await loaded(track.counts);
      const starts = new Uint32Array(T + 1);
      for (let i = 0; i < T; i++) starts[i + 1] = starts[i] + counts[i];
      mixer.tracks.push({ starts, lags: await loaded(track.lags), shares: await loaded(track.shares) });
    }
    data.mixers.push(mixer);
  }
}

const surpriseOf = (i) => data.bits[i] / meta.bitCodes;

function predictionsOf(i) {
  const found = [];
  for (let k = 0; k < meta.top; k++) {
    const at = i * meta.top + k;
    found.push({ token: data.topTokens[at], probability: SHARE[data.topShares[at]] });
  }
  return found;
}

// The share of the state's energy that reading byte i erases; mixer -1: the mean over all.
function forgottenOf(i, mixer, channel) {
  if (mixer >= 0 && channel >= 0) return 1 - Math.exp(-2 * RATE[data.mixers[mixer].rates[channel * T + i]]);
  if (mixer >= 0) return data.mixers[mixer].forgotten ? data.mixers[mixer].forgotten[i] / 255 : 0;
  let sum = 0;
  let count = 0;
  for (const { forgotten } of data.mixers) {
    if (forgotten) { sum += forgotten[i] / 255; count++; }
  }
  return sum / count;
}

const halfLifeOf = (i, mixer, channel) => HALF_LIFE[data.mixers[mixer].rates[channel * T + i]];

// How many of the last bytes, byte i included, a channel holds at half strength or more.
function heldBytes(i, mixer, channel) {
  const rates = data.mixers[mixer].rates;
  let decay = 0;
  let s = i;
  while (s > 0) {
    decay += RATE[rates[channel * T + s]];
    if (decay > LN2) break;
    s--;
  }
  return i - s + 1;
}

// Shares of the influence on the prediction of byte i: a Map from bytes before it to shares.
function influenceOn(i, mixer, channel) {
  if (i === 0) return new Map();
  const row = i - 1;
  if (mixer < 0) return meanShares(data.mixers.map((m) => trackShares(m.tracks[0], row)));
  const m = data.mixers[mixer];
  if (channel < 0) return trackShares(m.tracks[0], row);
  return m.isMaxHeads ? channelShares(m, channel, row) : trackShares(m.tracks[1 + m.kept[channel]], row);
}

function trackShares({ starts, lags, shares }, row) {
  const found = new Map();
  for (let e = starts[row]; e < starts[row + 1]; e++) found.set(row - lags[e], SHARE[shares[e]]);
  return found;
}

function meanShares(maps) {
  const mean = new Map();
  for (const map of maps) {
    for (const [byte, share] of map) mean.set(byte, (mean.get(byte) || 0) + share / maps.length);
  }
  return mean;
}

// |Re(a_{s+1} ... a_row) k_s v_s| over its sum: |q_row| is the same in all.
function channelShares({ rates, inputs, phases }, channel, row) {
  const sizes = [];
  const first = channel * T;
  let decay = 0;
  let phase = 0;
  let sum = 0;
  for (let s = row; s >= 0 && row - s < LONGEST_REACH && decay < LEAST_DECAY; s--) {
    const size = Math.exp(-decay) * Math.abs(Math.cos(phase)) * SIZE[inputs[first + s]];
    sizes.push(size);
    sum += size;
    decay += RATE[rates[first + s]];
    if (phases) phase += (phases[first + s] * 2 * Math.PI) / 256;
  }
  const found = new Map();
  sizes.forEach((size, lag) => { if (size > 0) found.set(row - lag, size / sum); });
  return found;
}
