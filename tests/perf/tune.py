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
from tests.perf import attention_cases, expert_cases, product_cases
from tests.perf.card import Card
from tests.perf.measure import Case, Step
from tests.perf.sizes import GLM_4_7, Sizes
from tests.perf.turns import default_processes, over_cases

# (rows, context) and (split, tile, stages) of decode attention.
_DECODE_SHAPES = ("B=64 S=8192", "B=1 S=8192", "B=64 S=2048", "B=256 S=2048")
_DECODE_WAYS = ((512, 64, 3), (1024, 64, 3), (1024, 128, 2), (512, 128, 2), (512, 64, 2))
_DENSE_TOKENS = (1, 64, 256, 8192)
_EXPERT_TOKENS = (64, 256, 8192)
_FILLS = ((64, 256), (48, 256), (48, 128), (32, 256))


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
            q, k_pages, v_pages, table, positions, counters = operands
            return decode_attention.attend(
                q, k_pages, v_pages, layer, table, positions, chip=chip, config=config,
                counters=counters,
            )  # fmt: skip

        return Way(f"split {split}, tile {tile}, {stages} stages", step)

    for shape in _DECODE_SHAPES:
        yield cases[shape], [way(*sizes) for sizes in _DECODE_WAYS]


def _dense_configs(tokens: int, rows: int) -> Iterator[tuple[str, TuningConfig]]:
    """Tiles of (tokens, rows), in steps of one line, two or four."""
    if tokens > 512:
        stages = fitting_stages(128, 256)
        yield "256 rows", TuningConfig(tokens=128, rows=128, warpgroups=2, stages=stages)
        stages = fitting_stages(128, 128, num_staged=2)
        yield "in turns", TuningConfig(128, 128, 2, stages, takes_turns=True)
        return
    ways = {
        1: ((16, 16, 512), (16, 32, 256)),
        64: ((32, 32, 512), (32, 64, 256), (64, 32, 256)),
        256: ((64, 64, 256), (64, 128, 256), (128, 64, 256)),
    }
    for tile, fill, step in ways[tokens]:
        warpgroups = 2 if fill > 64 else 1
        stages = fitting_stages(tile, 64 * warpgroups, step=step)
        config = TuningConfig(
            tokens=tile, rows=64, warpgroups=warpgroups, stages=stages, step=step,
            fill=fill if warpgroups == 1 else None,
        )  # fmt: skip
        yield f"{tile} tokens, {fill} rows, {step}", config


def dense_ways(sizes: Sizes, chip: Chip) -> Iterator[tuple[Case, list[Way]]]:
    """The projections: how large tiles are, and how wide a step."""

    def way(name: str, config: TuningConfig | None) -> Way:
        def step(operands: Any, layer: jax.Array) -> jax.Array:
            x, x_scale, values, scale, bias = operands
            return dense_matmul.matmul(
                x, x_scale, values, scale, bias, layer, chip=chip, config=config
            )

        return Way(name, step)

    heads = sizes.query_groups * 128
    shapes = {"qkv": heads + 256, "o": sizes.hidden}
    for case in product_cases.dense_cases(
        replace(sizes, tokens=_DENSE_TOKENS, split_tokens=()), chip, False
    ):
        name, tokens = case.shape.split(" T=")
        configs = _dense_configs(int(tokens), shapes[name])
        yield case, [way("default", None), *(way(*named) for named in configs)]


def expert_ways(sizes: Sizes, chip: Chip) -> Iterator[tuple[Case, list[Way]]]:
    """The experts' two products: how wide steps are, and whether warpgroups take turns."""

    def way(name: str, **configs: TuningConfig) -> Way:
        return Way(name, partial(expert_cases.expert_step, chip=chip, **configs))

    for case in expert_cases.on_picks(sizes, _EXPERT_TOKENS, chip, False):
        tokens = int(case.shape.removeprefix("T="))
        tile = dispatch.default_tile(tokens, chip)
        up = grouped_gate_up.default_config(chip, tile, sizes.expert_width, tokens)
        down = grouped_down.default_config(chip, tile)
        ways = [way("default")]
        if tokens > 512:
            stages = fitting_stages(tile, 128, num_staged=2)
            turns = replace(up, rows=64, warpgroups=2, takes_turns=True, stages=stages)
            ways.append(way("gate_up in turns", gate_up=turns))
        else:
            for fill, step in _FILLS:
                cuts: dict[str, TuningConfig] = {}
                for name, config, halves in (("gate_up", up, 2), ("down", down, 1)):
                    stages = fitting_stages(tile, 64, halves=halves, step=step)
                    cuts[name] = replace(
                        config,
                        warpgroups=1,
                        rows=64,
                        fill=fill,
                        step=step,
                        stages=stages,
                        is_stacked=False,
                    )
                ways.append(way(f"{fill} rows, steps of {step}", **cuts))
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
