"""Facts of one form: what is asked, how, what is answered, and which of it is kept apart for validation."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
from collections.abc import Mapping

TRAINED, PHRASING, FACT, COMBINATION = "trained", "phrasing", "fact", "combination"
_APART = 10  # one in so many combinations is kept apart

Fact = Mapping[str, str]  # slot -> words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of one form.

    Attributes:
      name: of the family.
      share: how often it is asked, relative to the others.
      facts: words for the slots of the phrasings and the answer, of each fact.
      phrasings: of the question.
      held_phrasings: more of them, never trained.
      says: the answer.
      held_facts: numbers of facts that are never trained: those that follow from the others.
      follow_ups: phrasings that go on from an earlier question of the family.
    """

    name: str
    share: float
    facts: tuple[Fact, ...]
    phrasings: tuple[str, ...]
    held_phrasings: tuple[str, ...]
    says: str
    held_facts: frozenset[int] = frozenset()
    follow_ups: tuple[str, ...] = ()

    def question(self, fact: int, phrasing: str) -> str:
        """The question in words."""
        return sentence(phrasing, self.facts[fact])

    def answer(self, fact: int) -> str:
        """The answer in words."""
        return sentence(self.says, self.facts[fact])

    @functools.cached_property
    def apart(self) -> list[str]:
        """What of this family can be asked in validation: of PHRASING, FACT and COMBINATION."""
        kinds = {
            PHRASING: self.held_phrasings,
            FACT: self.held_facts,
            COMBINATION: self._combinations[COMBINATION],
        }
        return [kind for kind, some in kinds.items() if some]

    def draw(self, rng: random.Random, kind: str) -> tuple[int, str]:
        """A fact's number and a phrasing, of what is TRAINED or kept apart as PHRASING, FACT or COMBINATION."""
        if kind == FACT:
            return rng.choice(sorted(self.held_facts)), rng.choice(self.phrasings)
        trained = self._combinations[TRAINED]
        if kind == PHRASING:
            return rng.choice(list(trained)), rng.choice(self.held_phrasings)
        combinations = self._combinations[kind]
        fact = rng.choice(list(combinations))
        return fact, rng.choice(combinations[fact])

    @functools.cached_property
    def _combinations(self) -> dict[str, dict[int, list[str]]]:
        """Kind -> fact -> the phrasings that it is trained with, and those it is not. Every fact is trained with some."""
        out: dict[str, dict[int, list[str]]] = {TRAINED: {}, COMBINATION: {}}
        for fact in set(range(len(self.facts))) - self.held_facts:
            key = self.answer(fact)
            held = [p for p in self.phrasings if kept_apart(f"{key}/{p}", _APART)]
            if len(self.facts) == 1 or len(held) == len(self.phrasings):
                held = []
            out[TRAINED][fact] = [p for p in self.phrasings if p not in held]
            if held:
                out[COMBINATION][fact] = held
        return out


def kept_apart(key: str, one_in: int) -> bool:
    """Whether what `key` names is one of those kept apart; the same for ever."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % one_in == 0


def sentence(template: str, fact: Fact) -> str:
    """The template filled in, beginning with a capital."""
    text = template.format(**fact)
    return text[0].upper() + text[1:]
