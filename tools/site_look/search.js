// The search: names, pages and headings that hold all words of a query, the best first, while one types. Its index loads with the first search.
"use strict";

const siteSearch = {
  shown: 12, // results in the dialog
  shownOnPage: 60,
  ready: null,
};

// How well an entry answers; 0: it lacks a word. [kind, title, where, address, text, title and text in small letters]
siteSearch.score = function (entry, words, written) {
  const [kind, title, where, , , name, text] = entry;
  const isName = kind !== "page" && kind !== "section";
  const last = name.split(".").pop();
  const query = words.join(" ");
  let score = 0;
  for (const word of words) {
    if (name.includes(word)) score += 20;
    else if (isName && where.toLowerCase().includes(word)) score += 6;
    else if (text.includes(word)) score += 4;
    else return 0;
  }
  score /= words.length;
  const dotted = `${where}.${title}`.toLowerCase();
  if (name === query) score += isName && kind !== "method" ? 100 : 70;
  else if (isName && dotted.endsWith(`.${query}`)) score += kind === "method" ? 60 : 95;
  else if (last === query) score += 50;
  else if (name.startsWith(query)) score += 30;
  else if (name.includes(query)) score += 15;
  else if (!isName && text.includes(query)) score += 5;
  if (title === written) score += 5; // TimeLine is not timeline
  const ofKind = { function: 4, class: 4, page: 6, value: 1, section: 2, method: 0 };
  return score + (ofKind[kind] ?? 0) - name.length / 100;
};

siteSearch.find = function (query, most) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const scored = [];
  for (const entry of window.siteIndex) {
    const score = siteSearch.score(entry, words, query.trim());
    if (score > 0) scored.push([score, entry]);
  }
  scored.sort((a, b) => b[0] - a[0]);
  return scored.slice(0, most).map(([, entry]) => entry);
};

siteSearch.load = function () {
  siteSearch.ready ??= new Promise((done, fail) => {
    const script = document.createElement("script");
    script.src = `${document.documentElement.dataset.content_root}_static/search_index.js`;
    script.onload = () => {
      for (const entry of window.siteIndex) entry.push(entry[1].toLowerCase(), entry[4].toLowerCase());
      done();
    };
    script.onerror = fail;
    document.head.append(script);
  });
  return siteSearch.ready;
};

// A part of the text around the first word of the query, its words marked
siteSearch.excerpt = function (text, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const lower = text.toLowerCase();
  const places = words.map((word) => lower.indexOf(word)).filter((place) => place >= 0);
  const first = places.length ? Math.min(...places) : 0;
  const start = first < 60 ? 0 : text.indexOf(" ", first - 50) + 1;
  const part = (start ? "… " : "") + text.slice(start, start + 160) + (text.length > start + 160 ? " …" : "");
  const line = document.createElement("span");
  line.className = "excerpt";
  const escaped = words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).sort((a, b) => b.length - a.length);
  const pattern = escaped.length ? new RegExp(`(${escaped.join("|")})`, "i") : /($.)/;
  part.split(pattern).forEach((piece, k) => {
    const isWord = k % 2 === 1;
    const node = isWord ? document.createElement("mark") : document.createTextNode(piece);
    if (isWord) node.textContent = piece;
    line.append(node);
  });
  return line;
};

siteSearch.row = function (entry, query, number) {
  const [kind, title, where, address, text] = entry;
  const item = document.createElement("li");
  item.id = `search-result-${number}`;
  item.setAttribute("role", "option");
  item.setAttribute("aria-selected", "false");
  const link = document.createElement("a");
  link.href = document.documentElement.dataset.content_root + address;
  link.tabIndex = -1;
  const name = document.createElement("span");
  name.className = ["page", "section"].includes(kind) ? "found" : "found name";
  name.textContent = title;
  const about = document.createElement("span");
  about.className = "about";
  about.textContent = where ? `${kind} · ${where}` : kind;
  link.append(name, about, siteSearch.excerpt(text, query));
  item.append(link);
  return item;
};

// Results below a field: arrow keys choose, Enter opens what is chosen
siteSearch.attach = function (field, list, status, most) {
  const isPage = most > siteSearch.shown;
  let chosen = -1;

  function choose(next) {
    const rows = [...list.children];
    rows[chosen]?.setAttribute("aria-selected", "false");
    chosen = rows.length ? (next + rows.length) % rows.length : -1;
    const row = rows[chosen];
    row?.setAttribute("aria-selected", "true");
    row?.scrollIntoView({ block: "nearest" });
    field.setAttribute("aria-activedescendant", row?.id ?? "");
  }

  async function show() {
    const query = field.value.trim();
    try {
      await siteSearch.load();
    } catch {
      status.textContent = "The search's index could not be loaded.";
      return;
    }
    if (query !== field.value.trim()) return; // one has typed on
    const found = siteSearch.find(query, most);
    list.replaceChildren(...found.map((entry, number) => siteSearch.row(entry, query, number)));
    list.hidden = !found.length;
    field.setAttribute("aria-expanded", String(found.length > 0));
    const many = found.length === most ? `The first ${most} results` : `${found.length} result${found.length === 1 ? "" : "s"}`;
    status.textContent = query ? (found.length ? many : `Nothing has all of “${query}”.`) : "";
    chosen = -1;
    field.removeAttribute("aria-activedescendant");
    if (isPage) history.replaceState(null, "", query ? `?q=${encodeURIComponent(query)}` : location.pathname);
  }

  field.setAttribute("role", "combobox");
  field.setAttribute("aria-controls", list.id);
  field.setAttribute("aria-expanded", "false");
  field.setAttribute("aria-autocomplete", "list");
  field.addEventListener("focus", () => siteSearch.load().catch(() => {}), { once: true });
  field.addEventListener("input", show);
  field.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      choose(event.key === "ArrowDown" ? chosen + 1 : Math.max(chosen, 0) - 1);
      event.preventDefault();
    } else if (event.key === "Enter" && (chosen >= 0 || isPage)) {
      list.children[Math.max(chosen, 0)]?.querySelector("a").click();
      event.preventDefault();
    }
  });
  if (field.value) show();
};

siteSearch.parts = function (where, id) {
  const status = document.createElement("p");
  status.className = "search-status";
  status.setAttribute("role", "status");
  const list = document.createElement("ul");
  list.id = id;
  list.className = "search-results";
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-label", "Results");
  list.hidden = true;
  where.append(status, list);
  return [list, status];
};

document.addEventListener("DOMContentLoaded", () => {
  const dialog = document.querySelector("#pst-search-dialog");
  const inDialog = dialog?.querySelector("input[name=q]");
  if (inDialog) {
    siteSearch.attach(inDialog, ...siteSearch.parts(dialog, "search-list"), siteSearch.shown);
    dialog.addEventListener("click", (event) => {
      if (event.target.closest("a")) dialog.close(); // a place of the same page is below it
    });
  }
  const page = document.querySelector(".search-page");
  if (page) {
    const field = page.querySelector("input");
    field.value = new URLSearchParams(location.search).get("q") ?? "";
    siteSearch.attach(field, ...siteSearch.parts(page, "search-page-list"), siteSearch.shownOnPage);
    field.focus();
  }
});
