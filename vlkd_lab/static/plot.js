// Draws lines, points and tables in panels side by side. The figure is one value in Python (vlkd_lab.widgets.PlotView); what a person has
// smoothed and hidden is state there too, so that a page that is loaded again shows it as it was. All text goes in as text, never as HTML.

const FAINT = 0.28; // opacity of a line behind its smoothed one
const NEAR = 14; // CSS pixels from the pointer to a point
const DRAGGED = 5; // CSS pixels: less is a click
const NARROW = 560; // CSS pixels: panels stand one below the other
const MOST_WIDTH = 1600; // CSS pixels: wider curves are no clearer
const USUAL = 830; // CSS pixels: the width that heights are meant for
const TALLEST = 1.7; // times as high at most, where the page is wide
const DASHES = { solid: [], dash: [7, 4], dot: [2, 3], dashdot: [7, 3, 2, 3] };
const MISSING = 255; // the byte of an entry that is not a number
const STRIP = 60; // pictures that a lasso shows at most

// ---- the value that Python sends

function floats(bytes) {
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
}

function bytesOf(view) {
  return new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
}

function unpacked(value) {
  // Lines share their steps, so arrays travel once and lines name them by number.
  const arrays = (value.arrays ?? []).map(floats);
  const traces = (value.traces ?? []).map((trace) => ({ ...trace, x: arrays[trace.x], y: arrays[trace.y], ids: arrays[trace.ids], groups: arrays[trace.groups] }));
  return { ...value, panels: value.panels ?? [], traces, marks: value.marks ?? [], notes: value.notes ?? [] };
}

// ---- numbers

function said(value) {
  // A value in three digits.
  const size = Math.abs(value);
  if (!Number.isFinite(value)) return "–";
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en").replace("-", "−");
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(1).replaceAll("-", "−").replace("e+", "e");
  return String(+value.toPrecision(3)).replace("-", "−");
}

function tickText(value, step) {
  // As many places as the steps between ticks need.
  const size = Math.abs(value);
  if (size >= 1e4) return `${+(value / (size >= 1e6 ? 1e6 : 1e3)).toPrecision(4)}${size >= 1e6 ? "M" : "k"}`.replace("-", "−");
  if (size !== 0 && size < 1e-4) return value.toExponential().replaceAll("-", "−");
  const places = Math.min(Math.max(0, -Math.floor(Math.log10(step) + 1e-9)), 8);
  return value.toFixed(places).replace("-", "−");
}

function evenTicks(low, high, most) {
  const rough = (high - low) / Math.max(most, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].reduce((best, each) => (Math.abs(Math.log(each * power / rough)) < Math.abs(Math.log(best * power / rough)) ? each : best));
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push({ at: k * step, text: tickText(k * step, step) });
  return ticks;
}

function logTicks(low, high, most) {
  // 1, 2 and 5 of every decade where they have room, else 1 and 3, else whole decades; less than a decade is even.
  const decades = Math.log10(high / low);
  if (decades < 0.7) return evenTicks(low, high, most).filter((tick) => tick.at > 0);
  const factors = decades * 3 <= most ? [1, 2, 5] : decades * 2 <= most ? [1, 3] : [1];
  const skip = Math.max(1, Math.ceil(decades / most));
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const factor of factors) {
      const at = factor * 10 ** power;
      const inside = at >= low * 0.999 && at <= high * 1.001;
      if (inside && (power % skip === 0 || factor > 1)) ticks.push({ at, text: tickText(at, 10 ** power) });
    }
  return ticks;
}

function smoothed(values, weight) {
  // An exponential mean that begins unbiased; what is missing stays missing.
  let sum = 0, total = 0;
  return values.map((value) => {
    if (!Number.isFinite(value)) return NaN;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + 1 - weight;
    return sum / total;
  });
}

function nearest(values, wanted) {
  // The place of the value that is nearest to another; −1 where there is none.
  let best = -1;
  for (let k = 0; k < values.length; k++)
    if (Number.isFinite(values[k]) && (best < 0 || Math.abs(values[k] - wanted) < Math.abs(values[best] - wanted))) best = k;
  return best;
}

// ---- an axis

class Axis {
  // From values to pixels and back.
  constructor(spec, range, from, to) {
    this.spec = spec;
    this.into = spec.log ? Math.log10 : (value) => value;
    this.back = spec.log ? (value) => 10 ** value : (value) => value;
    [this.low, this.high] = range;
    [this.from, this.to] = [from, to];
    const [low, high] = range.map(this.into);
    this.slope = (to - from) / (high - low || 1);
    this.start = low;
  }

  pixel(value) {
    return this.from + (this.into(value) - this.start) * this.slope;
  }

  value(pixel) {
    return this.back((pixel - this.from) / this.slope + this.start);
  }

  ticks() {
    if (this.spec.ticks) return this.spec.ticks.map((text, at) => ({ at, text }));
    const most = Math.abs(this.to - this.from) / (this.spec.across ? 50 : 26);
    return this.spec.log ? logTicks(this.low, this.high, most) : evenTicks(this.low, this.high, most);
  }
}

function valuesOf(trace, letter) {
  // What the range of an axis is taken from; a cell of a table reaches half a step beyond its number.
  if (trace.kind === "table") return [-0.5, (letter === "x" ? trace.columns : trace.rows) - 0.5];
  return trace[letter];
}

