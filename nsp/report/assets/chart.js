// Lines, points and bars as SVG, with what a point holds under the pointer or the keyboard's cursor.
const SVG = new DOMParser().parseFromString("<svg></svg>", "text/html").body.firstChild.namespaceURI, DASHES = ["", "6 3", "2 3", "8 3 2 3", "1 2", "4 2", "10 4"];

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const key of Object.keys(attributes)) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
}

function marker(shape, x, y, size) { // shapes tell series apart where colours do not
  const s = size;
  return ["M" + (x - s) + " " + y + "a" + s + " " + s + " 0 1 0 " + 2 * s + " 0a" + s + " " + s + " 0 1 0 " + -2 * s + " 0",
    "M" + (x - s) + " " + (y - s) + "h" + 2 * s + "v" + 2 * s + "h" + -2 * s + "z",
    "M" + x + " " + (y - 1.2 * s) + "l" + 1.2 * s + " " + 2.2 * s + "h" + -2.4 * s + "z",
    "M" + x + " " + (y - 1.3 * s) + "l" + 1.3 * s + " " + 1.3 * s + "l" + -1.3 * s + " " + 1.3 * s + "l" + -1.3 * s + " " + -1.3 * s + "z"][shape % 4];
}

function steps(low, high, count, least = 0) { // round numbers between two ends
  const raw = Math.max(least, (high - low) / Math.max(1, count)), power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find((one) => one * power >= raw) * power;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
  return found;
}

