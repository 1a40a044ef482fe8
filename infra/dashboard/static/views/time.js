// Throughput, and where the time went.

import { colour, lanes, lineChart } from "../charts.js";
import { empty, h } from "../dom.js";
import { clock, percent } from "../format.js";
import { update } from "../route.js";
import { linesOf } from "./grid.js";

export const title = "Where time goes";
export const tab = "Time";
export const lead = "Who waits for whom? Rollouts under way on each engine, what the learner did, what lay in the queue, when sequences stood still for new weights. Drag across the lanes to look closer.";

const PARTS = [["waited", "waits for rollouts", "c4"], ["gradients", "gradients", "c0"], ["proof", "waits for the engines' proof", "c3"], ["optimizer", "optimizer", "c2"]];

export function controls() {
  const move = (change) => () => {
    const [low, high] = current;
    const width = high - low;
    const [from, to] = change(low, high, width);
    update({ start: Math.max(0, from).toFixed(3), end: Math.min(whole, to).toFixed(3) });
  };
  const button = (label, change) => h("button", { type: "button", onclick: move(change) }, label);
  return [
    button("Closer", (a, b, w) => [a + w / 4, b - w / 4]), button("Further", (a, b, w) => [a - w / 2, b + w / 2]),
    button("Earlier", (a, b, w) => [a - Math.min(a, w / 2), b - Math.min(a, w / 2)]), button("Later", (a, b, w) => [a + Math.min(whole - b, w / 2), b + Math.min(whole - b, w / 2)]),
    h("button", { type: "button", onclick: () => update({ start: null, end: null }) }, "Whole run"),
  ];
}

let current = [0, 1];
let whole = 1;

export async function content({ parameters, api, signal, summary }) {
  if (!summary.started) return empty("This run has no events yet.");
  const [line, series] = await Promise.all([
    api("timeline", { start: parameters.get("start"), end: parameters.get("end") }, signal),
    api("series", { name: ["rollout/tokens_per_s", "learner/tokens_per_s", "step/seconds", "sync/pause_ms", "queue/in_flight"], smooth: 9, points: 400 }, signal),
  ]);
  current = line.window;
  whole = line.whole;
  return h("div", {},
    h("h2", {}, "Timeline"),
    h("div", { class: "card" }, lanes("Timeline of phases, engines, queue, learner and publications", line.window, rows(line), { onzoom: (a, b) => update({ start: a.toFixed(3), end: b.toFixed(3) }) })),
    h("p", { class: "key" }, PARTS.map(([, label, c]) => h("span", {}, h("i", { class: `k${c[1]}` }), label)), h("span", {}, h("i", { class: "k1" }), "publication: sequences stand still")),
    h("p", { class: "hint" }, "Engines: rollouts under way, from the stored rollouts' own start and duration, with the time that they spent in their environment's host; hosts have no clock of their own in the store. ",
      line.segments ? "" : "Single steps are drawn once the window holds at most 400 of them: look closer."),
    shares(line),
    h("h2", {}, "Throughput"),
    h("div", { class: "grid wide" }, [["rollout/tokens_per_s", "sampled by all engines, tokens/s"], ["learner/tokens_per_s", "trained, tokens/s"], ["step/seconds", "seconds of a step"],
      ["sync/pause_ms", "pause of a publication, ms"], ["queue/in_flight", "groups in flight"]].filter(([m]) => series.values[m]).map(([m, label], i) =>
      h("section", { class: "card" }, h("h3", {}, label), lineChart(label, { x: series.steps, axis: "steps", lines: linesOf(series, m, label, i), sync: "time", unit: [0], height: 150 })))));
}

function rows(line) {
  const workers = Object.entries(line.workers);
  const listed = workers.slice(0, 16);
  const level = (values, c) => (context, x, height) => {
    const most = Math.max(1e-9, ...values);
    context.fillStyle = colour(c);
    values.forEach((v, i) => context.fillRect(x(line.bins[i]), height - (v / most) * height, x(line.bins[i + 1]) - x(line.bins[i]) + 0.5, (v / most) * height));
  };
  return [
    { title: "phase", height: 22, paint: phases(line.phases) },
    ...listed.map(([worker, values]) => ({ title: `${worker || "engine"}, most ${Math.round(Math.max(0, ...values))}`, height: 34, paint: level(values, "c5") })),
    ...(workers.length > 16 ? [{ title: `${workers.length - 16} more engines`, height: 34, paint: level(line.bins.slice(1).map((_, i) => workers.slice(16).reduce((s, [, v]) => s + v[i], 0)), "c5") }] : []),
    { title: `in flight, most ${Math.max(0, ...line.queue.in_flight)}`, height: 34, paint: queue(line.queue) },
    { title: "learner", height: 26, paint: learner(line.segments) },
    { title: "publication", height: 16, paint: pauses(line.segments) },
  ];
}

const phases = (found) => (context, x, height) => found.forEach((phase, i) => {
  context.globalAlpha = 0.3;
  context.fillStyle = colour(`c${i % 6}`);
  context.fillRect(x(phase.start), 0, x(phase.end) - x(phase.start), height);
  context.globalAlpha = 1;
  context.fillStyle = colour("text");
  const room = x(phase.end) - x(phase.start) - 6;
  if (room > 30) context.fillText(phase.name, x(phase.start) + 3, height / 2, room);
});

const queue = ({ time, in_flight }) => (context, x, height) => {
  const most = Math.max(1e-9, ...in_flight);
  context.strokeStyle = colour("c3");
  context.lineWidth = 1.5;
  context.beginPath();
  time.forEach((t, i) => { if (in_flight[i] !== null) context.lineTo(x(t), height - 2 - (in_flight[i] / most) * (height - 4)); });
  context.stroke();
};

const learner = (segments) => (context, x, height) => (segments ?? []).forEach((step) => {
  let from = step.begin;
  for (const [part, , c] of PARTS) {
    context.fillStyle = colour(c);
    context.fillRect(x(from), 0, Math.max(0.3, x(step[part]) - x(from)), height);
    from = step[part];
  }
});

const pauses = (segments) => (context, x, height) => (segments ?? []).forEach((step) => {
  context.fillStyle = colour("c1");
  context.fillRect(x(step.begin), 0, Math.max(1, x(step.begin + step.pause) - x(step.begin)), height);
});

function shares({ shares: seconds, steps }) {
  const total = PARTS.reduce((sum, [part]) => sum + seconds[part], 0);
  if (!total) return h("p", { class: "hint" }, "No step ended in this window.");
  const bar = h("div", { class: "parts", "aria-hidden": "true" });
  for (const [part, , c] of PARTS) {
    const piece = h("span", { class: `k${c[1]}` });
    piece.style.width = `${(100 * seconds[part]) / total}%`;
    bar.append(piece);
  }
  return h("div", {}, h("h2", {}, `The learner's time, ${steps} steps`), bar,
    h("p", { class: "key" }, PARTS.map(([part, label, c]) => h("span", {}, h("i", { class: `k${c[1]}` }), `${label}: ${clock(seconds[part])}, ${percent(seconds[part] / total)}`)),
      h("span", {}, `sequences stood still: ${clock(seconds.paused)} in all`)));
}
