// Draws the towers of a student over its teacher's outline, the numbers beside, and where a chosen head looks. What is drawn and
// chosen is state in Python (vlkd_lab.widgets.NetworkView). Captions and tokens are strangers': all text goes in as text.

const SVG = "http://www.w3.org/2000/svg";
const NAMES = 16; // room for the number of a layer, CSS pixels
const GAP = 10; // between heads and MLP
const STREAM = 3; // height of the bar of the embedding dimension
const TOP = 254; // the byte of the largest share in a map
const SIDE = 190; // of a picture with its map

function shape(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function place(element, x, y, width, height) {
  element.setAttribute("x", x.toFixed(1));
  element.setAttribute("y", y.toFixed(1));
  element.setAttribute("width", Math.max(width, 0).toFixed(1));
  element.setAttribute("height", Math.max(height, 0).toFixed(1));
}

function words(value, unit) {
  if (value === null || value === undefined) return "—";
  const text = value >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
  return unit ? `${text} ${unit}` : text;
}

class Tower {
  // One tower: made once for its rows and width, then only moved.
  constructor(spec, choose) {
    this.spec = spec;
    this.choose = choose;
    this.caption = make("figcaption");
    this.svg = shape("svg", { role: "group", "aria-label": `${spec.name} tower: arrow keys walk its layers and heads, Enter chooses one` });
    this.element = make("figure", { className: "vlkd-tower" }, this.caption, this.svg);
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.heads = new Map(); // "row place" -> its button
    this.cursor = null;
  }

  get rowHeight() {
    return Math.min(Math.max(Math.round(300 / this.spec.rows.length), 11), 26);
  }

  layOut(width) {
    // Outlines and places: what does not change while gates close.
    if (this.width === width) return;
    this.width = width;
    const isFocused = this.svg.contains(document.activeElement);
    const { teacher, student, rows, places } = this.spec, height = this.rowHeight, shapes = [teacher, student].filter(Boolean);
    const room = (width - NAMES - GAP) / 2, left = NAMES, right = NAMES + room + GAP;
    const widest = Math.max(...shapes.flatMap((one) => (one.widths?.length ? one.widths : [one.width]))), most = Math.max(1, ...shapes.flatMap((one) => one.neurons));
    this.scale = { left, right, heads: room / widest, neurons: room / most };
    this.heads.clear();
    this.bars = rows.map(() => ({ stream: shape("rect", { class: "vlkd-stream" }), neurons: shape("rect", { class: "vlkd-kept", "fill-opacity": 0.7 }) }));
    const parts = rows.flatMap(([of_teacher, of_student], row) => {
      const y = row * height, isGhost = of_student === null, line = `vlkd-outline${isGhost ? " vlkd-ghost" : ""}`;
      const number = shape("text", { x: 0, y: y + height / 2 + 3 });
      number.textContent = row;
      const drawn = [number];
      if (of_teacher !== null) {
        drawn.push(this.box(line, left, y, (teacher.widths?.[of_teacher] ?? teacher.width) * this.scale.heads), this.box(line, right, y, teacher.neurons[of_teacher] * this.scale.neurons));
      }
      drawn.push(...this.buttons(row, of_teacher === null ? 0 : teacher.heads[of_teacher], isGhost ? [] : places[of_student]));
      return isGhost ? drawn : [...drawn, this.bars[row].stream, this.bars[row].neurons];
    });
    this.svg.setAttribute("height", rows.length * height + 2);
    this.svg.replaceChildren(...parts);
    this.walk(this.heads.has(this.cursor) ? this.cursor : [...this.heads.keys()][0], isFocused);
  }

  box(name, x, y, width) {
    const rect = shape("rect", { class: name });
    place(rect, x + 0.5, y + 1.5, width - 1, this.rowHeight - 3);
    return rect;
  }

  buttons(row, ofTeacher, ofStudent) {
    // A button a head, the student's where it stands, the teacher's also where the student has none.
    const { teacher, student } = this.spec, all = [...new Set([...Array(ofTeacher).keys(), ...ofStudent])].sort((a, b) => a - b);
    return all.map((k) => {
      const ours = ofStudent.includes(k), size = (k < ofTeacher ? teacher : student).head_width * this.scale.heads;
      const free = shape("rect", { class: "vlkd-place" }), kept = shape("rect", { class: "vlkd-kept" });
      const button = shape("g", { class: "vlkd-head", role: "button", tabindex: -1, "aria-pressed": false }, free, ...(ours ? [kept] : []));
      place(free, this.scale.left + k * size + 1, row * this.rowHeight + 2, size - 2, this.rowHeight - 4 - STREAM);
      Object.assign(button, { row, place: k, size, kept: ours ? kept : null });
      button.addEventListener("click", () => this.choose([this.spec.name, row, k]));
      this.heads.set(`${row} ${k}`, button);
      return button;
    });
  }

  draw(keep, sizes, chosen) {
    // How much of it there is now: a byte a head, and the sizes of the layers.
    const { rows, places, teacher, student } = this.spec, height = this.rowHeight;
    let at = 0;
    const starts = (student?.heads ?? []).map((count) => (at += count) - count);
    rows.forEach(([, layer], row) => {
      if (layer === null) return;
      place(this.bars[row].stream, this.scale.left, (row + 1) * height - STREAM - 1, (student.widths?.[layer] ?? sizes.width) * this.scale.heads, STREAM);
      place(this.bars[row].neurons, this.scale.right, row * height + 3, sizes.neurons[layer] * this.scale.neurons, height - 6);
      places[layer].forEach((k, head) => this.shrink(this.heads.get(`${row} ${k}`), keep[starts[layer] + head] / 255));
    });
    for (const [name, button] of this.heads) {
      const what = `${this.spec.name} tower, layer ${button.row}, head ${button.place}`;
      const share = button.kept ? `keep probability ${button.share.toFixed(2)}` : "the student has none";
      button.setAttribute("aria-label", `${what}: ${share}`);
      button.setAttribute("aria-pressed", chosen.length > 0 && chosen[0] === this.spec.name && name === `${chosen[1]} ${chosen[2]}`);
    }
    const around = student?.widths?.length ? `${Math.min(...student.widths)} to ${Math.max(...student.widths)} channels around its blocks` : "";
    const width = around || (student ? `embedding dimension ${sizes.width}${teacher ? ` of ${teacher.width}` : ""}` : "");
    const neurons = student ? `MLP hidden size ${Math.max(0, ...sizes.neurons)}${teacher ? ` of ${Math.max(...teacher.neurons)}` : ""} at most` : "";
    const said = [width, neurons, this.spec.origin, ...Object.entries(this.spec.blocks).map(([model, what]) => `${model}: ${what}`)];
    this.caption.replaceChildren(make("b", { textContent: `${this.spec.name} tower` }), make("br"), make("small", { textContent: said.filter(Boolean).join("; ") }));
  }

  shrink(button, share) {
    const side = 0.25 + 0.75 * share, room = this.rowHeight - 5 - STREAM;
    const x = this.scale.left + (button.place + 0.5) * button.size, y = button.row * this.rowHeight + 2 + room / 2;
    place(button.kept, x - (side * (button.size - 2)) / 2, y - (side * room) / 2, side * (button.size - 2), side * room);
    button.kept.setAttribute("fill-opacity", (0.2 + 0.8 * share).toFixed(2));
    button.share = share;
  }

  walk(name, focus = true) {
    // Only the head at the cursor is reached by the Tab key.
    const next = this.heads.get(name);
    if (!next) return;
    this.heads.get(this.cursor)?.setAttribute("tabindex", -1);
    this.cursor = name;
    next.setAttribute("tabindex", 0);
    if (focus) next.focus();
  }

  key(event) {
    const button = this.heads.get(this.cursor);
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    if (down || right) this.walk(this.nearest(button.row + down, button.place + right));
    else if (event.key === "Enter" || event.key === " ") this.choose([this.spec.name, button.row, button.place]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  nearest(row, k) {
    // The head of a row that is nearest to a place; a row without heads is stepped over by none.
    const ofRow = [...this.heads.values()].filter((button) => button.row === row);
    const best = ofRow.sort((a, b) => Math.abs(a.place - k) - Math.abs(b.place - k))[0];
    return best ? `${row} ${best.place}` : this.cursor;
  }
}

// ---- what a head looks at

function heat(palette, value) {
  return [0, 1, 2].map((c) => palette.getUint8(3 * Math.round(120 + 134 * value) + c));
}

function glow(byte, even) {
  return Math.min(Math.max((byte - even) / (TOP - even), 0), 1); // above an even spread, 0 to 1
}

function overPicture(panel, bytes, palette, picture) {
  // A map of patches over the grey picture.
  const { rows, columns, high } = panel, even = TOP / (high * rows * columns), ratio = window.devicePixelRatio || 1;
  const canvas = make("canvas", { width: SIDE * ratio, height: SIDE * ratio }), small = make("canvas", { width: columns, height: rows });
  canvas.style.width = canvas.style.height = `${SIDE}px`;
  const image = new ImageData(columns, rows);
  bytes.forEach((byte, i) => {
    const value = byte > TOP ? 0 : glow(byte, even);
    image.data.set([...heat(palette, value), Math.round(217 * Math.sqrt(value))], 4 * i);
  });
  small.getContext("2d").putImageData(image, 0, 0);
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#ffffff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.filter = "grayscale(1) brightness(0.85)";
  if (picture) pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  pen.filter = "none";
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, 0, 0, canvas.width, canvas.height);
  return canvas;
}

function overTokens(panel, bytes, tokens) {
  // The tokens of a text, each with as much colour as it has of the attention.
  const box = make("div", { className: "vlkd-tokens", dir: "auto" });
  tokens.forEach((token, k) => {
    const share = (panel.high * bytes[k]) / TOP;
    const span = make("span", { textContent: token, title: `${(100 * share).toFixed(1)} %` });
    span.style.background = `rgb(230 159 0 / ${Math.min(share * 1.2, 0.85).toFixed(2)})`;
    box.append(span);
  });
  return box;
}

function heatFigure(panel, bytes, state) {
  const isImage = state.chosen[0] === "image";
  const drawn = isImage ? overPicture(panel, bytes, state.palette, state.picture) : overTokens(panel, bytes, state.words);
  const said = `at most ${(100 * panel.most).toFixed(1)} % a ${isImage ? "patch" : "token"}, ${(100 * panel.total).toFixed(0)} % in all`;
  if (isImage) drawn.setAttribute("role", "img");
  drawn.setAttribute("aria-label", `where the ${panel.model}'s head looks: ${said}`);
  return make("figure", {}, make("figcaption", { textContent: panel.model }), drawn, make("small", { textContent: said }));
}

class Looks {
  // The chosen head: which pair, what is known of it, a map of each model.
  constructor(ask, redraw) {
    this.ask = ask;
    this.redraw = redraw;
    this.said = make("span");
    this.said.setAttribute("role", "status");
    this.close = make("button", { type: "button", textContent: "close" });
    this.close.addEventListener("click", () => ask("head", []));
    this.pairs = make("div", { className: "vlkd-pairs" });
    this.heats = make("div", { className: "vlkd-heats" });
    this.element = make("div", { className: "vlkd-looks" }, make("p", {}, this.said, this.close), this.pairs, this.heats);
    this.loaded = new Map();
  }

  picture(uri) {
    // A picture that has been decoded, or nothing until then.
    if (uri && !this.loaded.has(uri)) this.loaded.set(uri, Object.assign(new Image(), { onload: this.redraw, src: uri }));
    const found = this.loaded.get(uri);
    return found?.complete && found.naturalWidth ? found : null;
  }

  choices(captions, uris, chosen) {
    const labels = JSON.stringify([captions, uris.map((uri) => uri.length)]);
    if (labels !== this.labels) {
      this.labels = labels;
      this.pairs.replaceChildren(...captions.map((caption, k) => {
        const button = make("button", { type: "button", title: caption }, uris[k] ? make("img", { src: uris[k], alt: `pair ${k}: ${caption}` }) : `${k}`);
        button.dataset.name = `pair-${k}`;
        button.addEventListener("click", () => this.ask("pair", k));
        return button;
      }));
    }
    [...this.pairs.children].forEach((button, k) => button.setAttribute("aria-pressed", k === chosen));
  }

  draw(model) {
    const chosen = model.get("chosen"), uris = model.get("pictures"), frame = model.get("frame"), pair = model.get("pair");
    this.said.textContent = model.get("said");
    this.element.hidden = chosen.length === 0 && !model.get("said");
    this.choices(model.get("pairs"), uris, pair);
    const state = { chosen, palette: model.get("palette"), picture: this.picture(uris[pair]), words: model.get("words") };
    const bytes = new Uint8Array(frame.buffer, frame.byteOffset, frame.byteLength);
    let start = 0;
    this.heats.replaceChildren(...model.get("panels").map((panel) => {
      const end = start + panel.rows * panel.columns, part = bytes.slice(start, end);
      start = end;
      return heatFigure(panel, part, state);
    }));
  }
}

// ---- the view

function numberRows(numbers) {
  return numbers.map(([name, unit, student, teacher]) => {
    const share = student !== null && teacher ? `${Math.round((100 * student) / teacher)} %` : "";
    const head = make("th", { textContent: name });
    head.setAttribute("scope", "row");
    const cells = [words(student, unit), words(teacher, unit), share].map((textContent) => make("td", { textContent }));
    return make("tr", {}, head, ...cells);
  });
}

function render({ model, el }) {
  const ask = (name, value) => model.send({ requested: { [name]: value } });
  const title = make("h3"), towers = make("div", { className: "vlkd-towers" }), body = make("tbody");
  const names = ["", "student", "teacher", "share"].map((textContent) => make("th", { textContent }));
  const table = make("table", { className: "vlkd-numbers" }, make("thead", {}, make("tr", {}, ...names)), body);
  table.setAttribute("aria-label", "what the network costs");
  const looks = new Looks(ask, () => view.soon());
  const section = make("section", { className: "vlkd-network" }, title, make("div", { className: "vlkd-inside" }, towers, table), looks.element);
  section.setAttribute("aria-label", "the network");
  section.dataset.lmSuppressShortcuts = "true"; // JupyterLab takes the letters and arrow keys otherwise
  el.append(section);
  let made = "", parts = [];

  const draw = () => {
    const specs = model.get("towers"), shapeOf = JSON.stringify(specs), keep = new Uint8Array(model.get("keep").buffer, model.get("keep").byteOffset, model.get("keep").byteLength);
    if (shapeOf !== made) {
      made = shapeOf;
      parts = specs.map((spec) => new Tower(spec, (head) => ask("head", head)));
      towers.replaceChildren(...parts.map((part) => part.element));
    }
    section.style.setProperty("--vlkd-student", legible("#0072b2", themeOf(section), 3));
    title.replaceChildren(make("small", { textContent: `${model.get("title")}; the teacher's outline behind the student. Choose a head to see where it looks.` }));
    let start = 0;
    for (const part of parts) {
      const count = (part.spec.student?.heads ?? []).reduce((sum, heads) => sum + heads, 0);
      if (part.spec.rows.length) part.layOut(Math.floor(part.element.clientWidth) || 270);
      part.draw(keep.subarray(start, start + count), model.get("sizes")[part.spec.name] ?? { width: 0, neurons: [] }, model.get("chosen"));
      start += count;
    }
    body.replaceChildren(...numberRows(model.get("numbers")));
    looks.draw(model);
    section.dataset.frame = model.get("number");
  };

  const view = follow(model, el, draw);
  const resized = new ResizeObserver(() => view.soon());
  resized.observe(section);
  return () => {
    resized.disconnect();
    view.stop();
  };
}

export default { render };
