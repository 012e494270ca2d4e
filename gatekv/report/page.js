"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value != null) node.setAttribute(name, value);
  node.append(...children);  // strings become text nodes: data never turns into markup
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS($("chart").namespaceURI, tag), attributes, children);
const number = (x, digits = 3) => x == null ? "–" : x.toFixed(digits).replace(/^(-?)0\./, "$1.");
const percent = x => (100 * x).toFixed(x < .0995 ? 1 : 0) + "\u00a0%";
const signed = x => (x > 0 ? "+" : "") + number(x);
const share = b => b == null ? "own threshold" : String(b).replace(/^0\./, ".");
const range = n => [...Array(n).keys()];
const unique = list => [...new Set(list)];
const options = (select, pairs) => select.replaceChildren(...pairs.map(([v, t]) => el("option", {value: v}, t)));

// -- theme and sections

function theme(name) {
  document.documentElement.style.colorScheme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `Switch to ${name === "dark" ? "light" : "dark"} colours`);
}
const wanted = new URLSearchParams(location.search).get("theme");
let current = wanted === "dark" || wanted === "light" ? wanted
  : matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
theme(current);
$("theme").onclick = () => theme(current = current === "dark" ? "light" : "dark");

function show(section, title) {
  $(section).hidden = false;
  document.querySelector("nav").append(el("a", {href: "#" + section}, title));
}

// -- scores

const MARKS = {
  o: "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z", s: "M-4,-4H4V4H-4z", D: "M0,-5.2L5.2,0L0,5.2L-5.2,0z",
  "^": "M0,-5L4.8,4H-4.8z", v: "M0,5L4.8,-4H-4.8z", P: "M-1.7,-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7z",
  X: "M-5,-2.5L-2.5,-5L0,-2.5L2.5,-5L5,-2.5L2.5,0L5,2.5L2.5,5L0,2.5L-2.5,5L-5,2.5L-2.5,0z",
};
const paint = look => `--c: light-dark(${look.color[0]}, ${look.color[1]})`;
const mark = (look, x, y) => svg("path", {d: MARKS[look.marker], transform: `translate(${x},${y})`,
  class: look.dash.length > 1 && look.kind !== "untrained" ? "hollow" : null, "stroke-width": 1.2});
const dashes = look => look.dash.map(d => d * look.width).join(" ");
function swatch(policy) {
  const look = data.styles[policy];
  const line = svg("path", {class: "path", d: "M0,7H34", "stroke-width": look.width, "stroke-dasharray": dashes(look)});
  return svg("svg", {class: "swatch series", style: paint(look), viewBox: "0 0 34 14", "aria-hidden": "true"}, line,
    mark(look, 17, 7));
}
const panels = unique(data.rows.map(r => r.task + ", " + r.mode));
const hidden = new Set();
let points = [], active = -1;
const value = r => r[r.measure];
const panelRows = () => data.rows.filter(r => r.task + ", " + r.mode === panels[$("panel").value]);

function describe(r) {
  const name = r.measure === "kl" ? "KL" : "score";
  const interval = `[${number(r.ci_low)}, ${number(r.ci_high)}]`;
  return [r.policy + (r.policy === "full" ? "" : " at " + share(r.budget)), `${name} ${number(value(r))}` +
    (r.measure === "kl" ? `, loss ${signed(r.score)} ${interval}` : ` ${interval}`),
    `${percent(r.bytes_ratio)} of the full cache's bytes, n = ${r.n}`];
}

