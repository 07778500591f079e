"""Damaged input of every kind is read or refused, never worse; ``make fuzz`` reads fifty times as many."""

import pytest

from fuzz_data import KINDS, fuzz


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_read_or_refused(kind):
    assert fuzz(400, seed=7, kinds=[kind]) == []


def test_the_watching_notices_everything():
    """A process that ends is followed by another one, whose first input is its own first."""
    found = fuzz(7, kinds=["trouble"])
    assert [line.split("--first ")[1].split(" --inputs 1: ") for line in found] == [
        ["2", "KeyError: 'forgotten'"], ["3", "its message is no line: 'two\\nlines'"],
        ["4", found[2].split("--inputs 1: ")[1]], ["5", "ended its process (-6)"],
    ]  # fmt: skip
    assert "MemoryError" in found[2]


def test_the_watching_notices_a_hang():
    assert fuzz(1, kinds=["hang"], limit_s=1.5) == [
        "python tests/fuzz_data.py --kind hang --seed 0 --first 0 --inputs 1: not done after 2 s"
    ]
