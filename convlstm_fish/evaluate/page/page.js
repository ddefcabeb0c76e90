"use strict";
(() => {
  const payload = JSON.parse(document.getElementById("payload").textContent);
  const { series, models, events, figures } = payload;
  const $ = (id) => document.getElementById(id);

  /* Little-endian bytes in base64 become a typed array. */
  const unpack = (text, Type) => new Type(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const frames = unpack(series.frames, Int32Array);
  const motion = unpack(series.motion, Float32Array);
  const labels = unpack(series.labels, Uint8Array);
  for (const model of models) model.probability = unpack(model.probability, Float64Array);
  const seconds = (frame) => frame / series.fps;
  const positives = labels.reduce((sum, value) => sum + value, 0);
  const negatives = labels.length - positives;

  let model = models[0];
  let threshold = 0.5;

  /* ---- counting: the same rules as the Python side ---- */
  function rates() {
    let tp = 0, fp = 0;
    for (let i = 0; i < frames.length; i++) {
      if (model.probability[i] >= threshold) { if (labels[i]) tp++; else fp++; }
    }
    return { tp, fp, tpr: tp / positives, fpr: fp / negatives, precision: tp / (tp + fp),
             accuracy: (tp + negatives - fp) / labels.length, j: tp / positives - fp / negatives };
  }

  /* The first index of the ascending array at which the value is at least (or, with above, more than) x. */
  function search(array, x, above = false) {
    let low = 0, high = array.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (above ? array[middle] <= x : array[middle] < x) low = middle + 1; else high = middle;
    }
    return low;
  }

  const end = Math.max(frames[frames.length - 1], ...events.onset.slice(-1)) + 2;
  const announces = new Uint8Array(end);
  events.first.forEach((first, k) => announces.fill(1, first, events.last[k] + 1));

  function alarms() {
    const raised = [];
    let until = -Infinity;
    for (let i = 0; i < frames.length; i++) {
      if (frames[i] < until || !(model.probability[i] >= threshold)) continue;
      const next = search(events.onset, frames[i], true);
      until = Math.min(next < events.onset.length ? events.onset[next] : Infinity, frames[i] + series.horizon);
      raised.push({ at: frames[i], until, right: announces[frames[i]] === 1 });
    }
    const starts = raised.map((alarm) => alarm.at);
    const leads = [];
    events.first.forEach((first, k) => {
      const i = search(starts, first);
      if (i < starts.length && starts[i] <= events.last[k]) leads.push(events.onset[k] - starts[i]);
    });
    leads.sort((a, b) => a - b);
    const half = leads.length >> 1;
    const median = leads.length % 2 ? leads[half] : (leads[half - 1] + leads[half]) / 2;
    return { raised, wrong: raised.filter((alarm) => !alarm.right).length, recalled: leads.length,
             lead: leads.length ? median / series.fps : NaN };
  }

  const minus = (text) => text.replace("-", "\u2212");
  const show = (id, value, digits = 3, unit = "") => {
    $(id).textContent = Number.isFinite(value) ? minus(value.toFixed(digits)) + unit : "not defined";
  };

  /* ---- figures ---- */
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
  const drawn = [];

  function theme(layout) {
    const look = { "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font.color": css("--ink"),
                   "legend.bgcolor": "rgba(0,0,0,0)", "hoverlabel.bgcolor": css("--card"), "hoverlabel.font.color": css("--ink"), "modebar.bgcolor": "rgba(0,0,0,0)", "modebar.color": css("--soft"),
                   "modebar.activecolor": css("--accent") };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) {
        look[`${key}.gridcolor`] = css("--grid");
        look[`${key}.zerolinecolor`] = css("--line");
        look[`${key}.linecolor`] = css("--line");
      }
    }
    return look;
  }

  /* A layout with the look of the page, so that a figure is drawn once and not drawn and then painted over. */
  function themed(layout) {
    const out = structuredClone(layout);
    for (const [path, value] of Object.entries(theme(layout))) {
      const keys = path.split(".");
      const last = keys.pop();
      let part = out;
      for (const key of keys) part = part[key] ??= {};
      part[last] = value;
    }
    return out;
  }

  /* Some figures show the chosen model's part only; their traces say in meta whose they are. */
  const belongs = (trace) => trace.meta?.model === undefined || trace.meta.model === models.indexOf(model);

  async function draw(id, figure) {
    for (const trace of figure.data) trace.visible = belongs(trace);
    await Plotly.newPlot(id, figure.data, themed(figure.layout), config);
    drawn.push(id);
  }

  /* From low to high; each step can be told from its neighbour without colour vision, and from both backgrounds. */
  const ramp = ["#3f74b8", "#5b6fbd", "#7869b8", "#9461ab", "#ac5a9b", "#c15486", "#d2536e", "#de5a54", "#e66a3a", "#ea8021"];
  const scale = ramp.map((colour, i) => [i / (ramp.length - 1), colour]);
  const MOST_POINTS = 6000;

  /* Indices from a to b to draw: all, or where there are too many the most moving one of each bucket. */
  function thin(a, b) {
    const stride = Math.ceil((b - a) / MOST_POINTS);
    const kept = [];
    for (let i = a; i < b; i += stride) {
      let best = i;
      for (let k = i + 1; k < Math.min(i + stride, b); k++) if (motion[k] > motion[best]) best = k;
      kept.push(best);
    }
    return kept;
  }

  /* The line in ten colours, one trace each; NaN breaks a trace where the colour changes or frames are missing. */
  function colouredLine(kept, gap) {
    const lines = ramp.map((colour) => ({ x: [], y: [], mode: "lines", line: { color: colour, width: 1.6 },
                                          hoverinfo: "skip", showlegend: false }));
    let last = -1;
    for (let k = 1; k < kept.length; k++) {
      const i = kept[k], before = kept[k - 1];
      if (frames[i] - frames[before] > gap) { last = -1; continue; }
      const level = Math.min(ramp.length - 1, Math.floor(model.probability[i] * ramp.length));
      const line = lines[level];
      if (level !== last) { line.x.push(NaN, seconds(frames[before])); line.y.push(NaN, motion[before]); }
      line.x.push(seconds(frames[i]));
      line.y.push(motion[i]);
      last = level;
    }
    return lines;
  }

  /* Intervals of frames as one filled trace of boxes of the given height. */
  function boxes(intervals, bottom, top, extra) {
    const x = [], y = [];
    for (const [from, to] of intervals) {
      x.push(seconds(from), seconds(from), seconds(to), seconds(to), NaN);
      y.push(bottom, top, top, bottom, NaN);
    }
    return { x, y, mode: "lines", fill: "toself", line: { width: 0 }, hoverinfo: "skip", ...extra };
  }

  function labelRuns() {
    const runs = [];
    let start = -1;
    for (let i = 0; i <= labels.length; i++) {
      const on = i < labels.length && labels[i] === 1;
      if (on && start < 0) start = frames[i];
      if (!on && start >= 0) { runs.push([start, frames[i - 1] + 1]); start = -1; }
    }
    return runs;
  }

  const typicalGap = frames.length > 1 ? Math.max(1, (frames[frames.length - 1] - frames[0]) / (frames.length - 1)) * 1.5 : 1;
  const whole = [seconds(frames[0]), seconds(frames[frames.length - 1] + 1)];
  let shown = [whole[0], Math.min(whole[1], whole[0] + 60)];
  let highest = 0;
  for (const value of motion) if (value > highest) highest = value;
  highest = highest || 1e-3;
  const runs = labelRuns();

  /* The intervals in sight; those that no screen could keep apart become one. */
  function within(intervals) {
    const nearest = (shown[1] - shown[0]) / 1500 * series.fps;
    const seen = [];
    for (const [from, to] of intervals) {
      if (seconds(to) < shown[0] || seconds(from) > shown[1]) continue;
      const last = seen[seen.length - 1];
      if (last && from - last[1] < nearest) last[1] = to; else seen.push([from, to]);
    }
    return seen;
  }

  /* The alarms have a figure of their own, so that the slider has little to draw. */
  function drawAlarms(counted) {
    const pick = (right) => within(counted.raised.filter((alarm) => alarm.right === right).map((alarm) => [alarm.at, alarm.until]));
    const traces = [
      boxes(pick(true), 0.55, 1, { fillcolor: "#1a9a6c", name: `alarm, a ${payload.event} follows` }),
      boxes(pick(false), 0, 0.45, { fillcolor: "#c0392b", name: "false alarm" }),
    ];
    Plotly.react("fig-alarms", traces, themed({
      margin: { ...MARGIN, t: 4, b: 4 }, showlegend: false,
      xaxis: { range: [...shown], fixedrange: true, showgrid: false, zeroline: false, showticklabels: false },
      yaxis: { range: [0, 1], fixedrange: true, tickvals: [0.22, 0.78], ticktext: ["false alarms", "right alarms"], showgrid: false, zeroline: false },
    }), { responsive: true, displayModeBar: false });
  }

  const MARGIN = { l: 88, r: 96 };

  function seriesTraces() {
    const a = search(frames, Math.floor(shown[0] * series.fps)), b = Math.min(frames.length, search(frames, Math.ceil(shown[1] * series.fps), true) + 1);
    const kept = thin(Math.max(0, a - 1), b);
    const starts = events.onset.filter((onset) => seconds(onset) >= shown[0] && seconds(onset) <= shown[1]);
    const gap = Math.max(typicalGap, kept.length > 1 ? 2 * (frames[kept[kept.length - 1]] - frames[kept[0]]) / kept.length : 1);
    return [
      boxes(within(runs), 0, highest * 1.08, { fillcolor: "rgba(120,130,150,0.36)", name: "label 1" }),
      ...colouredLine(kept, gap),
      { x: starts.map(seconds), y: starts.map(() => highest * 1.1), mode: "markers", name: `a ${payload.event} starts`,
        marker: { symbol: "triangle-down", size: 9, color: css("--ink") }, hovertemplate: payload.event + " at %{x:.2f} s<extra></extra>" },
      { x: kept.map((i) => seconds(frames[i])), y: kept.map((i) => motion[i]), customdata: kept.map((i) => [model.probability[i], labels[i], frames[i]]),
        mode: "markers", marker: { size: 5, opacity: 0, color: kept.map((i) => model.probability[i]), colorscale: scale, cmin: 0, cmax: 1, showscale: true,
          colorbar: { title: { text: "probability", side: "right" }, thickness: 12, outlinewidth: 0, len: 0.9, x: 1.01 } },
        showlegend: false,
        hovertemplate: "frame %{customdata[2]}, %{x:.2f} s<br>motion %{y:.5f}<br>probability %{customdata[0]:.3f}<br>label %{customdata[1]}<extra></extra>" },
    ];
  }

  const seriesLayout = () => ({
    margin: { ...MARGIN, t: 10, b: 78 }, hovermode: "closest", dragmode: "zoom", uirevision: "series",
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0 },
    xaxis: { title: { text: "time within the split (s)" }, range: [...shown], zeroline: false },
    yaxis: { title: { text: "motion (mean |difference| / 255)" }, range: [0, highest * 1.16], fixedrange: true, exponentformat: "power", zeroline: false },
  });

  let following = false;
  async function drawSeries() {
    following = true;
    await Plotly.react("fig-series", seriesTraces(), themed(seriesLayout()), config);
    following = false;
    const all = shown[0] <= whole[0] && shown[1] >= whole[1];
    for (const button of document.querySelectorAll("[data-window]")) {
      const width = button.dataset.window;
      button.setAttribute("aria-pressed", String(width === "all" ? all : !all && Math.abs(shown[1] - shown[0] - Number(width)) < 1e-6));
    }
  }

  function look(from, width) {
    const size = Math.min(width, whole[1] - whole[0]);
    const start = Math.min(Math.max(whole[0], from), whole[1] - size);
    shown = [start, start + size];
    stale = true;
    schedule();
  }

  const bar = (x) => [{ type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: { color: css("--ink"), width: 1.5, dash: "dot" } }];
  const spot = (figure) => figure.data.findIndex((trace) => trace.meta && trace.meta.spot);

  /* ---- one change of threshold or model ---- */
  function update() {
    const r = rates(), counted = alarms();
    show("stat-tpr", r.tpr); show("stat-fpr", r.fpr); show("stat-precision", r.precision);
    show("stat-accuracy", r.accuracy); show("stat-j", r.j);
    show("stat-alarms", counted.raised.length, 0);
    show("stat-false", counted.wrong / series.minutes, 1);
    $("stat-recall").textContent = events.onset.length ? `${counted.recalled} of ${events.onset.length}` : `no ${payload.event}s`;
    show("stat-lead", counted.lead, 2, " s");
    if (figures.roc) {
      const colour = { "marker.line.color": model.colour };
      Plotly.restyle("fig-roc", { x: [[r.fpr]], y: [[r.tpr]], ...colour }, [spot(figures.roc)]);
      Plotly.restyle("fig-pr", { x: [[r.tpr]], y: [[Number.isFinite(r.precision) ? r.precision : 1]], ...colour }, [spot(figures.pr)]);
      Plotly.relayout("fig-thresholds", { shapes: bar(threshold) });
      Plotly.relayout("fig-histogram", { shapes: bar(threshold) });
    }
    drawAlarms(counted);
    if (stale) drawSeries();
    stale = false;
  }

  let waiting = false, stale = true;
  function schedule() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; update(); });
  }

  function setThreshold(value, from) {
    if (!Number.isFinite(value)) return;
    threshold = Math.min(1, Math.max(0, value));
    if (from !== "range") $("threshold").value = threshold;
    if (from !== "number") $("threshold-number").value = threshold.toFixed(3);
    schedule();
  }

  function setModel(index) {
    model = models[index];
    stale = true;
    for (const id of figures.roc ? ["thresholds", "histogram"] : []) {
      if (drawn.includes(`fig-${id}`)) Plotly.restyle(`fig-${id}`, { visible: figures[id].data.map(belongs) });
    }
    $("use-accuracy").disabled = model.best_accuracy === null;
    $("use-j").disabled = model.best_j === null;
    setThreshold(model.best_j ?? 0.5);
  }

  async function start() {
    await drawSeries();
    for (const id of Object.keys(figures)) await draw(`fig-${id}`, figures[id]);
    $("fig-series").on("plotly_relayout", (change) => {
      if (following) return;
      if (change["xaxis.autorange"]) shown = [...whole];
      else if (change["xaxis.range[0]"] !== undefined) shown = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      else return;
      stale = true;
      schedule();
    });
    $("threshold").addEventListener("input", (event) => setThreshold(event.target.valueAsNumber, "range"));
    $("threshold-number").addEventListener("input", (event) => setThreshold(event.target.valueAsNumber, "number"));
    $("use-accuracy").addEventListener("click", () => setThreshold(model.best_accuracy));
    $("use-j").addEventListener("click", () => setThreshold(model.best_j));
    if ($("model")) $("model").addEventListener("change", (event) => setModel(Number(event.target.value)));
    for (const button of document.querySelectorAll("[data-window]")) {
      button.addEventListener("click", () => look(shown[0], button.dataset.window === "all" ? Infinity : Number(button.dataset.window)));
    }
    for (const button of document.querySelectorAll("[data-shift]")) {
      button.addEventListener("click", () => { const width = shown[1] - shown[0]; look(shown[0] + Number(button.dataset.shift) * width * 0.8, width); });
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      for (const id of drawn) Plotly.relayout(id, theme(figures[id.slice(4)].layout));
      stale = true;
      schedule();
    });
    setModel(0);
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    document.documentElement.dataset.ready = "true";
  }
  start();
})();
