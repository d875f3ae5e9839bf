// The title of a part of the bench, a button that folds it away; what follows it in its box is hidden by the style sheet.

function render({ model, el }) {
  const button = make("button", { type: "button" });
  button.dataset.name = "fold";
  const title = make("h4", { className: "vlkd-title" }, button);
  title.dataset.lmSuppressShortcuts = "true"; // Enter and Space are the button's
  el.append(title);
  const draw = () => {
    const isFolded = model.get("folded");
    button.textContent = model.get("text");
    button.setAttribute("aria-expanded", !isFolded);
    el.classList.toggle("vlkd-folded", isFolded);
  };
  button.addEventListener("click", () => {
    model.set("folded", !model.get("folded"));
    model.save_changes();
  });
  title.addEventListener("keydown", (event) => event.stopPropagation());
  const themed = onTheme(() => setTheme(title));
  requestAnimationFrame(() => setTheme(title));
  model.on("change", draw);
  draw();
  return () => {
    themed();
    model.off("change", draw);
  };
}

export default { render };
