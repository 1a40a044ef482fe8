// Small multiples: one chart for each environment, a page of them at a time, so that two hundred are as quick as four.

import { palette } from "../charts.js";
import { pager } from "../controls.js";
import { empty, h } from "../dom.js";

export const PER_PAGE = 24;

/** Environments that the search finds, in the order asked for. */
export function chosen(summary, parameters) {
  const words = (parameters.get("q") ?? "").toLowerCase();
  const found = summary.environments.filter((e) => e.name.toLowerCase().includes(words));
  const orders = {
    reward: (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity),
    worst: (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity),
    gain: (a, b) => gain(b) - gain(a),
    share: (a, b) => b.share - a.share,
  };
  const order = orders[parameters.get("sort")];
  return order ? [...found].sort(order) : found;
}

const gain = (env) => (env.before && env.after ? env.after.pass_rate - env.before.pass_rate : -Infinity);

/** One page of cards. card(env, i) makes one. */
export function cards(environments, parameters, card) {
  if (!environments.length) return empty("No environment is called that; shorten the search.");
  const offset = Number(parameters.get("offset") ?? 0) || 0;
  return h("div", {},
    h("div", { class: "grid" }, environments.slice(offset, offset + PER_PAGE).map(card)),
    environments.length > PER_PAGE || offset ? pager(offset, PER_PAGE, environments.length, "environments") : null);
}

/** The environments of the page that is shown. */
export const pageOf = (environments, parameters) => {
  const offset = Number(parameters.get("offset") ?? 0) || 0;
  return environments.slice(offset, offset + PER_PAGE);
};

/** The x of a policy version, on the axis that is shown; versions before the first step are at 0. */
export function xOf(series, axis, version) {
  if (axis === "steps") return version;
  const i = series.steps.findIndex((step) => step >= version);
  if (version === 0 || !series.steps.length) return 0;
  return series[axis][i === -1 ? series.steps.length - 1 : i];
}

/** Raw and smoothed line of one metric. */
export function linesOf(series, metric, label, i) {
  const raw = series.values[metric];
  if (!raw) return [];
  const smooth = series.smooth[metric];
  const line = { label, values: smooth ?? raw, colour: palette(i) };
  return smooth ? [{ label: `${label}, each step`, values: raw, colour: palette(i), faint: true }, line] : [line];
}
