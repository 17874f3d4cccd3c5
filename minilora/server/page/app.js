// The page: its views, the server's state, and the key.

import { ask, connect, forgetKey, hasKey, models, Refusal } from "./api.js";
import { offerModels, startChat } from "./chat.js";
import { offerColumns, startCompare } from "./compare.js";
import { setWatching, startDashboard } from "./dashboard.js";
import { find } from "./dom.js";
import { startSettings } from "./settings.js";

const VIEWS = ["chat", "compare", "dashboard"];
const STATES = {
  connecting: "Connecting",
  ready: "Ready",
  draining: "Shutting down, taking nothing new",
  full: "Full, trying again",
  key: "Key needed",
  dead: "The engine has stopped",
  gone: "Not reachable, or still loading",
  unavailable: "Not available, trying again",
};
const CALM = 10_000;
const EAGER = 2_000;

let state = "connecting";
let looking = false;
let timer = null;
let offered = null;

function setState(found) {
  const before = state;
  state = found;
  find("status").dataset.state = state;
  if (find("status-text").textContent !== STATES[state]) find("status-text").textContent = STATES[state];
  find("key-button").hidden = !hasKey() && state !== "key";
  find("key-button").textContent = state === "key" ? "Enter key" : "Forget key";
  if (state !== before && !looking) schedule();
}

/** What an answer says about the server. */
function heard(status, code) {
  if (status === 0) setState("gone");
  else if (status === 401) setState("key");
  else if (code === "engine_dead") setState("dead");
  else if (code === "draining") setState(code);
  else if (code === "queue_full" || code === "key_limit") setState("full");
  else if (status === 503) setState("unavailable");
  else if (status < 400 && state === "key") look();
}

/** Look after the server: seldom while all is well, often until it is. A user who gave no key is not asked again. */
function schedule() {
  clearTimeout(timer);
  if (!document.hidden && state !== "key") timer = setTimeout(look, state === "ready" ? CALM : EAGER);
}

async function look() {
  if (looking) return;
  looking = true;
  try {
    await ask("ready");
    offer(await models());
    setState("ready");
    attend();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
  } finally {
    looking = false;
    schedule();
  }
}

/** Let the user choose among the server's models, which may come and go. */
function offer(found) {
  if (JSON.stringify(found) === JSON.stringify(offered)) return;
  offered = found;
  offerModels(found);
  offerColumns(found);
}

function enterKey(refused) {
  const dialog = find("key-dialog");
  find("key-wrong").hidden = !refused;
  find("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "given" ? find("key").value.trim() : null), { once: true });
  });
}

function showView() {
  const name = VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat";
  for (const view of VIEWS) find(`${view}-view`).hidden = view !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.body.dataset.view = name;
  document.title = `${name[0].toUpperCase()}${name.slice(1)} · minilora`;
  attend();
}

/** Follow the figures only where they are seen. */
function attend() {
  setWatching(!document.hidden && document.body.dataset.view === "dashboard");
}

find("key-cancel").addEventListener("click", () => find("key-dialog").close(""));
find("key-button").addEventListener("click", () => {
  forgetKey();
  location.reload();
});
addEventListener("hashchange", showView);
document.addEventListener("visibilitychange", () => {
  attend();
  if (!document.hidden) look();
});

connect(enterKey, heard);
startSettings();
startChat();
startCompare();
startDashboard(setState);
showView();
look();
