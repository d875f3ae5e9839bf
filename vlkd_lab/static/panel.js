// Draws the status bar, the controls and the messages of a run. Values are state in Python (vlkd_lab.widgets.Panel);
// a moved slider or a pressed button only says what is wished. All text goes in as text, never as HTML.

const TOUCHED_MS = 1500; // for this long after a touch, what arrives from Python does not move a slider

const LOG = { to: Math.log10, from: (x) => 10 ** x };
const LINEAR = { to: (x) => x, from: (x) => x };

function rounded(value) {
  return +value.toPrecision(4);
}

class Slider {
  constructor(spec, ask) {
    this.spec = spec;
    this.scale = spec.scale === "log" ? LOG : LINEAR;
    this.touched = 0;
    const [low, high] = [spec.low, spec.high].map(this.scale.to);
    const step = spec.scale === "log" ? (high - low) / 60 : spec.step;
    this.range = make("input", { type: "range", min: low, max: high, step });
    this.number = make("input", { type: "number", min: 0, max: spec.most ?? spec.high, step: "any" });
    this.range.setAttribute("aria-label", spec.label);
    this.number.setAttribute("aria-label", `${spec.label}, exact value`);
    this.range.dataset.name = this.number.dataset.name = spec.name;
    const name = make("span", { textContent: spec.label, title: spec.help ?? "" });
    this.element = make("div", { className: "vlkd-slider" }, name, this.range, this.number);
    const moved = () => {
      this.touched = Date.now();
      this.number.value = rounded(this.scale.from(+this.range.value));
    };
    this.range.addEventListener("input", moved);
    this.range.addEventListener("change", () => {
      moved();
      ask(spec.name, +this.number.value);
    });
    this.number.addEventListener("change", () => {
      this.touched = Date.now();
      const value = +this.number.value;
      if (this.number.value !== "" && Number.isFinite(value)) ask(spec.name, value);
    });
  }

  set(value, off) {
    this.range.disabled = this.number.disabled = off;
    if (Date.now() - this.touched < TOUCHED_MS) return;
    this.range.value = this.scale.to(Math.max(value, this.spec.low));
    if (document.activeElement !== this.number) this.number.value = rounded(value);
  }
}

function render({ model, el }) {
  const ask = (name, value) => model.send({ requested: { [name]: value } });
  const head = make("div", { className: "vlkd-head" });
  head.setAttribute("role", "status");
  const buttons = make("div", { className: "vlkd-buttons" });
  const sliders = make("div", { className: "vlkd-sliders" });
  const messages = make("div", { className: "vlkd-messages" });
  const section = make("section", { className: "vlkd-panel" }, head, buttons, sliders, messages);
  section.dataset.lmSuppressShortcuts = "true"; // for JupyterLab's shortcuts, which take the arrow keys and letters otherwise
  section.addEventListener("keydown", (event) => event.ctrlKey || event.metaKey || event.stopPropagation());
  el.append(section);
  let made = "", parts = {};

  const drawHead = () => {
    const cells = model.get("head").map(([name, value]) => {
      const cell = make("span", {}, make("small", { textContent: name }), make("b", { textContent: value }));
      cell.dataset.name = name;
      return cell;
    });
    head.replaceChildren(...cells);
    const share = model.get("share");
    head.style.setProperty("--share", `${Math.round(100 * share)}%`);
  };

  const drawButtons = () => {
    const focused = buttons.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    buttons.replaceChildren(...model.get("buttons").map((spec) => {
      const button = make("button", { textContent: spec.label, title: spec.help ?? "", disabled: spec.off ?? false });
      button.dataset.name = spec.name;
      if (spec.pressed !== undefined) button.setAttribute("aria-pressed", spec.pressed);
      button.addEventListener("click", () => ask(spec.name, spec.value));
      return button;
    }));
    if (focused) buttons.querySelector(`[data-name="${CSS.escape(focused)}"]`)?.focus();
  };

  const drawSliders = () => {
    const specs = model.get("sliders"), shape = JSON.stringify(specs);
    if (shape !== made) {
      made = shape;
      parts = Object.fromEntries(specs.map((spec) => [spec.name, new Slider(spec, ask)]));
      const headed = (spec, k) => spec.group && spec.group !== specs[k - 1]?.group;
      const children = (spec, k) => [...(headed(spec, k) ? [make("h4", { textContent: spec.group })] : []), parts[spec.name].element];
      sliders.replaceChildren(...specs.flatMap(children));
    }
    for (const [name, value] of Object.entries(model.get("values"))) parts[name]?.set(value, model.get("off"));
  };

  const keepReading = (open) => { // what somebody reads stays open when messages change, or when the page draws the panel anew
    if (model.get("reading") === open) return;
    model.set("reading", open);
    model.save_changes();
  };

  const drawMessages = () => {
    messages.replaceChildren(...model.get("messages").map(({ kind, text, more }) => {
      const line = make("p", { className: `vlkd-${kind}`, textContent: text, dir: "auto" });
      if (kind === "error") line.setAttribute("role", "alert");
      if (!more) return line;
      const details = make("details", { open: model.get("reading") }, make("summary", {}, line), make("pre", { textContent: more }));
      details.addEventListener("toggle", () => details.isConnected && keepReading(details.open));
      return details;
    }));
  };

  const seen = () => visible(el) && model.send({ seen: true });
  const jobs = [["head share", drawHead], ["buttons", drawButtons], ["sliders values off", drawSliders], ["messages", drawMessages]];
  const listeners = jobs.map(([names, draw]) => [names.split(" ").map((name) => `change:${name}`).join(" "), draw]);
  for (const [events, draw] of listeners) {
    model.on(events, draw);
    draw();
  }
  const pulse = setInterval(seen, PULSE_MS);
  const themed = onTheme(() => setTheme(section));
  requestAnimationFrame(() => {
    setTheme(section);
    seen();
  });
  return () => {
    clearInterval(pulse);
    themed();
    for (const [events, draw] of listeners) model.off(events, draw);
  };
}

export default { render };
