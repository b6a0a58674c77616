// Draws scored records: their tokens, corrections and prompts. Follows page_tokens.js in one script.

const { title, about, records } = JSON.parse($("records").textContent);
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

setScale(records.flatMap((record) => record.responses));

// ---- tokens

function drawTokens(response) {
  const box = tokenBox(response.text);
  response.tokens.forEach((token, t) => {
    if (t === response.diverges_at) {
      const mark = el("span", "divergence");
      mark.title = "Diverges here: up to this mark the reward model would have written the same";
      box.append(mark);
    }
    const node = drawToken(token, t, response.rewards[t], t === response.end);
    if (response.tags && !response.tags[t]) node.classList.add("missed");
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
  return el("section", `side ${alone ? "alone" : ""}`, label, drawTokens(response), ...drawSources(response, drawTokens), drawCorrection(response));
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