function rangeOf(arrays, spec, margin) {
  // The ends of an axis: of what is known, with a little room; from zero where the axis begins there.
  let low = Infinity, high = -Infinity;
  for (const values of arrays)
    for (const value of values)
      if (Number.isFinite(value) && !(spec.log && value <= 0)) {
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
  if (spec.range) [low, high] = spec.range;
  else if (low > high) [low, high] = spec.log ? [0.1, 1] : [0, 1];
  else if (spec.log) {
    const room = low === high ? 2 : (high / low) ** margin;
    [low, high] = [low / room, high * room];
  } else {
    const room = low === high ? Math.abs(low) / 2 || 0.5 : (high - low) * margin;
    low = spec.zero && low >= 0 ? 0 : low - room;
    high += room;
  }
  return spec.reversed ? [high, low] : [low, high];
}

// ---- a panel

function stackedPlaces(figure) {
  // Where the page is narrow, one panel below the other, each as high as it was.
  const [, top, , bottom] = figure.margin;
  const inner = figure.height - top - bottom;
  const heights = figure.panels.map(({ place }) => (place[3] - place[2]) * inner);
  const whole = heights.reduce((sum, height) => sum + height + top + bottom, 0) - top - bottom;
  let down = 0;
  const panels = figure.panels.map((panel, k) => {
    const place = [0, 1, 1 - (down + heights[k]) / whole, 1 - down / whole];
    down += heights[k] + top + bottom;
    return { ...panel, place };
  });
  return { ...figure, panels, height: whole + top + bottom };
}

function grown(figure, width) {
  // Higher panels where the page is wide, if the figure is one that grows.
  const [, top, , bottom] = figure.margin ?? [0, 0, 0, 0];
  if (!figure.grows || width <= USUAL) return figure;
  return { ...figure, height: top + bottom + (figure.height - top - bottom) * Math.min(width / USUAL, TALLEST) };
}

function isLowest(panel, panels) {
  // Whether no other panel stands below with the same steps, which would name them.
  const isBelow = (other) => other.place[3] <= panel.place[2] && other.place[0] < panel.place[1] && other.place[1] > panel.place[0];
  return !panels.some((other) => isBelow(other) && other.titles.x === panel.titles.x);
}

function panelsOf(figure, size, zoom, isHidden) {
  // Every panel with its place and its axes.
  const [left, top, right, bottom] = figure.margin;
  const inner = { width: size.width - left - right, height: size.height - top - bottom };
  return figure.panels.map((panel, number) => {
    const [x0, x1, y0, y1] = panel.place;
    const box = { x: left + x0 * inner.width, width: (x1 - x0) * inner.width, y: top + (1 - y1) * inner.height, height: (y1 - y0) * inner.height };
    const own = (k) => figure.traces.filter((trace) => trace.panel === k && !isHidden(trace));
    const together = figure.panels.map((_, k) => k).filter((k) => figure.panels[k].x.title === panel.x.title && !panel.x.ticks);
    const beside = (panel.x.ticks ? [number] : together).flatMap(own);
    const hasPoints = own(number).some((trace) => trace.kind === "points");
    const hasTable = own(number).some((trace) => trace.kind === "table");
    const range = (traces, letter, margin) => rangeOf(traces.map((trace) => valuesOf(trace, letter)), panel[letter], hasTable ? 0 : margin);
    const x = zoom.x[panel.x.title] ?? range(beside, "x", hasPoints ? 0.05 : 0);
    const y = zoom.y[panel.y.title] ?? range(own(number), "y", 0.06);
    const across = new Axis({ ...panel.x, across: true }, x, box.x, box.x + box.width);
    const up = new Axis(panel.y, y, box.y + box.height, box.y);
    return { ...panel, number, box, x: across, y: up, titles: { x: panel.x.title, y: panel.y.title } };
  });
}

function isInside(box, x, y) {
  return x >= box.x && x <= box.x + box.width && y >= box.y && y <= box.y + box.height;
}

// ---- drawing on the canvas

function grid(pen, panel, theme) {
  const { box } = panel;
  pen.lineWidth = 1;
  pen.strokeStyle = theme.faint;
  pen.setLineDash([]);
  pen.beginPath();
  if (!panel.x.spec.ticks)
    for (const { at } of panel.x.ticks()) {
      const x = Math.round(panel.x.pixel(at)) + 0.5;
      pen.moveTo(x, box.y);
      pen.lineTo(x, box.y + box.height);
    }
  if (!panel.y.spec.ticks)
    for (const { at } of panel.y.ticks()) {
      const y = Math.round(panel.y.pixel(at)) + 0.5;
      pen.moveTo(box.x, y);
      pen.lineTo(box.x + box.width, y);
    }
  pen.stroke();
}

function path(pen, panel, x, y) {
  // A line with a gap where a value is missing; how many points it has.
  let count = 0, isDown = false;
  pen.beginPath();
  for (let k = 0; k < x.length; k++) {
    const [px, py] = [panel.x.pixel(x[k]), panel.y.pixel(y[k])];
    const known = Number.isFinite(px) && Number.isFinite(py);
    if (known && isDown) pen.lineTo(px, py);
    else if (known) pen.moveTo(px, py);
    isDown = known;
    count += known;
  }
  pen.stroke();
  return count;
}

function spot(pen, symbol, x, y, radius) {
  pen.beginPath();
  if (symbol === "x") {
    pen.moveTo(x - radius, y - radius);
    pen.lineTo(x + radius, y + radius);
    pen.moveTo(x - radius, y + radius);
    pen.lineTo(x + radius, y - radius);
    pen.stroke();
    return;
  }
  if (symbol === "diamond") {
    pen.moveTo(x, y - 1.3 * radius);
    for (const [dx, dy] of [[1.3, 0], [0, 1.3], [-1.3, 0]]) pen.lineTo(x + dx * radius, y + dy * radius);
  } else pen.arc(x, y, radius, 0, 2 * Math.PI);
  pen.fill();
}

function colourOf(trace, theme) {
  // The colour of each point: one for all, one of a few, or one of a scale of bytes.
  if (!trace.which) {
    const colour = legible(trace.colour, theme, 3);
    return () => colour;
  }
  const which = bytesOf(trace.which);
  const few = trace.scale ? [] : trace.colours.map((colour) => legible(colour, theme, 3));
  const scale = trace.scale && bytesOf(trace.scale);
  return (k) => (trace.scale ? `rgb(${[0, 1, 2].map((c) => scale[3 * which[k] + c]).join()})` : few[which[k]]);
}

function points(pen, panel, trace, theme) {
  const colour = colourOf(trace, theme);
  const radius = trace.size / 2;
  let count = 0;
  pen.lineWidth = 1.4;
  pen.setLineDash([]);
  for (let k = 0; k < trace.x.length; k++) {
    const [x, y] = [panel.x.pixel(trace.x[k]), panel.y.pixel(trace.y[k])];
    if (!Number.isFinite(x) || !Number.isFinite(y)) continue;
    pen.fillStyle = pen.strokeStyle = colour(k);
    spot(pen, trace.symbol, x, y, radius);
    count += 1;
  }
  return count;
}

function line(pen, panel, trace, theme, weight) {
  const colour = legible(trace.colour, theme, 3);
  pen.strokeStyle = colour;
  pen.lineJoin = "round";
  pen.lineWidth = trace.width;
  pen.setLineDash(DASHES[trace.dash] ?? []);
  const smooth = weight > 0 && trace.kind === "line";
  pen.globalAlpha = smooth ? FAINT : 1;
  const count = path(pen, panel, trace.x, trace.y);
  pen.globalAlpha = 1;
  if (smooth) path(pen, panel, trace.x, smoothed(trace.y, weight));
  if (trace.kind === "both") points(pen, panel, trace, theme);
  return count;
}

function table(pen, panel, trace) {
  // A matrix, its first row on top.
  const [bytes, scale] = [bytesOf(trace.which), bytesOf(trace.scale)];
  const image = new ImageData(trace.columns, trace.rows);
  bytes.forEach((byte, k) => {
    for (let c = 0; c < 3; c++) image.data[4 * k + c] = byte === MISSING ? 128 : scale[3 * byte + c];
    image.data[4 * k + 3] = byte === MISSING ? 40 : 255;
  });
  const small = make("canvas", { width: trace.columns, height: trace.rows });
  small.getContext("2d").putImageData(image, 0, 0);
  pen.imageSmoothingEnabled = false;
  const [x0, x1] = [-0.5, trace.columns - 0.5].map((at) => panel.x.pixel(at));
  const [y0, y1] = [-0.5, trace.rows - 0.5].map((at) => panel.y.pixel(at));
  pen.drawImage(small, x0, y0, x1 - x0, y1 - y0);
  return bytes.length;
}

function colourBar(pen, panel, trace) {
  const { x, y, width, height } = panel.box;
  const scale = bytesOf(trace.scale);
  for (let k = 0; k < height; k++) {
    const byte = Math.round((1 - k / Math.max(height - 1, 1)) * (MISSING - 1));
    pen.fillStyle = `rgb(${[0, 1, 2].map((c) => scale[3 * byte + c]).join()})`;
    pen.fillRect(x + width + 6, y + k, 8, 1.5);
  }
}

// ---- words, as SVG above the canvas

function words(parent, x, y, text, properties = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", "text");
  for (const [name, value] of Object.entries({ x, y, ...properties })) element.setAttribute(name, value);
  element.textContent = text;
  parent.append(element);
  return element;
}

function severalLines(parent, x, y, text, properties) {
  const lines = text.split("\n");
  lines.forEach((each, k) => words(parent, x, y + 11 * (k - (lines.length - 1) / 2), each, properties));
}

function stroke(parent, x1, y1, x2, y2, colour) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", "line");
  for (const [name, value] of Object.entries({ x1, y1, x2, y2, stroke: colour })) element.setAttribute(name, value);
  parent.append(element);
}

