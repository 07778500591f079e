"use strict";
(() => {
// perceptually uniform and safe for colour-blind readers: eleven stops of matplotlib's viridis and inferno
const VIRIDIS = ["440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26", "fde725"];
const INFERNO = ["000004", "160b39", "420a68", "6a176e", "932667", "bc3754", "dd513a", "f37819", "fca50a", "f6d746", "fcffa4"];
function palette(stops) {
  const rgb = stops.map(s => [0, 2, 4].map(k => parseInt(s.slice(k, k + 2), 16)));
  return x => {
    const place = Math.min(Math.max(x, 0), 1) * (rgb.length - 1), k = Math.min(Math.floor(place), rgb.length - 2), t = place - k;
    return rgb[k].map((c, i) => Math.round(c + t * (rgb[k + 1][i] - c)));
  };
}
const viridis = palette(VIRIDIS), inferno = palette(INFERNO);
const RIGHT = "#56B4E9", CHOSEN = "#F0E442", GOAL = "#E69F00";

function bytes(text) { return Uint8Array.from(atob(text), c => c.charCodeAt(0)); }
function floats(text) { return Float64Array.from(new Float32Array(bytes(text).buffer)); }

// entropic transport by scaling, see otcxr.explorer
function transport(cost, a, b, epsilon, reach) {
  const n = a.length, m = b.length, K = new Float64Array(n * m), w = reach > 0 ? reach / (reach + epsilon) : 1;
  for (let i = 0; i < n; i++) for (let j = 0; j < m; j++) K[i * m + j] = a[i] * b[j] * Math.exp(-cost[i * m + j] / epsilon);
  const u = new Float64Array(n).fill(1), v = new Float64Array(m).fill(1);
  let residual = Infinity, iterations = 0;
  while (iterations < 20000) {
    let off = 0;
    for (let i = 0; i < n; i++) {
      let sum = 0;
      for (let j = 0; j < m; j++) sum += K[i * m + j] * v[j];
      const next = a[i] > 0 ? (w === 1 ? a[i] / sum : Math.pow(a[i] / sum, w)) : 0;
      // what the row's mass is now, against what it would be after this step
      if (iterations > 0) off += w === 1 ? Math.abs(u[i] * sum - a[i]) : Math.abs(u[i] - next) * sum;
      u[i] = next;
    }
    for (let j = 0; j < m; j++) {
      let sum = 0;
      for (let i = 0; i < n; i++) sum += K[i * m + j] * u[i];
      v[j] = b[j] > 0 ? (w === 1 ? b[j] / sum : Math.pow(b[j] / sum, w)) : 0;
    }
    iterations++;
    if (iterations > 1) { residual = off; if (off < 1e-7) break; }
  }
  const plan = new Float64Array(n * m);
  for (let i = 0; i < n; i++) for (let j = 0; j < m; j++) plan[i * m + j] = u[i] * K[i * m + j] * v[j];
  return {plan, iterations, residual};
}

function start(section) {
  const data = JSON.parse(section.querySelector('script[type="application/json"]').textContent);
  const find = name => section.querySelector(`[data-control="${name}"]`), out = name => section.querySelector(`[data-out="${name}"]`);
  const canvases = [...section.querySelectorAll("canvas[data-view]")];
  const matrices = Object.fromEntries([...section.querySelectorAll("canvas[data-matrix]")].map(c => [c.dataset.matrix, c]));
  const [low, high] = data.epsilons;
  const state = {pair: 0, side: 0, index: 0, mode: "stored", epsilon: Math.min(Math.max(data.epsilon, low), high), layer: "flow"};
  const pairs = data.pairs.map(p => ({...p, cost: floats(p.cost), stored: floats(p.plan), a: floats(p.a), b: floats(p.b),
    heads: p.heads.map(bytes), n: p.grids[0][0] * p.grids[0][1], m: p.grids[1][0] * p.grids[1][1],
    images: p.views.map(source => { const image = new Image(); image.onload = draw; image.src = source; return image; })}));
  let now;  // {plan, a, b, iterations, residual}

  const even = valid => { const sum = valid.reduce((x, y) => x + y, 0); return Float64Array.from(valid, v => v / sum); };
  function compute() {
    const p = pairs[state.pair];
    if (state.mode === "stored") { now = {plan: p.stored, a: p.a, b: p.b}; return; }
    const [a, b] = state.mode === "uniform" ? p.valid.map(even) : [p.a, p.b];
    now = {...transport(p.cost, a, b, state.epsilon, data.reach), a, b};
  }
  const largest = values => values.reduce((best, x, k) => x > values[best] ? k : best, 0);
  function line(matrix, side, index) {  // of a matrix: what one position has to do with every one of the other view
    const p = pairs[state.pair];
    return side === 0 ? Array.from(matrix.slice(index * p.m, (index + 1) * p.m))
      : Array.from({length: p.n}, (_, i) => matrix[i * p.m + index]);
  }
  function truth(side, index) {  // the true place in the other view, -1 where it does not show it
    const p = pairs[state.pair];
    return side === 0 ? p.true[index] : p.true.indexOf(index);
  }
  const near = (k, l, width) => Math.abs(k % width - l % width) <= 1 && Math.abs(Math.floor(k / width) - Math.floor(l / width)) <= 1;
  function hits() {
    const p = pairs[state.pair], width = p.grids[1][1];
    let known = 0, right = 0;
    for (let i = 0; i < p.n; i++) if (p.true[i] >= 0) {
      known++;
      if (near(largest(line(now.plan, 0, i)), p.true[i], width)) right++;
    }
    return {known, right};
  }
  function layer() {  // values over each view, and the palette: of the masses both, else of the view that is not pointed at
    const p = pairs[state.pair], blank = [null, null], other = 1 - state.side;
    if (state.layer === "masses") return [[Array.from(now.a), Array.from(now.b)], viridis];
    if (state.layer === "flow") blank[other] = line(now.plan, state.side, state.index);
    else if (state.layer === "cost") blank[other] = line(p.cost, state.side, state.index).map(c => 2 - c);
    else blank[other] = line(p.heads[Number(state.layer)], state.side, state.index);
    return [blank, inferno];
  }
  function spot(view, index) {  // centre and size of a position, in [0, 1]
    const p = pairs[state.pair], [h, w] = p.grids[view];
    return [(index % w + p.first) / w, (Math.floor(index / w) + p.first) / h, 1 / w, 1 / h];
  }
  function draw() {
    const p = pairs[state.pair], [values, colours] = layer(), other = 1 - state.side;
    canvases.forEach((canvas, view) => {
      const image = p.images[view];
      if (!image.complete || !image.naturalWidth) return;
      const scale = Math.max(1, Math.round(480 / image.naturalWidth));
      canvas.width = image.naturalWidth * scale; canvas.height = image.naturalHeight * scale;
      const g = canvas.getContext("2d"), W = canvas.width, H = canvas.height;
      g.drawImage(image, 0, 0, W, H);
      if (values[view]) {
        const valid = p.valid[view], shown = values[view].map((x, k) => valid[k] ? x : 0), top = Math.max(...shown, 1e-12);
        shown.forEach((x, k) => {
          if (!valid[k]) return;
          const [cx, cy, dx, dy] = spot(view, k), [r, gr, b] = colours(x / top);
          g.fillStyle = `rgba(${r},${gr},${b},${0.12 + 0.55 * x / top})`;  // the radiograph stays visible
          g.fillRect((cx - dx / 2) * W, (cy - dy / 2) * H, dx * W, dy * H);
        });
      }
      const mark = (index, colour, round, dash) => {
        const [cx, cy, dx, dy] = spot(view, index);
        g.strokeStyle = colour; g.lineWidth = Math.max(2, W / 160); g.setLineDash(dash ? [W / 60, W / 90] : []);
        g.beginPath();
        if (round) g.ellipse(cx * W, cy * H, dx * W * 0.7, dy * H * 0.7, 0, 0, 2 * Math.PI);
        else g.rect((cx - dx / 2) * W, (cy - dy / 2) * H, dx * W, dy * H);
        g.stroke();
      };
      if (view === state.side) mark(state.index, CHOSEN, false, false);
      else {
        const goal = largest(line(now.plan, state.side, state.index)), t = truth(state.side, state.index);
        mark(goal, GOAL, false, true);
        if (t >= 0) mark(t, RIGHT, true, false);
      }
    });
    drawMatrix(matrices.cost, p.cost, viridis, p.n, p.m);
    drawMatrix(matrices.plan, now.plan, inferno, p.n, p.m);
    say(other);
  }
  function drawMatrix(canvas, values, colours, n, m) {
    const scale = Math.max(1, Math.floor(360 / Math.max(n, m)));
    canvas.width = m * scale; canvas.height = n * scale;
    const g = canvas.getContext("2d"), image = g.createImageData(m * scale, n * scale);
    let top = 1e-12;
    for (const x of values) if (x > top) top = x;
    for (let y = 0; y < n * scale; y++) for (let x = 0; x < m * scale; x++) {
      const k = 4 * (y * m * scale + x), c = colours(values[Math.floor(y / scale) * m + Math.floor(x / scale)] / top);
      image.data[k] = c[0]; image.data[k + 1] = c[1]; image.data[k + 2] = c[2]; image.data[k + 3] = 255;
    }
    g.putImageData(image, 0, 0);
    g.strokeStyle = CHOSEN; g.lineWidth = Math.max(1, scale / 3);
    if (state.side === 0) g.strokeRect(0, state.index * scale, m * scale, scale);
    else g.strokeRect(state.index * scale, 0, scale, n * scale);
  }
  function place(view, index) {
    const width = pairs[state.pair].grids[view][1];
    return `row ${Math.floor(index / width) + 1}, column ${index % width + 1}`;
  }
  function say(other) {
    const p = pairs[state.pair], names = ["first", "second"], mass = (state.side === 0 ? now.a : now.b)[state.index];
    const row = line(now.plan, state.side, state.index), total = row.reduce((x, y) => x + y, 0), goal = largest(row);
    const t = truth(state.side, state.index), width = p.grids[other][1], count = p.valid[state.side].reduce((x, y) => x + y, 0);
    let text = `Position ${place(state.side, state.index)} of the ${names[state.side]} view: `;
    if (!p.valid[state.side][state.index]) text += "padding, it has no mass.";
    else {
      text += `${(mass * count).toFixed(2)} of an even share of the mass. `;
      if (total > 0) {
        text += `Most goes to ${place(other, goal)} of the ${names[other]} view (${(100 * row[goal] / total).toFixed(0)} %). `;
        if (t >= 0) {
          const close = row.reduce((sum, x, k) => sum + (near(k, t, width) ? x : 0), 0);
          text += `It truly lies at ${place(other, t)}; ${(100 * close / total).toFixed(0)} % of the mass goes to within one cell of it.`;
        } else text += "The other view does not show this place.";
      } else text += "None of it moves.";
    }
    out("text").textContent = text;
    const {known, right} = hits();
    let about = known ? `This plan: ${right} of ${known} positions that both views show are paired to within one cell of the true one.` : "The views share no position.";
    if (state.mode !== "stored") about += ` Computed in ${now.iterations} iterations` + (now.residual > 1e-4 ? "; not converged, take a larger epsilon." : ".");
    out("state").textContent = about;
    out("epsilon").textContent = state.epsilon.toPrecision(2);
  }
  function select(side, index) {
    const p = pairs[state.pair], count = side === 0 ? p.n : p.m;
    state.side = side; state.index = Math.min(Math.max(index, 0), count - 1);
    draw();
  }
  function update() { compute(); draw(); }

  const control = {pair: find("pair"), layer: find("layer"), epsilon: find("epsilon")};
  data.pairs.forEach((p, k) => control.pair.add(new Option(`${k + 1}: ${p.name}`, k)));
  const heads = Math.max(...pairs.map(p => p.heads.length));
  [["flow", "where the mass goes"], ["masses", "masses"], ["cost", "likeness, 2 - cost"],
    ...Array.from({length: heads}, (_, k) => [String(k), `cross-view attention, head ${k + 1}`])]
    .forEach(([value, name]) => control.layer.add(new Option(name, value)));
  const slide = e => (Math.log(e) - Math.log(low)) / (Math.log(high) - Math.log(low));
  control.epsilon.value = slide(state.epsilon);
  function middle() { const p = pairs[state.pair]; return Math.floor(p.grids[0][0] / 2) * p.grids[0][1] + Math.floor(p.grids[0][1] / 2); }
  control.pair.addEventListener("change", () => { state.pair = Number(control.pair.value); state.side = 0; state.index = middle(); update(); });
  control.layer.addEventListener("change", () => { state.layer = control.layer.value; draw(); });
  const radios = [...section.querySelectorAll('input[type="radio"]')];
  radios.forEach(radio => radio.addEventListener("change", () => { if (radio.checked) { state.mode = radio.value; update(); } }));
  let waiting = false;
  control.epsilon.addEventListener("input", () => {
    state.epsilon = Math.exp(Math.log(low) + Number(control.epsilon.value) * (Math.log(high) - Math.log(low)));
    if (state.mode === "stored") { state.mode = "learned"; radios.forEach(r => { r.checked = r.value === "learned"; }); }
    if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; update(); }); }
  });
  function under(canvas, event, h, w) {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width * w, (event.clientY - box.top) / box.height * h];
  }
  canvases.forEach((canvas, view) => {
    const point = event => {
      const p = pairs[state.pair], [h, w] = p.grids[view], [x, y] = under(canvas, event, h, w);
      // a cell is around the place that its position looks at
      const c = Math.min(Math.max(Math.floor(x - p.first + 0.5), 0), w - 1), r = Math.min(Math.max(Math.floor(y - p.first + 0.5), 0), h - 1);
      select(view, r * w + c);
    };
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("keydown", event => {
      const [h, w] = pairs[state.pair].grids[view];
      const steps = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -w, ArrowDown: w};
      if (!(event.key in steps)) return;
      event.preventDefault();
      const from = state.side === view ? state.index : Math.floor(h / 2) * w + Math.floor(w / 2), step = steps[event.key];
      const column = from % w + (Math.abs(step) === 1 ? step : 0), row = Math.floor(from / w) + (Math.abs(step) === 1 ? 0 : Math.sign(step));
      if (column >= 0 && column < w && row >= 0 && row < h) select(view, row * w + column);
    });
    canvas.addEventListener("focus", () => { if (state.side !== view) select(view, Math.floor(pairs[state.pair].grids[view][0] / 2) * pairs[state.pair].grids[view][1] + Math.floor(pairs[state.pair].grids[view][1] / 2)); });
  });
  Object.values(matrices).forEach(canvas => {
    const point = event => { const p = pairs[state.pair]; select(0, Math.floor(under(canvas, event, p.n, p.m)[1])); };
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
  });
  state.index = middle();
  update();
  section.explorer = {state, select, plan: () => Array.from(now.plan), masses: () => [Array.from(now.a), Array.from(now.b)], hits};
}
document.querySelectorAll(".explorer").forEach(start);
})();
