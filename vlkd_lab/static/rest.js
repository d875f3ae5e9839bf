// How far a training is, and a button for the cells below. JupyterLab and Jupyter Notebook run the command that a clicked element
// names, in the cell in which it was clicked; elsewhere the text says what to do.

const RUN_BELOW = "notebook:run-all-below"; // runs the active cell first: here the one that waited for the end

function render({ model, el }) {
  const words = make("p", { className: "vlkd-rest-words" });
  words.setAttribute("role", "status");
  const bar = make("progress", { max: 1 });
  bar.setAttribute("aria-label", "training done");
  const button = make("button", { type: "button", className: "vlkd-command", textContent: "Run the cells below" });
  button.dataset.commandlinkerCommand = RUN_BELOW;
  button.dataset.commandlinkerArgs = "{}";
  const section = make("section", { className: "vlkd-panel vlkd-rest" }, words, bar, make("div", { className: "vlkd-buttons" }, button));
  el.append(section);

  const draw = () => {
    const isReady = model.get("is_ready");
    words.textContent = model.get("text");
    bar.value = model.get("share");
    bar.hidden = isReady;
    button.disabled = !isReady;
  };
  const seen = () => visible(el) && model.send({ seen: true });
  const pulse = setInterval(seen, PULSE_MS);
  const themed = onTheme(() => setTheme(section));
  model.on("change:text change:share change:is_ready", draw);
  requestAnimationFrame(() => {
    setTheme(section);
    draw();
    seen();
  });
  return () => {
    clearInterval(pulse);
    themed();
    model.off("change:text change:share change:is_ready", draw);
  };
}

export default { render };
