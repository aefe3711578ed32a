"use strict";
// What the review pages share: elements, cells of the exported table, the theme.
const byId = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
// A spreadsheet runs what looks like a formula.
const harmless = (text) => (/^\s*[=+@\-\t\r\uff1d\uff0b\uff20\uff0d]/.test(text) && !(text.trim() !== "" && Number.isFinite(Number(text))) ? `'${text}` : text);
const cell = (value) => `"${harmless(String(value ?? "")).replaceAll('"', '""')}"`;
const save = (table) => {
  // Excel reads UTF-8 only behind a byte order mark.
  const link = make("a", { href: URL.createObjectURL(new Blob(["\ufeff", table], { type: "text/csv" })), download: "reviewed.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};
{
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const nameTheme = () => { byId("theme").textContent = isDark() ? "Light" : "Dark"; byId("theme").setAttribute("aria-label", `Use the ${isDark() ? "light" : "dark"} theme`); };
  byId("theme").addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
  dark.addEventListener("change", nameTheme);
  nameTheme();
}
