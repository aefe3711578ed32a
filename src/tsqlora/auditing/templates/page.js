"use strict";
const page = (() => {
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const pageData = JSON.parse(byId("page-data").textContent);

  // -------------------------------------------------------------- figures
  const themed = (value) => {
    if (Array.isArray(value)) return value.map(themed);
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, inside]) => [key, themed(inside)]));
    return isDark() && Object.hasOwn(pageData.dark, value) ? pageData.dark[value] : value;
  };
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const draw = (id) => {
    const figure = pageData.figures[id], place = byId(id);
    const drawn = { data: themed(figure.data), layout: themed(figure.layout) };
    const ink = css("--ink"), line = css("--line");
    const layout = drawn.layout;
    layout.font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: ink };
    for (const axis of ["xaxis", "yaxis"])
      Object.assign(layout[axis], { gridcolor: line, linecolor: line, tickcolor: line });
    layout.hoverlabel = { align: "left", bgcolor: css("--card"), bordercolor: css("--soft"), font: { color: ink } };
    // What cannot be read any smaller scrolls by itself.
    const room = place.parentElement.clientWidth;
    layout.width = Math.max(room, layout.width || 0);
    return Plotly.react(place, drawn.data, layout, { displayModeBar: false, responsive: false, scrollZoom: false });
  };
  const drawAll = () => { for (const id of Object.keys(pageData.figures)) if (byId(id)) draw(id); showFrame(); focusable(); };
  const focusable = () => {
    for (const box of document.querySelectorAll(".scroll, pre")) {
      const scrolls = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
      if (scrolls) box.setAttribute("tabindex", "0"); else box.removeAttribute("tabindex");
    }
  };

  // ---------------------------------------------------------------- theme
  const nameTheme = () => { byId("theme").textContent = isDark() ? "Light" : "Dark"; byId("theme").setAttribute("aria-label", `Use the ${isDark() ? "light" : "dark"} theme`); };
  byId("theme").addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); drawAll(); });
  systemDark.addEventListener("change", () => { nameTheme(); drawAll(); });
  let width = innerWidth, waiting;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth; clearTimeout(waiting); waiting = setTimeout(drawAll, 120);
  });

  // ------------------------------------------------------------- rank map
  const showFrame = () => {
    const slider = byId("frame");
    if (!slider) return;
    const frame = pageData.frames[Number(slider.value)];
    const text = `step ${frame.step.toLocaleString("en")}: ${frame.what}`;
    byId("frame-text").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    Plotly.restyle("ranks-map", { z: [frame.z] });
  };
  let timer;
  const bindRanks = () => {
    const slider = byId("frame"), play = byId("play");
    const stop = () => { clearInterval(timer); timer = undefined; if (play) { play.textContent = "Play"; play.setAttribute("aria-pressed", "false"); } };
    stop();
    if (!slider) return;
    slider.addEventListener("input", () => { stop(); showFrame(); });
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (slider.value === slider.max) slider.value = 0;
      play.textContent = "Pause"; play.setAttribute("aria-pressed", "true"); showFrame();
      timer = setInterval(() => { slider.value = Number(slider.value) + 1; showFrame(); if (slider.value === slider.max) stop(); }, 700);
    });
  };

  // -------------------------------------------------------------- samples
  const bindSamples = () => {
    const table = byId("sample-table");
    if (!table) return;
    const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
    const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
    const narrow = () => {
      const wanted = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean), list = byId("list").value;
      let shown = 0;
      for (const row of rows) {
        const fits = (!list || row.dataset.lists.split("|").includes(list)) && wanted.every((word) => texts.get(row).includes(word));
        row.hidden = !fits; shown += fits;
      }
      byId("shown").textContent = `${shown} shown`;
    };
    const value = (row, place) => {
      const cell = row.cells[place];
      return cell.dataset.value === undefined ? cell.textContent.toLowerCase() : Number(cell.dataset.value);
    };
    heads.forEach((head, place) => head.firstElementChild.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", other === head ? (down ? "descending" : "ascending") : "none"));
      const sorted = [...rows].sort((a, b) => {
        const x = value(a, place), y = value(b, place);
        return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
      });
      body.append(...sorted);
    }));
    byId("search").addEventListener("input", narrow);
    byId("list").addEventListener("change", narrow);
    narrow();
  };

  for (const fold of document.querySelectorAll("details")) fold.addEventListener("toggle", focusable);
  bindRanks();
  bindSamples();
  nameTheme();
  drawAll();
  return { isPlaying: () => timer !== undefined };
})();
