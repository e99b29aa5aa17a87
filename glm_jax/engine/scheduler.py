"""Which sequences run in the next step. Policy only.

Knows neither arrays nor threads: it turns sequences into plans and accounts for slots and pages.

The policy:

* Rank is priority, then arrival. Admission is strict: nobody overtakes a sequence of lower rank
  number that does not fit yet. Admission takes the pages of the tokens that are known, and leaves
  one free page to each sequence that runs.
* Leading pages that the cache already holds are shared in place of being computed. At least the
  last known token is always computed: the next one is sampled after it. A sequence waits for most
  of its prompt when another is just computing it.
* Decode takes pages one by one. When there is none, the running sequence of the highest rank
  number is preempted, and waits again; a waiting sequence preempts those that run at a worse
  priority. So the first by rank always gets on, and with it, in the end, everybody. Where a step
  can bring several tokens, nobody is preempted for more than the first of them.
* Several decode steps run as one while nobody waits or prefills, and no constraint must be asked
  between two tokens.
* Prefill comes before decode, in chunks that fit one step, but never twice in a row while a
  sequence could decode.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable

import numpy as np

from glm_jax.engine.integrity import check_integrity
from glm_jax.engine.pages import PagePool
from glm_jax.engine.plan import Chunk, Plan
from glm_jax.engine.prefix import extend_keys
from glm_jax.engine.request import FinishReason, Request
from glm_jax.engine.scores import PromptScores
from glm_jax.engine.sequence import Sequence
from glm_jax.engine.waiting import Waiting, by_rank
from glm_jax.shapes import StepShapes


class Scheduler:
    """Holds every unfinished sequence and decides, step by step, which of them run.

    All methods but `sequence_for` belong to one thread; the counts may be read from any.

    Attributes:
      pool: the account of pages.
      num_preemptions: sequences that lost slot and pages, each time counted.
      num_admitted_tokens: tokens of admitted sequences, those found in the cache included.
      num_cached_tokens: of them, those found in the cache.
    """

    def __init__(self, shapes: StepShapes) -> None:
        self.pool = PagePool(shapes.num_pages)
        self.num_preemptions = 0
        self.num_admitted_tokens = 0
        self.num_cached_tokens = 0
        self._shapes = shapes
        self._free_slots = list(reversed(range(shapes.num_slots)))
        self._waiting = Waiting()
        self._running: list[Sequence] = []  # in order of rank
        self._num_arrivals = 0
        self._is_decode_next = False
        self._decoded: list[Sequence] = []  # by the last decode step, whose samples they were
        self._samples: tuple[tuple[int, Sequence], ...] = ()
        # Shared pages end where a tile ends, so that rows cover the same positions with and without.
        pages_per_unit = math.lcm(shapes.page_size, shapes.prefill_tile) // shapes.page_size
        self._pages_per_unit = pages_per_unit

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether there is no unfinished sequence."""
        return not self._running and not self._waiting

    def sequence_for(self, request: Request) -> Sequence:
        """Makes the record of a request that can be served. Any thread may call it.

        Raises:
          ValueError: the request can never fit, however long it waits.
        """
        shapes = self._shapes
        num_prompt = len(request.prompt)
        if num_prompt >= shapes.max_seq_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens, but at most {shapes.max_seq_len - 1} fit: "
                f"prompt and completion share {shapes.max_seq_len} positions; shorten the prompt"
            )
        max_new_tokens = min(request.sampling.max_new_tokens, shapes.max_seq_len - num_prompt)
        # The last token of a completion is delivered but never fed back, so never cached.
        max_pages = self._num_pages(num_prompt + max_new_tokens - 1)
        if max_pages > shapes.num_pages:
            raise ValueError(
                f"a prompt of {num_prompt} tokens with {max_new_tokens} new ones needs "
                f"{max_pages} cache pages of {shapes.page_size} tokens, but there are only "
                f"{shapes.num_pages}; shorten the prompt or lower max_new_tokens"
            )
        number = request.sampling.num_prompt_logprobs
        tokens = np.zeros(num_prompt + max_new_tokens, np.int32)
        tokens[:num_prompt] = request.prompt
        sequence = Sequence(
            request=request,
            num_prompt=num_prompt,
            max_new_tokens=max_new_tokens,
            max_pages=max_pages,
            tokens=tokens,
            scores=None if number is None else PromptScores(request.prompt, number),
        )
        self._extend_keys(sequence)
        return sequence

    def add(self, sequence: Sequence) -> None:
        """Takes a new sequence in; it waits behind those of its priority."""
        sequence.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._waiting.add(sequence)

    def overdue(self, now: float) -> list[Sequence]:
        """Sequences that were not admitted by their deadlines, in seconds of time.monotonic()."""
        return self._waiting.overdue(now)

    def schedule(self) -> Plan | None:
        """Decides the next step, and counts it as dispatched; None when nothing can run now."""
        self._admit()
        decoding = [s for s in self._running if s.can_decode]
        is_rest = len(decoding) < len(self._running)  # what can decode does not prefill
        is_prefilling = is_rest and any(s.is_prefilling for s in self._running)
        plan = None
        if decoding and (self._is_decode_next or not is_prefilling):
            self._is_decode_next = False
            plan = self._plan_decode(decoding)
        # Decode may have preempted all that decodes, and some that prefilled.
        if plan is None:
            plan = self._plan_prefill([s for s in self._running if s.is_prefilling])
        return plan

    def fall_short(self, sequence: Sequence, num_missing: int) -> None:
        """Takes in that a step brings an unfinished sequence so many tokens fewer than it could.

        The pages stay: the sequence will need them soon.
        """
        sequence.num_dispatched -= num_missing

    def commit(self, sequence: Sequence, token: int) -> FinishReason | None:
        """Takes in a sampled token of an unfinished sequence; returns why it was the last.

        The sequence may have been preempted after the step that sampled it.
        """
        finish_reason = sequence.append(token)
        if sequence.num_tokens % self._shapes.page_size == 0:
            self._extend_keys(sequence)
        self._publish(sequence)
        if finish_reason is not None:
            self.finish(sequence, finish_reason)
        else:
            sequence.routine_until = self._routine_until(sequence)
        return finish_reason

    def commit_routine(
        self, samples: Iterable[tuple[int, Sequence]], tokens: list[int]
    ) -> list[tuple[int, Sequence]]:
        """Takes in the tokens of a decode step, by row, that are one more token and nothing else.

        Returns:
          The rows that are left to look at, unfinished or not; no token of theirs is taken in.
        """
        left = []
        for sample in samples:
            row, sequence = sample
            completion, token = sequence.completion, tokens[row]
            if (
                len(completion) < sequence.routine_until
                and token not in sequence.request.sampling.stop_token_ids
            ):
                completion.append(token)
            else:
                left.append(sample)
        return left

    def _routine_until(self, sequence: Sequence) -> int:
        """What `routine_until` is, once a token is taken in."""
        request = sequence.request
        if request.constraint is not None or request.sampling.num_logprobs:
            return 0
        if sequence.slot is None or sequence.num_published < len(sequence.keys):
            return 0
        page_size = self._shapes.page_size
        page_end = (sequence.num_tokens // page_size + 1) * page_size
        return min(page_end - sequence.num_prompt, sequence.max_new_tokens) - 1

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends an unfinished sequence, wherever it stands; its slot and pages are free at once.

        A step in flight may still write to them. Whoever gets them next writes in a later step.
        """
        sequence.finish_reason = reason
        if sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self._vacate(sequence)

    def check_integrity(self) -> None:
        """Checks that slots, pages and progress add up.

        Raises:
          AssertionError: they do not.
        """
        waiting = list(self._waiting)
        check_integrity(self._running, waiting, self._free_slots, self.pool, self._shapes)

    def _admit(self) -> None:
        while (sequence := self._waiting.first) is not None:
            # A token in flight of a preempted sequence is read before it starts anew.
            if sequence.num_in_flight or self._is_being_computed(sequence):
                return
            while not (shared := self._room_for(sequence)):
                victim = self._running[-1] if self._running else None
                if victim is None or victim.request.priority <= sequence.request.priority:
                    return
                self._preempt(victim)
            self._waiting.remove(sequence)
            self._enter(sequence, shared[0])

    def _room_for(self, sequence: Sequence) -> tuple[list[int]] | None:
        """The shared pages to start from, if there are a slot and pages for the rest."""
        if not self._free_slots:
            return None
        shared = self._shared_pages(sequence)
        num_missing = self._num_pages(sequence.num_tokens) - len(shared)
        if num_missing + len(self._running) > self.pool.num_free_without(shared):
            return None
        return (shared,)

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Whether most of what it lacks is in the prompt of a sequence that prefills."""
        if sequence.computes_all:
            return False
        start, end = len(self._shared_pages(sequence)), self._last_shared(sequence)
        lacking = sequence.keys[start:end]
        for other in self._running:
            # A key stands for all before it: where the first differs, the others do.
            if lacking and other.is_prefilling and other.keys[start : start + 1] == lacking[:1]:
                pairs = zip(lacking, other.keys[start:], strict=False)
                if 2 * sum(a == b for a, b in pairs) >= len(lacking):
                    return True
        return False

    def _last_shared(self, sequence: Sequence) -> int:
        """Pages it may share at most: its last token is computed."""
        return (sequence.num_tokens - 1) // self._shapes.page_size

    def _shared_pages(self, sequence: Sequence) -> list[int]:
        if sequence.computes_all:
            return []
        unit = self._pages_per_unit
        pages = self.pool.match(sequence.keys[: self._last_shared(sequence)])
        return pages[: len(pages) // unit * unit]

    def _enter(self, sequence: Sequence, shared: list[int]) -> None:
        num_tokens, num_shared = sequence.num_tokens, len(shared)
        num_cached = num_shared * self._shapes.page_size
        self.pool.acquire(shared)
        sequence.pages = shared
        self._give_pages(sequence, self._num_pages(num_tokens) - num_shared)
        sequence.slot = self._free_slots.pop()
        sequence.num_published = num_shared
        sequence.num_to_prefill, sequence.num_prefilled = num_tokens, num_cached
        if sequence.num_cached is None:
            sequence.num_cached = num_cached
        self.num_admitted_tokens += num_tokens
        self.num_cached_tokens += num_cached
        insort(self._running, sequence, key=by_rank)

    def _preempt(self, sequence: Sequence) -> None:
        """Takes slot and pages away; the sequence will compute its known tokens again."""
        self.num_preemptions += 1
        self._vacate(sequence)
        self._waiting.add(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        assert sequence.slot is not None, sequence
        self._running.remove(sequence)
        self._free_slots.append(sequence.slot)
        # The end first: a page is of no use without those before it.
        self.pool.release(reversed(sequence.pages))
        sequence.leave()

    def _plan_prefill(self, prefilling: list[Sequence]) -> Plan | None:
        if not prefilling:
            return None
        self._is_decode_next = True
        tile = self._shapes.prefill_tile
        rows_left = self._shapes.prefill_budget // tile
        row = 0
        chunks: list[Chunk] = []
        for sequence in prefilling:
            if not rows_left:
                break
            start = sequence.num_prefilled
            num_tokens = min(sequence.num_to_prefill - start, rows_left * tile)
            num_rows = -(-num_tokens // tile)
            sequence.num_prefilled += num_tokens
            is_last = not sequence.is_prefilling
            chunks.append(Chunk(sequence, row, num_rows, start, num_tokens, is_last))
            row += num_rows
            rows_left -= num_rows
            sequence.num_dispatched += is_last
            self._publish(sequence)
        samples = tuple((c.row + c.num_rows - 1, c.sequence) for c in chunks if c.is_last)
        return Plan("prefill", row, samples, (1,) * len(samples), tuple(chunks))

    def _plan_decode(self, decoding: list[Sequence]) -> Plan | None:
        """A token or more for those that keep their slots: the first by rank get pages first."""
        num_preemptions = self.num_preemptions
        for sequence in decoding:
            if sequence.num_dispatched == sequence.has_room_until and sequence.slot is not None:
                self._grow(sequence)
        if self.num_preemptions > num_preemptions:
            decoding = [sequence for sequence in decoding if sequence.slot is not None]
        if not decoding:
            return None
        if decoding != self._decoded:  # of steady rows the samples are made once
            self._decoded, self._samples = decoding, tuple(enumerate(decoding))
        gains = self._gains(decoding)
        return Plan("decode", len(decoding), self._samples, gains)

    def _gains(self, decoding: list[Sequence]) -> tuple[int, ...]:
        """Counts the tokens that sequences with room for one may gain."""
        most = self._most_tokens(decoding)
        if most > 1:
            return tuple(self._gain(sequence, most) for sequence in decoding)
        for sequence in decoding:
            sequence.num_dispatched += 1
        return (1,) * len(decoding)

    def _most_tokens(self, decoding: list[Sequence]) -> int:
        """How many tokens the next decode step brings a sequence at most."""
        if self._shapes.decode_steps > 1:
            is_awaited = len(self._waiting) or any(s.is_prefilling for s in self._running)
            if is_awaited or any(s.request.constraint is not None for s in decoding):
                return 1
        return self._shapes.tokens_per_step

    def _gain(self, sequence: Sequence, most: int) -> int:
        """Counts the tokens that a sequence with room for one may gain; takes free pages for more."""
        gain = 1
        # A constraint says what may come next, not what may come after that.
        if sequence.request.constraint is None:
            gain = min(most, sequence.max_new_tokens - sequence.num_dispatched)
            num_missing = self._num_pages(sequence.length + gain) - len(sequence.pages)
            self._give_pages(sequence, min(max(num_missing, 0), self.pool.num_free))
            room = len(sequence.pages) * self._shapes.page_size - sequence.length
            gain = min(gain, room)
        sequence.num_dispatched += gain
        return gain

    def _grow(self, sequence: Sequence) -> None:
        """Gives a sequence its next page, taken from the last by rank, which may be itself."""
        while not self.pool.num_free:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return
        self._give_pages(sequence, 1)

    def _give_pages(self, sequence: Sequence, number: int) -> None:
        sequence.pages += self.pool.allocate(number)
        num_positions = len(sequence.pages) * self._shapes.page_size
        sequence.has_room_until = num_positions - sequence.num_prompt + 1

    def _extend_keys(self, sequence: Sequence) -> None:
        salt, known = sequence.request.cache_salt, sequence.known_tokens()
        extend_keys(sequence.keys, salt, known, sequence.num_tokens, self._shapes.page_size)

    def _publish(self, sequence: Sequence) -> None:
        """Shares the pages that dispatched steps have filled with known tokens."""
        if sequence.slot is None or sequence.num_published == len(sequence.keys):
            return
        num_full = min(len(sequence.keys), sequence.length // self._shapes.page_size)
        while sequence.num_published < num_full:
            index = sequence.num_published
            self.pool.publish(sequence.pages[index], sequence.keys[index])
            sequence.num_published += 1

    def _num_pages(self, num_positions: int) -> int:
        return -(-num_positions // self._shapes.page_size)
