"""Names for the contents of pages: the same tokens after the same tokens have the same key.

Knows neither pages nor sequences: tokens in, keys out.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

# With 128 bits, two contents of one key are less likely than a memory that errs.
_KEY_BYTES = 16


def root_key(salt: str) -> bytes:
    """What the keys of all sequences with this salt descend from; no other salt shares any."""
    return blake2b(salt.encode(), digest_size=_KEY_BYTES, person=b"salt").digest()


def extend_keys(
    keys: list[bytes], salt: str, tokens: NDArray[np.int32], num_tokens: int, page_size: int
) -> None:
    """Appends the keys of the pages that the first num_tokens fill, beyond those in `keys`.

    A key is a hash of the page's tokens and of the key before it, so it stands for everything
    that the keys and values of the page depend on.
    """
    parent = keys[-1] if keys else root_key(salt)
    for start in range(len(keys) * page_size, num_tokens - page_size + 1, page_size):
        digest = blake2b(parent, digest_size=_KEY_BYTES)
        digest.update(tokens[start : start + page_size].tobytes())
        parent = digest.digest()
        keys.append(parent)
