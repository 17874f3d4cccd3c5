// Elements and words. Text enters the document as text nodes only: nothing in this page parses HTML.

export const find = (id) => document.getElementById(id);

/** An element. props: attributes; functions become listeners; true is an empty attribute, false and null are none. */
export function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** A button without a form. */
export const button = (text, click, props = {}) => make("button", { type: "button", class: "quiet", click, ...props }, text);

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { maximumFractionDigits: 1, minimumFractionDigits: 1 });

const fine = (value) => (value < 9.95 && !Number.isInteger(value) ? short : whole).format(value);
export const number = (value) => (value < 99.95 && !Number.isInteger(value) ? short : whole).format(value);
export const percent = (share) => (share === null ? "–" : `${fine(100 * share)}%`);

/** "40 ms", "1.3 s", "4 min", "3 h" */
export function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds < 0.9995) return `${fine(1000 * seconds)} ms`;
  if (seconds < 90) return `${fine(seconds)} s`;
  if (seconds < 5400) return `${whole.format(seconds / 60)} min`;
  return seconds < 172800 ? `${whole.format(seconds / 3600)} h` : `${whole.format(seconds / 86400)} days`;
}

/** "3.2 MB" */
export function bytes(count) {
  const step = count < 1e6 ? 1e3 : count < 1e9 ? 1e6 : 1e9;
  return count === 0 ? "–" : `${number(count / step)} ${{ 1e3: "kB", 1e6: "MB", 1e9: "GB" }[step]}`;
}

/** Let a view's button to stop stand for its button to send, or the other way; the focus stays there. */
export function showBusy(view, busy) {
  const [send, stop] = [find(`${view}-send`), find(`${view}-stop`)];
  const focused = [send, stop].includes(document.activeElement);
  send.hidden = busy;
  stop.hidden = !busy;
  if (focused) (busy ? stop : find(`${view}-text`)).focus();
}

/** Give the user a file. */
export function download(name, type, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** Copy, and say so on the button for a moment. */
export async function copy(text, from) {
  const before = from.textContent;
  try {
    await navigator.clipboard.writeText(text);
    from.textContent = "Copied";
  } catch {
    from.textContent = "Not allowed here";
  }
  setTimeout(() => (from.textContent = before), 1500);
}

// What a screen reader says comes in pieces, one every two seconds at most.
const SPEECH_PAUSE = 2000;
let unsaid = "";
let speaking = null;

/** Have a screen reader say something, after what it was given before. */
export function say(text) {
  unsaid += text;
  speaking ??= setTimeout(() => {
    speaking = null;
    const end = unsaid.search(/\s\S*$/) + 1 || unsaid.length;
    find("speech").textContent = unsaid.slice(0, end);
    unsaid = unsaid.slice(end);
    if (unsaid) say("");
  }, SPEECH_PAUSE);
}
