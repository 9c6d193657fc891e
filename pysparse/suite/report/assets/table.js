// All results: sortable, a line can be opened for its seeds and their commands.
const COLUMNS = [
  { key: "recipe", title: "Recipe", value: (row) => row.recipe },
  { key: "model", title: "Model", value: (row) => row.model },
  { key: "setting", title: "Sparsity", value: (row) => row.sparsity, text: (row) => row.setting, number: true },
  { key: "kept", title: "Quality kept", value: (row) => middle(row.kept), text: (row) => show.percent(middle(row.kept)), under: (row) => show.range(row.kept, show.percent, row.cells.length), number: true },
  { key: "quality", title: "Metric", value: (row) => middle(row.quality), text: (row) => show.figure(middle(row.quality)), under: (row) => `${row.metric}, dense ${show.figure(middle(row.dense))}`, number: true },
  { key: "speed", title: "Speed-up", value: (row) => (row.speed[0] ? row.speed[0][4] : null), text: (row) => (row.speed[0] ? show.times(row.speed[0][4]) : "–"), under: (row) => (row.speed[0] ? `${row.speed[0][0]}, ${row.speed[0][5].toFixed(2)} .. ${row.speed[0][6].toFixed(2)}` : ""), number: true },
  { key: "file", title: "File", value: (row) => middle(row.file), text: (row) => show.percent(middle(row.file)), number: true },
  { key: "achieved", title: "Achieved", value: (row) => middle(row.achieved), text: (row) => show.percent(middle(row.achieved)), number: true },
  { key: "prune", title: "Pruning", value: (row) => middle(row.prune), text: (row) => show.seconds(middle(row.prune)), number: true },
  { key: "memory", title: "Peak memory", value: (row) => middle(row.memory), text: (row) => show.bytes(middle(row.memory)), number: true },
  { key: "method", title: "Method", value: (row) => row.method },
  { key: "allocation", title: "Allocation", value: (row) => row.allocation },
  { key: "reconstruction", title: "Reconstruction", value: (row) => row.reconstruction },
  { key: "task", title: "Task", value: (row) => row.task },
  { key: "seeds", title: "Seeds", value: (row) => row.cells.length, text: (row) => String(row.cells.length), number: true },
];
const order = { key: null, down: false };
const opened = new Set();
const lines = new Map(); // row -> its line

function buildTable() {
  const head = html("tr", {}, COLUMNS.map((column) => {
    const button = html("button", { type: "button", onclick: () => sortBy(column.key) }, column.title);
    return html("th", { scope: "col", class: column.number ? "n" : null, "data-key": column.key }, button);
  }));
  one("table.results").append(html("thead", {}, head), html("tbody", {}));
  for (const row of DATA.rows) lines.set(row, line(row));
  listeners.push(drawTable);
}

function line(row) {
  const opener = html("button", { type: "button", class: "quiet opener", "aria-expanded": "false", onclick: () => toggle(row) }, row.recipe);
  const cells = COLUMNS.slice(1).map((column) => {
    const under = column.under ? column.under(row) : "";
    return html("td", { class: column.number ? "n" : null }, column.text ? column.text(row) : column.value(row), under ? html("small", {}, under) : null);
  });
  return html("tr", { "data-row": DATA.rows.indexOf(row) }, html("th", { scope: "row" }, opener), cells);
}

function sortBy(key) {
  const column = COLUMNS.find((one) => one.key === key);
  if (order.key === key) order.down = !order.down;
  else Object.assign(order, { key, down: Boolean(column.number) && !["setting", "file", "prune", "memory"].includes(key) });
  drawTable();
}

function sorted(rows) {
  const column = COLUMNS.find((one) => one.key === order.key);
  if (!column) return rows;
  const compare = column.number ? (a, b) => a - b : NATURAL.compare;
  return [...rows].sort((a, b) => {
    const [first, second] = [column.value(a), column.value(b)];
    if (first === null || second === null) return (first === null) - (second === null); // what is missing stays last
    return (order.down ? -1 : 1) * compare(first, second);
  });
}

