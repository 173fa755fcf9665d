"""Positions: rotary embedding for near keys, ages for far memories."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

AGES = 48  # that have a bias of their own, from 1 to 11,863,283, two to a doubling


def rotary_table(
    length: int, dim_head: int, *, device: torch.device, dtype: torch.dtype, base: float = 10_000.0
) -> Tensor:
    """The rotary embedding of the positions 0 .. length - 1, [2, length, e / 2]; see `rotary_at`."""
    return rotary_at(torch.arange(length, device=device), dim_head, dtype=dtype, base=base)


def rotary_at(positions: Tensor, dim_head: int, *, dtype: torch.dtype, base: float = 10_000.0) -> Tensor:
    """Angles of the rotary embedding (Su et al., arXiv 2104.09864), as unit vectors.

    Args:
        positions: int64 [...].
        dim_head: e, even.
        dtype: of what will be rotated; half precision gets a table in float32.
        base: the longest wavelength is 2π times about this many positions.

    Returns:
        [2, ..., e / 2]: cosine and sine of each position and frequency.
    """
    exponents = torch.arange(0, dim_head, 2, device=positions.device, dtype=torch.float64) / dim_head
    angles = positions[..., None].to(torch.float64) * base**-exponents
    return torch.stack((angles.cos(), angles.sin())).to(torch.promote_types(dtype, torch.float32))


def sincos_2d(
    rows: int, columns: int, dim: int, *, device: torch.device, dtype: torch.dtype, base: float = 10_000.0
) -> Tensor:
    """Sines and cosines of the places of a map (Beyer et al., arXiv 2205.01580).

    Args:
        rows: of the map.
        columns: of the map.
        dim: d, a multiple of 4.
        device: where the result goes.
        dtype: of the result.
        base: the longest wavelength is 2π times this many places.

    Returns:
        [rows, columns, d]: sine and cosine of the column, then of the row, d / 4 frequencies each.
    """
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = base ** -torch.linspace(0, 1, dim // 4, device=device, dtype=wide)
    y, x = (torch.arange(side, device=device)[:, None] * frequencies for side in (rows, columns))
    y, x = y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=-1).to(dtype)


def rotate(t: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs of channels of t [..., n, e] by the angles of n positions, table [2, ..., n, e / 2].

    Half precision is rotated in float32 and comes back as it was.
    """
    cos, sin = table
    first, second = t.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(t.dtype)


def age_place(age: Tensor) -> Tensor:
    """Where an age lies between the ages that have a bias of their own.

    Args:
        age: int64, tokens between a memory row and the segment that reads it, at least 1.

    Returns:
        float32 in [0, AGES - 1], the shape of `age`.
    """
    return (2 * age.clamp(min=1).to(torch.float64).log2()).clamp(max=AGES - 1).to(torch.float32)


def age_bias(table: Tensor, places: Tensor) -> Tensor:
    """Biases between those of the two nearest ages: a piecewise linear function of the age's logarithm.

    So of two rows the newer one can be told, as far as rounding lets it: any two ages up to 750,000 have
    places of their own. A table in half precision rounds them again.

    Args:
        table: [AGES, r, h], of r sets of h heads.
        places: [b, ..., r, k], see `age_place`.

    Returns:
        [b, ..., r, h, k], in the dtype of the table.
    """
    sets, heads = table.shape[1:]
    younger = places.floor().clamp(max=AGES - 2)
    beyond = (places - younger).to(table.dtype)[..., None]
    index = sets * younger.long() + torch.arange(sets, device=places.device)[:, None]
    flat = table.reshape(-1, heads)
    return torch.lerp(F.embedding(index, flat), F.embedding(index + sets, flat), beyond).mT
