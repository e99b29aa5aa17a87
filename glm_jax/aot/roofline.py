"""The least time a step can take on a target: memory, arithmetic, sums over devices, launches.

Knows no compiled program: it counts what any program must move, at rates that are stated as assumed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from glm_jax.config import ModelConfig
from glm_jax.model import abstract_weights
from glm_jax.sharding import partition_spec
from glm_jax.targets.target import Peaks

# Measured on eight B200-class devices by others: bytes of a bfloat16 sum, seconds of one call.
_ALL_REDUCE_BYTES = (10e3, 82e3, 328e3, 655e3, 1.31e6, 2.62e6)
_ALL_REDUCE_SECONDS = (7e-6, 8e-6, 9.5e-6, 12e-6, 16e-6, 21e-6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What the roofline takes for granted; every line of a plan rests on these.

    Attributes:
      hbm_share: of the HBM peak that a stream of weights reaches.
      gemm_share: of the FP8 (or bfloat16) peak that products reach.
      attention_share: of the bfloat16 peak that prefill's attention reaches.
      link_share: of the link peak that a large sum reaches.
      kernels_per_layer: launches that do not overlap.
      launch_seconds: of one kernel inside a graph: ramp up and drain.
    """

    hbm_share: float = 0.9
    gemm_share: float = 0.45
    attention_share: float = 0.5
    link_share: float = 0.78
    kernels_per_layer: int = 9
    launch_seconds: float = 1.5e-6

    def sentences(self, is_fp8: bool) -> list[str]:
        """Each assumption in words."""
        kind = "FP8" if is_fp8 else "bf16"
        smallest, largest = _ALL_REDUCE_SECONDS[0], _ALL_REDUCE_SECONDS[-1]
        return [
            f"HBM reaches {self.hbm_share:.0%} of its peak; a weight or a key is read once a step.",
            "Routing is uniform: B tokens touch E(1-(1-k/E)^B) experts; the device with most of "
            "them is waited for.",
            f"A sum over devices takes {smallest * 1e6:.0f} us (one row) to {largest * 1e6:.0f} us "
            f"(256 rows of 5120), as others measured on 8 B200; beyond, {self.link_share:.0%} of the links.",
            f"{self.kernels_per_layer} kernels a layer, {self.launch_seconds * 1e6:.1f} us each, on "
            "top of the rest; nothing overlaps.",
            f"Products reach {self.gemm_share:.0%} of the {kind} peak, prefill's attention "
            f"{self.attention_share:.0%} of the bf16 peak; sampling and the host are hidden.",
        ]


