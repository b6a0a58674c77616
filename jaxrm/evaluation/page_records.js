// Draws scored records: the colour scale, tokens, corrections, prompts. No string is ever parsed as HTML here.
"use strict";

const root = document.documentElement;
const $ = (id) => document.getElementById(id);

function el(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== null));
  return node;
}

addEventListener("error", (event) => {
  root.dataset.error = event.message;
  document.body.prepend(el("p", "problem", `This page could not be drawn: ${event.message}`));
});
addEventListener("securitypolicyviolation", (event) => { root.dataset.blocked = event.violatedDirective; });

const { title, about, records } = JSON.parse($("records").textContent);
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const side = (record, name) => record.responses.find((response) => response.side === name);
const isScore = (record) => record.kind.startsWith("scalar");

records.forEach((record, index) => {
  const [chosen, rejected] = [side(record, "chosen"), side(record, "rejected")];
  const pair = chosen && rejected;
  record.index = index;
  record.outcome = !pair ? "single" : record.ranked_right === null ? "tie" : record.ranked_right ? "right" : "wrong";
  record.margin = pair ? chosen.sum - rejected.sum : null;
  record.length = record.responses.reduce((n, response) => n + response.tokens.length, 0);
});

// ---- the colour scale: symmetric about 0; its ends are the size that 98 % of the rewards stay within

const paid = records.flatMap((record) => record.responses.flatMap((response) => response.rewards.filter(Boolean)));
const sizes = Float64Array.from(paid, Math.abs).sort();
const limit = sizes.length ? sizes[Math.floor(0.98 * (sizes.length - 1))] : 1;
const digits = Math.min(6, 2 + Math.max(0, Math.floor(-Math.log10(limit))));
const clipped = sizes.length > 0 && sizes[sizes.length - 1] > limit * 1.005;
const strength = (reward) => Math.min(1, Math.abs(reward) / limit) ** 0.8;

function number(x) {
  const text = Math.abs(x).toFixed(digits);
  return (Number(text) === 0 ? "" : x < 0 ? "−" : "+") + text;
}

function paint(node, reward) {
  if (!reward) return;
  node.classList.add(reward > 0 ? "plus" : "minus");
  node.style.setProperty("--k", strength(reward).toFixed(3));
}

function drawScale() {
  const ramp = el("i");
  const stops = [];
  for (let x = -10; x <= 10; x++) {
    const share = (100 * strength((x / 10) * limit)).toFixed(1);
    stops.push(`color-mix(in srgb, var(--${x < 0 ? "minus" : "plus"}) ${share}%, transparent)`);
  }
  ramp.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  const ends = [-limit, limit].map((x) => (clipped ? (x < 0 ? "≤ " : "≥ ") : "") + number(x));
  $("scale").append(ramp, el("span", "", ends[0]), el("span", "", "0"), el("span", "", ends[1]));
  $("scale").setAttribute("aria-label", `Colour of a token's reward: orange ${ends[0]}, none 0, blue ${ends[1]}`);
}

// ---- tokens

// Controls, zero-width spaces and direction overrides are shown as what they are; so are, in tokens, line ends.
const odd = /[\u0000-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g;

function put(node, text, lineEnds = false) {
  let from = 0;
  for (const { 0: character, index } of text.matchAll(odd)) {
    if (index > from) node.append(text.slice(from, index));
    from = index + 1;
    const mark = lineEnds && { "\n": "↵", "\t": "⇥" }[character];
    if (mark) node.append(el("span", "mark", mark));
    if (character === "\n" || character === "\t") node.append(character);
    else node.append(el("span", "code", "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")));
  }
  if (from < text.length) node.append(text.slice(from));
  return node;
}

const joins = /[\u0600-\u08ff\u0900-\u0dff\ufb50-\ufeff]/;

function drawTokens(response) {
  const box = el("div", "tokens");
  box.dir = "auto";
  if (joins.test(response.text)) box.classList.add("joined");
  response.tokens.forEach((token, t) => {
    if (t === response.diverges_at) {
      const mark = el("span", "divergence");
      mark.title = "Diverges here: up to this mark the reward model would have written the same";
      box.append(mark);
    }
    const node = put(el("span", "t"), token, true);
    if (t === response.end) node.classList.add("stop");
    else if (token === "") node.classList.add("part");
    if (response.tags && !response.tags[t]) node.classList.add("missed");
    paint(node, response.rewards[t]);
    node.dataset.t = t;
    node.tabIndex = t ? -1 : 0;
    box.append(node);
  });
  if (!response.tokens.length) box.append(el("span", "note", "No tokens: the response is empty."));
  else if (!response.ended) box.append(el("span", "note", " … stops here without an end token"));
  box.response = response;
  return box;
}

