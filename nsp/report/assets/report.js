"use strict";
// What the figures share, and the tables. heatmap.js and chart.js follow in the page.
const tip = document.createElement("div");
tip.className = "tip"; tip.hidden = true; tip.setAttribute("aria-hidden", "true");
document.body.append(tip);

function number(value) {
  return value === null ? "no value" : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6 || value === 0 ? String(+value.toPrecision(4)) : value.toExponential(2);
}

function withEnds(value, low, high, units) { // a number with its units and its interval
  const ends = low === null || low === undefined || high === null ? "" : " [" + number(low) + ", " + number(high) + "] (95 %)";
  return number(value) + (value === null || !units ? "" : " " + units) + ends;
}

function point(x, y, lines) { // the note beside the pointer, or beside the cell that the keyboard chose
  tip.replaceChildren(...lines.map((line, index) => { const part = document.createElement(index ? "div" : "strong"); part.textContent = line; return part; }));
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), wide = document.documentElement.clientWidth;
  tip.style.left = Math.max(4, Math.min(x + 14, wide - box.width - 8)) + window.scrollX + "px";
  tip.style.top = (y + 18 + box.height > window.innerHeight && y > box.height + 14 ? y - box.height - 12 : y + 18) + window.scrollY + "px";
}

function away() { tip.hidden = true; }

function tell(figure, lines) { // for screen readers and for those who do not hover: the same under the figure
  figure.querySelector(".readout").textContent = lines[0] + (lines.length > 1 ? "; " + lines.slice(1).join("; ") : "");
}

function views(figure, change) { // the data of a figure, and what happens when another of its views is chosen
  const data = JSON.parse(figure.querySelector("script").textContent), choose = figure.querySelector("select");
  if (choose) choose.addEventListener("change", () => { figure.querySelector(".about").textContent = data.views[choose.value].about; change(Number(choose.value)); });
  return data.views;
}

function asTable(figure, head, rows) { // the figure's numbers, made when they are asked for
  const details = figure.querySelector("details.numbers");
  const fill = () => {
    if (!details.open) return;
    const table = document.createElement("table"), body = table.createTBody(), [names, cells] = [head(), rows()];
    const top = table.createTHead().insertRow();
    for (const name of names) { const cell = document.createElement("th"); cell.scope = "col"; cell.textContent = name; top.append(cell); }
    for (const row of cells.slice(0, 2000)) { const line = body.insertRow(); for (const value of row) { const cell = line.insertCell(); cell.textContent = value === null ? "no value" : value; } }
    details.querySelector(".scroll").replaceChildren(table);
  };
  details.addEventListener("toggle", fill);
  return fill;
}

function repaint(paint) { // whenever the room, the paper or the light changes
  window.addEventListener("resize", paint);
  window.addEventListener("beforeprint", paint); window.addEventListener("afterprint", paint);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
}

function sortable(table) {
  table.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
    const head = button.closest("th"), index = Array.from(head.parentNode.children).indexOf(head);
    const descending = head.getAttribute("aria-sort") !== "descending";
    const key = (row) => { const text = row.children[index].dataset.value ?? row.children[index].textContent; const value = Number(text); return text !== "" && !Number.isNaN(value) ? value : text; };
    const none = (text) => text === "nan" || text === "-" || text === "";
    const rows = Array.from(table.tBodies[0].rows);
    rows.sort((one, two) => {
      const a = key(one), b = key(two);
      if (none(a) || none(b)) return none(a) - none(b); // what has no value comes last, whichever way
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return descending ? -order : order;
    });
    table.tBodies[0].append(...rows);
    head.parentNode.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  }));
}

document.querySelectorAll("table.sortable").forEach(sortable);
window.addEventListener("beforeprint", () => document.querySelectorAll("details.recipe").forEach((details) => { details.open = true; }));
for (const turned of ["wheel", "touchmove"]) window.addEventListener(turned, away, { passive: true });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") away(); });