function chart(figure) {
  const all = views(figure, (chosen) => { data = all[chosen]; hidden = new Set(); cursor = [0, 0]; key(); paint(); fill(); });
  const svg = figure.querySelector("svg"), legend = figure.querySelector(".series");
  const scaled = (x) => data.log_x ? Math.log10(Math.max(1e-12, x)) : x;
  const raised = (y) => data.log_y ? Math.log10(Math.max(1e-12, y)) : y;
  let data = all[0], hidden = new Set(), cursor = [0, 0], places = [];

  const series = () => data.series;
  const seen = () => series().map((one, index) => [one, index]).filter(([, index]) => !hidden.has(index));

  function bounds() {
    let xs = [], ys = [];
    for (const [one] of seen()) {
      one.x.forEach((x, at) => { if (one.y[at] !== null && (x > 0 || !data.log_x)) xs.push(scaled(x)); });
      for (const row of [one.y, one.low, one.high, data.levels]) if (row) ys.push(...row.filter((value) => value !== null && (value > 0 || !data.log_y)).map(raised));
    }
    if (!xs.length) { xs = [0, 1]; ys = [0, 1]; }
    let [left, right] = [xs.reduce((a, b) => Math.min(a, b)), xs.reduce((a, b) => Math.max(a, b))], [low, high] = [ys.reduce((a, b) => Math.min(a, b)), ys.reduce((a, b) => Math.max(a, b))];
    const bars = data.form === "bars";
    if (!data.log_y && (bars || low > 0 && low < 0.4 * high)) low = Math.min(low, 0);
    if (!data.log_y && (bars || high < 0 && high > 0.4 * low)) high = Math.max(high, 0);
    if (low === high) { low -= low ? Math.abs(low) * 0.1 : 0.5; high += high ? Math.abs(high) * 0.1 : 0.5; }
    const pad = (high - low) * (data.edges ? 0.12 : 0.05);
    const side = bars || data.ticks ? 0.6 : (right - left) * (data.edges ? 0.1 : 0.03) || 0.5;
    return { left: left - side, right: right + side, low: low === 0 && !data.log_y && !data.edges ? 0 : low - pad, high: high === 0 && !data.log_y ? 0 : high + pad };
  }

  function paint() {
    const width = Math.max(240, Math.min(920, figure.clientWidth)), longest = data.ticks ? Math.min(20, Math.max(...data.ticks.map((tick) => tick.length))) : 0;
    const slanted = data.ticks && data.ticks.length * longest * 6.5 > width - 70;
    const box = { left: 70, right: width - 10, top: 10, bottom: 270 }, height = box.bottom + (slanted ? 20 + 5.4 * longest : 20) + 20;
    const range = bounds();
    const X = (x) => box.left + (scaled(x) - range.left) / (range.right - range.left) * (box.right - box.left);
    const Y = (y) => box.bottom - (raised(y) - range.low) / (range.high - range.low) * (box.bottom - box.top);
    svg.replaceChildren(); svg.setAttribute("viewBox", "0 0 " + width + " " + height); svg.setAttribute("width", width); svg.setAttribute("height", height);
    for (const y of data.log_y ? steps(range.low, range.high, 6, 1).map((power) => 10 ** power) : steps(range.low, range.high, 6, data.edges ? 1 : 0)) {
      svg.append(element("line", { x1: box.left, x2: box.right, y1: Y(y), y2: Y(y), class: Math.abs(y) < 1e-12 * (range.high - range.low) ? "axis" : "rule" }));
      svg.append(element("text", { x: box.left - 6, y: Y(y) + 4, "text-anchor": "end" }, data.log_y ? number(y) : String(Math.abs(y) < 1e-12 * (range.high - range.low) ? 0 : +y.toPrecision(6))));
    }
    const powers = steps(range.left, range.right, 8, 1).map((power) => 10 ** power);
    const xs = data.ticks ? data.ticks.map((tick, at) => at) : data.log_x ? powers : steps(range.left, range.right, Math.min(12, width / 70), data.whole ? 1 : 0);
    for (const x of xs) {
      svg.append(element("line", { x1: X(x), x2: X(x), y1: box.bottom, y2: box.bottom + 4, class: "axis" }));
      const label = data.ticks ? (data.ticks[x].length > 20 ? data.ticks[x].slice(0, 19) + "…" : data.ticks[x]) : data.log_x ? number(x) : String(+x.toPrecision(6));
      const put = slanted ? { transform: "translate(" + (X(x) + 4) + " " + (box.bottom + 12) + ") rotate(-55)", "text-anchor": "end" } : { x: X(x), y: box.bottom + 16, "text-anchor": "middle" };
      svg.append(element("text", put, label));
    }
    svg.append(element("line", { x1: box.left, x2: box.left, y1: box.top, y2: box.bottom, class: "axis" }), element("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "axis" }));
    svg.append(element("text", { x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, data.x));
    svg.append(element("text", { transform: "translate(12 " + (box.top + box.bottom) / 2 + ") rotate(-90)", "text-anchor": "middle" }, data.y + (data.units && data.units !== data.y ? " [" + data.units + "]" : "")));
    if (data.equality) {
      const low = Math.max(range.left, range.low), high = Math.min(range.right, range.high);
      if (high > low) svg.append(element("line", { x1: X(low), x2: X(high), y1: Y(low), y2: Y(high), class: "equal" }));
    }
    for (const y of data.levels || []) svg.append(element("line", { x1: box.left, x2: box.right, y1: Y(y), y2: Y(y), class: "equal" }));
    for (const [x1, y1, x2, y2, share] of data.edges || []) { // wide where the weight is large; the end is the receiver
      const bend = 0.12 * (X(x2) - X(x1)), middle = "Q" + (X(x1) + X(x2)) / 2 + " " + ((Y(y1) + Y(y2)) / 2 + bend) + " ";
      const edge = { class: "edge s" + (share > 0 ? 1 : 0), d: "M" + X(x1) + " " + Y(y1) + middle + X(x2) + " " + Y(y2) };
      svg.append(element("path", { ...edge, "stroke-width": 0.5 + 4 * Math.abs(share), "stroke-opacity": 0.3 + 0.7 * Math.abs(share) }));
    }
    places = [];
    const rows = data.form === "bars" ? seen() : [], gaps = rows.flatMap(([one]) => one.x.slice(1).map((x, at) => Math.abs(x - one.x[at])).filter((gap) => gap > 0));
    const room = Math.abs(X(range.left + (gaps.length ? Math.min(...gaps) : 1)) - X(range.left)) * 0.8, thin = Math.max(1, room / Math.max(1, rows.length));
    for (const [one, index] of seen()) {
      const at = rows.findIndex(([, other]) => other === index), shift = at < 0 ? 0 : (at - (rows.length - 1) / 2) * thin;
      draw(one, index, (x) => X(x) + shift, Y, thin, data.log_y ? 10 ** range.low : Math.max(range.low, Math.min(range.high, 0)));
    }
    const ring = element("path", { class: "ring" }); svg.append(ring);
    mark();
  }

  function draw(one, index, X, Y, thin, zero) {
    const group = element("g", { class: style(index) }), drawn = (at) => one.y[at] !== null && (one.x[at] > 0 || !data.log_x), there = one.x.map((x, at) => at).filter(drawn);
    const ends = there.filter((at) => one.low && one.low[at] !== null && one.high[at] !== null);
    if (data.form === "lines") {
      if (ends.length > 1) group.append(element("polygon", { class: "band", points: [...ends.map((at) => X(one.x[at]) + "," + Y(one.high[at])), ...ends.reverse().map((at) => X(one.x[at]) + "," + Y(one.low[at]))].join(" ") }));
      let path = ""; // a line breaks where there is no value
      one.x.forEach((x, at) => { if (drawn(at)) path += (at === 0 || !drawn(at - 1) ? "M" : "L") + X(x) + " " + Y(one.y[at]); });
      group.append(element("path", { class: "line", d: path, "stroke-dasharray": DASHES[index % 7] }));
    } else for (const at of ends) group.append(element("line", { class: "whisker", x1: X(one.x[at]), x2: X(one.x[at]), y1: Y(one.low[at]), y2: Y(one.high[at]) }));
    for (const [x, half, low, first, median, third, high] of one.boxes || []) {
      const [left, right, middle] = [X(x - half), X(x + half), X(x)];
      group.append(element("path", { class: "box", d: "M" + middle + " " + Y(low) + "V" + Y(first) + "M" + middle + " " + Y(third) + "V" + Y(high) + "M" + left + " " + Y(first) + "H" + right + "V" + Y(third) + "H" + left + "Z" }));
      group.append(element("path", { class: "box median", d: "M" + left + " " + Y(median) + "H" + right }));
    }
    const size = data.edges ? 4.5 : data.form === "scatter" ? (there.length > 300 ? 2.2 : 3) : 2.5;
    for (const at of there) {
      const x = X(one.x[at]), y = Y(one.y[at]);
      const made = data.form === "bars" ? element("rect", { class: "bar", x: x - thin / 2, width: thin, y: Math.min(y, Y(zero)), height: Math.max(0.5, Math.abs(Y(zero) - y)) }) : element("path", { class: "mark", d: marker(index, x, y, size) });
      made.dataset.series = index; made.dataset.index = at;
      if (data.form === "bars") group.prepend(made); else group.append(made);
      places.push([index, at, x, y]);
      if (one.names) group.append(element("text", { x: x + 6, y: y - 6 }, one.names[at].length > 18 ? one.names[at].slice(0, 17) + "…" : one.names[at]));
    }
    svg.append(group);
  }

  function style(index) { // what is aside is grey and takes no colour
    return series()[index].aside ? "aside" : "s" + series().slice(0, index).filter((one) => !one.aside).length % 7;
  }

  function mark() { // the keyboard's place
    const ring = svg.querySelector(".ring"), place = places.find(([index, at]) => index === cursor[0] && at === cursor[1]);
    ring.setAttribute("d", place && document.activeElement === svg ? marker(0, place[2], place[3], 6) : "");
  }

  function lines(index, at) {
    const one = series()[index], label = one.notes && one.notes.length ? one.notes[at] : data.x + " " + (data.ticks ? data.ticks[one.x[at]] : number(one.x[at]));
    const [first, ...rest] = label.split("; ");
    const found = [(series().length > 1 ? one.name + ", " : "") + first + (one.told && one.told[at] === null ? "" : ": " + withEnds((one.told || one.y)[at], one.low ? one.low[at] : null, one.high ? one.high[at] : null, data.units))];
    if (data.x_told) found.push(data.x + " " + number(one.x[at]));
    return [...found, ...rest];
  }

  function say(index, at) { cursor = [index, at]; tell(figure, lines(index, at)); }

  function nearest(event) {
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width, x = (event.clientX - box.left) / scale, y = (event.clientY - box.top) / scale;
    let best = null, least = 40 * 40;
    for (const place of places) {
      const across = place[2] - x, up = place[3] - y, bar = data.form === "bars";
      const far = bar ? across * across : across * across + up * up;
      if (far < least) { least = far; best = place; }
    }
    return best;
  }

  svg.addEventListener("mousemove", (event) => { const place = nearest(event); if (place) { say(place[0], place[1]); mark(); point(event.clientX, event.clientY, lines(place[0], place[1])); } else away(); });
  svg.addEventListener("mouseleave", away);
  svg.addEventListener("click", () => svg.focus());
  svg.addEventListener("focus", () => { if (!places.some(([index, at]) => index === cursor[0] && at === cursor[1]) && places.length) cursor = places[0].slice(0, 2); if (places.length) say(...cursor); mark(); });
  svg.addEventListener("blur", () => { away(); mark(); });
  svg.addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key) || !places.length) return;
    event.preventDefault();
    const own = places.filter(([index]) => index === cursor[0]).sort((a, b) => a[2] - b[2]), here = own.findIndex(([, at]) => at === cursor[1]);
    let next = own[here];
    if (event.key === "ArrowUp" || event.key === "ArrowDown") { // the neighbouring series, at the nearest place
      const shown = [...new Set(places.map(([index]) => index))], to = shown[(shown.indexOf(cursor[0]) + (event.key === "ArrowUp" ? 1 : shown.length - 1)) % shown.length];
      next = places.filter(([index]) => index === to).reduce((best, place) => Math.abs(place[2] - own[here][2]) < Math.abs(best[2] - own[here][2]) ? place : best);
    } else next = own[{ ArrowLeft: Math.max(0, here - 1), ArrowRight: Math.min(own.length - 1, here + 1), Home: 0, End: own.length - 1 }[event.key]];
    say(next[0], next[1]); mark();
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    point(box.left + next[2] * scale, box.top + next[3] * scale, lines(next[0], next[1]));
  });

  function key() { // names of the series; a click hides or shows one
    legend.replaceChildren();
    if (series().length < 2) return;
    series().forEach((one, index) => {
      const button = document.createElement("button"), sample = element("svg", { width: 26, height: 12, "aria-hidden": "true" }), group = element("g", { class: style(index) });
      if (data.form === "lines") group.append(element("path", { class: "line", d: "M0 6L26 6", "stroke-dasharray": DASHES[index % 7] }));
      group.append(data.form === "bars" ? element("rect", { class: "bar", x: 7, y: 1, width: 12, height: 10 }) : element("path", { class: "mark", d: marker(index, 13, 6, 3.5) }));
      sample.append(group); button.type = "button"; button.append(sample, one.name); button.setAttribute("aria-pressed", String(!hidden.has(index)));
      button.addEventListener("click", () => { if (hidden.has(index)) hidden.delete(index); else hidden.add(index); button.setAttribute("aria-pressed", String(!hidden.has(index))); paint(); });
      legend.append(button);
    });
  }

  const fill = asTable(figure, () => ["series", data.x, data.y, "low", "high", "what"],
    () => series().flatMap((one) => one.x.map((x, at) => [one.name, data.ticks ? data.ticks[x] : x, one.y[at], one.low ? one.low[at] : "", one.high ? one.high[at] : "", one.notes && one.notes.length ? one.notes[at] : ""])));
  repaint(paint);
  key(); paint();
}

document.querySelectorAll("figure.chart").forEach(chart);
document.querySelectorAll("figure.table").forEach((figure) => { // another view's rows are in the page already, hidden
  views(figure, (chosen) => figure.querySelectorAll(".rows").forEach((rows, at) => { rows.hidden = at !== chosen; }));
});
document.body.dataset.ready = "yes";
