"""Which blocks the papers keep, and what a ghost makes of four tokens."""

from __future__ import annotations

import pytest
import torch

from laconic.models.ghosts import neighbour_mean
from laconic.structure import AllBut, Alternate, Bottom, Depth, EveryNth, Middle, Spread, Top


@pytest.mark.parametrize(
    ("by", "kept"),
    [
        (Spread(0.75), (0, 1, 2, 4, 5, 6, 8, 9, 10)),
        (Spread(0.5), (0, 2, 4, 6, 8, 10)),
        (Spread(0.25), (0, 4, 8)),
        (Spread(1 / 3), (0, 3, 6, 9)),
        (Spread(1.0), tuple(range(12))),
        (Spread(0.01), (0,)),
        (AllBut((11, 0, 4)), (0, 4, 11)),
    ],
    ids=repr,
)
def test_dynabert_kept_layers(by: Depth, kept: tuple[int, ...]) -> None:
    """Hou et al. 2020: floor(i / m_d) for i < round(12 m_d), of twelve layers; or those named."""
    assert by.kept(12) == kept


@pytest.mark.parametrize(
    ("by", "dropped"),
    [
        # Sajjad et al. 2020 count from 1.
        (Top(4), {9, 10, 11, 12}),
        (Bottom(4), {1, 2, 3, 4}),
        (Top(6), {7, 8, 9, 10, 11, 12}),
        (Bottom(6), {1, 2, 3, 4, 5, 6}),
        (Alternate(4, parity="odd"), {5, 7, 9, 11}),
        (Alternate(4, parity="even"), {6, 8, 10, 12}),
        (Alternate(6, parity="odd"), {1, 3, 5, 7, 9, 11}),
        (Alternate(6, parity="even"), {2, 4, 6, 8, 10, 12}),
        (Middle(2), {6, 7}),
        (Middle(3), {5, 6, 7}),
        (Middle(4), {5, 6, 7, 8}),
        (Middle(6), {4, 5, 6, 7, 8, 9}),
    ],
    ids=repr,
)
def test_poor_mans_bert_dropped_layers(by: Depth, dropped: set[int]) -> None:
    assert by.kept(12) == tuple(place for place in range(12) if place + 1 not in dropped)


def test_layerdrop_dropped_layers() -> None:
    """Fan et al. 2020: d mod floor(1 / p) = 0; 12 layers become 6 and then 3."""
    assert EveryNth(2).kept(12) == (1, 3, 5, 7, 9, 11)
    assert EveryNth(2).kept(6) == (1, 3, 5)
    assert set(range(12)) - set(EveryNth(3).kept(12)) == {0, 3, 6, 9}
    assert set(range(12)) - set(EveryNth(5).kept(12)) == {0, 5, 10}


def test_ghost_of_a_uniform_kernel() -> None:
    """Huang et al. 2021: softmax of equal logits, k = 3, zeros beyond the ends."""
    tokens = torch.tensor([1.0, 2.0, 4.0, 8.0]).reshape(1, 4, 1)
    found = neighbour_mean(tokens, torch.zeros(1, 3)).flatten().tolist()
    assert found == pytest.approx([1, 7 / 3, 14 / 3, 4])
