// The inspector: asks for the engine's state twice a second while it is looked at, and draws it.

import { ApiError, getJson } from "./api.js";
import { byId, make, plural } from "./dom.js";
import { drawBlocks, drawRates, drawSteps } from "./drawing.js";

const INTERVAL = 500; // milliseconds
const SPAN = 120_000;
const MOST_ROWS = 64;

export class Inspector {
  constructor() {
    this.isShown = false;
    this.state = null;
    this.points = []; // of the rates: {at, values: [generated, prompts]}
    this.before = null;
    this.isStarted = false;
    window.addEventListener("resize", () => this.redraw());
  }

  start() {
    if (!this.isStarted) this.look();
    this.isStarted = true;
  }

  async look() {
    if (this.isShown && !document.hidden) {
      try {
        this.take(await getJson("inspector/state"));
        byId("inspector-note").textContent = "";
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        byId("inspector-note").textContent = error.message;
        this.before = null;
      }
    }
    setTimeout(() => this.look(), INTERVAL);
  }

  take(state) {
    const at = performance.now();
    const { num_output_tokens_total: generated, num_prompt_tokens_total: prompts } = state.stats;
    if (this.before && at - this.before.at < 4 * INTERVAL) {
      const seconds = (at - this.before.at) / 1000;
      const values = [(generated - this.before.generated) / seconds, (prompts - this.before.prompts) / seconds];
      this.points.push({ at, values: values.map((value) => Math.max(0, value)) });
    }
    this.before = { at, generated, prompts };
    this.points = this.points.filter((point) => at - point.at < SPAN);
    this.state = state;
    this.redraw();
  }

  redraw() {
    if (!this.state || !this.isShown) return;
    const { engine, stats, steps, blocks, block_stride: stride } = this.state;
    this.showFigures(engine, stats);
    drawSteps(byId("steps"), steps, engine.max_num_batched_tokens);
    drawRates(byId("rates"), this.points, performance.now(), SPAN, ["decode", "prefill"]);
    drawBlocks(byId("blocks"), blocks);
    const shown = stride > 1 ? `, one of ${stride} shown` : "";
    byId("blocks-note").textContent = `${plural(stats.num_blocks, "block")} of ${engine.block_size} tokens${shown}`;
    this.showRequests(stats);
  }

  showFigures(engine, stats) {
    const recent = this.points.slice(-4).map((point) => point.values);
    const mean = (k) => (recent.length ? recent.reduce((sum, values) => sum + values[k], 0) / recent.length : 0);
    const used = stats.num_blocks - stats.num_free_blocks;
    const figures = [
      ["Running", stats.num_running, `of ${engine.max_num_seqs}`],
      ["Waiting", stats.num_waiting, plural(stats.num_preemptions_total, "preemption")],
      ["Generated", Math.round(mean(0)).toLocaleString("en"), "tokens/s"],
      ["Prompts", Math.round(mean(1)).toLocaleString("en"), "tokens/s"],
      ["KV cache", percent(used, stats.num_blocks), `${used.toLocaleString("en")} of ${plural(stats.num_blocks, "block")}`],
      ["Prefix hits", percent(stats.num_cache_hits_total, stats.num_cache_queries_total), `${stats.num_cache_hits_total.toLocaleString("en")} tokens`],
      ["Steps", stats.num_steps_total.toLocaleString("en"), `budget ${plural(engine.max_num_batched_tokens, "token")}`],
      ["Engine", engine.device.split(" (")[0], stats.is_recovering ? "starts a new worker" : stats.num_worker_restarts_total ? plural(stats.num_worker_restarts_total, "worker restart") : `${engine.dtype}, version ${engine.version}`],
    ];
    byId("figures").replaceChildren(...figures.map(([name, value, note]) => make("div", { class: "figure" }, make("span", {}, name), make("strong", { "data-figure": name }, String(value)), make("small", {}, note))));
  }

  showRequests(stats) {
    const { requests } = this.state;
    const rows = requests.slice(0, MOST_ROWS).map(row);
    if (!rows.length) rows.push(make("tr", {}, make("td", { colspan: "9", class: "none" }, "Nothing to do.")));
    byId("requests").replaceChildren(...rows);
    const more = stats.num_running + stats.num_waiting - Math.min(requests.length, MOST_ROWS);
    byId("requests-note").textContent = more > 0 ? `and ${more.toLocaleString("en")} more` : "";
  }
}

function row(request) {
  const output = request.num_known_tokens - request.num_prompt_tokens;
  const whole = request.num_prompt_tokens + request.max_tokens;
  const bar = make("div", { class: "progress", title: `${request.num_computed_tokens} computed, at most ${whole}` }, make("i", { class: "prefill" }), make("i", { class: "decode" }));
  const share = (tokens) => `${(100 * tokens) / whole}%`;
  bar.children[0].style.width = share(Math.min(request.num_computed_tokens, request.num_prompt_tokens));
  bar.children[1].style.width = share(Math.max(0, request.num_computed_tokens - request.num_prompt_tokens));
  const cells = [request.num_prompt_tokens, request.num_cached_tokens, output, request.priority, request.num_preemptions].map((value) => make("td", { class: "number" }, value.toLocaleString("en")));
  return make("tr", {}, make("td", {}, `${request.client}·${request.number}`), make("td", {}, make("span", { class: `state ${request.status}` }, request.status)), make("td", { class: "grow" }, bar), ...cells, make("td", { class: "number" }, `${request.age_s.toFixed(1)} s`));
}

const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(part && part < whole ? 1 : 0)} %` : "–");
