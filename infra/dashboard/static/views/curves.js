// Reward of each environment: in training, held out with intervals, components, the spread over groups.

import { colour, lineChart } from "../charts.js";
import { axisControls, check, choice, search } from "../controls.js";
import { empty, h, name, plain, table } from "../dom.js";
import { number, percent } from "../format.js";
import { link } from "../route.js";
import { cards, chosen, linesOf, pageOf, xOf } from "./grid.js";

export const title = "Curves";
export const lead = "Does each environment's reward rise, in training and on held-out tasks? Points with bars are held-out scores with 95 % intervals; the pale line is each step.";

const perEnvironment = (summary) => summary.metrics.filter((m) => m.startsWith("env/*/")).map((m) => m.slice(6));

export function controls({ parameters, summary }) {
  const metrics = perEnvironment(summary);
  return [
    search(parameters, "q", "Environments", "part of a name"),
    choice(parameters, "metric", "Metric", metrics.length ? metrics : ["reward"], "reward"),
    ...axisControls(parameters),
    choice(parameters, "sort", "Order", [["", "as configured"], ["reward", "best first"], ["worst", "worst first"], ["gain", "most gained"], ["share", "largest share"]]),
    check(parameters, "heldout", "held-out scores", true),
    check(parameters, "band", "band over groups"),
  ];
}

export async function content(context) {
  const { parameters, summary, api, signal } = context;
  if (!summary.environments.length) return empty("This run has no events yet; curves appear with its first step.");
  if (parameters.get("env")) return oneEnvironment(context, parameters.get("env"));
  const metric = parameters.get("metric") ?? "reward";
  const axis = parameters.get("x") ?? "steps";
  const all = chosen(summary, parameters);
  const envs = pageOf(all, parameters).map((e) => e.name);
  const { series, scores, bands } = await ask(api, signal, parameters, envs, envs.map((e) => `env/${e}/${metric}`));
  return cards(all, parameters, (env, i) => {
    const lines = linesOf(series, `env/${env.name}/${metric}`, metric, i);
    const open = new URLSearchParams(parameters);
    open.set("env", env.name);
    return h("section", { class: "card" },
      h("div", { class: "card-head" },
        h("h3", {}, h("a", { href: link(context.run, "curves", open), title: `All curves of ${plain(env.name)}` }, name(env.name))),
        h("span", { class: "facts" }, lines.length ? number(lastOf(lines.at(-1).values)) : "")),
      lines.length || scores[env.name]?.length
        ? lineChart(`${metric} of ${env.name}`, {
          x: series[axis], lines, axis, sync: "curves", unit: isShare(metric) ? [0, 1] : null,
          scores: metric === "reward" || metric === "pass_rate" ? marks(series, axis, scores[env.name]) : [], band: metric === "reward" ? bandOf(series, axis, bands[env.name]) : null,
        })
        : h("p", { class: "hint" }, "no value of this metric yet"),
      h("div", { class: "facts" }, heldOut(env)));
  });
}

/** Series, held-out scores and bands of some environments, together. */
async function ask(api, signal, parameters, envs, names) {
  const [series, scores, bands] = await Promise.all([
    api("series", { name: names, smooth: parameters.get("smooth") ?? 9, points: 400 }, signal),
    parameters.get("heldout") === "0" ? {} : api("scores", { env: envs }, signal),
    parameters.get("band") === "1" ? api("band", { env: envs }, signal) : {},
  ]);
  return { series, scores, bands };
}

const isShare = (metric) => /^(reward|pass_rate|signal_share|share|mtp_acceptance|ess|masked_share|clip_share)$/.test(metric);
const lastOf = (values) => [...values].reverse().find((v) => v !== null) ?? null;

const marks = (series, axis, scores) => (scores?.length
  ? [{ colour: colour("text"), points: scores.map((s) => ({ x: xOf(series, axis, s.version), y: s.pass_rate, low: s.ci95[0], high: s.ci95[1] })) }]
  : []);

const bandOf = (series, axis, band) => (band ? { ...band, x: band.step.map((step) => xOf(series, axis, Math.round(step))) } : null);

function heldOut({ before, after }) {
  if (!before) return "held-out: not measured yet";
  if (!after) return `held-out before: ${percent(before.pass_rate)}`;
  return `held-out ${percent(before.pass_rate)} → ${percent(after.pass_rate)} (${before.n} tasks)`;
}

/** Everything of one environment. */
async function oneEnvironment(context, env) {
  const { parameters, summary, api, signal, run } = context;
  const known = summary.environments.find((e) => e.name === env);
  if (!known) return empty("This run has no environment of that name.");
  const axis = parameters.get("x") ?? "steps";
  const names = (await api("metrics", {}, signal)).filter((m) => m.startsWith(`env/${env}/`));
  const { series, scores, bands } = await ask(api, signal, parameters, [env], names);
  const short = (metric) => metric.slice(env.length + 5);
  const components = names.filter((m) => short(m).startsWith("component/"));
  const others = names.filter((m) => !components.includes(m) && short(m) !== "reward");
  const back = new URLSearchParams(parameters);
  back.delete("env");
  const figure = (label, lines, more = {}) => h("section", { class: "card" }, h("h3", {}, plain(label)), lineChart(label, { x: series[axis], lines, axis, sync: "one", ...more }));
  return h("div", {},
    h("p", { class: "key" }, h("a", { href: link(run, "curves", back) }, "← all environments"), h("a", { href: link(run, "rollouts", { env }) }, "rollouts of this environment")),
    h("h2", {}, name(env)),
    figure("reward", linesOf(series, `env/${env}/reward`, "reward", 0), { height: 320, unit: [0, 1], scores: marks(series, axis, scores[env]), band: bandOf(series, axis, bands[env]), legend: true }),
    components.length ? [h("h2", {}, "Components of the verdict"),
      figure("components, smoothed", components.slice(0, 6).map((m, i) => ({ ...linesOf(series, m, short(m).slice(10), i).at(-1) })), { height: 240, legend: true })] : null,
    heldOutTable(scores[env]),
    h("h2", {}, "Everything measured"),
    h("div", { class: "grid" }, others.map((m) => figure(short(m), linesOf(series, m, short(m), 0), { height: 130 }))));
}

function heldOutTable(scores) {
  if (!scores?.length) return null;
  const buckets = (s) => Object.entries(s.by_difficulty).map(([label, b]) => `${plain(label)} ${percent(b.pass_rate)} (${b.n})`).join("   ");
  return [h("h2", {}, "Held-out scores"),
    table([
      { title: "version", cell: (s) => s.version },
      { title: "pass rate", cell: (s) => percent(s.pass_rate, 1) },
      { title: "95 % interval", cell: (s) => `${percent(s.ci95[0], 1)} to ${percent(s.ci95[1], 1)}` },
      { title: "tasks", cell: (s) => s.n },
      { title: "by difficulty", left: true, cell: buckets },
    ], scores, "Held-out scores")];
}
