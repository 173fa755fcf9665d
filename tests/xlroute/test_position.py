"""Ages of memory rows, and the bias for them."""

from __future__ import annotations

import math

import torch

from xlroute.position import AGES, age_bias, age_place


def test_two_places_to_a_doubling() -> None:
    ages = torch.tensor([1, 2, 4, 1024, 2**23, 2**40, 0])
    assert age_place(ages).tolist() == [0, 2, 4, 20, 46, AGES - 1, 0]
    assert age_place(torch.tensor(3)).item() == torch.tensor(2 * math.log2(3)).item()


def test_biases_between_ages_are_interpolated() -> None:
    table = torch.randn(AGES, 3, 2, dtype=torch.float64)
    places = torch.rand(4, 5, 3, 6) * (AGES - 1)
    places[0, 0, :, :3] = torch.tensor([0.0, 7.0, AGES - 1.0])
    found = age_bias(table, places)
    assert found.shape == (4, 5, 3, 2, 6)
    for j in range(3):
        for h in range(2):
            for place, bias in zip(places[:, :, j].flatten(), found[:, :, j, h].flatten(), strict=True):
                low = min(int(place), AGES - 2)
                share = place.double() - low
                expected = (1 - share) * table[low, j, h] + share * table[low + 1, j, h]
                torch.testing.assert_close(bias, expected)


def test_the_newer_of_two_rows_is_told_at_a_million_tokens() -> None:
    table = -torch.arange(float(AGES))[:, None, None]
    newer, older = age_bias(table, age_place(torch.tensor([[1_000_000, 1_000_020]])))[0, 0]
    assert newer > older
