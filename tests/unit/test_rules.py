"""What a config may say about the objective, and what it is told otherwise."""

from __future__ import annotations

import pytest

from rl_core.config import ConfigError, RunConfig
from rl_core.config_files import parse_config, to_yaml


def parsed(*overrides: str) -> RunConfig:
    return parse_config({"environments": {"math": {}}}, overrides)


def test_bounds_that_are_not_given_are_the_rules_own_and_given_ones_stay() -> None:
    assert parsed().learner.importance.bounds == (0.2, 5.0)
    assert parsed("learner.importance.rule=icepop").learner.importance.bounds == (0.5, 5.0)
    assert parsed("learner.importance.rule=geometric_mask", "learner.importance.high=1.05").learner.importance.bounds == (0.99, 1.05)
    assert parsed("learner.policy_loss=gspo").learner.clip == (3e-4, 4e-4)
    assert parsed("learner.policy_loss=cispo", "learner.clip_high=2").learner.clip == (1.0, 2.0)


def test_a_run_says_in_words_which_rules_are_in_force() -> None:
    assert parsed("learner.importance.high=3", "learner.kl_weight=0.01").learner.objective == (
        "ppo clip -0.2/+0.28 around the recomputed policy; grpo advantages; masked importance, "
        "train/behaviour ratio of a token in [0.2, 3]; KL to the reference x 0.01"
    )


@pytest.mark.parametrize("value", [3, "all"])
def test_kept_batches_are_a_number_or_all_and_survive_the_stored_config(value: int | str) -> None:
    config = parsed(f"learner.keep_batches={value}")
    assert config.learner.keep_batches == value
    assert parse_config(to_yaml_tree(config)).learner.keep_batches == value


def to_yaml_tree(config: RunConfig) -> dict[str, object]:
    import yaml

    return dict(yaml.safe_load(to_yaml(config)))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["learner.importance.rule=icepops"], "did you mean icepop"),
        (["learner.importance.low=2"], "wanted 0 <= low < 1 < high, for example 0.2 and 5"),
        (["learner.importance.rule=dppo", "learner.importance.high=5", "learner.importance.low=0.2"], "wanted -1 <= low < 0 < high"),
        (["learner.importance.rule=icepop", "learner.proximal=behaviour"], "makes them the same; use importance.rule=masked"),
        (["learner.importance.rule=truncated", "learner.proximal=behaviour"], "makes them the same"),
        (["learner.proximal=old"], "wanted one of recomputed, behaviour"),
        (["learner.policy_loss=gpo"], "did you mean gspo"),
        (["learner.clip_high=0"], "learner.clip_high is 0.0, wanted more than 0"),
        (["learner.clip_low=1.5"], "wanted more than 0 and at most 1"),
        (["learner.kl_weight=-1"], "learner.kl_weight is -1.0, wanted 0 or more"),
        (["learner.train_staleness=3", "loop.max_staleness=2"], "wanted 0 to loop.max_staleness=2, or null"),
        (["learner.keep_batches=-2"], "wanted a number of steps, 0 or more, or all"),
        (["environments.math.overlong=drop"], "environments.math.overlong is 'drop', wanted one of keep, mask, penalty"),
        (["environments.math.overlong_buffer=0"], "environments.math.overlong_buffer is 0.0, wanted more than 0 and at most 1"),
    ],
)
def test_a_rule_that_cannot_mean_anything_is_refused_with_a_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parsed(*overrides)
    assert sentence in str(refusal.value)
