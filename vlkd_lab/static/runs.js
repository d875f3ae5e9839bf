// Draws the table of runs, what can be done with the one that is chosen, and the tree of forks. Rows are state in Python
// (vlkd_lab.widgets.RunsTable); a click only says what is wished. All text goes in as text, never as HTML.

const WORDS = new Set(["run", "state", "method"]); // columns that are no numbers
const SVG = "http://www.w3.org/2000/svg";

function drawing(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function spark(points, title) {
  const line = drawing("polyline", { points, fill: "none", stroke: "currentColor", "stroke-width": 1.2 });
  return drawing("svg", { width: 80, height: 20, role: "img", "aria-label": title }, line);
}

function compared(one, other) {
  // Numbers before words; both as people order them.
  const kinds = [typeof one, typeof other];
  if (kinds[0] === "number" && kinds[1] === "number") return one - other;
  if (kinds[0] !== kinds[1]) return kinds[0] === "number" ? -1 : 1;
  return String(one).localeCompare(String(other), undefined, { numeric: true });
}

function sorted(rows, [column, falls]) {
  // What is not known stands last, whichever way the column goes.
  return rows.sort((a, b) => {
    const [one, other] = [a.values[column] ?? null, b.values[column] ?? null];
    if (one === null || other === null) return (one === null) - (other === null) || compared(a.key, b.key);
    return (falls ? -1 : 1) * compared(one, other) || compared(a.key, b.key);
  });
}

function shownRows(model) {
  const rows = new Map(model.get("rows").map((row) => [row.key, row]));
  for (const row of model.get("news")) rows.set(row.key, row);
  const words = model.get("filter").toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (row) => {
    const text = Object.values(row.texts).join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  };
  return sorted([...rows.values()].filter(fits), model.get("order"));
}

function focusKept(root, draw) {
  // Whatever has the focus has it still when the same thing is drawn anew.
  const focused = root.contains(document.activeElement) ? document.activeElement.dataset.name : null;
  draw();
  if (focused) root.querySelector(`[data-name="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

function keep(model, name, value) {
  model.set(name, value);
  model.save_changes();
}

// ---- the table

function headCell(model, [name, title, help], draw) {
  const [column, falls] = model.get("order");
  const isSorted = column === name;
  const arrow = isSorted ? (falls ? " ▼" : " ▲") : "";
  const button = make("button", { textContent: title + arrow, title: help });
  button.dataset.name = `sort ${name}`;
  button.addEventListener("click", () => {
    keep(model, "order", [name, isSorted ? !falls : !WORDS.has(name)]); // the largest number is wanted first
    draw();
  });
  const cell = make("th", { scope: "col" }, button);
  cell.setAttribute("aria-sort", isSorted ? (falls ? "descending" : "ascending") : "none");
  return cell;
}

function tickCell(model, row, tick) {
  const box = make("input", { type: "checkbox", checked: model.get("ticked").includes(row.key), disabled: row.problem });
  box.setAttribute("aria-label", `lay the curves of ${row.key} over the others`);
  box.dataset.name = `tick ${row.key}`;
  box.addEventListener("change", () => tick(row.key, box.checked));
  return make("td", {}, box);
}

function bodyRow(model, row, ask, tick) {
  const cells = model.get("columns").map(([name, title]) => {
    const text = row.texts[name] ?? "";
    if (name === "run") {
      const button = make("button", { textContent: text, title: text, dir: "auto" });
      button.dataset.name = `run ${row.key}`;
      button.addEventListener("click", () => ask("points", row.key));
      return make("th", { scope: "row" }, button);
    }
    const isNumber = !WORDS.has(name) && typeof row.values[name] !== "string";
    const cell = make("td", { className: isNumber ? "vlkd-number" : "", title: text, dir: "auto" });
    cell.dataset.column = name;
    if (row.sparks[name]) cell.append(spark(row.sparks[name], `course of ${title}`));
    cell.append(text);
    return cell;
  });
  const line = make("tr", {}, tickCell(model, row, tick), ...cells);
  line.dataset.key = row.key;
  line.dataset.chosen = model.get("chosen").key === row.key;
  return line;
}

// ---- the run that is chosen

function choice(label, name, entries) {
  const select = make("select", {}, ...entries.map(([value, textContent]) => make("option", { value, textContent })));
  select.setAttribute("aria-label", label);
  select.dataset.name = name;
  return select;
}

function chosenParts(model, ask) {
  const chosen = model.get("chosen");
  if (!chosen.key) return [];
  const action = (name, textContent, title, wish) => {
    const button = make("button", { textContent, title });
    button.dataset.name = name;
    button.addEventListener("click", () => ask(...wish()));
    return button;
  };
  const parts = [make("b", { textContent: chosen.key, dir: "auto" })];
  if (chosen.problem) return [...parts, make("span", { textContent: chosen.problem })];
  parts.push(action("bench", "Open its bench", "below the table", () => ["bench", chosen.key]));
  if (chosen.points.length) {
    const at = choice("where to fork", "at", chosen.points);
    const sliders = choice("which sliders", "sliders", chosen.sliders.map((when) => [when, `sliders as they ${when === "now" ? "are now" : "were then"}`]));
    const wish = () => ["fork", { key: chosen.key, at: at.value, sliders: sliders.value }];
    parts.push(at, sliders, action("fork", "Fork from here", "a new run that begins at this checkpoint", wish));
  } else parts.push(make("span", { textContent: "it cannot be forked yet: it has no checkpoint" }));
  if (chosen.is_new) parts.push(action("start", "Start it", "in a process of its own", () => ["start", chosen.key]));
  return parts;
}

// ---- the tree of forks

function treeLine([prefix, key, name, score, words], ask) {
  const label = key ? make("button", { textContent: name, title: words, dir: "auto" }) : make("i", { textContent: name, dir: "auto" });
  if (key) {
    label.dataset.name = `tree ${key}`;
    label.addEventListener("click", () => ask("points", key));
  }
  const branch = make("span", { className: "vlkd-branch", textContent: prefix });
  branch.setAttribute("aria-hidden", "true");
  const line = make("li", {}, branch, label, make("b", { textContent: score }), make("small", { textContent: words, dir: "auto" }));
  line.setAttribute("aria-level", prefix.length / 3 + 1);
  return line;
}

// ---- all of it

function render({ model, el }) {
  const ask = (name, value) => model.send({ requested: { [name]: value } });
  const filter = make("input", { type: "search", placeholder: "filter, by any word", value: model.get("filter") });
  filter.setAttribute("aria-label", "show runs with these words only");
  const count = make("span", {});
  count.setAttribute("role", "status");
  const clear = make("button", { textContent: "Untick all" });
  clear.dataset.name = "clear";
  const top = make("div", { className: "vlkd-top" }, filter, count, clear);
  const head = make("tr", {}), body = make("tbody", {});
  const table = make("table", {}, make("thead", {}, head), body);
  table.setAttribute("aria-label", "runs");
  const chosen = make("div", { className: "vlkd-chosen" });
  const said = make("div", { className: "vlkd-said" });
  said.setAttribute("role", "status");
  const tree = make("ul", { className: "vlkd-tree" });
  tree.setAttribute("aria-label", "what came of each fork");
  const section = make("section", { className: "vlkd-runs" }, top, make("div", { className: "vlkd-scroll" }, table), chosen, said, tree);
  section.dataset.lmSuppressShortcuts = "true"; // for JupyterLab's shortcuts, which take letters and arrow keys otherwise
  section.addEventListener("keydown", (event) => event.ctrlKey || event.metaKey || event.stopPropagation());
  el.append(section);

  const setTicked = (keys) => {
    keep(model, "ticked", keys);
    ask("ticked", keys);
    drawTable();
  };
  const tick = (key, isTicked) => setTicked([...model.get("ticked").filter((other) => other !== key), ...(isTicked ? [key] : [])]);

  const drawTable = () => focusKept(section, () => {
    const rows = shownRows(model);
    const corner = make("th", { scope: "col", title: "tick runs to lay their curves over each other" });
    corner.setAttribute("aria-label", "overlay");
    head.replaceChildren(corner, ...model.get("columns").map((column) => headCell(model, column, drawTable)));
    body.replaceChildren(...rows.map((row) => bodyRow(model, row, ask, tick)));
    const total = new Set([...model.get("rows"), ...model.get("news")].map((row) => row.key)).size;
    count.textContent = `${rows.length === total ? "" : `${rows.length} of `}${total} run${total === 1 ? "" : "s"}, ${model.get("ticked").length} ticked`;
    clear.hidden = !model.get("ticked").length;
  });
  const drawChosen = () => focusKept(section, () => chosen.replaceChildren(...chosenParts(model, ask)));
  const drawSaid = () => {
    const [kind, words, command] = model.get("said");
    said.dataset.kind = kind ?? "";
    said.replaceChildren(words ?? "", ...(command ? [" ", make("code", { textContent: command })] : []));
  };
  const drawTree = () => focusKept(section, () => {
    tree.hidden = !model.get("tree").length;
    tree.replaceChildren(...model.get("tree").map((line) => treeLine(line, ask)));
  });

  filter.addEventListener("input", () => {
    keep(model, "filter", filter.value);
    drawTable();
  });
  clear.addEventListener("click", () => setTicked([]));
  const paint = () => section.style.setProperty("--vlkd-faint", setTheme(section).faint);
  return attend(model, el, paint, [
    ["rows news columns", drawTable],
    ["chosen", () => { drawChosen(); drawTable(); }],
    ["said", drawSaid],
    ["tree", drawTree],
  ]);
}

export default { render };
