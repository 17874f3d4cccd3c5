// One answer as it is written: its text, how fast it came, and what to do where the server refuses.

import { ask, events, Refusal } from "./api.js";
import { button, duration, make, number, say } from "./dom.js";

const MOST_TRIES = 5;
const BUSY = {
  queue_full: "The server is full.",
  key_limit: "This key has all the requests under way that it may have.",
  draining: "The server is shutting down.",
};
const ENDS = { length: "stopped at the token limit", stopped: "stopped", failed: "broken off" };

/** stats: {tokens, seconds, first, rate, end}; first: seconds to the first token; rate: tokens a second after it. */
export class Answer {
  /** grown: called after the text was shown longer; again: asks the same anew, for the button of a failed answer. */
  constructor({ grown = () => {}, again = null } = {}) {
    this.text = "";
    this.stats = null;
    this.grown = grown;
    this.again = again;
    this.body = make("div", { class: "text" });
    this.notice = make("div", { class: "notice", hidden: true });
    this.meta = make("p", { class: "meta" });
    this.element = make("div", { class: "answer" }, this.body, this.notice, this.meta);
  }

  /** Write the answer to a request, trying again where the server is full. aloud: whether screen readers get it. */
  async run(body, signal, aloud = true) {
    this.started = performance.now();
    this.aloud = aloud;
    this.element.setAttribute("aria-busy", "true");
    this.waiting = setInterval(() => this.#tick(), 100);
    let end = "stop";
    try {
      end = await this.#attempts(body, signal);
    } catch (error) {
      end = signal.aborted ? "stopped" : "failed";
      if (!signal.aborted) this.#fail(error);
    } finally {
      clearInterval(this.waiting);
      this.element.removeAttribute("aria-busy");
      this.#finish(end);
    }
  }

  /** Show an answer that was given before. */
  restore(text, stats) {
    this.text = text;
    this.stats = stats;
    this.#paint();
    this.meta.textContent = describe(stats);
  }

  async #attempts(body, signal) {
    for (let tries = 1; ; tries++) {
      try {
        return await this.#stream(body, signal);
      } catch (error) {
        const full = error instanceof Refusal && [429, 503].includes(error.status) && !this.text;
        if (!full || tries === MOST_TRIES) throw error;
        await this.#pause(error, signal);
      }
    }
  }

  async #stream(body, signal) {
    this.sent = performance.now();
    this.first = this.last = null;
    this.chunks = 0;
    this.usage = null;
    let end = "stop";
    const answer = await ask("v1/chat/completions", { body, accept: "text/event-stream", signal });
    for await (const chunk of events(answer)) {
      this.usage = chunk.usage ?? this.usage;
      const choice = chunk.choices?.[0];
      end = choice?.finish_reason ?? end;
      if (choice?.delta?.content) this.#add(choice.delta.content);
    }
    return end;
  }

  #add(text) {
    this.last = performance.now();
    this.first ??= this.last;
    this.chunks += 1;
    this.text += text;
    if (this.aloud) say(text);
    // Many tokens may come between two frames.
    this.frame ??= requestAnimationFrame(() => this.#paint());
  }

  #paint() {
    this.frame = null;
    this.body.replaceChildren(...blocks(this.text));
    this.grown();
  }

  #tick() {
    const seconds = (performance.now() - this.started) / 1000;
    if (this.first) this.meta.textContent = `${this.chunks} tokens, ${number(this.#rate(this.chunks))} tokens/s`;
    else if (this.notice.hidden && seconds > 0.4) this.meta.textContent = `Waiting for the first token, ${duration(seconds)}`;
  }

  #rate(tokens) {
    return this.last > this.first ? ((tokens - 1) * 1000) / (this.last - this.first) : 0;
  }

  /** Wait as long as the server asks for, or until the user wants to try at once. */
  #pause(refusal, signal) {
    const until = performance.now() + 1000 * Math.max(1, refusal.retryAfter);
    const words = make("span");
    return new Promise((resolve, reject) => {
      const go = (settle) => {
        clearInterval(clock);
        signal.removeEventListener("abort", stop);
        this.notice.hidden = true;
        settle();
      };
      const stop = () => go(() => reject(signal.reason));
      const count = () => {
        const left = Math.ceil((until - performance.now()) / 1000);
        if (left <= 0) go(resolve);
        else words.textContent = `${BUSY[refusal.code] ?? sentence(refusal.message)} Trying again in ${left} s.`;
      };
      const clock = setInterval(count, 250);
      signal.addEventListener("abort", stop);
      this.#show(words, button("Try now", () => go(resolve)));
      count();
      say(`${words.textContent} `);
    });
  }

  #fail(error) {
    const words = make("span", {}, sentence(error.message));
    this.#show(words, this.again && button("Try again", this.again));
    this.notice.classList.add("bad");
    say(`${words.textContent} `);
  }

  #show(...content) {
    this.meta.textContent = "";
    this.notice.classList.remove("bad");
    this.notice.replaceChildren(...content.filter(Boolean));
    this.notice.hidden = false;
  }

  #finish(end) {
    if (this.frame) cancelAnimationFrame(this.frame);
    const now = performance.now();
    const tokens = this.usage?.completion_tokens ?? this.chunks ?? 0;
    this.stats = {
      tokens,
      cached: this.usage?.prompt_tokens_details?.cached_tokens ?? 0,
      seconds: (now - this.started) / 1000,
      first: this.first ? (this.first - this.sent) / 1000 : null,
      rate: this.first ? this.#rate(tokens) : 0,
      end,
    };
    this.#paint();
    this.meta.textContent = describe(this.stats);
  }
}

/** An answer's figures in words. */
export function describe(stats) {
  if (!stats.tokens) return ENDS[stats.end] ?? "no text";
  const parts = [stats.tokens === 1 ? "1 token" : `${number(stats.tokens)} tokens`];
  if (stats.rate) parts.push(`${number(stats.rate)} tokens/s`);
  if (stats.first !== null) parts.push(`first token ${duration(stats.first)}`);
  if (ENDS[stats.end]) parts.push(ENDS[stats.end]);
  return parts.join(" · ");
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}`.replace(/[^.!?]$/, "$&.");

/** Paragraphs and fenced code as elements; everything else stays as it was written. */
function blocks(text) {
  return text.split(/^```/m).map((part, i) => {
    if (i % 2 === 0) return make("span", {}, i ? part.replace(/^\n/, "") : part);
    const line = part.indexOf("\n");
    return make("pre", {}, make("code", {}, line < 0 ? "" : part.slice(line + 1)));
  });
}
