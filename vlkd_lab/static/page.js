// What every widget's script begins with: elements, and a view that says when it is seen and what it has drawn.

const PULSE_MS = 2000; // how often a visible view says that it is seen

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function visible(el) {
  return document.visibilityState === "visible" && el.isConnected && el.getClientRects().length > 0;
}

function follow(model, el, draw) {
  // Draw whenever the model changes, and say which frame was drawn. However many changes arrive, one picture a frame of the screen.
  let asked = 0;
  const seen = () => visible(el) && model.send({ drawn: model.get("number") });
  const soon = () => {
    if (asked) return;
    asked = requestAnimationFrame(() => {
      asked = 0;
      draw();
      seen();
    });
  };
  model.on("change", soon);
  const pulse = setInterval(seen, PULSE_MS);
  soon();
  const stop = () => {
    clearInterval(pulse);
    cancelAnimationFrame(asked);
    model.off("change", soon);
  };
  return { soon, stop };
}