@dataclass(frozen=True, slots=True)
class StepTime:
    """The parts of a step, in seconds; they add up.

    Attributes:
      hbm: reading weights, keys and values.
      compute: arithmetic beyond the time hbm takes.
      all_reduce: sums over devices.
      launches: kernels starting and ending.
    """

    hbm: float
    compute: float
    all_reduce: float
    launches: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.hbm + self.compute + self.all_reduce + self.launches

    @property
    def limit(self) -> str:
        """The part that takes longest."""
        parts = {
            "HBM": self.hbm,
            "compute": self.hbm + self.compute if self.compute else 0.0,
            "all-reduce": self.all_reduce,
            "launches": self.launches,
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Weights of the model in bytes and parameters: those of one expert stack, and all others."""

    dense_bytes: float  # per device, read by every step
    expert_bytes: float  # one expert of every layer
    dense_parameters: float  # over all devices, met by every token
    expert_parameters: float


class Roofline:
    """Times of the steps of one model on one target.

    Args:
      kv_dtype: of the KV cache.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: np.dtype,
        kv_dtype: np.dtype,
        peaks: Peaks,
        num_devices: int,
        assumptions: Assumptions,
    ) -> None:
        self._config = config
        self._peaks = peaks
        self._num_devices = num_devices
        self._assumptions = assumptions
        self._sizes = _sizes(config, dtype, num_devices)
        width = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self._kv_bytes = 2 * width * kv_dtype.itemsize / num_devices
        self._itemsize = np.dtype(dtype).itemsize
        self._product_peak = peaks.fp8 if config.is_fp8 else peaks.bf16

    def decode(self, rows: int, context: int) -> StepTime:
        """A step that gives each of `rows` sequences, `context` positions long, its next token."""
        weights = self._weight_bytes(rows)
        keys = rows * context * self._kv_bytes
        attention = rows * self._attention_flops(context)
        return self._step(rows, weights + keys, attention, head_rows=rows)

    def prefill(self, chunk: int, prompt: int) -> StepTime:
        """A step over `chunk` tokens of prompts that are `prompt` tokens long, averaged over them."""
        # A token sees half of its prompt on average; a prompt's keys are read once for each chunk.
        attention = chunk * self._attention_flops(prompt / 2)
        keys = max(1.0, chunk / prompt) * prompt / 2 * self._kv_bytes
        rows = max(1, chunk // prompt)
        return self._step(chunk, self._weight_bytes(chunk) + keys, attention, head_rows=rows)

    def _step(self, tokens: int, num_bytes: float, attention: float, head_rows: int) -> StepTime:
        given, peaks, layers = self._assumptions, self._peaks, self._config.num_hidden_layers
        hbm = num_bytes / (given.hbm_share * peaks.hbm)
        chosen = self._config.num_experts_per_tok
        parameters = self._sizes.dense_parameters + chosen * self._sizes.expert_parameters
        head = self._config.vocab_size * self._config.hidden_size
        compute = 2 * tokens * parameters / (given.gemm_share * self._product_peak)
        compute += 2 * head_rows * head / (given.gemm_share * peaks.bf16)
        compute += attention / (given.attention_share * peaks.bf16)
        compute /= self._num_devices
        return StepTime(
            hbm=hbm,
            compute=max(0.0, compute - hbm),
            all_reduce=2 * layers * self._all_reduce(tokens),
            launches=layers * given.kernels_per_layer * given.launch_seconds,
        )

    def _weight_bytes(self, tokens: int) -> float:
        experts = busiest_device_experts(self._config, tokens, self._num_devices)
        return self._sizes.dense_bytes + experts * self._sizes.expert_bytes

    def _attention_flops(self, context: float) -> float:
        width = self._config.num_attention_heads * self._config.head_dim
        return 4 * width * context * self._config.num_hidden_layers

    def _all_reduce(self, tokens: int) -> float:
        """Seconds of one sum of bfloat16[tokens, hidden_size] over the devices."""
        if self._num_devices == 1:
            return 0.0
        num_bytes = tokens * self._config.hidden_size * self._itemsize
        small = float(np.interp(num_bytes, _ALL_REDUCE_BYTES, _ALL_REDUCE_SECONDS))
        moved = 2 * (self._num_devices - 1) / self._num_devices * num_bytes
        return max(small, moved / (self._assumptions.link_share * self._peaks.link))


def busiest_device_experts(config: ModelConfig, tokens: int, num_devices: int) -> float:
    """Experts that `tokens` tokens touch on the device with most of them, on average.

    Each of a device's experts is touched with probability 1-(1-k/E)^tokens, independently; the
    largest of num_devices such binomials, each over E / num_devices experts.
    """
    experts = config.n_routed_experts // num_devices
    touched = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens
    at_most, expected = 0.0, 0.0
    for number in range(experts):
        share = math.comb(experts, number) * touched**number * (1 - touched) ** (experts - number)
        at_most += share
        expected += 1 - at_most**num_devices
    return expected


def _sizes(config: ModelConfig, dtype: np.dtype, num_devices: int) -> _Sizes:
    dense_bytes = dense_parameters = expert_bytes = expert_parameters = 0.0
    for path, spec in abstract_weights(config, dtype).items():
        number = math.prod(spec.shape)
        if ".experts." in path:
            expert_bytes += number * spec.dtype.itemsize / config.n_routed_experts
            expert_parameters += _parameters(path, number) / config.n_routed_experts
        elif path.startswith("embed_tokens"):
            continue  # a row a token: nothing beside the rest
        else:
            is_shared_out = any(place is not None for place in partition_spec(spec.axes))
            dense_bytes += number * spec.dtype.itemsize / (num_devices if is_shared_out else 1)
            if not path.startswith("lm_head"):
                dense_parameters += _parameters(path, number)
    return _Sizes(dense_bytes, expert_bytes, dense_parameters, expert_parameters)


def _parameters(path: str, number: int) -> int:
    """Numbers that meet every token in a product; scales, norms and biases do not count."""
    return number if path.endswith((".values", ".gate.weight")) else 0


Cells = list[tuple[int, int, StepTime]]


def table(
    rows: tuple[int, ...], columns: tuple[int, ...], time: Callable[[int, int], StepTime]
) -> Cells:
    """time(row, column) for every pair, row by row."""
    return [(row, column, time(row, column)) for row in rows for column in columns]
