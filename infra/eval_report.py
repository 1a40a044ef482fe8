"""What an evaluation found: tables for the terminal, a CSV, and the curve of reward over thinking budget."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from infra.evaluating import Budget, Row
from infra.report import COLOURS
from infra.view import sparkline
from rl_core.evaluation import Bucket


def tables(rows: Sequence[Row]) -> list[str]:
    """Lines: the scores, the curve of each environment, then where it succeeds and where it does not."""
    most = max((k for row in rows for k in row.result.pass_at), default=1)
    wide = most > 1
    head = f"{'environment':<14} {'budget':>7} {'pass@1':>18}" + (f" {f'pass@{most}':>18}" if wide else "")
    lines = [head + f" {'reward':>7} {'thinking':>9} {'closed':>7} {'rollouts':>9} {'masked':>7}"]
    for row in rows:
        r = row.result
        also = f" {spread(r.pass_at[most], r.pass_at_ci95[most]) if most in r.pass_at else '-':>18}" if wide else ""
        lines.append(
            f"{row.env:<14} {named(row.budget):>7} {spread(r.pass_rate, r.ci95):>18}{also} {r.mean_reward:>7.3f} {r.thinking_tokens:>9.1f}"
            f" {r.thoughts_closed:>7.2f} {r.n:>9} {r.masked:>7}"
        )
    for env, mine in by_env(rows).items():
        if len(mine) > 1:
            bars = sparkline([row.result.mean_reward for row in mine], len(mine))
            lines += ["", f"{env}: reward {bars} at budgets {', '.join(named(row.budget) for row in mine)}"]
        for title, pick in (("difficulty", lambda row: row.result.by_difficulty), ("tokens read", lambda row: row.result.by_length)):
            lines += buckets(env, title, [(row.budget, pick(row)) for row in mine])
    return lines


def buckets(env: str, title: str, columns: Sequence[tuple[Budget, Mapping[str, Bucket]]]) -> list[str]:
    """A pass rate for each bucket and budget; nothing where there is but one bucket."""
    names = list(dict.fromkeys(name for _, found in columns for name in found))
    if len(names) < 2:
        return []
    lines = ["", f"{f'{env} by {title}':<30} " + " ".join(f"{named(budget):>10}" for budget, _ in columns)]
    for name in names:
        cells = (f"{found[name].pass_rate:.0%} /{found[name].n}" if name in found else "-" for _, found in columns)
        lines.append(f"  {name:<28} " + " ".join(f"{cell:>10}" for cell in cells))
    return lines


def named(budget: Budget) -> str:
    return "none" if budget is None else str(budget)


def spread(value: float, interval: tuple[float, float]) -> str:
    """0.5, (0.4, 0.6) -> "50.0% [40, 60]"."""
    return f"{value:.1%} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def by_env(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.env, []).append(row)
    return found


def to_csv(rows: Sequence[Row]) -> str:
    """One line for each environment and budget."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ks = sorted({k for row in rows for k in row.result.pass_at})
    intervals = [name for k in ks for name in (f"pass@{k}", f"pass@{k}_low", f"pass@{k}_high")]
    writer.writerow(
        ["env", "budget", "reward", "reward_low", "reward_high", "thinking_tokens", "thoughts_closed", "n", "masked", *intervals]
    )
    for row in rows:
        r = row.result
        scores = [value for k in ks for value in ((r.pass_at[k], *r.pass_at_ci95[k]) if k in r.pass_at else ("", "", ""))]
        head = [row.env, named(row.budget), r.mean_reward, *r.reward_ci95, r.thinking_tokens, r.thoughts_closed, r.n, r.masked]
        writer.writerow([*head, *scores])
    return out.getvalue()


def draw(rows: Sequence[Row], path: Path) -> None:
    """Reward over the reasoning tokens that were really used, one line for each environment. Budgets are written at the points."""
    import matplotlib.figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for (env, mine), colour in zip(by_env(rows).items(), COLOURS * len(rows), strict=False):
        ordered = sorted(mine, key=lambda row: row.result.thinking_tokens)
        at, reward = [r.result.thinking_tokens for r in ordered], [r.result.mean_reward for r in ordered]
        low, high = zip(*(r.result.reward_ci95 for r in ordered), strict=True)
        axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(at, reward, marker="o", color=colour, label=env)
        names: dict[tuple[float, float], list[str]] = {}  # budgets that came out the same share a point
        for row, x, y in zip(ordered, at, reward, strict=True):
            names.setdefault((round(x, 1), round(y, 2)), []).append(named(row.budget))
        for place, budgets in names.items():
            axis.annotate(", ".join(budgets), place, textcoords="offset points", xytext=(4, 5), fontsize=8, color=colour)
    axis.set_xlabel("reasoning tokens per rollout (numbers at the points: thinking budget per turn)")
    axis.set_ylabel("mean held-out reward, 95 % interval over tasks")
    axis.set_ylim(-0.02, 1.02)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
