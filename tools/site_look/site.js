// Plots drawn by the plotly.js that the site serves itself, only where a page has one; buttons that copy code; frames; the list of names.
"use strict";

const root = document.documentElement;

function look() {
  // colours of the page around a plot, so that both modes can be read
  const style = getComputedStyle(root);
  const colour = (name) => style.getPropertyValue(`--pst-color-${name}`).trim();
  return { text: colour("text-base"), lines: colour("border") };
}

function layoutOf(layout) {
  const { text, lines } = look();
  const out = { ...layout, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { ...layout.font, color: text } };
  delete out.width;
  const axes = new Set(["xaxis", "yaxis", ...Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))]);
  for (const key of axes) out[key] = { ...layout[key], gridcolor: lines, zerolinecolor: lines, linecolor: lines };
  return out;
}

function drawPlots(plots) {
  for (const plot of plots) {
    if (!plot.figure) plot.figure = JSON.parse(plot.querySelector("script").textContent);
    Plotly.react(plot, plot.figure.data, layoutOf(plot.figure.layout), { responsive: true, displaylogo: false });
  }
}

// The text of a block of code, for the clipboard: a button that says so when it is done
function addCopyButton(block) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  const say = (words) => {
    button.textContent = words;
    button.setAttribute("aria-label", words === "Copy" ? "Copy this code" : words);
  };
  say("Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(block.querySelector("pre").textContent.replace(/\n+$/, ""));
      say("Copied");
    } catch {
      say("Not allowed"); // by the browser
    }
    setTimeout(() => say("Copy"), 2000);
  });
  block.append(button);
}

// A page in a frame stands whole, in the site's colours, where it can be reached: on a site that is served, not on one that lies on a disk
function fitFrame(frame) {
  const inner = frame.contentDocument?.documentElement;
  if (!inner) return;
  const fit = () => (frame.style.height = `${inner.offsetHeight + 4}px`);
  const colour = () => (inner.style.colorScheme = root.dataset.theme);
  fit();
  colour();
  new ResizeObserver(fit).observe(inner);
  new MutationObserver(colour).observe(root, { attributeFilter: ["data-theme"] });
}

// Without words the names that jobs and guides use; with words, or when one asks for it, all
function filterNames(filter, all) {
  const rows = [...document.querySelectorAll("table.names tbody tr")];
  const show = () => {
    const wanted = filter.value.trim().toLowerCase();
    for (const row of rows) {
      const isInner = row.classList.contains("inner") && !all.checked && !wanted;
      row.hidden = isInner || !row.textContent.toLowerCase().includes(wanted);
    }
  };
  filter.addEventListener("input", show);
  all.addEventListener("change", show);
  show();
}

document.addEventListener("DOMContentLoaded", () => {
  const plots = document.querySelectorAll(".site-plot");
  if (plots.length) {
    const script = document.createElement("script");
    script.src = `${root.dataset.content_root}_static/plotly.min.js`;
    script.onload = () => {
      drawPlots(plots);
      new MutationObserver(() => drawPlots(plots)).observe(root, { attributeFilter: ["data-theme"] });
    };
    document.head.append(script);
  }

  for (const code of document.querySelectorAll("article div.highlight")) addCopyButton(code);

  for (const frame of document.querySelectorAll("article iframe")) {
    frame.addEventListener("load", () => fitFrame(frame));
    if (frame.contentDocument?.readyState === "complete") fitFrame(frame);
  }

  const filter = document.querySelector(".names-filter");
  if (filter) filterNames(filter, document.querySelector(".names-all"));

  document.querySelector(".site-pages .current")?.scrollIntoView({ block: "nearest" });
});
