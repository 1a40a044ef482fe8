// Where every task went.

import { search } from "../controls.js";
import { badge, empty, h, name, table, visible } from "../dom.js";
import { number } from "../format.js";
import { link } from "../route.js";

export const title = "Ledger";
export const lead = "Every task drawn ends in exactly one state. Do the sums add up, and why did tasks not train?";

export const controls = ({ parameters }) => [search(parameters, "q", "Environments", "part of a name")];

export async function content({ run, parameters, api, signal }) {
  const all = await api("ledger", {}, signal);
  if (!all.length) return empty("This run has drawn no task yet: it has no ledger.");
  const words = (parameters.get("q") ?? "").toLowerCase();
  const rows = all.filter((b) => b.env.toLowerCase().includes(words));
  const sums = { env: null, balanced: rows.every((b) => b.balanced), reasons: {} };
  const COUNTS = ["drawn", "trained", "filtered", "abandoned", "passed", "open", "restarted"];
  for (const column of COUNTS) sums[column] = rows.reduce((sum, b) => sum + b[column], 0);
  for (const b of rows) for (const [reason, n] of Object.entries(b.reasons)) sums.reasons[reason] = (sums.reasons[reason] ?? 0) + n;
  const reasons = Object.entries(sums.reasons).sort(([, a], [, b]) => b - a);
  return h("div", {},
    table([
      { title: "environment", left: true, cell: (b) => (b.env === null ? h("b", {}, "all") : h("a", { href: link(run, "rollouts", { env: b.env, label: "train" }) }, name(b.env))) },
      ...COUNTS.map((column) => ({ title: column, cell: (b) => number(b[column]) })),
      { title: "drawn = trained + filtered + abandoned + passed + open", left: true, cell: (b) => badge(b.balanced ? "adds up" : "DOES NOT ADD UP", b.balanced ? "good" : "bad") },
    ], [sums, ...rows], "Sums of the ledger"),
    h("h2", {}, "Reasons"),
    reasons.length
      ? table([{ title: "groups", cell: ([, n]) => number(n) }, { title: "reason", class: "wrap", cell: ([reason]) => visible(reason) }], reasons.slice(0, 200), "Reasons")
      : h("p", { class: "hint" }, "Every task that ended has trained."));
}
