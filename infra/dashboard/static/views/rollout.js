// One rollout: conversation, tool calls, code, verdict with evidence, tokens. All of it is text of a policy, shown as text.

import { choice } from "../controls.js";
import { badge, h, name, plain, table, visible } from "../dom.js";
import { clock, date, number } from "../format.js";
import { link } from "../route.js";
import { versions } from "./rollouts.js";
import { tokens } from "./tokens.js";

export const title = "Rollout";
export const lead = "";
export const still = true; // it never changes once it is stored

const LONG = 6000;
/** Characters of a message that are shown at once. */

export function controls({ parameters }) {
  return [choice(parameters, "colour", "Colour tokens by", [["logprob", "logprob"], ["version", "policy version"], ["ratio", "importance ratio"], ["mask", "mask"], ["none", "nothing"]], "logprob")];
}

export async function content({ run, parameters, api, signal }) {
  const row = await api("rollout", { id: parameters.get("id"), label: parameters.get("label") }, signal);
  return h("div", {},
    h("p", { class: "key" }, h("a", { href: link(run, "rollouts", { env: row.env }) }, "← rollouts of ", name(row.env)), h("span", { class: "id" }, name(row.rollout_id))),
    siblings(run, row),
    h("div", { class: "two" },
      h("div", {}, h("h2", {}, "Conversation"), conversation(row), h("h2", {}, "Tokens"), tokens(row, parameters.get("colour") ?? "logprob")),
      h("div", {}, verdict(row), facts(row), task(row))));
}

/** The other attempts at the same task, in one line. */
function siblings(run, row) {
  if (row.siblings.length < 2) return null;
  return h("p", { class: "key" }, "Its group: ", row.siblings.map((s) => h("a", {
    href: link(run, "rollout", { id: s.rollout_id, label: s.label }), "aria-current": s.rollout_id === row.rollout_id ? "true" : null, title: plain(s.rollout_id),
  }, s.rollout_id === row.rollout_id ? h("b", {}, number(s.reward)) : number(s.reward))), h("a", { href: link(run, "rollouts", { group: row.group_id, label: row.label }) }, "as a list"));
}

function conversation(row) {
  const turns = [...(row.turns ?? [])];
  return (row.messages ?? []).map((message) => {
    const turn = message.role === "assistant" ? turns.shift() : null;
    return h("div", { class: `turn ${/^[a-z]+$/.test(message.role) ? message.role : ""}` }, h("b", {}, visible(message.role)), body(message.content), turn ? structure(turn) : null);
  });
}

/** Text, with what stands between three backticks as code; a long one is cut until it is asked for. */
function body(text) {
  const whole = String(text ?? "");
  const parts = (shown) => shown.split("```").map((part, i) => (part ? h("pre", { class: i % 2 ? "code" : null }, visible(part)) : null));
  if (whole.length <= LONG) return h("div", {}, parts(whole));
  const box = h("div", {}, parts(whole.slice(0, LONG)));
  box.append(h("button", { type: "button", onclick: () => box.replaceChildren(...parts(whole).filter(Boolean)) }, `Show all ${whole.length.toLocaleString("en-US")} characters`));
  return box;
}

/** What was read out of a turn: thought, calls, and what was malformed. */
function structure(turn) {
  if (!turn.thought && !turn.tool_calls.length && !turn.malformed) return null;
  return h("details", { open: turn.tool_calls.length > 0 || Boolean(turn.malformed) }, h("summary", {}, turn.tool_calls.length ? `as read: ${turn.tool_calls.length} tool call${turn.tool_calls.length > 1 ? "s" : ""}` : "as read"),
    turn.thought ? h("pre", { class: "thought" }, visible(turn.thought)) : null,
    turn.tool_calls.map((call) => h("pre", { class: "call" }, visible(`${call.name}(${JSON.stringify(call.arguments, null, 1)})`))),
    turn.malformed ? h("p", {}, badge("malformed", "bad"), " ", visible(turn.malformed)) : null);
}

function verdict(row) {
  const components = Object.entries(row.components ?? {});
  const evidence = Object.entries(row.evidence ?? {});
  return [h("h2", {}, "Verdict"),
    h("dl", {}, h("dt", {}, "reward"), h("dd", {}, row.reward === null ? "none: masked out of the loss" : number(row.reward)), h("dt", {}, "status"), h("dd", {}, badge(row.status))),
    components.length ? table([{ title: "component", left: true, cell: ([key]) => name(key) }, { title: "value", cell: ([, value]) => number(value) }], components, "Components") : null,
    evidence.length ? [h("h3", {}, "Evidence"), h("dl", {}, evidence.map(([key, value]) => [h("dt", {}, name(key)), h("dd", {}, h("pre", {}, visible(value)))]))] : null];
}

function facts(row) {
  const fate = row.state ? `${row.state}${row.trained === null ? "" : ` in step ${row.trained}`}${row.reason ? `: ${row.reason}` : ""}` : "–";
  const pairs = [
    ["sampled for", row.label], ["group", row.group_id], ["its group", fate], ["task", row.task_key], ["difficulty", row.difficulty || "–"], ["policy versions", versions(row)],
    ["prompt tokens", number(row.num_prompt_tokens)], ["sampled tokens", number(row.num_sampled_tokens)], ["drafted, accepted", `${number(row.drafted)}, ${number(row.accepted)}`],
    ["truncated", row.truncated ? "yes, a budget ended it" : "no"], ["worker", row.worker], ["began", date(row.started_at)], ["took", clock(row.seconds)],
  ];
  return [h("h2", {}, "Facts"), h("dl", {}, pairs.map(([key, value]) => [h("dt", {}, key), h("dd", {}, visible(value))]))];
}

function task(row) {
  if (!row.task) return null;
  const part = (label, value) => h("details", {}, h("summary", {}, label), h("pre", {}, visible(JSON.stringify(value, null, 1))));
  return [h("h2", {}, "Task"), part("what the policy may see", row.task.public), part("what only the verifier sees", row.task.private)];
}
