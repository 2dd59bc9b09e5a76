// Heatmaps on canvas, with what a cell holds under the pointer or the keyboard's cursor.
const DIVERGING = [[5, 48, 97], [67, 147, 195], [247, 247, 247], [214, 96, 77], [103, 0, 31]]; // as matplotlib's RdBu
const SEQUENTIAL = [[0, 34, 78], [65, 77, 107], [124, 123, 120], [188, 174, 108], [254, 232, 56]]; // as matplotlib's cividis

function shade(value, scale) {
  const stops = scale.centre === null ? SEQUENTIAL : DIVERGING;
  const share = scale.centre === null ? (value - scale.low) / (scale.high - scale.low) : 0.5 + 0.5 * (value - scale.centre) / (scale.high - scale.centre);
  const at = Math.max(0, Math.min(1, share)) * (stops.length - 1), low = Math.min(stops.length - 2, Math.floor(at)), part = at - low;
  return stops[low].map((one, index) => Math.round(one + part * (stops[low + 1][index] - one)));
}

function heatmap(figure) {
  const all = views(figure, (chosen) => { shown = all[chosen]; legend(); paint(); say(cursor); fill(); });
  const canvas = figure.querySelector("canvas"), scroll = canvas.parentNode;
  const most = (part) => Math.max(...all.map((view) => Math.max(...view[part].map((label) => label.length))));
  const left = Math.max(46, Math.min(190, 26 + 6.2 * most("rows"))), longest = Math.min(22, most("columns"));
  let shown = all[0], rows, columns, cursor, cell, tall, below, width, height;

  function measure() { // cells fit the page's width down to 12 pixels (or what a word needs), then the figure scrolls
    const room = figure.clientWidth - left - 6;
    rows = shown.rows.length; columns = shown.columns.length;
    cell = shown.texts ? Math.max(58, Math.min(84, Math.floor(room / columns))) : Math.max(columns > 80 ? 2 : 12, Math.min(columns < 12 ? 40 : 26, Math.floor(room / columns)));
    tall = Math.max(shown.texts ? 16 : 8, Math.min(18, Math.floor(620 / rows)));
    below = (cell >= 9 ? 8 + 6.6 * longest : 22) + 18;
    width = left + columns * cell + 4; height = rows * tall + below;
    cursor = cursor ? [Math.min(rows - 1, cursor[0]), Math.min(columns - 1, cursor[1])] : [rows - 1, 0];
  }

  function fitted(context, text, room) { // a text that fits into a cell
    while (text.length > 1 && context.measureText(text).width > room) text = text.slice(0, -2) + "…";
    return text;
  }

  function paint() {
    measure();
    const ratio = window.devicePixelRatio || 1, context = canvas.getContext("2d");
    canvas.width = width * ratio; canvas.height = height * ratio;
    canvas.style.width = width + "px"; canvas.style.height = height + "px";
    Object.assign(canvas.dataset, { left, cell, tall, rows, columns }); // where cells lie, for tests and for scripts
    context.scale(ratio, ratio);
    const ink = window.matchMedia("print").matches ? "#000" : getComputedStyle(document.body).color, words = shown.texts;
    context.font = "11px system-ui, sans-serif"; context.textBaseline = "middle";
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const value = shown.values[row][column], x = left + column * cell, y = (rows - 1 - row) * tall;
        const colour = value === null ? [154, 154, 154] : shade(value, shown.scale);
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
    for (let row = 0; row < rows; row += step) context.fillText(fitted(context, shown.rows[row], left - 24), left - 5, (rows - 1 - row + 0.5) * tall);
    const every = cell >= 9 ? 1 : Math.ceil(60 / cell);
    for (let column = 0; column < columns; column += every) {
      context.save(); context.translate(left + (column + 0.5) * cell, rows * tall + 5);
      if (cell >= 9) { context.rotate(-Math.PI / 2); context.textAlign = "right"; } else { context.textAlign = "center"; context.translate(0, 7); }
      context.fillText(shown.columns[column].slice(0, 22), 0, 0); context.restore();
    }
    context.textAlign = "left"; context.textBaseline = "bottom"; context.fillText(shown.x, left, height - 1);
    if (shown.y) { context.save(); const high = context.measureText(shown.y).width < rows * tall; context.translate(2, high ? rows * tall / 2 : 0); context.rotate(-Math.PI / 2); context.textAlign = high ? "center" : "right"; context.textBaseline = "top"; context.fillText(shown.y, 0, 0); context.restore(); }
    context.strokeStyle = ink; context.lineWidth = 2;
    if (document.activeElement === canvas) context.strokeRect(left + cursor[1] * cell + 1, (rows - 1 - cursor[0]) * tall + 1, cell - 2, tall - 2);
  }

  function lines(row, column) {
    const found = [(shown.y ? shown.y + " " + shown.rows[row] + ", " : "") + shown.x + " " + shown.columns[column] + ": "
      + withEnds(shown.values[row][column], shown.low ? shown.low[row][column] : null, shown.high ? shown.high[row][column] : null, shown.units)];
    for (const name of Object.keys(shown.details)) {
      const value = shown.details[name][row][column];
      if (value !== null) found.push(name + " " + (typeof value === "number" ? number(value) : value));
    }
    return found;
  }

  function legend() {
    const ends = [shown.scale.low, shown.scale.high], stops = shown.scale.centre === null ? SEQUENTIAL : DIVERGING;
    ["low", "high"].forEach((end, index) => { figure.querySelector(".legend ." + end).textContent = String(+ends[index].toPrecision(3)); });
    figure.querySelector(".ramp").style.background = "linear-gradient(to right," + stops.map((stop) => "rgb(" + stop.join(",") + ")").join(",") + ")";
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
  const fill = asTable(figure, () => [shown.y, ...shown.columns], () => shown.rows.map((label, row) => [label, ...shown.values[row]]).reverse());
  repaint(paint);
  legend(); paint();
}

document.querySelectorAll("figure.heatmap").forEach(heatmap);
