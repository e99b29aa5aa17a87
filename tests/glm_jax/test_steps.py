"""Prefill and decode as compiled: what they compute, and what the compiler made of them."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.dummy import dummy_weights
from glm_jax import shapes as columns
from glm_jax.config import ModelConfig
from glm_jax.forward import forward_function
from glm_jax.model import abstract_weights
from glm_jax.runner import Runner, compile_steps
from glm_jax.shapes import Phase, StepShapes
from glm_jax.sharding import make_mesh
from glm_jax.steps import DEFAULT_OPTIONS, StepOptions, lower, step_specs

SHAPES = StepShapes(
    num_slots=20,
    num_pages=80,
    page_size=8,
    max_seq_len=32,
    prefill_tile=8,
    prefill_buckets=(2, 6),
    decode_buckets=(1, 4, 20),
)
# What a test needs that runs everything together: fewer steps to compile.
CROWDED = dataclasses.replace(SHAPES, prefill_buckets=(6,), decode_buckets=(20,))
PLAIN = ModelConfig(
    vocab_size=256,
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=16,
    intermediate_size=256,
    first_k_dense_replace=1,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=1,
    moe_intermediate_size=128,
    max_position_embeddings=4096,
    routed_scaling_factor=2.5,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    partial_rotary_factor=0.5,
    attention_bias=True,
    use_qk_norm=True,
    norm_topk_prob=True,
    num_nextn_predict_layers=0,
    eos_token_id=(255,),
    pad_token_id=None,
    dtype="bfloat16",
    is_fp8=False,
)
FP8 = dataclasses.replace(PLAIN, is_fp8=True)
BFLOAT16, FLOAT32 = np.dtype(jnp.bfloat16), np.dtype(np.float32)


@dataclass
class Writer:
    """Plays the host for a runner: one sequence a slot, four pages each."""

    runner: Runner
    prompts: dict[int, list[int]]
    temperature: float = 0.0
    answers: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def _row(self, slot: int, num_tokens: int, width: int) -> np.ndarray:
        row = np.zeros(width, np.int32)
        row[columns.SLOT], row[columns.NUM_TOKENS] = slot, num_tokens
        row[columns.TEMPERATURE] = np.float32(self.temperature).view(np.int32)
        row[columns.TOP_P] = np.float32(0.9).view(np.int32)
        row[columns.SEED_LOW] = 5 + slot
        pages = SHAPES.pages_per_sequence
        row[columns.NUM_FIELDS : columns.NUM_FIELDS + pages] = slot * pages + np.arange(pages)
        return row

    def _run(self, phase: Phase, rows: list[np.ndarray], bucket: int) -> np.ndarray:
        batch = np.zeros((bucket, SHAPES.columns(phase)), np.int32)
        batch[:, columns.SLOT] = SHAPES.num_slots
        batch[: len(rows)] = rows
        return np.asarray(self.runner.dispatch(phase, batch))

    def prefill(self, slot: int, bucket: int, chunk: int = 32) -> None:
        """Runs a slot's prompt, `chunk` tokens a step."""
        prompt, tile = self.prompts[slot], SHAPES.prefill_tile
        answer = np.zeros(2, np.int32)
        for begin in range(0, len(prompt), chunk):
            rows = []
            for start in range(begin, min(begin + chunk, len(prompt)), tile):
                tokens = prompt[start : min(start + tile, begin + chunk)]
                row = self._row(slot, len(tokens), SHAPES.columns("prefill"))
                row[columns.START] = start
                row[columns.IS_LAST] = start + len(tokens) == len(prompt)
                row[SHAPES.columns("decode") :][: len(tokens)] = tokens
                rows.append(row)
            answer = self._run("prefill", rows, bucket)[:, len(rows) - 1]
        self.answers[slot] = [(int(answer[0]), int(answer[1]))]

    def decode(self, slots: list[int], bucket: int) -> None:
        """Adds a token to each slot, in the order given."""
        rows = [self._row(slot, 1, SHAPES.columns("decode")) for slot in slots]
        output = self._run("decode", rows, bucket)
        for index, slot in enumerate(slots):
            self.answers[slot].append((int(output[0, index]), int(output[1, index])))


def prompts(count: int) -> dict[int, list[int]]:
    generator = np.random.default_rng(3)
    return {
        slot: generator.integers(0, 250, generator.integers(1, 18)).tolist()
        for slot in range(count)
    }


