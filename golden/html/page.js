"use strict";
// Draws the detail of one tap and lets keys and clicks choose it. Text is only ever set as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const AXES = {
  T: "position", H: "query head", K: "key/value head", C: "channel", D: "channel", S: "key position",
  N: "expert", A: "expert slot", F: "channel", V: "vocabulary id",
};
const VERDICTS = { match: "within its allowance", diverges: "diverges", "known-deviation": "differs by design" };

function element(name, attributes = {}, ...children) {
  const svg = ["svg", "rect", "line", "path", "text", "title"].includes(name) && attributes.svg !== false;
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function power(exponent) {
  const text = exponent > -3 && exponent < 4 ? String(Number((10 ** exponent).toPrecision(1))) : null;
  return text ?? "10" + String(exponent).replace(/[-\d]/g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
}

function times(value) {
  const size = [[1e9, " billion"], [1e6, " million"], [1e3, " thousand"]].find(([s]) => value >= s && value < 1000 * s);
  return size ? `${Number((value / size[0]).toPrecision(3))}${size[1]}` : number(value);
}

function number(value) {
  if (value === null) return "not known";
  const plain = value === 0 || (value < 1e4 && value >= 1e-3);
  return plain ? String(Number(value.toPrecision(3))) : value.toExponential(1).replace("e+", "e");
}

// --- colours of the maps: calm within the allowance, warm out of it ---

const STOPS = [[-2, 236, 243, 239], [-0.5, 190, 218, 206], [0, 143, 196, 176], [0.6, 74, 150, 130]];
const STOPS_IN_THE_DARK = [[-2, 26, 34, 32], [-0.5, 30, 58, 48], [0, 38, 92, 74], [0.6, 74, 150, 130]];
const WARM = [[0, 250, 188, 92], [1.5, 234, 96, 56], [4, 176, 24, 62], [8, 86, 10, 74]];

function mixed(stops, x) {
  const i = stops.findIndex((stop) => stop[0] >= x);
  if (i === 0) return stops[0].slice(1);
  if (i < 0) return stops[stops.length - 1].slice(1);
  const [a, b] = [stops[i - 1], stops[i]];
  const share = (x - a[0]) / (b[0] - a[0]);
  return [1, 2, 3].map((k) => Math.round(a[k] + share * (b[k] - a[k])));
}

// single values of a tensor that matches may be beyond the allowance, which is for all of them together: no alarm
function colour(decades, calm = false) {
  const limit = Math.log10(data.allowance);
  // what is allowed is stretched or squeezed to end at the allowance
  if (decades > limit && !calm) return mixed(WARM, decades - limit);
  return mixed(dark() ? STOPS_IN_THE_DARK : STOPS, Math.min(decades, limit) - limit + 0.6);
}

// --- a map ---

function extent(map, axis, cell) {
  const [n, cells] = [map.of[axis], map.shape[axis]];
  const from = Math.floor((cell * n) / cells);
  const to = Math.floor(((cell + 1) * n) / cells) - 1;
  return from === to ? `${from}` : `${from} to ${to}`;
}

function valueOf(map, index) {
  const level = map.cells[index];
  return level === data.map.lost ? null : data.map.lowest + data.map.levels.indexOf(level) / data.map.perDecade;
}

function said(map, index, integer) {
  const [row, column] = [Math.floor(index / map.shape[1]), index % map.shape[1]];
  const place = `${AXES[map.axes[0]]} ${extent(map, 0, row)}, ${AXES[map.axes[1]]} ${extent(map, 1, column)}`;
  const value = valueOf(map, index);
  const amount = value === null ? (integer ? "another expert" : "not finite")
    : integer ? "the same expert"
    : value <= data.map.lowest ? `under ${power(data.map.lowest)} ×` : `about ${times(Number((10 ** value).toPrecision(2)))} ×`;
  return `${place}: ${amount}`;
}

function drawMap(map, detail, calm) {
  const [rows, columns] = map.shape;
  const integer = detail.scale === null;
  const canvas = element("canvas", { width: columns, height: rows, role: "img" });
  canvas.style.width = Math.min(440, Math.max(columns * 7, 130)) + "px";
  canvas.style.height = Math.min(240, Math.max(rows * 8, 60)) + "px";
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  let largest = 0;
  const rank = (index) => valueOf(map, index) ?? Infinity;
  for (let i = 0; i < rows * columns; i++) {
    const value = valueOf(map, i);
    const rgb = value === null ? [20, 16, 30] : colour(integer ? -2 : value, calm);
    image.data.set([...rgb, 255], 4 * i);
    if (rank(i) > rank(largest)) largest = i;
  }
  context.putImageData(image, 0, 0);
  const caption = `${AXES[map.axes[0]]}s down, ${AXES[map.axes[1]]}s across`;
  canvas.setAttribute("aria-label", `${caption}. Largest at ${said(map, largest, integer)}`);
  const readout = element("output", {}, `largest: ${said(map, largest, integer)}`);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
    const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
    readout.textContent = said(map, row * columns + column, integer);
  });
  canvas.addEventListener("pointerleave", () => { readout.textContent = `largest: ${said(map, largest, integer)}`; });
  const ends = (axis, name) => element("div", { class: name },
    element("span", {}, "0"), element("span", {}, map.of[axis] > 1 ? String(map.of[axis] - 1) : ""));
  return element("figure", {},
    element("figcaption", {}, `${caption[0].toUpperCase()}${caption.slice(1)}`, element("br"), readout),
    element("div", { class: "map" }, ends(0, "down"), canvas, ends(1, "along")));
}

