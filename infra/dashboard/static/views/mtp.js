// What speculation with the model's own MTP head brings.

import { lineChart } from "../charts.js";
import { axisControls, choice, search } from "../controls.js";
import { empty, h, name } from "../dom.js";
import { number, percent } from "../format.js";
import { cards, chosen, linesOf, pageOf } from "./grid.js";

export const title = "MTP acceptance";
export const tab = "MTP";
export const lead = "How many of the tokens that the MTP head proposes does the policy accept, and does it stay so while the policy changes?";

const METRICS = [["mtp_acceptance", "accepted / proposed"], ["tokens_per_engine_step", "tokens per forward pass"], ["mtp_loss", "loss of the head, nats"]];

export function controls({ parameters }) {
  return [search(parameters, "q", "Environments", "part of a name"), choice(parameters, "metric", "Metric", METRICS, "mtp_acceptance"), ...axisControls(parameters)];
}

export async function content({ parameters, summary, api, signal }) {
  if (!summary.metrics.includes("env/*/mtp_acceptance")) {
    return empty("No draft token was proposed in this run so far: speculation is off (", h("code", {}, "rollout.speculative_tokens: 0"), "), or nothing has finished yet.");
  }
  const metric = parameters.get("metric") ?? "mtp_acceptance";
  const axis = parameters.get("x") ?? "steps";
  const all = chosen(summary, parameters);
  const envs = pageOf(all, parameters).map((e) => e.name);
  const [series, latest] = await Promise.all([
    api("series", { name: [...envs.map((e) => `env/${e}/${metric}`), "learner/mtp_loss", "learner/mtp_grad_norm"], smooth: parameters.get("smooth") ?? 9, points: 400 }, signal),
    api("latest", { metric: ["mtp_acceptance", "tokens_per_engine_step"] }, signal),
  ]);
  const chart = (key, label, i, unit) => lineChart(label, { x: series[axis], axis, lines: linesOf(series, key, label, i), sync: "mtp", unit, height: 150 });
  return h("div", {},
    cards(all, parameters, (env, i) => h("section", { class: "card" },
      h("div", { class: "card-head" }, h("h3", {}, name(env.name)),
        h("span", { class: "facts" }, `${percent(latest.mtp_acceptance[env.name])} accepted, ${number(latest.tokens_per_engine_step[env.name])} tokens per pass`)),
      series.values[`env/${env.name}/${metric}`] ? chart(`env/${env.name}/${metric}`, metric, i, metric === "mtp_acceptance" ? [0, 1] : null) : h("p", { class: "hint" }, "no value yet"))),
    h("h2", {}, "The head, in training"),
    h("div", { class: "grid wide" }, [["learner/mtp_loss", "loss, nats"], ["learner/mtp_grad_norm", "gradient norm"]].map(([key, label], i) =>
      h("section", { class: "card" }, h("h3", {}, label), series.values[key] ? chart(key, label, i, null) : h("p", { class: "hint" }, "not measured in this run")))));
}
