"""Gymnasium's environments as environments of ours: any whose actions are discrete numbers or text.

    environments:
      lake: {id: gymnasium, max_turns: 16, options: {env: FrozenLake-v1}}
      dice: {id: gymnasium, options: {env: "my_package:Dice-v0", scoring: return, low: 0, high: 12, actions: [stop, roll]}}

A task is a seed. The observation is told as text, an action is one word of a stated list, alone and exactly; anything else ends the
episode as invalid. The reward, in [0, 1], is one of

    scoring=success   1 if the game ended by itself and its last step paid more than 0, else 0
    scoring=return    (sum of rewards - low) / (high - low), cut off at 0 and 1

Gymnasium's own time limit is `truncated`, scored like any other end; a budget of ours that ends the game earns 0.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, ClassVar

import gymnasium
from gymnasium import spaces

from environments.base import Message, Observation, Status, Task, TaskDraft, TextEnv, Turn, Verdict
from environments.bridges.toy_text import GAMES, Game, Plan
from environments.knobs import OptionError, check_choices, read_knobs

KNOBS: dict[str, Any] = {
    "env": "FrozenLake-v1", "arguments": {}, "actions": [], "rules": "", "scoring": "", "low": 0.0, "high": 0.0, "winnable": True,
}  # fmt: skip
"""env: what gymnasium.make takes. arguments: passed to it. actions: words for the numbers. rules: the first lines of the prompt.
scoring, low, high: see above. winnable: of a game whose good play is known, only seeds on which good play wins; false: all seeds."""

SEEDS = 2**31
MAX_DRAWS = 1000
LONGEST_PLAN = 60
"""Steps: a seed on which good play needs more is no task where luck decides; episodes are of tens of turns."""
MAX_SHOWN = 4000  # characters of one observation
MAX_ACTION = 64  # characters of an action that is text, and of what evidence quotes


class GymnasiumEnv(TextEnv):
    """A Gymnasium environment, its observations told as text and its actions written as words."""

    id: ClassVar[str] = "gymnasium"
    version: ClassVar[str] = "1"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.table = Table.of(options)
        self._game: Any = None
        self._seen: Any = None
        self._steps, self._return, self._last, self._truncated = 0, 0.0, 0.0, False

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        table = Table.of(options)
        seed = next(s for s in table.draws(rng) if table.wins(s))
        return TaskDraft(public={"env": table.env, "arguments": table.arguments, "seed": seed}, difficulty=table.env)

    def begin(self, task: Task) -> Observation:
        self._close_game()
        self._game = self.table.make()
        self._seen = self._game.reset(seed=task.public["seed"])[0]
        self._steps, self._return, self._last, self._truncated = 0, 0.0, 0.0, False
        prompt = f"{self.table.rules}\n{self.table.ask(self._game.action_space)}\n\n{self._show()}".strip()
        return Observation(messages=(Message(role="user", content=prompt),))

    def act(self, turn: Turn) -> Observation | Verdict:
        action, complaint = self.table.read(turn, self._game.action_space)
        if complaint:
            return Verdict(status=Status.INVALID_OUTPUT, reward=0.0, components=self._components(), evidence={"reason": complaint})
        self._seen, gain, terminated, self._truncated, _ = self._game.step(action)
        self._steps, self._last = self._steps + 1, float(gain)
        self._return += self._last
        if not terminated and not self._truncated:
            return Observation(messages=(Message(role="user", content=self._show()),))
        reward = self.table.reward(self._return, self._last, ended=terminated)
        return Verdict(status=Status.OK, reward=reward, components=self._components(), evidence={"return": f"{self._return:g}"})

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        if "verdict" in info and self._truncated:
            terminated, truncated = False, True
        return observation, reward, terminated, truncated, info

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        if self.table.plan is None:
            return super().oracle(observation, rng)
        return Turn(content=self.table.actions[self.table.plan(self._seen)])

    def close(self) -> None:
        self._close_game()

    def _show(self) -> str:
        if self.table.known:
            return self.table.known.render(self._game.unwrapped, self._seen)
        return tell(self._seen)[:MAX_SHOWN]

    def _components(self) -> dict[str, float]:
        return {"return": self._return, "steps": float(self._steps)}

    def _close_game(self) -> None:
        if self._game is not None:
            self._game.close()
            self._game = None


class Table:
    """The options of one environment, checked, and everything that follows from them."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        knobs = read_knobs(GymnasiumEnv.id, KNOBS, options)
        self.env: str = knobs["env"]
        self.known: Game | None = GAMES.get(self.env)
        self.arguments: dict[str, Any] = {**(self.known.arguments if self.known else {}), **knobs["arguments"]}
        self.actions: tuple[str, ...] = tuple(knobs["actions"]) or (self.known.actions if self.known else ())
        self.rules: str = knobs["rules"] or (self.known.rules if self.known else f"This is the game {self.env}.")
        self.scoring: str = knobs["scoring"] or (self.known.scoring if self.known else "success")
        check_choices(GymnasiumEnv.id, "scoring", [self.scoring], ("success", "return"))
        self.low, self.high = knobs["low"], knobs["high"]
        if self.low == self.high and self.known:
            self.low, self.high = self.known.low, self.known.high
        if self.scoring == "return" and not self.low < self.high:
            raise OptionError(
                f"environment 'gymnasium': scoring=return needs the range of the sum of rewards, got low={self.low}, high={self.high}; "
                f"wanted low < high, for example low=-1 and high=1"
            )
        game = self.make()
        check_actions(self.env, game.action_space, self.actions)
        if not self.actions and isinstance(game.action_space, spaces.Discrete):
            first = int(game.action_space.start)
            self.actions = tuple(str(first + i) for i in range(int(game.action_space.n)))
        self.plan: Plan | None = self.known.plan(game.unwrapped) if self.known else None
        self.winnable: bool = knobs["winnable"] and self.known is not None and is_random(game.unwrapped)
        """Whether seeds must be tried; good play wins every seed of a game without chance."""
        self._trial, self._lock = game, threading.Lock()

    @staticmethod
    def of(options: Mapping[str, Any]) -> Table:
        """Made once for the same options: to make a game takes a millisecond, and each task asks."""
        return _table(json.dumps(dict(options), sort_keys=True))

    def make(self) -> Any:
        """A fresh game. Raises OptionError when there is none of this name."""
        try:
            return gymnasium.make(self.env, **self.arguments)
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            raise OptionError(
                f"environment 'gymnasium': gymnasium.make({self.env!r}) raised {type(error).__name__}: {error}; a game of another package "
                f"is written 'module:Name-v0', and some need extras: pip install 'gymnasium[all]'"
            ) from error

    def draws(self, rng: random.Random) -> Iterator[int]:
        """Seeds to try, not for ever."""
        yield from (rng.randrange(SEEDS) for _ in range(MAX_DRAWS))
        raise OptionError(
            f"environment 'gymnasium': good play won none of {MAX_DRAWS} seeds of {self.env}; set winnable=false to play them all"
        )

    def wins(self, seed: int) -> bool:
        """Whether this seed may become a task."""
        if not self.winnable or self.plan is None:
            return True
        with self._lock:
            observation, total, gain, ended = self._trial.reset(seed=seed)[0], 0.0, 0.0, False
            for _ in range(LONGEST_PLAN):
                observation, gain, ended, truncated, _ = self._trial.step(self.plan(observation))
                total += float(gain)
                if ended or truncated:
                    break
        return self.reward(total, float(gain), ended=ended) == 1.0

    def ask(self, space: Any) -> str:
        """How to answer, as the prompt says it."""
        if self.actions:
            return f"Answer with one word and nothing else: {', '.join(self.actions)}."
        return "Answer with your move and nothing else." if isinstance(space, spaces.Text) else "Answer with the numbers of your move."

    def read(self, turn: Turn, space: Any) -> tuple[Any, str]:
        """(action, "") or (None, what is wrong). Exactly one action, and nothing beside it."""
        text = turn.content.strip()
        if turn.malformed or turn.tool_calls:
            return None, turn.malformed or "a tool call where there are no tools"
        if isinstance(space, spaces.Text):
            text = text[: space.max_length + 1]
            return (text, "") if space.contains(text) else (None, f"{text[:MAX_ACTION]!r} is no action of this game")
        if text in self.actions:
            return int(space.start) + self.actions.index(text), ""
        return None, f"{text[:MAX_ACTION]!r} is none of {', '.join(self.actions)}"

    def reward(self, total: float, last: float, *, ended: bool) -> float:
        """The mapping that the docstring of this file states."""
        if self.scoring == "success":
            return float(ended and last > 0)
        return min(1.0, max(0.0, (total - self.low) / (self.high - self.low)))


