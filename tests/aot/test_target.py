"""Targets: what can be named, what their descriptions say, and what is refused."""

import pytest

from glm_jax.targets.target import TargetError, parse_target

KINDS = ("b200", "gb200", "h200", "h100")


@pytest.mark.parametrize(
    ("text", "kind", "count"), [("b200x8", "b200", 8), ("h100", "h100", 1), ("cpux4", "cpu", 4)]
)
def test_a_target_is_a_kind_and_a_number(text: str, kind: str, count: int) -> None:
    target = parse_target(text)
    assert (target.kind, target.num_devices) == (kind, count)
    assert str(target) == f"{kind}x{count}"


@pytest.mark.parametrize("text", ["b300x8", "b200x0", "b200 x8", "", "x8", "../h200", "B200x8"])
def test_another_target_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(
        TargetError, match=r"is not known: it is one of b200, gb200, h200, h100, cpu"
    ):
        parse_target(text)


def test_this_machine_has_neither_rates_nor_a_memory_set_aside() -> None:
    target = parse_target("cpu")
    assert target.is_cpu and target.memory is None and target.peaks is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_description_says_what_the_compiler_chooses_kernels_by(kind: str) -> None:
    target = parse_target(kind)
    assert target.peaks is not None and target.memory is not None
    text = target.description
    assert f"memory_bandwidth: {int(target.peaks.hbm)}\n" in text
    assert f"device_memory_size: {target.memory}\n" in text
    # Without links there is no one-shot all-reduce, without the features no tensor cores of ours.
    assert "active_links: 18" in text
    assert "feature_extension: ACCELERATED_FEATURES" in text
    major = 9 if kind.startswith("h") else 10
    assert f"major: {major}\n" in text
    assert f"core_count: {132 if major == 9 else 152 if kind == 'gb200' else 148}\n" in text


def test_memory_and_rates_are_the_published_ones() -> None:
    memories = {kind: parse_target(kind).memory or 0 for kind in KINDS}
    assert 79e9 < memories["h100"] < 86e9
    assert 140e9 < memories["h200"] < 152e9
    assert 178e9 < memories["b200"] < 193e9 < memories["gb200"] < 200e9
    for kind in KINDS:
        peaks = parse_target(kind).peaks
        assert peaks is not None and peaks.fp8 == pytest.approx(2 * peaks.bf16, rel=0.01)
        assert peaks.link == (900e9 if "b200" in kind else 450e9)
