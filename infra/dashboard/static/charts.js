// Charts: lines by uPlot, the rest by hand. A chart draws itself once it has a width, and again when the width or the theme changes.

import { h, plain } from "./dom.js";
import { number } from "./format.js";

/** A colour of the style sheet, as the theme has it now. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
export const palette = (i) => colour(`c${i % 6}`);

/** An element that calls draw(width, element) when it is laid out; draw returns how to take the drawing away again. */
function drawn(label, height, draw) {
  const element = h("div", { class: "chart", role: "img", "aria-label": label });
  element.style.minHeight = `${height}px`;
  let remove = null;
  let width = 0;
  const paint = () => {
    remove?.();
    remove = draw(width, element) ?? null;
  };
  const observer = new ResizeObserver(() => {
    const now = Math.floor(element.clientWidth);
    if (!element.isConnected) {
      observer.disconnect();
      window.removeEventListener("themechange", paint);
      remove?.();
      remove = null;
    } else if (now > 20 && now !== width) {
      width = now;
      paint();
    }
  });
  observer.observe(element);
  window.addEventListener("themechange", paint);
  return element;
}

const AXIS_WORDS = { steps: "policy version", time: "time", tokens: "trained tokens" };

function shortX(axis, value) {
  if (axis === "time") return value >= 7200 ? `${Number((value / 3600).toFixed(1))} h` : value >= 120 ? `${Number((value / 60).toFixed(1))} min` : `${value} s`;
  return value >= 1e6 ? `${Number((value / 1e6).toFixed(2))}M` : value >= 1e4 ? `${Number((value / 1e3).toFixed(1))}k` : String(value);
}

/**
 * Lines over one x. data: {x: [...], lines: [{label, values, colour, faint?, dash?, width?}], scores?: [{points: [{x, y, low, high}], colour}],
 * band?: {x, low, q1, q3, high}, axis, unit?: [min, max], height?, sync?, legend?}
 */
export function lineChart(label, data) {
  const height = data.height ?? 170;
  const last = data.lines.map((line) => `${line.label}: ${number([...line.values].reverse().find((v) => v !== null) ?? null)}`);
  return drawn(plain(`${label}. ${last.slice(0, 6).join(", ")}`), height, (width, element) => {
    const plot = new uPlot(options(width, height, data), [data.x, ...data.lines.map((line) => line.values)], element);
    return () => plot.destroy();
  });
}