function axisWords(svg, panel, isNamed) {
  const { box } = panel;
  const below = box.y + box.height;
  stroke(svg, box.x, below + 0.5, box.x + box.width, below + 0.5, "currentColor");
  stroke(svg, box.x + 0.5, box.y, box.x + 0.5, below, "currentColor");
  let widest = 0;
  for (const { at, text } of panel.y.ticks()) {
    const y = panel.y.pixel(at);
    if (y < box.y - 1 || y > below + 1) continue;
    severalLines(svg, box.x - 4, y + 3.5, text, { "text-anchor": "end", class: "vlkd-tick" });
    widest = Math.max(widest, ...text.split("\n").map((part) => part.length));
  }
  for (const { at, text } of panel.x.ticks()) {
    const lines = text.split("\n").length;
    severalLines(svg, panel.x.pixel(at), below + 13 + 5.5 * (lines - 1), text, { "text-anchor": "middle", class: "vlkd-tick" });
  }
  if (isNamed) words(svg, box.x + box.width / 2, below + 29, panel.titles.x, { "text-anchor": "middle", class: "vlkd-axis" });
  const [x, y] = [box.x - 10 - 6 * widest, box.y + box.height / 2];
  words(svg, x, y, panel.titles.y, { "text-anchor": "middle", class: "vlkd-axis", transform: `rotate(-90 ${x} ${y})` });
}

function barWords(svg, panel, trace) {
  const { x, y, width, height } = panel.box;
  const left = x + width + 17;
  words(svg, left, y + 8, said(trace.high), { class: "vlkd-tick" });
  words(svg, left, y + height, said(trace.low), { class: "vlkd-tick" });
  const [tx, ty] = [left + 8, y + height / 2];
  words(svg, tx, ty, trace.bar, { "text-anchor": "middle", class: "vlkd-axis", transform: `rotate(-90 ${tx} ${ty})` });
}

