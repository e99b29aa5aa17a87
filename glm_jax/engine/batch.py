"""A plan as one padded int32 array.

Knows neither policy nor devices: `glm_jax.shapes` says what each column means.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from glm_jax.engine.plan import Plan
from glm_jax.engine.sequence import Sequence
from glm_jax.shapes import (
    CONTROL_BIASES,
    CONTROL_MASK,
    CONTROL_TOKENS,
    FREQUENCY_PENALTY,
    IS_LAST,
    IS_MASKED,
    MIN_LENGTH,
    MIN_P,
    NUM_BANS,
    NUM_BIASES,
    NUM_FIELDS,
    NUM_LOGPROBS,
    NUM_STOPS,
    NUM_TOKENS,
    PRESENCE_PENALTY,
    PROMPT_LENGTH,
    REPETITION_PENALTY,
    SEED_HIGH,
    SEED_LOW,
    SLOT,
    START,
    STOP_TOKENS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    StepShapes,
)


class Packer:
    """Packs plans, keeping one ready-made row per slot between steps.

    What a sequence's rows share (slot, sampling, page table) is written when it enters its slot
    and extended when it gets a page. Packing a decode step is then a single gather.
    """

    def __init__(self, shapes: StepShapes) -> None:
        self._shapes = shapes
        # Row num_slots stays the padding row: that slot, no tokens, zeros.
        self._rows = np.zeros(
            (shapes.num_slots + 1, NUM_FIELDS + shapes.pages_per_sequence), np.int32
        )
        self._rows[:, SLOT] = np.arange(shapes.num_slots + 1)
        # Per slot, the page list its row was written from, and how much of it.
        self._pages: list[list[int] | None] = [None] * shapes.num_slots
        self._num_pages = [0] * shapes.num_slots
        self._controls = np.zeros((shapes.num_slots, shapes.control_columns), np.int32)
        self._has_new_controls = False

    def new_controls(self) -> NDArray[np.int32] | None:
        """int32[slots, control_columns] for the batch packed last; None where nothing changed."""
        if not self._has_new_controls:
            return None
        self._has_new_controls = False
        return self._controls.copy()

    def pack(self, plan: Plan) -> NDArray[np.int32]:
        """Returns int32[bucket, columns(phase)], an array of its own for every call."""
        if plan.phase == "prefill":
            return self._pack_prefill(plan)
        slots = self._padding_slots(plan)
        slots[: plan.num_rows] = self._decode_slots(plan)
        batch = self._rows[slots]
        batch[: plan.num_rows, NUM_TOKENS] = plan.gains
        return batch

    def _decode_slots(self, plan: Plan) -> list[int]:
        """The slots of a decode step, their rows up to date; most of them are already."""
        pages, num_pages, slots = self._pages, self._num_pages, []
        for _, sequence in plan.samples:
            slot = sequence.slot
            if (
                slot is None
                or pages[slot] is not sequence.pages
                or num_pages[slot] != len(sequence.pages)
                or sequence.request.constraint is not None
            ):
                slot = self._refresh(sequence)
            slots.append(slot)
        return slots

    def _pack_prefill(self, plan: Plan) -> NDArray[np.int32]:
        tile = self._shapes.prefill_tile
        slots = self._padding_slots(plan)
        for chunk in plan.chunks:
            slots[chunk.row : chunk.row + chunk.num_rows] = self._refresh(chunk.sequence)
        batch = np.zeros((slots.size, self._shapes.columns("prefill")), np.int32)
        batch[:, :-tile] = self._rows[slots]
        tokens = batch[:, -tile:]
        for chunk in plan.chunks:
            last = chunk.row + chunk.num_rows - 1
            end = chunk.start + chunk.num_tokens
            batch[chunk.row : last + 1, START] = np.arange(chunk.start, end, tile)
            batch[chunk.row : last, NUM_TOKENS] = tile
            batch[last, NUM_TOKENS] = end - batch[last, START]
            batch[last, IS_LAST] = chunk.is_last
            known = chunk.sequence.known_tokens()
            tokens[chunk.row : last] = known[chunk.start : batch[last, START]].reshape(-1, tile)
            tokens[last, : batch[last, NUM_TOKENS]] = known[batch[last, START] : end]
        return batch

    def _padding_slots(self, plan: Plan) -> NDArray[np.intp]:
        num_rows = self._shapes.rows(plan.phase, plan.num_rows)
        return np.full(num_rows, self._shapes.num_slots, np.intp)

    def _refresh(self, sequence: Sequence) -> int:
        """Brings the row of a sequence's slot up to date; returns the slot."""
        slot = sequence.slot
        assert slot is not None, f"{sequence.request.id} is planned without a slot"
        pages = sequence.pages
        if self._pages[slot] is not pages:
            self._enter(slot, sequence)
        num_known = self._num_pages[slot]
        if num_known < len(pages):
            self._rows[slot, NUM_FIELDS + num_known : NUM_FIELDS + len(pages)] = pages[num_known:]
            self._num_pages[slot] = len(pages)
        constraint = sequence.request.constraint
        if constraint is not None:
            is_masked = not sequence.is_prefilling and constraint.binds(sequence.num_dispatched - 1)
            self._rows[slot, IS_MASKED] = is_masked
            if is_masked:
                mask, words = constraint.mask(), self._controls[slot, CONTROL_MASK]
                words[: mask.size], words[mask.size :] = mask, 0
                self._has_new_controls = True
        return slot

    def _enter(self, slot: int, sequence: Sequence) -> None:
        """Writes what stays the same for as long as the sequence holds the slot."""
        sampling = sequence.request.sampling
        row = self._rows[slot]
        row[START:] = 0
        floats = np.array([sampling.temperature, sampling.top_p, sampling.min_p], np.float32)
        row[[TEMPERATURE, TOP_P, MIN_P]] = floats.view(np.int32)
        row[TOP_K] = sampling.top_k
        halves = np.array([sampling.seed & 0xFFFFFFFF, sampling.seed >> 32], np.uint32)
        row[[SEED_LOW, SEED_HIGH]] = halves.view(np.int32)
        row[NUM_LOGPROBS] = sampling.num_logprobs
        row[PROMPT_LENGTH] = sequence.num_prompt
        # Of more stop tokens than there is room for, the host alone takes note, a little later.
        stops = sorted(sampling.stop_token_ids)[: STOP_TOKENS.stop - STOP_TOKENS.start]
        row[NUM_STOPS] = len(stops)
        row[STOP_TOKENS][: len(stops)] = stops
        penalties = np.array(
            [
                sampling.frequency_penalty,
                sampling.presence_penalty,
                math.log(sampling.repetition_penalty),
            ],
            np.float32,
        )
        row[[FREQUENCY_PENALTY, PRESENCE_PENALTY, REPETITION_PENALTY]] = penalties.view(np.int32)
        if sampling.has_controls:
            self._control(slot, sequence)
        self._pages[slot] = sequence.pages
        self._num_pages[slot] = 0

    def _control(self, slot: int, sequence: Sequence) -> None:
        """Writes which tokens are biased and which are banned at first."""
        sampling = sequence.request.sampling
        row, controls = self._rows[slot], self._controls[slot]
        biases = np.array([bias for _, bias in sampling.logit_bias], np.float32)
        banned = sorted(sampling.stop_token_ids) if sampling.min_tokens else []
        tokens = [token for token, _ in sampling.logit_bias] + banned
        controls[CONTROL_TOKENS][: len(tokens)] = tokens
        controls[CONTROL_BIASES][: biases.size] = biases.view(np.int32)
        row[MIN_LENGTH] = sequence.num_prompt + sampling.min_tokens
        row[[NUM_BIASES, NUM_BANS]] = biases.size, len(banned)
        self._has_new_controls = True
