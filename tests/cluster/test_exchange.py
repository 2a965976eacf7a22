"""Nodes that talk two by two: who meets whom, and how fast, on real sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from cluster.nodes.exchange import ROUNDS, best_speed, listen, partner

HOME = "127.0.0.1"


@pytest.mark.parametrize("count", range(2, 20))
def test_all_play_all(count: int) -> None:
    rounds = count - 1 + count % 2
    pairs = set()
    for number in range(rounds):
        partners = [partner(place, count, number) for place in range(count)]
        assert partners.count(None) == count % 2  # one sits out where they are odd
        for place, other in enumerate(partners):
            if other is not None:
                assert partners[other] == place != other
                pairs.add(frozenset((place, other)))
    assert len(pairs) == count * (count - 1) // 2


def test_in_the_rounds_that_are_played_partners_differ() -> None:
    for count in range(4, 40):
        for place in range(count):
            met = [partner(place, count, number) for number in range(ROUNDS)]
            assert len(set(met)) == ROUNDS
            assert met.count(None) <= 1


def play(
    ranks: list[int], address_of: Callable[[int], tuple[str, int]], doors: dict[int, socket.socket]
) -> list[float]:
    speeds = dict.fromkeys(ranks, -1.0)

    def one(rank: int) -> None:
        speeds[rank] = best_speed(doors[rank], rank, ranks, address_of, 6.0)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in doors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [speeds[rank] for rank in ranks]


@pytest.mark.parametrize("ranks", [[0, 1], [0, 1, 2], [0, 3, 4, 9]])
def test_speeds(ranks: list[int]) -> None:
    doors = {rank: listen(HOME) for rank in ranks}
    speeds = play(ranks, lambda rank: (HOME, doors[rank].getsockname()[1]), doors)
    assert all(speed > 1e6 for speed in speeds), speeds


@pytest.mark.slow
def test_a_node_that_is_not_reached_has_no_speed_and_holds_up_nobody() -> None:
    """It reaches the others, which would do for one direction."""
    ranks = [0, 1, 2]
    doors = {rank: listen(HOME) for rank in ranks}
    with socket.socket() as closed:  # bound, so that nobody else is there; and it does not listen
        closed.bind((HOME, 0))
        nowhere = closed.getsockname()
        speeds = play(ranks, lambda rank: nowhere if rank == 2 else (HOME, doors[rank].getsockname()[1]), doors)
    assert speeds[2] == 0.0
    assert min(speeds[:2]) > 1e6