function note(svg, panels, each, theme) {
  const panel = panels[each.panel];
  if (!panel) return;
  const isOnColour = each.inside && ["black", "white"].includes(each.colour);
  const fill = isOnColour ? each.colour : legible(each.colour, theme, 4.5);
  if (each.inside) {
    severalLines(svg, panel.x.pixel(each.x), panel.y.pixel(each.y) + 3.5, each.text, { "text-anchor": "middle", style: `fill: ${fill}` });
    return;
  }
  const at = each.x === null ? panel.box.x : panel.x.pixel(each.x);
  const x = Math.min(Math.max(at, panel.box.x), panel.box.x + panel.box.width);
  const anchor = each.middle ? "middle" : "start";
  const element = words(svg, x, panel.box.y - 5, each.text, { "text-anchor": anchor, style: `fill: ${fill}${each.bold ? "; font-weight: 600" : ""}` });
  if (each.words) {
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = each.words;
    element.style.pointerEvents = "auto";
    element.append(title);
  }
}

// ---- images that points stand for

function isWithin(path, x, y) {
  // Whether a point lies in a closed line: a ray from it crosses the line an odd number of times.
  let isIn = false;
  for (let k = 0, last = path.length - 1; k < path.length; last = k++) {
    const [[x0, y0], [x1, y1]] = [path[last], path[k]];
    if (y0 > y !== y1 > y && x < x0 + ((y - y0) * (x1 - x0)) / (y1 - y0)) isIn = !isIn;
  }
  return isIn;
}

class Thumbnails {
  // Small pictures by the number of their image: asked for when they are about to be shown, and kept while the page is there.
  constructor(model, arrived) {
    [this.model, this.asked, this.uris] = [model, new Set(), new Map()];
    this.hear = ({ pictures }) => {
      for (const [id, uri] of Object.entries(pictures ?? {})) this.uris.set(+id, uri);
      if (pictures) arrived();
    };
    model.on("msg:custom", this.hear);
  }

  want(ids) {
    const news = ids.filter((id) => !this.asked.has(id)).slice(0, STRIP);
    if (!news.length) return;
    news.forEach((id) => this.asked.add(id));
    this.model.send({ pictures: news });
  }

  frame(id, words) {
    // The picture of an image, or an empty frame of its size until it is there.
    const frame = make("span", { className: "vlkd-thumb" });
    const uri = this.uris.get(id);
    if (uri) frame.append(make("img", { src: uri, alt: words }));
    return frame;
  }

  stop() {
    this.model.off("msg:custom", this.hear);
  }
}

class Strip {
  // The images inside a lasso: how many, in which groups, and their pictures.
  constructor(plot) {
    this.plot = plot;
    this.summary = make("span");
    this.summary.setAttribute("role", "status");
    const clear = make("button", { type: "button", textContent: "clear", title: "Escape does it too" });
    clear.dataset.name = "clear-lasso";
    clear.addEventListener("click", () => plot.encircle([]));
    this.pictures = make("div", { className: "vlkd-strip-pictures" });
    this.element = make("div", { className: "vlkd-strip", hidden: true }, make("p", {}, this.summary, clear), this.pictures);
    this.element.setAttribute("role", "region");
    this.element.setAttribute("aria-label", "images inside the lasso");
    this.element.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      plot.encircle([]);
      plot.drawing.focus();
    });
  }

  draw(spots, word) {
    // Anew only when something has changed, so that the focus stays where it is.
    const { thumbnails } = this.plot;
    this.element.hidden = !spots.length;
    const shown = spots.slice(0, STRIP);
    thumbnails.want(shown.map(({ id }) => id));
    const state = JSON.stringify(shown.map(({ id, group, words }) => [id, group, words, thumbnails.uris.has(id)]));
    if (state === this.state) return;
    this.state = state;
    this.summary.textContent = this.inWords(spots, word);
    const focused = this.pictures.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    this.pictures.replaceChildren(...shown.map((spot) => this.button(spot)));
    if (focused) this.pictures.querySelector(`[data-name="${focused}"]`)?.focus({ preventScroll: true });
  }

  inWords(spots, word) {
    const counts = new Map();
    for (const { group } of spots) counts.set(group, (counts.get(group) ?? 0) + 1);
    const groups = [...counts].sort((one, other) => other[1] - one[1] || one[0] - other[0]);
    const first = groups.slice(0, 8).map(([group, count]) => `${group} (${count})`).join(", ");
    const more = spots.length > STRIP ? `; the first ${STRIP} are shown` : "";
    const images = `${spots.length} image${spots.length === 1 ? "" : "s"}`;
    return `${images} in ${groups.length} ${word}${groups.length === 1 ? "" : "s"}: ${first}${groups.length > 8 ? ", …" : ""}${more}`;
  }

  button(spot) {
    const button = make("button", { type: "button", title: spot.words }, this.plot.thumbnails.frame(spot.id, spot.words));
    button.dataset.name = `image-${spot.id}`;
    button.setAttribute("aria-label", spot.words.replaceAll("\n", ", "));
    const show = () => this.plot.lookAt(spot.id);
    button.addEventListener("pointerenter", show);
    button.addEventListener("focus", show);
    button.addEventListener("click", () => this.plot.click());
    button.addEventListener("pointerleave", () => this.plot.look(null));
    return button;
  }
}

// ---- the view

function sample(trace, theme) {
  // What a line or a point looks like, for the legend.
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const colour = legible(trace.colour, theme, 3);
  for (const [name, value] of Object.entries({ width: 22, height: 10, "aria-hidden": "true" })) svg.setAttribute(name, value);
  if (trace.kind === "points") {
    const symbols = { x: "×", diamond: "◆" };
    const mark = words(svg, 11, 9, symbols[trace.symbol] ?? "●", { "text-anchor": "middle", style: `fill: ${colour}; font-size: 12px` });
    mark.setAttribute("stroke", "none");
    return svg;
  }
  stroke(svg, 0, 5, 22, 5, colour);
  svg.lastChild.setAttribute("stroke-width", "2");
  svg.lastChild.setAttribute("stroke-dasharray", (DASHES[trace.dash] ?? []).join(" "));
  return svg;
}