function scaleBar() {
  const stops = [];
  for (let d = -2; d <= 8; d += 0.25) stops.push(`rgb(${colour(d).join(" ")}) ${((d + 2) * 10).toFixed(1)}%`);
  const bar = element("div", { class: "scale" });
  bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  const labels = element("div", { class: "along" });
  for (const d of [-2, 0, 2, 4, 6, 8]) labels.append(element("span", {}, power(d)));
  return element("figure", {}, element("figcaption", {}, "Colours of the maps: multiples of the noise"),
    element("div", { class: "map" }, bar, labels));
}

// --- the histogram ---

function drawHistogram(detail, calm) {
  const { lowest, bins, perDecade } = data.histogram;
  const counts = detail.histogram;
  const expected = detail.noise_histogram;
  const largest = Math.max(1, ...counts, ...(expected ?? []));
  const [width, height, bar] = [470, 204, 16];
  const [left, top, bottom] = [8, 20, height - 44];
  const x = (decades) => left + (decades - lowest) * perDecade * bar;
  const tall = (count) => (count ? Math.max(2, (count / largest) * (bottom - top)) : 0);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
  const limit = Math.log10(data.allowance);
  const total = counts.reduce((a, b) => a + b, 0);
  let beyond = 0;
  counts.forEach((count, i) => {
    const from = lowest + i / perDecade;
    const out = from + 0.5 / perDecade > limit;
    if (out) beyond += count;
    const h = tall(count);
    svg.append(element("rect", { x: x(from) + 1, y: bottom - h, width: bar - 2, height: h, class: out && !calm ? "beyond" : "within" },
      element("title", {}, `${count} of ${total} elements`)));
  });
  if (expected) {
    let path = `M${x(lowest)} ${bottom}`;
    expected.forEach((count, i) => { path += `V${bottom - tall(count)}H${x(lowest + (i + 1) / perDecade)}`; });
    svg.append(element("path", { d: path + `V${bottom}`, class: "expected" }));
  }
  svg.append(element("line", { x1: x(limit), x2: x(limit), y1: top - 6, y2: bottom, class: "limit" }));
  svg.append(element("text", { x: x(limit) + 5, y: top - 6 }, `${number(data.allowance)} ×`));
  svg.append(element("line", { x1: left, x2: x(lowest + bins / perDecade), y1: bottom, y2: bottom, class: "base" }));
  for (let d = lowest; d <= lowest + bins / perDecade; d += 2) {
    const edge = d === lowest ? "≤ " : "";
    svg.append(element("text", { x: x(d), y: bottom + 14, "text-anchor": d === lowest ? "start" : "middle" }, edge + power(d)));
  }
  const outline = expected ? "; outline: the noise that the profile makes" : "";
  svg.append(element("text", { x: left, y: bottom + 28 }, `times the noise of one element${outline}`));
  const single = `${beyond} single values are beyond ${number(data.allowance)} ×; the tensor and each position are not`;
  if (calm && beyond) svg.append(element("text", { x: left, y: bottom + 42 }, single));
  svg.setAttribute("aria-label", `${beyond} of ${total} elements are more than about ${number(data.allowance)} times the noise off`);
  return svg;
}

