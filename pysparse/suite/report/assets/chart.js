// What the plots share: scales, axes, colours, the tip, and points that the keyboard can walk.
const WIDTH = 300, HEIGHT = 215, LEFT = 40, BOTTOM = 30, TOP = 10;
const COLORS = 8;

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high * (1 + 1e-12) + 1e-12; at += 1) found.push(at * step);
  return found;
}

function extent(values, padding) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const pad = (high - low) * padding;
  return [low - pad, high + pad];
}

const scale = (domain, start, end) => (value) => start + ((value - domain[0]) / (domain[1] - domain[0])) * (end - start);

function axes(frame, xText, yText) {
  const { x, y, xDomain, yDomain, right } = frame;
  const parts = [];
  for (const at of ticks(yDomain[0], yDomain[1], 4)) {
    parts.push(draw("line", { class: "grid", x1: LEFT, x2: right, y1: y(at), y2: y(at) }));
    parts.push(draw("text", { x: LEFT - 5, y: y(at) + 3.5, "text-anchor": "end" }, yText(at)));
  }
  for (const at of xText ? ticks(xDomain[0], xDomain[1], 5) : []) {
    parts.push(draw("text", { x: x(at), y: HEIGHT - BOTTOM + 13, "text-anchor": "middle" }, xText(at)));
  }
  parts.push(draw("line", { class: "axis", x1: LEFT, x2: right, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }));
  return parts;
}

// One colour for a name, whatever is filtered; beyond the eighth they begin again.
const colorOrder = {};
function colorOf(key, value) {
  colorOrder[key] ||= unique(DATA.rows.map((row) => facetValue(row, key))).sort(NATURAL.compare);
  return `s${colorOrder[key].indexOf(value) % COLORS}`;
}

function marker(shape, x, y, size, attributes) {
  if (shape === "diamond") return draw("path", { ...attributes, d: `M${x} ${y - size * 1.3}L${x + size * 1.3} ${y}L${x} ${y + size * 1.3}L${x - size * 1.3} ${y}Z` });
  if (shape === "square") return draw("rect", { ...attributes, x: x - size, y: y - size, width: 2 * size, height: 2 * size });
  return draw("circle", { ...attributes, cx: x, cy: y, r: size });
}
const shapeOf = (pattern) => (pattern === "unstructured" ? "circle" : /^\d+:\d+$/.test(pattern) ? "diamond" : "square");

const tip = {
  node: null,
  show(content, clientX, clientY, pinned) {
    this.node ||= one("#tip");
    this.node.replaceChildren(...content);
    this.node.classList.toggle("pinned", Boolean(pinned));
    this.node.hidden = false;
    const box = this.node.getBoundingClientRect();
    const left = clientX + 14 + box.width > innerWidth ? clientX - box.width - 14 : clientX + 14;
    const top = clientY + 14 + box.height > innerHeight ? clientY - box.height - 14 : clientY + 14;
    this.node.style.left = `${Math.max(8, Math.min(left, innerWidth - box.width - 8))}px`;
    this.node.style.top = `${Math.max(8, top)}px`;
  },
  hide() { if (this.node) this.node.hidden = true; },
  get pinned() { return Boolean(this.node) && !this.node.hidden && this.node.classList.contains("pinned"); },
};
document.addEventListener("click", (event) => { if (!event.target.closest("#tip, .panel svg")) tip.hide(); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hide(); });
for (const moved of ["wheel", "touchmove"]) document.addEventListener(moved, () => tip.hide(), { passive: true });

const facts = (pairs) => html("table", {}, html("tbody", {}, pairs.map(([name, value]) => html("tr", {}, html("td", {}, name), html("td", {}, value)))));

// Makes a panel's points reachable: the nearest by pointer, one after the other by the arrow keys.
// `points` are {x, y} in the panel's units; `content(point, pinned)` makes the tip.
function walkable(svg, points, content, choose) {
  let at = -1;
  const ring = draw("circle", { class: "ring", r: 7, visibility: "hidden" });
  svg.append(ring);
  const mark = (index, pinned, where) => {
    at = index;
    const point = points[index];
    fill(ring, { cx: point.x, cy: point.y, visibility: "visible" }, []);
    const box = svg.getBoundingClientRect();
    const place = where || { clientX: box.left + (point.x / WIDTH) * box.width, clientY: box.top + (point.y / HEIGHT) * box.height };
    tip.show(content(point, pinned), place.clientX, place.clientY, pinned);
  };
  const leave = () => { ring.setAttribute("visibility", "hidden"); tip.hide(); };
  const nearest = (event) => {
    const box = svg.getBoundingClientRect();
    const [x, y] = [((event.clientX - box.left) / box.width) * WIDTH, ((event.clientY - box.top) / box.height) * HEIGHT];
    let [best, distance] = [-1, 22];
    points.forEach((point, index) => {
      const away = Math.hypot(point.x - x, point.y - y);
      if (away < distance) [best, distance] = [index, away];
    });
    return best;
  };
  svg.addEventListener("pointermove", (event) => {
    if (tip.pinned) return;
    const index = nearest(event);
    if (index >= 0) mark(index, false, event); else leave();
  });
  svg.addEventListener("pointerleave", () => { if (!tip.pinned) leave(); });
  svg.addEventListener("click", (event) => {
    const index = nearest(event);
    if (index >= 0) mark(index, true, event); else leave();
  });
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible") && points.length) mark(Math.max(at, 0), false); });
  svg.addEventListener("blur", () => { if (!tip.pinned) leave(); });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (step && points.length) {
      event.preventDefault();
      mark((at + step + points.length) % points.length, false);
    } else if (event.key === "Enter" && at >= 0 && choose) {
      event.preventDefault();
      leave();
      choose(points[at]);
    }
  });
}
