// The curves: what is drawn, and what the reader does with it.

const steps = data.charts.flatMap((chart) =>
  chart.lines.flatMap((line) => [line.x[0], line.x[line.x.length - 1]]),
);
const first = steps.reduce((a, b) => Math.min(a, b), Infinity);
const last = steps.reduce((a, b) => Math.max(a, b), -Infinity);
// A run of one step has a range, too.
const everything = last > first ? [first, last] : [first - 1, last + 1];
let zoom = memory.zoom || everything;
let isLog = Boolean(memory.log);
// The weight of what was before in the line of each curve; 0 is none.
let smoothing = memory.smoothing || 0;
const hidden = new Set();
const plots = [];

function colorOf(chart, number) {
  const index = data.runs.length > 1 ? chart.lines[number].run : number;
  return [`--c${index % NUM_COLORS}`, Math.floor(index / NUM_COLORS)];
}

const keyOf = (line) =>
  data.runs.length > 1 ? `run ${line.run}` : `curve ${line.name}`;

// An exponential mean of the points, as TensorBoard draws it.
function smoothed(values) {
  if (!smoothing) return values;
  let mean = 0;
  let weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = smoothing * mean + (1 - smoothing) * value;
    weight = smoothing * weight + 1 - smoothing;
    return mean / weight;
  });
}

function seriesOf(chart) {
  const series = [{ label: "step" }];
  const bands = [];
  const tables = [];
  const places = [];
  chart.lines.forEach((line, number) => {
    const [name, dash] = colorOf(chart, number);
    const show = !hidden.has(keyOf(line));
    places.push(series.length);
    series.push({
      label: line.name,
      show,
      stroke: () => style(name),
      dash: DASHES[dash % DASHES.length],
      width: 1.5,
      points: { show: line.x.length < 60, size: 5 },
    });
    const table = [line.x, smoothed(line.y)];
    if (smoothing && !line.low) {
      // Behind it stand the values themselves.
      series.push({
        show,
        stroke: () => `${style(name)}55`,
        width: 1,
        points: { show: false },
      });
      table.push(line.y);
    }
    if (line.low) {
      // Between the least and the greatest it is shaded.
      const edge = { show, stroke: () => "transparent", points: { show: false } };
      series.push({ ...edge, label: "high" }, { ...edge, label: "low" });
      table.push(line.high, line.low);
      bands.push({
        series: [series.length - 2, series.length - 1],
        fill: () => `${style(name)}38`,
      });
    }
    tables.push(table);
  });
  return { series, bands, places, values: uPlot.join(tables) };
}

function isPositive(chart) {
  return chart.lines.every((line) =>
    (line.low || line.y).every((value) => value === null || value > 0),
  );
}

function drawn(chart, element) {
  const { series, bands, places, values } = seriesOf(chart);
  const stroke = () => style("--soft");
  const grid = { stroke: () => style("--line"), width: 1 };
  const options = {
    width: Math.max(element.clientWidth, 200),
    height: 240,
    padding: [8, 24, 0, 0],
    legend: { show: false },
    scales: {
      x: { time: false },
      y: isLog && isPositive(chart) ? { distr: 3 } : {},
    },
    axes: [
      { stroke, grid, ticks: grid, values: (_, ticks) => ticks.map(axis) },
      { stroke, grid, ticks: grid, size: 64,
        values: (_, ticks) => ticks.map(short) },
    ],
    cursor: {
      sync: {
        key: "steps",
        scales: ["x", null],
        // What is selected on one chart zooms all, by a call of its own.
        filters: { pub: (kind) => kind === "mousemove" || kind === "mouseleave" },
      },
      drag: { x: true, y: false, setScale: false },
      bind: { dblclick: () => () => zoomTo(everything) },
    },
    series,
    bands,
    hooks: {
      draw: [(plot) => drawMarks(plot, chart)],
      setCursor: [(plot) => read(plot, chart, places, element)],
      setSelect: [(plot) => select(plot)],
    },
  };
  return new uPlot(options, values, element);
}

