// The token view: what the store kept of each token, as colour. What it did not keep is said, not guessed.

import { colour } from "../charts.js";
import { h, plain, visible } from "../dom.js";
import { number } from "../format.js";

const MISSING = {
  ratio: "Importance ratios are not recorded per token: the learner reports their mean, masked share and effective sample size of each step (Staleness view).",
  mask: "Blue may train: the policy sampled it. Struck through was written by us, at a thinking budget, and never trains; nor do prompts and what the environment said. Which sampled tokens the importance rule masked is not recorded per token: their share in each step is in the Staleness view.",
};

export function tokens(row, by) {
  const view = row.tokens;
  if (!view.kept) return h("p", { class: "hint" }, view.why);
  return h("div", {},
    MISSING[by] ? h("p", { class: "hint" }, MISSING[by]) : null,
    by === "version" ? h("p", { class: "hint" }, versionWords(view)) : null,
    view.decoded ? null : h("p", { class: "hint" }, "The run's tokenizer is not on this machine: ids instead of text."),
    view.cut ? h("p", { class: "hint" }, "This rollout is long; its first 50,000 tokens are shown.") : null,
    by === "logprob" ? scale() : null,
    view.completions.map((completion, i) => one(completion, i, view, by)));
}

function versionWords({ versions: [low, high] }) {
  if (low === null) return "No policy version is stored of this rollout.";
  if (low === high) return `Every token was sampled by version ${low}.`;
  return `Sampled by versions ${low} to ${high}: the weights changed while it was under way.`;
}

const scale = () => h("p", { class: "key" }, [[0, "likely"], [-1, "-1 nat"], [-3, "-3"], [-6, "-6 and less"]].map(([value, words]) => {
  const box = h("span", {}, words);
  tint(box, value);
  return box;
}));

function one(completion, i, view, by) {
  const box = h("div", { class: "tokens", tabindex: "0", role: "region", "aria-label": `Tokens of completion ${i + 1}` });
  const prompt = h("details", {}, h("summary", {}, `prompt of completion ${i + 1}: ${completion.prompt.length} tokens`));
  prompt.addEventListener("toggle", () => {
    if (prompt.open && prompt.childElementCount === 1) prompt.append(h("div", { class: "prompt" }, completion.prompt.map((text) => h("span", {}, visible(text)))));
  });
  box.append(prompt, ...completion.tokens.map((text, j) => {
    const logprob = completion.logprobs[j] ?? null;
    const version = completion.versions[j] ?? null;
    const node = h("span", { title: plain(`${JSON.stringify(text)} id ${completion.ids[j]}, logprob ${number(logprob)}, version ${version ?? "unknown"}`) }, visible(text));
    if (by === "logprob" && logprob !== null) tint(node, logprob);
    const forced = completion.forced.includes(j);
    if (forced) node.classList.add("forced");
    if (by === "mask" && !forced) node.style.backgroundColor = `color-mix(in srgb, ${colour("c0")} 25%, transparent)`;
    if (by === "version" && version !== null) node.style.backgroundColor = `color-mix(in srgb, ${colour(`c${version % 6}`)} 30%, transparent)`;
    return node;
  }));
  return box;
}

/** The less likely, the more of the orange. */
function tint(node, logprob) {
  node.style.backgroundColor = `color-mix(in srgb, ${colour("c1")} ${Math.min(70, Math.max(0, -logprob * 12))}%, transparent)`;
}
