// The controls above a view. Each shows one parameter of the address and changes it.

import { h } from "./dom.js";
import { update } from "./route.js";

/** Typing waits a moment; a changed question begins at its first page. */
function changed(name, value, replace = false) {
  update({ [name]: value, page: null, offset: null }, replace);
}

export function search(parameters, name, label, placeholder = "") {
  let timer = 0;
  const input = h("input", { type: "search", name, value: parameters.get(name) ?? "", placeholder, "data-key": name, maxlength: 500 });
  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => changed(name, input.value, true), 250);
  });
  return h("label", {}, label, input);
}

export function choice(parameters, name, label, options, fallback = "") {
  const current = parameters.get(name) ?? fallback;
  const known = options.map((o) => (Array.isArray(o) ? o : [o, o]));
  if (current && !known.some(([value]) => value === current)) known.push([current, current]);
  const select = h("select", { name, "data-key": name }, known.map(([value, text]) => h("option", { value, selected: value === current }, text)));
  select.addEventListener("change", () => changed(name, select.value === fallback ? null : select.value));
  return h("label", {}, label, select);
}

export function figure(parameters, name, label, step = "any") {
  const input = h("input", { type: "number", name, step, value: parameters.get(name) ?? "", "data-key": name });
  input.addEventListener("change", () => changed(name, input.value));
  return h("label", {}, label, input);
}

export function check(parameters, name, label, fallback = false) {
  const on = parameters.has(name) ? parameters.get(name) === "1" : fallback;
  const input = h("input", { type: "checkbox", name, checked: on, "data-key": name });
  input.addEventListener("change", () => changed(name, input.checked === fallback ? null : input.checked ? "1" : "0"));
  return h("label", { class: "check" }, input, label);
}

export const X_AXES = [["steps", "step"], ["time", "time"], ["tokens", "trained tokens"]];

/** What every view of curves has. */
export const axisControls = (parameters) => [
  choice(parameters, "x", "x axis", X_AXES, "steps"),
  choice(parameters, "smooth", "Smoothing", [["1", "none"], ["5", "5 steps"], ["9", "9 steps"], ["25", "25 steps"], ["101", "101 steps"]], "9"),
];

/** Numbers of pages, and links to their neighbours. */
export function pager(offset, limit, total, words) {
  if (total <= limit && offset === 0) return h("p", { class: "pager" }, `${total.toLocaleString("en-US")} ${words}`);
  const to = (target) => () => update({ offset: target || null });
  return h("div", { class: "pager" },
    h("button", { type: "button", disabled: offset === 0, onclick: to(Math.max(0, offset - limit)), "data-key": "previous" }, "Previous"),
    h("span", {}, `${Math.min(offset + 1, total).toLocaleString("en-US")} to ${Math.min(offset + limit, total).toLocaleString("en-US")} of ${total.toLocaleString("en-US")} ${words}`),
    h("button", { type: "button", disabled: offset + limit >= total, onclick: to(offset + limit), "data-key": "next" }, "Next"));
}