class Plot {
  constructor(model, el) {
    this.model = model;
    this.zoom = { x: {}, y: {} };
    this.cursor = null; // the panel and the value below the pointer, or the point of a map
    this.dragged = null;
    this.canvas = make("canvas");
    this.svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.cross = document.createElementNS("http://www.w3.org/2000/svg", "g");
    this.svg.setAttribute("aria-hidden", "true");
    this.drawing = make("div", { className: "vlkd-drawing", tabIndex: 0 }, this.canvas, this.svg);
    this.drawing.setAttribute("role", "img");
    this.legend = make("div", { className: "vlkd-legend" });
    this.legend.setAttribute("role", "group");
    this.legend.setAttribute("aria-label", "lines that are shown");
    this.readout = make("output", { className: "vlkd-unseen" });
    this.readout.setAttribute("aria-live", "polite");
    this.thumbnails = new Thumbnails(model, () => this.figure && this.drawImages());
    this.strip = new Strip(this);
    this.card = make("div", { className: "vlkd-card", hidden: true });
    this.drawing.append(this.card);
    this.box = make("figure", { className: "vlkd-plot" }, this.legend, this.drawing, this.strip.element, this.readout);
    this.box.dataset.lmSuppressShortcuts = "true"; // JupyterLab takes the arrow keys otherwise
    el.append(this.box);
    this.slider = this.smoother();
    this.lasso = this.lassoButton();
    this.listen();
  }

  lassoButton() {
    const button = make("button", { type: "button", textContent: "Lasso", title: "draw a line around images to see them; or hold Shift" });
    button.dataset.name = "lasso";
    button.addEventListener("click", () => this.setLasso(!this.isLasso));
    return button;
  }

  setLasso(isOn) {
    // While it is on, a finger draws and does not scroll the page.
    this.isLasso = isOn;
    this.lasso.setAttribute("aria-pressed", isOn);
    this.drawing.style.touchAction = isOn ? "none" : "";
  }

  smoother() {
    const range = make("input", { type: "range", min: 0, max: 0.98, step: 0.01 });
    const value = make("output");
    range.dataset.name = "smoothing";
    range.addEventListener("input", () => this.choose({ smoothing: +range.value }));
    return { range, value, label: make("label", {}, "smoothing", range, value) };
  }

  get chosen() {
    return { smoothing: 0, hidden: [], lasso: [], ...this.model.get("chosen") };
  }

  choose(changes) {
    this.model.set("chosen", { ...this.chosen, ...changes });
    this.model.save_changes();
    this.draw();
  }

  isHidden = (trace) => this.chosen.hidden.includes(trace.group);

  draw() {
    // The value may be the same as before; arrays are unpacked once for each.
    const value = this.model.get("value");
    if (value !== this.value) {
      this.value = value;
      this.unpacked = unpacked(value);
    }
    const room = this.box.clientWidth;
    if (!room) return; // not on the screen; it is drawn when it comes there
    const isNarrow = room < NARROW && this.unpacked.panels.length > 1;
    const figure = (this.figure = isNarrow ? stackedPlaces(this.unpacked) : grown(this.unpacked, Math.min(room, MOST_WIDTH)));
    this.theme = setTheme(this.box);
    this.size = { width: Math.min(room, MOST_WIDTH), height: figure.height ?? 0 };
    this.panels = figure.panels.length ? panelsOf(figure, this.size, this.zoom, this.isHidden) : [];
    this.drawing.style.width = `${this.size.width}px`;
    this.drawing.style.height = `${this.size.height}px`;
    this.drawing.setAttribute("aria-label", figure.words ?? "");
    this.box.dataset.points = this.drawLines();
    this.box.dataset.zoomed = Object.keys({ ...this.zoom.x, ...this.zoom.y }).length > 0;
    this.drawWords();
    this.drawLegend();
    this.drawImages();
  }

  drawImages() {
    // What is inside the lasso, and what is under the pointer.
    this.strip.draw(this.encircled(), this.figure.pictures);
    this.drawCross();
  }

  drawLines() {
    const ratio = window.devicePixelRatio || 1;
    const { canvas, size, theme, figure } = this;
    [canvas.width, canvas.height] = [Math.round(size.width * ratio), Math.round(size.height * ratio)];
    [canvas.style.width, canvas.style.height] = [`${size.width}px`, `${size.height}px`];
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    let count = 0;
    for (const panel of this.panels) {
      const traces = figure.traces.filter((trace) => trace.panel === panel.number && !this.isHidden(trace));
      grid(pen, panel, theme);
      pen.save();
      pen.beginPath();
      pen.rect(panel.box.x - 4, panel.box.y - 4, panel.box.width + 8, panel.box.height + 8);
      pen.clip();
      this.drawMarks(pen, panel);
      for (const trace of traces)
        if (trace.kind === "table") count += table(pen, panel, trace);
        else if (trace.kind === "points") count += points(pen, panel, trace, theme);
        else count += line(pen, panel, trace, theme, figure.smooth ? this.chosen.smoothing : 0);
      pen.restore();
      const barred = traces.find((trace) => trace.bar !== undefined);
      if (barred) colourBar(pen, panel, barred);
    }
    return count;
  }

