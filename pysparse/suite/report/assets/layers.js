// Sparsity of each layer, a panel for each model; recipes with the same sparsities are one line.
const SAME = 5; // thousandths: below this nobody sees a difference

const layerSettings = () => unique(DATA.rows.filter((row) => row.layers).map((row) => row.setting));

function buildLayers() {
  if (!one("#layers .panels")) return;
  const found = layerSettings();
  // The middle of the grid is telling: at low sparsities allocations hardly differ, at high ones they saturate.
  if (!found.includes(settings.layer)) settings.layer = found[Math.floor(found.length / 2)] || "";
  one("#layers .controls").append(selector("sparsity", "layer", found.map((value) => [value, value])));
  listeners.push(drawLayers);
}

function drawLayers() {
  const panels = new Map();
  for (const row of visible()) {
    if (!row.layers || row.setting !== settings.layer) continue;
    const key = JSON.stringify([row.task, row.model, row.layout]);
    if (!panels.has(key)) panels.set(key, []);
    panels.get(key).push(row);
  }
  const box = one("#layers .panels");
  box.replaceChildren(...[...panels.values()].map(layerPanel));
  if (!panels.size) box.append(html("p", { class: "empty" }, "Nothing to draw: no result that is shown has layers at this sparsity."));
}

function profiles(rows) {
  const found = [];
  for (const row of rows) {
    const same = found.find((one) => one.values.every((value, index) => Math.abs(value - row.layers[index]) < SAME));
    if (same) same.rows.push(row); else found.push({ values: row.layers, rows: [row] });
  }
  return found;
}

function layerPanel(rows) {
  const first = rows[0];
  const names = DATA.layouts[first.layout];
  const lines = profiles(rows);
  const right = WIDTH - 74;
  const xDomain = [0, Math.max(1, names.length - 1)];
  const yDomain = [0, 1];
  const x = scale(xDomain, LEFT + 4, right - 4);
  const y = scale(yDomain, HEIGHT - BOTTOM, TOP);
  const label = `${first.model}, ${first.task}: sparsity of ${names.length} layers in ${lines.length} distinct profiles. Arrow keys walk the layers.`;
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "group", "aria-label": label });
  svg.append(...axes({ x, y, xDomain, yDomain, right }, null, (value) => `${Math.round(100 * value)}%`));
  svg.append(draw("text", { x: LEFT + 4, y: HEIGHT - BOTTOM + 13 }, "first layer"), draw("text", { x: right - 4, y: HEIGHT - BOTTOM + 13, "text-anchor": "end" }, `${names.length}th`));
  const points = [];
  for (const line of lines) {
    const classes = colorOf("allocation", line.rows[0].allocation);
    const places = line.values.map((value, index) => ({ x: x(index), y: y(value / 1000), index, line }));
    svg.append(draw("path", { class: `curve ${classes}`, d: places.map((place, index) => `${index ? "L" : "M"}${place.x.toFixed(1)} ${place.y.toFixed(1)}`).join("") }));
    if (names.length === 1) svg.append(marker("circle", places[0].x, places[0].y, 3, { class: `point front ${classes}` }));
    points.push(...places);
  }
  svg.append(...endLabels(lines, y, right));
  points.sort((a, b) => a.index - b.index || a.y - b.y);
  walkable(svg, points, (point) => layerTip(point, names), null);
  return html("figure", { class: "panel", "data-model": first.model }, html("figcaption", {}, first.model, " ", html("small", {}, `${first.task}, ${first.setting}`)), svg);
}

const lineName = (line) => unique(line.rows.map((row) => row.allocation)).join(", ");

// The allocations' names at the ends of their lines, moved apart; one name for all lines of an allocation.
function endLabels(lines, y, right) {
  const ends = new Map();
  for (const line of lines) {
    const name = lineName(line);
    if (!ends.has(name)) ends.set(name, []);
    ends.get(name).push(y(line.values[line.values.length - 1] / 1000));
  }
  const labels = [...ends].map(([name, places]) => ({ name, y: places.reduce((sum, place) => sum + place, 0) / places.length }));
  labels.sort((a, b) => a.y - b.y);
  for (let index = 1; index < labels.length; index += 1) labels[index].y = Math.max(labels[index].y, labels[index - 1].y + 11);
  const over = labels.length ? labels[labels.length - 1].y - (HEIGHT - BOTTOM) : 0;
  if (over > 0) {
    labels[labels.length - 1].y -= over;
    for (let index = labels.length - 2; index >= 0; index -= 1) labels[index].y = Math.min(labels[index].y, labels[index + 1].y - 11);
  }
  const cut = (name) => (name.length > 13 ? `${name.slice(0, 12)}…` : name);
  return labels.map((label) => draw("text", { class: `label ${colorOf("allocation", label.name.split(", ")[0])}`, x: right + 2, y: label.y + 3.5 }, cut(label.name)));
}

function layerTip(point, names) {
  const [name, shape] = names[point.index];
  const recipes = unique(point.line.rows.map((row) => row.recipe));
  const shown = recipes.slice(0, 6).join(", ") + (recipes.length > 6 ? ` and ${recipes.length - 6} more` : "");
  return [html("b", {}, name), facts([["shape", shape], ["sparsity", `${(point.line.values[point.index] / 10).toFixed(1)}%`], ["allocation", lineName(point.line)]]), shown];
}
