"""Conversion: the same weights on any mesh, for Orbax too, and the same bytes back."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from checkpoints.convert import convert
from checkpoints.converted import Converted
from checkpoints.load import load_weights
from checkpoints.reader import CheckpointError
from glm_jax.config import ModelConfig
from glm_jax.mtp import weight_specs
from glm_jax.sharding import make_mesh, sharding_for
from tests.checkpoints.samples import (
    BF16,
    F32,
    Tensors,
    make_config,
    make_tensors,
    raw_config,
    write_file,
)

# So small that experts, layers and rows are all cut.
CHUNK_BYTES = 700


def write_source(directory: Path, tensors: Tensors, *, is_fp8: bool = True) -> Path:
    """A checkpoint of two files with a config and something like a tokenizer."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw_config(is_fp8=is_fp8)))
    (directory / "tokenizer.json").write_text("{}")
    mtp = {name: array for name, array in tensors.items() if name.startswith("model.layers.3.")}
    rest = {name: array for name, array in tensors.items() if name not in mtp}
    write_file(directory / "model.safetensors", rest)
    if mtp:
        write_file(directory / "mtp.safetensors", mtp)
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "s", make_tensors(make_config()))


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "c"
    assert convert(source, directory, 8, progress=False, max_chunk_bytes=CHUNK_BYTES)
    return directory


def weights(directory: Path, config: ModelConfig, num_devices: int) -> dict[str, jax.Array]:
    specs = weight_specs(config, BF16, with_mtp=bool(config.num_nextn_predict_layers))
    return load_weights(directory, config, specs, make_mesh(num_devices), progress=False)


def assert_same(left: dict[str, jax.Array], right: dict[str, jax.Array]) -> None:
    assert left.keys() == right.keys()
    for path, array in left.items():
        other = right[path]
        assert (array.sharding, array.dtype) == (other.sharding, other.dtype), path
        assert np.asarray(array).tobytes() == np.asarray(other).tobytes(), path


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_both_forms_load_as_the_same_weights(
    source: Path, converted: Path, num_devices: int
) -> None:
    config = ModelConfig.from_directory(converted)
    assert_same(weights(source, config, num_devices), weights(converted, config, num_devices))


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_conversion_serves_other_numbers_of_devices_than_it_was_made_for(
    source: Path, tmp_path: Path, num_devices: int
) -> None:
    convert(source, tmp_path / "c", num_devices, progress=False)
    config = make_config()
    assert_same(weights(source, config, 8), weights(tmp_path / "c", config, 8))


@pytest.mark.parametrize("plain", [BF16, F32, np.dtype("f2")])
@pytest.mark.parametrize("is_fp8", [True, False])
def test_whatever_the_original_holds_loads_the_same(
    tmp_path: Path, plain: np.dtype, is_fp8: bool
) -> None:
    config = make_config(is_fp8=is_fp8)
    tensors = make_tensors(config, plain=plain, scale=BF16, flat_scales=True)
    source = write_source(tmp_path / "s", tensors, is_fp8=is_fp8)
    convert(source, tmp_path / "c", 8, progress=False)
    assert_same(weights(source, config, 8), weights(tmp_path / "c", config, 8))


def test_orbax_restores_it_sharded(source: Path, converted: Path) -> None:
    config, mesh = make_config(), make_mesh(8)
    specs = weight_specs(config, BF16, with_mtp=True)
    wanted = {
        path: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding_for(spec.axes, mesh))
        for path, spec in specs.items()
    }
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(
            converted / "weights",
            args=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )
    assert_same(weights(source, config, 8), found)


def test_a_device_reads_only_chunks_of_its_own(converted: Path) -> None:
    config, mesh = make_config(), make_mesh(8)
    specs = weight_specs(config, BF16, with_mtp=True)
    with Converted(converted) as opened:
        for path, spec in specs.items():
            chunk = opened.arrays[path].grid.chunk
            shard = sharding_for(spec.axes, mesh).shard_shape(spec.shape)
            assert not any(whole % part for whole, part in zip(shard, chunk, strict=True)), path
            assert np.prod(chunk) * spec.dtype.itemsize <= CHUNK_BYTES or chunk[-1] == shard[-1]


def test_a_second_conversion_finds_nothing_to_do(source: Path, converted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in converted.rglob("*") if path.is_file()}
    assert not convert(source, converted, 8, progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_directory_than_its_own_is_refused(source: Path, converted: Path) -> None:
    with pytest.raises(CheckpointError, match="conversion of other files or for another target"):
        convert(source, converted, 4, progress=False)
    with pytest.raises(CheckpointError, match="is not empty: convert to a directory of its own"):
        convert(source, source, 8, progress=False)
