"""Times ways to cut a kernel's work on this GPU, each checked against the reference first.

    python tests/perf/tune.py [--only NAME] [--json FILE] [--seconds N]

Knows no kernel's inside. A way that is wrong, does not fit or does not compile has its line too.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax

from glm_jax.pallas import (
    decode_attention,
    dense_matmul,
    dispatch,
    grouped_down,
    grouped_gate_up,
)
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.tiling import TuningConfig, fitting_stages
from tests.perf import attention_cases, product_cases
from tests.perf.measure import Card, Case, Step
from tests.perf.sizes import GLM_4_7, Sizes
from tests.perf.turns import default_processes, over_cases

# (rows, context) and (split, tile, stages) of decode attention.
_DECODE_SHAPES = ("B=64 S=8192", "B=1 S=8192", "B=64 S=2048", "B=256 S=2048")
_DECODE_WAYS = ((512, 64, 3), (1024, 64, 3), (1024, 128, 2), (512, 128, 2), (512, 64, 2))
_DENSE_TOKENS = (64, 1, 256, 8192)
_EXPERT_TOKENS = (64, 8192)
_STEPS = (256, 512)


class Way(NamedTuple):
    """One way to cut a case.

    Attributes:
      name: what is special about it.
      step: the kernel, so cut.
    """

    name: str
    step: Step


def decode_ways(sizes: Sizes, chip: Chip) -> Iterator[tuple[Case, list[Way]]]:
    """Decode attention: how long splits and tiles are, how many tiles are in flight."""
    suite = attention_cases.decode_cases(replace(sizes, tokens=(1, 64, 256)), chip, False)
    cases = {case.shape: case for case in suite}

    def way(split: int, tile: int, stages: int) -> Way:
        config = decode_attention.TuningConfig(split_size=split, tile_size=tile, stages=stages)

        def step(operands: Any, layer: jax.Array) -> jax.Array:
            q, k_pages, v_pages, table, positions = operands
            return decode_attention.attend(
                q, k_pages, v_pages, layer, table, positions, chip=chip, config=config
            )

        return Way(f"split {split}, tile {tile}, {stages} stages", step)

    for shape in _DECODE_SHAPES:
        yield cases[shape], [way(*sizes) for sizes in _DECODE_WAYS]


def _dense_configs(
    chip: Chip, tokens: int, rows: int, width: int
) -> Iterator[tuple[str, TuningConfig]]:
    default = dense_matmul.default_config(chip, tokens, rows)

    def cut(step: int, most: int = 16, num_ctas: int = 1, **changes: Any) -> TuningConfig:
        config = replace(default, **{"stages": 2, "step": step} | changes)
        stages = fitting_stages(
            config.tokens, config.cta_rows, num_spread=config.num_spread, step=step,
            num_staged=1 + config.takes_turns, num_ctas=num_ctas,
        )  # fmt: skip
        return replace(config, stages=min(most, stages))

    if tokens > 512:
        yield "in turns", cut(128, rows=128, takes_turns=True)
        yield "steps of 256", cut(256)
        return
    yield "steps of 128", cut(128)
    yield "steps of 256", cut(256)
    yield "steps of 512", cut(512)
    if tokens > 64:
        return
    if width > 2048:
        for step in (128, 256, 640):
            yield f"4 parts, {step}", cut(step, parts=4, is_spread=True, fill=None)
        yield "2 parts, 512", cut(512, parts=2, is_spread=True, fill=32)
        yield "4 parts, 256, one CTA", cut(256, parts=4)
    else:
        yield "48 rows, 512", cut(512, fill=48)
        yield "32 rows, 256, two CTAs", cut(256, num_ctas=2, fill=32)
        yield "2 parts, 256, two CTAs", cut(256, num_ctas=2, parts=2, is_spread=True, fill=None)


def dense_ways(sizes: Sizes, chip: Chip) -> Iterator[tuple[Case, list[Way]]]:
    """The projections: how wide a step is, in how many parts K is cut, by whom they are walked."""

    def way(name: str, config: TuningConfig | None) -> Way:
        # Where two CTAs fit an SM, there are places for twice as many.
        on = replace(chip, num_cores=2 * chip.num_cores) if "two CTAs" in name else chip

        def step(operands: Any, layer: jax.Array) -> jax.Array:
            x, x_scale, values, scale, bias = operands
            return dense_matmul.matmul(
                x, x_scale, values, scale, bias, layer, chip=on, config=config
            )

        return Way(name, step)

    heads = sizes.query_groups * 128
    shapes = {"qkv": (heads + 256, sizes.hidden), "o": (sizes.hidden, heads)}
    for case in product_cases.dense_cases(replace(sizes, tokens=_DENSE_TOKENS), chip, False):
        name, tokens = case.shape.split(" T=")
        configs = _dense_configs(chip, int(tokens), *shapes[name])
        yield case, [way("default", None), *(way(*named) for named in configs)]


def expert_ways(sizes: Sizes, chip: Chip) -> Iterator[tuple[Case, list[Way]]]:
    """The experts' two products: how wide steps are, and whether warpgroups take turns."""

    def way(name: str, **configs: TuningConfig) -> Way:
        return Way(name, partial(product_cases.expert_step, chip=chip, **configs))

    for case in product_cases.expert_cases(replace(sizes, tokens=_EXPERT_TOKENS), chip, False):
        tokens = int(case.shape.removeprefix("T="))
        tile = dispatch.default_tile(tokens)
        up = grouped_gate_up.default_config(chip, tile, sizes.expert_width, tokens)
        down = grouped_down.default_config(chip, tile)
        ways = [way("default")]
        if tokens > 512:
            stages = fitting_stages(tile, 128, num_staged=2)
            turns = replace(up, rows=64, warpgroups=2, takes_turns=True, stages=stages)
            ways.append(way("in turns", gate_up=turns, down=replace(
                down, rows=128, takes_turns=True, stages=stages)))  # fmt: skip
            whole = fitting_stages(tile, 256)
            ways.append(way("down of 256 rows", down=replace(down, rows=128, stages=whole)))
        else:
            for step in _STEPS:
                wide = {
                    "gate_up": replace(up, step=step, stages=fitting_stages(
                        tile, up.cta_rows, halves=2, step=step)),
                    "down": replace(down, step=step, stages=min(
                        max(2, 6 * 128 // step), fitting_stages(tile, down.cta_rows, step=step))),
                }  # fmt: skip
                ways.append(way(f"steps of {step}", **wide))
        yield case, ways


_KERNELS = {"experts": expert_ways, "dense": dense_ways, "decode": decode_ways}


def all_ways(only: str, chip: Chip) -> list[Case]:
    """Each way as a case of its own, which its shape names."""
    return [
        replace(case, step=way.step, shape=f"{case.shape}, {way.name}", alternatives={}, peers={})
        for kernel, ways_of in _KERNELS.items()
        if any(name in kernel for name in only.split(","))
        for case, ways in ways_of(GLM_4_7, chip)
        for way in ways
    ]


def run(only: str, seconds: float, path: Path | None) -> None:
    """Prints every way's times as they come, and writes them to path."""
    outcomes = over_cases(partial(all_ways, only), default_processes(), seconds)
    card = next(outcomes)
    assert isinstance(card, Card)
    print(f"{card.name}, jax {jax.__version__}: copy {card.copy / 1e12:.2f} TB/s", flush=True)
    cases, results = all_ways(only, card.chip), []
    for outcome in outcomes:
        assert not isinstance(outcome, Card)
        case, result = cases[outcome.place], outcome.result
        results.append({"kernel": case.kernel, "shape": case.shape, **result})
        print(f"{case.kernel} {case.shape}: {_said(case, card, result)}", flush=True)
        if path:
            path.write_text(json.dumps(results, indent=1) + "\n")


def _said(case: Case, card: Card, result: dict[str, Any]) -> str:
    if "failed" in result:
        return result["failed"][:300]
    parts = {name.split("_mosaic")[0]: us for name, us in result["kernels_us"].items() if us > 0.2}
    inside = ", ".join(f"{name} {us:.1f}" for name, us in parts.items()) if len(parts) > 1 else ""
    share = 100 * card.floor(case) * 1e6 / result["us"]
    wrong = "" if result["is_right"] else " WRONG"
    return (
        f"{result['us']:.2f} us, {share:.0f} % of the floor's, error {result['error']:.1e}{wrong}, "
        f"bits {result['bits']} {inside}"
    )


def main(arguments: list[str]) -> None:
    """Runs, and writes the results where it is told to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", default="", help="kernels whose name holds one of these, with commas between"
    )
    parser.add_argument("--seconds", type=float, default=300, help="what may be waited for in all")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args(arguments)
    run(options.only, options.seconds, options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
