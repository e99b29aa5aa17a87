"""What a card's small copies say of the bytes between them."""

import pytest

from glm_jax.pallas.chip import Chip
from tests.perf.card import Card

_COPIES = ((1 << 16, 1e-6), (1 << 18, 4e-6))


def test_copies_between_measured_ones_are_interpolated() -> None:
    card = Card("", Chip("sm90", 4), 1e12, {}, _COPIES, empty=0.5e-6)
    assert card.copy_seconds(1 << 16) == pytest.approx(1e-6)
    assert card.copy_seconds(1 << 17) == pytest.approx(2e-6)
    assert card.copy_seconds(1 << 10) == pytest.approx(0.5e-6)
    assert card.copy_seconds(1 << 20) == pytest.approx((1 << 20) / 1e12)


def test_a_card_of_no_copies_has_its_large_one() -> None:
    assert Card("", Chip("sm90", 4), 1e12, {}).copy_seconds(1e6) == pytest.approx(1e-6)
