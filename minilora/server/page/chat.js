// The chat view: a conversation whose every answer may come from another adapter.

import { Answer, describe } from "./answer.js";
import { button, copy, download, find, make, say, showBusy } from "./dom.js";
import { chatRequest, settings, settingsAreValid, systemPrompt } from "./settings.js";

const STORE = "minilora-conversation";
const EXAMPLES = ["Name three fruits.", "What do bees make?", "Why is the sea salty?"];

// {role, content, model, stats}; model and stats: of answers.
let messages = JSON.parse(sessionStorage.getItem(STORE) ?? "[]");
let base = "";
let running = null;

/** Offer these models; the one that was chosen stays chosen where it is still there. */
export function offerModels(found) {
  base = found.base;
  const select = find("chat-model");
  const before = select.value;
  select.replaceChildren(...found.names.map((name) => make("option", { value: name }, name === base ? `${name} (base)` : name)));
  if (found.names.includes(before)) select.value = before;
  find("chat-send").disabled = false;
}

function keep() {
  try {
    sessionStorage.setItem(STORE, JSON.stringify(messages));
  } catch {
    // Longer than the browser stores: it stays on the page, but not when the page is loaded anew.
    sessionStorage.removeItem(STORE);
  }
  for (const id of ["export-markdown", "export-json"]) find(id).disabled = messages.length === 0;
  find("welcome").hidden = messages.length > 0;
}

/** Show all messages anew. */
function render() {
  find("messages").replaceChildren(...messages.map((message, i) => (message.role === "user" ? question(message, i) : given(message, i))));
  keep();
}

function question(message, i) {
  const row = make("li", { class: "from-user" });
  const copied = button("Copy", (event) => copy(message.content, event.target));
  const edit = button("Edit", () => row.replaceChildren(editor(message, i)));
  row.append(make("div", { class: "bubble text" }, message.content), make("div", { class: "actions" }, edit, copied));
  return row;
}

function editor(message, i) {
  const text = make("textarea", { "aria-label": "Edit the message", rows: 3 }, message.content);
  const form = make("form", { class: "composer edit" }, text);
  form.append(make("div", { class: "row" }, button("Cancel", render), make("button", { class: "main" }, "Send")));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!text.value.trim() || !isReady()) return;
    messages = messages.slice(0, i);
    send(text.value.trim());
  });
  keys(text, form);
  setTimeout(() => text.focus());
  return form;
}

function given(message, i) {
  const answer = new Answer();
  answer.restore(message.content, message.stats);
  return answerRow(answer, message.model, i);
}

/** The row of the answer that is, or will be, messages[i]. */
function answerRow(answer, model, i) {
  const again = button("Regenerate", () => regenerate(i));
  const copied = button("Copy", (event) => copy(messages[i]?.content ?? answer.text, event.target));
  const actions = make("div", { class: "actions" }, again, copied);
  return make("li", { class: "from-model" }, make("p", { class: "who" }, model), answer.element, actions);
}

/** Whether a message can be sent now; shows what is wrong with the settings. */
const isReady = () => base !== "" && !running && settingsAreValid();

function send(text) {
  messages.push({ role: "user", content: text });
  render();
  write();
}

function regenerate(i) {
  if (!isReady()) return;
  messages = messages.slice(0, i);
  render();
  write();
}

/** Have the chosen model answer the conversation as it is. */
async function write() {
  const model = find("chat-model").value;
  const place = messages.length;
  const answer = new Answer({ grown: follow, again: () => regenerate(place) });
  find("messages").append(answerRow(answer, model, place));
  setRunning(new AbortController());
  find("conversation").scrollTop = find("conversation").scrollHeight;
  const conversation = messages;
  const asked = conversation.map(({ role, content }) => ({ role, content }));
  await answer.run(chatRequest(model, base, asked), running.signal);
  setRunning(null);
  if (messages !== conversation) return;
  if (answer.text) messages.push({ role: "assistant", content: answer.text, model, stats: answer.stats });
  keep();
  follow();
  say(`\nEnd of the answer, ${describe(answer.stats)}. `);
}

/** Stay at the end of the conversation, unless the reader has gone up. */
function follow() {
  const place = find("conversation");
  if (place.scrollHeight - place.scrollTop - place.clientHeight < 120) place.scrollTop = place.scrollHeight;
}

function setRunning(controller) {
  running = controller;
  showBusy("chat", running !== null);
  find("messages").classList.toggle("busy", running !== null);
}

/** Enter submits a form, with Shift it starts a line. */
export function keys(text, form) {
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
}

function exportJson() {
  const content = { exported: new Date().toISOString(), base, settings: settings(), messages };
  download("conversation.json", "application/json", JSON.stringify(content, null, 2));
}

function exportMarkdown() {
  const system = systemPrompt() ? [`**System**\n\n${systemPrompt()}\n`] : [];
  const rest = messages.map(({ role, content, model, stats }) =>
    role === "user" ? `**You**\n\n${content}\n` : `**${model}** (${describe(stats)})\n\n${content}\n`);
  download("conversation.md", "text/markdown", [...system, ...rest].join("\n"));
}

/** Bring the view to life. */
export function startChat() {
  const text = find("chat-text");
  find("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!text.value.trim() || !isReady()) return;
    const message = text.value.trim();
    text.value = "";
    send(message);
  });
  keys(text, find("chat-form"));
  find("chat-stop").addEventListener("click", () => running?.abort());
  find("chat-view").addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  find("new-chat").addEventListener("click", () => {
    running?.abort();
    messages = [];
    render();
    text.focus();
  });
  find("export-json").addEventListener("click", exportJson);
  find("export-markdown").addEventListener("click", exportMarkdown);
  document.querySelector(".examples").append(...EXAMPLES.map((example) => button(example, () => isReady() && send(example))));
  render();
}