function chart() {
  const width = Math.max(280, $("plot").clientWidth), height = Math.min(440, Math.max(290, width * .62));
  const left = 40, right = 14, top = 30, bottom = 44;
  const rows = panelRows().filter(r => value(r) != null), isScore = rows.every(r => r.measure === "score");
  const root = $("chart");
  $("bars").hidden = !isScore;
  root.setAttribute("viewBox", `0 0 ${width} ${height}`);
  root.style.height = height + "px";
  root.replaceChildren();
  points = []; active = -1; $("tip").replaceChildren();
  if (!rows.length) return;
  const low = Math.log2(Math.min(.5, ...rows.map(r => r.bytes_ratio)) / 1.2), high = Math.log2(1.15);
  const unit = isScore && rows.every(r => r.score >= 0 && r.score <= 1);
  const most = unit ? 1 : Math.max(...rows.map(value)) * 1.06 || 1, least = unit ? 0 : Math.min(0, ...rows.map(value));
  const X = v => left + (width - left - right) * (Math.log2(v) - low) / (high - low);
  const Y = v => height - bottom - (height - top - bottom) * (v - least) / (most - least);
  const step = [.01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 20, 50].find(s => (most - least) / s <= 6) || most - least;
  for (let i = Math.ceil(least / step); i * step <= most + 1e-9; i++) {
    root.append(svg("path", {class: "frame", d: `M${left},${Y(i * step)}H${width - right}`}),
      svg("text", {x: left - 6, y: Y(i * step) + 4, "text-anchor": "end"}, number(i * step, step < .1 ? 2 : 1)));
  }
  for (const t of [1, .5, .25, .125, .0625, .03125, .015625].filter(t => Math.log2(t) >= low)) {
    root.append(svg("path", {class: "frame", d: `M${X(t)},${height - bottom}v5`}),
      svg("text", {x: X(t), y: height - bottom + 18, "text-anchor": "middle"}, share(t)));
  }
  const label = unit ? "Share of answers right" : isScore ? "Score" : "KL to the full cache, nats a token (lower is better)";
  root.append(svg("text", {x: 2, y: 14}, label),
    svg("text", {x: (left + width) / 2, y: height - 6, "text-anchor": "middle"}, "bytes held / bytes of the full cache"));
  const full = rows.find(r => r.policy === "full");
  if (full) root.append(svg("path", {class: "series", style: paint(data.styles.full), "stroke-dasharray": "6 4",
    d: `M${left},${Y(value(full))}H${width - right}`}), svg("text", {x: left + 4, y: Y(value(full)) - 5}, "full cache"));
  for (const policy of Object.keys(data.styles).reverse()) {
    const look = data.styles[policy];
    const line = rows.filter(r => r.policy === policy).sort((p, q) => p.bytes_ratio - q.bytes_ratio);
    if (!line.length || hidden.has(policy)) continue;
    const group = svg("g", {class: "series", style: paint(look)});
    if (isScore && look.kind === "learned") group.append(svg("path", {class: "band", d: "M" +
      [...line.map(r => [X(r.bytes_ratio), Y(r.ci_low)]), ...line.map(r => [X(r.bytes_ratio), Y(r.ci_high)]).reverse()].join("L") + "z"}));
    if (isScore) for (const r of line) group.append(svg("path", {class: "bar", d: `M${X(r.bytes_ratio)},${Y(r.ci_low)}V${Y(r.ci_high)}`}));
    group.append(svg("path", {class: "path", d: "M" + line.map(r => [X(r.bytes_ratio), Y(value(r))]).join("L"),
      "stroke-width": look.width, "stroke-dasharray": dashes(look)}));
    for (const r of line) {
      group.append(mark(look, X(r.bytes_ratio), Y(value(r))));
      points.push({x: X(r.bytes_ratio), y: Y(value(r)), row: r});
    }
    root.append(group);
  }
  points.reverse();
  root.setAttribute("aria-label", `${label} against bytes held: ${unique(points.map(p => p.row.policy)).join(", ")}`);
}