def runner(
    config: ModelConfig,
    num_devices: int,
    shapes: StepShapes = SHAPES,
    dtype: np.dtype = BFLOAT16,
    options: StepOptions = DEFAULT_OPTIONS,
) -> Runner:
    mesh = make_mesh(num_devices)
    weights = dummy_weights(abstract_weights(config, dtype), mesh, seed=1)
    programs = compile_steps(config, shapes, mesh, dtype, options)
    return Runner(config, shapes, mesh, dtype, weights, programs, options=options)


@pytest.fixture(scope="module")
def one_device() -> Runner:
    return runner(FP8, 1)


@pytest.fixture(scope="module")
def eight_devices() -> Runner:
    return runner(FP8, 8, CROWDED)


def crowd(runner: Runner, temperature: float) -> dict[int, list[tuple[int, int]]]:
    """Twenty sequences together, in the largest buckets."""
    writer = Writer(runner, prompts(20), temperature)
    for slot in writer.prompts:
        writer.prefill(slot, bucket=6)
    for _ in range(12):
        writer.decode(list(writer.prompts), bucket=20)
    return writer.answers


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sequence_gets_the_same_bits_alone_and_in_a_crowd(
    one_device: Runner, temperature: float
) -> None:
    together = crowd(one_device, temperature)
    for slot in (0, 7, 19):
        alone = Writer(one_device, prompts(20), temperature)
        alone.prefill(slot, bucket=6)
        for _ in range(12):
            alone.decode([slot], bucket=1)
        assert alone.answers[slot] == together[slot]


def test_a_sequence_gets_the_same_bits_in_any_row_and_any_bucket(one_device: Runner) -> None:
    together = crowd(one_device, 1.0)
    writer = Writer(one_device, prompts(20), 1.0)
    short = [slot for slot, prompt in writer.prompts.items() if len(prompt) <= 16][:4]
    for slot in short:
        writer.prefill(slot, bucket=2)
    for step in range(12):
        writer.decode(short[step % 4 :] + short[: step % 4], bucket=(4, 20)[step % 2])
    assert writer.answers == {slot: together[slot] for slot in short}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_eight_devices_give_the_bits_of_one(
    one_device: Runner, eight_devices: Runner, temperature: float
) -> None:
    assert crowd(eight_devices, temperature) == crowd(one_device, temperature)


def test_two_devices_give_the_bits_of_one(one_device: Runner) -> None:
    assert crowd(runner(FP8, 2, CROWDED), 0.0) == crowd(one_device, 0.0)


def test_plain_bfloat16_weights_give_the_same_bits_on_any_mesh() -> None:
    assert crowd(runner(PLAIN, 8, CROWDED), 1.0) == crowd(runner(PLAIN, 1, CROWDED), 1.0)


def test_an_fp8_cache_holds_half_the_bytes_and_nearly_the_same_answers(
    one_device: Runner,
) -> None:
    options = StepOptions(kv_dtype=np.dtype(jnp.float8_e4m3fn))
    specs = [step_specs(FP8, SHAPES, BFLOAT16, o).cache for o in (StepOptions(), options)]
    assert [spec.dtype.itemsize for spec in specs] == [2, 1]
    narrow = Writer(runner(FP8, 1, CROWDED, options=options), prompts(20))
    wide = Writer(one_device, prompts(20))
    for writer in (narrow, wide):
        for slot in range(6):
            writer.prefill(slot, bucket=6)
        writer.decode(list(range(6)), bucket=20)
    logprobs = [
        np.array([[bits for _, bits in writer.answers[slot]] for slot in range(6)], np.int32)
        for writer in (narrow, wide)
    ]
    ours, theirs = (bits.view(np.float32) for bits in logprobs)
    # Of the first token, which may be another where the likeliest two are close.
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], atol=0.15)
    assert (ours != theirs).any()  # an FP8 cache was in use


def test_a_prompt_in_chunks_gives_the_bits_of_a_prompt_at_once(one_device: Runner) -> None:
    generator = np.random.default_rng(8)
    prompt = {0: generator.integers(0, 250, 19).tolist()}
    at_once, in_chunks = Writer(one_device, prompt), Writer(one_device, prompt)
    at_once.prefill(0, bucket=6)
    at_once.decode([0], bucket=1)
    in_chunks.prefill(0, bucket=2, chunk=8)
    in_chunks.decode([0], bucket=1)
    assert in_chunks.answers == at_once.answers


