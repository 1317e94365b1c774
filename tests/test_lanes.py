"""Lanes, with the CPU in the place of streams: who gets what, how many at a time, what is kept and what is not."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from lox_merge.maths.lanes import Lane, Lanes, borrowed


@dataclass
class Item:
    name: str
    bytes: int = 10


def lanes(count: int = 2, room: int = 25) -> Lanes[Item]:
    return Lanes([Lane(None, room) for _ in range(count)])


def test_what_was_made_for_a_key_comes_back() -> None:
    given, made = lanes(), []

    def make() -> Item:
        made.append(1)
        return Item("first")

    for _ in range(3):
        with borrowed(given, "a", make) as item:
            assert item.name == "first"
    with borrowed(given, "b", lambda: Item("other")) as item:
        assert item.name == "other"
    assert len(made) == 1


def test_two_at_a_time_have_items_of_their_own_and_others_wait() -> None:
    given, together, most, lock = lanes(2), 0, 0, threading.Lock()
    seen: set[int] = set()

    def work(_: int) -> None:
        nonlocal together, most
        with borrowed(given, "a", lambda: Item("a")) as item:
            with lock:
                together += 1
                most = max(most, together)
                seen.add(id(item))
            time.sleep(0.01)
            with lock:
                together -= 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(12)))
    assert most == 2 and len(seen) == 2


def test_the_oldest_makes_room_and_the_last_one_stays() -> None:
    given = lanes(1)
    for key in ("a", "b", "c"):
        with borrowed(given, key, lambda key=key: Item(key)):
            pass
    with given.lend("c") as lane:
        assert list(lane.kept) == ["b", "c"]
    with borrowed(given, "large", lambda: Item("large", 1000)):
        pass
    with given.lend("large") as lane:
        assert list(lane.kept) == ["large"]


def test_after_an_error_it_is_made_anew_and_the_lane_is_free() -> None:
    given = lanes(1)
    with pytest.raises(ValueError, match="broken"), borrowed(given, "a", lambda: Item("first")):
        raise ValueError("broken")
    with borrowed(given, "a", lambda: Item("second")) as item:
        assert item.name == "second"


def test_nothing_is_kept_when_memory_is_short() -> None:
    given = lanes(2)
    with borrowed(given, "a", lambda: Item("first")):
        given.forget()  # not what is in use
    with given.lend("a") as lane:
        assert list(lane.kept) == ["a"]
    given.forget()
    with borrowed(given, "a", lambda: Item("second")) as item:
        assert item.name == "second"
