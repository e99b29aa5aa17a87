"""Every heavy operation as a step runs it: the choice between a kernel and the reference.

Knows no layer and no model. The choice is bound when a step is made, and travels with the model.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from glm_jax import cache as kv_cache
from glm_jax import ops, sharding
from glm_jax.cache import KVCache
from glm_jax.ops import HeadNorms, Layer, NormedRows, Rows
from glm_jax.pallas import (
    all_reduce,
    decode_attention,
    dense_matmul,
    kv_write,
    norm,
    prefill_attention,
    router,
)
from glm_jax.pallas.chip import Chip, chip_in_trace
from glm_jax.pallas.dispatch import stage
from glm_jax.pallas.grouped_down import combine, grouped_down
from glm_jax.pallas.grouped_gate_up import grouped_gate_up
from glm_jax.pallas.quantize import quantize_hidden

logger = logging.getLogger(__name__)

# A stacked weight: its values, and their scale where they are FP8.
Weight = tuple[Array, Array | None]
# Products still to be summed over devices, one for each kv head's share of the model: float32, or a
# single one in the activations' dtype.
Partials = Float[Array, "R T D"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The operations, as they are to run wherever a step is traced: on a CPU the references; on a GPU
    the kernels, which are for FP8 weights and as many devices as there are kv heads.

    Attributes:
      allow_reference: on a GPU, what has no kernel runs as XLA makes it of the reference, which copies
        weights and is many times slower; otherwise it is an error.
      fused_all_reduce: sums over devices, the addition and the norm in one kernel of ours, which reads
        the other devices' memory, up to 256 rows; otherwise the sum is XLA's. Off, since no machine
        with several GPUs has run it yet.
      interpreted: kernels of this chip, interpreted on a CPU: for tests.

    Raises:
      NotImplementedError: any operation, when a GPU has no kernel for it and the reference may not
        take its place.
    """

    allow_reference: bool = False
    fused_all_reduce: bool = False
    interpreted: Chip | None = None

    @property
    def _interprets(self) -> bool:
        return self.interpreted is not None

    def _run[T](self, kernel: Callable[[Chip], T], reference: Callable[[], T]) -> T:
        chip = self.interpreted or chip_in_trace()
        if chip is None:
            return reference()
        try:
            return kernel(chip)
        except NotImplementedError as error:
            if not self.allow_reference:
                raise NotImplementedError(
                    f"{error}; --allow-reference-ops runs the plain operation in its place"
                ) from error
            logger.warning("no kernel, so the plain operation runs, slowly: %s", error)
            return reference()

    def add_norm(
        self,
        residual: Float[Array, "T D"],
        added: Float[Array, "T D"] | None,
        weight: Float[Array, "L D"],
        layer: Layer,
        *,
        eps: float,
        is_fp8: bool,
    ) -> NormedRows:
        """residual + added, and the same normed and quantized for what follows."""

        def kernel(chip: Chip) -> NormedRows:
            normed = norm.add_norm_quantize(
                residual, added, weight, _index(layer), eps=eps, chip=chip,
                interpret=self._interprets,
            )  # fmt: skip
            return _as_ours(normed, is_fp8)

        return self._run(
            kernel,
            lambda: ops.add_norm(residual, added, weight, layer, eps=eps, is_fp8=is_fp8),
        )

    def sum_add_norm(
        self,
        partials: Partials,
        residual: Float[Array, "T D"],
        weight: Float[Array, "L D"],
        layer: Layer,
        *,
        eps: float,
        is_fp8: bool,
    ) -> NormedRows:
        """add_norm of what the partials of all devices sum up to."""
        chip = self.interpreted or chip_in_trace()
        is_small = residual.shape[0] <= all_reduce.MAX_ROWS
        if self.fused_all_reduce and chip is not None and is_small and len(partials) == 1:
            normed = all_reduce.all_reduce_add_norm(
                partials[0], residual, weight, _index(layer), eps=eps,
                axis_name=sharding.MESH_AXIS, num_devices=sharding.num_devices(), chip=chip,
                interpret=self._interprets,
            )  # fmt: skip
            return _as_ours(normed, is_fp8)
        added = sharding.sum_partials(partials, residual.dtype)
        return self.add_norm(residual, added, weight, layer, eps=eps, is_fp8=is_fp8)

    def product(
        self, rows: Rows, weight: Weight, bias: Float[Array, " L *N"] | None, layer: Layer
    ) -> Float[Array, " T *N"]:
        """A linear layer of rows that are quantized already if the weight is FP8."""
        values, scale = weight

        def kernel(chip: Chip) -> Array:
            x, x_scale = _quantized(rows, values)
            assert scale is not None
            outputs = values.shape[1:-1]
            out = dense_matmul.matmul(
                x,
                x_scale,
                values.reshape(len(values), -1, values.shape[-1]),
                scale.reshape(len(scale), -1),
                None if bias is None else bias.reshape(len(bias), -1),
                _index(layer),
                chip=chip,
                interpret=self._interprets,
            )
            return out.reshape(-1, *outputs)

        return self._run(kernel, lambda: ops.product(rows, values, scale, bias, layer))

    def partial_products(
        self, rows: Rows, weight: Weight, layer: Layer, group_size: int
    ) -> Partials:
        """The row-parallel form: a partial product for each group of the rows' columns."""
        values, scale = weight

        def kernel(chip: Chip) -> Partials:
            x, x_scale = _quantized(rows, values)
            assert scale is not None
            _check_single(values.shape[-1] // group_size)
            out = dense_matmul.matmul(
                x, x_scale, values, scale, None, _index(layer), chip=chip,
                interpret=self._interprets,
            )  # fmt: skip
            return out[None]

        return self._run(
            kernel, lambda: ops.partial_products(rows, values, scale, layer, group_size)
        )

    def gated_silu(self, gate_up: Float[Array, "T 2 F"], *, is_fp8: bool, num_groups: int) -> Rows:
        """silu(gate) * up, made ready for a row-parallel layer of so many groups."""
        return ops.as_rows(ops.gated_silu(gate_up), is_fp8=is_fp8, num_groups=num_groups)

    def rotary_table(
        self, positions: Int32[Array, "B T"], rotary_dim: int, theta: float
    ) -> Float[Array, "B T 2 half"] | None:
        """What every layer's write can share; None where the reference computes it anew."""
        if (self.interpreted or chip_in_trace()) is None:
            return None
        return kv_write.rotary_table(positions, rotary_dim, theta)

    def write(
        self,
        qkv: Float[Array, "B T K G2 H"],
        norms: HeadNorms,
        positions: Int32[Array, "B T"],
        page_table: Int32[Array, "B P"],
        layer: Layer,
        cache: KVCache,
        rotary: Float[Array, "B T 2 half"] | None,
    ) -> tuple[Float[Array, "B T K G H"], KVCache]:
        """Norms and rotates heads, stores keys and values in the pages; returns the queries.

        Args:
          rotary: of the positions, as rotary_table makes it.
        """

        def kernel(chip: Chip) -> tuple[Array, KVCache]:
            q, k_pages, v_pages = kv_write.write(
                qkv,
                norms.q_norm,
                norms.k_norm,
                positions,
                page_table,
                layer,
                *cache,
                eps=norms.eps,
                rotary_dim=norms.rotary_dim,
                theta=norms.theta,
                table=rotary,
                chip=chip,
                interpret=self._interprets,
            )
            return q, KVCache(k_pages, v_pages)

        def reference() -> tuple[Array, KVCache]:
            q, k, v = ops.split_heads(qkv, norms, positions, layer)
            return q, kv_cache.write(cache, layer, page_table, positions, k, v)

        return self._run(kernel, reference)

    def attend(
        self,
        q: Float[Array, "B T K G H"],
        cache: KVCache,
        layer: Layer,
        page_table: Int32[Array, "B P"],
        positions: Int32[Array, "B T"],
        *,
        is_fp8: bool,
    ) -> Rows:
        """Attends over the pages; the rows are ready for o_proj, with a scale for each kv head."""
        num_rows, num_tokens, kv_heads = q.shape[:3]

        def as_rows(attended: Float[Array, "B T K G H"]) -> Rows:
            flat = attended.reshape(num_rows * num_tokens, -1)
            return ops.as_rows(flat, is_fp8=is_fp8, num_groups=kv_heads)

        def kernel(chip: Chip) -> Rows:
            pages = (cache.k, cache.v, layer, page_table, positions)
            on = {"chip": chip, "interpret": self._interprets}
            if num_tokens > 1:
                return as_rows(prefill_attention.attend(q, *pages, **on))
            if not is_fp8:
                return as_rows(decode_attention.attend(q, *pages, **on))
            values, scale = decode_attention.attend_quantized(q, *pages, **on)
            return Rows(None, values.reshape(num_rows, -1), scale)

        def reference() -> Rows:
            return as_rows(ops.paged_attention(q, *cache, layer, page_table, positions))

        return self._run(kernel, reference)

    def route(
        self,
        x: Float[Array, "T D"],
        weight: Float[Array, "L E D"],
        bias: Float32[Array, "L E"],
        layer: Layer,
        *,
        num_experts_per_tok: int,
        norm_topk_prob: bool,
        routed_scaling_factor: float,
    ) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"], Float32[Array, "T E"] | None]:
        """Each token's experts, their weights, and the scores of all, which a kernel does not tell."""
        choice = {
            "num_experts_per_tok": num_experts_per_tok,
            "norm_topk_prob": norm_topk_prob,
            "routed_scaling_factor": routed_scaling_factor,
        }

        def kernel(chip: Chip) -> tuple[Array, Array, None]:
            experts, weights = router.route(
                x, weight, bias, _index(layer), **choice, chip=chip, interpret=self._interprets
            )
            return experts, weights, None

        return self._run(kernel, lambda: ops.route(x, weight, bias, layer, **choice))

    def experts(
        self,
        rows: Rows,
        chosen: Int32[Array, "T k"],
        weights: Float32[Array, "T k"],
        experts: tuple[Weight, Weight],
        shared: tuple[Weight, Weight],
        layer: Layer,
        *,
        group_size: int,
        shared_group_size: int,
    ) -> Partials:
        """This device's experts for the tokens that chose them, and its part of the shared expert.

        Args:
          experts, shared: gate_up and down projections.
          group_size: experts for each partial sum.
          shared_group_size: columns of the shared expert's width for each partial sum.
        """
        gate_up, down = experts
        num_local = down[0].shape[1]
        first = sharding.device_index() * num_local

        def kernel(chip: Chip) -> Partials:
            _check_single(num_local // group_size)
            return self._experts_on(chip, rows, chosen, weights, first, experts, shared, layer)

        def reference() -> Partials:
            routing = ops.local_routing(chosen, weights, first, num_local)
            with jax.named_scope("experts"):
                routed = ops.experts(rows, routing, *gate_up, *down, layer, group_size)
            with jax.named_scope("shared_experts"):
                return routed + self.gated_mlp(rows, shared, layer, shared_group_size)

        return self._run(kernel, reference)

    def _experts_on(
        self,
        chip: Chip,
        rows: Rows,
        chosen: Int32[Array, "T k"],
        weights: Float32[Array, "T k"],
        first: Int32[Array, ""],
        experts: tuple[Weight, Weight],
        shared: tuple[Weight, Weight],
        layer: Layer,
    ) -> Partials:
        """Products of the chosen experts alone, the shared expert's tiles among them."""
        on = {"chip": chip, "interpret": self._interprets}
        (gate_up, gate_up_scale), (down, down_scale) = experts
        (shared_gate_up, shared_gate_up_scale), (shared_down, shared_down_scale) = shared
        x, x_scale = _quantized(rows, gate_up)
        assert gate_up_scale is not None and down_scale is not None, "quantized like the rows"
        plan = stage(x, x_scale, chosen, first, down.shape[1], **on)
        inner, shared_inner = grouped_gate_up(
            x, x_scale, plan, gate_up, gate_up_scale, _index(layer),
            shared_values=shared_gate_up, shared_scale=shared_gate_up_scale, **on,
        )  # fmt: skip
        hidden, shared_hidden = quantize_hidden(
            inner, shared_inner, plan, interpret=self._interprets
        )
        assert shared_hidden is not None
        out, shared_out = grouped_down(
            *hidden, plan, down, down_scale, _index(layer),
            shared_hidden=shared_hidden[0], shared_hidden_scale=shared_hidden[1],
            shared_values=shared_down, shared_scale=shared_down_scale, **on,
        )  # fmt: skip
        total = combine(out, shared_out, plan, weights)
        return sharding.round_partials(total[None], out.dtype)

    def gated_mlp(
        self, rows: Rows, weights: tuple[Weight, Weight], layer: Layer, group_size: int
    ) -> Partials:
        """down(silu(gate(x)) * up(x)), in partial products over groups of the width."""
        gate_up, down = weights
        hidden = self.product(rows, gate_up, None, layer)
        num_groups = hidden.shape[-1] // group_size
        inner = self.gated_silu(hidden, is_fp8=down[1] is not None, num_groups=num_groups)
        return self.partial_products(inner, down, layer, group_size)


def _index(layer: Layer) -> Int32[Array, ""]:
    return jnp.asarray(layer, jnp.int32)


def _as_ours(normed: norm.NormedRows, is_fp8: bool) -> NormedRows:
    values, scale = (normed.values, normed.scale) if is_fp8 else (None, None)
    return NormedRows(normed.residual, Rows(normed.normed, values, scale))


def _quantized(rows: Rows, values: Array) -> tuple[Array, Array]:
    """The rows that a kernel multiplies with FP8 values.

    Raises:
      NotImplementedError: the values are not FP8, so neither are the rows.
    """
    if rows.values is None or rows.scale is None:
        raise NotImplementedError(
            f"weights are {values.dtype.name}: products on a GPU are for FP8 ones (python -m "
            "checkpoints quantize makes them)"
        )
    return rows.values, rows.scale


def _check_single(num_groups: int) -> None:
    """Refuses more than one partial sum a device.

    Raises:
      NotImplementedError: a device holds the shares of several kv heads.
    """
    if num_groups != 1:
        raise NotImplementedError(
            f"{num_groups} kv heads a device: on GPUs a step is for as many devices as kv heads"
        )


DEFAULT_KERNELS = Kernels()
