// Draws the status bar, the controls and the messages of a run. Values are state in Python (vlkd_lab.widgets.Panel);
// a moved slider or a pressed button only says what is wished. All text goes in as text, never as HTML.

const TOUCHED_MS = 1500; // for this long after a touch, what arrives from Python does not move a slider

const LOG = { to: Math.log10, from: (x) => 10 ** x };
const LINEAR = { to: (x) => x, from: (x) => x };
let helps = 0; // numbers the texts that explain sliders

function rounded(value) {
  return +value.toPrecision(4);
}

class Slider {
  constructor(spec, ask) {
    this.spec = spec;
    this.ask = ask;
    this.scale = spec.scale === "log" ? LOG : LINEAR;
    this.touched = 0;
    const [low, high] = [spec.low, spec.high].map(this.scale.to);
    const step = spec.scale === "log" ? (high - low) / 60 : spec.step;
    this.range = make("input", { type: "range", min: low, max: high, step });
    this.number = make("input", { type: "number", min: 0, max: spec.most ?? spec.high, step: "any" });
    this.range.setAttribute("aria-label", spec.label);
    this.number.setAttribute("aria-label", `${spec.label}, exact value`);
    this.range.dataset.name = this.number.dataset.name = spec.name;
    this.element = make("div", { className: "vlkd-slider" }, make("span", { textContent: spec.label }), this.range, this.number, this.resetter());
    if (spec.help) this.explain(spec.help);
    this.listen();
  }

  resetter() {
    const value = this.spec.configured ?? null;
    this.reset = make("button", { type: "button", textContent: "↺", className: "vlkd-reset", title: `back to ${value}, as configured` });
    this.reset.dataset.name = `reset-${this.spec.name}`;
    this.reset.setAttribute("aria-label", `${this.spec.label}: back to ${value}, as configured`);
    this.reset.addEventListener("click", () => {
      this.put(value);
      this.touched = Date.now();
      this.range.focus(); // the button is gone with the difference
      this.ask(this.spec.name, value);
    });
    return this.reset;
  }

  explain(text) {
    // Beside the pointer's own, so that keys and a screen reader come to it.
    const help = make("div", { className: "vlkd-help", textContent: text, id: `vlkd-help-${++helps}` });
    help.setAttribute("role", "tooltip");
    for (const input of [this.range, this.number]) input.setAttribute("aria-describedby", help.id);
    this.element.append(help);
  }

  listen() {
    const moved = () => {
      this.touched = Date.now();
      this.number.value = rounded(this.scale.from(+this.range.value));
      this.compare(+this.number.value);
    };
    this.range.addEventListener("input", moved);
    this.range.addEventListener("change", () => {
      moved();
      this.ask(this.spec.name, +this.number.value);
    });
    this.number.addEventListener("change", () => {
      this.touched = Date.now();
      const value = +this.number.value;
      if (this.number.value !== "" && Number.isFinite(value)) this.ask(this.spec.name, value);
    });
  }

  compare(value) {
    // There is something to take back only where the value differs from the configured one.
    const { configured } = this.spec;
    const differs = configured !== undefined && rounded(value) !== rounded(configured);
    this.reset.hidden = !differs || this.range.disabled;
  }

  put(value) {
    this.range.value = this.scale.to(Math.max(value, this.spec.low));
    if (document.activeElement !== this.number) this.number.value = rounded(value);
    this.compare(value);
  }

  set(value, off) {
    this.range.disabled = this.number.disabled = off;
    if (Date.now() - this.touched < TOUCHED_MS) return;
    this.put(value);
  }
}

class Buttons {
  // In groups: what acts on the run, apart from what is shown. One that asks is followed by yes and no.
  constructor(element, ask) {
    this.element = element;
    this.ask = ask;
    this.asking = null; // the name of the button that has asked
    element.addEventListener("keydown", (event) => event.key === "Escape" && this.asking && this.settle());
  }

  draw(specs = this.specs) {
    this.specs = specs;
    const names = [...new Set(specs.map((spec) => spec.group ?? ""))];
    const focused = this.element.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    this.element.replaceChildren(...names.map((name) => this.group(name, specs.filter((spec) => (spec.group ?? "") === name))));
    const again = [...this.element.querySelectorAll("button")].find((button) => button.dataset.key === focused);
    again?.focus();
  }

  group(name, specs) {
    const group = make("span", { className: "vlkd-group" }, ...(name ? [make("small", { textContent: name })] : []));
    group.setAttribute("role", "group");
    if (name) group.setAttribute("aria-label", name);
    for (const spec of specs) group.append(...(spec.name === this.asking && !spec.off ? this.question(spec) : [this.button(spec)]));
    return group;
  }

  button(spec) {
    const button = make("button", { type: "button", textContent: spec.label, title: spec.help ?? "", disabled: spec.off ?? false });
    button.dataset.name = spec.name;
    button.dataset.key = `${spec.name} ${JSON.stringify(spec.value)}`;
    if (spec.pressed !== undefined) button.setAttribute("aria-pressed", spec.pressed);
    if (spec.command) runs(button, spec.command); // and the kernel is told, so that it leaves a bench in its panel there
    button.addEventListener("click", () => (spec.confirm ? this.begin(spec) : this.ask(spec.name, spec.value)));
    return button;
  }

