// The completions browser. Texts are set as textContent, never as HTML.
const [STEP, PROMPT, ANSWER, REWARD, ADVANTAGE, TOKENS, CUT, FAILED, PARTS, TEXT, WIDTHS, KL] = [...Array(12).keys()];
const KL_STEP = 0.05, FIRST = "#".charCodeAt(0), NO_KL = "P".charCodeAt(0), MOST = 40; // as browser.py packs them
const A_PAGE = 12; // groups or prompts shown at once

function picker(label, choices, change) {
  const made = element("label", "", label + " ");
  const select = element("select");
  select.setAttribute("aria-label", label);
  for (const [value, text] of choices) {
    const option = element("option", "", text);
    option.value = value;
    select.append(option);
  }
  select.addEventListener("change", change);
  made.append(select);
  return [made, select];
}

function searcher(change) {
  const search = element("input");
  search.type = "search";
  search.placeholder = "Search in prompts and completions";
  search.setAttribute("aria-label", search.placeholder);
  let waiting;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(change, 150); });
  return search;
}

function pages(list, items, show) {
  // Shows the first items, and a button for more.
  list.replaceChildren();
  let shown = 0;
  const more = element("button", "more");
  more.type = "button";
  function next() {
    more.remove();
    for (const item of items.slice(shown, shown + A_PAGE)) list.append(show(item));
    shown = Math.min(items.length, shown + A_PAGE);
    if (shown < items.length) {
      more.textContent = `Show more (${items.length - shown} left)`;
      list.append(more);
    }
  }
  more.addEventListener("click", next);
  next();
  if (!items.length) list.append(element("p", "none", "Nothing here; try another step, filter or search."));
}

function shade(value, most) {
  // Blue for positive values, orange for negative ones.
  const share = Math.round(Math.min(1, Math.abs(value) / most) * 60);
  return share ? `color-mix(in srgb, ${value > 0 ? "#2563eb" : "#d97706"} ${share}%, transparent)` : "";
}

function written(row, by) {
  const text = element("pre", "text");
  if (by === "advantage") text.style.background = shade(row[ADVANTAGE], 2);
  if (by !== "kl" || !row[KL].length) {
    text.textContent = row[TEXT] || "(nothing)";
    return text;
  }
  const letters = [...row[TEXT]]; // code points, as in Python; UTF-16 takes two units for some
  let start = 0;
  [...row[WIDTHS]].forEach((letter, n) => {
    const width = letter.charCodeAt(0) - FIRST, steps = row[KL].charCodeAt(n) - NO_KL;
    if (!width) return;
    const token = element("span", "", letters.slice(start, start + width).join(""));
    token.style.background = shade(steps * KL_STEP, MOST * KL_STEP);
    token.title = likelier(steps);
    text.append(token);
    start += width;
  });
  text.append(letters.slice(start).join(""));
  return text;
}

function likelier(steps) {
  const nats = Math.abs(steps * KL_STEP).toFixed(2), open = Math.abs(steps) === MOST ? " or more" : "";
  return steps ? `${nats} nats${open} ${steps > 0 ? "likelier" : "less likely"} than under the reference` : "as likely as under the reference";
}

function card(row, parts, by) {
  const made = element("article", "completion");
  const head = element("div", "head");
  head.append(element("b", "", `reward ${number(row[REWARD])}`));
  head.append(element("span", row[ADVANTAGE] > 0 ? "up" : row[ADVANTAGE] < 0 ? "down" : "", `advantage ${number(row[ADVANTAGE])}`));
  head.append(element("span", "", `${row[TOKENS]} tokens`));
  if (row[CUT]) head.append(element("span", "warn", "cut off"));
  if (row[FAILED]) head.append(element("span", "warn", row[FAILED]));
  made.append(head);
  if (parts.length > 1) {
    const rewards = parts.map((part, n) => `${part.slice(7)} ${number(row[PARTS][n])}`);
    made.append(element("div", "parts", rewards.join(" · ")));
  }
  made.append(written(row, by));
  return made;
}

function number(value) {
  return value === null ? "none" : String(Math.round(value * 1000) / 1000);
}

function grouped(samples) {
  const groups = new Map();
  samples.facts.forEach((facts, n) => {
    const row = [...facts, samples.texts[n], samples.widths[n], samples.kl[n]];
    const key = row[STEP] + "/" + row[PROMPT];
    if (!groups.has(key)) {
      groups.set(key, { step: row[STEP], prompt: samples.prompts[row[PROMPT]], answer: row[ANSWER], rows: [] });
    }
    groups.get(key).rows.push(row);
  });
  return [...groups.values()];
}

