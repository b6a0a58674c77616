// Reads values off the charts and turns the examples' pages. Follows page_tokens.js in one script.

const { charts, examples } = JSON.parse($("records").textContent);
const svg = (tag, attributes) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};

// ---- curves

function valueText(value, decimals) {
  const text = decimals === null
    ? (value ? value.toExponential(2).replace("e+", "e") : "0")
    : value.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  return (/[1-9]/.test(text) ? text : text.replace("-", "")).replaceAll("-", "−");
}

// Index of the point nearest to x; null beyond the ends of the series.
function nearest({ x: all, winding }, x) {
  if (winding) {
    if (x < Math.min(...all) || x > Math.max(...all)) return null;
    return all.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(all[best] - x) ? i : best), 0);
  }
  if (!all.length || x < all[0] || x > all.at(-1)) return null;
  let [from, to] = [0, all.length - 1];
  while (to - from > 1) {
    const middle = (from + to) >> 1;
    if (all[middle] <= x) from = middle;
    else to = middle;
  }
  return x - all[from] < all[to] - x ? from : to;
}

const off = new Set();
for (const figure of document.querySelectorAll(".chart")) {
  const chart = charts[figure.dataset.chart];
  chart.figure = figure;
  chart.cross = figure.querySelector(".cross");
  chart.values = [...figure.querySelectorAll(".key b")];
  chart.last = chart.values.map((node) => node.textContent);
  for (const series of chart.series) series.winding = series.x.some((x, i) => i && x < series.x[i - 1]);
  chart.visible = () => chart.series.filter(({ slot }) => !off.has(slot));
  chart.xs = [...new Set(chart.series.flatMap((series) => series.x))].sort((a, b) => a - b);
}

function rest() {
  for (const chart of charts) {
    chart.cross.replaceChildren();
    chart.values.forEach((node, i) => { node.textContent = chart.last[i]; });
  }
}

// A place on the axis; of a histogram the ends of the bin around it.
function placeText(x, bin) {
  const text = (value) => Number(value.toPrecision(6)).toLocaleString("en", { maximumSignificantDigits: 6 });
  return bin === 1 ? text(x) : `${text(x - (bin - 1) / 2)}–${text(x + (bin - 1) / 2)}`;
}

// The charts over the same axis are read at the same place.
function readAt(pointed, x) {
  for (const chart of charts) {
    chart.cross.replaceChildren();
    const share = (value, [low, high]) => (value - low) / (high - low);
    const at = share(x, chart.x);
    const inside = chart.x_label === pointed.x_label && at >= -1e-9 && at <= 1 + 1e-9;
    const left = `${(100 * at).toFixed(2)}%`;
    if (inside) chart.cross.append(svg("line", { x1: left, x2: left, y1: 0, y2: "100%" }));
    chart.series.forEach((series, i) => {
      const point = inside ? nearest(series, x) : null;
      const y = point === null ? null : series.y[point];
      chart.values[i].textContent = !inside ? chart.last[i] : y === null ? "–" : valueText(y, chart.decimals);
      if (y === null || off.has(series.slot)) return;
      const dot = { cx: share(series.x[point], chart.x), cy: 1 - share(y, chart.y) };
      for (const key of ["cx", "cy"]) dot[key] = `${(100 * dot[key]).toFixed(2)}%`;
      chart.cross.append(svg("circle", { ...dot, r: 4, class: `s${series.slot % 6}` }));
    });
    if (!inside) continue;
    const label = svg("text", { x: left, y: "100%", dy: "1.6em" });
    label.textContent = placeText(x, chart.bin ?? 1);
    chart.cross.append(label);
  }
  pointed.at = x;
}

function snap(chart, x) {
  const all = { x: chart.xs };
  const point = nearest(all, Math.min(Math.max(x, chart.xs[0]), chart.xs.at(-1)));
  return point === null ? null : chart.xs[point];
}

for (const chart of charts) {
  const plot = chart.figure.querySelector(".plot");
  const follow = (event) => {
    const { left, width } = plot.getBoundingClientRect();
    const x = snap(chart, chart.x[0] + ((event.clientX - left) / width) * (chart.x[1] - chart.x[0]));
    if (x !== null) readAt(chart, x);
  };
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") rest(); });
  plot.addEventListener("focus", () => {
    if (plot.matches(":focus-visible") && chart.xs.length) readAt(chart, chart.at ?? chart.xs.at(-1));
  });
  plot.addEventListener("blur", rest);
  plot.addEventListener("keydown", (event) => {
    if (event.key === "Escape") rest();
    const here = chart.xs.indexOf(chart.at ?? chart.xs.at(-1));
    const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: chart.xs.length - 1 }[event.key];
    if (chart.xs[to] === undefined) return;
    event.preventDefault();
    readAt(chart, chart.xs[to]);
  });
}

// A series is put out and on in every chart at once.
for (const key of document.querySelectorAll(".key")) {
  key.addEventListener("click", () => {
    const slot = Number(key.dataset.slot);
    if (!off.delete(slot)) off.add(slot);
    for (const each of document.querySelectorAll(".key")) {
      if (each.dataset.slot === key.dataset.slot) each.setAttribute("aria-pressed", String(!off.has(slot)));
    }
    for (const { figure, series } of charts) {
      figure.querySelectorAll(".lines path").forEach((path, i) => path.classList.toggle("off", off.has(series[i].slot)));
    }
    rest();
  });
}

// ---- examples, one at a time; which one is in the address after the #, so that it can be linked to

