"use strict";
// Everything that is shown goes through text nodes and attributes: names of models and errors are not ours.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const html = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const one = (selector, root) => (root || document).querySelector(selector);
const all = (selector, root) => [...(root || document).querySelectorAll(selector)];
const unique = (values) => [...new Set(values)];
const NATURAL = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

const show = {
  figure(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 1e5) return value.toExponential(2);
    return value.toFixed(size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : 3);
  },
  percent: (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)}%`),
  times: (value) => (value === null || value === undefined ? "–" : `${value.toFixed(2)}×`),
  seconds(value) {
    if (value === null || value === undefined) return "–";
    return value < 100 ? `${value.toFixed(value < 1 ? 2 : 1)} s` : value < 6000 ? `${(value / 60).toFixed(1)} min` : `${(value / 3600).toFixed(1)} h`;
  },
  bytes(value) {
    if (value === null || value === undefined) return "–";
    return value < 1e9 ? `${(value / 1e6).toFixed(0)} MB` : `${(value / 1e9).toFixed(2)} GB`;
  },
  // A statistic is [median, lowest, highest] of the seeds.
  range(found, format, seeds) {
    if (!found || seeds === 1) return found ? "one seed" : "";
    return found[1] === found[2] ? `the same for ${seeds} seeds` : `${format(found[1])} .. ${format(found[2])}`;
  },
};
const middle = (found) => (found ? found[0] : null);

function copyButton(text) {
  const button = html("button", { type: "button", class: "copy", "aria-label": `Copy: ${text}` }, "Copy");
  button.addEventListener("click", async () => {
    button.textContent = (await copy(text)) ? "Copied" : "Select and copy by hand";
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // a page from a file may not have the clipboard; the old way needs a selection
    const area = html("textarea", { readonly: true }, text);
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

const command = (text) => html("div", { class: "command" }, html("code", {}, text || "not recorded"), text ? copyButton(text) : null);
