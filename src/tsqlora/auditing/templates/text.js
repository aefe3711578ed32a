(() => {
  const data = JSON.parse(byId("page-data").textContent);

  // ------------------------------------------------------------------ what was chosen, in this browser
  const place = `tsqlora-text-${data.key}`;
  let words = new Map(); // row number → "drop", or "keep" for one that an earlier table dropped
  try { words = new Map(JSON.parse(localStorage.getItem(place)) || []); } catch { /* a browser may forbid it */ }
  const dropped = () => [...words.keys()].filter((row) => words.get(row) === "drop");
  const items = new Map(); // row number → its items, one in each finding
  let shown = [], current = null;
  const choose = (row, drop) => {
    words.set(row, drop ? "drop" : "keep");
    try { localStorage.setItem(place, JSON.stringify([...words])); } catch { /* see above */ }
    paint(row); count();
  };
  const paint = (row) => {
    const drop = words.get(row) === "drop";
    for (const item of items.get(row) || []) { item.classList.toggle("drop", drop); item.querySelector("button")?.setAttribute("aria-pressed", String(drop)); }
  };
  const count = () => { if (byId("count")) byId("count").textContent = `${dropped().length} rows to drop`; };

  // ------------------------------------------------------------------ one row
  const tokens = (part) => {
    const line = make("p", { className: "tokens", tabIndex: 0 });
    part.tokens.forEach((text, j) => line.append(make("span", { className: part.kinds[j] }, text)));
    return part.side ? [make("span", { className: "small" }, part.side), line] : [line];
  };
  const build = (number) => {
    const row = data.rows[number];
    const lost = row.lost ? `, ${row.lost} tokens of its answer lost` : "";
    const about = `row ${number} · ${row.fate} · ${row.trained} tokens trained${lost}${row.detail ? ` · ${row.detail}` : ""}`;
    const item = make("li", {}, make("span", { className: "small" }, about), ...row.parts.flatMap(tokens));
    if (byId("export")) {
      const button = make("button", { type: "button" }, "drop");
      item.append(button);
      button.addEventListener("click", () => { go(item, false); choose(number, words.get(number) !== "drop"); });
    }
    item.number = number;
    if (!items.has(number)) items.set(number, []);
    items.get(number).push(item);
    return item;
  };
  for (const box of document.querySelectorAll(".finding")) {
    const finding = data.findings.find((one) => one.name === box.dataset.name);
    box.addEventListener("toggle", () => {
      const list = box.querySelector("ol");
      if (box.open && !list.childElementCount) { list.append(...finding.places.map(build)); finding.places.forEach(paint); }
      shown = [...document.querySelectorAll(".finding[open] li")];
      if (!shown.includes(current)) go(shown[0] || null, false);
    });
  }
  const go = (item, scroll = true) => {
    if (current) current.removeAttribute("aria-current");
    current = item;
    if (!item) return;
    item.setAttribute("aria-current", "true");
    if (scroll) item.scrollIntoView({ block: "nearest" });
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !current) return;
    const step = { j: 1, k: -1 }[event.key];
    if (step) { const next = shown[shown.indexOf(current) + step]; if (next) go(next); }
    else if (byId("export") && event.key === "d") choose(current.number, true);
    else if (byId("export") && event.key === "u") choose(current.number, false);
  });

  // ------------------------------------------------------------------ the table
  const names = (row) => data.findings.filter((one) => one.places.includes(row)).map((one) => one.name).join("|");
  if (byId("export")) byId("export").addEventListener("click", () => {
    const lines = [...words.keys()].sort((a, b) => a - b).map((row) => [row, cell(names(row)), words.get(row), cell(data.rows[row] ? data.rows[row].answer : "")].join(","));
    save(["row,finding,reviewed,answer", ...lines].join("\n") + "\n");
  });

  count();
  const first = document.querySelector(".finding");
  if (first) first.open = true;
})();
