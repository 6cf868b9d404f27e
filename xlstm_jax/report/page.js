"use strict";
// Draws the charts of a report from the JSON in #data. Plotly is loaded before this file.

const report = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const NUM_COLORS = 6; // --run-0 ... of page.css
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const PRINTED = {width: 680, height: 230}; // pixels; the width fits between the margins of a page
const MAX_MARKED = 60; // longer curves are drawn without markers
const MAX_NAMED_BLOCKS = 12;
const TIMES = [["days", 86400], ["hours", 3600], ["minutes", 60], ["seconds", 1]];
const CONFIG = {
  responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"],
  showSendToCloud: false, plotlyServerURL: "", // the page sends nothing
};

const hidden = new Set(); // indices of runs
const controls = document.getElementById("controls");
const gateControls = document.getElementById("gate-controls");
// On a touch screen a drag scrolls the page.
const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";

const isPrinting = () => root.classList.contains("printing");
const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const line = (i) => ({color: color(`--run-${i % NUM_COLORS}`), dash: DASHES[Math.floor(i / NUM_COLORS) % DASHES.length], width: report.runs.length > 8 ? 1.2 : 1.8});
// Plotly reads a part of HTML in names.
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function timeUnit() {
  const ends = report.runs.map((run) => (run.train.seconds || [0]).at(-1) || 0);
  const longest = Math.max(...ends);
  return TIMES.find(([, size]) => longest >= 2 * size) || TIMES.at(-1);
}

/** Values of a table on the selected x axis, and the title of that axis. */
function xAxis() {
  const name = controls.elements.x.value;
  const [unit, size] = timeUnit();
  const title = {step: "step", tokens_seen: "tokens", seconds: `time in train steps, ${unit}`}[name];
  const values = (table) => (name === "seconds" ? table.seconds?.map((x) => x / size) : table[name]);
  return {name, title, values};
}

function template() {
  const axis = {gridcolor: color("--grid"), zerolinecolor: color("--line"), linecolor: color("--line"), automargin: true};
  return {layout: {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis,
    font: {color: color("--text"), family: getComputedStyle(root).fontFamily, size: 12},
    hoverlabel: {bgcolor: color("--surface"), bordercolor: color("--line"), font: {color: color("--text")}, align: "left"},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: color("--muted"), activecolor: color("--text")},
  }};
}

function layout(x, y, revision) {
  return {
    template: template(), dragmode, hovermode: "closest", showlegend: false,
    margin: {l: 48, r: 12, t: 28, b: 40},
    xaxis: {title: {text: x.title}, tickformat: x.name === "seconds" ? "" : "~s"},
    yaxis: y,
    uirevision: revision, // the same one keeps the zoom
    ...(isPrinting() ? PRINTED : {autosize: true}),
  };
}

function show(id, traces, options) {
  const plot = document.querySelector(`#chart-${id} .plot`);
  plot.style.height = options.height ? `${options.height}px` : ""; // else that of page.css
  Plotly.react(plot, traces, options, CONFIG);
}

function curve(x, y, steps, name, format, style) {
  return {
    x, y, customdata: steps, meta: escaped(name), name: escaped(name), line: style, connectgaps: false,
    mode: y.length > MAX_MARKED ? "lines" : "lines+markers", marker: {size: 5, color: style.color},
    hovertemplate: `<b>%{meta}</b><br>step %{customdata:,}<br>%{y:${format}}<extra></extra>`,
  };
}

function drawChart(chart) {
  const x = xAxis();
  const select = document.querySelector(`#chart-${chart.id} select`);
  const metric = select ? select.value : chart.metrics[0];
  const traces = report.runs.flatMap((run, i) => {
    const table = run[chart.table];
    const values = x.values(table);
    if (hidden.has(i) || !values || !table[metric]) return [];
    const style = {...line(i), shape: metric === "skipped" ? "hv" : "linear"};
    return [curve(values, table[metric], table.step, run.name, chart.format, style)];
  });
  const isLog = chart.log && controls.elements.log.checked;
  const title = chart.unit || metric.replace(/_/g, " ");
  const y = {title: {text: title}, type: isLog ? "log" : "linear", tickformat: chart.format.endsWith("p") ? ".2~p" : "~g"};
  show(chart.id, traces, layout(x, y, `${x.name} ${metric} ${isLog}`));
}

function drawGates() {
  if (!gateControls) return;
  const [runSelect, statisticSelect] = gateControls.querySelectorAll("select");
  const run = report.runs[runSelect.value];
  const statistic = statisticSelect.value;
  const curves = run.gates.curves[statistic] || [];
  const blocks = [...new Set(curves.map((c) => c.block))];
  const title = `${statistic.replace(/_/g, " ")}, ${run.name}`;
  document.querySelector("#chart-gates h3").textContent = `${title}: by step`;
  document.querySelector("#chart-gates-last h3").textContent = `${title}: last record`;
  drawGateCurves(run.gates, curves, blocks, statistic);
  drawHeatmap(curves, blocks, statistic);
}

