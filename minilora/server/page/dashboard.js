// The dashboard view: GET /stats as a stream, once a second, while somebody looks.

import { ask, events } from "./api.js";
import { bytes, duration, find, make, number, percent } from "./dom.js";

const HISTORY = 60;
const SVG = "http://www.w3.org/2000/svg";
const TILES = [
  ["running", "Running", (s) => number(s.running), null],
  ["waiting", "Waiting", (s) => number(s.waiting), null],
  ["generation", "Generated tokens/s", (s) => number(s.tokens_per_s.generation), (s) => s.tokens_per_s.generation],
  ["prompt", "Prompt tokens/s", (s) => number(s.tokens_per_s.prompt), (s) => s.tokens_per_s.prompt],
  ["kv", "KV cache in use", (s) => percent(s.kv_cache_usage), null],
  ["prefix", "Prefix cache hits", (s) => percent(s.prefix_cache_hit_rate), null],
];
const LATENCIES = [
  ["time_to_first_token", "Time to first token"],
  ["inter_token_latency", "Between tokens"],
  ["e2e_request_latency", "Whole request"],
];

const tiles = {};
let watching = null;
let onState = () => {};

function makeTiles() {
  for (const [id, title, , rate] of TILES) {
    const value = make("dd", { id: `tile-${id}` }, "–");
    const line = rate ? document.createElementNS(SVG, "svg") : null;
    const bar = id === "kv" ? make("meter", { min: 0, max: 1, high: 0.9, low: 0.7, optimum: 0, "aria-label": title }) : null;
    line?.setAttribute("viewBox", `0 0 ${HISTORY - 1} 20`);
    line?.setAttribute("preserveAspectRatio", "none");
    line?.setAttribute("aria-hidden", "true");
    line?.append(document.createElementNS(SVG, "polygon"), document.createElementNS(SVG, "polyline"));
    tiles[id] = { value, line, bar, history: [] };
    find("tiles").append(make("dl", { class: "card tile" }, make("dt", {}, title), value, line ?? bar));
  }
}

function show(stats) {
  onState(stats.state);
  find("board-notice").hidden = true;
  for (const [id, , text, rate] of TILES) {
    tiles[id].value.textContent = text(stats);
    if (rate) draw(tiles[id], rate(stats));
  }
  tiles.kv.bar.value = stats.kv_cache_usage;
  find("facts").textContent = [stats.model, `${stats.threads} threads`, `up ${duration(stats.uptime)}`, `version ${stats.version}`].join(" · ");
  find("latencies").replaceChildren(...LATENCIES.map(([id, title]) => row(title, ["p50", "p95", "p99"].map((p) => duration(stats.latency[id][p])), id)));
  find("adapters").replaceChildren(...adapterRows(stats));
}

function draw({ line, history }, value) {
  history.push(value);
  if (history.length > HISTORY) history.shift();
  const top = Math.max(1, ...history);
  const points = history.map((y, i) => `${HISTORY - history.length + i},${(19 - (18 * y) / top).toFixed(1)}`);
  line.lastChild.setAttribute("points", points.join(" "));
  line.firstChild.setAttribute("points", [`${HISTORY - history.length},20`, ...points, `${HISTORY - 1},20`].join(" "));
}

const row = (title, cells, id) => make("tr", { "data-row": id }, make("th", { scope: "row" }, title), ...cells.map((cell) => make("td", {}, cell)));

function adapterRows({ adapters, adapters_registered: registered }) {
  const rest = registered - adapters.length;
  const words = registered === 0 ? "None is registered." : rest ? `${number(rest)} more are registered.` : null;
  const rows = adapters.map((a) => {
    const state = make("span", { class: `state ${a.state}` }, a.state);
    const used = a.last_used === null ? "–" : `${duration(Math.max(0, Date.now() / 1000 - a.last_used))} ago`;
    return row(a.name, [state, a.rank || "–", bytes(a.bytes), a.running, a.waiting, a.requests, used], a.name);
  });
  return words ? [...rows, make("tr", {}, make("td", { colspan: 8, class: "words" }, words))] : rows;
}

async function watch(signal) {
  for (let pause = 1; !signal.aborted; pause = Math.min(10, 2 * pause)) {
    try {
      const answer = await ask("stats", { accept: "text/event-stream", signal });
      for await (const stats of events(answer)) {
        show(stats);
        pause = 1;
      }
    } catch (error) {
      if (signal.aborted) return;
      // Without a key there is nothing to watch until the user has given one.
      if (error.status === 401) watching = null;
      if (error.status === 401) return;
      pause = Math.max(pause, error.retryAfter ?? 0);
      find("board-notice").textContent = `${error.message} Trying again in ${pause} s.`;
      find("board-notice").hidden = false;
    }
    await new Promise((resolve) => setTimeout(resolve, 1000 * pause));
  }
}

/** Follow the figures or leave them: nobody is served who does not look. */
export function setWatching(wanted) {
  if (wanted === (watching !== null)) return;
  watching?.abort();
  watching = wanted ? new AbortController() : null;
  if (watching) watch(watching.signal);
}

/** Bring the view to life. heard: called with the server's state whenever it is told. */
export function startDashboard(heard) {
  onState = heard;
  makeTiles();
}
