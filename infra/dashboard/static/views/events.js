// What the run said: breakers, workers that died, bad steps, evaluations.

import { choice, pager, search } from "../controls.js";
import { badge, empty, h, table, visible } from "../dom.js";
import { clock, date } from "../format.js";

export const title = "Events";
export const lead = "Breakers that opened, workers that died, steps that were skipped, evaluations: all that the run said, newest first.";

const KINDS = { note: "note", phase: "phase", eval: "evaluation", run_started: "start", run_finished: "end" };
const SUBJECTS = [
  ["breaker", /is broken|works again/], ["worker", /worker|engine|actor|host/i], ["learner", /step|gradient|loss|checkpoint|learner/i],
];
const PAGE = 100;

export function controls({ parameters }) {
  return [
    search(parameters, "q", "Text", "part of a sentence"),
    choice(parameters, "kind", "Kind", [["", "all"], ...Object.entries(KINDS)]),
    choice(parameters, "about", "About", [["", "anything"], ["breaker", "breakers"], ["worker", "workers, engines, hosts"], ["learner", "the learner"]]),
  ];
}

const about = (event) => (event.kind === "note" ? SUBJECTS.find(([, words]) => words.test(event.text))?.[0] ?? "note" : KINDS[event.kind]);

export async function content({ parameters, api, signal, summary }) {
  const all = (await api("events", {}, signal)).reverse();
  const words = (parameters.get("q") ?? "").toLowerCase();
  const [kind, subject] = [parameters.get("kind"), parameters.get("about")];
  const found = all.filter((e) => (!kind || e.kind === kind) && (!subject || about(e) === subject) && e.text.toLowerCase().includes(words));
  if (!found.length) return empty(all.length ? "No event is like that. A run without faults has no breaker and no worker event: that is good news." : "This run has said nothing yet.");
  const offset = Number(parameters.get("offset") ?? 0) || 0;
  return h("div", {},
    table([
      { title: "time", left: true, cell: (e) => date(e.time) },
      { title: "since the start", cell: (e) => clock(summary.started ? Math.max(0, e.time - summary.started) : null) },
      { title: "about", left: true, cell: (e) => badge(about(e), about(e) === "breaker" ? "bad" : "") },
      { title: "", class: "wrap", cell: (e) => visible(e.text) },
    ], found.slice(offset, offset + PAGE), "Events"),
    pager(offset, PAGE, found.length, "events"));
}
