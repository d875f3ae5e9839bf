// Plays a run: a slider over the moments that it kept, and everything that a moment shows. The same script draws the notebook's widget
// (vlkd_lab.widgets.Player) and a page without a kernel, for which `mount` stands in for the widget's model.
// Captions, words and names come from strangers: all text goes in as text, never as HTML.

const SPEEDS = { "½×": 2, "1×": 4, "2×": 8, "4×": 16 }; // moments a second
const MEASURES = { cosine: "cosine", image_to_text: "P(text | image)", text_to_image: "P(image | text)" };
const NEAREST = 4; // captions of a list
const DENSE = 3; // an attention map's scale ends at the densest patch, and at least at three times an even spread
const CATEGORIES = 20; // clusters that have a colour of their own
const ASKED_MS = 5000; // after so long what was asked for is asked for again
const SVG = "http://www.w3.org/2000/svg";

// ---- bytes

function matricesOf(abouts, bytes) {
  // name -> { rows, columns, values, low, high }; what was no number is NaN.
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const matrices = {};
  let start = 0;
  for (const { name, rows, columns, width, low, high } of abouts) {
    const last = 256 ** width - 1;
    const values = new Float32Array(rows * columns);
    for (let k = 0; k < values.length; k++) {
      const at = start + k * width;
      const level = width === 1 ? view.getUint8(at) : view.getUint16(at, true);
      values[k] = level === last ? NaN : low + ((high - low) * level) / (last - 1);
    }
    start += values.length * width;
    matrices[name] = { rows, columns, values, low, high };
  }
  return matrices;
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

function number(value) {
  const size = Math.abs(value);
  if (!Number.isFinite(value)) return "–";
  const text = size !== 0 && (size < 1e-4 || size >= 1e6) ? value.toExponential(1) : String(+value.toPrecision(3));
  return text.replaceAll("-", "−");
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}

function short(text, most) {
  return text.length > most ? text.slice(0, most - 1) + "…" : text;
}

// ---- affinities

function probabilities({ rows, columns, values }, scale, measure) {
  // Softmax of the scaled cosines, over an image's texts or over a text's images.
  const [outer, inner, step, jump] = measure === "image_to_text" ? [rows, columns, 1, columns] : [columns, rows, columns, 1];
  const shares = new Float32Array(values.length);
  for (let i = 0; i < outer; i++) {
    let most = -Infinity, sum = 0;
    for (let k = 0; k < inner; k++) most = Math.max(most, values[i * jump + k * step]);
    for (let k = 0; k < inner; k++) sum += shares[i * jump + k * step] = Math.exp(scale * (values[i * jump + k * step] - most));
    for (let k = 0; k < inner; k++) shares[i * jump + k * step] /= sum;
  }
  return { rows, columns, values: shares };
}

function measured(matrix, scale, measure) {
  return measure === "cosine" ? matrix : probabilities(matrix, scale, measure);
}

function minus(one, other) {
  return { rows: one.rows, columns: one.columns, values: one.values.map((value, k) => value - other.values[k]) };
}

function fits(one, other) {
  return one && other && one.rows === other.rows && one.columns === other.columns;
}

function limitsOf(matrices) {
  let low = Infinity, high = -Infinity;
  for (const { values } of matrices)
    for (const value of values)
      if (Number.isFinite(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
  return low > high ? [0, 1] : [low, high];
}

function ranked(values) {
  // Places from the largest value to the smallest; equal ones, and what is no number, in their order.
  const known = (k) => (Number.isFinite(values[k]) ? values[k] : -Infinity);
  return [...values.keys()].sort((one, other) => known(other) - known(one) || one - other);
}

function rowOf({ columns, values }, row) {
  return values.slice(row * columns, (row + 1) * columns);
}

function ownFirst(matrix) {
  // Share of the images to which their own caption is nearest.
  const count = Math.min(matrix.rows, matrix.columns);
  let first = 0;
  for (let row = 0; row < count; row++) first += ranked(rowOf(matrix, row))[0] === row;
  return first / count;
}

// ---- drawing

function sized(canvas, height) {
  // A pen in CSS pixels for a canvas as wide as the page lets it be.
  const [width, ratio] = [Math.max(canvas.clientWidth, 40), window.devicePixelRatio || 1];
  canvas.style.height = `${height}px`;
  [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height };
}

function colour(palette, share) {
  const at = 3 * Math.round(254 * Math.min(Math.max(share, 0), 1));
  return [palette[at], palette[at + 1], palette[at + 2]];
}

function picture({ rows, columns, values }, paint) {
  // A small canvas with a pixel an entry; `paint` gives red, green, blue and opacity.
  const canvas = make("canvas", { width: Math.max(columns, 1), height: Math.max(rows, 1) });
  const image = new ImageData(canvas.width, canvas.height);
  values.forEach((value, k) => image.data.set(paint(value), 4 * k));
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

class MatrixPart {
  // A matrix with its title, its scale and what is under the pointer; a click or Enter chooses a cell.
  constructor(describe, choose = null) {
    [this.describe, this.choose, this.cell] = [describe, choose, null];
    this.title = make("figcaption");
    this.canvas = make("canvas", { tabIndex: 0 });
    this.canvas.setAttribute("role", "img");
    this.scale = make("div", { className: "vlkd-scale" }, make("span"), make("i"), make("span"));
    this.said = make("output", { dir: "auto" });
    this.element = make("figure", {}, this.title, this.canvas, this.scale, this.said);
    this.canvas.addEventListener("mousemove", (event) => this.point(this.cellAt(event)));
    this.canvas.addEventListener("mouseleave", () => this.point(null));
    this.canvas.addEventListener("click", (event) => this.pick(this.cellAt(event)));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  draw(title, matrix, [low, high], palette, player, height, marked = []) {
    Object.assign(this, { matrix, marked, player });
    this.title.textContent = title;
    const { pen, width } = sized(this.canvas, height(this.canvas.clientWidth));
    const tall = height(width);
    const paint = (value) => (Number.isNaN(value) ? [128, 128, 128, 60] : [...colour(palette, (value - low) / (high - low || 1)), 255]);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(picture(matrix, paint), 0, 0, width, tall);
    this.mark(pen, marked, width, tall, "#d81b60");
    this.mark(pen, this.cell ?? [], width, tall, player.theme.ink);
    this.canvas.setAttribute("aria-label", `${title}: ${matrix.rows} × ${matrix.columns}, from ${number(low)} to ${number(high)}`);
    const [first, bar, last] = this.scale.children;
    [first.textContent, last.textContent] = [number(low), number(high)];
    const stops = [0, 0.25, 0.5, 0.75, 1].map((share) => `rgb(${colour(palette, share).join(" ")})`);
    bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    this.said.textContent = this.cell ? this.describe(this.matrix, ...this.cell) : "";
  }

  mark(pen, [row, column], width, height, style) {
    if (row === undefined) return;
    const [dx, dy] = [width / this.matrix.columns, height / this.matrix.rows];
    pen.strokeStyle = style;
    pen.lineWidth = 1.5;
    if (column === undefined) pen.strokeRect(0.75, row * dy, width - 1.5, dy);
    else pen.strokeRect(column * dx, row * dy, dx, dy);
  }

  cellAt(event) {
    const { rows, columns } = this.matrix;
    const row = Math.floor((event.offsetY / this.canvas.clientHeight) * rows);
    const column = Math.floor((event.offsetX / this.canvas.clientWidth) * columns);
    return row >= 0 && column >= 0 && row < rows && column < columns ? [row, column] : null;
  }

  point(cell) {
    this.cell = cell;
    this.player.soon();
  }

  pick(cell) {
    if (cell && this.choose) this.choose(...cell);
  }

  key(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step) {
      const [row, column] = this.cell ?? [0, 0];
      const inside = (value, most) => Math.min(Math.max(value, 0), most - 1);
      this.point([inside(row + step[0], this.matrix.rows), inside(column + step[1], this.matrix.columns)]);
    } else if (event.key === "Enter" || event.key === " ") this.pick(this.cell);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

function part(title, ...children) {
  // A part of the page under its heading.
  return make("section", { hidden: true }, make("h4", { textContent: title }), ...children);
}

// ---- the curves: one axis for all steps, and a cursor at the moment

class CurvesPart {
  constructor(player) {
    this.player = player;
    this.grid = make("div", { className: "vlkd-curves" });
    this.element = part("Curves", this.grid);
    this.panels = [];
    this.drawn = "";
    let held = false;
    this.grid.addEventListener("pointerdown", (event) => {
      held = true;
      this.drag(event);
    });
    this.grid.addEventListener("pointermove", (event) => held && this.drag(event));
    for (const name of ["pointerup", "pointercancel", "pointerleave"]) this.grid.addEventListener(name, () => (held = false));
  }

  drag(event) {
    const drawing = event.target.closest("svg");
    if (!drawing) return;
    const box = drawing.getBoundingClientRect();
    this.player.goToPlace(((event.clientX - box.left) / box.width) * this.most);
    event.preventDefault();
  }

  draw({ about, theme }) {
    this.element.hidden = about.curves.length === 0;
    if (this.element.hidden) return;
    const ends = about.curves.flatMap(({ lines }) => lines.map(({ x }) => x.at(-1) ?? 0));
    this.most = Math.max(1, ...ends, ...about.moments.map(({ place }) => place));
    const shape = JSON.stringify([about.curves, this.grid.clientWidth, theme, about.moments.length]);
    if (shape !== this.drawn) {
      this.drawn = shape;
      this.panels = about.curves.map((curves) => this.panel(curves, theme));
      this.grid.replaceChildren(...this.panels.map(({ element }) => element));
    }
    const at = about.moments[this.player.index]?.place ?? 0;
    for (const { cursor, said, lines } of this.panels) {
      cursor.setAttribute("x1", (100 * at) / this.most);
      cursor.setAttribute("x2", (100 * at) / this.most);
      said.textContent = lines.map(({ name, x, y }) => `${name} ${number(nearestValue(x, y, at))}`).join(", ");
    }
  }

  panel({ title, lines }, theme) {
    const drawing = document.createElementNS(SVG, "svg");
    drawing.setAttribute("viewBox", "0 0 100 60");
    drawing.setAttribute("preserveAspectRatio", "none");
    drawing.setAttribute("role", "img");
    const [low, high] = limitsOf(lines.map(({ y }) => ({ values: y.map((value) => value ?? NaN) })));
    drawing.setAttribute("aria-label", `${title}: between ${number(low)} and ${number(high)}`);
    const up = (value) => 57 - (54 * (value - low)) / (high - low || 1);
    lines.forEach(({ x, y }, k) => {
      const isKnown = (i) => Number.isFinite(y[i]);
      const points = x.map((at, i) => (isKnown(i) ? `${isKnown(i - 1) ? "L" : "M"}${((100 * at) / this.most).toFixed(2)} ${up(y[i]).toFixed(2)}` : ""));
      drawing.append(line("path", { d: points.join(""), stroke: legible(["#0072b2", "#e69f00"][k % 2], theme, 3) }));
    });
    const cursor = line("line", { y1: 0, y2: 60, stroke: theme.ink, class: "vlkd-cursor" });
    drawing.append(cursor);
    const said = make("b");
    const words = make("div", {}, make("span", { textContent: title }), said);
    const ends = make("small", { textContent: `${number(low)} to ${number(high)}` });
    return { element: make("figure", {}, words, drawing, ends), cursor, said, lines };
  }
}

function line(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function nearestValue(x, y, at) {
  let best = -1;
  for (let k = 0; k < x.length; k++)
    if (Number.isFinite(y[k]) && (best < 0 || Math.abs(x[k] - at) < Math.abs(x[best] - at))) best = k;
  return best < 0 ? NaN : y[best];
}

// ---- affinities and nearest captions

class AffinitiesPart {
  constructor(player) {
    this.player = player;
    const describe = (matrix, row, column) => {
      const { captions, texts, across } = player.about.probe;
      const said = (name, list, k) => `${name} ${k}` + (list[k] ? ` “${short(list[k], 50)}”` : "");
      return `${said("image", captions, row)} × ${said(across, texts, column)}: ${number(matrix.values[row * matrix.columns + column])}`;
    };
    const choose = (row) => player.choose({ image: row, word: -1 });
    this.parts = ["teacher", "student", "difference"].map(() => new MatrixPart(describe, choose));
    this.measure = make("select", { title: "what the matrices show" });
    this.measure.setAttribute("aria-label", "measure of the affinities");
    this.measure.append(...Object.entries(MEASURES).map(([value, textContent]) => make("option", { value, textContent })));
    this.measure.addEventListener("change", () => player.choose({ measure: this.measure.value }));
    this.said = make("p");
    this.grid = make("div", { className: "vlkd-matrices" }, ...this.parts.map(({ element }) => element));
    this.element = part("Affinities of the probe: a row an image, a column a text", make("label", { textContent: "show " }, this.measure), this.said, this.grid);
  }

  limits() {
    // Colours hold still through the whole run, so they are taken from all moments that are here.
    const { player } = this, { measure } = player;
    const key = [measure, player.store.size].join();
    if (this.known?.key === key) return this.known;
    const students = player.allOf("student"), teacher = player.fixed.teacher;
    const shown = students.map(([matrix, scale]) => measured(matrix, scale, measure));
    const taught = teacher && measured(teacher, player.scaleOf("teacher"), measure);
    const [low, high] = limitsOf(taught ? [...shown, taught] : shown);
    const differences = taught ? shown.filter((matrix) => fits(matrix, taught)).map((matrix) => minus(matrix, taught)) : [];
    const ends = limitsOf(differences).map(Math.abs);
    const most = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2].find((limit) => Math.max(...ends) <= limit) ?? 2;
    const range = measure === "cosine" ? [Math.floor(10 * low) / 10, Math.ceil(10 * high) / 10] : [0, 1];
    this.known = { key, range, difference: [-most, most] };
    return this.known;
  }

  draw(player) {
    const { measure, fixed } = player;
    const latest = player.latest("student");
    const student = latest && measured(latest.matrix, latest.numbers.student_scale?.[0] ?? 1, measure);
    const teacher = fixed.teacher && measured(fixed.teacher, player.scaleOf("teacher"), measure);
    this.element.hidden = !student && !teacher;
    if (this.element.hidden) return;
    this.measure.value = measure;
    const { range, difference } = this.limits();
    const square = (matrix) => (width) => Math.max(60, Math.round((width * matrix.rows) / Math.max(matrix.columns, 1)));
    const drawn = [["teacher", teacher, range], ["student", student, range]];
    if (fits(student, teacher)) drawn.push(["student − teacher", minus(student, teacher), difference]);
    this.parts.forEach(({ element }, k) => (element.hidden = !drawn[k]?.[1]));
    drawn.forEach(([title, matrix, limits], k) => {
      const palette = player.palettes[k === 2 ? "diverging" : "sequential"];
      if (matrix) this.parts[k].draw(title, matrix, limits, palette, player, square(matrix), [player.image]);
    });
    this.said.textContent = this.words(latest?.matrix, fixed.teacher);
  }

  words(student, teacher) {
    const { across, captions, left_out } = this.player.about.probe;
    const said = [];
    if (across === "text" && student) {
      said.push(`own caption first: ${percent(ownFirst(student))} of ${student.rows} images` + (teacher ? `, teacher ${percent(ownFirst(teacher))}` : ""));
    }
    if (left_out) said.push(`the first ${captions.length} pairs of the probe are shown, and probabilities are among these`);
    return said.join("; ");
  }
}

class NearestPart {
  constructor(player) {
    this.player = player;
    this.images = make("div", { className: "vlkd-thumbs" });
    this.lists = make("div", { className: "vlkd-nearest" });
    this.made = "";
    this.element = part("Nearest captions of an image", this.images, this.lists);
  }

  draw(player) {
    const { fixed, image, about } = player, { probe } = about;
    const now = player.latest("student"), first = player.first("student");
    this.element.hidden = !(now || fixed.teacher) || probe.captions.length === 0;
    if (this.element.hidden) return;
    this.thumbnails(probe);
    [...this.images.children].forEach((button, k) => button.setAttribute("aria-pressed", k === image));
    const lists = [["teacher", fixed.teacher], [`student, ${now?.where ?? ""}`, now?.matrix], [`student at first, ${first?.where ?? ""}`, first?.matrix]];
    const teachers = fixed.teacher ? ranked(rowOf(fixed.teacher, image)).slice(0, NEAREST) : [];
    const columns = lists.filter(([, matrix]) => matrix && image < matrix.rows).map(([name, matrix]) => this.list(name, rowOf(matrix, image), teachers));
    const own = make("p", { textContent: `image ${image}: ${probe.captions[image] ?? ""}`, dir: "auto" });
    const seen = probe.pictures[image] ? [make("img", { src: probe.pictures[image], alt: "" })] : [];
    this.lists.replaceChildren(make("div", {}, ...seen, own), make("div", {}, ...columns));
  }

  thumbnails(probe) {
    const made = JSON.stringify(probe.captions);
    if (made === this.made) return;
    this.made = made;
    this.images.replaceChildren(...probe.captions.map((caption, k) => {
      const button = make("button", { type: "button", title: caption });
      const uri = probe.pictures[k] ?? "";
      button.append(uri.startsWith("data:image/") ? make("img", { src: uri, alt: `image ${k}: ${caption}` }) : String(k));
      button.addEventListener("click", () => this.player.choose({ image: k, word: -1 }));
      return button;
    }));
  }

  list(name, scores, teachers) {
    const { texts, across } = this.player.about.probe;
    const order = ranked(scores);
    const lines = order.slice(0, NEAREST).map((k) => {
      const text = make(teachers.includes(k) ? "b" : "span", { textContent: texts[k] ?? `text ${k}` });
      const isOwn = across === "text" && k === this.player.image;
      return make("li", { dir: "auto" }, text, ` ${number(scores[k])}`, ...(isOwn ? [make("em", { textContent: " own" })] : []));
    });
    const children = [make("h5", { textContent: name }), make("ol", {}, ...lines)];
    if (across === "text") children.push(make("small", { textContent: `own caption: ${order.indexOf(this.player.image) + 1}. of ${order.length}` }));
    return make("div", {}, ...children);
  }
}

// ---- gates

class GatesPart {
  constructor(player) {
    this.player = player;
    this.parts = {};
    this.said = make("p");
    this.grid = make("div", { className: "vlkd-gates" });
    this.element = part("Gates: keep probability, a row a layer, in descending order", this.said, this.grid);
  }

  draw(player) {
    const names = player.namesOf("gates/");
    this.element.hidden = names.length === 0 || !player.latest(names[0]);
    if (this.element.hidden) return;
    for (const name of names)
      this.parts[name] ??= new MatrixPart((matrix, row, column) => `layer ${row}, place ${column}: ${number(matrix.values[row * matrix.columns + column])}`);
    this.grid.replaceChildren(...names.filter((name) => player.latest(name)).map((name) => this.parts[name].element));
    const isNow = player.latest(names[0]).index === player.index;
    this.said.textContent = isNow ? "" : `as they were at ${player.latest(names[0]).where}`;
    for (const name of names) {
      const latest = player.latest(name);
      if (!latest) continue;
      const [open, all] = latest.numbers[name] ?? [];
      const [, tower, kind] = name.split("/");
      const title = `${tower} ${player.scene.gate_names[kind] ?? kind}` + (all ? `: ${Math.round(open).toLocaleString("en")} of ${all.toLocaleString("en")}` : "");
      const tall = Math.min(Math.max(latest.matrix.rows * 12, 24), 130);
      this.parts[name].draw(title, latest.matrix, [0, 1], player.palettes.sequential, player, () => tall);
    }
  }
}

// ---- clusters

class ClustersPart {
  constructor(player) {
    [this.player, this.chosen, this.points] = [player, null, []];
    this.canvas = make("canvas", { className: "vlkd-map" });
    this.canvas.setAttribute("role", "img");
    this.summary = make("p");
    this.said = make("output", { dir: "auto" });
    this.element = part("Images on the map of the teacher's clusters: ● the teacher's centre, × another, ◇ a centre", this.summary, this.canvas, this.said);
    this.canvas.addEventListener("mousemove", (event) => this.point(event));
    this.canvas.addEventListener("mouseleave", () => (this.said.textContent = ""));
    this.canvas.addEventListener("click", (event) => {
      const near = this.near(event);
      this.chosen = near === null || this.nearest(near) === this.chosen ? null : this.nearest(near);
      player.soon();
    });
  }

  nearest(k) {
    return Math.round(this.player.latest("clusters/nearest").matrix.values[k]);
  }

  limits() {
    const { player } = this;
    if (this.known?.size === player.store.size) return this.known;
    const all = [...player.allOf("clusters/student").map(([matrix]) => matrix), player.fixed["clusters/teacher"], player.fixed["clusters/centres"]];
    const spans = [0, 1].map((axis) => limitsOf(all.filter(Boolean).map(({ values }) => ({ values: values.filter((_, k) => k % 2 === axis) }))));
    this.known = { size: player.store.size, spans };
    return this.known;
  }

  colour(cluster, theme) {
    const { count } = this.player.about.clusters;
    if (this.chosen !== null) return cluster === this.chosen ? legible("#d55e00", theme, 3) : theme.faint;
    // of more than twenty the largest twenty, which come first among the centres
    const place = count > CATEGORIES ? this.largest.indexOf(cluster) : cluster;
    if (place < 0) return theme.dim;
    return `hsl(${Math.round((360 * place) / Math.min(count, CATEGORIES))} 70% ${place % 2 ? 38 : 55}%)`;
  }

  draw(player) {
    const now = player.latest("clusters/student"), { about, theme, fixed } = player;
    this.element.hidden = !now || !about.clusters;
    if (this.element.hidden) return;
    const { pen, width, height } = sized(this.canvas, Math.min(340, Math.max(200, this.canvas.clientWidth * 0.6)));
    const { spans } = this.limits();
    const place = (values, k) => [0, 1].map((axis) => {
      const share = (values[2 * k + axis] - spans[axis][0]) / (spans[axis][1] - spans[axis][0] || 1);
      return axis ? height - 10 - share * (height - 20) : 10 + share * (width - 20);
    });
    const centres = fixed["clusters/centres"].values, names = fixed["clusters/centre_names"].values;
    this.largest = Array.from(names.slice(0, CATEGORIES), Math.round);
    pen.lineWidth = 1.2;
    names.forEach((name, k) => {
      pen.strokeStyle = this.chosen === Math.round(name) ? theme.ink : theme.dim;
      const [x, y] = place(centres, k);
      pen.stroke(new Path2D(`M${x - 4} ${y} L${x} ${y - 4} L${x + 4} ${y} L${x} ${y + 4} Z`));
    });
    const nearest = player.latest("clusters/nearest").matrix.values, taught = fixed["clusters/teachers_nearest"].values;
    this.points = [...nearest.keys()].map((k) => place(now.matrix.values, k));
    this.points.forEach(([x, y], k) => {
      pen.strokeStyle = pen.fillStyle = this.colour(Math.round(nearest[k]), theme);
      if (nearest[k] !== taught[k]) return pen.stroke(new Path2D(`M${x - 3} ${y - 3} l6 6 m0 -6 l-6 6`));
      pen.beginPath();
      pen.arc(x, y, 3, 0, 7);
      pen.fill();
    });
    const [agreement, purity] = ["agreement", "purity"].map((name) => now.numbers[name]?.[0] ?? NaN);
    this.summary.textContent = `${now.where}: ${percent(agreement)} of the images have the teacher's centre; purity ${percent(purity)}` +
      (this.chosen === null ? "" : `; cluster ${this.chosen} is lit`);
    this.canvas.setAttribute("aria-label", this.summary.textContent);
  }

  near(event) {
    let best = null, least = 12;
    this.points.forEach(([x, y], k) => {
      const distance = Math.hypot(x - event.offsetX, y - event.offsetY);
      if (distance < least) [best, least] = [k, distance];
    });
    return best;
  }

  point(event) {
    const k = this.near(event), { clusters } = this.player.about;
    const taught = this.player.fixed["clusters/teachers_nearest"].values;
    if (k === null) return this.said.replaceChildren();
    const label = clusters.labels[k] ? `, class ${clusters.labels[k]}` : "";
    const words = `“${short(clusters.captions[k] ?? "", 80)}”${label}: student's cluster ${this.nearest(k)}, teacher's ${Math.round(taught[k])}`;
    this.said.replaceChildren(...tileOf(clusters.pictures, k), words);
  }
}

function tileOf(sheet, k) {
  // A tile of the one picture that holds all images of the map, larger than it is there; nothing where there is none.
  if (!sheet?.uri?.startsWith("data:image/jpeg;base64,") || !sheet.known.includes(k)) return [];
  const side = 1.5 * sheet.side, [column, row] = [k % sheet.columns, Math.floor(k / sheet.columns)];
  const tile = make("span", { className: "vlkd-tile" });
  Object.assign(tile.style, {
    width: `${side}px`, height: `${side}px`, backgroundImage: `url("${sheet.uri}")`,
    backgroundSize: `${side * sheet.columns}px auto`, backgroundPosition: `${-column * side}px ${-row * side}px`,
  });
  return [tile];
}

// ---- attention

class MapsPart {
  constructor(player) {
    [this.player, this.pictures, this.made, this.figures] = [player, new Map(), "", {}];
    this.words = make("div", { className: "vlkd-words", dir: "auto" });
    this.grid = make("div", { className: "vlkd-maps" });
    this.said = make("p");
    this.element = part("Where a word looks: brighter than the even spread", this.said, this.words, this.grid);
  }

  draw(player) {
    const { words } = player.about.probe;
    const names = player.namesOf("cross/");
    this.element.hidden = names.length === 0 || words.length === 0;
    if (this.element.hidden) return;
    const image = Math.min(player.image, words.length - 1);
    const word = player.word < 0 ? this.telling(names, image) : Math.min(player.word, words[image].length - 1);
    this.said.textContent = `image ${image}, “${words[image][word] ?? ""}”` + (image < player.image ? ` (the first ${words.length} images of the probe have maps)` : "");
    this.buttons(words[image], word);
    const shown = names.map((name) => this.figure(name, image, word)).filter(Boolean);
    this.grid.replaceChildren(...shown);
  }

  rowOf(name, image, word) {
    // The map of a word, of the teacher's or of the moment's; undefined where there is none.
    const matrix = this.player.fixed[name] ?? this.player.latest(name)?.matrix;
    if (!matrix) return undefined;
    const each = matrix.rows / Math.min(this.player.about.probe.words.length, matrix.rows);
    return word < each ? rowOf(matrix, Math.floor(image * each) + word) : undefined;
  }

  telling(names, image) {
    // An image begins with the word that looks hardest at one patch.
    const words = this.player.about.probe.words[image];
    const hardest = (word) => Math.max(0, ...(this.rowOf(names[0], image, word) ?? []));
    const choices = [...words.keys()].slice(1).filter((word) => words[word] !== "[SEP]");
    return choices.reduce((best, word) => (hardest(word) > hardest(best) ? word : best), choices[0] ?? 0);
  }

  buttons(words, chosen) {
    const made = JSON.stringify(words);
    if (made !== this.made) {
      this.made = made;
      this.words.replaceChildren(...words.map((word, k) => {
        const button = make("button", { type: "button", textContent: word });
        button.addEventListener("click", () => this.player.choose({ word: k }));
        return button;
      }));
    }
    [...this.words.children].forEach((button, k) => button.setAttribute("aria-pressed", k === chosen));
  }

  figure(name, image, word) {
    const map = this.rowOf(name, image, word);
    if (!map) return null;
    const [, module, model] = name.split("/");
    const { element, canvas } = (this.figures[name] ??= this.newFigure(`${model}, ${module}`));
    const side = Math.round(Math.sqrt(map.length));
    const models = ["teacher", "student"].map((one) => this.rowOf(`cross/${module}/${one}`, image, word)).filter(Boolean);
    const densest = Math.max(DENSE, ...models.flatMap((one) => [...one].filter(Number.isFinite).map((share) => share * one.length)));
    const { pen, width, height } = sized(canvas, 150);
    pen.fillStyle = "#777";
    pen.fillRect(0, 0, width, height);
    const seen = this.picture(this.player.about.probe.pictures[image]);
    if (seen) {
      pen.filter = "grayscale(1) brightness(0.85)";
      pen.drawImage(seen, 0, 0, width, height);
      pen.filter = "none";
    }
    const paint = (share) => {
      const glow = Math.min(Math.max(((share || 0) * map.length - 1) / (densest - 1), 0), 1);
      return [...colour(this.player.palettes.heat, (120 + 134 * glow) / 254), Math.round(255 * 0.85 * Math.sqrt(glow))];
    };
    pen.imageSmoothingEnabled = false;
    pen.drawImage(picture({ rows: side, columns: side, values: map }, paint), 0, 0, width, height);
    canvas.setAttribute("aria-label", `${model}, ${module}: most ${percent(Math.max(...map))} of the attention on one of ${map.length} patches`);
    return element;
  }

  newFigure(title) {
    const canvas = make("canvas");
    canvas.setAttribute("role", "img");
    return { canvas, element: make("figure", {}, make("figcaption", { textContent: title }), canvas) };
  }

  picture(uri) {
    if (!uri) return null;
    if (!this.pictures.has(uri)) this.pictures.set(uri, Object.assign(new Image(), { onload: () => this.player.soon(), src: uri }));
    const seen = this.pictures.get(uri);
    return seen.complete && seen.naturalWidth ? seen : null;
  }
}

// ---- the player

class Player {
  constructor(model, el) {
    this.model = model;
    this.store = new Map(); // name of a moment -> its matrices
    this.asked = new Map(); // name of a moment -> when it was asked for
    [this.index, this.timer, this.waiting, this.fixed] = [0, null, 0, {}];
    this.head();
    this.parts = [CurvesPart, AffinitiesPart, NearestPart, GatesPart, ClustersPart, MapsPart].map((kind) => new kind(this));
    this.notes = make("ul", { className: "vlkd-notes" });
    this.section = make("section", { className: "vlkd-player" }, this.bar, this.marks, ...this.parts.map(({ element }) => element), this.notes);
    this.section.dataset.lmSuppressShortcuts = "true"; // JupyterLab takes the letters and arrow keys otherwise
    this.section.addEventListener("keydown", (event) => this.key(event));
    el.append(this.section);
    this.theme = setTheme(this.section);
  }

  head() {
    this.play = make("button", { type: "button", className: "vlkd-play" });
    this.play.addEventListener("click", () => this.toggle());
    this.slider = make("input", { type: "range", min: 0, step: 1 });
    this.slider.setAttribute("aria-label", "moment of the run");
    this.slider.addEventListener("input", () => this.go(+this.slider.value));
    this.slider.addEventListener("change", () => this.keep());
    this.speed = make("select", { title: "speed" });
    this.speed.setAttribute("aria-label", "speed");
    this.speed.append(...Object.keys(SPEEDS).map((value) => make("option", { value, textContent: value })));
    this.speed.value = "1×";
    this.speed.addEventListener("change", () => this.timer && this.start());
    this.where = make("output", { className: "vlkd-where" });
    this.bar = make("div", { className: "vlkd-bar" }, this.play, this.slider, this.speed, this.where);
    this.marks = make("div", { className: "vlkd-marks" });
  }

  // what is shown

  take() {
    // Take over what the model has: moments may have come or gone.
    const scene = this.model.get("scene");
    const about = { ...this.model.get("about"), ...scene, curves: this.model.get("curves") };
    const before = this.about?.moments[this.index]?.name;
    const wasLast = !this.about || this.index >= this.about.moments.length - 1;
    this.about = about;
    const wanted = before === undefined ? this.model.get("moment") : wasLast ? "" : before;
    const place = about.moments.findIndex(({ name }) => name === wanted);
    this.index = place < 0 ? Math.max(about.moments.length - 1, 0) : place;
    for (const name of ["measure", "image", "word"]) this[name] = this.model.get(name);
    if (scene !== this.scene) {
      const bytes = this.model.get("fixed");
      this.fixed = matricesOf(scene.fixed.arrays, new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.byteLength));
      this.palettes = Object.fromEntries(Object.entries(scene.palettes).map(([name, text]) => [name, bytesOf(text)]));
      this.scene = scene;
    }
    for (const name of [...this.store.keys()].filter((one) => !about.moments.some((moment) => moment.name === one))) this.store.delete(name);
    this.ask();
    this.soon();
  }

  ask() {
    // Ask for the moments that are not here yet, the nearest to the one that is shown first.
    const now = Date.now(), { moments } = this.about;
    const missing = [...moments.keys()].filter((k) => !this.store.has(moments[k].name) && !(now - this.asked.get(moments[k].name) < ASKED_MS));
    missing.sort((one, other) => Math.abs(one - this.index) - Math.abs(other - this.index));
    const names = missing.map((k) => moments[k].name);
    names.forEach((name) => this.asked.set(name, now));
    if (names.length) this.model.send({ requested: { frames: names } });
  }

  receive({ name, arrays, numbers }, bytes) {
    this.store.set(name, { matrices: matricesOf(arrays, bytes), numbers });
    this.soon();
  }

  at(index, name) {
    const moment = this.about.moments[index];
    const known = moment && this.store.get(moment.name);
    const matrix = known?.matrices[name];
    return matrix && { matrix, index, numbers: known.numbers, where: whereOf(moment) };
  }

  latest(name) {
    // A matrix as it is at this moment, or as it was when it was last seen.
    for (let index = this.index; index >= 0; index--) {
      const known = this.at(index, name);
      if (known) return known;
    }
    return undefined;
  }

  first(name) {
    const index = [...this.about.moments.keys()].find((k) => this.at(k, name));
    return index === undefined ? undefined : this.at(index, name);
  }

  allOf(name) {
    const known = [...this.about.moments.keys()].map((k) => this.at(k, name)).filter(Boolean);
    return known.map(({ matrix, numbers }) => [matrix, numbers[`${name}_scale`]?.[0] ?? 1]);
  }

  namesOf(start) {
    // Names of matrices that any moment or the teacher has.
    const all = [this.fixed, ...[...this.store.values()].map(({ matrices }) => matrices)];
    const names = [...new Set(all.flatMap(Object.keys))].filter((name) => name.startsWith(start));
    const place = (name) => name.replace("teacher", "0"); // the teacher's before the student's
    return start === "cross/" ? names.sort((one, other) => place(one).localeCompare(place(other))) : names;
  }

  scaleOf(model) {
    return this.about.fixed.numbers[`${model}_scale`]?.[0] ?? 1;
  }

  // going through the run

  go(index) {
    this.index = Math.min(Math.max(Math.round(index), 0), Math.max(this.about.moments.length - 1, 0));
    this.soon();
  }

  goToPlace(place) {
    const { moments } = this.about;
    const distance = (k) => Math.abs(moments[k].place - place);
    this.go([...moments.keys()].reduce((best, k) => (distance(k) < distance(best) ? k : best), 0));
  }

  toggle() {
    if (this.timer) return this.stop();
    if (this.index >= this.about.moments.length - 1) this.go(0);
    this.start();
  }

  start() {
    clearInterval(this.timer);
    this.timer = setInterval(() => {
      if (this.index >= this.about.moments.length - 1 || !this.section.isConnected) return this.stop();
      this.go(this.index + 1);
    }, 1000 / SPEEDS[this.speed.value]);
    this.soon();
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
    this.keep();
    this.soon();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation();
    if (["SELECT", "CANVAS"].includes(event.target.tagName)) return;
    const last = this.about.moments.length - 1;
    const to = { ArrowLeft: this.index - 1, ArrowRight: this.index + 1, Home: 0, End: last }[event.key];
    if (to !== undefined) {
      this.go(to);
      this.keep();
    } else if (event.key === " " && event.target.tagName !== "BUTTON") this.toggle();
    else return;
    event.preventDefault();
  }

  choose(changes) {
    Object.assign(this, changes);
    for (const [name, value] of Object.entries(changes)) this.model.set(name, value);
    this.model.save_changes();
    this.soon();
  }

  keep() {
    // A page that is loaded again shows the same moment; at the end it goes on with the run.
    const isLast = this.index >= this.about.moments.length - 1;
    this.model.set("moment", isLast ? "" : this.about.moments[this.index].name);
    this.model.save_changes();
  }

  // drawing

  soon() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      this.draw();
    });
  }

  draw() {
    this.theme = setTheme(this.section);
    const { moments, problems, run, method, state } = this.about, moment = moments[this.index];
    this.section.setAttribute("aria-label", `time line of ${run}`);
    this.slider.max = Math.max(moments.length - 1, 0);
    this.slider.value = this.index;
    this.slider.disabled = this.play.disabled = moments.length < 2;
    this.play.textContent = this.timer ? "❚❚" : "▶";
    this.play.setAttribute("aria-label", this.timer ? "pause" : "play");
    const count = `${this.index + 1} of ${moments.length}`;
    const isHere = moment && this.store.has(moment.name);
    const words = moment ? `${whereOf(moment)} (${count})${isHere ? "" : ", on its way"}` : "no moment is kept yet: they come while the run trains, unless keep_snapshots is 0";
    this.where.textContent = words;
    this.slider.setAttribute("aria-valuetext", words);
    this.drawMarks(moments);
    for (const one of this.parts) one.draw(this);
    const titles = [`${run}${method ? `, ${method}` : ""}, ${state}`, ...problems];
    this.notes.replaceChildren(...titles.map((textContent) => make("li", { textContent, dir: "auto" })));
    Object.assign(this.section.dataset, { index: this.index, count: moments.length, here: this.store.size });
  }

  drawMarks(moments) {
    const runs = [];
    moments.forEach(({ stage, phase }, k) => {
      const name = phase ? `${stage} · ${phase}` : stage;
      if (runs.at(-1)?.name === name) runs.at(-1).length++;
      else runs.push({ name, start: k, length: 1 });
    });
    const made = JSON.stringify(runs);
    if (made !== this.made) {
      this.made = made;
      this.marks.replaceChildren(...runs.map(({ name, start, length }) => {
        const button = make("button", { type: "button", textContent: name, title: `${name}: go to its first moment` });
        button.style.flexGrow = length;
        button.addEventListener("click", () => this.go(start));
        return button;
      }));
    }
    runs.forEach(({ start, length }, k) => this.marks.children[k].setAttribute("aria-pressed", this.index >= start && this.index < start + length));
  }
}

function whereOf({ stage, phase, step }) {
  return [stage, phase, `step ${step.toLocaleString("en")}`].filter(Boolean).join(" · ");
}

function render({ model, el }) {
  const player = new Player(model, el);
  const take = () => player.take();
  const receive = ({ frames }, buffers) => frames?.forEach((frame, k) => player.receive(frame, new Uint8Array(buffers[k].buffer, buffers[k].byteOffset, buffers[k].byteLength)));
  const changes = ["about", "scene", "curves"].map((name) => `change:${name}`).join(" ");
  model.on(changes, take);
  model.on("msg:custom", receive);
  take();
  const unseen = saySeen(model, el);
  const asking = setInterval(() => player.ask(), PULSE_MS);
  const themed = onTheme(() => player.soon());
  const observer = new ResizeObserver(() => player.soon());
  observer.observe(player.section);
  return () => {
    unseen();
    clearInterval(asking);
    clearInterval(player.timer);
    cancelAnimationFrame(player.waiting);
    observer.disconnect();
    themed();
    model.off(changes, take);
    model.off("msg:custom", receive);
  };
}

function mount(el, { frames, ...values }, bytes) {
  // A page without a kernel: the bytes of all moments are here, behind those that do not move.
  const sizeOf = ({ arrays }) => arrays.reduce((sum, { rows, columns, width }) => sum + rows * columns * width, 0);
  let start = sizeOf(values.scene.fixed);
  const state = { moment: "", measure: "cosine", image: 0, word: -1, ...values, fixed: bytes.subarray(0, start) };
  const nothing = () => {};
  const player = new Player({ get: (name) => state[name], set: nothing, save_changes: nothing, send: nothing }, el);
  for (const frame of frames) {
    player.store.set(frame.name, { matrices: matricesOf(frame.arrays, bytes.subarray(start)), numbers: frame.numbers });
    start += sizeOf(frame);
  }
  player.take();
  player.draw(); // at once: a frame that is scrolled out of sight gets no animation frames
  onTheme(() => player.soon());
  new ResizeObserver(() => player.soon()).observe(player.section);
}

export default { render };