def test_paged_decode_equals_a_full_forward() -> None:
    config, mesh = PLAIN, make_mesh(1)
    weights = dummy_weights(abstract_weights(config, FLOAT32), mesh, seed=1)
    writer = Writer(runner(config, 1, CROWDED, FLOAT32), prompts(6))
    for slot in writer.prompts:
        writer.prefill(slot, bucket=6)
    for _ in range(12):
        writer.decode(list(writer.prompts), bucket=20)
    forward = forward_function(config, mesh, FLOAT32)
    for slot, prompt in writer.prompts.items():
        answer = [token for token, _ in writer.answers[slot]]
        sequence = np.array([prompt + answer], np.int32)
        logits = np.asarray(forward(weights, sequence).logits)[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer
        chosen = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(answer)), answer]
        bits = np.array([bits for _, bits in writer.answers[slot]], np.int32)
        np.testing.assert_allclose(bits.view(np.float32), chosen, atol=1e-4)


def test_nothing_compiles_after_the_first_steps(one_device: Runner) -> None:
    crowd(one_device, 1.0)
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "compile" in event or "trace" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        crowd(one_device, 0.0)
        writer = Writer(one_device, prompts(3), 0.7)
        writer.prefill(1, bucket=6)
        writer.prefill(2, bucket=6)
        writer.decode([1], bucket=1)
        writer.decode([2, 1], bucket=4)
        assert compiled == []
        jax.jit(lambda x: x + 1)(np.arange(len(compiled) + 3))  # the listener does hear
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def instructions(text: str, name: str) -> Iterator[str]:
    """The instructions with this opcode, or its asynchronous start."""
    for line in text.splitlines():
        if re.search(rf"= \S+ {name}(-start)?\(", line):
            yield line.strip()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_layer_has_two_all_reduces_and_no_other_collective(phase: Phase) -> None:
    mesh = make_mesh(8)
    rows = 6 if phase == "prefill" else 20
    text = lower(FP8, SHAPES, mesh, BFLOAT16, phase, rows).compile().as_text()
    assert text is not None
    # Two loop bodies, dense and expert layers, each written once; and one sum for the embedding.
    assert len(list(instructions(text, "all-reduce"))) == 2 * 2 + 1
    assert len(list(instructions(text, "all-gather"))) == 1  # the logits
    for other in ("reduce-scatter", "all-to-all", "collective-permute"):
        assert list(instructions(text, other)) == []


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_sums_of_eight_devices_travel_as_bfloat16(phase: Phase) -> None:
    rows = 6 if phase == "prefill" else 20
    text = lower(FP8, SHAPES, make_mesh(8), BFLOAT16, phase, rows).as_text()
    sums = re.findall(r'"stablehlo.all_reduce".*?\}\) : \(tensor<([^>]*)>\)', text, re.DOTALL)
    assert len(sums) == 5
    assert all(kind.endswith("bf16") for kind in sums)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_cache_is_updated_in_place(phase: Phase) -> None:
    rows = 6 if phase == "prefill" else 20
    program = lower(FP8, SHAPES, make_mesh(1), BFLOAT16, phase, rows).compile()
    shape = (FP8.num_hidden_layers, SHAPES.num_pages, 8, SHAPES.page_size, FP8.head_dim)
    analysis = program.memory_analysis()
    num_bytes = 2 * 2 * int(np.prod(shape))
    assert analysis is not None and analysis.alias_size_in_bytes >= num_bytes
    text = program.as_text()
    assert text is not None
    dimensions = ",".join(map(str, shape))
    for opcode in ("copy", "convert", "select", "dynamic-update-slice"):
        assert not re.search(rf"bf16\[{dimensions}\]\S* {opcode}\(", text), opcode


def test_a_step_takes_few_arrays_however_many_layers() -> None:
    deep = dataclasses.replace(FP8, num_hidden_layers=9)
    counts = [
        len(jax.tree.leaves(lower(config, SHAPES, make_mesh(1), BFLOAT16, "decode", 1).in_avals))
        for config in (FP8, deep)
    ]
    assert counts[0] == counts[1] <= 34


def test_a_batch_of_another_size_is_refused_not_compiled(one_device: Runner) -> None:
    with pytest.raises(KeyError):
        one_device.dispatch("decode", np.zeros((3, SHAPES.columns("decode")), np.int32))