function axis(step) {
  if (step === null || step % 1) return "";
  if (step >= 1e6) return `${step / 1e6}M`;
  return step >= 1e4 ? `${step / 1e3}k` : whole(step);
}

function select(plot) {
  if (plot.select.width < 4) return;
  const left = plot.posToVal(plot.select.left, "x");
  const right = plot.posToVal(plot.select.left + plot.select.width, "x");
  plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  zoomTo([left, right]);
}

function zoomTo([low, high]) {
  const length = Math.min(
    Math.max(high - low, 2),
    everything[1] - everything[0],
  );
  const start = Math.min(
    Math.max(low, everything[0]),
    everything[1] - length,
  );
  zoom = [start, start + length];
  // What shows all goes on to do so when there are more steps.
  const isAll = zoom[0] === everything[0] && zoom[1] === everything[1];
  remember("zoom", isAll ? null : zoom);
  const [min, max] = zoom;
  for (const { plot } of plots) plot.setScale("x", { min, max });
  find("#range").textContent = `steps ${whole(min)} to ${whole(max)}`;
}

function zoomBy(factor, around = (zoom[0] + zoom[1]) / 2) {
  zoomTo(zoom.map((edge) => around + (edge - around) * factor));
}

function panBy(share) {
  const distance = (zoom[1] - zoom[0]) * share;
  zoomTo(zoom.map((edge) => edge + distance));
}

function drawMarks(plot, chart) {
  const shown = new Set(
    chart.lines.filter((line) => !hidden.has(keyOf(line))).map((l) => l.run),
  );
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.lineWidth = 1;
  for (const mark of data.marks) {
    if (!shown.has(mark.run) || mark.step < zoom[0] || mark.step > zoom[1])
      continue;
    const x = Math.round(plot.valToPos(mark.step, "x", true)) + 0.5;
    ctx.setLineDash(mark.kind === "restart" ? [2, 4] : [5, 3]);
    ctx.strokeStyle = style(mark.kind === "back" ? "--c8" : "--mark");
    line(ctx, x, bbox.top, x, bbox.top + bbox.height);
  }
  chart.lines.forEach(({ floor, ...one }, number) => {
    if (floor === null || hidden.has(keyOf(one))) return;
    const y = Math.round(plot.valToPos(floor, "y", true)) + 0.5;
    if (!(y >= bbox.top && y <= bbox.top + bbox.height)) return;
    ctx.setLineDash([1, 3]);
    ctx.strokeStyle = style(colorOf(chart, number)[0]);
    line(ctx, bbox.left, y, bbox.left + bbox.width, y);
  });
  ctx.restore();
}

function line(ctx, x0, y0, x1, y1) {
  ctx.beginPath();
  ctx.moveTo(x0, y0);
  ctx.lineTo(x1, y1);
  ctx.stroke();
}

// Writes the values at the cursor beside the names of the curves.
function read(plot, chart, places, element) {
  const index = plot.cursor.idx;
  const outputs = all("output", element.parentElement);
  chart.lines.forEach((one, number) => {
    const at = nearest(plot.data[places[number]], index);
    let text = "";
    if (at !== null) {
      // Not smoothed, where that value is there, too.
      const raw = smoothing && !one.low ? 1 : 0;
      text = short(plot.data[places[number] + raw][at]);
      if (one.low)
        text += ` (${short(plot.data[places[number] + 2][at])} to ${short(
          plot.data[places[number] + 1][at],
        )})`;
    }
    outputs[number].textContent = text;
  });
  const step = index === null || index === undefined ? null : plot.data[0][index];
  find(".at", element.parentElement).textContent =
    step === null ? "" : `step ${whole(step)}`;
}

// A curve has values at some of the steps of its chart.
function nearest(values, index) {
  if (index === null || index === undefined) return null;
  for (let far = 0; far < values.length; far++)
    for (const at of [index - far, index + far])
      if (values[at] !== null && values[at] !== undefined) return at;
  return null;
}

