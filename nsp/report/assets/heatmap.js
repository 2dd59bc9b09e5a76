// Heatmaps on canvas, with what a cell holds under the pointer or the keyboard's cursor.
const STOPS = [[5, 48, 97], [67, 147, 195], [247, 247, 247], [214, 96, 77], [103, 0, 31]];

function shade(share) {
  const at = Math.max(0, Math.min(1, (share + 1) / 2)) * (STOPS.length - 1);
  const low = Math.min(STOPS.length - 2, Math.floor(at)), part = at - low;
  return STOPS[low].map((value, index) => Math.round(value + part * (STOPS[low + 1][index] - value)));
}

function heatmap(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const canvas = figure.querySelector("canvas"), choose = figure.querySelector("select"), scroll = canvas.parentNode;
  const rows = data.rows.length;
  const wide = Math.max(...data.rows.map((label) => label.length)), left = Math.max(46, Math.min(190, 26 + 6.2 * wide));
  const labels = (shown) => shown.columns || data.columns;
  const longest = Math.min(22, Math.max(...data.layers.map((shown) => Math.max(...labels(shown).map((label) => label.length)))));
  let layer = 0, columns, cursor, cell, tall, below, width, height;

  function measure() { // cells fit the page's width down to 12 pixels (or what a word needs), then the figure scrolls
    const room = figure.clientWidth - left - 6;
    columns = labels(data.layers[layer]).length;
    cell = data.written ? Math.max(58, Math.min(84, Math.floor(room / columns))) : Math.max(columns > 80 ? 2 : 12, Math.min(columns < 12 ? 40 : 26, Math.floor(room / columns)));
    tall = Math.max(data.written ? 16 : 8, Math.min(18, Math.floor(620 / rows)));
    below = (cell >= 9 ? 8 + 6.6 * longest : 22) + 18;
    width = left + columns * cell + 4; height = rows * tall + below;
    cursor = cursor ? [cursor[0], Math.min(columns - 1, cursor[1])] : [rows - 1, 0];
  }

  function fitted(context, text, room) { // a text that fits into a cell
    let shown = text;
    while (shown.length > 1 && context.measureText(shown).width > room) shown = shown.slice(0, -2) + "…";
    return shown;
  }

  function paint() {
    measure();
    const ratio = window.devicePixelRatio || 1, context = canvas.getContext("2d");
    canvas.width = width * ratio; canvas.height = height * ratio;
    canvas.style.width = width + "px"; canvas.style.height = height + "px";
    Object.assign(canvas.dataset, { left, cell, tall, rows, columns }); // where cells lie, for tests and for scripts
    context.scale(ratio, ratio);
    const ink = window.matchMedia("print").matches ? "#000" : getComputedStyle(document.body).color, shown = data.layers[layer];
    const words = data.written && shown.details ? shown.details[data.written] : null;
    context.font = "11px system-ui, sans-serif"; context.textBaseline = "middle";
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const value = shown.values[row][column], x = left + column * cell, y = (rows - 1 - row) * tall;
        const colour = value === null ? [154, 154, 154] : shade((value - data.centre) / data.reach);
        context.fillStyle = "rgb(" + colour.join(",") + ")";
        context.fillRect(x, y, cell, tall);
        if (value === null && cell >= 6) { // missing is hatched, never white
          context.strokeStyle = "#5f5f5f"; context.beginPath(); context.moveTo(x, y + tall); context.lineTo(x + cell, y); context.stroke();
        } else if (words && words[row][column] !== null) {
          context.fillStyle = colour[0] * 0.3 + colour[1] * 0.59 + colour[2] * 0.11 > 140 ? "#111" : "#fff"; context.textAlign = "center";
          context.fillText(fitted(context, words[row][column], cell - 4), x + cell / 2, y + tall / 2 + 0.5);
        }
      }
    }
    context.fillStyle = ink; context.textAlign = "right";
    const step = Math.max(1, Math.ceil(12 / tall));
    for (let row = 0; row < rows; row += step) context.fillText(fitted(context, data.rows[row], left - 24), left - 5, (rows - 1 - row + 0.5) * tall);
    const every = cell >= 9 ? 1 : Math.ceil(60 / cell);
    for (let column = 0; column < columns; column += every) {
      context.save(); context.translate(left + (column + 0.5) * cell, rows * tall + 5);
      if (cell >= 9) { context.rotate(-Math.PI / 2); context.textAlign = "right"; } else { context.textAlign = "center"; context.translate(0, 7); }
      context.fillText(labels(shown)[column].slice(0, 22), 0, 0); context.restore();
    }
    context.textAlign = "left"; context.textBaseline = "bottom"; context.fillText(data.x, left, height - 1);
    if (data.y) { context.save(); context.translate(2, rows * tall / 2); context.rotate(-Math.PI / 2); context.textAlign = "center"; context.textBaseline = "top"; context.fillText(data.y, 0, 0); context.restore(); }
    context.strokeStyle = ink; context.lineWidth = 2;
    if (document.activeElement === canvas) context.strokeRect(left + cursor[1] * cell + 1, (rows - 1 - cursor[0]) * tall + 1, cell - 2, tall - 2);
  }

  function lines(row, column) {
    const shown = data.layers[layer];
    const found = [(data.y ? data.y + " " + data.rows[row] + ", " : "") + data.x + " " + labels(shown)[column] + ": "
      + withEnds(shown.values[row][column], shown.low ? shown.low[row][column] : null, shown.high ? shown.high[row][column] : null, data.units)];
    for (const name of Object.keys(shown.details || {})) {
      const value = shown.details[name][row][column];
      if (value !== null) found.push(name + " " + (typeof value === "number" ? number(value) : value));
    }
    return found;
  }

  function say(place) { cursor = place; tell(figure, lines(...place)); }

  function at(event) {
    const box = canvas.getBoundingClientRect(), scale = box.width / width;
    const column = Math.floor(((event.clientX - box.left) / scale - left) / cell), row = rows - 1 - Math.floor((event.clientY - box.top) / scale / tall);
    return row >= 0 && row < rows && column >= 0 && column < columns ? [row, column] : null;
  }

  function follow() { // the keyboard's cell stays in sight, with its note
    const x = left + cursor[1] * cell, y = (rows - 1 - cursor[0]) * tall;
    if (x < scroll.scrollLeft + left) scroll.scrollLeft = x - left; else if (x + cell > scroll.scrollLeft + scroll.clientWidth) scroll.scrollLeft = x + cell - scroll.clientWidth;
    const box = canvas.getBoundingClientRect();
    point(box.left + x + cell / 2, box.top + y, lines(...cursor));
  }

  canvas.addEventListener("mousemove", (event) => { const place = at(event); if (place) { say(place); point(event.clientX, event.clientY, lines(...place)); } else away(); });
  canvas.addEventListener("mouseleave", away);
  canvas.addEventListener("click", (event) => { const place = at(event); if (place) { say(place); canvas.focus(); paint(); } });
  canvas.addEventListener("focus", () => { paint(); say(cursor); });
  canvas.addEventListener("blur", () => { away(); paint(); });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -columns], End: [0, columns], PageUp: [rows, 0], PageDown: [-rows, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    say([Math.max(0, Math.min(rows - 1, cursor[0] + move[0])), Math.max(0, Math.min(columns - 1, cursor[1] + move[1]))]);
    paint(); follow();
  });
  const fill = asTable(figure, () => [data.y || "", ...labels(data.layers[layer])], () => data.rows.map((label, row) => [label, ...data.layers[layer].values[row]]).reverse());
  if (choose) choose.addEventListener("change", () => { layer = Number(choose.value); paint(); say(cursor); fill(); });
  const ramp = figure.querySelector(".ramp");
  if (ramp) ramp.style.background = "linear-gradient(to right," + STOPS.map((stop) => "rgb(" + stop.join(",") + ")").join(",") + ")";
  repaint(paint);
  paint();
}

document.querySelectorAll("figure.heatmap").forEach(heatmap);