function drawTable() {
  for (const cell of all("table.results thead th")) {
    if (cell.dataset.key === order.key) cell.setAttribute("aria-sort", order.down ? "descending" : "ascending");
    else cell.removeAttribute("aria-sort");
  }
  const body = [];
  for (const row of sorted(visible())) {
    body.push(lines.get(row));
    if (opened.has(row)) body.push(detail(row));
  }
  if (!body.length) body.push(html("tr", {}, html("td", { colspan: COLUMNS.length, class: "empty" }, "No result passes the filters.")));
  one("table.results tbody").replaceChildren(...body);
}

function toggle(row) {
  if (opened.has(row)) opened.delete(row); else opened.add(row);
  const button = one(".opener", lines.get(row));
  button.setAttribute("aria-expanded", String(opened.has(row)));
  const next = lines.get(row).nextElementSibling;
  if (opened.has(row)) lines.get(row).after(detail(row));
  else if (next && next.classList.contains("detail")) next.remove();
}

function detail(row) {
  const pairs = [
    ...row.speed.map((speed) => [speed[0], `${show.figure(speed[2])} to ${show.figure(speed[3])} ${speed[1]}, ${show.times(speed[4])} (${speed[5].toFixed(2)} .. ${speed[6].toFixed(2)})`]),
    ...Object.entries(row.others).map(([name, found]) => [name.replaceAll("_", " "), show.figure(middle(found))]),
    ["parameters", row.parameters ? Math.round(row.parameters[0]).toLocaleString("en") : "–"],
    ["pattern", row.pattern], ["family", row.family || "–"],
  ];
  const seeds = row.cells.map((cell) => html("div", { class: "seed" },
    html("div", { class: "facts" }, fact("seed", cell.seed), fact(row.metric, show.figure(cell.quality)), fact("kept", show.percent(cell.kept)), fact("took", show.seconds(cell.seconds)), fact("started", cell.started.replace("T", " ") || "–"), fact("cell", cell.id)),
    command(cell.command)));
  const inside = html("div", { class: "inside" }, html("div", { class: "facts" }, pairs.map(([name, value]) => fact(name, value))), html("div", { class: "seeds" }, seeds));
  return html("tr", { class: "detail" }, html("td", { colspan: COLUMNS.length }, inside));
}

const fact = (name, value) => html("span", {}, `${name} `, html("b", {}, String(value)));

function openRow(row) {
  if (!opened.has(row)) toggle(row);
  const found = lines.get(row);
  for (const other of all("tr.found")) other.classList.remove("found");
  found.classList.add("found");
  found.scrollIntoView({ block: "center" });
  one(".opener", found).focus({ preventScroll: true });
}

function buildFailures() {
  const table = one("table.failures");
  if (!table) return;
  const head = html("tr", {}, ["Recipe", "Model", "Sparsity", "Seed", "Error", "Command"].map((title) => html("th", { scope: "col" }, title)));
  const body = html("tbody", {});
  table.append(html("thead", {}, head), body);
  listeners.push(() => {
    const shown = DATA.failed.filter((cell) => ["task", "model", "method", "pattern", "sparsity"].every((key) => !chosen[key].size || chosen[key].has(String(cell[key]))));
    body.replaceChildren(...shown.map((cell) => html("tr", {},
      html("td", {}, html("b", {}, cell.recipe), html("small", {}, ` ${cell.task}`)), html("td", {}, cell.model), html("td", {}, cell.setting), html("td", {}, String(cell.seed)),
      html("td", { class: "message" }, html("b", { class: "bad" }, cell.type), `: ${cell.message}`), html("td", {}, command(cell.command)))));
    if (!shown.length) body.append(html("tr", {}, html("td", { colspan: 6, class: "empty" }, "No failed cell passes the filters.")));
  });
}
