"""Engine `prompt_lookup`: guesses are what followed the last tokens when they stood in the prompt or in the answer before.

Prompt lookup decoding (Saxena 2023): no second model; it pays where an answer repeats its question's or its own words. Of several places
the latest is taken, and longer matches go before shorter ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from stagebench.engines.ahead import AheadEngine
from stagebench.models.base import Adapter

__all__ = ["GUESSES", "LONGEST", "NgramIndex", "PromptLookupEngine"]

GUESSES = 10
"""Tokens guessed at once."""
LONGEST = 3
"""Tokens that are looked up, at most."""


class NgramIndex:
    """Where each run of 1 to LONGEST tokens last ended, not counting the end of the text itself."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._known = 0

    def guess(self, text: Sequence[int], most: int) -> list[int]:
        """What followed the text's last tokens. `text` must begin with what it was at the call before."""
        for end in range(max(self._known, 1), len(text)):  # runs that end before `end`, now that something follows them
            for length in range(1, min(LONGEST, end) + 1):
                self._after[tuple(text[end - length : end])] = end
        self._known = len(text)
        for length in range(min(LONGEST, len(text)), 0, -1):
            at = self._after.get(tuple(text[len(text) - length :]))
            if at is not None:
                return list(text[at : at + most])
        return []


class PromptLookupEngine(AheadEngine):
    """One forward checks up to GUESSES looked-up tokens."""

    name = "prompt_lookup"

    def _set_up(self, adapter: Adapter) -> str | None:
        return f"up to {GUESSES} tokens, looked up by the last {LONGEST} to 1"

    def begin(self, history: list[int]) -> None:
        self._index = NgramIndex()

    def propose(self, history: list[int], most: int, hold_back: Sequence[frozenset[int]]) -> list[int]:
        return self._index.guess(history, min(GUESSES, most))
