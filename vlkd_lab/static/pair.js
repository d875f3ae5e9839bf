// Draws what stands behind a cell of the affinities, and the confusions that came and went. All of it is state in Python
// (vlkd_lab.widgets.PairView). Captions are strangers': all text goes in as text, never as HTML.

const MEASURES = [["cosine", (scores) => scores.cosine.toFixed(3).replace("-", "−")], ["P(text | image)", (scores) => percent(scores.text)], ["P(image | text)", (scores) => percent(scores.image)]];

function percent(share) {
  if (share > 0 && share < 0.0005) return "< 0.1 %";
  return `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
}

function thumb(uri, words, side) {
  // A small picture; where a probe has none, an empty frame of the same size.
  const frame = make("span", { className: "vlkd-thumb" });
  frame.style.width = frame.style.height = `${side}px`;
  if (uri) frame.append(make("img", { src: uri, alt: words, title: words }));
  return frame;
}

function row(...cells) {
  return make("tr", {}, ...cells);
}

function heading(text, scope) {
  const cell = make("th", { textContent: text });
  cell.setAttribute("scope", scope);
  return cell;
}

function side(title, uri, caption, extra = "") {
  // One of the two that the cell compares: an image with its caption, or a text with the picture that it belongs to.
  const words = make("figcaption", {}, make("b", { textContent: title }), make("span", { textContent: caption, dir: "auto" }));
  if (extra) words.append(make("small", { textContent: extra }));
  return make("figure", {}, thumb(uri, caption, 96), words);
}

function textCell(facts, [index, share]) {
  const isOwn = facts.has_own && facts.texts[index] === facts.captions[facts.cell[0]];
  const cell = make("td", {}, make("span", { textContent: `${isOwn ? "✓ " : ""}${facts.texts[index] ?? `text ${index}`}`, dir: "auto" }));
  cell.append(make("small", { textContent: `text ${index}${isOwn ? ", its own" : ""}, ${percent(share)}` }));
  return cell;
}

function imageCell(facts, pictures, [index, share]) {
  const caption = facts.captions[index] ?? `image ${index}`;
  const cell = make("td", {}, thumb(pictures[index], caption, 44));
  cell.append(make("small", { textContent: `image ${index}, ${percent(share)}` }));
  return cell;
}

function scoreTable(facts, pictures) {
  const [image, text] = facts.cell;
  const names = ["", ...MEASURES.map(([name]) => name), `first for image ${image}`, `first for text ${text}`];
  const head = make("thead", {}, row(...names.map((name) => heading(name, "col"))));
  const body = make("tbody");
  for (const [model, scores] of Object.entries(facts.models)) {
    const numbers = MEASURES.map(([, form]) => make("td", { className: "vlkd-number", textContent: form(scores) }));
    body.append(row(heading(model, "row"), ...numbers, textCell(facts, scores.first_text), imageCell(facts, pictures, scores.first_image)));
  }
  return make("table", {}, head, body);
}

function pairOf(facts, pictures) {
  const [image, text] = facts.cell;
  const column = facts.has_own ? pictures[text] : undefined;
  const note = facts.is_own ? "the image's own" : "";
  const sides = make("div", { className: "vlkd-sides" },
    side(`image ${image}`, pictures[image], facts.captions[image] ?? ""),
    side(`text ${text}`, column, facts.texts[text] ?? "", note));
  return [sides, make("div", { className: "vlkd-scroll" }, scoreTable(facts, pictures))];
}

function changeList(name, changes, pictures, choose) {
  const list = make("ul");
  list.setAttribute("aria-label", `confusions ${name}`);
  for (const [image, before, now] of changes[name]) {
    const [said, says] = [before, now].map((k) => changes.texts[k] ?? `text ${k}`);
    const button = make("button", { type: "button", title: "choose this cell" }, thumb(pictures[image], changes.texts[image] ?? "", 36));
    button.append(make("span", {}, make("small", { textContent: "before" }), make("i", { textContent: said, dir: "auto" }),
      make("small", { textContent: "now" }), make("i", { textContent: says, dir: "auto" })));
    button.dataset.name = `${name}-${image}`;
    button.addEventListener("click", () => choose([image, name === "mended" ? before : now]));
    list.append(make("li", {}, button));
  }
  const more = changes.counts[name] - changes[name].length;
  return make("div", {}, make("h4", { textContent: `${name}: ${changes.counts[name]}` }), list, ...(more > 0 ? [make("small", { textContent: `and ${more} more` })] : []));
}

function changesOf(changes, pictures, choose) {
  if (!changes.since) return [];
  const title = make("h3", { textContent: `Confusions since ${changes.since}` });
  return [title, make("div", { className: "vlkd-changes" }, ...["mended", "made"].map((name) => changeList(name, changes, pictures, choose)))];
}

function render({ model, el }) {
  const choose = (cell) => model.send({ chosen: cell });
  const hint = make("p", { textContent: "Click a cell of a matrix, or walk with the arrow keys and press Enter: the pair behind it opens here and moves with the training." });
  const pair = make("div"), changes = make("div"), failure = make("p", { className: "vlkd-error" });
  failure.setAttribute("role", "alert");
  pair.setAttribute("role", "region");
  pair.setAttribute("aria-label", "the pair behind the chosen cell");
  const section = make("section", { className: "vlkd-pair" }, hint, pair, changes, failure);
  section.dataset.lmSuppressShortcuts = "true"; // JupyterLab takes the letters and arrow keys otherwise
  el.append(section);
  let shown = "";

  const draw = () => {
    const facts = model.get("facts"), pictures = model.get("pictures"), isChosen = Boolean(facts.cell);
    hint.hidden = isChosen;
    pair.replaceChildren(...(isChosen ? pairOf(facts, pictures) : []));
    const now = JSON.stringify([model.get("changes"), Object.keys(pictures)]);
    if (now !== shown) {
      shown = now;
      const focused = changes.contains(document.activeElement) ? document.activeElement.dataset.name : null;
      changes.replaceChildren(...changesOf(model.get("changes"), pictures, choose));
      if (focused) changes.querySelector(`[data-name="${CSS.escape(focused)}"]`)?.focus();
    }
    failure.textContent = model.get("failure");
    failure.hidden = !failure.textContent;
    section.dataset.frame = model.get("number");
  };

  return follow(model, el, draw).stop;
}

export default { render };
