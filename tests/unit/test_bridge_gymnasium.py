"""Gymnasium in both directions: its games train as environments of ours, and ours are made by gymnasium.make."""

from __future__ import annotations

import random
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

import environments.bridges.gymnasium_out as gymnasium_out
from environments.bridges.gymnasium_in import GymnasiumEnv
from environments.check import check_environment, play, play_oracle
from rl_core.seams import Observation
from rl_core.types import Status, Task, Turn

GAMES: list[dict[str, Any]] = [
    {"env": "FrozenLake-v1"},
    {"env": "FrozenLake-v1", "arguments": {"is_slippery": True}},
    {"env": "CliffWalking-v1"},
    {"env": "Taxi-v4"},
    {"env": "Blackjack-v1"},
]


class Riddle(gymnasium.Env[dict[str, Any], str]):
    """A text game as others write them: dictionaries to see, text to do, a time limit of its own."""

    def __init__(self) -> None:
        self.observation_space = spaces.Dict({"tries": spaces.Discrete(9), "hint": spaces.Text(20)})
        self.action_space = spaces.Text(8, charset="abcdefghij")

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.word = "abcdefghij"[int(self.np_random.integers(10))] * 3
        return {"tries": 0, "hint": self.word[0]}, {}

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        right = action == self.word
        return {"tries": 1, "hint": self.word[0]}, 5.0 if right else -1.0, right, False, {}


@pytest.fixture(scope="module", autouse=True)
def _riddle() -> None:
    if "Riddle-v0" not in gymnasium.registry:
        gymnasium.register("Riddle-v0", entry_point=Riddle, max_episode_steps=3)


def a_task(seed: int = 0, **options: Any) -> Task:
    return next(GymnasiumEnv.tasks("train", seed, options))


@pytest.mark.parametrize("options", GAMES, ids=lambda o: " ".join(map(str, o.values())))
def test_the_games_of_gymnasium_pass_the_kit(options: dict[str, Any]) -> None:
    results = check_environment(GymnasiumEnv, options, num_tasks=4, second_process=options["env"] == "Blackjack-v1")
    assert not [str(result) for result in results if not result.ok]


def test_value_iteration_walks_the_shortest_way_and_what_is_shown_follows() -> None:
    env = GymnasiumEnv(env="FrozenLake-v1")
    shown: Observation = env.reset(options={"task": a_task()})[1]["observation"]
    assert shown.messages[0].content.endswith("PFFF\nFHFH\nFFFH\nHFFG")
    turn = env.oracle(shown, random.Random(0))
    assert turn.content in ("down", "right")
    after = env.step(turn)[4]["observation"].messages[0].content
    assert after == ("SFFF\nPHFH\nFFFH\nHFFG" if turn.content == "down" else "SPFF\nFHFH\nFFFH\nHFFG")
    verdict = play_oracle(env, a_task())
    assert (verdict.reward, verdict.components["steps"]) == (1.0, 6.0)


def test_winnable_seeds_are_those_that_good_play_wins_and_all_seeds_are_there_for_the_asking() -> None:
    def rewards(**options: Any) -> list[float]:
        env = GymnasiumEnv(env="Blackjack-v1", **options)
        return [play_oracle(env, a_task(seed, env="Blackjack-v1", **options)).reward or 0.0 for seed in range(60)]

    assert set(rewards()) == {1.0}
    every = rewards(winnable=False)
    assert 0.3 < np.mean(every) < 0.65  # basic strategy loses a little: (r + 1) / 2 is 0.48 on average
    assert {0.0, 1.0} <= set(every) <= {0.0, 0.5, 1.0}


@pytest.mark.parametrize("text", ["Left", "left.", "left left", "go left", "0", "左", ""])
def test_an_action_is_one_word_of_the_list_and_nothing_else(text: str) -> None:
    env = GymnasiumEnv()
    verdict = play(env, a_task(), lambda _: Turn(content=text))
    assert (verdict.status, verdict.reward) == (Status.INVALID_OUTPUT, 0.0)
    assert "none of left, down, right, up" in verdict.evidence["reason"]


def test_gymnasiums_time_limit_is_a_truncation_and_pays_nothing() -> None:
    env = GymnasiumEnv()
    env.reset(options={"task": a_task()})
    steps = 0
    while True:
        _, reward, terminated, truncated, info = env.step(Turn(content="up"))
        steps += 1
        if terminated or truncated:
            break
    assert (steps, terminated, truncated, reward, info["verdict"].status) == (100, False, True, 0.0, Status.OK)


def test_a_text_game_of_somebody_else_is_told_by_its_spaces_and_scored_as_the_config_says() -> None:
    options = {"env": "Riddle-v0", "scoring": "return", "low": -3.0, "high": 5.0}
    env, task = GymnasiumEnv(**options), a_task(**options)
    prompt = env.reset(options={"task": task})[1]["observation"].messages[0].content
    assert "tries: 0\nhint: " in prompt
    word = prompt[-1] * 3
    assert play(env, task, lambda _: Turn(content=word)).reward == 1.0
    wrong = "abc" if word != "abc" else "bcd"
    ended = play(env, task, lambda _: Turn(content=wrong))
    assert (ended.reward, ended.components) == (0.0, {"return": -3.0, "steps": 3.0})
    assert play(env, task, lambda _: Turn(content="xyz")).status is Status.INVALID_OUTPUT
    with pytest.raises(NotImplementedError, match="no oracle"):
        play_oracle(env, task)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"env": "Nowhere-v0"}, "gymnasium.make"),
        ({"env": "Riddle-v0", "scoring": "return"}, "low < high"),
        ({"env": "Riddle-v0", "scoring": "sum"}, "wanted some of success, return"),
        ({"env": "Taxi-v4", "actions": ["one", "two"]}, "6 actions, and 2 different words"),
        ({"env": "Pendulum-v1"}, "Discrete and Text actions only"),
        ({"enw": "Taxi-v4"}, "did you mean 'env'"),
    ],
)
def test_what_cannot_be_played_is_refused_with_what_to_do(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        a_task(**options)


@pytest.mark.parametrize("name", ["math", "long_context", "tools"])
def test_ours_are_gymnasium_environments(name: str) -> None:
    env = gymnasium.make(f"polyrl/{name}-v0")
    check_env(env.unwrapped, skip_render_check=True)
    observation, info = env.reset(seed=3)
    assert observation == env.reset(seed=3)[0]
    assert observation in env.observation_space
    *_, terminated, truncated, info = env.step({"content": "no idea"})
    assert (terminated or truncated) == ("verdict" in info)
    env.close()


def test_options_reach_the_environment_and_the_module_may_stand_before_the_id() -> None:
    env = gymnasium.make("environments.bridges.gymnasium_out:polyrl/math-v0", digits=2, kinds=["add"])
    question = env.reset(seed=1)[0]["messages"][0]["content"]
    a, b = map(int, question.split("+"))
    assert env.step({"content": str(a + b)})[1:4] == (1.0, True, False)
    assert len(question) == 5
    assert gymnasium_out.register_all() == gymnasium_out.register_all()
