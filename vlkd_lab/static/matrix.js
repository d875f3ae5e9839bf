// Draws one matrix, a byte an entry. What is drawn and what is chosen is state in Python (vlkd_lab.widgets.MatrixView).

const MISSING = 255; // the byte of an entry that is not a number
const BAR = 12; // width of the colour bar, CSS pixels
const TEXT = 13; // height of a line of text
const SIDES = TEXT + 4 + BAR + 46; // left and right of the matrix: the name at the side, the colour bar and its words
const THIN = 26; // height of a single row
const LEAST = 160; // width of the whole, however narrow the page is

function short(text, most) {
  return text.length > most ? text.slice(0, most - 1) + "…" : text;
}

function number(value) {
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 10000) ? value.toExponential(1) : String(+value.toPrecision(3)).replace("-", "−");
}

function pixels(model) {
  // The matrix as an offscreen canvas, one pixel an entry.
  const rows = model.get("rows"), columns = model.get("columns");
  const frame = model.get("frame"), palette = model.get("palette");
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [Math.max(columns, 1), Math.max(rows, 1)];
  if (frame.byteLength < rows * columns || palette.byteLength < 768) return canvas;
  const image = new ImageData(canvas.width, canvas.height);
  for (let i = 0; i < rows * columns; i++) {
    const byte = frame.getUint8(i);
    const missing = byte === MISSING;
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = missing ? 128 : palette.getUint8(3 * byte + c);
    image.data[4 * i + 3] = missing ? 40 : 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function valueAt(model, row, column) {
  const byte = model.get("frame").getUint8(row * model.get("columns") + column);
  const low = model.get("low"), high = model.get("high");
  return byte === MISSING ? null : low + ((high - low) * byte) / (MISSING - 1);
}

function describe(model, row, column) {
  const value = valueAt(model, row, column);
  const said = (name, texts, k) => `${name} ${k}` + (texts[k] ? ` “${short(texts[k], 60)}”` : "");
  const row_said = said(model.get("row_name"), model.get("row_texts"), row);
  const column_said = said(model.get("column_name"), model.get("column_texts"), column);
  return `${row_said} × ${column_said}: ${value === null ? "none" : number(value)}`;
}

class View {
  constructor(model, el) {
    this.model = model;
    this.cursor = null;
    this.size = { width: 0, height: 0 };
    this.box = document.createElement("figure");
    this.box.className = "vlkd-matrix";
    this.box.dataset.lmSuppressShortcuts = "true"; // JupyterLab takes the arrow keys otherwise
    this.title = document.createElement("figcaption");
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.readout = document.createElement("output");
    this.readout.setAttribute("aria-live", "polite");
    this.readout.dir = "auto";
    this.box.append(this.title, this.canvas, this.readout);
    el.append(this.box);
    this.canvas.addEventListener("mousemove", (event) => this.point(this.cellAt(event)));
    this.canvas.addEventListener("mouseleave", () => this.point(null));
    this.canvas.addEventListener("click", (event) => this.choose(this.cellAt(event)));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  measure() {
    // The whole canvas: as wide as there is room; as high as the matrix says, in its proportion where it grows both ways.
    const { model } = this;
    const width = Math.max(Math.floor(this.box.clientWidth) || model.get("width"), LEAST);
    const below = TEXT + 7;
    let inner = model.get("height") - below;
    if (model.get("rows") === 1) inner = THIN;
    else if (model.get("grows") === "both") inner = Math.round((inner * (width - SIDES)) / (model.get("width") - SIDES));
    return { width, height: inner + below };
  }

  get place() {
    // The rectangle of the matrix inside the canvas, in CSS pixels.
    const { width, height } = this.size;
    return { x: TEXT + 4, y: 2, width: width - SIDES, height: height - TEXT - 7 };
  }

  draw() {
    const { model, canvas } = this;
    const { width, height } = (this.size = this.measure());
    const ratio = window.devicePixelRatio || 1;
    const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== across || canvas.height !== down) {
      [canvas.width, canvas.height] = [across, down];
      [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    this.ink = getComputedStyle(this.box).color;
    const { x, y, width: w, height: h } = this.place;
    pen.imageSmoothingEnabled = false;
    pen.drawImage(pixels(model), x, y, w, h);
    this.axes(pen);
    this.bar(pen);
    this.mark(pen, model.get("selected"), "#d81b60");
    this.mark(pen, this.cursor, this.ink);
    this.title.textContent = model.get("title");
    canvas.setAttribute("aria-label", `${model.get("title")}: ${model.get("rows")} × ${model.get("columns")}, ${model.get("measure")}`);
    canvas.dataset.frame = model.get("number");
  }

  axes(pen) {
    const { x, y, width: w, height: h } = this.place;
    pen.strokeStyle = pen.fillStyle = this.ink;
    pen.lineWidth = 0.5;
    pen.strokeRect(x, y, w, h);
    pen.font = "11px sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "bottom";
    pen.fillText(this.model.get("column_label"), x + w / 2, y + h + TEXT + 4);
    pen.save();
    pen.translate(x - 3, y + h / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText(this.model.get("row_label"), 0, 0);
    pen.restore();
  }

  bar(pen) {
    const { x, y, width: w, height: h } = this.place, palette = this.model.get("palette");
    const left = x + w + 6, low = this.model.get("low"), high = this.model.get("high");
    if (palette.byteLength < 768) return;
    for (let k = 0; k < h; k++) {
      const byte = Math.round((1 - k / Math.max(h - 1, 1)) * (MISSING - 1));
      pen.fillStyle = `rgb(${[0, 1, 2].map((c) => palette.getUint8(3 * byte + c)).join()})`;
      pen.fillRect(left, y + k, BAR, 1.5);
    }
    pen.fillStyle = this.ink;
    pen.textAlign = "left";
    pen.font = "10px sans-serif";
    pen.textBaseline = "top";
    pen.fillText(number(high), left + BAR + 3, y);
    pen.textBaseline = "bottom";
    pen.fillText(number(low), left + BAR + 3, y + h);
    pen.save();
    const long = pen.measureText(this.model.get("measure")).width;
    const numbers = Math.max(...[low, high].map((value) => pen.measureText(number(value)).width));
    pen.translate(left + BAR + (long > h - 26 ? 10 + numbers : 14), y + h / 2); // between the two numbers, or beside them
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    if (long <= h) pen.fillText(this.model.get("measure"), 0, 0);
    pen.restore();
  }

  mark(pen, cell, colour) {
    if (!cell || cell.length !== 2) return;
    const { x, y, width: w, height: h } = this.place;
    const [dx, dy] = [w / this.model.get("columns"), h / this.model.get("rows")];
    pen.strokeStyle = colour;
    pen.lineWidth = 1.5;
    pen.strokeRect(x + cell[1] * dx, y + cell[0] * dy, dx, dy);
  }

  cellAt(event) {
    const { x, y, width: w, height: h } = this.place;
    const column = Math.floor(((event.offsetX - x) / w) * this.model.get("columns"));
    const row = Math.floor(((event.offsetY - y) / h) * this.model.get("rows"));
    const inside = row >= 0 && column >= 0 && row < this.model.get("rows") && column < this.model.get("columns");
    return inside ? [row, column] : null;
  }

  point(cell) {
    this.cursor = cell;
    this.readout.textContent = cell ? describe(this.model, ...cell) : "";
    this.draw();
  }

  choose(cell) {
    if (cell) this.model.send({ chosen: cell });
  }

  key(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step) {
      const [row, column] = this.cursor ?? [0, 0], most = [this.model.get("rows") - 1, this.model.get("columns") - 1];
      this.point([Math.min(Math.max(row + step[0], 0), most[0]), Math.min(Math.max(column + step[1], 0), most[1])]);
    } else if (event.key === "Enter" || event.key === " ") this.choose(this.cursor);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

function render({ model, el }) {
  const view = new View(model, el);
  el.classList.add("vlkd-matrix-view");
  const following = follow(model, el, () => view.draw());
  const resized = new ResizeObserver(following.soon); // drawn anew from its bytes, so that it stays crisp
  resized.observe(view.box);
  return () => {
    resized.disconnect();
    following.stop();
  };
}

export default { render };
