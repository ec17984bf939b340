// Views, light and dark, and the copy button.
const views = [...document.querySelectorAll(".view")];
const tabs = [...document.querySelectorAll(".tabs a")];

function route() {
  const target = get(location.hash.slice(1)) ?? get("report");
  const view = target.closest(".view") ?? get("report");
  for (const each of views) each.hidden = each !== view;
  for (const tab of tabs) {
    if (tab.hash.slice(1) === view.id) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  if (target === view) scrollTo(0, 0);
  else target.scrollIntoView();
  view.dispatchEvent(new Event("shown"));
}

const THEMES = ["auto", "light", "dark"];
const theme = get("theme");

function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  theme.textContent = { auto: "◐ Auto", light: "☀ Light", dark: "☾ Dark" }[name];
  theme.setAttribute("aria-label", `Colours: ${name}`);
  theme.dataset.now = name;
}

setTheme(THEMES.includes(recall("theme")) ? recall("theme") : "auto");
theme.hidden = false;
theme.addEventListener("click", () => {
  setTheme(THEMES[(THEMES.indexOf(theme.dataset.now) + 1) % THEMES.length]);
  remember("theme", theme.dataset.now);
});

const copy = document.querySelector(".command button");
if (copy && navigator.clipboard) {
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.querySelector(".command code").textContent);
    copy.textContent = "Copied";
  });
}

if (names.length < 2) for (const tab of tabs.slice(1)) tab.hidden = true;
drawGrid();
get("report").addEventListener("shown", fitGrid);
new ResizeObserver(fitGrid).observe(get("grid"));
addEventListener("hashchange", route);
route();