function tip(i) {
  active = i;
  $("chart").querySelector("#ring")?.remove();
  $("tip").replaceChildren();
  if (i < 0) return;
  const {x, y, row} = points[i];
  $("chart").append(svg("circle", {id: "ring", cx: x, cy: y, r: 9, fill: "none", stroke: "currentColor"}));
  const same = points.filter(p => Math.hypot(p.x - x, p.y - y) < 3).length - 1;
  $("tip").append(...describe(row).map((line, k) => el("div", {}, k ? line : el("b", {}, line))));
  if (same) $("tip").append(el("div", {class: "soft"}, `and ${same} more here: arrow keys`));
  const box = $("tip"), room = $("plot").clientWidth;
  box.style.left = Math.max(0, Math.min(x + 14, room - box.offsetWidth)) + "px";
  box.style.top = (y > box.offsetHeight + 14 ? y - box.offsetHeight - 14 : y + 16) + "px";
}
function nearest(event) {
  const box = $("chart").getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  let best = -1, least = 28;
  points.forEach((p, i) => { const d = Math.hypot(p.x - x, p.y - y); if (d < least) [best, least] = [i, d]; });
  if (best !== active) tip(best);
}
$("chart").onpointermove = $("chart").onpointerdown = nearest;
$("chart").onpointerleave = event => event.pointerType === "mouse" && tip(-1);
$("chart").onkeydown = event => {
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
  if (event.key === "Escape") tip(-1);
  if (!step || !points.length) return;
  event.preventDefault();
  tip((active + step + points.length) % points.length);
};

function tables() {
  const rows = panelRows(), budgets = unique(rows.filter(r => r.policy !== "full").map(r => r.budget)).sort((p, q) => q - p);
  const kl = rows.some(r => r.measure === "kl"), full = rows.find(r => r.policy === "full");
  const best = b => { const v = rows.filter(r => r.budget === b && r.policy !== "full" && value(r) != null).map(value);
    return v.length ? (kl ? Math.min : Math.max)(...v) : null; };
  const cell = (policy, b) => {
    const r = rows.find(r => r.policy === policy && r.budget === b);
    if (!r) return el("td", {}, "");
    if (value(r) == null) return el("td", {title: r.refused}, el("small", {}, "refused"));
    return el("td", {class: value(r) === best(b) ? "best" : null}, number(value(r)),
      el("small", {}, kl ? percent(r.bytes_ratio) : `[${number(r.ci_low, 2)}, ${number(r.ci_high, 2)}]`));
  };
  const names = Object.keys(data.styles).filter(p => p !== "full" && rows.some(r => r.policy === p));
  const line = (p, ...cells) => el("tr", {}, el("th", {scope: "row"}, swatch(p), p), ...cells);
  $("pivot").replaceChildren(
    el("thead", {}, el("tr", {}, el("th", {scope: "col"}, kl ? "KL at budget" : "Score at budget"),
      ...budgets.map(b => el("th", {scope: "col"}, share(b))))),
    el("tbody", {}, ...(full ? [line("full", el("td", {colspan: budgets.length || 1}, number(value(full))))] : []),
      ...names.map(p => line(p, ...budgets.map(b => cell(p, b))))));
  $("pivotnote").textContent = "Bold: best of its column. Small: " + (kl ? "bytes held." : "95 % interval.");
  const pairs = data.comparisons.filter(c => c.task + ", " + c.mode === panels[$("panel").value]);
  $("pairs").replaceChildren(...pairs.map(c => el("p", {}, el("b", {}, `At ${share(c.budget)}: `),
    `${c.learned} ${number(c.learned_value)}, best training-free ${c.training_free} ${number(c.training_free_value)}, ` +
    `full cache ${number(c.full_value)}. Difference ${signed(c.difference)} [${signed(c.ci_low)}, ${signed(c.ci_high)}].`)));
  const heads = ["Policy", "Budget", "Bytes", "Bytes at the end", "Score", "95 % interval", "KL", "n", "Refused"];
  $("all").replaceChildren(el("thead", {}, el("tr", {}, ...heads.map(h => el("th", {scope: "col"}, h)))),
    el("tbody", {}, ...rows.map(r => el("tr", {}, el("th", {scope: "row"}, r.policy), ...[share(r.budget),
      number(r.bytes_ratio), number(r.bytes_ratio_end), number(r.score), r.score == null ? "–" :
      `[${number(r.ci_low)}, ${number(r.ci_high)}]`, number(r.kl), String(r.n ?? "–"), r.refused || ""].map(t => el("td", {}, t))))));
  const drawn = names.filter(p => rows.some(r => r.policy === p && value(r) != null));
  $("legend").replaceChildren(...drawn.map(p => {
    const button = el("button", {type: "button", "aria-pressed": String(!hidden.has(p))}, swatch(p), p);
    button.onclick = () => { hidden.has(p) ? hidden.delete(p) : hidden.add(p);
      button.setAttribute("aria-pressed", String(!hidden.has(p))); chart(); };
    return button;
  }));
}
if (data.rows.length) {
  show("scores", "Scores");
  options($("panel"), panels.map((p, i) => [i, p]));
  $("panel").onchange = () => { tables(); chart(); };
  tables();
  new ResizeObserver(chart).observe($("plot"));
}

