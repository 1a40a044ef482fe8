"""Words, renderings and good play for the games that ship with Gymnasium itself; the bridge next door serves any other by its spaces.

Good play is computed, not stored: value iteration over the transition table that FrozenLake, CliffWalking and Taxi publish
(`env.unwrapped.P`), and basic strategy for Blackjack (Baldwin et al., 1956, as in Sutton and Barto, example 5.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Plan = Callable[[Any], int]
"""The action of good play for an observation of the game."""

DISCOUNT = 0.999  # below 1, so that of two ways to the goal the shorter one wins
SWEEPS = 2000
SETTLED = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Game:
    """How one game is told to a policy, and scored."""

    actions: tuple[str, ...]  # by the number that Gymnasium gives them
    rules: str
    render: Callable[[Any, Any], str]  # (the unwrapped game, its observation) -> text
    plan: Callable[[Any], Plan]
    scoring: str = "success"
    low: float = 0.0
    high: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)


def value_iteration(game: Any) -> Plan:
    """The best action of every state of a game with a transition table."""
    states, actions = len(game.P), len(game.P[0])
    steps = [[game.P[s][a] for a in range(actions)] for s in range(states)]
    width = max(len(outcomes) for row in steps for outcomes in row)
    chance, target, reward = (np.zeros((states, actions, width)) for _ in range(3))
    for s, row in enumerate(steps):
        for a, outcomes in enumerate(row):
            for k, (p, following, gain, done) in enumerate(outcomes):
                chance[s, a, k], target[s, a, k] = p, -1 if done else following
                reward[s, a, k] = gain
    onward, target = target >= 0, target.astype(int)
    values = np.zeros(states)
    for _ in range(SWEEPS):
        quality = (chance * (reward + DISCOUNT * onward * values[target])).sum(axis=2)
        change, values = np.abs(quality.max(axis=1) - values).max(), quality.max(axis=1)
        if change < SETTLED:
            break
    best = quality.argmax(axis=1)
    return lambda observation: int(best[int(observation)])


def basic_strategy(game: Any) -> Plan:
    """Stand on a hard 17, 13 to 16 against a dealer's 2 to 6, 12 against 4 to 6, a soft 19, and a soft 18 unless against 9 to ace."""
    del game

    def play(observation: Any) -> int:
        total, dealer, soft = (int(part) for part in observation)
        if soft:
            stand = total >= 19 or (total == 18 and 2 <= dealer <= 8)
        else:
            stand = total >= 17 or (total >= 13 and 2 <= dealer <= 6) or (total == 12 and 4 <= dealer <= 6)
        return 0 if stand else 1

    return play


def show_lake(game: Any, observation: Any) -> str:
    rows = [[cell.decode() for cell in row] for row in game.desc]
    rows[int(observation) // game.ncol][int(observation) % game.ncol] = "P"
    return "\n".join("".join(row) for row in rows)


def show_cliff(game: Any, observation: Any) -> str:
    rows, columns = game.shape
    cells = [["."] * columns for _ in range(rows)]
    cells[-1][1:-1] = ["C"] * (columns - 2)
    cells[-1][-1] = "G"
    cells[int(observation) // columns][int(observation) % columns] = "P"
    return "\n".join("".join(row) for row in cells)


def show_taxi(game: Any, observation: Any) -> str:
    row, column, passenger, goal = game.decode(int(observation))
    stands = ("red", "green", "yellow", "blue")
    walls = "\n".join("".join(c.decode() for c in line) for line in game.desc)
    where = "in the taxi" if passenger == 4 else f"at {stands[passenger]}"
    return f"{walls}\nThe taxi is at row {row}, column {column}; the passenger is {where} and wants to go to {stands[goal]}."


def show_blackjack(game: Any, observation: Any) -> str:
    del game
    total, dealer, soft = (int(part) for part in observation)
    return f"You have {total}{' with a usable ace' if soft else ''}; the dealer shows {'an ace' if dealer == 1 else dealer}."


GAMES = {
    "FrozenLake-v1": Game(
        actions=("left", "down", "right", "up"),
        rules="You are P on a frozen lake. Walk to the goal G over frozen cells F and the start S; a hole H ends the game.",
        render=show_lake,
        plan=value_iteration,
        arguments={"is_slippery": False},
    ),
    "CliffWalking-v1": Game(
        actions=("up", "right", "down", "left"),
        rules="You are P. Walk to the goal G; stepping into the cliff C puts you back at the start.",
        render=show_cliff,
        plan=value_iteration,
        scoring="return",
        low=-100.0,  # 87 steps of detour, or one fall
        high=-13.0,  # the shortest way
    ),
    "Taxi-v4": Game(
        actions=("south", "north", "east", "west", "pickup", "dropoff"),
        rules="Drive the taxi to the passenger, pick them up, drive to where they want to go, and drop them off. | and - are walls.",
        render=show_taxi,
        plan=value_iteration,
    ),
    "Blackjack-v1": Game(
        actions=("stick", "hit"),
        rules="Blackjack: come closer to 21 than the dealer, and not above it.",
        render=show_blackjack,
        plan=basic_strategy,
        scoring="return",
        low=-1.0,
        high=1.0,
    ),
}