function options(width, height, data) {
  const soft = colour("soft");
  const axis = { stroke: soft, grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  return {
    width, height,
    padding: [8, 10, 0, 0],
    legend: { show: data.legend ?? false, live: true },
    cursor: { sync: data.sync ? { key: data.sync } : undefined, drag: { x: true, y: false }, points: { size: 5 } },
    scales: { x: { time: false, range: xRange(data) }, y: { range: (plot, low, high) => yRange(data, low, high) } },
    axes: [
      { ...axis, size: 28, values: (plot, ticks) => ticks.map((t) => shortX(data.axis, t)) },
      { ...axis, size: 46, values: (plot, ticks) => ticks.map((t) => number(t)) },
    ],
    series: [
      { label: AXIS_WORDS[data.axis] ?? data.axis, value: (plot, v) => (v === null ? "–" : shortX(data.axis, Number(v.toPrecision(6)))) },
      ...data.lines.map((line) => ({
        label: plain(line.label), stroke: line.colour, width: line.width ?? (line.faint ? 1 : 2), alpha: line.faint ? 0.35 : 1,
        dash: line.dash, spanGaps: true, points: { show: data.x.length < 3, size: 4 }, value: (plot, v) => number(v),
      })),
    ],
    hooks: {
      drawClear: data.band ? [(plot) => drawBand(plot, data.band, data.lines[0]?.colour ?? palette(0))] : [],
      draw: data.scores ? [(plot) => data.scores.forEach((s) => drawScores(plot, s))] : [],
    },
  };
}

function xRange(data) {
  const ends = [...(data.scores ?? []).flatMap((s) => s.points.map((p) => p.x)), ...(data.band?.x ?? [])];
  return (plot, low, high) => {
    const all = [...ends, ...(data.x.length ? [low, high] : [])].filter((v) => v !== null && Number.isFinite(v));
    if (!all.length) return [0, 1];
    const [from, to] = [Math.min(...all), Math.max(...all)];
    return from === to ? [from - 1, to + 1] : [from, to];
  };
}

function yRange(data, low, high) {
  const extra = [...(data.scores ?? []).flatMap((s) => s.points.flatMap((p) => [p.low, p.high])), ...(data.band ? [...data.band.low, ...data.band.high] : [])];
  const all = [low, high, ...extra, ...(data.unit ?? [])].filter((v) => v !== null && v !== undefined && Number.isFinite(v));
  if (!all.length) return [0, 1];
  const [from, to] = [Math.min(...all), Math.max(...all)];
  const room = (to - from || Math.abs(to) || 1) * 0.05;
  return [from - room, to + room];
}

function drawBand(plot, band, stroke) {
  const area = (low, high, alpha) => {
    const context = plot.ctx;
    context.save();
    context.beginPath();
    context.rect(plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height);
    context.clip();
    context.beginPath();
    band.x.forEach((x, i) => context.lineTo(plot.valToPos(x, "x", true), plot.valToPos(low[i], "y", true)));
    for (let i = band.x.length - 1; i >= 0; i--) context.lineTo(plot.valToPos(band.x[i], "x", true), plot.valToPos(high[i], "y", true));
    context.globalAlpha = alpha;
    context.fillStyle = stroke;
    context.fill();
    context.restore();
  };
  area(band.low, band.high, 0.08);
  area(band.q1, band.q3, 0.16);
}

function drawScores(plot, { points, colour: stroke }) {
  const context = plot.ctx;
  const ratio = devicePixelRatio;
  const at = (p, value) => [plot.valToPos(p.x, "x", true), plot.valToPos(value, "y", true)];
  context.save();
  context.strokeStyle = context.fillStyle = stroke;
  context.lineWidth = 1.2 * ratio;
  context.setLineDash([4 * ratio, 4 * ratio]);
  context.beginPath();
  points.forEach((p) => context.lineTo(...at(p, p.y)));
  context.stroke();
  context.setLineDash([]);
  for (const p of points) {
    context.beginPath();
    context.moveTo(...at(p, p.low));
    context.lineTo(...at(p, p.high));
    context.stroke();
    context.beginPath();
    context.arc(...at(p, p.y), 3.2 * ratio, 0, 2 * Math.PI);
    context.fill();
  }
  context.restore();
}

/** An SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Bars of counts: bars [{label, value}], drawn by hand. */
export function barChart(label, bars, { height = 170, colour: fill = "c0", unit = "" } = {}) {
  const text = plain(`${label}. ${bars.map((b) => `${b.label}: ${number(b.value)}`).slice(0, 30).join(", ")}`);
  return drawn(text, height, (width, element) => {
    const top = Math.max(1e-12, ...bars.map((b) => b.value));
    const [left, bottom] = [46, 22];
    const step = (width - left - 8) / Math.max(1, bars.length);
    const every = Math.ceil(46 / step);
    const picture = svg("svg", { width, height, "aria-hidden": "true" });
    const words = (x, y, value, anchor) => {
      const node = svg("text", { x, y, "text-anchor": anchor, "font-size": 11, fill: colour("soft") });
      node.textContent = value;
      return node;
    };
    for (const part of [0, 0.5, 1]) {
      const y = 8 + (1 - part) * (height - bottom - 8);
      picture.append(svg("line", { x1: left, x2: width - 8, y1: y, y2: y, stroke: colour("line") }), words(left - 6, y + 4, number(part * top), "end"));
    }
    bars.forEach((bar, i) => {
      const size = (bar.value / top) * (height - bottom - 8);
      const box = svg("rect", { x: left + i * step + 1, y: height - bottom - size, width: Math.max(1, step - 2), height: size, fill: colour(bar.colour ?? fill), rx: 2 });
      const hint = svg("title");
      hint.textContent = `${bar.label}: ${number(bar.value)} ${unit}`;
      box.append(hint);
      picture.append(box);
      if (i % every === 0) picture.append(words(left + (i + 0.5) * step, height - 7, bar.label, "middle"));
    });
    element.append(picture);
    return () => picture.remove();
  });
}

/** A bar within a table: a share of one, and a mark where it was wished to be. */
export function shareBar(share, wish, most) {
  const bar = h("span", { class: "bar", "aria-hidden": "true" });
  const fill = h("i");
  fill.style.width = `${Math.min(100, (100 * (share ?? 0)) / most)}%`;
  bar.append(fill);
  if (wish !== null) {
    const mark = h("b");
    mark.style.left = `${Math.min(100, (100 * wish) / most)}%`;
    bar.append(mark);
  }
  return bar;
}

/** Lanes over common time, on a canvas: paint(context, x, width) of each lane draws it at its own height. */
export function lanes(label, window_, rows, { onzoom } = {}) {
  const total = rows.reduce((sum, row) => sum + row.height + 8, 24);
  return drawn(label, total, (width, element) => {
    const canvas = h("canvas");
    const ratio = devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = total * ratio;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${total}px`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const left = Math.min(150, width / 4);
    const x = (time) => left + ((time - window_[0]) / (window_[1] - window_[0])) * (width - left - 6);
    context.font = "11px system-ui, sans-serif";
    let y = 4;
    for (const row of rows) {
      context.fillStyle = colour("soft");
      context.textBaseline = "middle";
      context.fillText(plain(row.title).slice(0, 22), 0, y + row.height / 2, left - 8);
      context.fillStyle = colour("hover");
      context.fillRect(left, y, width - left - 6, row.height);
      context.save();
      context.beginPath();
      context.rect(left, y, width - left - 6, row.height);
      context.clip();
      context.translate(0, y);
      row.paint(context, x, row.height);
      context.restore();
      y += row.height + 8;
    }
    context.fillStyle = colour("soft");
    for (let i = 0; i <= 6; i++) {
      const time = window_[0] + (i / 6) * (window_[1] - window_[0]);
      context.textAlign = i === 6 ? "right" : i === 0 ? "left" : "center";
      context.fillText(`${number(time, 4)} s`, x(time), total - 9);
    }
    if (onzoom) zoomByDrag(canvas, left, (pixel) => window_[0] + ((pixel - left) / (width - left - 6)) * (window_[1] - window_[0]), onzoom);
    element.append(canvas);
    return () => canvas.remove();
  });
}

function zoomByDrag(canvas, left, timeAt, onzoom) {
  let from = null;
  canvas.addEventListener("pointerdown", (event) => { from = event.offsetX; });
  canvas.addEventListener("pointerup", (event) => {
    if (from !== null && Math.abs(event.offsetX - from) > 8) {
      const ends = [from, event.offsetX].map((p) => timeAt(Math.max(left, p))).sort((a, b) => a - b);
      onzoom(...ends);
    }
    from = null;
  });
}
