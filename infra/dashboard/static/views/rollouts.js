// The inspector's list: filtered and paged by the server.

import { choice, figure, pager, search } from "../controls.js";
import { badge, empty, h, name, table } from "../dom.js";
import { clock, number } from "../format.js";
import { link, update } from "../route.js";

export const title = "Rollouts";
export const lead = "What did the policy write, and what was it paid for? Every stored rollout, by environment, step, reward, status, label and text.";

export const FILTERS = ["env", "label", "status", "state", "difficulty", "group", "worker", "text", "min_reward", "max_reward", "min_step", "max_step", "sort"];
const PAGE = 50;

export async function controls({ parameters, api, signal }) {
  const facets = await api("facets", {}, signal);
  const options = (column) => [["", "all"], ...facets[column].map(({ value, n }) => [value, `${value} (${n.toLocaleString("en-US")})`])];
  return [
    choice(parameters, "env", "Environment", options("env")),
    choice(parameters, "label", "Sampled for", options("label")),
    choice(parameters, "status", "Status", options("status")),
    choice(parameters, "state", "Its group", options("state")),
    choice(parameters, "difficulty", "Difficulty", options("difficulty")),
    figure(parameters, "min_reward", "Reward from"), figure(parameters, "max_reward", "to"),
    figure(parameters, "min_step", "Trained in step from", 1), figure(parameters, "max_step", "to", 1),
    search(parameters, "text", "Text", "in conversation or evidence"),
    choice(parameters, "sort", "Order", [["newest", "newest"], ["oldest", "oldest"], ["best", "best reward"], ["worst", "worst reward"], ["longest", "most tokens"], ["slowest", "slowest"]], "newest"),
  ];
}

export async function content({ run, parameters, api, signal }) {
  const offset = Number(parameters.get("offset") ?? 0) || 0;
  const asked = Object.fromEntries(FILTERS.map((f) => [f, parameters.get(f)]));
  const { total, rows } = await api("rollouts", { ...asked, offset, limit: PAGE }, signal);
  const filtered = FILTERS.some((f) => f !== "sort" && parameters.get(f));
  if (!total) {
    return filtered
      ? empty("No rollout is like that. ", h("button", { type: "button", onclick: () => { location.hash = link(run, "rollouts"); } }, "Show all"))
      : empty("No rollout is stored yet; the first appear a few seconds after they finish.");
  }
  return h("div", {},
    parameters.get("group") ? h("p", {}, "Of the group ", h("span", { class: "id" }, name(parameters.get("group"))), " ", h("button", { type: "button", onclick: () => update({ group: null }) }, "all groups")) : null,
    table([
      { title: "rollout", left: true, cell: (r) => h("a", { class: "id", href: link(run, "rollout", { id: r.rollout_id, label: r.label }) }, name(r.rollout_id)) },
      { title: "environment", left: true, cell: (r) => name(r.env) },
      { title: "sampled for", left: true, cell: (r) => r.label },
      { title: "reward", cell: (r) => number(r.reward) },
      { title: "status", left: true, cell: (r) => badge(r.status) },
      { title: "its group", left: true, cell: (r) => (r.state ? [r.state, r.trained === null ? "" : ` in step ${r.trained}`] : "–") },
      { title: "difficulty", left: true, cell: (r) => name(r.difficulty ?? "") },
      { title: "tokens", cell: (r) => number(r.num_sampled_tokens) },
      { title: "versions", cell: (r) => versions(r) },
      { title: "took", cell: (r) => clock(r.seconds) },
      { title: "worker", left: true, cell: (r) => r.worker },
    ], rows, "Rollouts"),
    pager(offset, PAGE, total, "rollouts"));
}

export const versions = (r) => (r.min_version === null ? "–" : r.min_version === r.max_version ? r.min_version : `${r.min_version} to ${r.max_version}`);
