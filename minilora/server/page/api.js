// The server as the page sees it: one way to ask, one way to read events, and the key.

const BASE = new URL("../", import.meta.url);
const KEY = "minilora-key";

/** The server, or the way to it, said no. status: 0 where no answer came; code: the server's word; retryAfter: seconds. */
export class Refusal extends Error {
  constructor(status, message, code = "", retryAfter = 0) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const forgetKey = () => sessionStorage.removeItem(KEY);

let enterKey = async () => null;
let prompting = null;
let listener = () => {};

/** enter: called with whether a key was refused, resolves to a key or null; heard: with status and code of each answer. */
export function connect(enter, heard) {
  enterKey = enter;
  listener = heard;
}

/** Send a request; resolves to the Response. Raises Refusal, and AbortError where `signal` says so. */
export async function ask(path, { body = null, accept = "application/json", signal = null } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const answer = await send(path, key, body, accept, signal);
    const refused = answer.ok ? null : await refusal(answer);
    listener(answer.status, refused?.code);
    if (!refused) return answer;
    if (answer.status !== 401) throw refused;
    // Another request may have been given a new key meanwhile.
    if (sessionStorage.getItem(KEY) === key && !(await obtainKey())) throw refused;
  }
}

async function send(path, key, body, accept, signal) {
  const headers = { Accept: accept };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  try {
    return await fetch(new URL(path, BASE), { ...options, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    if (signal?.aborted) throw error;
    listener(0);
    throw new Refusal(0, "The server cannot be reached.");
  }
}

/** Ask the user for a key, once for all requests that want one. */
async function obtainKey() {
  prompting ??= enterKey(hasKey()).finally(() => (prompting = null));
  const key = await prompting;
  if (key) sessionStorage.setItem(KEY, key);
  return key;
}

async function refusal(answer) {
  const wait = Number(answer.headers.get("Retry-After")) || 0;
  const { message, code } = (await answer.json().catch(() => null))?.error ?? {};
  return new Refusal(answer.status, message ?? `The server answered with status ${answer.status}.`, code, wait);
}

/** The events of a Response, parsed. Raises Refusal where they end before the server said that they are complete. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Refusal(0, "The connection ended before the answer did.");
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        if (data) yield parse(data);
      }
    }
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    listener(0);
    throw new Refusal(0, "The connection was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(data) {
  const found = JSON.parse(data);
  if (found.error) throw new Refusal(500, found.error.message, found.error.code);
  return found;
}

/** {base, names}: the base model's name, and all names that a request may give as its model, the base's first. */
export async function models() {
  const { data } = await (await ask("v1/models")).json();
  const base = data.find((entry) => !entry.parent)?.id ?? "";
  return { base, names: [base, ...data.filter((entry) => entry.parent).map((entry) => entry.id)] };
}
