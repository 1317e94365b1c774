"""Numbers as people read them. What is undefined is said to be, never shown as 0."""

from __future__ import annotations

from collections.abc import Sequence

from lox_merge.publish.documents.shape import Interval, PairedChange

UNDEFINED = "undefined"
# A p-value above this shows no change.
_CLEAR = 0.05


def number(value: float | None, form: str = ".3f") -> str:
    """A value in the given form; one that only rounds to zero is shown by its power of ten."""
    if value is None:
        return UNDEFINED
    text = format(value, form)
    if value and "f" in form and not any(digit in text for digit in "123456789"):
        text = format(value, ".1e")
    return text.replace("-", "\N{MINUS SIGN}")  # a hyphen would let a line break inside a number


def percent(rate: float | None) -> str:
    return UNDEFINED if rate is None else f"{100 * rate:.1f} %"


def percent_interval(interval: Interval | None) -> str:
    """Both ends, as in '7.0 to 19.8 %'."""
    return UNDEFINED if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def points(difference: float | None) -> str:
    """A difference of two rates in percentage points."""
    return UNDEFINED if difference is None else f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")


def rate_words(rate: float | None, interval: Interval | None) -> str:
    """A rate and its interval for a sentence, as in '12.0 % (95 % interval 7.0 to 19.8 %)'."""
    return UNDEFINED if rate is None else f"{percent(rate)} (95 % interval {percent_interval(interval)})"


def between(values: Sequence[float], form: str = ".3g") -> str:
    """Smallest to largest."""
    low, high = number(min(values), form), number(max(values), form)
    return low if low == high else f"{low} to {high}"


def spread(rates: Sequence[float], middle: float) -> str:
    """The middle of several rates and their range, as in '55.0 % (50.0 to 60.0 %)'."""
    return percent(middle) if min(rates) == max(rates) else f"{percent(middle)} ({percent_interval((min(rates), max(rates)))})"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names in a sentence: 'a, b and c', the later ones counted."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def change_words(change: PairedChange, fewer: str, more: str) -> str:
    """What a paired change shows: `fewer` or `more` where interval and exact test agree that there is one."""
    if change.interval is None:
        return UNDEFINED
    low, high = change.interval
    if low <= 0 <= high:
        return "no clear difference"
    if change.p_value is not None and change.p_value > _CLEAR:
        return "no clear difference, as the exact test finds none"
    return fewer if high < 0 else more