  drawMarks(pen, panel) {
    for (const mark of this.figure.marks.filter((each) => each.panel === panel.number)) {
      const x = Math.round(panel.x.pixel(mark.x)) + 0.5;
      pen.strokeStyle = legible(mark.colour, this.theme, 2);
      pen.lineWidth = 1;
      pen.setLineDash(DASHES[mark.dash] ?? []);
      pen.beginPath();
      pen.moveTo(x, panel.box.y);
      pen.lineTo(x, panel.box.y + panel.box.height);
      pen.stroke();
    }
  }

  drawWords() {
    const { svg, size, figure, panels, theme } = this;
    svg.setAttribute("width", size.width);
    svg.setAttribute("height", size.height);
    svg.replaceChildren();
    for (const panel of panels) {
      axisWords(svg, panel, isLowest(panel, panels));
      const barred = figure.traces.find((trace) => trace.panel === panel.number && trace.bar !== undefined && !this.isHidden(trace));
      if (barred) barWords(svg, panel, barred);
    }
    for (const each of figure.notes) note(svg, panels, each, theme);
    svg.append(this.cross);
  }

  drawLegend() {
    // Buttons are made anew only when names or colours change, so that the focus stays where it is.
    const { figure, theme, slider } = this;
    const shown = figure.traces.filter((trace) => trace.legend);
    const made = JSON.stringify([shown.map((trace) => [trace.name, trace.colour, trace.dash]), theme, figure.smooth, figure.pictures]);
    if (this.made !== made) {
      this.made = made;
      const buttons = shown.map((trace) => {
        const button = make("button", { type: "button", title: "show or hide" }, sample(trace, theme), trace.name);
        button.dataset.name = trace.group;
        button.addEventListener("click", () => this.toggle(trace.group));
        return button;
      });
      this.legend.replaceChildren(...buttons, ...(figure.pictures ? [this.lasso] : []), ...(figure.smooth ? [slider.label] : []));
      this.setLasso(this.isLasso && Boolean(figure.pictures));
    }
    const { hidden, smoothing } = this.chosen;
    for (const button of this.legend.querySelectorAll("button")) if (button !== this.lasso) button.setAttribute("aria-pressed", !hidden.includes(button.dataset.name));
    if (document.activeElement !== slider.range) slider.range.value = smoothing;
    slider.value.textContent = smoothing.toFixed(2);
  }

  toggle(group) {
    const { hidden } = this.chosen;
    this.choose({ hidden: hidden.includes(group) ? hidden.filter((each) => each !== group) : [...hidden, group] });
  }

  // ---- pointer and keys

  listen() {
    const at = (event) => {
      const box = this.drawing.getBoundingClientRect();
      return [event.clientX - box.x, event.clientY - box.y];
    };
    const target = this.drawing;
    target.addEventListener("pointerdown", (event) => {
      const [x, y] = at(event);
      const panel = this.panelAt(x, y);
      if (!panel || event.button) return;
      const draws = this.figure.pictures && this.hasImages(panel.number) && (this.isLasso || event.shiftKey);
      this.dragged = { panel: panel.number, x, y, to: [x, y], path: draws ? [[x, y]] : null };
      target.setPointerCapture(event.pointerId);
    });
    target.addEventListener("pointermove", (event) => {
      if (this.dragged) this.dragged.to = at(event);
      this.dragged?.path?.push(at(event));
      this.point(...at(event));
    });
    target.addEventListener("pointerup", () => this.release());
    target.addEventListener("pointercancel", () => (this.dragged = null));
    target.addEventListener("pointerleave", () => this.dragged || this.look(null));
    target.addEventListener("dblclick", () => this.reset());
    target.addEventListener("keydown", (event) => this.key(event));
    target.addEventListener("blur", () => this.look(null));
  }

  panelAt(x, y) {
    return (this.panels ?? []).find((panel) => isInside(panel.box, x, y));
  }

  point(x, y) {
    const panel = this.panelAt(x, y);
    if (!panel) return this.look(null);
    const found = this.pointAt(panel, x, y);
    this.look(found ?? (this.hasLines(panel.number) ? { panel: panel.number, x: panel.x.value(x) } : null));
  }

  hasLines(panel) {
    return this.figure.traces.some((trace) => trace.panel === panel && ["line", "both"].includes(trace.kind) && !this.isHidden(trace));
  }

  pointAt(panel, x, y) {
    // The point of a map that lies nearest, if one is near.
    let best = null, least = NEAR ** 2;
    this.figure.traces.forEach((trace, number) => {
      if (trace.panel !== panel.number || trace.kind !== "points" || this.isHidden(trace)) return;
      for (let k = 0; k < trace.x.length; k++) {
        const far = (panel.x.pixel(trace.x[k]) - x) ** 2 + (panel.y.pixel(trace.y[k]) - y) ** 2;
        if (far < least) [best, least] = [{ panel: panel.number, trace: number, point: k }, far];
      }
    });
    return best;
  }

  look(cursor) {
    this.cursor = cursor;
    this.drawCross();
  }

  release() {
    const drag = this.dragged;
    this.dragged = null;
    if (!drag) return;
    const panel = this.panels[drag.panel];
    const [dx, dy] = [Math.abs(drag.to[0] - drag.x), Math.abs(drag.to[1] - drag.y)];
    const far = drag.path ? Math.max(...drag.path.map(([x, y]) => Math.abs(x - drag.x) + Math.abs(y - drag.y))) : 0;
    if (far >= DRAGGED) this.encircle(this.spots(drag.panel).filter(({ x, y }) => isWithin(drag.path, x, y)).map(({ id }) => id));
    else if (dx < DRAGGED && dy < DRAGGED) this.click();
    else if (!panel.x.spec.ticks) {
      const ordered = (one, other) => [one, other].sort((a, b) => a - b);
      if (dx >= DRAGGED) this.zoom.x[panel.titles.x] = ordered(panel.x.value(drag.x), panel.x.value(drag.to[0]));
      if (dy >= 4 * DRAGGED) this.zoom.y[panel.titles.y] = ordered(panel.y.value(drag.y), panel.y.value(drag.to[1]));
      this.draw();
    }
  }

