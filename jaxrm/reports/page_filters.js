// What is shown and in which order, what a token holds, and the start. Follows page_records.js in one script.

// ---- filters; the whole state is in the address after the #, so that a view can be linked to

const initial = { show: "all", side: "both", order: "wrong", q: "", theme: "auto" };
const options = {
  show: [["all", "All"], ["wrong", "Wrong"], ["right", "Right"], ["tie", "Ties"], ["single", "Single"]],
  side: [["both", "Both sides"], ["chosen", "Chosen"], ["rejected", "Rejected"]],
  order: [["wrong"], ["file"], ["margin"], ["long"]],
  theme: [["auto", "Auto"], ["light", "Light"], ["dark", "Dark"]],
};
let state = { ...initial };
let found = [];
let drawn = 0;

function readAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  state = { ...initial };
  for (const theme of ["light", "dark"]) if (address.has(theme)) state.theme = theme;
  for (const [key, value] of address) {
    if (key === "q" || options[key]?.some(([name]) => name === value)) state[key] = value;
  }
}

function writeAddress() {
  const changed = Object.entries(state).filter(([key, value]) => value !== initial[key]);
  history.replaceState(null, "", "#" + new URLSearchParams(changed));
}

function words(record) {
  const written = record.responses.flatMap((response) => [response.text, response.correction?.text ?? ""]);
  record.words ??= [record.source, ...record.prompt.map((turn) => turn.content), ...written].join("\n").toLowerCase();
  return record.words;
}

const rank = { wrong: 0, tie: 1, right: 2, single: 3 };
const orders = {
  wrong: (a, b) => rank[a.outcome] - rank[b.outcome] || (a.margin ?? 0) - (b.margin ?? 0),
  file: () => 0,
  margin: (a, b) => Math.abs(b.margin ?? 0) - Math.abs(a.margin ?? 0),
  long: (a, b) => b.length - a.length,
};

function apply() {
  const wanted = state.q.trim().toLowerCase();
  found = records.filter((record) =>
    (state.show === "all" || record.outcome === state.show) &&
    (state.side === "both" || side(record, state.side)) &&
    (!wanted || words(record).includes(wanted)));
  found.sort((a, b) => orders[state.order](a, b) || a.index - b.index);
  if (state.theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = state.theme;
  for (const key of ["show", "side"]) {
    for (const input of $(key).querySelectorAll("input")) input.checked = input.value === state[key];
  }
  if ($("q").value !== state.q) $("q").value = state.q;
  $("order").value = state.order;
  const [, theme] = options.theme.find(([name]) => name === state.theme);
  $("theme").textContent = `Theme: ${theme.toLowerCase()}`;
  const of = found.length === records.length ? "" : `${found.length.toLocaleString("en")} of `;
  $("count").textContent = of + plural(records.length, "record");
  $("none").hidden = found.length > 0;
  $("list").replaceChildren();
  $("tip").hidden = true;
  drawn = 0;
  drawMore();
}

// A long list is drawn a few records at a time, as its end comes into view.
function drawMore() {
  const next = found.slice(drawn, drawn + 10);
  $("list").append(...next.map((record) => drawRecord(record, state.side)));
  drawn += next.length;
  $("more").hidden = drawn >= found.length;
}

function choose(change) {
  state = { ...state, ...change };
  writeAddress();
  apply();
}

function drawTop() {
  const counts = { all: records.length };
  for (const { outcome } of records) counts[outcome] = (counts[outcome] ?? 0) + 1;
  const pairs = records.length - (counts.single ?? 0);
  $("title").textContent = title;
  $("about").append(...about.map(([name, value]) => el("div", "", el("dt", "", name), el("dd", "", value))));
  if (pairs) {
    const meter = el("div", "meter");
    for (const outcome of ["right", "tie", "wrong"]) {
      if (!counts[outcome]) continue;
      const part = el("i", outcome);
      part.style.flex = `${counts[outcome]} 0 0`;
      meter.append(part);
    }
    const share = (100 * ((counts.right ?? 0) + 0.5 * (counts.tie ?? 0))) / pairs;
    const line = el("p", "", el("b", "", `${share.toFixed(1)} %`), ` of ${plural(pairs, "pair")} ranked right: `);
    line.append(`${counts.right ?? 0} right, ${counts.wrong ?? 0} wrong`);
    if (counts.tie) line.append(`, ${plural(counts.tie, "tie")} counted half`);
    $("outcome").append(meter, line);
  }
  for (const key of ["show", "side"]) {
    for (const [value, name] of options[key]) {
      const input = el("input");
      Object.assign(input, { type: "radio", name: key, value });
      const text = el("span", "", name);
      if (key === "show") {
        if (value !== "all" && !counts[value] && ["tie", "single"].includes(value)) continue;
        input.disabled = !counts[value];
        text.append(el("small", "", String(counts[value] ?? 0)));
      }
      input.addEventListener("change", () => choose({ [key]: value }));
      $(key).append(el("label", "", input, text));
    }
  }
  const sample = (reward, missed, text) => {
    const node = el("span", `t sample ${missed ? "missed" : ""}`, text);
    paint(node, reward);
    return node;
  };
  const entry = (node, text) => el("li", "", node, text);
  const tagged = records.some((record) => record.responses.some((response) => response.tags));
  $("legend").append(
    entry(sample(limit * 0.8, false, "paid"), "reward above 0"),
    entry(sample(-limit * 0.8, false, "charged"), "reward below 0"));
  if (tagged) {
    $("legend").append(
      entry(sample(0, true, "token"), "the model's first choice was another token"),
      entry(el("span", "divergence sample"), "where the response diverges"));
  }
  if (records.some((record) => record.responses.some((response) => response.correction))) {
    $("legend").append(el("li", "", el("ins", "", "put in"), " ", el("del", "", "taken out"), " by the correction"));
  }
  if (!pairs) $("side").hidden = true;
  drawScale();
}

// ---- what the tip of a token says

function describe(node) {
  const { response } = node.parentNode;
  const t = Number(node.dataset.t);
  const sum = response.rewards.slice(0, t + 1).reduce((a, b) => a + b, 0);
  return [
    el("code", "", JSON.stringify(response.tokens[t])),
    tipFact("reward", number(response.rewards[t])),
    ...(response.tags ? [tipFact("tag", response.tags[t] ? "+" : "−")] : []),
    tipFact("id", String(response.token_ids[t])),
    tipFact("token", `${t + 1} of ${response.tokens.length}`),
    tipFact("sum so far", number(sum)),
  ];
}

// ---- start

let typing = 0;
$("q").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => choose({ q: $("q").value }), 150);
});
$("bar").addEventListener("submit", (event) => event.preventDefault());
$("order").addEventListener("change", () => choose({ order: $("order").value }));
$("theme").addEventListener("click", () => {
  const themes = options.theme.map(([name]) => name);
  choose({ theme: themes[(themes.indexOf(state.theme) + 1) % themes.length] });
});
$("more").addEventListener("click", drawMore);
const nearEnd = (entries) => { if (entries.some((entry) => entry.isIntersecting)) drawMore(); };
new IntersectionObserver(nearEnd, { rootMargin: "800px" }).observe($("more"));
addEventListener("hashchange", () => { readAddress(); apply(); });
followTokens($("list"), describe);

drawTop();
readAddress();
apply();
root.dataset.state = "drawn";
