(() => {
  const pageData = JSON.parse(byId("page-data").textContent);
  const rows = pageData.rows.map((row, order) => ({ ...row, order, reviewed: null, words: `${row.row} ${row.text} ${row.label} ${row.suggested_label}`.toLowerCase() }));

  // ------------------------------------------------------------------ what was chosen, in this browser
  // A row of tags has several entries, each with its token.
  const keyOf = (r) => (r.token === null ? String(r.row) : `${r.row}.${r.token}`);
  const place = `tsqlora-audit-${pageData.key}`;
  const remembered = () => { try { return JSON.parse(localStorage.getItem(place)) || {}; } catch { return {}; } };
  const remember = () => {
    try { localStorage.setItem(place, JSON.stringify(Object.fromEntries(rows.filter((r) => r.reviewed !== null).map((r) => [keyOf(r), r.reviewed])))); } catch { /* a browser may forbid it */ }
  };
  const classOf = new Map(pageData.classes.map((label) => [String(label), label]));
  const folded = new Map(pageData.classes.map((label) => [String(label).trim().toLowerCase(), label]));
  // A row may have several labels, joined by "|".
  const labelOf = (text) => {
    const one = (part) => (classOf.has(part) ? classOf.get(part) : folded.get(part.trim().toLowerCase()));
    if (pageData.answer !== "labels") return one(text);
    const labels = text.split("|").filter((part) => part.trim()).map(one);
    return labels.length && !labels.includes(undefined) ? labels.join("|") : undefined;
  };
  for (const [row, label] of Object.entries(remembered())) {
    const one = rows.find((r) => keyOf(r) === row);
    if (one && labelOf(String(label)) !== undefined) one.reviewed = labelOf(String(label));
  }

  // ------------------------------------------------------------------ one row
  const byRow = new Map(rows.map((r) => [r.row, r]));
  const numbers = pageData.classes.every((label) => Number.isFinite(Number(label)));
  const build = (row) => {
    const choices = [row.label, row.suggested_label, ...row.candidates.filter((c) => c !== row.label && c !== row.suggested_label)].slice(0, 4);
    const buttons = choices.map((label, j) => {
      const button = make("button", { type: "button" }, make("kbd", {}, String(j + 1)), make("small", {}, `${j === 0 ? "keep" : ""} ${numbers ? "class" : ""}`.trim()), String(label));
      button.title = j === 0 ? "keep the label" : "set this label";
      button.addEventListener("click", () => { go(row, false); choose(row, label); });
      return button;
    });
    const input = make("input", { type: "text", autocomplete: "off", placeholder: "another label" });
    input.setAttribute("list", "classes");
    input.setAttribute("aria-label", `another label of row ${row.row}${row.token === null ? "" : `, token ${row.token}`}`);
    input.addEventListener("change", () => type(row, input));
    input.addEventListener("focus", () => go(row, false));
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") { event.preventDefault(); if (type(row, input)) { input.blur(); step(1); } }
      if (event.key === "Escape") input.blur();
    });
    const wrong = row.wrong_probability; // null where the audit has no evidence of wrong labels
    const chance = wrong === null ? "" : ` · label wrong: ${wrong >= 0.995 ? "over 99%" : `${Math.round(100 * wrong)}%`}`;
    const name = row.token === null ? `row ${row.row}` : `row ${row.row}, token ${row.token}`;
    const kinds = { check: " · to check", spelling: " · another spelling" };
    const twin = byRow.get(row.near);
    const near = twin === undefined ? "" : ` · nearly the same as row ${twin.row}, which is labelled ${twin.label}: ${twin.text.slice(0, 300)}`;
    const about = `${name}${kinds[row.kind] ?? chance}${near}`;
    // `start` counts code points, and a string of JavaScript has two units for some, such as emoji.
    const letters = [...row.text], end = row.start + [...row.word].length;
    const words = row.token === null ? make("p", { className: "words" }, row.text)
      : make("p", { className: "words" }, letters.slice(0, row.start).join(""), make("mark", {}, row.word), letters.slice(end).join(""));
    const picture = row.picture ? [make("img", { src: row.picture, alt: "", loading: "lazy", className: "picture" })] : [];
    row.item = make("li", {}, make("span", { className: "small" }, about), ...picture, words, make("div", { className: "choices" }, ...buttons, input));
    row.paint = () => {
      choices.forEach((label, j) => buttons[j].setAttribute("aria-pressed", String(row.reviewed === label)));
      input.value = row.reviewed === null || choices.includes(row.reviewed) ? "" : String(row.reviewed);
      input.removeAttribute("aria-invalid");
      row.item.className = row.reviewed === null ? "" : "done";
    };
    row.choices = choices; row.input = input; row.paint();
  };
  const choose = (row, label) => { row.reviewed = label; row.paint(); remember(); count(); };
  const type = (row, input) => {
    if (input.value.trim() === "") { if (row.reviewed !== null && !row.choices.includes(row.reviewed)) choose(row, null); return false; }
    const label = labelOf(input.value);
    input.setAttribute("aria-invalid", String(label === undefined));
    if (label === undefined) return false;
    choose(row, label);
    return true;
  };

  // ------------------------------------------------------------------ which rows are shown
  let shown = [], current = null;
  const pairOf = (row) => JSON.stringify([row.label, row.suggested_label]);
  const states = { open: (r) => r.reviewed === null, done: (r) => r.reviewed !== null, suspect: (r) => r.kind === "suspect", check: (r) => r.kind === "check", near: (r) => r.near !== null, spelling: (r) => r.kind === "spelling" };
  const by = { order: (a, b) => a.order - b.order, row: (a, b) => a.row - b.row, label: (a, b) => String(a.label).localeCompare(String(b.label)) || a.order - b.order };
  const show = () => {
    const words = byId("search").value.toLowerCase().trim(), pair = byId("pair").value, state = states[byId("state").value];
    shown = rows.filter((r) => (!words || r.words.includes(words)) && (!pair || pairOf(r) === pair) && (!state || state(r))).sort(by[byId("sort").value]);
    byId("rows").replaceChildren(...shown.map((r) => r.item));
    byId("none").hidden = shown.length > 0;
    if (!shown.includes(current)) go(shown[0] || null, false);
    count();
  };
  const count = () => {
    const done = rows.filter((r) => r.reviewed !== null).length;
    byId("count").textContent = `${done} of ${rows.length} reviewed${shown.length < rows.length ? `, ${shown.length} shown` : ""}`;
  };
  const go = (row, scroll = true) => {
    if (current) current.item.removeAttribute("aria-current");
    current = row;
    if (!row) return;
    row.item.setAttribute("aria-current", "true");
    if (scroll) row.item.scrollIntoView({ block: "nearest" });
  };
  const step = (by) => { const next = shown[shown.indexOf(current) + by]; if (next) go(next); };

  // ------------------------------------------------------------------ keys
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "/") { event.preventDefault(); byId("search").focus(); return; }
    if (!current) return;
    const number = Number(event.key);
    if (event.key === "j") step(1);
    else if (event.key === "k") step(-1);
    else if (event.key === "u") choose(current, null);
    else if (event.key === "t") { event.preventDefault(); current.input.focus(); }
    else if (Number.isInteger(number) && number >= 1 && number <= current.choices.length) choose(current, current.choices[number - 1]);
  });

  // ------------------------------------------------------------------ the table
  const tags = pageData.answer === "tags";
  const table = () => [`row,${tags ? "token,word," : ""}label,suggested_label,wrong_probability,reviewed_label,kind,text`, ...rows.map((r) =>
    [r.row, ...(tags ? [r.token, cell(r.word)] : []), cell(r.label), cell(r.suggested_label), r.wrong_probability?.toFixed(4) ?? "", cell(r.reviewed), r.kind, cell(r.text)].join(","))].join("\n") + "\n";
  byId("export").addEventListener("click", () => {
    save(table());
  });

  // ------------------------------------------------------------------ begin
  const pairs = new Map();
  for (const row of rows) if (row.kind !== "check") pairs.set(pairOf(row), (pairs.get(pairOf(row)) || 0) + 1);
  for (const [pair, number] of [...pairs].sort((a, b) => b[1] - a[1])) {
    const [label, suggested] = JSON.parse(pair);
    byId("pair").append(make("option", { value: pair }, `${label} → ${suggested} (${number})`));
  }
  byId("classes").append(...pageData.classes.map((label) => make("option", { value: String(label) })));
  rows.forEach(build);
  for (const id of ["search", "sort", "pair", "state"]) byId(id).addEventListener(id === "search" ? "input" : "change", show);
  show();
})();