const initial = { example: 1, q: "", tag: "", theme: "auto" };
const state = { ...initial };
let found = [];

for (const example of examples) {
  const said = example.responses.flatMap(({ name, text }) => [name, text]);
  example.words = [example.prompt, ...said].join("\n").toLowerCase();
}
const allTags = [...new Set(examples.flatMap(({ tags }) => tags))];
const allResponses = examples.flatMap((example) => example.responses);
setScale(allResponses);

function drawText(response) {
  const box = tokenBox(response.text);
  const { tokens } = response;
  const last = tokens.length - 1;
  // The text leaves out the end token.
  const end = last >= 0 && tokens[last] !== "" && tokens.slice(0, last).join("") === response.text ? last : -1;
  tokens.forEach((token, t) => box.append(drawToken(token, t, response.rewards[t], t === end)));
  if (!tokens.length) put(box, response.text);
  if (!tokens.length && !response.text) box.append(el("span", "note", "Nothing: the response is empty."));
  box.response = response;
  return box;
}

function drawResponse(response) {
  const label = el("div", "label", el("h3", "", response.name));
  for (const [name, value] of response.facts) label.append(el("span", "", `${name} `, el("b", "", value)));
  label.firstChild.dir = "auto";
  return el("section", "said", label, drawText(response), ...drawSources(response, drawText));
}

function drawExample(example) {
  const text = put(el("div"), example.prompt);
  text.dir = "auto";
  const prompt = el("div", "prompt", el("div", "turn", text));
  if (example.prompt.length + 60 * example.prompt.split("\n").length > 720) {
    const fold = el("button", "fold");
    fold.type = "button";
    const turn = (folded) => {
      prompt.classList.toggle("folded", folded);
      fold.setAttribute("aria-expanded", String(!folded));
      fold.textContent = folded ? "Show the whole prompt" : "Show less";
    };
    fold.addEventListener("click", () => turn(!prompt.classList.contains("folded")));
    turn(true);
    prompt.append(fold);
  }
  return el("article", "", prompt, el("div", "responses", ...example.responses.map(drawResponse)));
}

function describe(node) {
  const { tokens, rewards } = node.parentNode.response;
  const t = Number(node.dataset.t);
  const facts = [tipFact("token", `${t + 1} of ${tokens.length}`)];
  if (rewards.length) {
    const sum = rewards.slice(0, t + 1).reduce((a, b) => a + b, 0);
    facts.unshift(tipFact("reward", rewards[t] === null ? "none" : number(rewards[t])));
    facts.push(tipFact("sum so far", number(sum)));
  }
  return [el("code", "", JSON.stringify(tokens[t])), ...facts];
}

const themes = ["auto", "light", "dark"];

function readAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  state.q = address.get("q") ?? "";
  state.tag = allTags.includes(address.get("tag")) ? address.get("tag") : "";
  state.theme = themes.includes(address.get("theme")) ? address.get("theme") : "auto";
  state.example = Number(address.get("example")) || 1;
}

function apply() {
  if (state.theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = state.theme;
  $("theme").textContent = `Theme: ${state.theme}`;
  if (!examples.length) return;
  const wanted = state.q.trim().toLowerCase();
  found = examples.filter(({ words, tags }) => words.includes(wanted) && (!state.tag || tags.includes(state.tag)));
  state.example = Math.min(Math.max(1, Math.trunc(state.example)), Math.max(1, found.length));
  if ($("q").value !== state.q) $("q").value = state.q;
  $("tag").value = state.tag;
  const of = found.length === examples.length ? "" : ` (${examples.length.toLocaleString("en")} in all)`;
  $("count").textContent = found.length ? `${state.example} of ${found.length.toLocaleString("en")}${of}` : "";
  $("none").hidden = found.length > 0;
  $("previous").disabled = state.example <= 1;
  $("next").disabled = state.example >= found.length;
  $("shown").replaceChildren(...found.slice(state.example - 1, state.example).map(drawExample));
  $("tip").hidden = true;
}

function choose(change) {
  Object.assign(state, change);
  apply();
  const changed = Object.entries(state).filter(([key, value]) => value !== initial[key]);
  history.replaceState(null, "", "#" + new URLSearchParams(changed));
}

const turnPage = (step) => choose({ example: Math.min(found.length, Math.max(1, state.example + step)) });

if (examples.length) {
  let typing = 0;
  $("q").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => choose({ q: $("q").value, example: 1 }), 120);
  });
  if (allTags.length) {
    $("tag").append(new Option("All", ""), ...allTags.map((tag) => new Option(tag, tag)));
    $("tag").addEventListener("change", () => choose({ tag: $("tag").value, example: 1 }));
    $("tag").hidden = false;
  }
  $("tools").addEventListener("submit", (event) => event.preventDefault());
  $("previous").addEventListener("click", () => turnPage(-1));
  $("next").addEventListener("click", () => turnPage(1));
  $("examples").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const taken = event.defaultPrevented || event.target.closest("input, .tokens");
    if (!step || taken || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    turnPage(step);
  });
  followTokens($("shown"), describe);
  if (allResponses.some((response) => response.rewards.length)) drawScale();
  $("tools").hidden = false;
}
$("theme").hidden = false;
$("theme").addEventListener("click", () => choose({ theme: themes[(themes.indexOf(state.theme) + 1) % 3] }));
addEventListener("hashchange", () => { readAddress(); apply(); });

readAddress();
apply();
root.dataset.state = "drawn";