  // ---- images

  hasImages(panel) {
    return this.figure.traces.some((trace) => trace.panel === panel && trace.ids && !this.isHidden(trace));
  }

  spots(panel) {
    // Every image that a panel shows: where it is, and what is known of it.
    return this.figure.traces.flatMap((trace, number) => {
      if (!trace.ids || this.isHidden(trace) || (panel !== undefined && trace.panel !== panel)) return [];
      const { x, y } = this.panels[trace.panel];
      return Array.from(trace.ids, (id, point) => ({
        id, group: trace.groups[point], words: trace.words?.[point] ?? "", x: x.pixel(trace.x[point]), y: y.pixel(trace.y[point]), panel: trace.panel, trace: number, point,
      }));
    });
  }

  encircle(ids) {
    // It is kept beside what is smoothed and hidden, so that a page that is loaded again shows it.
    this.choose({ lasso: ids });
  }

  encircled() {
    const { lasso } = this.chosen;
    if (!lasso.length || !this.figure?.pictures || !this.panels.length) return [];
    const within = new Set(lasso);
    return this.spots().filter(({ id }) => within.has(id)).sort((one, other) => one.group - other.group || one.id - other.id);
  }

  lookAt(id) {
    const spot = this.spots().find((each) => each.id === id);
    this.look(spot ? { panel: spot.panel, trace: spot.trace, point: spot.point } : null);
  }

  click() {
    const { cursor } = this;
    if (cursor && cursor.trace !== undefined) this.model.send({ chosen: [cursor.trace, cursor.point] });
  }

  reset() {
    this.zoom = { x: {}, y: {} };
    this.draw();
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, PageUp: 20, PageDown: -20, Home: -Infinity, End: Infinity }[event.key];
    if (step) this.walk(step);
    else if (event.key === "Enter" || event.key === " ") this.click();
    else if (event.key === "+" || event.key === "-") this.zoomBy(event.key === "+" ? 0.5 : 2);
    else if (event.key === "Escape" && (this.isLasso || this.chosen.lasso.length)) this.endLasso();
    else if (event.key === "0" || event.key === "Escape") this.reset();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  endLasso() {
    this.dragged = null;
    this.setLasso(false);
    this.encircle([]);
  }

  walk(step) {
    // From point to point: of a map, or of the longest line.
    const { traces } = this.figure;
    const kind = traces.some((trace) => ["line", "both"].includes(trace.kind) && this.figure.smooth) ? ["line", "both"] : ["points"];
    const fits = traces.map((trace, number) => ({ trace, number })).filter(({ trace }) => kind.includes(trace.kind) && !this.isHidden(trace));
    const among = fits.length ? fits : traces.map((trace, number) => ({ trace, number })).filter(({ trace }) => trace.x?.length && !this.isHidden(trace));
    if (!among.length) return;
    if (kind[0] === "line" || among[0].trace.kind !== "points") {
      const { trace } = among.reduce((best, each) => (each.trace.x.length > best.trace.x.length ? each : best));
      const place = this.cursor ? nearest(trace.x, this.cursor.x) + step : step > 0 && step < Infinity ? 0 : trace.x.length - 1;
      return this.look({ panel: trace.panel, x: trace.x[Math.min(Math.max(place, 0), trace.x.length - 1)] });
    }
    const all = among.flatMap(({ trace, number }) => Array.from(trace.x, (_, point) => ({ panel: trace.panel, trace: number, point })));
    const now = all.findIndex((each) => each.trace === this.cursor?.trace && each.point === this.cursor?.point);
    this.look(all[Math.min(Math.max(now + step, 0), all.length - 1)] ?? null);
  }

  zoomBy(factor) {
    // Along the steps, around the cursor or the middle.
    const panel = this.panels[this.cursor?.panel ?? 0];
    if (!panel) return;
    const ends = [panel.box.x, panel.box.x + panel.box.width];
    const middle = this.cursor?.x !== undefined ? panel.x.pixel(this.cursor.x) : (ends[0] + ends[1]) / 2;
    this.zoom.x[panel.titles.x] = ends.map((end) => panel.x.value(middle + (end - middle) * factor));
    this.draw();
  }

  // ---- what lies below the pointer

  drawCross() {
    this.cross.replaceChildren();
    this.card.hidden = true;
    this.drawEncircled();
    this.drawDragged();
    if (!this.cursor || !this.panels?.length) {
      this.readout.textContent = "";
      return;
    }
    this.readout.textContent = this.cursor.trace === undefined ? this.drawValues() : this.drawPoint();
  }

  drawDragged() {
    const { dragged, cross } = this;
    if (!dragged) return;
    if (dragged.path) return this.drawPath(dragged.path);
    const { box } = this.panels[dragged.panel];
    const [x0, x1] = [dragged.x, Math.min(Math.max(dragged.to[0], box.x), box.x + box.width)].sort((a, b) => a - b);
    const area = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const place = { x: x0, y: box.y, width: x1 - x0, height: box.height, fill: "currentColor", "fill-opacity": 0.12 };
    for (const [name, value] of Object.entries(place)) area.setAttribute(name, value);
    cross.append(area);
  }

