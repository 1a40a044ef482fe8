// The shell: address --> view --> content, and again whenever the server says that something changed.
//
// A view is a module with: title, lead, controls(context) --> elements, content(context) --> element.
// Controls stay while the view is shown; the content is made anew, and takes the place of the old one once it is whole.

import { get, ofRun } from "./api.js";
import { badge, h, plain, visible } from "./dom.js";
import { link, parse } from "./route.js";
import * as compare from "./views/compare.js";
import * as curves from "./views/curves.js";
import * as events from "./views/events.js";
import * as ledger from "./views/ledger.js";
import * as mixture from "./views/mixture.js";
import * as mtp from "./views/mtp.js";
import * as rollout from "./views/rollout.js";
import * as rollouts from "./views/rollouts.js";
import * as runs from "./views/runs.js";
import * as staleness from "./views/staleness.js";
import * as time from "./views/time.js";

const OF_A_RUN = { curves, mixture, staleness, mtp, time, events, ledger, rollouts, rollout };
const OF_ALL = { runs, compare };
const TABS = ["curves", "mixture", "staleness", "mtp", "time", "events", "ledger", "rollouts"];

const $ = (id) => document.getElementById(id);
let shown = "";
let waiting = null;
let stream = null;
let streamOf = null;

/** Draw what the address says. `live`: because of news, so that nothing the reader holds may move. */
async function show(live = false) {
  waiting?.abort();
  const mine = (waiting = new AbortController());
  const { run, view, parameters } = parse();
  const module = (run ? OF_A_RUN : OF_ALL)[view];
  if (!module) return fail(`There is no view called ${plain(view)}.`);
  follow(run);
  const context = { run, parameters, signal: mine.signal, api: run ? ofRun(run) : get, live };
  $("content").classList.toggle("waiting", !live);
  try {
    if (run) context.summary = await context.api("", {}, mine.signal);
    const where = `${run}/${view}`;
    if (shown !== where) {
      head(run, view, module, context);
      $("controls").replaceChildren(...(await (module.controls?.(context) ?? [])));
      $("content").replaceChildren();
      shown = where;
    }
    if (run) state(context.summary);
    const content = await module.content(context);
    if (mine.signal.aborted) return undefined;
    $("error").hidden = true;
    keepFocus(() => $("content").replaceChildren(content));
    $("main").dataset.ready = location.hash;
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
  } finally {
    if (waiting === mine) $("content").classList.remove("waiting");
  }
  return undefined;
}

function fail(sentence) {
  $("error").textContent = plain(sentence);
  $("error").hidden = false;
  $("main").dataset.ready = location.hash;
}

function head(run, view, module, context) {
  const title = typeof module.title === "function" ? module.title(context) : module.title;
  $("title").replaceChildren(...visible(title));
  $("lead").textContent = module.lead ?? "";
  document.title = plain(`${title}${run ? ` · ${run}` : ""} · polyrl`);
  $("run-name").replaceChildren(...(run ? visible(run) : []));
  $("run-state").replaceChildren();
  const current = view === "rollout" ? "rollouts" : view;
  $("tabs").replaceChildren(...(run ? TABS : []).map((name) =>
    h("a", { href: link(run, name), "aria-current": name === current ? "page" : null }, OF_A_RUN[name].tab ?? OF_A_RUN[name].title)));
  window.scrollTo(0, 0);
}

function state(summary) {
  const step = summary.steps ? ` step ${summary.step} of ${summary.steps}` : "";
  $("run-state").replaceChildren(badge(summary.state), step, summary.state === "running" && summary.phase ? h("span", { class: "hint" }, ` ${plain(summary.phase)}`) : "");
}

/** New content takes the place of the old; whoever held a link or a button with the keyboard still does. */
function keepFocus(swap) {
  const key = (element) => element?.getAttribute("data-key") ?? element?.getAttribute("href");
  const held = $("content").contains(document.activeElement) ? key(document.activeElement) : null;
  const height = $("content").offsetHeight;
  $("content").style.minHeight = `${height}px`;
  swap();
  if (held) [...$("content").querySelectorAll("[data-key], a[href]")].find((e) => key(e) === held)?.focus({ preventScroll: true });
  requestAnimationFrame(() => { $("content").style.minHeight = ""; });
}

/** Listen for news of one run, or of the folder of runs. */
function follow(run) {
  if ((stream && streamOf === run) || document.hidden) return;
  stream?.close();
  streamOf = run;
  stream = new EventSource(`api/stream${run ? `?run=${encodeURIComponent(run)}` : ""}`);
  let first = true;
  let due = 0;
  const status = (on) => {
    $("live").className = on ? "on" : "off";
    $("live").textContent = on ? "live" : "not connected";
  };
  stream.addEventListener("open", () => status(true));
  stream.addEventListener("error", () => status(false));
  stream.addEventListener("tick", () => {
    if (first) {
      first = false; // what the page has just asked for
      return;
    }
    clearTimeout(due);
    due = setTimeout(() => {
      const { run: now, view } = parse();
      if (now === run && !(OF_A_RUN[view] ?? OF_ALL[view])?.still) show(true);
    }, 200);
  });
}

// A browser keeps few connections to one server: a page that nobody sees gives its own back.
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) {
    show(true);
  } else {
    stream?.close();
    stream = null;
  }
});

const THEMES = ["auto", "light", "dark"];
function theme(choice) {
  const dark = choice === "dark" || (choice === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.classList.toggle("dark", dark);
  $("theme").textContent = `Theme: ${choice}`;
  window.dispatchEvent(new Event("themechange"));
}
const remembered = () => (THEMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "auto");
$("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(remembered()) + 1) % THEMES.length];
  localStorage.setItem("theme", next);
  theme(next);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(remembered()));
theme(remembered());

window.addEventListener("addresschange", () => show());
window.addEventListener("popstate", () => {
  shown = ""; // the controls are those of another address
  show();
});
window.addEventListener("hashchange", () => {
  if ($("main").dataset.ready !== location.hash) {
    shown = "";
    show();
  }
});
show();