  question(spec) {
    const answer = (label, then) => {
      const button = make("button", { type: "button", textContent: label });
      button.dataset.name = button.dataset.key = `${spec.name}-${label}`;
      button.addEventListener("click", then);
      return button;
    };
    const yes = answer("yes", () => {
      this.settle();
      this.ask(spec.name, spec.value);
    });
    const text = make("b", { textContent: spec.confirm });
    text.setAttribute("role", "alert");
    return [text, yes, answer("no", () => this.settle())];
  }

  begin(spec) {
    this.asking = spec.name;
    this.draw();
    this.element.querySelector(`[data-name="${CSS.escape(spec.name)}-no"]`).focus();
  }

  settle() {
    const name = this.asking;
    this.asking = null;
    this.draw();
    this.element.querySelector(`[data-name="${CSS.escape(name)}"]`)?.focus();
  }
}

class Sliders {
  // What counts first; what does not, under "more terms".
  constructor(model, ask) {
    this.model = model;
    this.ask = ask;
    this.made = "";
    this.parts = {};
    this.first = make("div", { className: "vlkd-sliders" });
    this.rest = make("div", { className: "vlkd-sliders", id: `vlkd-more-${++helps}` });
    this.more = make("button", { type: "button", className: "vlkd-more" });
    this.more.dataset.name = "more";
    this.more.setAttribute("aria-controls", this.rest.id);
    this.more.addEventListener("click", () => {
      model.set("more", !model.get("more"));
      model.save_changes();
    });
  }

  draw() {
    const specs = this.model.get("sliders");
    const shape = JSON.stringify(specs);
    if (shape !== this.made) this.make(specs, shape);
    const isOpen = this.model.get("more");
    this.rest.hidden = !isOpen;
    this.more.setAttribute("aria-expanded", isOpen);
    for (const [name, value] of Object.entries(this.model.get("values"))) this.parts[name]?.set(value, this.model.get("off"));
  }

  make(specs, shape) {
    // A slider that is as it was stays the same element, and keeps the focus where it moves.
    const focused = document.activeElement;
    const isOurs = this.first.contains(focused) || this.rest.contains(focused);
    this.made = shape;
    this.parts = Object.fromEntries(specs.map((spec) => [spec.name, this.partOf(spec)]));
    const rest = specs.filter((spec) => spec.more);
    this.more.textContent = `more terms (${rest.length})`;
    this.first.replaceChildren(...this.rows(specs.filter((spec) => !spec.more)), ...(rest.length ? [this.more] : []));
    this.rest.replaceChildren(...this.rows(rest));
    if (isOurs) focused.focus();
  }

  partOf({ more, ...spec }) {
    const before = this.parts[spec.name];
    return before && JSON.stringify(before.spec) === JSON.stringify(spec) ? before : new Slider(spec, this.ask);
  }

  rows(specs) {
    const headed = (spec, k) => spec.group && spec.group !== specs[k - 1]?.group;
    return specs.flatMap((spec, k) => [...(headed(spec, k) ? [make("h4", { textContent: spec.group })] : []), this.parts[spec.name].element]);
  }
}

function drawHead(model, head) {
  const cells = model.get("head").map(([name, value]) => {
    const cell = make("span", {}, make("small", { textContent: name }), make("b", { textContent: value }));
    cell.dataset.name = name;
    return cell;
  });
  head.replaceChildren(...cells);
  head.style.setProperty("--share", `${Math.round(100 * model.get("share"))}%`);
}

function drawMessages(model, messages) {
  const keepReading = (open) => { // what somebody reads stays open when messages change, or when the page draws the panel anew
    if (model.get("reading") === open) return;
    model.set("reading", open);
    model.save_changes();
  };
  messages.replaceChildren(...model.get("messages").map(({ kind, text, more }) => {
    const line = make("p", { className: `vlkd-${kind}`, textContent: text, dir: "auto" });
    if (kind === "error") line.setAttribute("role", "alert");
    if (!more) return line;
    const details = make("details", { open: model.get("reading") }, make("summary", {}, line), make("pre", { textContent: more }));
    details.addEventListener("toggle", () => details.isConnected && keepReading(details.open));
    return details;
  }));
}

function render({ model, el }) {
  const ask = (name, value) => model.send({ requested: { [name]: value } });
  const head = make("div", { className: "vlkd-head" });
  head.setAttribute("role", "status");
  const buttons = new Buttons(make("div", { className: "vlkd-buttons" }), ask);
  const sliders = new Sliders(model, ask);
  const messages = make("div", { className: "vlkd-messages" });
  const top = make("div", { className: "vlkd-top" }, head, buttons.element);
  const section = make("section", { className: "vlkd-panel" }, top, sliders.first, sliders.rest, messages);
  section.dataset.lmSuppressShortcuts = "true"; // for JupyterLab's shortcuts, which take the arrow keys and letters otherwise
  section.addEventListener("keydown", (event) => event.ctrlKey || event.metaKey || event.stopPropagation());
  el.classList.add("vlkd-panel-view");
  el.append(section);

  return attend(model, top, () => setTheme(section), [
    ["head share", () => drawHead(model, head)],
    ["buttons", () => buttons.draw(model.get("buttons"))],
    ["sliders values off more", () => sliders.draw()],
    ["messages", () => drawMessages(model, messages)],
  ]);
}

export default { render };
