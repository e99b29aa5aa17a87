"""The model against torch and transformers: tests/goldens holds what they answered.

The weights are drawn anew here and proved to be the same by their hash. See tests/goldens/README.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from checkpoints.load import load_weights
from glm_jax import shapes as columns
from glm_jax.attention import attend_causal
from glm_jax.config import ModelConfig
from glm_jax.forward import forward_function
from glm_jax.model import abstract_model, abstract_weights, bind
from glm_jax.runner import Runner, compile_steps
from glm_jax.shapes import StepShapes
from glm_jax.sharding import make_mesh, partition_spec, sum_partials
from glm_jax.steps import COMPILER_OPTIONS
from tests.goldens.cases import CASES, Case
from tests.goldens.random_checkpoint import token_ids, write_checkpoint

GOLDENS = Path(__file__).parent.parent / "goldens"
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
ALL = list(CASES)
PLAIN = [case.name for case in CASES.values() if not case.is_fp8]
FP8 = [case.name for case in CASES.values() if case.is_fp8]
SHARDED = [case.name for case in CASES.values() if case.shards_over_eight_devices]

ROWS, LENGTH, STEPS = 2, 33, 64
LOGIT_STRIDE = 4  # the goldens hold logits at every fourth position
F32_ERROR = 1e-4  # max |difference| / max |expected|; here it is below 1e-6
# In bf16 ours and the peer's errors are two draws of the same noise: of one size, not equal.
AS_THE_PEER = 1.05
SHAPES = StepShapes(
    num_slots=ROWS,
    num_pages=16,
    page_size=16,
    max_seq_len=LENGTH + STEPS,
    prefill_tile=16,
    prefill_buckets=(ROWS,),
    decode_buckets=(ROWS,),
)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A case written to disk, and its golden arrays."""

    case: Case
    directory: Path
    digest: str
    config: ModelConfig
    golden: dict[str, np.ndarray]

    @property
    def text(self) -> np.ndarray:
        """The prompts and the peer's greedy continuations, int32[rows, 97]."""
        return np.concatenate([self.golden["ids"], self.golden["greedy"]], axis=1).astype(np.int32)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    found = {}
    for name, case in CASES.items():
        directory = tmp_path_factory.mktemp(name)
        digest = write_checkpoint(case, directory)
        config = ModelConfig.from_directory(directory)
        with np.load(GOLDENS / f"{name}.npz") as arrays:
            found[name] = Checkpoint(case, directory, digest, config, dict(arrays))
    return found


