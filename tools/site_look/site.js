// Plots drawn by the plotly.js that the site serves itself, only where a page has one; a filter for the list of names; tidier search results.
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

  if (typeof Search === "object") {
    // what search shows of a page leaves its folded sources out, as the index does
    const plain = Search.htmlToText;
    const sources = /<details class="source">[^]*?<\/details>/g;
    Search.htmlToText = (text, anchor) => plain(text.replace(sources, " "), anchor);
  }

  const filter = document.querySelector(".names-filter");
  const rows = [...document.querySelectorAll("table.names tbody tr")];
  filter?.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });

  document.querySelector(".site-pages .current")?.scrollIntoView({ block: "nearest" });
});
