"""Every heavy operation as a step runs it: its kernel, its form in C, or the reference.

Knows no layer and no model. The choice is bound when a step is made, and travels with the model.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from glm_jax import attention_kernels, expert_kernels, host_kernels, ops, references, sharding
from glm_jax.cache import KVCache
from glm_jax.operands import (
    ExpertRows,
    Layer,
    Partials,
    Pending,
    Shifted,
    Staged,
    Weight,
    Workspace,
    check_single,
    index,
    plain,
    quantized,
)
from glm_jax.ops import HeadNorms, NormedRows, Rows
from glm_jax.pallas import (
    all_reduce,
    decode_attention,
    dense_matmul,
    grid,
    inbox,
    kv_write,
    norm,
    prefill_attention,
    route_stage,
    router,
)
from glm_jax.pallas.chip import Chip
from glm_jax.selection import Selection

AttentionPlan = prefill_attention.Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels(Selection):
    """The operations, as they are to run wherever a step is traced.

    Raises:
      NotImplementedError: any operation, when a GPU has no kernel for it and the reference may not
        take its place.
    """

    def shifted(self, layer: ops.Layer, by: int) -> Layer:
        """layer + by, which kernels add up themselves."""
        return layer + by if self._chip() is None else Shifted(jnp.asarray(layer, jnp.int32), by)

    def _fuses_sums(self, num_rows: int) -> bool:
        # Not other processes' memory, nor what references leave: it is wider, and of XLA's kernels.
        reaches = jax.process_count() == 1 and num_rows <= all_reduce.MAX_ROWS
        return self.fused_all_reduce and reaches and not self.allow_reference

    def workspace(self, num_rows: int, width: int, num_local: int) -> Workspace | None:
        """What kernels of so many rows and experts of this device share; None where each does without."""
        if num_rows > route_stage.MAX_TOKENS or self._interprets or (chip := self._chip()) is None:
            return None
        first = sharding.device_index() * num_local
        devices, box, fuses = sharding.num_devices(), None, self._fuses_sums(num_rows)
        if devices > 1 and fuses and width % inbox.UNIT == 0:
            axis = sharding.MESH_AXIS
            box = inbox.make_inbox(num_rows, width, axis_name=axis, num_devices=devices)
        routing = route_stage.make_memory(num_rows, width, num_local, chip)
        is_fused = fuses and (devices == 1 or box is not None)
        return Workspace(routing, grid.make_counter(), box, first, is_fused)

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
            at, shift = (layer, 0) if isinstance(layer, int) else index(layer)
            normed = norm.add_norm_quantize(
                residual, added, weight, at, eps=eps, chip=chip, shift=shift,
                interpret=self._interprets,
            )  # fmt: skip
            return _as_ours(normed, is_fp8)

        operands = residual, added, weight
        return self._run(
            kernel, lambda: ops.add_norm(*operands, plain(layer), eps=eps, is_fp8=is_fp8)
        )

    def sum_add_norm(
        self,
        pending: Pending,
        residual: Float[Array, "T D"],
        weight: Float[Array, "L D"],
        layer: Layer,
        *,
        eps: float,
        is_fp8: bool,
        workspace: Workspace | None = None,
        later: Layer = 0,
    ) -> tuple[NormedRows, ops.Layer]:
        """add_norm of what is pending on all devices, summed; and the place that later names, as one number."""

        def apart() -> tuple[NormedRows, ops.Layer]:
            if isinstance(pending, ExpertRows):
                own = all_reduce.add_up(all_reduce.Summands(*pending), interpret=self._interprets)
                added = sharding.sum_in_order(own)
            elif self._chip() is not None and len(pending) == 1:
                added = sharding.sum_in_order(sharding.round_partials(pending, residual.dtype)[0])
            else:
                added = sharding.sum_partials(pending, residual.dtype)
            normed = self.add_norm(residual, added, weight, layer, eps=eps, is_fp8=is_fp8)
            return normed, plain(later)

        def together(chip: Chip) -> tuple[NormedRows, ops.Layer]:
            (at, shift), is_rows = index(layer), isinstance(pending, ExpertRows)
            normed = all_reduce.all_reduce_add_norm(
                all_reduce.Summands(*pending) if is_rows else pending[0],
                residual, weight, at, eps=eps, axis_name=sharding.MESH_AXIS,
                num_devices=sharding.num_devices(), chip=chip, shift=shift, inbox=box,
                tells=index(later)[1] or None, interpret=self._interprets,
            )  # fmt: skip
            return _as_ours(normed, is_fp8), plain(later) if normed.place is None else normed.place

        is_whole = isinstance(pending, ExpertRows) or len(pending) == 1
        box = None if workspace is None else workspace.inbox
        reaches = self._interprets or box is not None or sharding.num_devices() == 1
        fuses = is_whole and reaches and self._fuses_sums(residual.shape[0])
        return self._run(together, apart) if fuses else apart()

    def product(
        self, rows: Rows, weight: Weight, bias: Float[Array, " L *N"] | None, layer: Layer
    ) -> Float[Array, " T *N"]:
        """A linear layer of rows that are quantized already if the weight is FP8."""
        values, scale = weight

        def kernel(chip: Chip) -> Array:
            x, x_scale = quantized(rows, values)
            assert scale is not None
            outputs = values.shape[1:-1]
            out = dense_matmul.matmul(
                x, x_scale,
                values.reshape(len(values), -1, values.shape[-1]),
                scale.reshape(len(scale), -1),
                None if bias is None else bias.reshape(len(bias), -1),
                _index(layer), chip=chip, interpret=self._interprets,
            )  # fmt: skip
            return out.reshape(-1, *outputs)

        operands = rows, values, scale, bias
        return self._run(kernel, lambda: self._plain.product(*operands, plain(layer)))

    def partial_products(
        self, rows: Rows, weight: Weight, layer: Layer, group_size: int
    ) -> Partials:
        """The row-parallel form: a partial product for each group of the rows' columns."""
        values, scale = weight

        def kernel(chip: Chip) -> Partials:
            x, x_scale = quantized(rows, values)
            assert scale is not None
            check_single(values.shape[-1] // group_size)
            out = dense_matmul.matmul(
                x, x_scale, values, scale, None, _index(layer), chip=chip,
                interpret=self._interprets,
            )  # fmt: skip
            return out[None]

        return self._run(
            kernel,
            lambda: self._plain.partial_products(rows, values, scale, plain(layer), group_size),
        )

    def vocab_logits(
        self, x: Float[Array, "T D"], table: Float[Array, "V D"]
    ) -> Float32[Array, "T V"]:
        """The output head; on a GPU it is XLA's own product."""
        return self._plain.vocab_logits(x, table)

    def gated_silu(self, gate_up: Float[Array, "T 2 F"], *, is_fp8: bool, num_groups: int) -> Rows:
        """silu(gate) * up, made ready for a row-parallel layer of so many groups."""
        return ops.as_rows(ops.gated_silu(gate_up), is_fp8=is_fp8, num_groups=num_groups)

    def rotary_table(
        self, positions: Int32[Array, "B T"], rotary_dim: int, theta: float
    ) -> Float[Array, "B T 2 half"] | None:
        """What every layer's write can share; None where the reference computes it anew."""
        kernels = self._plain if self._chip() is None else kv_write
        return kernels.rotary_table(positions, rotary_dim, theta)

    def write(
        self,
        qkv: Float[Array, "B T K G2 H"],
        norms: HeadNorms,
        positions: Int32[Array, "B T"],
        page_table: Int32[Array, "B P"],
        layer: ops.Layer,
        cache: KVCache,
        rotary: Float[Array, "B T 2 half"] | None,
    ) -> tuple[Float[Array, "B T K G H"], KVCache]:
        """Norms and rotates heads, stores keys and values in the pages; returns the queries.

        Args:
          rotary: of the positions, as rotary_table makes it.
        """
        inputs = attention_kernels.Inputs(qkv, norms, positions, page_table, layer, cache, rotary)

        def kernel(chip: Chip) -> tuple[Array, KVCache]:
            return attention_kernels.write(chip, inputs, interpret=self._interprets)

        return self._run(kernel, lambda: self._plain.write(*inputs))

    def attention_counters(self, batch: tuple[int, ...], kv_heads: int) -> jax.Ref | None:
        """What every layer's attention can share, for [rows, tokens]; None where it does without."""
        num_rows, num_tokens = batch
        if self._interprets or self._chip() is None or num_tokens > 1:
            return None
        return decode_attention.make_counters(num_rows, kv_heads)

    def attention_plan(
        self, positions: Int32[Array, "B T"], query_groups: int
    ) -> AttentionPlan | None:
        """What every layer's attention of a prefill step needs to know of the positions."""
        if self._interprets or (chip := self._chip()) is None or positions.shape[1] == 1:
            return None
        return prefill_attention.make_plan(positions, query_groups, chip=chip)

    def write_and_attend(
        self,
        qkv: Float[Array, "B T K G2 H"],
        norms: HeadNorms,
        positions: Int32[Array, "B T"],
        page_table: Int32[Array, "sequences P"],
        layer: ops.Layer,
        cache: KVCache,
        rotary: Float[Array, "B T 2 half"] | None,
        *,
        is_fp8: bool,
        counters: jax.Ref | None = None,
        plan: AttentionPlan | None = None,
        rows_per_sequence: int = 1,
    ) -> tuple[Rows, KVCache]:
        """`write`, then attends over the pages: rows for o_proj, with a scale for each kv head.

        Args:
          counters, plan: as attention_counters and attention_plan make them; or a layer makes its plan.
          rows_per_sequence: so many rows, of one of the table, see what is written for those before.
        """
        inputs = attention_kernels.Inputs(qkv, norms, positions, page_table, layer, cache, rotary)

        def kernel(chip: Chip) -> tuple[Rows, KVCache]:
            return attention_kernels.write_and_attend(
                chip, inputs, is_fp8=is_fp8, counters=counters, plan=plan,
                rows_per_sequence=rows_per_sequence, interpret=self._interprets,
            )  # fmt: skip

        def reference() -> tuple[Rows, KVCache]:
            rows = inputs._replace(page_table=jnp.repeat(page_table, rows_per_sequence, axis=0))
            q, pages = self._plain.write(*rows)
            attended = self._plain.paged_attention(q, *pages, layer, rows.page_table, positions)
            return attention_kernels.as_rows(attended, is_fp8), pages

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
            at, shift = index(layer)
            experts, weights = router.route(
                x, weight, bias, at, **choice, chip=chip, shift=shift, interpret=self._interprets
            )
            return experts, weights, None

        return self._run(kernel, lambda: self._plain.route(x, weight, bias, plain(layer), **choice))

    def stage(
        self,
        rows: Rows,
        weight: Float[Array, "L E D"],
        bias: Float32[Array, "L E"],
        layer: Layer,
        num_local: int,
        workspace: Workspace,
        **choice: Any,
    ) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"], Array | None, Staged | None]:
        """What route returns, and the tokens in the order of this device's num_local experts."""
        x = rows.plain
        assert x is not None, "the router reads rows that are not quantized"

        def kernel(chip: Chip) -> tuple[Array, Array, None, Staged]:
            chosen = router.Choice(
                weight.shape[1], choice["num_experts_per_tok"], choice["norm_topk_prob"],
                choice["routed_scaling_factor"],
            )  # fmt: skip
            operands = (rows, weight, bias, layer, chosen, num_local, workspace)
            experts, weights, staged = expert_kernels.stage(chip, *operands)
            return experts, weights, None, staged

        def reference() -> tuple[Array, Array, Array, None]:
            return *self._plain.route(x, weight, bias, plain(layer), **choice), None

        return self._run(kernel, reference)

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
        staged: Staged | None = None,
    ) -> Pending:
        """This device's experts for the tokens that chose them, and its part of the shared expert.

        Args:
          staged: what route has made ready.
          experts, shared: gate_up and down projections.
          group_size: experts for each partial sum.
          shared_group_size: columns of the shared expert's width for each partial sum.
        """
        num_local = experts[1][0].shape[1]
        first = sharding.device_index() * num_local

        def kernel(chip: Chip) -> Pending:
            check_single(num_local // group_size)
            return expert_kernels.products(
                chip, rows, chosen, weights, staged, first, experts, shared, layer,
                interpret=self._interprets,
            )  # fmt: skip

        def reference() -> Pending:
            operands = (rows, chosen, weights, first, experts)
            if self._runs_c:
                return host_kernels.experts(*operands, shared, plain(layer), group_size=group_size)
            with jax.named_scope("experts"):
                routed = references.experts(*operands, plain(layer), group_size)
            with jax.named_scope("shared_experts"):
                return routed + self.gated_mlp(rows, shared, layer, shared_group_size)

        return self._run(kernel, reference)

    def gated_mlp(
        self, rows: Rows, weights: tuple[Weight, Weight], layer: Layer, group_size: int
    ) -> Partials:
        """down(silu(gate(x)) * up(x)), in partial products over groups of the width."""
        if self._runs_c:
            return host_kernels.gated_mlp(rows, weights, plain(layer), group_size)
        gate_up, down = weights
        hidden = self.product(rows, gate_up, None, layer)
        num_groups = hidden.shape[-1] // group_size
        inner = self.gated_silu(hidden, is_fp8=down[1] is not None, num_groups=num_groups)
        return self.partial_products(inner, down, layer, group_size)


def _index(layer: Layer) -> Int32[Array, ""]:
    return jnp.asarray(plain(layer), jnp.int32)


def _as_ours(normed: norm.NormedRows, is_fp8: bool) -> NormedRows:
    values, scale = (normed.values, normed.scale) if is_fp8 else (None, None)
    return NormedRows(normed.residual, Rows(normed.normed, values, scale))


DEFAULT_KERNELS = Kernels()
# For derivatives, and for looking inside.
PLAIN_KERNELS = Kernels(native=False)
