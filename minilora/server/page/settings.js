// The settings panel: what goes into every request beside the messages.

import { find } from "./dom.js";

const STORE = "minilora-settings";
const WIDE = matchMedia("(min-width: 70rem)");
const NUMBERS = ["max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];

const form = () => find("settings-form");
const value = (name) => form().elements[name].value;

/** The system prompt; empty for none. */
export const systemPrompt = () => value("system").trim();

/** The body of a chat completion. Fields that are empty are left to the server. */
export function chatRequest(model, base, messages) {
  const system = systemPrompt();
  const body = {
    model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of NUMBERS) if (value(name) !== "") body[name] = Number(value(name));
  const stops = value("stop").split("\n").filter(Boolean);
  if (stops.length) body.stop = stops;
  if (value("scale") !== "" && model !== base) {
    body.model = base;
    body.lora = [{ name: model, scale: Number(value("scale")) }];
  }
  return body;
}

/** What was set, for exports. */
export const settings = () => Object.fromEntries([...new FormData(form())].filter(([, text]) => text !== ""));

/** Whether all fields hold what they may; shows the first that does not. */
export function settingsAreValid() {
  if (form().checkValidity()) return true;
  show(true);
  return form().reportValidity();
}

function show(open) {
  find("settings").hidden = !open;
  document.body.classList.toggle("with-settings", open);
  for (const toggle of document.querySelectorAll(".settings-toggle")) toggle.setAttribute("aria-expanded", open);
}

/** Bring the panel to life. */
export function startSettings() {
  for (const [name, text] of Object.entries(JSON.parse(sessionStorage.getItem(STORE) ?? "{}"))) {
    if (form().elements[name]) form().elements[name].value = text;
  }
  const keep = () => sessionStorage.setItem(STORE, JSON.stringify(Object.fromEntries(new FormData(form()))));
  form().addEventListener("input", keep);
  form().addEventListener("reset", () => setTimeout(keep));
  form().addEventListener("submit", (event) => event.preventDefault());
  for (const toggle of document.querySelectorAll(".settings-toggle")) {
    toggle.addEventListener("click", () => show(find("settings").hidden));
  }
  find("settings-close").addEventListener("click", () => {
    show(false);
    document.querySelector("section:not([hidden]) .settings-toggle").focus();
  });
  WIDE.addEventListener("change", () => show(WIDE.matches));
  show(WIDE.matches);
}