// --- one tap ---

function figure(label, value) {
  return element("div", {}, element("dt", {}, label), element("dd", {}, value));
}

// names of taps, those of a layer together, and layers that have the same ones
function together(names) {
  const groups = [];
  for (const name of names) {
    const [, layer, kind] = name.match(/^layers\.(\d+)\.(.*)/) ?? [null, null, name];
    const last = groups[groups.length - 1];
    if (last && layer !== null && last.to === layer) last.kinds.push(kind);
    else groups.push({ from: layer, to: layer, kinds: [kind] });
  }
  const merged = [];
  for (const group of groups) {
    const last = merged[merged.length - 1];
    if (last && last.from !== null && group.from !== null && String(last.kinds) === String(group.kinds)) last.to = group.to;
    else merged.push(group);
  }
  const label = ({ from, to }) => (from === null ? "" : from === to ? `layer ${from}: ` : `layers ${from} to ${to}: `);
  return merged.map((group) => label(group) + group.kinds.join(", ")).join("; ");
}

function show(name) {
  const tap = data.taps[name];
  const kind = name.split(".").pop();
  const about = data.about[kind];
  byId("detail").hidden = false;
  byId("tapname").textContent = name;
  byId("tapmeaning").textContent = about ? `${about.meaning} · [${about.axes.join(", ")}]` : "";
  const ratio = tap.nonfinite ? "values not finite" : tap.ratio === null ? "not known" : `${times(tap.ratio)} × the noise`;
  byId("tapfigures").replaceChildren(
    figure("verdict", VERDICTS[tap.verdict] ?? tap.verdict),
    figure("error", ratio),
    ...(data.forced ? [figure("local error", number(tap.local_error))] : []),
    figure(data.forced ? "inherited error" : "error end to end", number(tap.inherited_error)),
    figure(`noise of ${data.profile}`, number(tap.noise)),
    ...(tap.spans.length ? [figure("judged together with", together(tap.spans))] : []),
    ...(tap.positions ? [figure("computed by the backend", `positions ${tap.positions.join(", ")} alone`)] : []),
    ...(tap.nonfinite ? [figure("not finite", `${tap.nonfinite} values`)] : []),
  );
  drawDetail(tap, about);
  byId("says").textContent = `${name}, ${VERDICTS[tap.verdict] ?? tap.verdict}, ${ratio}`;
  const point = [...document.querySelectorAll("#points [data-open]")].find((node) => node.dataset.open === name);
  const marker = byId("marker");
  if (point) {
    const box = point.getBBox();
    marker.setAttribute("cx", box.x + box.width / 2);
    marker.setAttribute("cy", box.y + box.height / 2);
    marker.setAttribute("visibility", "visible");
  }
}

