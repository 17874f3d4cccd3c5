// The compare view: one question, two to four models, all answers in one batch.

import { Answer } from "./answer.js";
import { button, copy, find, make, number, say, showBusy } from "./dom.js";
import { keys } from "./chat.js";
import { chatRequest, settingsAreValid } from "./settings.js";

const FEWEST = 2;
const MOST = 4;

// {element, select, place, answer}
let columns = [];
let found = { base: "", names: [] };
let running = null;

/** Offer these models in every column. */
export function offerColumns(models) {
  found = models;
  while (columns.length < FEWEST) addColumn();
  for (const column of columns) fill(column);
  find("compare-send").disabled = false;
  updateButtons();
}

function fill({ select }, wanted = select.value) {
  select.replaceChildren(...found.names.map((name) => make("option", { value: name }, name === found.base ? `${name} (base)` : name)));
  if (found.names.includes(wanted)) select.value = wanted;
}

function addColumn() {
  const used = columns.map((column) => column.select.value);
  const select = make("select", { "aria-label": "Model of this column" });
  const place = make("div", { class: "place" });
  const column = { select, place, answer: null };
  const close = button("✕", () => removeColumn(column), { class: "quiet remove", "aria-label": "Remove this column" });
  const copied = button("Copy", (event) => column.answer && copy(column.answer.text, event.target));
  column.element = make("article", { class: "column" }, make("div", { class: "head" }, select, close), place, make("div", { class: "actions" }, copied));
  columns.push(column);
  fill(column, found.names.find((name) => !used.includes(name)));
  find("columns").append(column.element);
  updateButtons();
}

function removeColumn(column) {
  columns = columns.filter((other) => other !== column);
  column.element.remove();
  updateButtons();
  columns[0].select.focus();
}

function updateButtons() {
  const busy = running !== null;
  showBusy("compare", busy);
  find("add-column").disabled = busy || columns.length >= MOST;
  for (const { element, select } of columns) {
    element.querySelector(".remove").disabled = busy || columns.length <= FEWEST;
    select.disabled = busy;
  }
}

async function askAll(text) {
  find("question").textContent = text;
  find("question").hidden = false;
  find("compare-total").textContent = "";
  const controller = (running = new AbortController());
  updateButtons();
  const started = performance.now();
  await Promise.all(columns.map((column) => write(column, text, controller.signal)));
  running = null;
  updateButtons();
  const tokens = columns.reduce((sum, { answer }) => sum + answer.stats.tokens, 0);
  const seconds = (performance.now() - started) / 1000;
  if (tokens) find("compare-total").textContent = `${tokens} tokens together, ${number(tokens / seconds)} tokens/s`;
}

async function write(column, text, signal) {
  const model = column.select.value;
  column.answer = new Answer();
  column.place.replaceChildren(column.answer.element);
  await column.answer.run(chatRequest(model, found.base, [{ role: "user", content: text }]), signal, false);
  // Several voices at once would be noise: each answer is read when it is whole.
  say(`${model}: ${column.answer.text || "no answer"} \n`);
}

/** Bring the view to life. */
export function startCompare() {
  const text = find("compare-text");
  find("compare-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!text.value.trim() || running || !columns.length || !settingsAreValid()) return;
    const question = text.value.trim();
    text.value = "";
    askAll(question);
  });
  keys(text, find("compare-form"));
  find("compare-stop").addEventListener("click", () => running?.abort());
  find("compare-view").addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  find("add-column").addEventListener("click", addColumn);
}