@functools.cache
def weights_on(model: Checkpoint, dtype: np.dtype, num_devices: int) -> dict[str, jax.Array]:
    specs = abstract_weights(model.config, dtype)
    mesh = make_mesh(num_devices)
    return load_weights(model.directory, model.config, specs, mesh, progress=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """A full forward of [B, T] tokens.

    Attributes:
      hidden: [L, B, T, D]. logits: [B, T, V].
      picks, pick_weights: [Lm, B, T, k], in ascending order of expert.
    """

    hidden: np.ndarray
    logits: np.ndarray
    picks: np.ndarray
    pick_weights: np.ndarray


@functools.cache
def forward(model: Checkpoint, dtype: np.dtype) -> Answer:
    """Everything about the prompts and the peer's continuations of them, computed at once."""
    run = forward_function(model.config, make_mesh(1), dtype)
    logits, trace, _ = jax.tree.map(np.asarray, run(weights_on(model, dtype, 1), model.text))
    picks, weights = by_expert(trace.routing.experts, trace.routing.weights)
    k = picks.shape[-1]
    shape = (-1, *model.text.shape, k)
    hidden = trace.hidden.astype(np.float32)
    return Answer(hidden, logits, picks.reshape(shape), weights.reshape(shape))


def by_expert(experts: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(experts, axis=-1)
    return np.take_along_axis(experts, order, -1), np.take_along_axis(weights, order, -1)


def layer_inputs(model: Checkpoint, dtype: np.dtype) -> np.ndarray:
    """What the peer's layers were fed, f32[L, B, T, D], rounded to dtype."""
    table = np.asarray(weights_on(model, F32, 1)["embed_tokens.values"])
    stream = [table[model.golden["ids"]][None], model.golden["hidden"][:-1]]
    return np.concatenate(stream).astype(dtype).astype(np.float32)


def layer_by_layer(
    model: Checkpoint, dtype: np.dtype, inputs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Each layer on its own input: what comes out, f32[L, B, T, D], and picks [Lm, B, T, k]."""
    abstract, weights = abstract_model(model.config, dtype), weights_on(model, dtype, 1)
    specs = {
        path: partition_spec(spec.axes)
        for path, spec in abstract_weights(model.config, dtype).items()
    }

    def run(is_dense: bool, weights: dict[str, jax.Array], x: jax.Array, layer: jax.Array) -> Any:
        layers = bind(abstract, weights).layers
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        visible = positions[:, :, None] >= positions[:, None, :]
        normed = layers.enter(x.reshape(-1, x.shape[-1]), layer)
        normed, *_ = layers.attention_block(normed, positions, layer, None, attend_causal(visible))
        partials, routing = layers.mlp_block(normed, layer, is_dense)
        assert isinstance(partials, jax.Array)  # as references leave it
        return (normed.residual + sum_partials(partials, x.dtype)).reshape(x.shape), routing

    def compiled(is_dense: bool) -> Callable[..., Any]:
        sharded = jax.shard_map(
            functools.partial(run, is_dense),
            mesh=make_mesh(1),
            in_specs=(specs, PartitionSpec(), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        return jax.jit(sharded, compiler_options=COMPILER_OPTIONS)

    kinds = [compiled(is_dense=False), compiled(is_dense=True)]
    outputs, picks = [], []
    for layer, x in enumerate(inputs):
        step = kinds[layer < model.case.first_k_dense_replace]
        output, routing = step(weights, x.astype(dtype), np.int32(layer))
        outputs.append(np.asarray(output, np.float32))
        if routing is not None:
            picks.append(np.sort(routing.experts, axis=-1).reshape(*x.shape[:2], -1))
    return np.stack(outputs), np.stack(picks)


@functools.cache
def generate(model: Checkpoint, dtype: np.dtype, num_devices: int) -> tuple[np.ndarray, np.ndarray]:
    """Continues both prompts greedily through the paged steps: tokens and log-probabilities.

    The prompts take three chunks of prefill; their pages are scattered and out of order.
    """
    mesh = make_mesh(num_devices)
    weights = weights_on(model, dtype, num_devices)
    programs = compile_steps(model.config, SHAPES, mesh, dtype)
    runner = Runner(model.config, SHAPES, mesh, dtype, weights, programs)
    pages = np.arange(SHAPES.num_pages)[::-1][: ROWS * SHAPES.pages_per_sequence]
    table = pages.reshape(-1, ROWS).T
    first_token = columns.NUM_FIELDS + SHAPES.pages_per_sequence

    def batch(width: int, start: int, num_tokens: int, is_last: bool) -> np.ndarray:
        rows = np.zeros((ROWS, width), np.int32)
        rows[:, columns.SLOT] = range(ROWS)
        rows[:, columns.START], rows[:, columns.NUM_TOKENS] = start, num_tokens
        rows[:, columns.IS_LAST] = is_last
        rows[:, columns.TOP_P] = np.float32(1).view(np.int32)
        rows[:, columns.NUM_FIELDS : first_token] = table
        return rows

    outputs = []
    for start in range(0, LENGTH, SHAPES.prefill_tile):
        end = min(start + SHAPES.prefill_tile, LENGTH)
        rows = batch(SHAPES.columns("prefill"), start, end - start, is_last=end == LENGTH)
        rows[:, first_token : first_token + end - start] = model.text[:, start:end]
        outputs = [runner.dispatch("prefill", rows)]
    for _ in range(STEPS - 1):
        rows = batch(SHAPES.columns("decode"), 0, 1, is_last=False)
        outputs.append(runner.dispatch("decode", rows))
    result = np.stack([np.asarray(output) for output in outputs], axis=-1)
    return result[columns.OUTPUT_TOKENS], result[columns.OUTPUT_LOGPROBS].view(np.float32)


def largest_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """max |difference| / max |expected|."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def norm_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def token_errors(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """`norm_error` of each token's vector, the last dimension."""
    return np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


def log_probabilities(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Of each token given the text before it; logits [B, STEPS, V], tokens [B, STEPS]."""
    exact = logits.astype(np.float64)
    largest = exact.max(-1, keepdims=True)
    total = np.log(np.exp(exact - largest).sum(-1, keepdims=True)) + largest
    return np.take_along_axis(exact - total, tokens[..., None], -1)[..., 0]


@pytest.mark.parametrize("name", ALL)
def test_weights_drawn_here_are_those_the_peer_ran(
    checkpoints: dict[str, Checkpoint], name: str
) -> None:
    model = checkpoints[name]
    assert model.digest == str(model.golden["weights_digest"])
    assert np.array_equal(model.golden["ids"], token_ids(model.case, ROWS, LENGTH))


@pytest.mark.parametrize("name", PLAIN)
def test_in_f32_the_logits_are_the_peers(checkpoints: dict[str, Checkpoint], name: str) -> None:
    model = checkpoints[name]
    logits = forward(model, F32).logits[:, :LENGTH:LOGIT_STRIDE]
    assert largest_error(logits, model.golden["logits"]) < F32_ERROR


@pytest.mark.parametrize("name", PLAIN)
def test_in_f32_every_layer_leaves_the_peers_hidden_state(
    checkpoints: dict[str, Checkpoint], name: str
) -> None:
    model = checkpoints[name]
    hidden = forward(model, F32).hidden[:, :, :LENGTH]
    pairs = zip(hidden, model.golden["hidden"], strict=True)
    assert max(largest_error(actual, expected) for actual, expected in pairs) < F32_ERROR


@pytest.mark.parametrize("name", PLAIN)
def test_in_f32_the_router_picks_and_weighs_as_the_peers(
    checkpoints: dict[str, Checkpoint], name: str
) -> None:
    model = checkpoints[name]
    answer = forward(model, F32)
    assert np.array_equal(answer.picks[:, :, :LENGTH], model.golden["picks"])
    assert (
        largest_error(answer.pick_weights[:, :, :LENGTH], model.golden["pick_weights"]) < F32_ERROR
    )


@pytest.mark.parametrize("name", PLAIN)
def test_greedy_text_of_full_forwards_is_the_peers(
    checkpoints: dict[str, Checkpoint], name: str
) -> None:
    """After each of the peer's tokens ours is the same, hence by induction the whole text is."""
    model = checkpoints[name]
    assert model.golden["greedy_gap"].min() > 1e-3, "too close to call: choose another seed"
    best = forward(model, F32).logits[:, LENGTH - 1 : -1].argmax(-1)
    assert np.array_equal(best, model.golden["greedy"])


@pytest.mark.parametrize("name", PLAIN)
def test_greedy_text_of_the_paged_steps_is_the_peers(
    checkpoints: dict[str, Checkpoint], name: str
) -> None:
    model = checkpoints[name]
    tokens, _ = generate(model, F32, 1)
    assert np.array_equal(tokens, model.golden["greedy"])


@pytest.mark.parametrize("name", PLAIN)
def test_paged_decode_gives_the_probabilities_of_a_full_forward(
    checkpoints: dict[str, Checkpoint], name: str
) -> None:
    model = checkpoints[name]
    _, paged = generate(model, F32, 1)
    full = log_probabilities(forward(model, F32).logits[:, LENGTH - 1 : -1], model.golden["greedy"])
    np.testing.assert_allclose(paged, full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SHARDED)
def test_eight_devices_write_the_same_greedy_text_as_one(
    checkpoints: dict[str, Checkpoint], name: str
) -> None:
    """An FP8 model in bf16, as deployed: in f32 the order of a sum over devices flips roundings."""
    model = checkpoints[name]
    dtype = BF16 if model.case.is_fp8 else F32
    one, _ = generate(model, dtype, 1)
    eight, _ = generate(model, dtype, 8)
    assert np.array_equal(one, eight)


@pytest.mark.parametrize("name", ALL)
def test_in_bf16_a_layer_errs_no_more_than_the_peers(
    checkpoints: dict[str, Checkpoint], name: str
) -> None:
    """From the same input, against f32 arithmetic; for FP8 the peer quantizes activations too."""
    model = checkpoints[name]
    inputs = layer_inputs(model, BF16)
    outputs, picks = layer_by_layer(model, BF16, inputs)
    added = model.golden["layer_added"].astype(np.float32)
    is_same = np.ones(added.shape[:-1], bool)
    is_same[-len(picks) :] = (picks == model.golden["layer_picks"]).all(-1)
    assert is_same.mean() > 0.98
    actual = outputs - inputs
    errors = [norm_error(a[s], b[s]) for a, b, s in zip(actual, added, is_same, strict=True)]
    assert (np.array(errors) <= AS_THE_PEER * model.golden["peer_layer_error"]).all()


@pytest.mark.parametrize("name", ALL)
def test_in_bf16_the_logits_err_no_more_than_the_peers(
    checkpoints: dict[str, Checkpoint], name: str
) -> None:
    """The median over tokens: one that rounding sends to another expert is far off in both."""
    model = checkpoints[name]
    logits = forward(model, BF16).logits[:, :LENGTH]
    error = np.median(token_errors(logits, model.golden["plain_logits"].astype(np.float32)))
    assert error <= AS_THE_PEER * model.golden["peer_logits_median"]


@pytest.mark.parametrize("name", PLAIN)
def test_in_bf16_hidden_states_err_no_more_than_the_peers(
    checkpoints: dict[str, Checkpoint], name: str
) -> None:
    """The median over tokens, for the same reason."""
    model = checkpoints[name]
    hidden = forward(model, BF16).hidden[:, :, :LENGTH]
    errors = np.median(token_errors(hidden, model.golden["hidden"]), axis=(1, 2))
    assert (errors <= AS_THE_PEER * model.golden["peer_hidden_median"]).all()


@pytest.mark.parametrize("name", FP8)
def test_fp8_layers_are_w8a8_to_f32_accuracy(checkpoints: dict[str, Checkpoint], name: str) -> None:
    """From the same input a token is exact, or reached by a rounding that f32 noise flipped.

    A scheme that differs anywhere (a scale, what is quantized, over which part of a row) leaves no
    token exact and errs like quantization itself.
    """
    model = checkpoints[name]
    inputs = layer_inputs(model, F32)
    outputs, picks = layer_by_layer(model, F32, inputs)
    actual, expected = outputs - inputs, model.golden["hidden"] - inputs
    assert np.array_equal(picks, model.golden["picks"])
    assert ((token_errors(actual, expected) < 1e-5).mean(axis=(1, 2)) > 0.5).all()
    errors = [norm_error(a, b) for a, b in zip(actual, expected, strict=True)]
    assert (np.array(errors) < 0.5 * model.golden["peer_layer_error"]).all()


@pytest.mark.parametrize("name", FP8)
def test_fp8_greedy_tokens_follow_the_peers_text(
    checkpoints: dict[str, Checkpoint], name: str
) -> None:
    """Nineteen in twenty: f32 noise alone flips roundings that change up to four tokens of 128."""
    model = checkpoints[name]
    best = forward(model, F32).logits[:, LENGTH - 1 : -1].argmax(-1)
    assert (best == model.golden["greedy"]).mean() >= 0.95
