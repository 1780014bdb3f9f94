"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const WORDS = {
  en: {
    language: "中文", download: "Download", again: "Start over", prompt: "Prompt",
    left: "Left is better", right: "Right is better", tie: "Tie", skip: "Skip", next: "Next",
    previous: "Previous", tied: "ties with the last", undo: "Undo", best: "best", worst: "worst",
    unranked: "not ranked yet", empty: "(empty answer)", answer: "Answer", score: "Score",
    user: "User", assistant: "Assistant", system: "System", skipped: "skipped",
    rankHelp: "Press the letters from best to worst, or drag them; drop one on another for a tie.",
    pairHelp: "Which answer is better?",
    scoreHelp: "Press a number to score the marked answer, arrows to mark another.",
    count: (at, all, done, skipped) =>
      `${at} of ${all} · ${done} judged${skipped ? ` · ${skipped} skipped` : ""}`,
    done: "Everything is judged. Download the file and you are done.",
    sure: "Forget everything judged on this page?",
    unkept: "This browser keeps no progress for this page: download before you close it.",
  },
  zh: {
    language: "English", download: "下载", again: "重新开始", prompt: "提示",
    left: "左边更好", right: "右边更好", tie: "一样好", skip: "跳过", next: "下一题",
    previous: "上一题", tied: "与上一个并列", undo: "撤销", best: "最好", worst: "最差",
    unranked: "未排序", empty: "（空回答）", answer: "回答", score: "打分",
    user: "用户", assistant: "助手", system: "系统", skipped: "已跳过",
    rankHelp: "从最好到最差依次按字母键，或拖动字母；放到另一个字母上表示并列。",
    pairHelp: "哪个回答更好？",
    scoreHelp: "按数字键给选中的回答打分，用方向键选择其他回答。",
    count: (at, all, done, skipped) =>
      `第 ${at} / ${all} 题 · 已评 ${done}${skipped ? ` · 跳过 ${skipped}` : ""}`,
    done: "全部完成，请下载结果文件。",
    sure: "清除本页的全部评判？",
    unkept: "此浏览器不保存本页进度：关闭前请先下载。",
  },
};

// ---------------------------------------------------------------- what was judged, kept by content

const KEY = "rlhf_jax:" + data.hash;
let state = { at: 0, answers: {} }, language, tying = false, active = 0, kept = true;

function stored(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(key);
    localStorage.setItem(key, value);
  } catch (error) {
    kept = false;  // blocked or full: the page says so and works on
  }
  return null;
}

const item = () => data.items[state.at];
const isPair = (at) => !data.scale && data.items[at].responses.length === 2;
const answer = () => state.answers[state.at] || {};
const isDone = (at) => {
  const given = state.answers[at] || {}, size = data.items[at].responses.length;
  if (data.scale) return !given.skip && (given.scores || []).filter(Boolean).length === size;
  return !given.skip && (given.tiers || []).flat().length === size;
};
const isOpen = (at) => !isDone(at) && !(state.answers[at] || {}).skip;

function give(value) {
  state.answers[state.at] = value;
  draw();
}

function go(at) {
  state.at = Math.min(Math.max(at, 0), data.items.length - 1);
  tying = false;
  active = 0;
  draw();
  scrollTo(0, 0);
}

/** To the next item that has no judgement yet, going round; stays where there is none. */
function advance() {
  const size = data.items.length;
  for (let step = 1; step <= size; step++) {
    if (isOpen((state.at + step) % size)) return go((state.at + step) % size);
  }
  draw();
}

function choose(tiers) {
  give({ tiers });
  advance();
}

function skip() {
  give({ skip: true });
  advance();
}

/** Response i goes to {gap: n} (before the n-th tier), {tier: n} (a tie with it) or {} (unranked). */
function place(i, { gap, tier }) {
  const tiers = (answer().tiers || []).map((tied) => tied.filter((j) => j !== i));
  if (tier !== undefined) tiers[tier].push(i);
  if (gap !== undefined) tiers.splice(gap, 0, [i]);
  tying = false;
  give({ tiers: tiers.filter((tied) => tied.length) });
}

function append(i) {
  const tiers = answer().tiers || [];
  if (i >= item().responses.length || tiers.flat().includes(i)) return;
  place(i, tying && tiers.length ? { tier: tiers.length - 1 } : { gap: tiers.length });
}

function score(i, value) {
  const scores = answer().scores || item().responses.map(() => null);
  active = Math.min(i + 1, scores.length - 1);
  give({ scores: scores.map((old, j) => (j === i ? value : old)) });
}

// --------------------------------------------------------------------------------- the downloaded file

