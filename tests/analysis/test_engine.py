"""Which tensors are worked on side by side, and in whose buffers."""

import threading
import time
from dataclasses import dataclass

from deltalens.analysis.engine import SURPLUS_BYTES, Gate, run_all
from deltalens.analysis.pair import Buffers, Measured


@dataclass(frozen=True)
class Piece:
    name: str
    count: int

    @property
    def nbytes(self) -> int:
        return 2 * self.count


def test_small_tensors_go_ahead_of_a_large_one_and_large_ones_share_buffers():
    items = [Piece("head", 100), Piece("norm", 1), Piece("embedding", 100), Piece("bias", 1), Piece("up", 20)]
    lock, inside, seen, held = threading.Lock(), [], [], {}
    beside = threading.Event()  # set once a small tensor came in beside a large one

    def work(item: Piece, buffers: Buffers) -> Measured:
        with lock:
            inside.append(item)
            seen.append(list(inside))
            held[item.name] = buffers
            if {piece.count for piece in inside} >= {100, 20}:
                beside.set()
        buffers.take("source", item.count)
        if item.count == 100:
            assert beside.wait(10)
        with lock:
            inside.remove(item)
        return Measured({"name": item.name})

    results = run_all(items, work, gate=Gate(125), jobs=2)
    assert [measured.row["name"] for measured in results] == [item.name for item in items]
    assert sorted(len(names) for names in seen)[-1] == 2
    assert all(sum(item.count for item in names) <= 125 for names in seen)
    assert held["head"] is held["embedding"]
    assert held["up"] is not held["embedding"]
    assert len({id(buffers) for buffers in held.values()}) == 2


def test_a_tensor_over_the_limit_comes_in_alone():
    lock, inside, seen = threading.Lock(), [], []

    def work(item: Piece, buffers: Buffers) -> Measured:
        with lock:
            inside.append(item.count)
            seen.append(sorted(inside))
        time.sleep(0.02)
        with lock:
            inside.remove(item.count)
        return Measured({"name": item.name})

    run_all([Piece("a", 3), Piece("b", 50), Piece("c", 3)], work, gate=Gate(10), jobs=3)
    assert seen[0] == [50]
    assert seen[-1] == [3, 3]
    seen.clear()
    run_all([Piece("a", 3), Piece("c", 3)], work, gate=Gate(10, lambda item: 2 * item.count), jobs=3)
    assert seen == [[3], [3]]  # what counts is what they weigh


def test_there_are_no_more_threads_than_were_let_in_at_once():
    threads: set[int] = set()

    def work(item: Piece, buffers: Buffers) -> Measured:
        threads.add(threading.get_ident())
        time.sleep(0.005)
        return Measured({"name": item.name})

    run_all([Piece(str(i), 5) for i in range(12)], work, gate=Gate(10), jobs=8)
    assert len(threads) == 2


def test_buffers_of_large_tensors_do_not_stay_beside_small_ones():
    held: dict[str, Buffers] = {}

    def work(item: Piece, buffers: Buffers) -> Measured:
        held[item.name] = buffers
        buffers.take("source", item.count)
        return Measured({"name": item.name})

    sizes = {"head": 5 * SURPLUS_BYTES, "up": SURPLUS_BYTES, "down": SURPLUS_BYTES - 1, "norm": 7}
    run_all([Piece(*piece) for piece in sizes.items()], work, gate=Gate(1), jobs=2)  # one after the other
    assert held["head"] is not held["up"]
    assert held["up"] is held["down"] is held["norm"]