function drawCorrection({ correction, tokens, ended }) {
  if (!correction) return null;
  const count = (signs) => correction.diff.reduce((n, [sign, run]) => n + (signs.includes(sign) ? run : 0), 0);
  const box = el("section", "correction");
  if (!count("+-") || !count("+=")) {
    const ending = correction.ended === ended ? "" : correction.ended ? ", and end it here" : ", without an end";
    box.classList.add("same");
    box.append(el("h4", "", `The reward model would ${count("+-") ? "write nothing" : `leave it as it is${ending}`}.`));
    return box;
  }
  const fresh = count("=") < 0.2 * Math.max(tokens.length, correction.tokens.length);
  box.append(el("h4", "", fresh ? "The reward model would write this instead" : "The reward model would write"));
  const text = el("div", "rewrite");
  text.dir = "auto";
  let [i, j] = [0, 0];
  for (const [sign, n] of correction.diff) {
    const run = sign === "-" ? tokens.slice(i, i + n) : correction.tokens.slice(j, j + n);
    if (sign !== "+") i += n;
    if (sign !== "-") j += n;
    // Where next to nothing is kept, the two texts woven into each other could not be read.
    if (fresh && sign === "-") continue;
    const node = sign === "-" ? el("del") : sign === "+" && !fresh ? el("ins") : el("span");
    text.append(put(node, run.join("")));
  }
  if (!correction.ended) text.append(el("span", "note", " … stops here without an end token"));
  box.append(text);
  return box;
}

// ---- records

const names = { chosen: "Chosen", rejected: "Rejected", response: "Response" };

function drawSide(record, response, alone) {
  const n = response.tokens.length;
  const at = response.diverges_at;
  const facts = [plural(n, "token")];
  if (!isScore(record)) facts.unshift(`mean ${number(response.mean)}`);
  if (response.tags && n) facts.push(at === null ? "never diverges" : `diverges at token ${at + 1}`);
  const sum = el("span", "sum", el("small", "", isScore(record) ? "score" : "sum"), number(response.sum));
  const name = el("h3", "", names[response.side] ?? response.side);
  const label = el("div", "label", name, sum, el("span", "facts", facts.join(" · ")));
  return el("section", `side ${alone ? "alone" : ""}`, label, drawTokens(response), drawCorrection(response));
}

function drawPrompt(prompt) {
  const box = el("div", "prompt");
  const size = prompt.reduce((n, { content }) => n + content.length + 60 * content.split("\n").length, 0);
  prompt.forEach(({ role, content }, i) => {
    const text = put(el("div"), content);
    text.dir = "auto";
    box.append(el("div", i + 1 < prompt.length ? "turn early" : "turn", el("b", "", role), text));
  });
  if (prompt.length > 3 || size > 520) {
    const fold = el("button", "fold");
    fold.type = "button";
    const turn = (folded) => {
      box.classList.toggle("folded", folded);
      fold.setAttribute("aria-expanded", String(!folded));
      const early = prompt.length > 1 ? `, ${plural(prompt.length - 1, "earlier turn")}` : "";
      fold.textContent = folded ? `Show the whole prompt${early}` : "Show less";
    };
    fold.addEventListener("click", () => turn(!box.classList.contains("folded")));
    turn(true);
    box.append(fold);
  }
  return box;
}

const verdicts = {
  wrong: "✕ Ranked wrong",
  right: "✓ Ranked right",
  tie: "= Not told apart",
  single: "Single response",
};

function drawRecord(record, shown) {
  const responses = record.responses.filter((response) => shown === "both" || response.side === shown);
  const alone = responses.length === 1;
  const head = el("h2", "head", el("span", "verdict", verdicts[record.outcome]));
  if (record.margin !== null) head.append(el("span", "", `chosen − rejected ${number(record.margin)}`));
  head.append(el("span", "origin", `${record.source} · ${record.kind}`));
  const sides = el("div", "sides", ...responses.map((response) => drawSide(record, response, alone)));
  const article = el("article", record.outcome, head, drawPrompt(record.prompt), sides);
  article.dataset.source = record.source;
  return article;
}
