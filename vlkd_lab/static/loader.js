// In place of SCRIPT: its text is in one model that all widgets of a kernel share, and a page takes it from there once.

const WAIT_MS = 50; // between two looks for the shared model, which a page that is loaded again may make after this one
const TRIES = 400;

async function sharedModel(model) {
  const id = model.get("scripts").replace("IPY_MODEL_", "");
  for (let tries = 0; tries < TRIES; tries++) {
    const shared = await Promise.resolve().then(() => model.widget_manager.get_model(id)).catch(() => null);
    if (shared?.get("sources")?.["SCRIPT"]) return shared;
    await new Promise((resolve) => setTimeout(resolve, WAIT_MS));
  }
  throw new Error("the scripts of this widget did not come: run its cell again");
}

function dress(el, sources) {
  // One style sheet a page, the newest; a shadow root needs its own.
  const root = el.getRootNode();
  const place = root instanceof ShadowRoot ? root : document.head;
  const style = place.querySelector("style[data-vlkd]") ?? place.appendChild(document.createElement("style"));
  style.dataset.vlkd = "";
  if (style.textContent !== sources["bench.css"]) style.textContent = sources["bench.css"];
}

function imported(shared) {
  // The module, made once for each version of the text, whichever notebook asks first.
  const modules = (globalThis.vlkdModules ??= new Map());
  const key = `SCRIPT ${shared.get("version")}`;
  const sources = shared.get("sources");
  const address = () => URL.createObjectURL(new Blob([sources["page.js"], "\n", sources["SCRIPT"]], { type: "text/javascript" }));
  if (!modules.has(key)) modules.set(key, import(address()));
  return modules.get(key);
}

async function render({ model, el, signal }) {
  try {
    const shared = await sharedModel(model);
    if (signal?.aborted) return;
    dress(el, shared.get("sources"));
    return (await imported(shared)).default.render({ model, el });
  } catch (error) {
    el.textContent = error.message;
    throw error;
  }
}

export default { render };
