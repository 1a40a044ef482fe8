// Requested against trained shares.

import { lineChart, palette, shareBar } from "../charts.js";
import { choice, search } from "../controls.js";
import { empty, h, name, table } from "../dom.js";
import { number, percent } from "../format.js";
import { chosen } from "./grid.js";

export const title = "Mixture";
export const lead = "Is the mixture that trained the one that was asked for? Shares are of groups trained since the run began; the mark in a bar is the wish.";

export function controls({ parameters }) {
  return [
    search(parameters, "q", "Environments", "part of a name"),
    choice(parameters, "sort", "Order", [["", "as configured"], ["share", "largest share"], ["off", "furthest from the wish"]]),
  ];
}

export async function content({ parameters, summary, api, signal }) {
  if (!summary.environments.length) return empty("This run has no events yet.");
  const [latest, totals] = await Promise.all([
    api("latest", { metric: ["share", "groups_trained", "groups_filtered"], window: 1 }, signal),
    api("totals", { metric: ["trained_tokens"] }, signal),
  ]);
  const tokens = Object.values(totals.trained_tokens).reduce((sum, n) => sum + n, 0);
  const rows = chosen(summary, parameters).map((env) => ({
    env: env.name, wish: env.share, share: latest.share[env.name], trained: latest.groups_trained[env.name],
    filtered: latest.groups_filtered[env.name], tokens: totals.trained_tokens[env.name],
  }));
  const distance = (row) => Math.abs((row.share ?? 0) - row.wish);
  if (parameters.get("sort") === "off") rows.sort((a, b) => distance(b) - distance(a));
  const most = Math.max(1e-9, ...rows.flatMap((r) => [r.share ?? 0, r.wish]));
  const furthest = [...rows].sort((a, b) => distance(b) - distance(a)).slice(0, 6);
  const series = await api("series", { name: furthest.map((r) => `env/${r.env}/share`), points: 500 }, signal);
  return h("div", {},
    table([
      { title: "environment", left: true, cell: (r) => name(r.env) },
      { title: "", cell: (r) => shareBar(r.share, r.wish, most) },
      { title: "requested", cell: (r) => percent(r.wish, 1) },
      { title: "trained, groups", cell: (r) => percent(r.share, 1) },
      { title: "trained, tokens", cell: (r) => percent(tokens ? (r.tokens ?? 0) / tokens : null, 1) },
      { title: "groups trained", cell: (r) => number(r.trained) },
      { title: "filtered", cell: (r) => number(r.filtered) },
    ], rows, "Shares of the environments"),
    h("h2", {}, "Share of groups trained, by step"),
    h("p", { class: "hint" }, rows.length > 6 ? "The six environments that are furthest from the wish; dashed is the wish." : "Dashed is the wish."),
    h("div", { class: "card" }, lineChart("Share of groups trained", {
      x: series.steps, axis: "steps", height: 260, legend: true,
      lines: furthest.flatMap((r, i) => [
        { label: r.env, values: series.values[`env/${r.env}/share`] ?? series.steps.map(() => null), colour: palette(i) },
        { label: `${r.env}, requested`, values: series.steps.map(() => r.wish), colour: palette(i), dash: [5, 4], width: 1 },
      ]),
    })));
}
