"""curves.png and report.html: what a run showed, drawn from its store alone. Both can be drawn again at any time.

report.html is one file without scripts or links: styles and pictures are within it. Everything that came from the policy is
escaped: a rollout is hostile text.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from infra.dashboard.feed import moving_mean, read_state
from infra.run_state import EnvState, RunState, Score
from infra.view import clock, number, visible
from rl_core.run_store import StoredRun

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette: told apart by people with any kind of colour vision."""

SMOOTHING = 9
"""Steps in the moving average; one step has few rollouts of one environment."""

SAMPLES_PER_ENVIRONMENT = 2
MAX_SAMPLE_CHARACTERS = 1500
"""Of each message of a sample rollout; a document of the long_context environment has thousands."""


def write_report(run: StoredRun, state: RunState | None = None) -> Path:
    """Draw both files into the run's folder; returns the path of report.html. `state` is the run's, where it is known already."""
    state = state or read_state(run)
    picture = draw_curves(state)
    (run.run_dir / "curves.png").write_bytes(picture)
    path = run.run_dir / "report.html"
    path.write_text(render_html(run, state, picture), encoding="utf-8")
    return path


def draw_curves(state: RunState) -> bytes:
    """One panel for each environment: reward in training, held-out pass rate with 95 % intervals. A PNG."""
    import matplotlib.figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    environments = list(state.environments.values())
    columns = min(2, max(1, len(environments)))
    rows = max(1, -(-len(environments) // columns))
    figure = matplotlib.figure.Figure(figsize=(5.6 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for i, axis in enumerate(axes.flat):
        if i >= len(environments):
            axis.set_visible(False)
            continue
        draw_environment(axis, environments[i], COLOURS[i % len(COLOURS)], last_step=max(state.steps, state.version, 1))
        if i // columns == rows - 1:
            axis.set_xlabel("policy version (optimizer steps)")
        if i % columns == 0:
            axis.set_ylabel("reward")
    figure.suptitle(f"{_plain(state.run)}: reward by environment, one asynchronous run", fontsize=11)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def draw_environment(axis: Any, env: EnvState, colour: str, *, last_step: int) -> None:
    """One panel."""
    points = env.points("reward")
    if points:
        x, y = [p[0] for p in points], [p[1] for p in points]
        axis.plot(x, y, color=colour, alpha=0.25, linewidth=1, label="train, each step")
        axis.plot(x, moving_mean(np.array(y), SMOOTHING), color=colour, linewidth=2, label=f"train, mean of {SMOOTHING} steps")
    scores = env.scores
    if scores:
        middle = [s.pass_rate for s in scores]
        below = [max(0.0, s.pass_rate - s.ci95[0]) for s in scores]
        above = [max(0.0, s.ci95[1] - s.pass_rate) for s in scores]
        axis.errorbar(
            [s.version for s in scores], middle, yerr=[below, above], color="black", marker="o", markersize=4, capsize=4, linewidth=1,
            linestyle="--", label="held-out, 95 % interval",
        )  # fmt: skip
    title = _plain(env.name) + ("" if env.before is None else f": held-out {env.before.pass_rate:.0%}")
    axis.set_title(title + (f" → {env.after.pass_rate:.0%}" if env.before and env.after else ""), fontsize=10)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlim(-0.02 * last_step, 1.02 * last_step)
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if points or scores:
        axis.legend(fontsize=7, loc="lower right", frameon=False)


def _plain(name: str) -> str:
    """A name as Matplotlib draws it: no surrogates, which it refuses, and no formula between dollars."""
    return visible(name).replace("$", r"\$")


def render_html(run: StoredRun, state: RunState, picture: bytes) -> str:
    """The whole page."""
    figures = state.to_json()
    image = base64.b64encode(picture).decode("ascii")
    outcome = run.state + (f": {state.reason}" if state.reason else "")
    parts = [
        f"<h1>{_text(run.id)}</h1>",
        f"<p class='lead'>{_text(outcome)}. {state.version} of {state.steps} steps"
        f"{f' in {clock(state.seconds)}' if state.seconds is not None else ''}; environments: {_text(', '.join(state.environments))}.</p>",
        f"<img alt='Reward curves by environment' src='data:image/png;base64,{image}'>",
        "<h2>Held-out tasks, before and after</h2>",
        _before_after(state),
        "<h2>Invariants, as measured in this run</h2>",
        _invariants(figures),
        "<h2>Mixture: groups trained</h2>",
        _mixture(state),
        "<h2>Speculation with the MTP head</h2>",
        _speculation(state),
        "<h2>Speed</h2>",
        _speed(figures),
        *_notes(state),
        "<h2>Sample rollouts</h2>",
        *_samples(run, list(state.environments)),
        "<h2>Config</h2>",
        f"<details><summary>config.yaml</summary><pre>{_text(_config(run))}</pre></details>",
    ]
    return PAGE.format(title=_text(f"polyrl {run.id}"), body="\n".join(parts))


def _before_after(state: RunState) -> str:
    rows = []
    for env in state.environments.values():
        gain = "" if env.gain is None else f"{100 * env.gain:+.1f}"
        tasks = next((str(s.n) for s in (env.after, env.before) if s), "")
        rows.append([env.name, _score(env.before), _score(env.after), gain, tasks])
    return _table(["environment", "before", "after", "points", "tasks"], rows) + (
        "<p>Pass rate with its 95 % Wilson interval; the same tasks and the same dice before and after.</p>"
    )


def _invariants(figures: dict[str, Any]) -> str:
    staleness, agreement = figures["staleness"], figures["logprob_agreement_nats"]
    rows = [
        ["largest staleness of a trained token, policy versions", _figure(staleness["max"], ".0f"), f"at most {staleness['bound']}"],
        ["engine against learner, mean |logprob difference|, nats", _figure(agreement["mean"], ".2e"), "below 1e-4 in float32"],
        ["the same, worst publication", _figure(agreement["worst_mean"], ".2e"), "the run stops at 2e-2"],
        ["the same, worst token", _figure(agreement["max"], ".2e"), ""],
    ]
    return _table(["", "measured", "wanted"], rows)


def _mixture(state: RunState) -> str:
    rows = [
        [
            e.name,
            f"{e.share:.1%}",
            _figure(e.last("share"), ".1%"),
            _figure(e.last("groups_trained"), ".0f"),
            _figure(e.last("groups_filtered"), ".0f"),
        ]
        for e in state.environments.values()
    ]
    return _table(["environment", "share requested", "share trained", "groups trained", "groups filtered (no signal)"], rows)


def _speculation(state: RunState) -> str:
    rows = []
    for env in state.environments.values():
        acceptance, per_step = env.values("mtp_acceptance"), env.values("tokens_per_engine_step")
        rows.append(
            [
                env.name,
                _mean(acceptance[:10], ".1%"),
                _mean(acceptance[-10:], ".1%"),
                _mean(per_step[:10], ".2f"),
                _mean(per_step[-10:], ".2f"),
            ]
        )
    return _table(["environment", "accepted, first 10 steps", "last 10", "tokens per engine step, first 10", "last 10"], rows)


def _speed(figures: dict[str, Any]) -> str:
    rows = [
        ["sampled by the engines, tokens/s (median step)", _figure(figures["tokens_per_s"]["sampled"], ",.0f")],
        ["trained by the learner, tokens/s (median step)", _figure(figures["tokens_per_s"]["trained"], ",.0f")],
        ["sequences stand still for a weight update, ms (median)", _figure(figures["pause_ms"]["median"], ".0f")],
        ["training, without start and evaluation", clock(figures["training_seconds"])],
    ]
    return _table(["", ""], rows)


def _notes(state: RunState) -> list[str]:
    if not state.notes:
        return []
    return ["<h2>Notes</h2>", "<ul>", *(f"<li>{_text(note)}</li>" for note in state.notes), "</ul>"]


def _samples(run: StoredRun, envs: Sequence[str]) -> list[str]:
    """Rollouts of the same held-out tasks, before and after; of all environments at once, since a question reads every segment."""
    rows = run.sql(
        "SELECT env, label, rollout_id, reward, status, messages, min_version, seconds FROM rollouts WHERE label IN ('before', 'after') "
        f"QUALIFY row_number() OVER (PARTITION BY env, label ORDER BY rollout_id) <= {SAMPLES_PER_ENVIRONMENT} ORDER BY rollout_id"
    )
    parts = []
    for env in envs:
        mine = [_sample(label, row) for label in ("before", "after") for row in rows if (row["env"], row["label"]) == (env, label)]
        parts.append("\n".join([f"<h3>{_text(env)}</h3>", *mine]))
    return parts


def _sample(label: str, row: dict[str, Any]) -> str:
    reward = _figure(row["reward"], ".2f")
    turns = [
        f"<div class='turn {_text(m['role'])}'><b>{_text(m['role'])}</b><pre>{_text(_capped(m['content']))}</pre></div>"
        for m in json.loads(row["messages"])
    ]
    head = f"{label}: {row['rollout_id']}, reward {reward}, {row['status']}, policy version {row['min_version']}"
    return f"<details><summary>{_text(head)}</summary>{''.join(turns)}</details>"


def _capped(text: str) -> str:
    if len(text) <= MAX_SAMPLE_CHARACTERS:
        return text
    half = MAX_SAMPLE_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"


def _config(run: StoredRun) -> str:
    path = run.run_dir / "config.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _score(score: Score | None) -> str:
    return "" if score is None else str(score).strip()


def _figure(value: float | None, spec: str) -> str:
    return number(value, spec)


def _mean(values: list[float], spec: str) -> str:
    return format(sum(values) / len(values), spec) if values else "-"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(t)}</th>" for t in titles)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _text(value: object) -> str:
    """Escaped; lone surrogates, which a policy can write, become visible marks that UTF-8 can hold."""
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode("utf-8"))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }} .lead {{ color: #444 }}
img {{ max-width: 100% }} table {{ border-collapse: collapse; margin: .5rem 0 }}
th, td {{ text-align: right; padding: .25rem .8rem; border-bottom: 1px solid #ddd }} th:first-child, td:first-child {{ text-align: left }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; font-size: 13px }}
details {{ margin: .4rem 0 }} summary {{ cursor: pointer }}
.turn {{ border-left: 4px solid #bbb; padding: .1rem .8rem; margin: .4rem 0 }}
.assistant {{ border-color: #0072B2 }} .tool {{ border-color: #E69F00 }}
</style></head><body>
{body}
</body></html>
"""