// -- what is kept

function kept(maps) {
  const L = maps.layers, K = maps.heads, T = maps.tokens.length, cache = new Map(), rates = new Map();
  const name = m => m.policy + " at " + share(m.budget);
  const real = l => maps.layer_indices ? maps.layer_indices[l] : l;
  function bits(i) {  // Uint8Array of 0 and 1, [layers, heads, tokens], unpacked once
    if (!cache.has(i)) {
      const bytes = atob(maps.maps[i].keep), out = new Uint8Array(L * K * T);
      for (let j = 0; j < out.length; j++) out[j] = bytes.charCodeAt(j >> 3) >> (7 - (j & 7)) & 1;
      cache.set(i, out);
      rates.set(i, range(L * K).map(h => { let n = 0; for (let t = 0; t < T; t++) n += out[h * T + t]; return n / T; }));
    }
    return cache.get(i);
  }
  const spans = maps.tokens.map((text, t) => el("span", {}, text));
  const kindOf = maps.tokens.map(text => text === "" ? " split-char" : /^\s*\n\s*$/.test(text) ? " newline" : "");
  $("text").append(...spans);
  const groups = unique(maps.maps.map(m => m.policy));
  const choices = () => groups.map(p => el("optgroup", {label: p}, ...range(maps.maps.length)
    .filter(i => maps.maps[i].policy === p).map(i => el("option", {value: i}, name(maps.maps[i])))));
  $("a").append(...choices());
  $("b").append(el("option", {value: ""}, "nothing"), ...choices());
  $("b").value = "";
  options($("layer"), [["", "all"], ...range(L).map(l => [l, String(real(l))])]);
  options($("head"), [["", "all"], ...range(K).map(h => [h, String(h)])]);
  const cells = new Map(), table = $("grid");
  let cursor = "-1,-1", token = -1, counts = null;
  for (const l of range(L + 1).map(l => l - 1)) {
    table.append(el("tr", {role: "row"}, ...range(K + 1).map(h => {
      const at = `${l},${--h}`, head = l < 0 || h < 0;
      const text = l < 0 ? h < 0 ? "all" : "h" + h : h < 0 ? String(real(l)) : "";
      const role = !head ? "gridcell" : l < 0 ? "columnheader" : "rowheader";
      const cell = el(head ? "th" : "td", {role, tabindex: at === cursor ? 0 : -1, "data-at": at}, text);
      if (head) cell.setAttribute("aria-label", (l < 0 ? "all layers" : "layer " + real(l)) + (h < 0 ? ", all heads" : ", head " + h));
      cells.set(at, cell);
      return cell;
    })));
  }
  const choose = at => { const [l, h] = at.split(","); $("layer").value = l < 0 ? "" : l; $("head").value = h < 0 ? "" : h; draw(); };
  const move = at => { cells.get(cursor).tabIndex = -1; cells.get(cursor = at).tabIndex = 0; cells.get(at).focus(); };
  table.onclick = event => { const cell = event.target.closest("[data-at]"); if (cell) { move(cell.dataset.at); choose(cursor); } };
  table.onkeydown = event => {
    const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(cursor); }
    if (!step) return;
    event.preventDefault();
    const [l, h] = cursor.split(",").map(Number), to = `${l + step[0]},${h + step[1]}`;
    if (cells.has(to)) move(to);
  };

  // Small shares are the rule, so the steps between colours grow with the square: 1.6, 6, 14, 25, 39, 56, 77, 100 %.
  const level = (part, steps) => Math.min(steps, Math.ceil(steps * Math.sqrt(part) - 1e-9));
  const tone = net => Math.round(4 * Math.sqrt(Math.abs(net)));
  function classOf(onlyA, onlyB, both, n, compare) {
    if (!compare) return "q" + level((onlyA + both) / n, 8);
    const net = (onlyA - onlyB) / n, t = tone(net);
    return t ? (net > 0 ? "a" : "b") + t : "g" + level(both / n, 3);
  }
  function key(n, compare) {
    const chip = (c, text) => el("span", {class: c}, text), gap = () => el("span", {class: "gap"});
    const chips = compare ? n === 1
      ? [chip("a4", "only A"), gap(), chip("b4", "only B"), gap(), chip("g3", "both"), gap(), chip("g0", "neither")]
      : ["only A", chip("a4", "more"), chip("a3", "\u00a0"), chip("a2", "\u00a0"), chip("a1", "few heads"), gap(), chip("g0", "neither"),
        chip("g1", "\u00a0"), chip("g2", "\u00a0"), chip("g3", "both alike"), gap(), chip("b1", "few heads"), chip("b2", "\u00a0"),
        chip("b3", "\u00a0"), chip("b4", "more"), "only B"]
      : n === 1 ? [chip("q8", "kept"), gap(), chip("q0", "dropped")]
      : ["heads that keep a token: ", chip("q0", "none"), ...range(8).map(i => chip("q" + (i + 1), `≤ ${Math.round(100 * ((i + 1) / 8) ** 2)} %`))];
    $("key").replaceChildren(...chips);
    $("key").setAttribute("aria-label", "Colours: " + $("key").textContent);
  }
  function draw() {
    const a = Number($("a").value), compare = $("b").value !== "", b = compare ? Number($("b").value) : a;
    const A = bits(a), B = bits(b), layer = $("layer").value, head = $("head").value;
    const layers = layer === "" ? range(L) : [Number(layer)], heads = head === "" ? range(K) : [Number(head)];
    const places = layers.flatMap(l => heads.map(h => (l * K + h) * T)), n = places.length, sum = [0, 0, 0];
    counts = maps.tokens.map((_, t) => {
      let onlyA = 0, onlyB = 0, both = 0;
      for (const p of places) { const x = A[p + t], y = B[p + t]; both += x & y; onlyA += x & ~y; onlyB += y & ~x; }
      sum[0] += onlyA; sum[1] += onlyB; sum[2] += both;
      return [onlyA, onlyB, both];
    });
    spans.forEach((span, t) => { span.className = classOf(...counts[t], n, compare) + kindOf[t]; });
    const part = x => percent(x / (n * T)), where = n === 1 ? `Layer ${real(layer)}, head ${head}` : `${n} heads`;
    $("summary").textContent = compare
      ? `${where}: only A (${name(maps.maps[a])}) keeps ${part(sum[0])}, only B (${name(maps.maps[b])}) ${part(sum[1])}, ` +
        `both ${part(sum[2])}, neither ${part(n * T - sum[0] - sum[1] - sum[2])} of ${T} tokens.`
      : `${where}: ${name(maps.maps[a])} keeps ${part(sum[2])} of ${T} tokens. Bytes of the whole cache: ${percent(maps.maps[a].ratio)}.`;
    key(n, compare);
    $("swap").disabled = !compare;
    $("gridtitle").textContent = compare ? "A minus B, % of tokens" : "Kept per layer and head, %";
    const rate = rates.get(a), other = rates.get(b);
    for (const [at, cell] of cells) {
      const [l, h] = at.split(",").map(Number);
      const on = (layer === "" ? -1 : Number(layer)) === l && (head === "" ? -1 : Number(head)) === h;
      cell.classList.toggle("on", on);
      cell.setAttribute("aria-selected", String(on));
      if (l < 0 || h < 0) continue;
      const r = rate[l * K + h], d = r - other[l * K + h];
      cell.className = (compare ? tone(d) ? (d > 0 ? "a" : "b") + tone(d) : "g0" : "q" + level(r, 8)) + (on ? " on" : "");
      cell.textContent = compare ? (d > 0 ? "+" : "") + Math.round(100 * d) : String(Math.round(100 * r));
      cell.setAttribute("aria-label", `layer ${real(l)}, head ${h}: ${cell.textContent} %`);
    }
    tell(token);
  }
  function tell(t) {
    spans[token]?.removeAttribute("id");
    token = t;
    if (t < 0) { $("token").textContent = "Point at a token, or focus the text and use the arrow keys."; return; }
    spans[t].id = "here";
    $("text").setAttribute("aria-activedescendant", "here");
    const [onlyA, onlyB, both] = counts[t], compare = $("b").value !== "";
    const shown = maps.tokens[t] === "" ? "part of the next character" : JSON.stringify(maps.tokens[t]);
    $("token").textContent = `Token ${t}, ${shown}: ` + (compare ? `only A ${onlyA}, only B ${onlyB}, both ${both} heads`
      : `kept by ${both} of ${($("layer").value === "" ? L : 1) * ($("head").value === "" ? K : 1)} heads`);
  }
  const place = new Map(spans.map((span, t) => [span, t]));
  $("text").onpointerover = $("text").onpointerdown = event => { if (place.has(event.target)) tell(place.get(event.target)); };
  $("text").onkeydown = event => {
    const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10}[event.key];
    if (!step) return;
    event.preventDefault();
    tell(Math.max(0, Math.min(T - 1, token + step)));
    spans[token].scrollIntoView({block: "nearest"});
  };
  for (const id of ["a", "b", "layer", "head"]) $(id).onchange = draw;
  $("swap").onclick = () => { [$("a").value, $("b").value] = [$("b").value, $("a").value]; draw(); };
  $("refused").textContent = data.refused.map(r => `${name(r)} refused: ${r.refused}`).join(" ");
  draw();
}
if (data.maps) { show("tokens", "What is kept"); kept(data.maps); }