function drawGateCurves(gates, curves, blocks, statistic) {
  const x = xAxis();
  const isLog = statistic === "effective_length";
  const traces = curves.map((c) => ({
    ...curve(x.values(gates) || [], c.values, gates.step, `${c.block}, head ${c.head}`, ",.4~r", line(blocks.indexOf(c.block))),
    name: escaped(c.block), legendgroup: c.block, showlegend: c.head === 0,
    ...(curves.length > MAX_NAMED_BLOCKS ? {mode: gates.step.length > 1 ? "lines" : "markers"} : {}),
  }));
  const y = {title: {text: statistic.replace(/_/g, " ") + (isLog ? ", tokens" : "")}, type: isLog ? "log" : "linear", tickformat: "~g"};
  const options = layout(x, y, `${x.name} ${statistic}`);
  options.showlegend = blocks.length > 1 && blocks.length <= MAX_NAMED_BLOCKS;
  options.legend = {orientation: "h", y: 1.02, yanchor: "bottom", title: {text: "block"}};
  options.margin.t = 48;
  show("gates", traces, options);
}

/** The last value of each head; effective lengths span orders of magnitude, so in a log scale. */
function drawHeatmap(curves, blocks, statistic) {
  const isLog = statistic === "effective_length";
  const numHeads = Math.max(0, ...curves.map((c) => c.head + 1));
  const last = (block, head) => curves.find((c) => c.block === block && c.head === head)?.values.findLast((v) => v !== null) ?? null;
  const values = blocks.map((block) => Array.from({length: numHeads}, (_, head) => last(block, head)));
  const scale = (v) => (v === null || (isLog && v <= 0) ? null : isLog ? Math.log10(v) : v);
  const ends = values.flat().filter((v) => v > 0).map(Math.log10);
  const powers = Array.from({length: 20}, (_, n) => n - 3).filter((n) => n >= Math.min(...ends) && n <= Math.max(...ends));
  const trace = {
    type: "heatmap", z: values.map((row) => row.map(scale)), customdata: values,
    text: values.map((row) => row.map((v) => (v === null ? "" : String(Number(v.toPrecision(3)))))),
    x: Array.from({length: numHeads}, (_, head) => head), y: blocks.map(escaped),
    colorscale: "Cividis", xgap: 1, ygap: 1, 
    colorbar: {thickness: 12, outlinewidth: 0, ...(isLog ? {tickvals: powers, ticktext: powers.map((n) => String(10 ** n))} : {})},
    hovertemplate: "block %{y}, head %{x}<br>%{customdata:,.4~r}<extra></extra>",
    texttemplate: blocks.length * numHeads <= 64 ? "%{text}" : "",
  };
  const options = layout({name: "head", title: "head"}, {title: {text: "block"}, type: "category", autorange: "reversed"}, statistic);
  options.xaxis = {title: {text: "head"}, dtick: Math.ceil(numHeads / 16), showgrid: false};
  options.height = Math.max(200, 26 * Math.min(blocks.length, 48) + 90);
  show("gates-last", [trace], options);
}

function drawAll() {
  report.charts.forEach(drawChart);
  drawGates();
}

/** Lists the shown runs below each chart; only printed pages show this. */
function writeKeys() {
  const entries = [...controls.querySelectorAll("[data-run]")].filter((box) => box.checked);
  for (const chart of report.charts) {
    const key = document.querySelector(`#chart-${chart.id} .key`);
    key.replaceChildren(...entries.map((box) => {
      const entry = document.createElement("span");
      entry.className = "run";
      entry.append(box.nextElementSibling.cloneNode(true), ` ${report.runs[box.dataset.run].name}`);
      return entry;
    }));
  }
}

function setPrinting(isPrinted) {
  if (isPrinted === isPrinting()) return;
  root.classList.toggle("printing", isPrinted); // page.css has light colors for it
  writeKeys();
  drawAll();
}

function setRuns(isShown) {
  controls.querySelectorAll("[data-run]").forEach((box) => { box.checked = isShown; });
  controls.dispatchEvent(new Event("change"));
}

for (const name of ["tokens_seen", "seconds"]) {
  const hasIt = report.runs.some((run) => run.train[name]);
  controls.querySelector(`[value="${name}"]`).disabled = !hasIt;
}
controls.reset(); // a reloaded page keeps what was selected before
controls.addEventListener("submit", (event) => event.preventDefault());
controls.addEventListener("change", () => {
  hidden.clear();
  controls.querySelectorAll("[data-run]:not(:checked)").forEach((box) => hidden.add(Number(box.dataset.run)));
  drawAll();
});
document.getElementById("all").addEventListener("click", () => setRuns(true));
document.getElementById("none").addEventListener("click", () => setRuns(false));
document.querySelectorAll("figure select").forEach((select) => select.addEventListener("change", drawAll));
gateControls?.addEventListener("change", drawGates);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
matchMedia("print").addEventListener("change", (event) => setPrinting(event.matches));
addEventListener("beforeprint", () => setPrinting(true));
addEventListener("afterprint", () => setPrinting(false));
drawAll();
