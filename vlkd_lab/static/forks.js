// What came of the forks of a run, and what starts the one that was made last. Everything is state in Python (vlkd_lab.widgets.ForksView);
// a click only says what is wished. Names of runs are strangers': all text goes in as text, never as HTML.

function copied(label, text) {
  // Text to be run elsewhere: one click selects the whole of it.
  const code = make("pre", { textContent: text, tabIndex: 0 });
  code.setAttribute("aria-label", label);
  return make("div", { className: "vlkd-copied" }, make("small", { textContent: label }), code);
}

function startButton({ is_new: isNew, is_shared: isShared }, start) {
  // It would share the machine with the training that is watched, so it waits for that one's end.
  if (!isNew) return [];
  const button = make("button", { type: "button", textContent: "Start it", disabled: isShared });
  button.title = isShared ? "when this run has ended; before that it would take its time" : "in a process of its own";
  button.dataset.name = "start-fork";
  button.addEventListener("click", start);
  return [button];
}

function madeParts(made, start) {
  if (!made.name) return [];
  const head = make("p", {}, make("b", { textContent: made.name, dir: "auto" }), make("span", { textContent: ` ${made.state}` }), ...startButton(made, start));
  const from = make("p", { textContent: made.words, dir: "auto" });
  return [head, from, copied("goes on by this command, in the project's folder", made.command), copied("or by this cell, with its bench", made.cell)];
}

function forkLine([prefix, name, score, words, state, isThis]) {
  const branch = make("span", { className: "vlkd-branch", textContent: prefix });
  branch.setAttribute("aria-hidden", "true");
  const said = [state, words].filter(Boolean).join(": ");
  const line = make("li", {}, branch, make(isThis ? "strong" : "span", { textContent: name, dir: "auto" }), make("b", { textContent: score }),
    make("small", { textContent: isThis ? `this run, ${said}` : said, dir: "auto" }));
  line.setAttribute("aria-level", prefix.length / 3 + 1);
  if (isThis) line.setAttribute("aria-current", "true");
  return line;
}

function render({ model, el }) {
  const note = make("p", { className: "vlkd-fork-note" }), failure = make("p", { className: "vlkd-error" });
  note.setAttribute("role", "status");
  failure.setAttribute("role", "alert");
  const made = make("div", { className: "vlkd-made" });
  const tree = make("ul", { className: "vlkd-tree" });
  tree.setAttribute("aria-label", "what came of each fork");
  const section = make("section", { className: "vlkd-panel vlkd-forks" }, note, failure, made, tree);
  section.dataset.lmSuppressShortcuts = "true"; // JupyterLab takes letters and arrow keys otherwise
  el.append(section);
  const start = () => model.send({ requested: { start: true } });

  const drawSaid = () => {
    note.textContent = model.get("note");
    note.hidden = !note.textContent;
    note.dataset.waits = model.get("waits");
    failure.textContent = model.get("failure");
    failure.hidden = !failure.textContent;
  };
  const drawMade = () => {
    const isFocused = made.contains(document.activeElement) && document.activeElement.tagName === "BUTTON";
    made.replaceChildren(...madeParts(model.get("made"), start));
    if (isFocused) made.querySelector("button")?.focus({ preventScroll: true });
  };
  const drawTree = () => {
    tree.hidden = !model.get("tree").length;
    tree.replaceChildren(...model.get("tree").map(forkLine));
  };
  return drawParts(model, () => setTheme(section), [["note failure waits", drawSaid], ["made", drawMade], ["tree", drawTree]]);
}

export default { render };
