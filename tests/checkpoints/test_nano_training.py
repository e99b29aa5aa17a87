"""Tests of nano's training: packing, loss, update, saves, export. A tiny model stands in for nano."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from safetensors import safe_open

from checkpoints.nano_training.curve import draw_curve
from checkpoints.nano_training.draft import Draft
from checkpoints.nano_training.export import export, weights_of
from checkpoints.nano_training.grouped import GroupedExperts
from checkpoints.nano_training.objective import attend_within
from checkpoints.nano_training.optimizer import balance
from checkpoints.nano_training.packing import Rows, pack
from checkpoints.nano_training.rendering import NANO_DIRECTORY, Sample
from checkpoints.nano_training.saves import restore, save
from checkpoints.nano_training.start import first_weights, head_of
from checkpoints.nano_training.train import (
    Pools,
    Settings,
    State,
    Trainer,
    batches_of_step,
    decoder_of,
    rows_of_step,
    train,
)
from checkpoints.quantize import tensor_kinds
from glm_jax import ops
from glm_jax.config import ModelConfig
from glm_jax.forward import forward_function
from glm_jax.model import Glm4Moe
from glm_jax.moe import MoE
from glm_jax.operands import Pending
from glm_jax.sharding import make_mesh

F32 = jnp.dtype(jnp.float32)
SETTINGS = Settings(
    num_steps=30,
    short_rows=4,
    long_rows=1,
    muon_rate=0.02,
    adam_rate=0.003,
    rising_steps=2,
    falling_steps=20,
    save_every=10,
)


@pytest.fixture(scope="module")
def nano() -> ModelConfig:
    return ModelConfig.from_directory(NANO_DIRECTORY)


@pytest.fixture(scope="module")
def tiny(nano: ModelConfig) -> ModelConfig:
    return replace(
        nano,
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )


@pytest.fixture(scope="module")
def pools() -> Pools:
    """Samples that count upwards: easily learned."""
    random = np.random.default_rng(0)
    samples = []
    for size in random.integers(4, 30, 120):
        start = int(random.integers(0, 30))
        tokens = tuple(range(start, start + int(size)))
        samples.append(Sample(tokens, (False, False) + (True,) * (int(size) - 2)))
    return Pools(pack(samples[:100], 32), pack(samples[100:], 64))


def test_packing_keeps_every_sample_whole_and_in_place() -> None:
    random = np.random.default_rng(1)
    samples = [
        Sample(
            tuple(map(int, random.integers(1, 99, size))),
            tuple(map(bool, random.random(size) < 0.5)),
        )
        for size in random.integers(1, 20, 200)
    ]
    rows = pack([*samples, Sample((1,) * 33, (True,) * 33)], 32)
    found = []
    for row in range(len(rows)):
        for segment in range(1, rows.segments[row].max() + 1):
            where = rows.segments[row] == segment
            assert (rows.positions[row][where] == np.arange(where.sum())).all()
            assert (np.diff(np.flatnonzero(where)) == 1).all()
            found.append(
                Sample(
                    tuple(rows.tokens[row][where].tolist()),
                    tuple(rows.learned[row][where].tolist()),
                )
            )
    assert sorted(map(repr, found)) == sorted(map(repr, samples))
    assert (rows.segments > 0).mean() > 0.9
    assert not rows.learned[rows.segments == 0].any()


def test_every_row_comes_once_an_epoch_in_an_order_the_seed_decides() -> None:
    tokens = np.arange(12, dtype=np.int32)[:, None]
    rows = Rows(tokens, tokens, tokens, tokens > 0)

    def epoch(seed: int, first: int) -> list[int]:
        steps = [rows_of_step(rows, 3, step, seed) for step in range(first, first + 4)]
        return [int(token) for batch in steps for token in np.asarray(batch.tokens).ravel()]

    assert sorted(epoch(0, 0)) == sorted(epoch(0, 4)) == list(range(12))
    assert epoch(0, 0) == epoch(0, 0) != epoch(0, 4)
    assert epoch(0, 0) != epoch(1, 0)


def _on_one_device(function, *arguments):
    mapped = jax.shard_map(
        function, mesh=make_mesh(1), in_specs=PartitionSpec(), out_specs=PartitionSpec(),
        check_vma=False,
    )  # fmt: skip
    return jax.jit(mapped)(*arguments)


def _summed(pending: Pending) -> jax.Array:
    assert isinstance(pending, jax.Array)  # as references leave it
    return pending.sum(0)


@pytest.mark.parametrize("capacity_factor", [4.0, 100.0])
def test_grouped_experts_add_what_the_reference_adds(
    tiny: ModelConfig, capacity_factor: float
) -> None:
    moe, ours_too = (MoE(replace(tiny, is_fp8=False), 2, F32, rngs=nnx.Rngs(0)) for _ in range(2))
    ours_too.experts = nnx.data(GroupedExperts(ours_too.experts, capacity_factor))
    x = jax.random.normal(jax.random.key(1), (40, tiny.hidden_size))

    def outputs(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = ops.as_rows(x, is_fp8=False)
        return _summed(moe(rows, 1)[0]), _summed(ours_too(rows, 1)[0])

    reference, ours = _on_one_device(outputs, x)
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-6)


def test_choices_past_an_experts_room_are_dropped_and_the_others_kept(tiny: ModelConfig) -> None:
    moe = MoE(replace(tiny, is_fp8=False), 1, F32, rngs=nnx.Rngs(0))
    moe.gate.e_score_correction_bias[...] = jnp.array([[5.0, 5.0, 0.0, 0.0]])
    grouped = GroupedExperts(moe.experts, 1.0)
    x = jax.random.normal(jax.random.key(1), (40, tiny.hidden_size))

    def outputs(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        routing = moe.gate(x, 0)
        rows, shared = ops.as_rows(x, is_fp8=False), moe.shared_experts
        alone = shared(rows, 0).sum(0)
        both = (_summed(each(rows, routing, shared, 0)) for each in (moe.experts, grouped))
        reference, ours = (sums - alone for sums in both)
        return reference, ours

    # Every token chooses experts 0 and 1, which have room for half of them.
    reference, ours = _on_one_device(outputs, x)
    np.testing.assert_allclose(ours[:20], reference[:20], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours[20:], 0, atol=1e-6)


def test_attention_in_blocks_is_attention_within_each_sample() -> None:
    num_tokens = 300
    segments = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.array([90, 150, 40, 20]))[None]
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, num_tokens, 2, 2, 8))
    k, v = (jax.random.normal(key, (1, num_tokens, 2, 8)) for key in keys[1:])
    ours, _ = attend_within(segments)(0, q, k, v, None)
    second = slice(90, 240)
    causal = jnp.tril(jnp.ones((150, 150), bool))[None]
    alone = ops.causal_attention(q[:, second], k[:, second], v[:, second], causal)
    np.testing.assert_allclose(ours[:, second], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_training_learns_and_a_killed_run_goes_on_to_the_same_bits(
    tiny: ModelConfig, pools: Pools, tmp_path: Path
) -> None:
    # optax mixes dtypes in its own arithmetic, which the strict promotion of the tests refuses.
    with jax.numpy_dtype_promotion("standard"):
        trainer = Trainer(tiny, SETTINGS)
        start = {path: np.array(weight) for path, weight in trainer.state.weights.items()}
        train(trainer, pools, tmp_path / "whole")
        whole = trainer.state
        _, accuracy, _, draft_accuracy = whole.history[-1]
        assert accuracy > 0.8
        assert draft_accuracy > 0.8

        trainer.state = trainer.state_from({path: jnp.array(w) for path, w in start.items()})
        for step in range(3):
            trainer.step(batches_of_step(pools, step, SETTINGS))
        save(tmp_path / "killed", asdict(SETTINGS), trainer.state)

        trainer.state = trainer.state_from({path: jnp.array(w) for path, w in start.items()})
        restore(tmp_path / "killed", asdict(SETTINGS), trainer.state)
        assert trainer.state.step == 3
        train(trainer, pools, tmp_path / "killed")
    assert trainer.state.history == whole.history
    for path, weight in whole.weights.items():
        np.testing.assert_array_equal(weight, trainer.state.weights[path], err_msg=path)


def test_rates_rise_stay_and_fall_and_the_length_of_a_run_matters_only_when_they_fall() -> None:
    short = Settings(num_steps=100, rising_steps=10, falling_steps=40)
    long = replace(short, num_steps=200)
    shares = [float(short.rate_share(step)) for step in range(100)]
    np.testing.assert_allclose(shares[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert shares[10:60] == [1.0] * 50
    np.testing.assert_allclose(shares[60:], np.arange(40, 0, -1) / 40, rtol=1e-6)
    assert shares[:61] == [float(long.rate_share(step)) for step in range(61)]


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_in_the_same_files(
    tiny: ModelConfig, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        _write_config(replace(tiny, vocab_size=2048), directory)
        shutil.copy(NANO_DIRECTORY / "tokenizer.json", directory)
    _run(whole).communicate()
    run = _run(killed)
    while not (killed / "saves" / "state.npz").exists():
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    run.communicate()
    assert not (killed / "model.safetensors.index.json").exists()
    _run(killed).communicate()
    name = "model-00001-of-00001.safetensors"
    assert (whole / name).read_bytes() == (killed / name).read_bytes()


def _run(directory: Path) -> subprocess.Popen[bytes]:
    """`make nano` for a small model and little data."""
    command = [sys.executable, "-m", "checkpoints.nano_training.train"]
    command += ["--directory", directory, "--saves", directory / "saves"]
    command += ["--num-steps", "120", "--num-conversations", "500"]
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)


def _write_config(config: ModelConfig, directory: Path) -> None:
    raw = json.loads((NANO_DIRECTORY / "config.json").read_text())
    raw |= {key: value for key, value in asdict(config).items() if key in raw and key != "is_fp8"}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw | {"eos_token_id": [1]}))


def test_a_save_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    state = State({"a": jnp.ones(2)}, ())
    save(tmp_path, {"seed": 0, "num_steps": 5}, state)
    with pytest.raises(ValueError, match="num_steps"):
        restore(tmp_path, {"seed": 0, "num_steps": 6}, state)


def test_without_a_save_a_run_starts_from_nothing(tmp_path: Path) -> None:
    state = State({}, ())
    restore(tmp_path, {}, state)
    assert state.step == 0


def test_the_start_copies_what_followed_the_same_token_before(nano: ModelConfig) -> None:
    plain = replace(nano, is_fp8=False)
    made = {f"decoder.{k}": v for k, v in weights_of(Glm4Moe(plain, F32, rngs=nnx.Rngs(0))).items()}
    weights = decoder_of(first_weights(nano, made))
    random = np.random.default_rng(0)
    first = random.permutation(2000)[:40].astype(np.int32)
    tokens = np.concatenate([first, first])[None]
    logits = np.asarray(forward_function(plain, make_mesh(1), F32)(weights, tokens).logits[0])
    hits = logits.argmax(-1)[40:79] == first[1:]
    assert hits.mean() > 0.5  # a random start: one in 2048


def test_the_head_is_the_embedding_turned() -> None:
    embedding = jax.random.normal(jax.random.key(0), (50, 16))
    head = head_of(embedding)
    np.testing.assert_allclose(head @ head.T, embedding @ embedding.T, rtol=1e-4, atol=1e-4)
    assert (np.argmax(embedding @ head.T, 1) != np.arange(50)).mean() > 0.8


def test_an_overloaded_expert_becomes_less_likely_and_an_idle_one_more() -> None:
    bias = "layers.moe.gate.e_score_correction_bias"
    weights = {f"decoder.{bias}": jnp.zeros((1, 3)), f"draft.{bias}": jnp.zeros((1, 3))}
    load = jnp.array([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8]])
    moved = balance(weights, load, 0.1)
    assert np.sign(moved[f"decoder.{bias}"]).tolist() == [[-1, 1, 1]]
    assert np.sign(moved[f"draft.{bias}"]).tolist() == [[1, 1, -1]]


def test_the_export_holds_every_tensor_of_the_published_layout(
    tiny: ModelConfig, tmp_path: Path
) -> None:
    _write_config(tiny, tmp_path)
    plain = replace(tiny, is_fp8=False)
    decoder = weights_of(Glm4Moe(plain, F32, rngs=nnx.Rngs(0)))
    draft = weights_of(Draft(plain, F32, rngs=nnx.Rngs(1)))
    export(tmp_path, decoder, draft)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensor_kinds(tiny).keys()
    with safe_open(tmp_path / "model-00001-of-00001.safetensors", "np") as file:
        joined = file.get_tensor("model.layers.2.eh_proj.weight")
        assert joined.dtype == ml_dtypes.bfloat16
        expected = np.asarray(draft["eh_proj.values"][0].astype(jnp.bfloat16))
        np.testing.assert_array_equal(joined, expected)
        copy = file.get_tensor("model.layers.2.embed_tokens.weight")
        np.testing.assert_array_equal(copy, file.get_tensor("model.embed_tokens.weight"))
        norm = file.get_tensor("model.layers.2.input_layernorm.weight")
        assert norm.shape == (tiny.hidden_size,)


def test_the_curve_is_a_picture_with_a_line_for_each_name() -> None:
    picture = draw_curve({"loss": np.linspace(7, 1, 1000), "draft loss": np.linspace(8, 2, 1000)})
    root = ElementTree.fromstring(picture)
    lines = [each for each in root if each.tag.endswith("polyline")]
    assert len(lines) == 2
    first, last = (lines[0].attrib["points"].split()[i] for i in (0, -1))
    assert float(first.split(",")[1]) < float(last.split(",")[1])