  drawPath(path) {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "polygon");
    const style = { points: path.map((place) => place.join()).join(" "), fill: "currentColor", "fill-opacity": 0.1, stroke: "currentColor", "stroke-dasharray": "4 3" };
    for (const [name, value] of Object.entries(style)) line.setAttribute(name, value);
    this.cross.append(line);
  }

  drawEncircled() {
    for (const { x, y, trace } of this.encircled()) this.ring(x, y, this.figure.traces[trace].size / 2 + 2, 1);
  }

  ring(x, y, radius, width) {
    const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    const place = { cx: x, cy: y, r: radius, fill: "none", stroke: "currentColor", "stroke-width": width };
    for (const [name, value] of Object.entries(place)) ring.setAttribute(name, value);
    this.cross.append(ring);
  }

  drawCard(x, y, id, text) {
    // The picture of an image with its words, beside its point and inside the drawing.
    const lines = text.split("\n").map((each) => make("div", { textContent: each, dir: "auto" }));
    this.thumbnails.want([id]);
    this.card.replaceChildren(this.thumbnails.frame(id, ""), make("div", {}, ...lines));
    this.card.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = this.card;
    const left = x + 12 + width <= this.size.width ? x + 12 : Math.max(x - 12 - width, 0);
    this.card.style.left = `${left}px`;
    this.card.style.top = `${Math.max(Math.min(y - height / 2, this.size.height - height), 0)}px`;
  }

  drawValues() {
    // A line through every panel with the same steps, and the values of its lines there; the same in words.
    const from = this.panels[this.cursor.panel];
    const sentences = [];
    for (const panel of this.panels.filter((each) => each.titles.x === from.titles.x && !each.x.spec.ticks)) {
      const x = panel.x.pixel(this.cursor.x);
      if (x < panel.box.x - 1 || x > panel.box.x + panel.box.width + 1) continue;
      stroke(this.cross, x, panel.box.y, x, panel.box.y + panel.box.height, "currentColor");
      const values = this.valuesAt(panel);
      this.drawList(panel, x, values);
      if (values.length) sentences.push(`${panel.titles.y}: ${values.map((each) => `${each.name} ${said(each.value)}`).join(", ")}`);
    }
    return `${this.place()}: ${sentences.join("; ")}`;
  }

  place() {
    // Where the cursor is; a step is a whole number.
    const { x: title } = this.panels[this.cursor.panel].titles;
    return `${title} ${said(title.includes("step") ? Math.round(this.cursor.x) : this.cursor.x)}`;
  }

  valuesAt(panel) {
    // Of every line the value that is nearest to the cursor, if it lies near.
    const { figure, cursor, theme } = this;
    const found = [];
    for (const trace of figure.traces) {
      if (trace.panel !== panel.number || !["line", "both"].includes(trace.kind) || this.isHidden(trace)) continue;
      const k = nearest(trace.x, cursor.x);
      if (k < 0 || !Number.isFinite(trace.y[k])) continue;
      const gap = Math.abs(panel.x.pixel(trace.x[k]) - panel.x.pixel(cursor.x));
      const isBeside = cursor.x < Math.min(...trace.x) || cursor.x > Math.max(...trace.x);
      if (isBeside && gap > 8) continue; // the line had ended, or had not begun
      const weight = figure.smooth && trace.kind === "line" ? this.chosen.smoothing : 0;
      const value = weight > 0 ? smoothed(trace.y, weight)[k] : trace.y[k];
      found.push({ name: trace.name, value, colour: legible(trace.colour, theme, 4.5) });
    }
    return found;
  }

  drawList(panel, x, values) {
    const title = panel.number === this.cursor.panel ? [{ text: this.place(), colour: this.theme.ink }] : [];
    const rows = [...title, ...values.map(({ name, value, colour }) => ({ text: `${name} ${said(value)}`, colour }))];
    const widest = 5.7 * Math.max(0, ...rows.map(({ text }) => text.length));
    const right = Math.min(panel.box.x + panel.box.width + 8, this.size.width);
    const isRight = x + 6 + widest <= right || x - 6 - widest < panel.box.x;
    const anchor = { "text-anchor": isRight ? "start" : "end", class: "vlkd-value" };
    const left = isRight ? Math.min(x + 6, Math.max(right - widest, panel.box.x)) : x - 6;
    rows.forEach(({ text, colour }, k) => words(this.cross, left, panel.box.y + 10 + 12 * k, text, { ...anchor, style: `fill: ${colour}` }));
  }

  drawPoint() {
    // A ring around the point, and its words beside it.
    const { trace: number, point: k, panel: at } = this.cursor;
    const trace = this.figure.traces[number];
    const panel = this.panels[at];
    if (!trace || k >= trace.x.length) return "";
    const [x, y] = [panel.x.pixel(trace.x[k]), panel.y.pixel(trace.y[k])];
    this.ring(x, y, trace.size / 2 + 3, 1.5);
    const text = trace.words?.[k] ?? `${trace.name}: ${said(trace.x[k])}, ${said(trace.y[k])}`;
    if (this.figure.pictures && trace.ids) {
      if (!this.dragged?.path) this.drawCard(x, y, trace.ids[k], text);
      return text.replaceAll("\n", ", ");
    }
    const isRight = x < panel.box.x + panel.box.width / 2;
    const anchor = { "text-anchor": isRight ? "start" : "end", class: "vlkd-value" };
    const up = y > panel.box.y + panel.box.height / 2;
    const lines = text.split("\n");
    lines.forEach((each, row) => {
      const top = up ? y - 10 - 12 * (lines.length - 1 - row) : y + 16 + 12 * row;
      words(this.cross, x + (isRight ? 8 : -8), top, each, anchor);
    });
    return text.replaceAll("\n", ", ");
  }
}

function render({ model, el }) {
  const plot = new Plot(model, el);
  const view = follow(model, el, () => plot.draw());
  const resized = new ResizeObserver(view.soon); // also when it first comes on the screen
  resized.observe(plot.box);
  return () => {
    resized.disconnect();
    plot.thumbnails.stop();
    view.stop();
  };
}

export default { render };
