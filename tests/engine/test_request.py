"""What a caller asks for is checked at once, and named when it cannot be."""

import math
from typing import Any

import pytest

from glm_jax.engine.request import Request, SamplingParams


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("max_new_tokens", [1, 2**40], [0, -1]),
        ("temperature", [0.0, 1e-30, 2.0, 1e30], [-1e-9, math.inf, math.nan]),
        ("top_p", [1e-30, 0.5, 1.0], [0.0, -0.5, 1.0001, math.nan]),
        ("top_k", [0, 1, 2**31 - 1], [-1, 2**31]),
        ("min_p", [0.0, 0.999], [-0.1, 1.0, math.nan]),
        ("seed", [0, 2**64 - 1], [-1, 2**64]),
    ],
)
def test_a_parameter_out_of_range_is_named_with_its_value(
    field: str, good: list[Any], bad: list[Any]
) -> None:
    fields: dict[str, Any] = {"max_new_tokens": 1}
    for value in good:
        assert getattr(SamplingParams(**fields | {field: value}), field) == value
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{field} must be .* got {value}$"):
            SamplingParams(**fields | {field: value})


def test_nothing_is_filtered_unless_asked_for() -> None:
    sampling = SamplingParams(max_new_tokens=1)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 1, 0, 0)
    assert sampling.stop_token_ids == frozenset()


@pytest.mark.parametrize(
    ("prompt", "said"),
    [((), "at least one token"), ((1, -1), "token ids"), ((2**31,), "token ids")],
)
def test_a_prompt_the_device_could_not_hold_is_refused(prompt: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=f"prompt must .*{said}"):
        Request(id="a", prompt=prompt, sampling=SamplingParams(max_new_tokens=1))


def test_any_token_id_of_31_bits_is_accepted() -> None:
    prompt = (0, 2**31 - 1)
    sampling = SamplingParams(max_new_tokens=1)
    assert Request(id="a", prompt=prompt, sampling=sampling).prompt == prompt
