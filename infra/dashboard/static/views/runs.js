// Every run of the folder, newest first.

import { badge, empty, h, name, table } from "../dom.js";
import { clock, date, percent } from "../format.js";
import { link } from "../route.js";

export const title = "Runs";
export const lead = "What has run here, how far it came, and what it gained on held-out tasks.";

const marked = new Set();

export async function content({ api, signal }) {
  const { runs, folder } = await api("runs", {}, signal);
  if (!runs.length) {
    return empty("There is no run in ", h("code", {}, folder), " yet. Start one with ", h("code", {}, "polyrl run configs/quickstart.yaml"), "; it appears here by itself.");
  }
  const compare = h("a", { href: "#/compare" }, "Compare the marked runs");
  const aim = () => { compare.href = link(null, "compare", { run: [...marked] }); };
  aim();
  const mark = (run) => {
    const box = h("input", { type: "checkbox", checked: marked.has(run), "aria-label": `Compare ${run}`, "data-key": `mark ${run}` });
    box.addEventListener("change", () => {
      marked[box.checked ? "add" : "delete"](run);
      aim();
    });
    return box;
  };
  return h("div", {},
    h("p", {}, compare),
    table([
      { title: "", left: true, cell: (r) => mark(r.run) },
      { title: "run", left: true, cell: (r) => h("a", { href: link(r.run, "curves"), class: "id" }, name(r.run)) },
      { title: "state", left: true, cell: (r) => badge(r.state) },
      { title: "steps", cell: (r) => [progress(r), ` ${r.step} / ${r.steps}`] },
      { title: "held-out pass rate", cell: scores },
      { title: "environments", cell: (r) => r.environments.length },
      { title: "began", cell: (r) => date(r.started) },
      { title: "took", cell: (r) => clock(r.seconds ?? (r.started && r.updated ? r.updated - r.started : null)) },
      { title: "", left: true, class: "wrap", cell: (r) => r.reason },
    ], runs, "Runs"));
}

const progress = (r) => h("progress", { max: r.steps || 1, value: r.step, "aria-label": "steps done" });

/** Mean over the environments that were measured. */
function scores(r) {
  const mean = (end) => {
    const known = r.environments.filter((e) => e[end]);
    return known.length ? known.reduce((sum, e) => sum + e[end].pass_rate, 0) / known.length : null;
  };
  const [before, after] = [mean("before"), mean("after")];
  return before === null ? "–" : `${percent(before, 1)} → ${percent(after, 1)}`;
}