function moveCursor(plot, to) {
  const left = plot.valToPos(to, "x");
  plot.setCursor({ left, top: plot.over.clientHeight / 2 });
}

// Returns the next step, or the one before, that a chart has a point at.
function stepAt(plot, direction) {
  const xs = plot.data[0];
  let index = plot.cursor.idx;
  if (index === null || index === undefined) {
    index = xs.findIndex((x) => x >= zoom[0]);
    if (index < 0) index = 0;
  } else index = Math.min(Math.max(index + direction, 0), xs.length - 1);
  return xs[index];
}

function onKey(event, plot) {
  const step = plot.cursor.idx != null ? plot.data[0][plot.cursor.idx] : undefined;
  const moves = {
    ArrowLeft: () => moveCursor(plot, stepAt(plot, -1)),
    ArrowRight: () => moveCursor(plot, stepAt(plot, 1)),
    "+": () => zoomBy(0.5, step),
    "=": () => zoomBy(0.5, step),
    "-": () => zoomBy(2, step),
    "0": () => zoomTo(everything),
    Escape: () => zoomTo(everything),
    PageUp: () => panBy(-0.5),
    PageDown: () => panBy(0.5),
  };
  const move = moves[event.key];
  if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
  move();
  event.preventDefault();
}

// A finger moves the cursor, two of them zoom.
function onTouch(plot) {
  const over = plot.over;
  const at = (touch) =>
    plot.posToVal(touch.clientX - over.getBoundingClientRect().left, "x");
  let held = null;
  const move = (event) => {
    const touches = [...event.touches];
    if (touches.length === 1) moveCursor(plot, at(touches[0]));
    if (touches.length !== 2) return;
    event.preventDefault();
    const [a, b] = touches
      .map((t) => t.clientX - over.getBoundingClientRect().left)
      .sort((x, y) => x - y);
    if (!held) held = [at(touches[0]), at(touches[1])].sort((x, y) => x - y);
    else if (b - a > 10) {
      const scale = (held[1] - held[0]) / (b - a);
      const low = held[0] - a * scale;
      zoomTo([low, low + over.clientWidth * scale]);
    }
  };
  over.addEventListener("touchstart", move, { passive: false });
  over.addEventListener("touchmove", move, { passive: false });
  over.addEventListener("touchend", () => (held = null));
}

function draw() {
  for (const { plot } of plots) plot.destroy();
  plots.length = 0;
  all(".plot").forEach((element, number) => {
    const plot = drawn(data.charts[number], element);
    onTouch(plot);
    plots.push({ plot, element });
  });
  zoomTo(zoom);
}

function toggle(key) {
  if (!hidden.delete(key)) hidden.add(key);
  for (const button of all(".curve"))
    button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.key)));
  draw();
}

if (data.charts.length) {
  for (const button of all(".curve"))
    button.addEventListener("click", () => toggle(button.dataset.key));
  all(".plot").forEach((element, number) => {
    element.addEventListener("keydown", (event) =>
      onKey(event, plots[number].plot),
    );
  });
  const acts = {
    in: () => zoomBy(0.5),
    out: () => zoomBy(2),
    left: () => panBy(-0.5),
    right: () => panBy(0.5),
    whole: () => zoomTo(everything),
  };
  for (const button of all("[data-zoom]"))
    button.addEventListener("click", acts[button.dataset.zoom]);
  const smooth = find("#smooth");
  smooth.value = String(smoothing);
  smooth.addEventListener("input", () => {
    smoothing = Number(smooth.value);
    remember("smoothing", smoothing);
    draw();
  });
  const log = find("#log");
  log.checked = isLog;
  log.addEventListener("change", () => {
    isLog = log.checked;
    remember("log", isLog);
    draw();
  });
  draw();
  new ResizeObserver(() => {
    for (const { plot, element } of plots)
      plot.setSize({ width: Math.max(element.clientWidth, 200), height: 240 });
  }).observe(find(".charts"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
