// What every widget's script begins with: elements, the page's colours, a view that is drawn anew, and one that says when it is seen.

const PULSE_MS = 2000; // how often a visible view says that it is seen

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function runs(button, command) {
  // JupyterLab and Jupyter Notebook run the command that a clicked element names, for the cell in which it stands; the style sheet hides it elsewhere.
  button.classList.add("vlkd-command");
  button.dataset.commandlinkerCommand = command;
  button.dataset.commandlinkerArgs = "{}";
  return button;
}

function visible(el) {
  return document.visibilityState === "visible" && el.isConnected && el.getClientRects().length > 0;
}

// ---- the page's colours: a theme may come late, from JupyterLab, VS Code, Colab or the system

const THEME_MS = [0, 150, 600, 1500]; // when to look again after a switch: a theme's style sheet may come after its name

function channels(colour) {
  // Red, green, blue and opacity of a CSS colour, 0 to 255 and 0 to 1.
  const pen = channels.pen ?? (channels.pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true }));
  pen.clearRect(0, 0, 1, 1);
  pen.fillStyle = "#000000";
  pen.fillStyle = colour;
  pen.fillRect(0, 0, 1, 1);
  const [red, green, blue, opacity] = pen.getImageData(0, 0, 1, 1).data;
  return [red, green, blue, opacity / 255];
}

function luminance(colour) {
  const linear = channels(colour).slice(0, 3).map((byte) => {
    const share = byte / 255;
    return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}

function contrast(one, other) {
  // From 1 (the same) to 21, as WCAG 2 defines it.
  const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
}

function paperOf(el) {
  // The colour behind an element: of the first ancestor that has one, or the browser's own.
  for (let node = el; node instanceof Element; node = node.parentElement ?? node.getRootNode().host) {
    const colour = getComputedStyle(node).backgroundColor;
    if (channels(colour)[3] > 0.9) return colour;
  }
  const scheme = getComputedStyle(document.documentElement).colorScheme;
  const isDark = scheme.includes("dark") && (!scheme.includes("light") || matchMedia("(prefers-color-scheme: dark)").matches);
  return isDark ? "rgb(18, 18, 18)" : "rgb(255, 255, 255)";
}

function mixed(colour, other, share) {
  const [from, to] = [channels(colour), channels(other)];
  return `rgb(${[0, 1, 2].map((k) => Math.round(from[k] + (to[k] - from[k]) * share)).join(", ")})`;
}

const legibles = new Map(); // what was found for a colour, a paper and a contrast

function legible(colour, theme, least) {
  const key = [colour, theme.paper, theme.ink, least].join();
  if (!legibles.has(key)) legibles.set(key, nearerToInk(colour, theme, least));
  return legibles.get(key);
}

function nearerToInk(colour, theme, least) {
  // The colour, or as little nearer to the ink as makes it stand out from the paper; black stands for the ink itself.
  if (channels(colour).slice(0, 3).every((byte) => byte === 0)) return theme.ink;
  for (let share = 0; share < 1; share += 0.1) {
    const nearer = mixed(colour, theme.ink, share);
    if (contrast(nearer, theme.paper) >= least) return nearer;
  }
  return theme.ink;
}

function themeOf(el) {
  // Paper and ink where an element stands; the page's own ink where it can be read on that paper.
  const paper = paperOf(el);
  const own = getComputedStyle(el).getPropertyValue("--jp-ui-font-color1") || getComputedStyle(el.parentElement ?? el).color;
  const plain = luminance(paper) > 0.18 ? "rgb(34, 34, 34)" : "rgb(224, 224, 224)";
  const ink = channels(own)[3] > 0.5 && contrast(mixed(own, paper, 1 - channels(own)[3]), paper) >= 7 ? own : plain;
  return { paper, ink: mixed(ink, paper, 0), faint: mixed(paper, ink, 0.16), dim: mixed(ink, paper, 0.25) };
}

function onTheme(call) {
  // Call when the page may have another theme.
  let waiting = [];
  const soon = () => {
    waiting.forEach(clearTimeout);
    waiting = THEME_MS.map((after) => setTimeout(call, after));
  };
  const observer = new MutationObserver(soon);
  for (const element of [document.documentElement, document.body])
    observer.observe(element, { attributeFilter: ["class", "style", "theme", "data-theme", "data-jp-theme-name", "data-jp-theme-light"] });
  const system = matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", soon);
  return () => {
    waiting.forEach(clearTimeout);
    observer.disconnect();
    system.removeEventListener("change", soon);
  };
}

function setTheme(el) {
  // Tell an element's style sheet what its page looks like.
  const theme = themeOf(el);
  el.style.setProperty("--vlkd-ink", theme.ink);
  el.style.setProperty("--vlkd-paper", theme.paper);
  el.style.setProperty("--vlkd-error", legible("#b00020", theme, 4.5));
  el.style.setProperty("--vlkd-warning", legible("#9a5b00", theme, 4.5));
  return theme;
}

// ---- a view

function follow(model, el, draw) {
  // Draw whenever the model or the theme changes. However many changes arrive, one picture a frame of the screen.
  let asked = 0;
  const soon = () => {
    if (asked) return;
    asked = requestAnimationFrame(() => {
      asked = 0;
      setTheme(el);
      draw();
    });
  };
  model.on("change", soon);
  const themed = onTheme(soon);
  soon();
  const stop = () => {
    cancelAnimationFrame(asked);
    themed();
    model.off("change", soon);
  };
  return { soon, stop };
}

function drawParts(model, paint, jobs) {
  // A view of parts: each is drawn when one of its values changes, and it is painted when the page has another theme.
  const listeners = jobs.map(([names, draw]) => [names.split(" ").map((name) => `change:${name}`).join(" "), draw]);
  for (const [events, draw] of listeners) {
    model.on(events, draw);
    draw();
  }
  const themed = onTheme(paint);
  requestAnimationFrame(paint);
  return () => {
    themed();
    for (const [events, draw] of listeners) model.off(events, draw);
  };
}

function saySeen(model, el) {
  // Every message to a kernel makes JupyterLab work, so a view says no more than it must: one answer for all that was sent up to a number,
  // which is drawn in the same frame, and otherwise now and then that somebody looks.
  let said = -PULSE_MS;
  const say = (content) => {
    if (!visible(el)) return;
    said = performance.now();
    model.send({ seen: true, ...content });
  };
  const soon = () => requestAnimationFrame(() => say({ drawn: model.get("number") }));
  const pulse = setInterval(() => performance.now() - said > 0.9 * PULSE_MS && say(), PULSE_MS);
  model.on("change:number", soon);
  soon();
  return () => {
    clearInterval(pulse);
    model.off("change:number", soon);
  };
}

function attend(model, el, paint, jobs) {
  // A view of parts by which a bench knows that it is seen.
  const stops = [drawParts(model, paint, jobs), saySeen(model, el)];
  return () => stops.forEach((stop) => stop());
}
