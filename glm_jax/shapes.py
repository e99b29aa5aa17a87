"""The fixed shapes of a step: buckets, page geometry, and the columns of its one upload.

Knows neither JAX nor requests: host and device agree here on what a row of a batch means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["prefill", "decode"]

# A batch is one int32 array [rows, NUM_FIELDS + pages_per_sequence (+ prefill_tile)]:
# the fields below, then the row's page table, then (prefill only) its tokens.
# Floats travel as their float32 bits.
SLOT = 0  # 0 … num_slots-1; num_slots on a padding row
START = 1  # prefill: position of the row's first token; ignored by decode
NUM_TOKENS = 2  # prefill: valid tokens; decode: tokens the row may gain; 0 on a padding row
IS_LAST = 3  # prefill: 1 when the row holds the prompt's last token, so its sample is kept
TEMPERATURE = 4  # float32 bits; 0 means greedy
TOP_P = 5  # float32 bits
MIN_P = 6  # float32 bits
TOP_K = 7  # 0 means off
SEED_LOW = 8  # the request's 64-bit seed, low and high halves
SEED_HIGH = 9
FREQUENCY_PENALTY = 10  # float32 bits; all three penalties together are off when zero
PRESENCE_PENALTY = 11  # float32 bits
REPETITION_PENALTY = 12  # float32 bits of its logarithm
PROMPT_LENGTH = 13  # position of the completion's first token
MIN_LENGTH = 14  # a token sampled for a lower position is none of the banned
NUM_BIASES = 15  # of the slot's controls
NUM_BANS = 16
NUM_LOGPROBS = 17  # likeliest tokens to tell beside the sampled one
IS_MASKED = 18  # 1 when the slot's controls hold a mask to heed
NUM_STOPS = 19
STOP_TOKENS = slice(20, 28)  # the first NUM_STOPS of these end the row's completion
NUM_FIELDS = 28
# A row with zeros in all of these takes the likeliest token of the model's own logits.
ASKS = (
    TEMPERATURE, FREQUENCY_PENALTY, PRESENCE_PENALTY, REPETITION_PENALTY, NUM_BIASES, NUM_BANS,
    NUM_LOGPROBS, IS_MASKED,
)  # fmt: skip

MAX_LOGIT_BIASES = 300
MAX_BANS = 276  # a request's own stop tokens, and the model's
MAX_BIASES = MAX_LOGIT_BIASES + MAX_BANS
MAX_TOP_LOGPROBS = 20
MAX_DRAFTS = 3

# Controls are one int32 array [slots, control_columns], uploaded only when they change and looked at
# only for rows that say so: the tokens with a bias, then the banned ones; the float32 bits of the
# biases; the mask, whose bit t % 32 of word t // 32 allows token t.
CONTROL_TOKENS = slice(0, MAX_BIASES)
CONTROL_BIASES = slice(MAX_BIASES, 2 * MAX_BIASES)
CONTROL_MASK = slice(2 * MAX_BIASES, None)

# A step returns one int32 array [NUM_OUTPUTS, rows]: sampled tokens, the float32 bits of their
# log-probabilities, then the likeliest tokens of rows that ask for them, and of these the same.
# A decode step whose rows can gain several tokens returns int32[tokens_per_step, NUM_OUTPUTS, rows].
# Every row gains at least one token and at most NUM_TOKENS; in the places after, it has NO_TOKEN.
NO_TOKEN = -1
OUTPUT_TOKENS = 0
OUTPUT_LOGPROBS = 1
OUTPUT_TOP_TOKENS = slice(2, 2 + MAX_TOP_LOGPROBS)
OUTPUT_TOP_LOGPROBS = slice(2 + MAX_TOP_LOGPROBS, 2 + 2 * MAX_TOP_LOGPROBS)
NUM_OUTPUTS = 2 + 2 * MAX_TOP_LOGPROBS

# Scoring prompt tokens returns one int32 array [NUM_SCORE_OUTPUTS, tokens]: the float32 bits of each
# token's log-probability, its rank, then the likeliest tokens in its place, and of these the bits.
SCORE_LOGPROBS = 0
SCORE_RANKS = 1
SCORE_TOP_TOKENS = OUTPUT_TOP_TOKENS
SCORE_TOP_LOGPROBS = OUTPUT_TOP_LOGPROBS
NUM_SCORE_OUTPUTS = NUM_OUTPUTS


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShapes:
    """Everything that decides a step's compiled shapes.

    Attributes:
      num_slots: sequences that can decode at once.
      num_pages: pages in the pool, shared by all sequences.
      page_size: positions per page.
      max_seq_len: positions a sequence can reach, prompt and completion together.
      prefill_tile: tokens per prefill row; a row belongs to one sequence.
      prefill_buckets: ascending row counts prefill is compiled for.
      decode_buckets: ascending row counts decode is compiled for; the last is num_slots or more.
      vocab_size: tokens that a mask covers; 0 where no request will have one.
      num_drafts: tokens that a decode step guesses and verifies in each row; 0: no speculation.
      decode_steps: tokens that rows decode one after the other in one step, at most.

    Raises:
      ValueError: a size is not positive, a bucket set is empty or not ascending, the largest
        decode bucket is smaller than num_slots, num_drafts is not 0 … MAX_DRAFTS, or both drafts
        and several decode_steps are wanted.
    """

    num_slots: int
    num_pages: int
    page_size: int
    max_seq_len: int
    prefill_tile: int
    prefill_buckets: tuple[int, ...]
    decode_buckets: tuple[int, ...]
    vocab_size: int = 0
    num_drafts: int = 0
    decode_steps: int = 1

    def __post_init__(self) -> None:
        sizes = (
            "num_slots",
            "num_pages",
            "page_size",
            "max_seq_len",
            "prefill_tile",
            "decode_steps",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("prefill_buckets", "decode_buckets"):
            buckets = getattr(self, name)
            if not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets)):
                raise ValueError(f"{name} must be positive and ascending, got {buckets}")
        if self.decode_buckets[-1] < self.num_slots:
            raise ValueError(
                f"the largest decode bucket ({self.decode_buckets[-1]}) is smaller than "
                f"num_slots ({self.num_slots})"
            )
        if not 0 <= self.num_drafts <= MAX_DRAFTS:
            raise ValueError(f"num_drafts must be 0 … {MAX_DRAFTS}, got {self.num_drafts}")
        if self.num_drafts and self.decode_steps > 1:
            raise ValueError(
                f"a step that verifies drafts ({self.num_drafts}) is run once, not {self.decode_steps} "
                "times in a row"
            )

    @property
    def pages_per_sequence(self) -> int:
        """Width of a page table: pages that hold max_seq_len positions."""
        return -(-self.max_seq_len // self.page_size)

    @property
    def tokens_per_step(self) -> int:
        """Most tokens that a row can gain in a decode step."""
        return self.decode_steps if self.decode_steps > 1 else 1 + self.num_drafts

    @property
    def prefill_budget(self) -> int:
        """Most tokens one prefill step can take, when every row is full."""
        return self.prefill_buckets[-1] * self.prefill_tile

    @property
    def score_rows(self) -> int:
        """Rows of a prefill step that are scored at once."""
        return self.prefill_buckets[0]

    def rows(self, phase: Phase, num_rows: int) -> int:
        """The smallest bucket that holds num_rows.

        Raises:
          ValueError: no bucket is large enough.
        """
        buckets = self.prefill_buckets if phase == "prefill" else self.decode_buckets
        for bucket in buckets:
            if num_rows <= bucket:
                return bucket
        raise ValueError(f"{num_rows} rows exceed the largest {phase} bucket, {buckets[-1]}")

    @property
    def control_columns(self) -> int:
        """Columns of the controls."""
        return CONTROL_MASK.start + -(-self.vocab_size // 32)

    def columns(self, phase: Phase) -> int:
        """Columns of the batch array of a phase."""
        tokens = self.prefill_tile if phase == "prefill" else 0
        return NUM_FIELDS + self.pages_per_sequence + tokens
