// Small helpers: elements, numbers as text, and the charts that the overview shares with the page of a call.
const data = JSON.parse(document.getElementById("data").textContent);
// What was scored of every utterance. The first two lie on the plane, and the rankings are of them.
const DIMENSIONS = Object.keys(data.targets), [FIRST, SECOND] = DIMENSIONS;
// What the table of calls says of a target: its mean, or, of one of the whole call, itself.
const ofCall = (name) => (data.calls[`${name}_mean`] ? `${name}_mean` : name);
const COUNTED = data.of_calls ? "call" : "utterance";
for (const [name, colour] of Object.entries(data.targets)) {
  if (!getComputedStyle(document.documentElement).getPropertyValue(`--${name}`)) document.documentElement.style.setProperty(`--${name}`, colour);
}
document.head.append(Object.assign(document.createElement("style"), { textContent: DIMENSIONS.map((name) => `dd.${name}, .now .${name}, .value.${name} { color: var(--${name}); }`).join(" ") }));
const capital = (name) => name[0].toUpperCase() + name.slice(1);
const listed = (names) => (names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names[names.length - 1]}`);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const number = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−"));
const signed = (value, digits = 3) => (value === null || value === undefined ? "–" : (value > 0 ? "+" : "") + number(value, digits));
const whole = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en-US"));
function clock(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const total = Math.round(seconds), hours = Math.floor(total / 3600);
  const pad = (value) => String(value).padStart(2, "0");
  const minutes = Math.floor((total % 3600) / 60);
  return hours ? `${hours}:${pad(minutes)}:${pad(total % 60)}` : `${minutes}:${pad(total % 60)}`;
}
function length(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 90) return `${seconds.toFixed(0)} s`;
  return seconds < 5400 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
const plural = (n, one) => `${whole(n)} ${one}${n === 1 ? "" : "s"}`;

const linear = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);
function ticks(low, high, wanted) {
  const rough = (high - low) / Math.max(wanted, 1), power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 5, 10].map((m) => m * power).find((m) => m >= rough);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) found.push(value + 0);
  return found;
}
function timeTicks(low, high, wanted) {
  const step = [5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200].find((m) => (high - low) / m <= wanted) || 14400;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) found.push(value);
  return found;
}

// Draw into a card as wide as it is, once it stands on the page and again whenever its width changes.
function responsive(node, draw) {
  let width = 0;
  const fit = () => {
    const now = Math.floor(node.clientWidth);
    if (now && now !== width) { width = now; node.replaceChildren(draw(now)); }
  };
  // In a frame of its own: drawing while sizes are being observed would start the observation anew.
  new ResizeObserver(() => requestAnimationFrame(fit)).observe(node);
  queueMicrotask(fit);
  return node;
}

function histogram(width, counts, low, high, dimension, lowAt) {
  const height = 270, left = 44, bottom = 26, top = 14, right = 14;
  const most = Math.max(...counts, 1);
  const x = linear(low, high, left, width - right), y = linear(0, most, height - bottom, top);
  const part = (high - low) / counts.length;
  const picture = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `Distribution of ${dimension}` });
  for (const tick of ticks(0, most, 3)) {
    picture.append(s("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "grid-line" }));
    picture.append(s("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, tick >= 10000 ? `${tick / 1000}k` : whole(tick)));
  }
  counts.forEach((count, i) => {
    const from = x(low + i * part) + 1, to = x(low + (i + 1) * part) - 1;
    const bar = s("rect", { x: from, width: Math.max(to - from, 1), y: y(count), height: height - bottom - y(count), rx: 2, fill: `var(--${dimension})` });
    bar.append(s("title", {}, `${number(low + i * part)} to ${number(low + (i + 1) * part)}: ${whole(count)}`));
    picture.append(bar);
  });
  if (lowAt !== undefined) {
    picture.append(s("line", { x1: x(lowAt), x2: x(lowAt), y1: top - 6, y2: height - bottom, stroke: "var(--muted)", "stroke-dasharray": "3 3" }));
    picture.append(s("text", { x: x(lowAt) + 5, y: top + 2, class: "halo" }, `low, below ${lowAt}`));
  }
  for (const tick of ticks(low, high, 5)) picture.append(s("text", { x: x(tick), y: height - 8, "text-anchor": "middle" }, number(tick, 1)));
  return picture;
}

// The plane's frame: one target to the right, one upwards; of valence and arousal the quadrants are named.
function planeFrame(width, low, high, across = FIRST, upwards = SECOND) {
  const side = Math.min(width, 380), margin = 34, inner = [margin, side - 10];
  const x = linear(low, high, inner[0], inner[1]), y = linear(low, high, side - margin, 10);
  const picture = s("svg", { viewBox: `0 0 ${side} ${side}`, width: side, height: side, role: "img" });
  const names = across !== "valence" || upwards !== "arousal" ? [] : [["tense", low, high, "start", 16], ["excited", high, high, "end", 16], ["sad", low, low, "start", -8], ["calm", high, low, "end", -8]];
  const finish = () => {
    const middle = (low + high) / 2;
    picture.append(s("line", { x1: x(middle), x2: x(middle), y1: y(low), y2: y(high), class: "axis" }));
    picture.append(s("line", { x1: x(low), x2: x(high), y1: y(middle), y2: y(middle), class: "axis" }));
    picture.append(s("rect", { x: x(low), y: y(high), width: x(high) - x(low), height: y(low) - y(high), fill: "none", class: "axis" }));
    for (const [name, v, a, anchor, dy] of names) picture.append(s("text", { x: x(v) + (anchor === "end" ? -8 : 8), y: y(a) + dy, "text-anchor": anchor, class: "halo" }, name));
    picture.append(s("text", { x: x(middle), y: side - 8, "text-anchor": "middle" }, `${across} →`));
    picture.append(s("text", { x: 14, y: y(middle), "text-anchor": "middle", transform: `rotate(-90 14 ${y(middle)})` }, `${upwards} →`));
    return picture;
  };
  return { picture, x, y, finish };
}

function density(width, plane, low, high, across = FIRST, upwards = SECOND) {
  const { picture, x, y, finish } = planeFrame(width, low, high, across, upwards);
  picture.setAttribute("aria-label", `How many ${COUNTED}s lie where in the plane of ${across} and ${upwards}`);
  const most = Math.max(...plane.flat(), 1), part = (high - low) / plane.length;
  plane.forEach((row, i) => row.forEach((count, j) => {
    if (!count) return;
    const cell = s("rect", {
      x: x(low + j * part), width: x(low + (j + 1) * part) - x(low + j * part) + 0.3,
      y: y(low + (i + 1) * part), height: y(low + i * part) - y(low + (i + 1) * part) + 0.3,
      fill: "var(--accent)", "fill-opacity": 0.08 + 0.92 * Math.sqrt(count / most),
    });
    cell.append(s("title", {}, plural(count, COUNTED)));
    picture.append(cell);
  }));
  return finish();
}

function sparkline(curve, dimension, low, high) {
  const width = 96, height = 26;
  if (!curve) return h("span", {}, "");
  const at = curve.start, values = curve[dimension], known = values.filter((value) => value !== null);
  // Its own range, so that the course shows, but never less than a quarter of the scale, so that noise does not.
  const middle = (Math.min(...known) + Math.max(...known)) / 2;
  const half = Math.max((Math.max(...known) - Math.min(...known)) / 2, (high - low) / 8);
  const x = linear(at[0], at[at.length - 1], 3, width - 3), y = linear(middle - half, middle + half, height - 3, 3);
  const picture = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
  const points = values.map((value, i) => (value === null ? null : `${x(at[i]).toFixed(1)},${y(value).toFixed(1)}`)).filter(Boolean);
  picture.append(s("polyline", { points: points.join(" "), fill: "none", stroke: `var(--${dimension})`, "stroke-width": 1.6, "stroke-linejoin": "round" }));
  return picture;
}
