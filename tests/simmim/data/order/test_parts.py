"""Parts of tars: disjoint, complete, and of equal length."""

from collections import Counter

import pytest

from simmim.data.order.parts import WHOLE, Piece, pieces_of


@pytest.mark.parametrize("tars", [1, 2, 5, 16])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_share_all_samples_evenly(tars: int, parts: int) -> None:
    found: Counter[tuple[int, int]] = Counter()
    counts = []
    for node in WHOLE.cut(parts):
        for part in node.cut(2):
            pieces = list(pieces_of(part, range(tars), [7] * tars))
            own = [(one.tar, row) for one in pieces for row in range(200) if one.has(row)]
            found.update(own)
            counts.append(len(own))
            assert len(pieces) <= tars / (2 * parts) + 2
    assert len(found) == found.total() == 200 * tars
    assert max(counts) - min(counts) <= 6


def test_parts_of_unequal_tars_have_equal_lengths() -> None:
    lengths = [4000, 300, 2000, 900]
    order = [2, 0, 3, 1]
    shares = [list(pieces_of(part, order, lengths)) for part in WHOLE.cut(4)]
    sums = [sum((one.high - one.low) * lengths[one.tar] for one in part) for part in shares]
    assert sums == pytest.approx([1800] * 4)
    covered = Counter(
        (one.tar, row) for part in shares for one in part for row in range(99) if one.has(row)
    )
    assert len(covered) == covered.total() == 4 * 99


def test_pieces_of_one_tar_are_disjoint() -> None:
    pieces = [Piece(0, 0.0, 0.25), Piece(0, 0.25, 1.0)]
    assert all(sum(one.has(row) for one in pieces) == 1 for row in range(1000))
