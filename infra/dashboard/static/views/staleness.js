// How old trained tokens were, and how far engine and learner differed on them.

import { barChart, lineChart, palette } from "../charts.js";
import { choice } from "../controls.js";
import { empty, h } from "../dom.js";
import { number } from "../format.js";
import { linesOf } from "./grid.js";

export const title = "Staleness and mismatch";
export const tab = "Staleness";
export const lead = "How old were the tokens that trained, and how far did the policy that sampled them differ from the one that learned from them?";

const FIGURES = [
  ["staleness_mean", "mean staleness, policy versions"], ["staleness_max", "largest staleness"], ["mismatch_kl", "mismatch, KL(behaviour, train), nats"],
  ["ratio_mean", "mean importance ratio"], ["ess", "effective sample size, share"], ["masked_share", "tokens that the importance rule masked or capped, share"],
  ["clip_share", "tokens at the clip range, share"], ["entropy", "entropy, nats"],
];

export function controls({ parameters, summary }) {
  return [choice(parameters, "env", "Environment", [["", "all together"], ...summary.environments.map((e) => e.name)])];
}

export async function content({ parameters, summary, api, signal }) {
  if (!summary.environments.length) return empty("This run has no events yet.");
  const env = parameters.get("env") ?? "";
  const prefix = env ? `env/${env}/` : "learner/";
  const sync = ["sync/logprob_error_mean", "sync/logprob_error_max"];
  const [counts, series, spread] = await Promise.all([
    api("staleness", {}, signal),
    api("series", { name: [...FIGURES.map(([m]) => prefix + m), ...sync], points: 400, smooth: 9 }, signal),
    api("histogram", { name: [`${prefix}mismatch_kl`], log: true, bins: 24 }, signal),
  ]);
  const sums = new Map();
  for (const row of counts) if (!env || row.env === env) sums.set(row.staleness, (sums.get(row.staleness) ?? 0) + row.tokens);
  const bars = [...sums].sort(([a], [b]) => a - b).map(([label, value]) => ({ label: String(label), value, colour: label > (summary.max_staleness ?? Infinity) ? "c1" : "c0" }));
  const kl = spread.counts[`${prefix}mismatch_kl`] ?? [];
  const bins = kl.map((value, i) => ({ label: spread.edges[i].toExponential(0), value }));
  const figure = (metric, label, i) => h("section", { class: "card" }, h("h3", {}, label),
    series.values[metric] ? lineChart(label, { x: series.steps, axis: "steps", lines: linesOf(series, metric, label, i), sync: "staleness", height: 140 }) : h("p", { class: "hint" }, "not measured in this run"));
  return h("div", {},
    h("div", { class: "grid wide" },
      h("section", { class: "card" }, h("h3", {}, "Sampled tokens by staleness of their rollout's oldest token"),
        bars.length ? barChart("Tokens by staleness in policy versions", bars, { unit: "tokens" }) : h("p", { class: "hint" }, "nothing has trained yet"),
        h("p", { class: "facts" }, `policy versions; the bound of this run is ${summary.max_staleness ?? "not set"}`)),
      h("section", { class: "card" }, h("h3", {}, "Steps by mismatch"),
        bins.length ? barChart("Steps by mismatch KL", bins, { colour: "c2", unit: "steps" }) : h("p", { class: "hint" }, "not measured yet"),
        h("p", { class: "facts" }, `KL(behaviour, train) of a step's batch, nats, logarithmic; ${number(spread.not_positive[`${prefix}mismatch_kl`] ?? 0)} steps at zero. Single tokens are not recorded.`))),
    h("h2", {}, "By step"),
    h("div", { class: "grid" }, FIGURES.map(([m, label], i) => figure(prefix + m, label, i))),
    h("h2", {}, "Under the same weights: engine against learner"),
    h("div", { class: "grid wide" }, figure(sync[0], "mean |logprob difference| of the probes, nats; the run stops at 0.02", 0), figure(sync[1], "largest of one token, nats", 1)));
}