function drawDetail(tap, about) {
  const detail = tap.detail;
  const pictures = document.querySelector(".pictures");
  pictures.hidden = detail === null;
  byId("element").hidden = detail === null;
  byId("worst").replaceChildren();
  if (detail === null) return;
  const calm = tap.verdict === "match";
  byId("histogram").parentElement.hidden = detail.histogram === null;
  byId("histogram").replaceChildren(...(detail.histogram ? [drawHistogram(detail, calm)] : []));
  const maps = detail.maps.map((map) => drawMap(map, detail, calm));
  byId("maps").replaceChildren(...maps);
  byId("scale").replaceChildren(...(detail.scale === null ? [] : [scaleBar()]));
  const place = detail.worst.at.map((n, i) => `${AXES[about.axes[i]]} ${n}`).join(", ");
  const row = (label, value, name = "", words = true) => element("tr", { class: name },
    element("th", { scope: "row", class: words ? "words" : "" }, label), element("td", {}, value));
  byId("worst").append(
    row("where", `[${detail.worst.at.join(", ")}]   ${place}`),
    row("expected", detail.worst.expected),
    row("got", detail.worst.got, tap.verdict === "diverges" ? "got" : "got fine"),
    ...(detail.operands.length ? [row("computed from", "the backend's own values:")] : []),
    ...detail.operands.map((operand) => row(operand.what, operand.is, "", false)),
  );
}

// --- choosing a tap ---

const cells = [...document.querySelectorAll("#grid [data-tap]")];
const inOrder = Object.keys(data.taps);
let chosen = null;

function choose(name, focus) {
  if (!(name in data.taps)) return;
  for (const cell of cells) {
    const own = cell.dataset.tap === name;
    cell.tabIndex = own ? 0 : -1;
    cell.setAttribute("aria-selected", own);
    if (own && focus) cell.focus();
  }
  chosen = name;
  show(name);
}

function neighbour(cell, key) {
  const line = [...cell.parentElement.children];
  const column = line.indexOf(cell);
  const rows = [...byId("grid").tBodies[0].rows];
  const row = rows.indexOf(cell.parentElement);
  const filled = (nodes) => nodes.find((node) => node && node.dataset.tap);
  if (key === "ArrowRight") return filled(line.slice(column + 1));
  if (key === "ArrowLeft") return filled(line.slice(0, column).reverse());
  if (key === "ArrowDown") return filled(rows.slice(row + 1).map((r) => r.cells[column]));
  if (key === "ArrowUp") return filled(rows.slice(0, row).reverse().map((r) => r.cells[column]));
  if (key === "Home") return filled(line);
  if (key === "End") return filled(line.reverse());
  return undefined;
}

function nextDivergence(step) {
  const wrong = inOrder.filter((name) => data.taps[name].verdict === "diverges");
  const at = inOrder.indexOf(chosen);
  const later = wrong.filter((name) => step * (inOrder.indexOf(name) - at) > 0);
  return step > 0 ? later[0] : later[later.length - 1];
}

document.addEventListener("click", (event) => {
  const target = event.target.closest("[data-tap], [data-open]");
  if (target) choose(target.dataset.tap ?? target.dataset.open, Boolean(target.dataset.tap));
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const cell = event.target.closest?.("#grid [data-tap]");
  if (cell) {
    const next = neighbour(cell, event.key);
    if (next) choose(next.dataset.tap, true);
    if (next || event.key.startsWith("Arrow")) event.preventDefault();
  }
  if (event.key === "n" || event.key === "p") {
    const name = nextDivergence(event.key === "n" ? 1 : -1);
    if (name) choose(name, true);
  }
});

const theme = byId("theme");
const dark = () => {
  const own = document.documentElement.dataset.theme;
  return own ? own === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
const labelTheme = () => { theme.textContent = dark() ? "Light" : "Dark"; };
function recolour() {
  labelTheme();
  if (chosen !== null) show(chosen);
}
theme.hidden = false;
labelTheme();
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  recolour();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);

if (data.opened !== null) choose(data.opened, false);
