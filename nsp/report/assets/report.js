"use strict";
// Heatmaps on canvas, with the numbers of the cell under the pointer or the keyboard's cursor; tables sorted by a click.
const STOPS = [[5, 48, 97], [67, 147, 195], [247, 247, 247], [214, 96, 77], [103, 0, 31]];

function colour(share) {
  const at = Math.max(0, Math.min(1, (share + 1) / 2)) * (STOPS.length - 1);
  const low = Math.min(STOPS.length - 2, Math.floor(at)), part = at - low;
  return "rgb(" + STOPS[low].map((value, index) => Math.round(value + part * (STOPS[low + 1][index] - value))).join(",") + ")";
}

function number(value) {
  return value === null ? "no value" : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6 || value === 0 ? String(+value.toPrecision(4)) : value.toExponential(2);
}

function drawn(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const canvas = figure.querySelector("canvas"), readout = figure.querySelector(".readout"), choose = figure.querySelector("select");
  const rows = data.rows.length, columns = data.columns.length;
  const wide = Math.max(...data.rows.map((label) => label.length)), left = Math.max(46, Math.min(140, 26 + 7 * wide));
  const labels = (shown) => shown.columns || data.columns;
  const longest = Math.min(22, Math.max(...data.layers.map((shown) => Math.max(...labels(shown).map((label) => label.length)))));
  let layer = 0, cursor = [rows - 1, 0], cell, tall, below, width, height;

  function measure() { // cells fit the page's width down to 12 pixels, then the figure scrolls
    const room = figure.clientWidth - left - 6;
    cell = Math.max(columns > 80 ? 2 : 12, Math.min(26, Math.floor(room / columns)));
    tall = Math.max(8, Math.min(18, Math.floor(620 / rows)));
    below = (cell >= 9 ? 8 + 7 * longest : 22) + 16;
    width = left + columns * cell + 4; height = rows * tall + below;
  }

  function paint() {
    measure();
    const ratio = window.devicePixelRatio || 1, context = canvas.getContext("2d");
    canvas.width = width * ratio; canvas.height = height * ratio;
    canvas.style.width = width + "px"; canvas.style.height = height + "px";
    Object.assign(canvas.dataset, { left, cell, tall }); // where cells lie, for tests and for scripts
    context.scale(ratio, ratio);
    const ink = window.matchMedia("print").matches ? "#000" : getComputedStyle(document.body).color, values = data.layers[layer].values;
    context.font = "11px system-ui, sans-serif";
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const value = values[row][column], x = left + column * cell, y = (rows - 1 - row) * tall;
        context.fillStyle = value === null ? "#9a9a9a" : colour((value - data.centre) / data.reach);
        context.fillRect(x, y, cell, tall);
        if (value === null && cell >= 6) { // missing is hatched, never white
          context.strokeStyle = "#5f5f5f"; context.beginPath(); context.moveTo(x, y + tall); context.lineTo(x + cell, y); context.stroke();
        }
      }
    }
    context.fillStyle = ink; context.textAlign = "right"; context.textBaseline = "middle";
    const step = Math.max(1, Math.ceil(12 / tall));
    for (let row = 0; row < rows; row += step) context.fillText(data.rows[row], left - 5, (rows - 1 - row + 0.5) * tall);
    const every = cell >= 9 ? 1 : Math.ceil(60 / cell);
    for (let column = 0; column < columns; column += every) {
      context.save(); context.translate(left + (column + 0.5) * cell, rows * tall + 5);
      if (cell >= 9) { context.rotate(-Math.PI / 2); context.textAlign = "right"; } else { context.textAlign = "center"; context.translate(0, 7); }
      context.fillText(labels(data.layers[layer])[column].slice(0, 22), 0, 0); context.restore();
    }
    context.textAlign = "left"; context.textBaseline = "bottom"; context.fillText(data.x, left, height - 1);
    if (data.y) { context.save(); context.translate(2, rows * tall / 2); context.rotate(-Math.PI / 2); context.textAlign = "center"; context.textBaseline = "top"; context.fillText(data.y, 0, 0); context.restore(); }
    context.strokeStyle = ink; context.lineWidth = 2;
    if (document.activeElement === canvas) context.strokeRect(left + cursor[1] * cell + 1, (rows - 1 - cursor[0]) * tall + 1, cell - 2, tall - 2);
  }

  function say(row, column) {
    const shown = data.layers[layer], value = shown.values[row][column];
    let text = (data.y ? data.y + " " + data.rows[row] + ", " : "") + data.x + " " + labels(shown)[column] + ": " + number(value) + (value === null || !data.units ? "" : " " + data.units);
    if (shown.low && shown.low[row][column] !== null) text += "  [" + number(shown.low[row][column]) + ", " + number(shown.high[row][column]) + "] (95 %)";
    if (shown.details) for (const name of Object.keys(shown.details)) {
      const found = shown.details[name][row][column];
      if (found !== null) text += "; " + name + " " + (typeof found === "number" ? number(found) : found);
    }
    readout.textContent = text;
  }

  function at(event) {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - left) / cell), row = rows - 1 - Math.floor((event.clientY - box.top) / tall);
    return row >= 0 && row < rows && column >= 0 && column < columns ? [row, column] : null;
  }

  canvas.addEventListener("mousemove", (event) => { const place = at(event); if (place) { cursor = place; say(...place); } });
  canvas.addEventListener("click", (event) => { const place = at(event); if (place) { cursor = place; say(...place); canvas.focus(); paint(); } });
  canvas.addEventListener("focus", () => { paint(); say(...cursor); });
  canvas.addEventListener("blur", paint);
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    cursor = [Math.max(0, Math.min(rows - 1, cursor[0] + move[0])), Math.max(0, Math.min(columns - 1, cursor[1] + move[1]))];
    paint(); say(...cursor);
  });
  if (choose) choose.addEventListener("change", () => { layer = Number(choose.value); paint(); say(...cursor); });
  const ramp = figure.querySelector(".ramp");
  if (ramp) ramp.style.background = "linear-gradient(to right," + STOPS.map((stop) => "rgb(" + stop.join(",") + ")").join(",") + ")";
  window.addEventListener("resize", paint);
  window.addEventListener("beforeprint", paint); window.addEventListener("afterprint", paint);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  paint();
}

function sortable(table) {
  table.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
    const head = button.closest("th"), index = Array.from(head.parentNode.children).indexOf(head);
    const descending = head.getAttribute("aria-sort") !== "descending";
    const key = (row) => { const text = row.children[index].dataset.value ?? row.children[index].textContent; const value = Number(text); return text !== "" && !Number.isNaN(value) ? value : text; };
    const rows = Array.from(table.tBodies[0].rows);
    rows.sort((one, two) => { const a = key(one), b = key(two); const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)); return descending ? -order : order; });
    table.tBodies[0].append(...rows);
    head.parentNode.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  }));
}

document.querySelectorAll("figure.heatmap").forEach(drawn);
document.querySelectorAll("table.sortable").forEach(sortable);
document.body.dataset.ready = "yes";