function browseCompletions(section, samples) {
  const steps = samples.blocks.flat();
  const blockOf = samples.blocks.flatMap((members, n) => members.map(() => n)); // of each step
  const packed = document.querySelectorAll(".block"), unpackedBlocks = new Map();
  function block(n) {
    // The groups of a block's steps, unpacked when they are first needed.
    if (!unpackedBlocks.has(n)) unpackedBlocks.set(n, unpacked(packed[n]).then((text) => grouped(JSON.parse(text))));
    return unpackedBlocks.get(n);
  }
  const tests = {
    all: () => true,
    mixed: (g) => new Set(g.rows.map((row) => row[REWARD]).filter((reward) => reward !== null)).size > 1,
    none: (g) => g.rows.every((row) => !(row[REWARD] > 0)),
    cut: (g) => g.rows.some((row) => row[CUT]),
    failed: (g) => g.rows.some((row) => row[FAILED]),
  };
  const bar = element("div", "bar");
  const slider = element("input");
  slider.type = "range";
  slider.min = 0;
  slider.max = steps.length - 1;
  slider.value = steps.length - 1;
  const step = element("label", "step");
  const which = element("output");
  step.append("Step ", slider, which);
  const [filterLabel, filter] = picker("Groups", [
    ["all", "all"], ["mixed", "with different rewards"], ["none", "without a reward"], ["cut", "with one cut off"], ["failed", "with a failed reward"],
  ], show);
  const [colorLabel, color] = picker("Color by", [["kl", "KL to the reference"], ["advantage", "advantage"], ["", "nothing"]], show);
  const search = searcher(show);
  const [whereLabel, where] = picker("In", [["step", "this step"], ["all", "all steps"]], show);
  bar.append(step, whereLabel, filterLabel, colorLabel, search);
  const count = element("p", "found");
  const list = element("div", "list");
  section.append(bar, count, list);
  slider.addEventListener("input", show);

  let asked = 0;
  async function show() {
    const request = ++asked, selected = steps[slider.value], wanted = search.value.toLowerCase();
    which.textContent = selected;
    slider.disabled = where.value === "all";
    const needed = where.value === "all" ? [...packed.keys()] : [blockOf[slider.value]];
    if (needed.some((n) => !unpackedBlocks.has(n))) count.textContent = "Unpacking…";
    const groups = (await Promise.all(needed.map(block))).flat();
    if (request !== asked) return; // a later request replaces this one
    const chosen = groups.filter((g) =>
      (where.value === "all" || g.step === selected) && tests[filter.value](g) &&
      (!wanted || g.prompt.toLowerCase().includes(wanted) || g.rows.some((row) => row[TEXT].toLowerCase().includes(wanted))));
    count.textContent = `${chosen.length} of ${samples.groups} groups`;
    pages(list, chosen, (g) => {
      const made = element("div", "group");
      const prompt = element("details");
      const title = element("summary");
      const line = g.prompt.trim().split("\n").filter((part) => part.trim());
      title.append(element("b", "", `step ${g.step}`), element("span", "", line.slice(-2).join(" ").slice(-160)), element("i", "", `answer: ${g.answer || "whatever the task accepts"}`));
      prompt.append(title, element("pre", "text", g.prompt));
      const cards = element("div", "cards");
      for (const row of g.rows) cards.append(card(row, samples.parts, color.value));
      made.append(prompt, cards);
      return made;
    });
  }
  show();
}

function browseAnswers(section, answers) {
  const kinds = { all: () => true, fixed: (r) => !r[3] && r[5], broken: (r) => r[3] && !r[5], wrong: (r) => !r[3] && !r[5], right: (r) => r[3] && r[5] };
  const count = (kind) => answers.rows.filter(kinds[kind]).length;
  const [label, filter] = picker("Prompts", [
    ["all", `all (${count("all")})`], ["fixed", `wrong before, right now (${count("fixed")})`], ["broken", `right before, wrong now (${count("broken")})`],
    ["wrong", `wrong both times (${count("wrong")})`], ["right", `right both times (${count("right")})`],
  ], show);
  const search = searcher(show);
  const bar = element("div", "bar");
  bar.append(label, search);
  const list = element("div", "list");
  section.append(bar, list);
  function show() {
    const wanted = search.value.toLowerCase();
    const rows = answers.rows.filter((r) => kinds[filter.value](r) && (!wanted || (r[0] + r[2] + r[4]).toLowerCase().includes(wanted)));
    pages(list, rows, (r) => {
      const made = element("div", "group");
      made.append(element("pre", "text prompt", r[0]), element("p", "gold", `answer: ${r[1] || "whatever the task accepts"}`));
      const cards = element("div", "cards two");
      for (const [step, text, right] of [[answers.first, r[2], r[3]], [answers.last, r[4], r[5]]]) {
        const one = element("article", "completion");
        const head = element("div", "head");
        head.append(element("b", "", `step ${step}`), element("span", right ? "up" : "down", right ? "right" : "wrong"));
        one.append(head, element("pre", "text", text || "(nothing)"));
        cards.append(one);
      }
      made.append(cards);
      return made;
    });
  }
  show();
}

ready.then((content) => {
  const completions = document.getElementById("completions"), answers = document.getElementById("answers");
  if (completions) browseCompletions(completions, content.completions);
  if (answers) browseAnswers(answers, content.answers);
});
