// Several runs over the same environments: one chart per environment, one colour per run.

import { get, ofRun } from "../api.js";
import { lineChart, palette } from "../charts.js";
import { axisControls, choice, search } from "../controls.js";
import { empty, h, name, table } from "../dom.js";
import { percent } from "../format.js";
import { link, update } from "../route.js";
import { cards, pageOf } from "./grid.js";

export const title = "Comparison";
export const lead = "Which run learned more, and where? Up to six runs, each with the same colour in every chart.";
const MOST = 6;

export async function controls({ parameters, signal }) {
  const { runs } = await get("runs", {}, signal);
  const picked = parameters.getAll("run");
  const boxes = runs.slice(0, 60).map(({ run }) => {
    const box = h("input", { type: "checkbox", checked: picked.includes(run) });
    box.addEventListener("change", () => {
      const now = new Set(new URLSearchParams(location.hash.split("?")[1] ?? "").getAll("run"));
      now[box.checked ? "add" : "delete"](run);
      update({ run: [...now].slice(-MOST) });
    });
    return h("label", { class: "check" }, box, name(run));
  });
  return [
    h("details", { open: picked.length < 2 }, h("summary", {}, "Runs to compare"), boxes),
    search(parameters, "q", "Environments", "part of a name"),
    choice(parameters, "metric", "Metric", ["reward", "pass_rate", "tokens_per_s", "mtp_acceptance", "entropy", "mismatch_kl", "staleness_mean", "share"], "reward"),
    ...axisControls(parameters),
  ];
}

export async function content({ parameters, signal }) {
  const picked = parameters.getAll("run").slice(0, MOST);
  if (!picked.length) return empty("Choose at least one run above, or mark some in the ", h("a", { href: "#/runs" }, "list of runs"), ".");
  const metric = parameters.get("metric") ?? "reward";
  const axis = parameters.get("x") ?? "steps";
  const words = (parameters.get("q") ?? "").toLowerCase();
  const summaries = await Promise.all(picked.map((run) => ofRun(run)("", {}, signal)));
  const names = [...new Set(summaries.flatMap((s) => s.environments.map((e) => e.name)))].filter((n) => n.toLowerCase().includes(words));
  const all = names.map((n) => ({ name: n }));
  const envs = pageOf(all, parameters).map((e) => e.name);
  const series = await Promise.all(picked.map((run) =>
    ofRun(run)("series", { name: envs.map((e) => `env/${e}/${metric}`), smooth: parameters.get("smooth") ?? 9, points: 300 }, signal)));
  return h("div", {},
    h("p", { class: "key" }, picked.map((run, i) => h("span", {}, h("i", { class: `k${i}` }), h("a", { href: link(run, "curves") }, name(run))))),
    cards(all, parameters, (env) => h("section", { class: "card" }, h("h3", {}, name(env.name)), joined(env.name, metric, axis, picked, series))),
    h("h2", {}, "Held-out pass rates, before → after"),
    table([
      { title: "environment", left: true, cell: (n) => name(n) },
      ...summaries.map((s, i) => ({ title: name(picked[i]), cell: (n) => scores(s, n) })),
    ], names.slice(0, 500), "Held-out pass rates"));
}

function scores(summary, env) {
  const known = summary.environments.find((e) => e.name === env);
  return known?.before ? `${percent(known.before.pass_rate, 1)} → ${percent(known.after?.pass_rate, 1)}` : "–";
}

/** The runs have their own x each; uPlot joins them. */
function joined(env, metric, axis, picked, series) {
  const key = `env/${env}/${metric}`;
  const have = series.map((s, i) => ({ i, x: s[axis], y: s.smooth[key] ?? s.values[key] })).filter((s) => s.y && s.x.length && s.x[0] !== null);
  if (!have.length) return h("p", { class: "hint" }, "no value of this metric yet");
  const [x, ...columns] = uPlot.join(have.map((s) => [s.x, s.y]));
  const lines = have.map((s, j) => ({ label: picked[s.i], values: columns[j].map((v) => v ?? null), colour: palette(s.i), dash: s.i % 2 ? [7, 3] : undefined }));
  return lineChart(`${metric} of ${env}`, { x, lines, axis, sync: "compare", unit: metric === "reward" || metric === "pass_rate" ? [0, 1] : null });
}
