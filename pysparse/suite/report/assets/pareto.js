// Quality against speed: a panel for each model, the front marked.
const GAP = 5; // between labels
let highlighted = null; // a name of the legend

const xChoices = () => {
  const names = unique(DATA.rows.flatMap((row) => row.speed.map((speed) => speed[0])));
  const choices = names.length ? [["speed", "speed-up over dense"]] : [];
  if (names.length > 1) choices.push(...names.map((name) => [`speed:${name}`, `speed-up: ${name}`]));
  if (DATA.rows.some((row) => row.file)) choices.push(["file", "times smaller file"]);
  return [...choices, ["sparsity", "sparsity"]];
};
const COLOR_CHOICES = [["method", "method"], ["recipe", "recipe"], ["allocation", "allocation"], ["reconstruction", "reconstruction"], ["pattern", "pattern"]];

function speedOf(row, choice) {
  return choice === "speed" ? row.speed[0] : row.speed.find((speed) => `speed:${speed[0]}` === choice);
}

function xOf(row, choice) {
  if (choice === "file") return row.file ? 1 / row.file[0] : null;
  if (choice === "sparsity") return row.achieved ? row.achieved[0] : row.sparsity;
  const speed = speedOf(row, choice);
  return speed ? speed[4] : null;
}

// Larger is better in what this returns; the axis turns where the metric itself is better low.
function yOf(row, choice) {
  if (choice === "kept") return row.kept ? 100 * row.kept[0] : null;
  return row.quality ? row.quality[0] : null;
}
const better = (row, value, choice) => (choice === "kept" || row.up ? value : -value);

// Points that no other is as good as in both and better in one, by x.
function frontOf(points) {
  const order = [...points].sort((a, b) => b.px - a.px || b.py - a.py);
  const found = [];
  let best = -Infinity;
  for (const point of order) {
    const last = found[found.length - 1];
    if (point.py > best || (last && point.px === last.px && point.py === last.py)) {
      found.push(point);
      best = Math.max(best, point.py);
    }
  }
  return found.reverse();
}

function paretoPanels() {
  const { x: xChoice, y: yChoice } = settings;
  const panels = new Map();
  for (const row of visible()) {
    const [xValue, yValue] = [xOf(row, xChoice), yOf(row, yChoice)];
    if (xValue === null || yValue === null) continue;
    const key = JSON.stringify([row.task, row.model]);
    if (!panels.has(key)) panels.set(key, []);
    panels.get(key).push({ row, xValue, yValue, px: xValue, py: better(row, yValue, yChoice) });
  }
  return [...panels.values()];
}

function drawPareto() {
  const box = one("#pareto .panels");
  const panels = paretoPanels();
  const everything = panels.flat();
  // The metric itself differs from task to task: its axis is shared inside a task only.
  const group = (points) => (settings.shared !== "yes" ? points : settings.y === "kept" ? everything : everything.filter((other) => other.row.task === points[0].row.task));
  box.replaceChildren(...panels.map((points) => paretoPanel(points, settings.shared === "yes" ? everything : points, group(points))));
  const missing = visible().length - everything.length;
  if (!everything.length) box.append(html("p", { class: "empty" }, "Nothing to draw: no result that is shown has both figures."));
  else if (missing) box.append(html("p", { class: "empty" }, `${missing} results lack one of the two figures and are not drawn.`));
  drawLegend(everything);
}

function paretoPanel(points, xPeers, yPeers) {
  const first = points[0].row;
  const reference = { file: 1, sparsity: 0 }[settings.x] ?? 1;
  const dense = settings.y === "kept" ? 100 : middle(first.dense);
  const right = WIDTH - 8;
  const xDomain = extent([...xPeers.map((point) => point.xValue), reference], 0.06);
  const yValues = [...yPeers.map((point) => point.yValue), ...(dense === null ? [] : [dense])];
  let yDomain = extent(yValues, 0.07);
  if (settings.y === "kept") yDomain = [Math.max(yDomain[0], Math.min(0, ...yValues)), yDomain[1]];
  const turned = settings.y !== "kept" && !first.up;
  const x = scale(xDomain, LEFT, right);
  const y = turned ? scale(yDomain, TOP, HEIGHT - BOTTOM) : scale(yDomain, HEIGHT - BOTTOM, TOP);
  const front = new Set(frontOf(points));
  for (const point of points) Object.assign(point, { x: x(point.xValue), y: y(point.yValue), front: front.has(point) });
  points.sort((a, b) => a.x - b.x || a.y - b.y);

  const xText = settings.x === "sparsity" ? (value) => `${Math.round(100 * value)}%` : (value) => `${+value.toFixed(2)}×`;
  const yText = settings.y === "kept" ? (value) => `${Math.round(value)}%` : show.figure;
  const label = `${first.model}, ${first.task}: ${points.length} results, ${front.size} on the front. Arrow keys walk the points, Enter shows one in the table.`;
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "group", "aria-label": label });
  svg.append(...axes({ x, y, xDomain, yDomain, right }, xText, yText));
  svg.append(draw("line", { class: "dense", x1: x(reference), x2: x(reference), y1: TOP, y2: HEIGHT - BOTTOM }));
  if (dense !== null) svg.append(draw("line", { class: "dense", x1: LEFT, x2: right, y1: y(dense), y2: y(dense) }));
  svg.append(draw("path", { class: "frontier", d: staircase([...front]) }));
  for (const point of points.filter((p) => !p.front)) svg.append(pointMark(point, x, y));
  for (const point of front) svg.append(spreadMarks(point, x, y), pointMark(point, x, y));
  svg.append(...frontLabels([...front], right));
  walkable(svg, points, (point, pinned) => pointTip(point, pinned), (point) => openRow(point.row));
  const axisNote = `${settings.y === "kept" ? "quality kept" : `${first.metric}${turned ? ", low is up" : ""}`} / ${xNote(first)}`;
  return html("figure", { class: "panel", "data-task": first.task, "data-model": first.model },
    html("figcaption", {}, first.model, " ", html("small", {}, `${first.task}, ${axisNote}`)), svg);
}