/** One line of the file: texts in the order of the input, whatever order was shown. */
function record(at) {
  const { prompt, responses, order } = data.items[at], given = state.answers[at];
  const tier = (i) => given.tiers.findIndex((tied) => tied.includes(i));
  if (data.kind === "judge") {
    const verdict = given.tiers.length === 1 ? "tie" : given.tiers[0][0] === 0 ? "left" : "right";
    return { page: data.hash, item: at, verdict };
  }
  if (isPair(at) && given.tiers.length === 2) {
    const [[best], [worst]] = given.tiers;
    return { prompt, chosen: responses[best], rejected: responses[worst] };
  }
  const undo = (value) => {
    const there = [];
    order.forEach((original, shown) => (there[original] = value(shown)));
    return there;
  };
  const judged = data.scale ? { scores: undo((i) => given.scores[i]) } : { ranks: undo(tier) };
  return { prompt, responses: undo((i) => responses[i]), ...judged };
}

function download() {
  const lines = data.items.map((_, at) => at).filter(isDone).map((at) => JSON.stringify(record(at)));
  const url = URL.createObjectURL(new Blob(lines.map((line) => line + "\n")));
  make("a", { href: url, download: data.file }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

// ------------------------------------------------------------------------------------------ drawing

/** An element. Text only ever enters as text nodes. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") element.onclick = value;
    else if (value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const word = (name) => WORDS[language][name];
const letter = (i) => String.fromCharCode(65 + i);

function button(name, key, onclick, more = {}) {
  const keys = key ? [make("kbd", {}, key)] : [];
  return make("button", { id: name, onclick, ...more }, word(name), ...keys);
}

function text(value) {
  const shown = value.trim() ? { class: "text" } : { class: "text empty" };
  return make("div", { ...shown, dir: "auto" }, value.trim() ? value : word("empty"));
}

function asked(prompt) {
  if (typeof prompt === "string") return [text(prompt)];
  return prompt.map(({ role, content }) =>
    make("div", { class: "turn" }, make("b", {}, word(role) || role), text(content)));
}

function chip(i) {
  const element = make("span", { class: "chip", "data-response": i }, letter(i));
  element.addEventListener("pointerdown", (event) => drag(event, element, i));
  return element;
}

/** A chip follows the pointer and lands on what is below it; a mere click ranks or unranks it. */
function drag(start, element, i) {
  const target = (event) => {
    const below = document.elementFromPoint(event.clientX, event.clientY);
    return below && below.closest("[data-gap], [data-tier], .pool");
  };
  let moved = false, over = null;
  const light = (next) => {
    if (over) over.classList.remove("over");
    if (next) next.classList.add("over");
    over = next;
  };
  const move = (event) => {
    const x = event.clientX - start.clientX, y = event.clientY - start.clientY;
    moved = moved || Math.hypot(x, y) > 5;
    element.classList.toggle("held", moved);
    if (moved) element.style.transform = `translate(${x}px, ${y}px)`;
    light(moved ? target(event) : null);
  };
  const stop = (event) => {
    for (const [name, listener] of listeners) removeEventListener(name, listener);
    const placed = (answer().tiers || []).flat().includes(i);
    if (event.type === "pointercancel") return draw();
    if (!moved) return placed ? place(i, {}) : append(i);
    if (!over) return draw();
    const { gap, tier } = over.dataset;
    place(i, gap !== undefined ? { gap: +gap } : tier !== undefined ? { tier: +tier } : {});
  };
  const listeners = [["pointermove", move], ["pointerup", stop], ["pointercancel", stop]];
  for (const [name, listener] of listeners) addEventListener(name, listener);
  start.preventDefault();
}

function card(response, i) {
  const { tiers = [], scores = [] } = answer(), ranked = !data.scale && !isPair(state.at);
  const best = !data.scale && (tiers[0] || []).includes(i);
  const head = [ranked ? chip(i) : isPair(state.at) ? "←→"[i] : `${word("answer")} ${letter(i)}`];
  if (data.scale) {
    const points = Array.from({ length: data.scale }, (_, n) => n + 1);
    head.push(make("div", { class: "scale" }, ...points.map((value) => make("button", {
      class: scores[i] === value ? "on" : "", "data-response": i, "data-score": value,
      onclick: () => score(i, value) }, value))));
  }
  const tier = ranked ? tiers.findIndex((tied) => tied.includes(i)) : -1;
  if (tier >= 0) head.push(make("span", {}, `#${tier + 1}`));
  const marks = [best && "best", data.scale && i === active && "active"].filter(Boolean);
  return make("article", { class: marks.join(" ") }, make("h4", {}, ...head), text(response));
}

function rankingRow() {
  const tiers = answer().tiers || [], placed = tiers.flat();
  const gap = (at, label, wide) =>
    make("span", { class: wide ? "gap wide" : "gap", "data-gap": at }, label);
  const chain = tiers.flatMap((tied, at) => [
    at ? gap(at, "›") : gap(0, word("best"), true),
    make("span", { class: "tier", "data-tier": at }, ...tied.flatMap((i, n) => n ? ["=", chip(i)] : [chip(i)])),
  ]);
  if (!tiers.length) chain.push(gap(0, word("best"), true));
  const pool = item().responses.map((_, i) => i).filter((i) => !placed.includes(i));
  return make("div", { class: "row" },
    make("div", { class: "ranking" }, ...chain, gap(tiers.length, word("worst"), true)),
    make("div", { class: "pool", title: word("unranked") }, ...pool.map(chip)),
    button("tied", "T", () => { tying = !tying; draw(); }, { class: tying ? "on" : "" }),
    button("undo", "⌫", undo));
}

function undo() {
  const last = (answer().tiers || []).flat().pop();
  if (last !== undefined) place(last, {});
}

function verdictRow() {
  const { tiers } = answer(), chosen = tiers && JSON.stringify(tiers);
  const one = (name, key, value) => button(name, key, () => choose(value),
    { class: chosen === JSON.stringify(value) ? "on" : "" });
  return make("div", { class: "row" }, one("left", "←", [[0], [1]]), one("tie", "↓", [[0, 1]]),
    one("right", "→", [[1], [0]]));
}

function controls() {
  const pair = isPair(state.at), help = pair ? "pairHelp" : data.scale ? "scoreHelp" : "rankHelp";
  const rows = pair ? [verdictRow()] : data.scale ? [] : [rankingRow()];
  const complete = !isOpen(state.at) && !pair;
  return [...rows, make("div", { class: "row" },
    button("previous", "P", () => go(state.at - 1), { disabled: state.at === 0 && "" }),
    make("small", { class: "push" }, word(help)),
    button("skip", "S", skip, { class: answer().skip ? "on" : "" }),
    button("next", pair ? "N" : "⏎", pair ? () => go(state.at + 1) : advance,
      { class: complete ? "main" : "" }))];
}

function draw() {
  stored(KEY, JSON.stringify(state));
  const all = data.items.length, indices = [...data.items.keys()];
  const done = indices.filter(isDone).length;
  const skipped = indices.filter((at) => (state.answers[at] || {}).skip).length;
  const find = (id) => document.getElementById(id);
  document.documentElement.lang = language;
  find("count").textContent = word("count")(state.at + 1, all, done, skipped);
  find("notice").textContent = kept ? "" : word("unkept");
  const [solid, pale] = find("progress").children;
  solid.style.width = `${(100 * done) / all}%`;
  pale.style.width = `${(100 * skipped) / all}%`;
  for (const id of ["language", "download", "again"]) find(id).textContent = word(id);
  find("download").className = done + skipped === all ? "main" : "";
  find("download").disabled = done === 0;
  const end = done + skipped === all ? [make("p", { class: "done card" }, word("done"))] : [];
  document.querySelector("main").replaceChildren(...end,
    make("article", { class: "asked" }, make("h4", {}, word("prompt")), ...asked(item().prompt)),
    make("div", { class: item().responses.length % 2 ? "cards" : "cards two" }, ...item().responses.map(card)));
  document.querySelector("footer").replaceChildren(...controls());
}

// ------------------------------------------------------------------------------------------ keys

/** By place on the keyboard, so that an input method for Chinese does not swallow letters. */
function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const code = event.code.replace(/^(Key|Digit|Numpad)(?=.$|Enter)/, "");
  const pair = isPair(state.at), size = item().responses.length;
  const number = /^\d$/.test(code) ? +code || 10 : 0;
  const which = /^[A-I]$/.test(code) ? code.charCodeAt(0) - 65 : number - 1;
  const move = (step) => { active = Math.min(Math.max(active + step, 0), size - 1); draw(); };
  const common = { N: () => go(state.at + 1), P: () => go(state.at - 1), S: skip, Enter: advance };
  const keys = pair
    ? { ArrowLeft: () => choose([[0], [1]]), ArrowRight: () => choose([[1], [0]]),
        ArrowDown: () => choose([[0, 1]]), T: () => choose([[0, 1]]), Equal: () => choose([[0, 1]]) }
    : data.scale
      ? { ArrowDown: () => move(1), ArrowRight: () => move(1), ArrowUp: () => move(-1),
          ArrowLeft: () => move(-1) }
      : { T: () => { tying = !tying; draw(); }, Backspace: undo };
  if (!pair && !data.scale) keys.Equal = keys.T;
  const action = keys[code] || common[code] ||
    (data.scale ? number && number <= data.scale && (() => score(active, number))
      : !pair && which >= 0 && (() => append(which)));
  // Who reached a button by Tab means it.
  if (!action || (code === "Enter" && document.activeElement.tagName === "BUTTON")) return;
  event.preventDefault();
  action();
}

const before = stored(KEY);
if (before) state = JSON.parse(before);
language = stored("rlhf_jax:language") || (navigator.language.startsWith("zh") ? "zh" : "en");
document.getElementById("language").onclick = () => {
  language = language === "en" ? "zh" : "en";
  stored("rlhf_jax:language", language);
  draw();
};
document.getElementById("again").onclick = () => {
  if (!confirm(word("sure"))) return;
  state.answers = {};
  go(0);
};
document.getElementById("download").onclick = download;
addEventListener("keydown", press);
// A button that was clicked keeps the focus, and would take the next Enter for itself.
addEventListener("click", (event) => event.detail && document.activeElement.blur());
draw();
