"""Compares what came out with what was expected, in order."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["InOrderScoreboard"]


@dataclass
class InOrderScoreboard:
    """A queue of expected words, each checked against the next actual one.

    Parameters
    ----------
    name : str
        Shown in messages.
    explain : callable
        Turns (expected, actual) into a readable difference, such as decoded fields.
    """

    name: str
    explain: Callable[[int, int], str] = lambda expected, actual: ""
    checked: int = 0
    _expected: deque[tuple[int, str]] = field(default_factory=deque)

    def expect(self, word: int, source: str) -> None:
        """Add an expected word; ``source`` says which input it belongs to."""
        self._expected.append((word, source))

    def actual(self, word: int) -> None:
        """Check the next word that came out.

        Raises
        ------
        AssertionError
            If nothing was expected, or another word; the message has item number, input, both words
            in hex and their difference.
        """
        assert self._expected, f"{self.name}: item {self.checked} = {word:#x} was not expected"
        expected, source = self._expected.popleft()
        assert word == expected, (
            f"{self.name}: item {self.checked} for {source}: got {word:#x}, expected {expected:#x}"
            f" {self.explain(expected, word)}"
        )
        self.checked += 1

    def clear(self) -> None:
        """Expect nothing any more, as after a reset."""
        self._expected.clear()

    def finish(self, items: int) -> None:
        """Check that exactly ``items`` words came out and none is still expected.

        Raises
        ------
        AssertionError
            Otherwise.
        """
        assert not self._expected, f"{self.name}: {len(self._expected)} items never came out"
        assert self.checked == items, f"{self.name}: {self.checked} items checked, expected {items}"
