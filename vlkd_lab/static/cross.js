// Draws where a model looks in an image for a word. What is chosen, and every map, is state in Python (vlkd_lab.widgets.CrossView).
// All text goes in as text, never as HTML.

const TOP = 254; // the byte of the largest share
const SIDE = 198; // of a picture with its map, CSS pixels

function percent(share) {
  return `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
}

function glow(byte, even) {
  return Math.min(Math.max((byte - even) / (TOP - even), 0), 1); // above an even spread, 0 to 1; the still does the same
}

class Panel {
  // One model's map over the picture.
  constructor() {
    this.title = make("figcaption");
    this.canvas = make("canvas");
    this.canvas.setAttribute("role", "img");
    this.said = make("output");
    this.element = make("figure", {}, this.title, this.canvas, this.said);
    this.canvas.addEventListener("mousemove", (event) => this.point(event));
    this.canvas.addEventListener("mouseleave", () => (this.said.textContent = this.summary));
  }

  draw(spec, bytes, palette, picture, word) {
    const ratio = window.devicePixelRatio || 1, canvas = this.canvas;
    [this.spec, this.bytes] = [spec, bytes];
    this.summary = `at most ${percent(spec.most)} a patch, ${percent(spec.total)} in all`;
    this.title.textContent = spec.title;
    this.said.textContent = this.summary;
    [canvas.width, canvas.height] = [SIDE * ratio, SIDE * ratio];
    canvas.style.width = canvas.style.height = `${SIDE}px`;
    canvas.setAttribute("aria-label", `${spec.title}, “${word}”: ${this.summary}`);
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#ffffff";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    if (picture) {
      pen.filter = "grayscale(1) brightness(0.85)";
      pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
      pen.filter = "none";
    }
    pen.imageSmoothingEnabled = false;
    if (bytes.length === spec.side ** 2 && palette.byteLength >= 768) pen.drawImage(this.colours(palette), 0, 0, canvas.width, canvas.height);
  }

  colours(palette) {
    const { side, high } = this.spec, even = TOP / (high * side * side), small = make("canvas", { width: side, height: side }), image = new ImageData(side, side);
    this.bytes.forEach((byte, i) => {
      const value = glow(byte, even);
      for (let c = 0; c < 3; c++) image.data[4 * i + c] = palette.getUint8(3 * Math.round(120 + 134 * value) + c);
      image.data[4 * i + 3] = byte > TOP ? 0 : Math.round(255 * 0.85 * Math.sqrt(value));
    });
    small.getContext("2d").putImageData(image, 0, 0);
    return small;
  }

  point(event) {
    const { side, high } = this.spec, at = (offset) => Math.min(Math.max(Math.floor((offset / SIDE) * side), 0), side - 1);
    const [row, column] = [at(event.offsetY), at(event.offsetX)];
    this.said.textContent = `patch ${row}, ${column}: ${percent((high * this.bytes[row * side + column]) / TOP)}`;
  }
}

function choices(box, labels, name, ask, fill) {
  // Buttons for one of several, made once for the same labels, so that the focus stays where it is.
  const made = JSON.stringify(labels);
  if (box.dataset.made === made) return;
  box.dataset.made = made;
  box.replaceChildren(...labels.map((label, k) => {
    const button = make("button", { type: "button" });
    button.dataset.name = `${name}-${k}`;
    fill(button, label, k);
    button.addEventListener("click", () => ask(name, k));
    return button;
  }));
}

function mark(box, chosen) {
  [...box.children].forEach((button, k) => button.setAttribute("aria-pressed", k === chosen));
}

function render({ model, el }) {
  const ask = (name, value) => model.send({ requested: { [name]: value } });
  const images = make("div", { className: "vlkd-thumbs" }), words = make("div", { className: "vlkd-words", dir: "auto" });
  const panels = make("div", { className: "vlkd-maps" }), overlap = make("p", { className: "vlkd-overlap" });
  overlap.setAttribute("role", "status");
  const section = make("section", { className: "vlkd-panel vlkd-cross" }, images, words, panels, overlap);
  section.setAttribute("aria-label", "cross-attention");
  section.dataset.lmSuppressShortcuts = "true"; // JupyterLab takes the letters and arrow keys otherwise
  el.append(section);
  const parts = [], pictures = new Map();

  const picture = (uri) => {
    // A picture that has been decoded, or nothing until then.
    if (!pictures.has(uri) && uri) pictures.set(uri, Object.assign(new Image(), { onload: () => view.soon(), src: uri }));
    const found = pictures.get(uri);
    return found?.complete && found.naturalWidth ? found : null;
  };

  const draw = () => {
    const captions = model.get("captions"), uris = model.get("pictures"), texts = model.get("words");
    choices(images, captions, "image", ask, (button, caption, k) => {
      button.title = caption;
      button.append(make("img", { src: uris[k] ?? "", alt: `image ${k}: ${caption}` }));
    });
    choices(words, texts, "word", ask, (button, text) => (button.textContent = text));
    mark(images, model.get("image"));
    mark(words, model.get("word"));
    const specs = model.get("panels"), frame = model.get("frame"), word = texts[model.get("word")] ?? "";
    const bytes = new Uint8Array(frame.buffer, frame.byteOffset, frame.byteLength), seen = picture(uris[model.get("image")]);
    while (parts.length < specs.length) parts.push(new Panel());
    let start = 0;
    specs.forEach((spec, k) => {
      parts[k].draw(spec, bytes.slice(start, start + spec.side ** 2), model.get("palette"), seen, word);
      start += spec.side ** 2;
    });
    const shown = parts.slice(0, specs.length).map((part) => part.element);
    if (shown.length !== panels.children.length) panels.replaceChildren(...shown);
    overlap.textContent = model.get("said");
    section.dataset.frame = model.get("number");
  };

  const view = follow(model, el, draw);
  return view.stop;
}

export default { render };