function xNote(row) {
  if (settings.x === "file") return "times smaller file";
  if (settings.x === "sparsity") return "sparsity";
  const speed = speedOf(row, settings.x);
  return speed ? `speed-up, ${speed[0]}` : "speed-up";
}

function staircase(front) {
  return front.map((point, index) => (index ? `V${point.y}H${point.x}` : `M${point.x} ${point.y}`)).join("");
}

const tone = (row) => `${colorOf(settings.color, row[settings.color])}${highlighted !== null && highlighted !== row[settings.color] ? " dim" : ""}`;

function pointMark(point) {
  const classes = `point ${tone(point.row)}${point.front ? " front" : ""}`;
  return marker(shapeOf(point.row.pattern), point.x, point.y, point.front ? 4.2 : 3.4, { class: classes, "data-row": DATA.rows.indexOf(point.row) });
}

function spreadMarks(point, x, y) {
  const group = draw("g", { class: `spread ${tone(point.row)}` });
  const found = settings.y === "kept" ? point.row.kept && point.row.kept.map((value) => 100 * value) : point.row.quality;
  if (found) group.append(draw("line", { x1: point.x, x2: point.x, y1: y(found[1]), y2: y(found[2]) }));
  const speed = settings.x.startsWith("speed") ? speedOf(point.row, settings.x) : null;
  if (speed) group.append(draw("line", { y1: point.y, y2: point.y, x1: Math.max(LEFT, x(speed[5])), x2: Math.min(WIDTH - 2, x(speed[6])) }));
  return group;
}

// Names beside the points of the front where there is room: above and to the right of it nothing lies.
function frontLabels(front, right) {
  const taken = [];
  const labels = [];
  for (const point of front) {
    const text = `${point.row.recipe} ${point.row.setting}`;
    const width = text.length * 5.6;
    const end = point.x + 7 + width > right;
    const left = end ? point.x - 6 - width : point.x + 7;
    const box = { left, right: left + width, top: point.y - 15, bottom: point.y - 3 };
    const clash = (other) => box.left < other.right + GAP && other.left < box.right + GAP && box.top < other.bottom && other.top < box.bottom;
    const covers = front.some((other) => other !== point && other.x > box.left - 4 && other.x < box.right + 4 && other.y > box.top - 3 && other.y < box.bottom + 3);
    if (text.length > 34 || left < LEFT || box.top < -4 || covers || taken.some(clash)) continue;
    taken.push(box);
    labels.push(draw("text", { class: `label ${tone(point.row)}`, x: end ? point.x - 6 : point.x + 7, y: point.y - 5, "text-anchor": end ? "end" : "start" }, text));
  }
  return labels;
}

function pointTip(point, pinned) {
  const row = point.row;
  const pairs = [
    [`${row.metric} (dense ${show.figure(middle(row.dense))})`, show.figure(middle(row.quality))],
    ["over the seeds", show.range(row.quality, show.figure, row.cells.length)],
    ["quality kept", show.percent(middle(row.kept))],
    ...row.speed.map((speed) => [`${speed[0]} (p10 .. p90)`, `${show.times(speed[4])} (${speed[5].toFixed(2)} .. ${speed[6].toFixed(2)})`]),
    ["file of the dense one's", show.percent(middle(row.file))],
  ];
  const title = html("b", {}, `${row.recipe}, ${row.setting}${point.front ? " (on the front)" : ""}`);
  const button = html("button", { type: "button", onclick: () => { tip.hide(); openRow(row); } }, "Show in the table");
  return [title, `${row.model}, ${row.task}`, facts(pairs), ...(pinned ? [button] : [])];
}

function drawLegend(points) {
  const values = unique(points.map((point) => point.row[settings.color])).sort(NATURAL.compare);
  if (highlighted !== null && !values.includes(highlighted)) highlighted = null;
  const entries = values.map((value) => {
    const sign = draw("svg", { viewBox: "0 0 12 12", "aria-hidden": "true", class: colorOf(settings.color, value) }, marker("circle", 6, 6, 4.5, { class: "point front" }));
    const button = html("button", { type: "button", class: "quiet", "aria-pressed": String(value === highlighted) }, sign, value || "(none)");
    button.addEventListener("click", () => {
      highlighted = highlighted === value ? null : value;
      drawPareto();
      const again = all("#pareto .legend button").find((other) => other.textContent === (value || "(none)"));
      if (again) again.focus();
    });
    return button;
  });
  const shapes = unique(points.map((point) => shapeOf(point.row.pattern)));
  const names = { circle: "● unstructured", diamond: "◆ n:m", square: "■ other patterns" };
  const note = shapes.length > 1 ? [html("span", { class: "about" }, shapes.map((shape) => names[shape]).join("  "))] : [];
  one("#pareto .legend").replaceChildren(...entries, ...note);
}

function buildPareto() {
  one("#pareto .controls").append(
    selector("across", "x", xChoices()),
    selector("up", "y", [["kept", "quality kept, of dense"], ["value", "the metric itself"]]),
    selector("colour", "color", COLOR_CHOICES.filter(([key]) => key === "method" || unique(DATA.rows.map((row) => row[key])).length > 1)),
    selector("axes", "shared", [["yes", "the same in all panels"], ["no", "own for each panel"]]));
  listeners.push(drawPareto);
}
