"""Which tensors are worked on side by side, and in whose buffers."""

import threading
from dataclasses import dataclass

from deltalens.analysis.engine import Gate, run_all
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
    sizes: list[int] = []
    gate = Gate(10)

    def work(item: Piece, buffers: Buffers) -> Measured:
        sizes.append(gate.inside)
        return Measured({"name": item.name})

    run_all([Piece("a", 3), Piece("b", 50), Piece("c", 3)], work, gate=gate, jobs=3)
    assert sizes[0] == 50
    assert max(sizes[1:]) <= 10
    assert gate.inside == 0
