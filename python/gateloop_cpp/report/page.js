"use strict";
(() => {
  const COLOURS = 8; // of page.css
  const DASHES = ["solid", "dash", "dot", "dashdot"]; // where there are more groups than colours: .d0 to .d3
  const FADED = 0.35;
  const data = JSON.parse(document.getElementById("data").textContent);
  const shown = new Set(data.groups.keys());
  let axis = data.axes[0];
  let scale = "linear";

  function element(tag, options = {}, ...children) {
    const made = Object.assign(document.createElement(tag), options);
    made.append(...children);
    return made;
  }

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colourOf = (group) => colour(`--c${group % COLOURS}`);
  const dashOf = (group) => Math.floor(group / COLOURS) % DASHES.length;
  // Plotly reads its texts as HTML of a few tags.
  const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

  // ---- Curves ----

  const isShown = (line) => line.group === undefined || shown.has(line.group); // of layers, or of a group

  /** Where the longest of the lines shown ends. */
  function longest(panels) {
    const lines = panels.flatMap((panel) => panel.lines.filter(isShown));
    return lines.reduce((end, line) => Math.max(end, ...line.x[axis.name]), 0) || 1;
  }

  const lowMedian = (values) => [...values].sort((a, b) => a - b)[(values.length - 1) >> 1];

  /** Of losses on a linear axis: without the first steps, and without diverged runs, as watch has it. */
  function usualRange(panel) {
    if (!panel.falls || scale !== "linear") return {};
    const begin = data.limits.firstShare * longest(data.panels);
    const lines = panel.lines.filter(isShown);
    const late = lines.map((line) => line.y.filter((_, i) => line.x[axis.name][i] > begin)).filter((ys) => ys.length);
    if (late.length === 0) return {};
    const most = data.limits.far * lowMedian(late.map(lowMedian));
    const values = late.flat().filter((y) => y <= most);
    const low = values.reduce((a, b) => Math.min(a, b));
    const high = values.reduce((a, b) => Math.max(a, b));
    const margin = 0.06 * (high - low || 1);
    return { range: [low - margin, high + margin] };
  }

  function traces(panel) {
    const common = (line) => ({
      type: "scatter",
      x: line.x[axis.name],
      name: escaped(line.name),
      visible: shown.has(line.group),
      hoverinfo: "skip",
      line: { color: colourOf(line.group), width: 2, dash: DASHES[dashOf(line.group)] },
    });
    // A few points far apart are measurements: each is drawn.
    const mode = (line) => (line.y.length <= 40 ? "lines+markers" : "lines");
    return panel.lines.flatMap((line) => {
      const own = common(line);
      if (!line.seeds) {
        if (!line.alone) {
          return [{ ...own, y: line.y, mode: "lines", opacity: FADED, line: { ...own.line, width: 1 } }];
        }
        const hovertemplate = `%{y:${panel.digits}}`;
        return [{ ...own, y: line.y, mode: mode(line), marker: { size: 5 }, hoverinfo: "all", hovertemplate }];
      }
      const edge = { ...own, mode: "lines", line: { width: 0, color: own.line.color } };
      const range = line.low.map((low, i) => [low, line.high[i]]);
      const format = panel.digits;
      return [
        { ...edge, y: line.low },
        { ...edge, y: line.high, fill: "tonexty", fillcolor: own.line.color + "26" },
        {
          ...own, y: line.y, mode: mode(line), marker: { size: 5 }, hoverinfo: "all", customdata: range,
          hovertemplate: `%{y:${format}} <i>(%{customdata[0]:${format}} – %{customdata[1]:${format}})</i>`,
        },
      ];
    });
  }

  /** Along the spectrum from the first layer to the last. */
  function colourOfLayer(layer, depth) {
    const hue = 230 - 205 * (depth > 1 ? layer / (depth - 1) : 0);
    return `hsl(${hue}, 65%, ${colour("--layer-lightness")})`;
  }

  /** Three digits; what is in no record is infinite. */
  const short = (value) => (value === null ? "∞" : String(Number(value.toPrecision(3))));

  function layerTraces(panel, depth) {
    return panel.lines.map((line) => ({
      type: "scatter",
      mode: "lines",
      x: line.x[axis.name],
      y: line.y,
      text: line.range?.map((range) => `(${range.map(short).join(" – ")})`),
      name: `layer ${line.layer + 1}`,
      line: { color: colourOfLayer(line.layer, depth), width: 1.8 },
      hovertemplate: line.range ? "%{y:.3~g} <i>%{text}</i>" : "%{y:.3~g}",
    }));
  }

  /** panels: those that have the same horizontal axis. */
  function layout(panel, panels) {
    const line = { gridcolor: colour("--grid"), linecolor: colour("--line"), zeroline: false, automargin: true };
    return {
      margin: { l: 48, r: 10, t: 8, b: 40 },
      showlegend: false,
      hovermode: "x unified",
      paper_bgcolor: colour("--card"),
      plot_bgcolor: colour("--card"),
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--quiet") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
      xaxis: {
        ...line, type: scale, title: { text: axis.title, standoff: 8 }, showline: true, nticks: 7,
        spikecolor: colour("--quiet"), spikethickness: 1, spikedash: "dot",
        ...(scale === "linear" ? { range: [0, 1.01 * longest(panels)] } : {}),
        tickformat: axis.name === "time" ? "~g" : "~s",
        unifiedhovertitle: { text: `<b>%{x:${axis.name === "time" ? ".4~g" : ",.0f"}}</b> ${escaped(axis.title)}` },
      },
      yaxis: {
        ...line, nticks: 7, rangemode: panel.from_zero ? "tozero" : "normal", ...usualRange(panel),
        ...(panel.log ? { type: "log", tickformat: "~g" } : {}),
      },
    };
  }

  /** A plot for each panel, in a card of its own. */
  function cards(holder, panels, className) {
    return panels.map((panel, index) => {
      const plot = element("div", { className: "plot" });
      const title = element("h3", {}, panel.title, " ", element("small", { textContent: panel.unit }));
      holder.append(element("div", { className: className(index) }, title, plot));
      return { panel, plot };
    });
  }

  const options = { displayModeBar: false, responsive: true };
  const plots = cards(document.getElementById("panels"), data.panels, (index) => (index < 2 ? "panel large" : "panel"));
  let layers = { plots: [], depth: 0 };

  function drawLayers() {
    const { depth } = layers;
    const panels = layers.plots.map(({ panel }) => panel);
    for (const { panel, plot } of layers.plots) Plotly.react(plot, layerTraces(panel, depth), layout(panel, panels), options);
    const stops = [0, 1, 2, 3, 4].map((stop) => colourOfLayer(stop, 5));
    document.getElementById("layers-scale").style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
  }

  function draw() {
    for (const { panel, plot } of plots) Plotly.react(plot, traces(panel), layout(panel, data.panels), options);
    drawLayers();
  }

  // ---- Controls ----

  /** Buttons of which one is pressed. */
  function choice(holder, labels, chosen, choose) {
    const buttons = labels.map((label, index) => {
      const button = element("button", { type: "button", textContent: label });
      button.addEventListener("click", () => press(index));
      return button;
    });
    const press = (pressed) => {
      buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(index === pressed)));
      choose(pressed);
    };
    holder.replaceChildren(...buttons);
    press(chosen);
  }

  function legend() {
    const buttons = data.groups.map((group, index) => {
      const swatch = element("i", { className: `swatch c${index % COLOURS} d${dashOf(index)}` });
      const seeds = group.runs > 1 ? element("small", { textContent: `${group.runs} seeds` }) : "";
      const button = element("button", { type: "button" }, swatch, element("span", { textContent: group.name }), seeds);
      button.addEventListener("click", () => show(shown.has(index) ? [...shown].filter((i) => i !== index) : [...shown, index]));
      button.addEventListener("dblclick", () => show(shown.size === 1 && shown.has(index) ? data.groups.keys() : [index]));
      return button;
    });
    const mark = () => buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(shown.has(i))));
    const show = (groups) => {
      const wanted = [...groups];
      shown.clear();
      wanted.forEach((group) => shown.add(group));
      mark();
      draw();
    };
    mark();
    document.getElementById("legend").append(...buttons);
  }

  // ---- Layers ----

  function layerSection() {
    if (data.layers.length === 0) return;
    document.getElementById("layers").hidden = false;
    const select = document.getElementById("layers-run");
    const holder = document.getElementById("layers-panels");
    select.append(...data.layers.map((entry) => element("option", { textContent: entry.run })));
    const showRun = () => {
      const { panels, depth } = data.layers[select.selectedIndex];
      layers.plots.forEach(({ plot }) => Plotly.purge(plot));
      holder.replaceChildren();
      layers = { plots: cards(holder, panels, () => "panel"), depth };
      drawLayers();
    };
    select.addEventListener("change", showRun);
    showRun();
  }

  // ---- Samples ----

  function samples() {
    if (data.samples.length === 0) return;
    document.getElementById("samples").hidden = false;
    const select = document.getElementById("sample-run");
    const text = document.getElementById("sample-text");
    select.append(...data.samples.map((entry) => element("option", { textContent: entry.run })));
    const slider = document.getElementById("sample-index");
    const list = () => data.samples[select.selectedIndex].samples;
    const showSample = () => {
      const { step, prime, text: drawn } = list()[slider.valueAsNumber];
      document.getElementById("sample-step").textContent = step.toLocaleString("en");
      text.replaceChildren(element("span", { className: "prime", textContent: prime }), drawn);
    };
    const showRun = () => {
      slider.max = list().length - 1;
      slider.value = slider.max;
      slider.disabled = list().length === 1;
      showSample();
    };
    select.addEventListener("change", showRun);
    slider.addEventListener("input", showSample);
    showRun();
  }

  legend();
  choice(document.getElementById("axis"), data.axes.map((each) => each.label), 0, (index) => {
    axis = data.axes[index];
    draw();
  });
  choice(document.getElementById("scale"), ["linear", "log"], 0, (index) => {
    scale = ["linear", "log"][index];
    draw();
  });
  layerSection();
  samples();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