// -- needle maps and provenance

if (data.needles.length) {
  show("needle", "Needle maps");
  $("needlekey").append(...range(9).map(i => el("span", {class: "q" + i}, number(i / 8, 2))));
  const deep = d => d <= 1 ? Math.round(100 * d) + " %" : String(d);
  $("needles").append(...data.needles.map(m => el("div", {class: "scroll"}, el("table", {},
    el("caption", {}, (m.policy === "full" ? m.policy : `${m.policy} at ${share(m.budget)}`) + `, ${m.mode}`),
    el("thead", {}, el("tr", {}, el("th", {scope: "col"}, "depth"), ...m.lengths.map(n => el("th", {scope: "col"}, String(n))))),
    el("tbody", {}, ...m.scores.map((line, i) => el("tr", {}, el("th", {scope: "row"}, deep(m.depths[i])),
      ...line.map(s => el("td", {class: s == null ? null : "q" + Math.round(8 * s)}, number(s, 2))))))))));
}
const facts = [], add = (prefix, run) => { for (const [k, v] of Object.entries(run || {})) facts.push([prefix + k,
  v && typeof v === "object" ? Object.entries(v).map(([p, q]) => `${p} ${q}`).join(", ") : String(v)]); };
add("", data.run);
add("keep map: ", data.maps && data.maps.run);
if (facts.length) { show("origin", "Provenance"); $("run").append(...facts.flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, v)])); }
