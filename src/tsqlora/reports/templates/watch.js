// While a run lasts, this file is written again every few seconds: reload it, with all that the reader has set.
(() => {
  const byId = (id) => document.getElementById(id), heads = () => document.querySelectorAll("#sample-table thead th");
  const folds = document.querySelectorAll("main details"), nameOf = (fold) => fold.textContent.slice(0, 40);
  const saved = history.state?.watched;
  if (saved) {
    for (const [id, value] of Object.entries(saved.values)) {
      if (!byId(id)) continue;
      byId(id).value = value;
      byId(id).dispatchEvent(new Event(id === "list" ? "change" : "input"));
    }
    for (const fold of folds) fold.open = saved.open.includes(nameOf(fold));
    if (byId("theme").textContent.toLowerCase() === saved.theme) byId("theme").click();
    saved.sorted.forEach((sort, place) => {
      const clicks = { ascending: 1, descending: 2 }[sort] || 0;
      for (let click = 0; click < clicks; click++) heads()[place]?.firstElementChild.click();
    });
    byId(saved.focus)?.focus({ preventScroll: true });
    if (document.querySelector(".tall")) document.querySelector(".tall").scrollTop = saved.tall;
    scrollTo({ top: saved.top, behavior: "instant" });
  }
  if ({{ reload or 0 }}) setInterval(() => {
    if (page.isPlaying() || document.hidden) return;
    const values = {}, slider = byId("frame");
    for (const id of ["search", "list"]) if (byId(id)) values[id] = byId(id).value;
    if (slider && slider.value !== slider.max) values.frame = slider.value;
    const watched = {
      values, top: scrollY, tall: document.querySelector(".tall")?.scrollTop, focus: document.activeElement?.id,
      theme: document.documentElement.dataset.theme, sorted: [...heads()].map((head) => head.ariaSort),
      open: [...folds].filter((fold) => fold.open).map(nameOf),
    };
    history.scrollRestoration = "manual";
    history.replaceState({ watched }, "");
    location.reload();
  }, 1000 * {{ reload or 0 }});
})();
