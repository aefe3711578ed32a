// Every few seconds: whether the run has gone on, and if so, its page in place of this one's parts.
(() => {
  const byId = (id) => document.getElementById(id);
  let tag = null;
  // What the reader has set stays as it is.
  const settings = () => {
    const slider = byId("frame");
    return {
      search: byId("search")?.value, list: byId("list")?.value,
      frame: slider && slider.value !== slider.max ? slider.value : undefined,
      open: [...document.querySelectorAll("main details")].filter((fold) => fold.open).map((fold) => fold.textContent.slice(0, 40)),
      sorted: [...document.querySelectorAll("#sample-table th[aria-sort]")].map((head) => head.ariaSort),
      tall: document.querySelector(".tall")?.scrollTop,
      focus: document.activeElement?.id,
    };
  };
  const restore = (saved) => {
    for (const id of ["search", "list", "frame"]) if (saved[id] !== undefined && byId(id)) byId(id).value = saved[id];
    for (const fold of document.querySelectorAll("main details")) fold.open = saved.open.includes(fold.textContent.slice(0, 40));
    page.begin();
    saved.sorted.forEach((sort, place) => {
      const head = document.querySelectorAll("#sample-table thead button")[place];
      for (let times = { ascending: 1, descending: 2 }[sort] || 0; head && times > 0; times--) head.click();
    });
    if (document.querySelector(".tall")) document.querySelector(".tall").scrollTop = saved.tall || 0;
    if (saved.focus && byId(saved.focus) !== document.activeElement) byId(saved.focus)?.focus({ preventScroll: true });
  };
  const refresh = async () => {
    if (page.isPlaying() || document.hidden) return;
    const answer = await fetch("/", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
    if (answer.status !== 200) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const first = tag === null;
    tag = answer.headers.get("ETag");
    if (first && fresh.getElementById("page-data").textContent === byId("page-data").textContent) return;
    const saved = settings(), place = scrollY;
    for (const part of ["about", "parts", "page-data"]) byId(part).replaceWith(fresh.getElementById(part));
    byId("main").replaceChildren(...fresh.getElementById("main").childNodes);
    restore(saved);
    scrollTo({ top: place, behavior: "instant" });
  };
  const look = async () => {
    const status = byId("watched");
    try { await refresh(); status.textContent = "● live"; }
    catch { status.textContent = "The server has stopped; this is its last page."; }
    setTimeout(look, 2000);
  };
  look();
})();