@lru_cache(maxsize=64)
def _table(options: str) -> Table:
    return Table(json.loads(options))


def is_random(game: Any) -> bool:
    """Whether the same actions may end differently; true where no table says otherwise."""
    table = getattr(game, "P", None)
    return table is None or any(len(outcomes) > 1 for state in table.values() for outcomes in state.values())


def check_actions(env: str, space: Any, words: tuple[str, ...]) -> None:
    """Raise OptionError for a game whose actions cannot be written."""
    if isinstance(space, spaces.Text):
        return
    if not isinstance(space, spaces.Discrete):
        raise OptionError(f"environment 'gymnasium': {env} has the action space {space}; a policy can write Discrete and Text actions only")
    if words and len(set(words)) != int(space.n):
        raise OptionError(f"environment 'gymnasium': {env} has {space.n} actions, and {len(set(words))} different words are given for them")


def tell(observation: Any) -> str:
    """An observation of an unknown game, in numbers and words."""
    if isinstance(observation, str):
        return observation
    if isinstance(observation, Mapping):
        return "\n".join(f"{key}: {tell(value)}" for key, value in observation.items())
    if isinstance(observation, tuple | list):
        return ", ".join(tell(part) for part in observation)
    if hasattr(observation, "tolist"):
        return str(observation.tolist())
    return str(observation)
