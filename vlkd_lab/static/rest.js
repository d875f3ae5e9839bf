// How far a training is, and a button for the cells below; where there is no button, the text says what to do.

const RUN_BELOW = "notebook:run-all-below"; // runs the active cell first: here the one that waited for the end

function render({ model, el }) {
  const words = make("p", { className: "vlkd-rest-words" });
  words.setAttribute("role", "status");
  const bar = make("progress", { max: 1 });
  bar.setAttribute("aria-label", "training done");
  const button = runs(make("button", { type: "button", textContent: "Run the cells below" }), RUN_BELOW);
  const section = make("section", { className: "vlkd-panel vlkd-rest" }, words, bar, make("div", { className: "vlkd-buttons" }, button));
  el.append(section);

  const draw = () => {
    const isReady = model.get("is_ready");
    words.textContent = model.get("text");
    bar.value = model.get("share");
    bar.hidden = isReady;
    button.disabled = !isReady;
  };
  return attend(model, el, () => setTheme(section), [["text share is_ready", draw]]);
}

export default { render };
