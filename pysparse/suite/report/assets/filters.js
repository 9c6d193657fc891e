// Filters: a choice of values for each property; nothing chosen means all. The choice lives in the address too.
const FACETS = [
  ["task", "Task"], ["model", "Model"], ["family", "Family"], ["method", "Method"], ["allocation", "Allocation"],
  ["reconstruction", "Reconstruction"], ["pattern", "Pattern"], ["sparsity", "Sparsity"],
];
const chosen = Object.fromEntries(FACETS.map(([key]) => [key, new Set()]));
const settings = { x: "speed", y: "kept", color: "method", shared: "yes", layer: "" };
const listeners = [];

const facetText = (key, value) => (key === "sparsity" ? `${+(100 * value).toFixed(4)}%` : String(value) || "(none)");
const facetValue = (row, key) => (key === "sparsity" ? String(row.sparsity) : row[key]);
const passes = (row, except) => FACETS.every(([key]) => key === except || !chosen[key].size || chosen[key].has(facetValue(row, key)));
const visible = () => DATA.rows.filter((row) => passes(row));

function changed() {
  writeAddress();
  markFacets();
  for (const listener of listeners) listener();
}

function writeAddress() {
  const pairs = new URLSearchParams();
  for (const [key] of FACETS) for (const value of chosen[key]) pairs.append(key, value);
  for (const [key, value] of Object.entries(settings)) if (value !== DEFAULTS[key]) pairs.append(`plot-${key}`, value);
  const text = pairs.toString();
  try { history.replaceState(null, "", text ? `#?${text}` : location.pathname + location.search); } catch { /* some file viewers forbid it */ }
}

function readAddress() {
  if (!location.hash.startsWith("#?")) return;
  for (const [key, value] of new URLSearchParams(location.hash.slice(2))) {
    if (key in chosen && DATA.rows.some((row) => facetValue(row, key) === value)) chosen[key].add(value);
    if (key.startsWith("plot-") && key.slice(5) in settings) settings[key.slice(5)] = value;
  }
}

function buildFacets() {
  const box = one(".facets");
  for (const [key, title] of FACETS) {
    const values = unique(DATA.rows.map((row) => facetValue(row, key))).sort(NATURAL.compare);
    if (values.length < 2) continue;
    const list = html("div", { role: "group", "aria-label": title }, values.map((value) => choice(key, value)));
    box.append(html("details", { class: "facet", "data-key": key }, html("summary", {}, `${title} `, html("b", {}, "all")), list));
  }
  box.append(html("button", { type: "button", class: "reset", onclick: reset }, "Show all"));
  document.addEventListener("click", (event) => closeFacets(event.target.closest(".facet")));
  document.addEventListener("keydown", escapeFacet);
}

function choice(key, value) {
  const input = html("input", { type: "checkbox", value, checked: chosen[key].has(value) });
  input.addEventListener("change", () => {
    if (input.checked) chosen[key].add(value); else chosen[key].delete(value);
    changed();
  });
  return html("label", {}, input, html("span", {}, facetText(key, value)));
}

function reset() {
  for (const [key] of FACETS) chosen[key].clear();
  for (const input of all(".facet input")) input.checked = false;
  changed();
}

function closeFacets(except) {
  for (const facet of all(".facet[open]")) if (facet !== except) facet.open = false;
}

function escapeFacet(event) {
  const open = one(".facet[open]");
  if (event.key !== "Escape" || !open) return;
  open.open = false;
  one("summary", open).focus();
}

function markFacets() {
  for (const facet of all(".facet")) {
    const key = facet.dataset.key;
    const values = [...chosen[key]];
    facet.classList.toggle("on", values.length > 0);
    one("summary b", facet).textContent = !values.length ? "all" : values.length === 1 ? facetText(key, values[0]) : `${values.length} chosen`;
  }
  const [shown, total] = [visible().length, DATA.rows.length];
  one(".shown").textContent = shown === total ? `All ${total} results are shown.` : `${shown} of ${total} results are shown.`;
}

function selector(title, key, options) {
  if (!options.some(([value]) => value === settings[key])) settings[key] = options.length ? options[0][0] : "";
  const select = html("select", { name: key }, options.map(([value, text]) => html("option", { value, selected: value === settings[key] }, text)));
  select.addEventListener("change", () => { settings[key] = select.value; changed(); });
  return html("label", {}, title, select);
}
