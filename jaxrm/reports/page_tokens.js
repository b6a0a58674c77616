// What every page with colored tokens is made of. No string is ever parsed as HTML here.
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

const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

// ---- the color scale: symmetric about 0; its ends are the size that 98 % of the rewards stay within; each source of a
// sum has one of its own, since a source of large rewards would leave the others without color

let limit = 1;
const limits = new Map();
let digits = 2;
let clipped = false;
const strength = (reward) => Math.min(1, Math.abs(reward) / limit) ** 0.8;

const sizesOf = (rewards) => Float64Array.from(rewards.filter(Boolean), Math.abs).sort();
const limitOf = (sizes) => (sizes.length ? sizes[Math.floor(0.98 * (sizes.length - 1))] : 1);

function setScale(responses) {
  const sizes = sizesOf(responses.flatMap((response) => response.rewards));
  limit = limitOf(sizes);
  for (const name of new Set(responses.flatMap((response) => Object.keys(response.sources ?? {})))) {
    limits.set(name, limitOf(sizesOf(responses.flatMap((response) => response.sources?.[name]?.rewards ?? []))));
  }
  digits = Math.min(6, 2 + Math.max(0, Math.floor(-Math.log10(limit))));
  clipped = sizes.length > 0 && sizes[sizes.length - 1] > limit * 1.005;
}

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
  $("scale").setAttribute("aria-label", `Color of a token's reward: orange ${ends[0]}, none 0, blue ${ends[1]}`);
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

function tokenBox(text) {
  const box = el("div", "tokens");
  box.dir = "auto";
  if (/[\u0600-\u08ff\u0900-\u0dff\ufb50-\ufeff]/.test(text)) box.classList.add("joined");
  return box;
}

function drawToken(text, t, reward, isEnd) {
  const node = put(el("span", "t"), text, true);
  if (isEnd) node.classList.add("stop");
  else if (text === "") node.classList.add("part");
  paint(node, reward);
  node.dataset.t = t;
  node.tabIndex = t ? -1 : 0;
  return node;
}

// A row of tokens for each source of a sum of rewards, below that of the sum; `draw(response)` makes a row.

const sourcesOf = (response) => Object.entries(response.sources ?? {});

function drawSources(response, draw) {
  return sourcesOf(response).map(([name, { weight, reward, rewards }]) => {
    const value = el("span", "", "reward ", el("b", "", number(reward)));
    const label = el("div", "label", el("h4", "", name), value, el("span", "", "weight ", el("b", "", String(weight))));
    label.firstChild.dir = "auto";
    const ends = limit;
    limit = limits.get(name);
    label.append(el("span", "", "color to ±", el("b", "", number(limit).slice(1))));
    const row = el("div", "source", label, draw({ ...response, rewards, tags: null, diverges_at: null }));
    limit = ends;
    return row;
  });
}

// ---- what a token holds, shown on hover, focus and touch; `describe(node)` gives what the tip says

const tipFact = (name, value) => el("span", "", `${name} `, el("b", "", value));

function followTokens(list, describe) {
  const tip = $("tip");
  const token = (event) => event.target.closest?.(".tokens > .t");
  const hide = () => { tip.hidden = true; };
  const show = (node) => {
    tip.replaceChildren(...describe(node));
    tip.hidden = false;
    if (matchMedia("(max-width: 860px)").matches) {
      tip.removeAttribute("style");
      return;
    }
    const at = node.getClientRects()[0];
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
    tip.style.top = `${at.top > height + 70 ? at.top - height - 7 : at.bottom + 7}px`;
  };
  list.addEventListener("pointerover", (event) => (token(event) ? show(token(event)) : hide()));
  list.addEventListener("pointerleave", hide);
  list.addEventListener("click", (event) => token(event)?.focus());
  list.addEventListener("focusin", (event) => (token(event) ? show(token(event)) : hide()));
  list.addEventListener("focusout", hide);
  list.addEventListener("keydown", (event) => {
    const node = token(event);
    if (!node) return;
    const all = [...node.parentNode.querySelectorAll(".t")];
    const t = Number(node.dataset.t);
    const to = { ArrowRight: t + 1, ArrowLeft: t - 1, Home: 0, End: all.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (!all[to]) return;
    event.preventDefault();
    node.tabIndex = -1;
    all[to].tabIndex = 0;
    all[to].focus();
  });
  addEventListener("scroll", () => {
    const node = token({ target: document.activeElement });
    if (node) show(node);
    else hide();
  }, { passive: true });
}
