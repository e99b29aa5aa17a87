"""CRC-32 of arrays, and of a whole from the checksums of its pieces.

Knows no files. It is zlib's and everybody's CRC-32; what it is for is finding damage, not malice.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import cache

import numpy as np

_POLYNOMIAL = 0xEDB88320  # reflected: bit 31 is the coefficient of x^0


def crc_of(array: np.ndarray) -> int:
    """The checksum of a C-contiguous array's bytes; other threads run meanwhile."""
    return zlib.crc32(array.reshape(-1).view(np.uint8))


def combine(pieces: Iterable[tuple[int, int]]) -> int:
    """The checksum of the bytes that pieces make up, each given as (checksum, bytes), in order."""
    whole = 0
    for crc, nbytes in pieces:
        whole = _product(whole, _shift(nbytes)) ^ crc
    return whole


def _product(a: int, b: int) -> int:
    """a * b modulo the polynomial, over GF(2)."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@cache
def _shift(nbytes: int) -> int:
    """x^(8 * nbytes): what a checksum is multiplied by when so many bytes follow."""
    result, square = 1 << 31, 1 << 23  # x^0 and x^8
    while nbytes:
        if nbytes & 1:
            result = _product(result, square)
        square = _product(square, square)
        nbytes >>= 1
    return result
