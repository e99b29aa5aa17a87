"""Loading: every weight equals a plain assembly on any mesh, and every fault has its error."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import load
from checkpoints.load import MakeShard, load_weights
from checkpoints.reader import Checkpoint, CheckpointError
from checkpoints.shards import DeviceShard, make_shard
from glm_jax.config import ModelConfig
from glm_jax.model import abstract_weights
from glm_jax.sharding import make_mesh, sharding_for
from tests.checkpoints.samples import (
    BF16,
    F32,
    FP8,
    Tensors,
    assemble,
    make_config,
    make_tensors,
    write_file,
    write_sharded,
)

QUERY = "model.layers.1.self_attn.q_proj.weight"


def write(directory: Path, tensors: Tensors) -> None:
    write_file(directory / "model.safetensors", tensors)


def loaded(
    directory: Path,
    config: ModelConfig,
    num_devices: int = 1,
    dtype: jnp.dtype = BF16,
    make_shard: MakeShard = make_shard,
) -> dict[str, jax.Array]:
    specs = abstract_weights(config, dtype)
    mesh = make_mesh(num_devices)
    weights = load_weights(directory, config, specs, mesh, progress=False, make_shard=make_shard)
    for path, weight in weights.items():
        assert weight.sharding == sharding_for(specs[path].axes, mesh)
        assert (weight.shape, weight.dtype) == (specs[path].shape, specs[path].dtype)
    return weights


def assert_equal(weights: dict[str, jax.Array], expected: Tensors, dtype: np.dtype = BF16) -> None:
    """Equal to the last bit; what is neither FP8 nor fixed to float32 was converted to dtype."""
    assert weights.keys() == expected.keys()
    for path, array in expected.items():
        is_fixed = path.endswith((".scale", ".e_score_correction_bias")) or array.dtype == FP8
        wanted = array if is_fixed else array.astype(dtype)
        assert np.asarray(weights[path]).tobytes() == wanted.tobytes(), path


CONFIGS = {
    "fp8": make_config(),
    "plain": make_config(is_fp8=False),
    "no qk norm, no bias": make_config(use_qk_norm=False, attention_bias=False),
    "two dense layers": make_config(first_k_dense_replace=2, num_nextn_predict_layers=0),
    "G = 1, two shared experts": make_config(num_attention_heads=8, n_shared_experts=2),
}


@pytest.mark.parametrize("num_devices", [1, 2, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_loaded_weights_are_the_assembled_tensors(
    tmp_path: Path, name: str, num_devices: int
) -> None:
    config = CONFIGS[name]
    tensors = make_tensors(config, has_mtp=bool(config.num_nextn_predict_layers))
    write(tmp_path, tensors)
    assert_equal(loaded(tmp_path, config, num_devices), assemble(config, tensors))


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("is_fp8", [True, False])
def test_buffers_in_device_memory_hold_the_same_weights(
    tmp_path: Path, is_fp8: bool, num_devices: int
) -> None:
    config = make_config(is_fp8=is_fp8)
    tensors = make_tensors(config)
    write(tmp_path, tensors)
    weights = loaded(tmp_path, config, num_devices, make_shard=DeviceShard)
    assert_equal(weights, assemble(config, tensors))


@pytest.mark.parametrize(("stored", "held"), [(BF16, F32), (F32, BF16), (np.dtype("f2"), F32)])
def test_plain_tensors_take_the_compute_dtype(
    tmp_path: Path, stored: np.dtype, held: np.dtype
) -> None:
    config = make_config()
    tensors = make_tensors(config, plain=stored)
    write(tmp_path, tensors)
    for kind in (make_shard, DeviceShard):
        weights = loaded(tmp_path, config, 1, held, kind)
        assert_equal(weights, assemble(config, tensors), held)


@pytest.mark.parametrize("scale", [F32, BF16])
@pytest.mark.parametrize("flat_scales", [True, False])
def test_scales_may_be_flat_or_bfloat16_and_are_held_in_float32(
    tmp_path: Path, scale: np.dtype, flat_scales: bool
) -> None:
    config = make_config()
    tensors = make_tensors(config, scale=scale, flat_scales=flat_scales)
    write(tmp_path, tensors)
    weights = loaded(tmp_path, config, 2)
    assert weights["layers.self_attn.qkv_proj.scale"].dtype == jnp.float32
    assert_equal(weights, assemble(config, tensors))


@pytest.mark.parametrize("where", ["nowhere", "index", "beside the index"])
def test_the_mtp_layer_may_be_anywhere_or_missing(tmp_path: Path, where: str) -> None:
    config = make_config()
    main, everything = make_tensors(config, has_mtp=False), make_tensors(config)
    mtp = {name: array for name, array in everything.items() if name not in main}
    names = list(main)
    files = {
        "model-00001-of-00002.safetensors": {n: main[n] for n in names[:90]},
        "model-00002-of-00002.safetensors": {n: main[n] for n in names[90:]},
    }
    if where != "nowhere":
        files["mtp.safetensors"] = mtp
    write_sharded(tmp_path, files, everything if where == "index" else main)
    assert_equal(loaded(tmp_path, config, 2), assemble(config, main))


def test_a_device_that_needs_a_part_reads_only_the_rows_of_it(tmp_path: Path) -> None:
    # As on a machine that has the fourth of eight devices.
    config = make_config()
    tensors = make_tensors(config)
    write(tmp_path, tensors)
    specs = abstract_weights(config, BF16)
    mesh = make_mesh(8)
    parts = {p: load._make_parts(spec, mesh, make_shard)[3:4] for p, spec in specs.items()}
    with Checkpoint(tmp_path) as checkpoint:
        jobs = load._plan(checkpoint, load.placements(config), parts)
        load._run(checkpoint, jobs, False, load.DEFAULT_READING)
    rows = {job.info.name: job.rows for job in jobs}
    assert rows[QUERY] == slice(3 * 12, 4 * 12)
    assert rows["model.embed_tokens.weight"] == slice(24, 32)
    assert rows["model.layers.0.mlp.up_proj.weight_scale"] == slice(18, 24)
    assert rows["model.layers.1.self_attn.o_proj.weight"] is None
    assert {n.split(".")[5] for n in rows if ".experts." in n} == {"6", "7"}
    for path, weight in assemble(config, tensors).items():
        [part] = parts[path]
        where = tuple(slice(s, s + n) for s, n in zip(part.start, part.shape, strict=True))
        assert np.asarray(part.target.finish()).tobytes() == weight[where].tobytes(), path


def drop(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: a for n, a in tensors.items() if n not in names}


def change(name: str, array: np.ndarray) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: array}


@pytest.mark.parametrize(
    ("edit", "messages"),
    [
        (drop(QUERY), ["1 tensor is missing: ", QUERY]),
        (
            drop(*(f"model.layers.2.mlp.experts.{e}.up_proj.weight" for e in range(16))),
            ["16 tensors are missing", "layers.2.mlp.experts.4.up_proj.weight", "and 11 more"],
        ),
        (drop(f"{QUERY}_scale"), ["1 tensor is missing", f"{QUERY}_scale"]),
        (change("extra.weight", np.zeros(1, F32)), ["1 tensor is unexpected: extra.weight"]),
        (
            change(QUERY, np.zeros((96, 31), FP8)),
            [f"{QUERY} has shape [96, 31], expected [96, 32]"],
        ),
        (
            change(f"{QUERY}_scale", np.zeros((1, 96), F32)),
            [f"{QUERY}_scale has shape [1, 96], expected [96, 1] or [96]"],
        ),
        (
            change(f"{QUERY}_scale", np.zeros((96, 1), "f2")),
            [f"{QUERY}_scale is F16, expected F32 or BF16"],
        ),
        (change("model.norm.weight", np.zeros(32, FP8)), ["model.norm.weight is F8_E4M3"]),
        (change(QUERY, np.zeros((96, 32), BF16)), [f"{QUERY} is BF16, but", "says that it is FP8"]),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, edit: Callable[[Tensors], Tensors], messages: list[str]
) -> None:
    config = make_config()
    write(tmp_path, edit(make_tensors(config)))
    with pytest.raises(CheckpointError) as error:
        loaded(tmp_path, config)
    assert all(message in str(error.value) for message in messages), error.value


def test_missing_and_unexpected_tensors_are_told_in_one_error(tmp_path: Path) -> None:
    config = make_config()
    tensors = make_tensors(config)
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors.pop(QUERY)
    write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=f"missing: {QUERY}.*unexpected: model.layers.9"):
        loaded(tmp_path, config)


def test_fp8_tensors_without_a_quantization_config_are_refused(tmp_path: Path) -> None:
    write(tmp_path, make_tensors(make_config()))
    with pytest.raises(CheckpointError, match="is FP8, but config.json has no quantization_config"):
        loaded(tmp_path, make_config(is_fp8=False))


def test_plain_tensors_with_a_quantization_config_are_refused(tmp_path: Path) -> None:
    write(tmp_path, make_tensors(make_config(is_fp8=False)))
    with pytest.raises(CheckpointError, match="is BF16, but config.json's quantization_config"):
        loaded(tmp_path, make_config())


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    write(tmp_path, make_tensors(make_config()))
    with pytest.raises(CheckpointError, match="48 tensors are missing: .*experts.16"):
        loaded(tmp_path, make_config(n_routed_experts=24, num_hidden_layers=2))


def test_specs_of_another_config_are_a_callers_mistake(tmp_path: Path) -> None:
    config = make_config()
    write(tmp_path, make_tensors(config))
    specs = abstract_weights(make_config(moe_intermediate_size=8), BF16)
    with pytest.raises(ValueError, match="differ in .*layers.moe.experts.down_proj.values"):
        load_weights(tmp_path, config, specs, make_mesh(1), progress=False)


def test_loading_takes_the_model_and_two_tensors_of_memory(tmp_path: Path) -> None:
    script = Path(__file__).with_name("measure_load.py")
    command = [sys.executable, str(script), str(tmp_path)]
    for step in ("write", "load"):
        done = subprocess.run([*command, step], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    model, largest, peak = (int(word) for word in done.stdout.split())
    assert model > 150e6
    slack = 6e6  # of the allocator, the threads and the plan
    assert peak < model + 2 * largest + slack, f"{peak - model=} {largest=}"
    assert peak > model
