// Starts the page: tabs, theme, key, model; the views do the rest.

import { ApiError, getJson, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { byId } from "./dom.js";
import { Inspector } from "./inspector.js";

const THEME = "folovllm.theme";
const dark = matchMedia("(prefers-color-scheme: dark)");

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  inspector.redraw();
}

function show(name) {
  for (const tab of ["chat", "inspector"]) {
    const isShown = tab === name;
    byId(tab).hidden = !isShown;
    byId(`tab-${tab}`).setAttribute("aria-selected", String(isShown));
    byId(`tab-${tab}`).tabIndex = isShown ? 0 : -1;
  }
  inspector.isShown = name === "inspector";
  history.replaceState(null, "", name === "chat" ? location.pathname : `#${name}`);
  if (name === "chat") byId("input").focus();
}

async function connect() {
  try {
    const models = await getJson("v1/models");
    byId("model").textContent = models.data[0].id;
    byId("key-form").hidden = true;
    chat.setModel(models.data[0].id);
    inspector.start();
    return true;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) byId("key-form").hidden = false;
    else chat.announce(error.message);
    return false;
  }
}

const chat = new Chat();
const inspector = new Inspector();
setTheme(localStorage.getItem(THEME) ?? (dark.matches ? "dark" : "light"));
dark.addEventListener("change", () => localStorage.getItem(THEME) ?? setTheme(dark.matches ? "dark" : "light"));
byId("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem(THEME, theme);
  setTheme(theme);
});
for (const name of ["chat", "inspector"]) byId(`tab-${name}`).addEventListener("click", () => show(name));
document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  const other = byId("chat").hidden ? "chat" : "inspector";
  show(other);
  byId(`tab-${other}`).focus();
});
byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  byId("key-note").textContent = (await connect()) ? "" : "This key does not fit.";
});
if (location.hash === "#inspector") show("inspector");
connect();
