"""Synthetic preferences with a rule that a small model can learn: the answer that is polite is the better one."""

from __future__ import annotations

import random

from learner.reward_model import Preference

POLITE = ("please", "thank you", "with pleasure", "you are welcome")
RUDE = ("no", "go away", "whatever", "find it yourself")
NOUNS = ("book", "tea", "lamp", "boat", "song", "key")


def preferences(count: int, seed: int) -> list[Preference]:
    rng = random.Random(seed)

    def answer(manners: tuple[str, ...]) -> str:
        words = [f"the {rng.choice(NOUNS)} {rng.randrange(1000)}" for _ in range(rng.randint(1, 3))]
        words.insert(rng.randrange(len(words) + 1), rng.choice(manners))
        return " ".join(words)

    return [Preference(question=f"Where is the {rng.choice(NOUNS)}?", chosen=answer(POLITE), rejected=answer(RUDE)) for _ in range(count)]
