"""Writing: round trips to the byte, in the published layout, and nothing half-written."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from checkpoints.load import load_weights
from checkpoints.reader import Checkpoint, CheckpointError
from checkpoints.writer import tensors_from_weights, write_checkpoint
from glm_jax.config import ModelConfig
from glm_jax.model import abstract_weights
from glm_jax.sharding import make_mesh
from tests.checkpoints.samples import BF16, F32, Tensors, assemble, make_config, make_tensors

INDEX = "model.safetensors.index.json"
SOME = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, BF16)}


def read_all(directory: Path) -> Tensors:
    with Checkpoint(directory) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_same(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name].dtype, left[name].shape) == (right[name].dtype, right[name].shape), name
        assert left[name].tobytes() == right[name].tobytes(), name


def weights_of(directory: Path, config: ModelConfig, num_devices: int) -> dict[str, jax.Array]:
    specs = abstract_weights(config, BF16)
    return load_weights(directory, config, specs, make_mesh(num_devices), progress=False)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
@pytest.mark.parametrize("is_fp8", [True, False])
def test_write_load_export_gives_the_same_bytes(
    tmp_path: Path, is_fp8: bool, num_devices: int
) -> None:
    config = make_config(is_fp8=is_fp8)
    tensors = make_tensors(config, has_mtp=False)
    write_checkpoint(tmp_path / "one", {}, tensors.items(), max_shard_bytes=10_000)
    weights = weights_of(tmp_path / "one", config, num_devices)
    write_checkpoint(tmp_path / "two", {}, tensors_from_weights(config, weights))
    assert_same(read_all(tmp_path / "one"), tensors)
    assert_same(read_all(tmp_path / "two"), tensors)


def test_weights_may_be_numpy_arrays() -> None:
    config = make_config(attention_bias=False, use_qk_norm=False)
    tensors = make_tensors(config, has_mtp=False)
    assert_same(dict(tensors_from_weights(config, assemble(config, tensors))), tensors)


def test_weights_of_another_config_are_refused() -> None:
    config = make_config()
    weights = assemble(config, make_tensors(config))
    with pytest.raises(ValueError, match="differ in .*qkv_proj.bias"):
        list(tensors_from_weights(make_config(attention_bias=False), weights))
    with pytest.raises(ValueError, match="embed_tokens.values is too small to hold model.embed"):
        list(tensors_from_weights(make_config(vocab_size=128), weights))


def test_the_layout_is_the_published_one(tmp_path: Path) -> None:
    tensors = make_tensors(make_config())
    write_checkpoint(tmp_path, {"model_type": "glm4_moe"}, tensors.items(), max_shard_bytes=30_000)
    names = sorted(path.name for path in tmp_path.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    count = len(shards)
    assert count > 3
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert names == sorted(["config.json", INDEX, *shards])
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "glm4_moe"}
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for shard in shards:
        assert (tmp_path / shard).stat().st_size < 30_000 + 20_000  # and a header
        with safe_open(tmp_path / shard, "np") as file:
            held = {name for name, where in index["weight_map"].items() if where == shard}
            assert set(file.keys()) == held
            assert file.metadata() == {"format": "pt"}


def test_others_may_read_what_is_written_as_far_as_the_umask_lets_them(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        write_checkpoint(tmp_path, {}, SOME.items())
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0o644}, modes


def test_a_new_checkpoint_replaces_the_old_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, SOME.items(), max_shard_bytes=1)
    write_checkpoint(tmp_path, {}, {"c": np.zeros(3, F32)}.items())
    assert list(read_all(tmp_path)) == ["c"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_checkpoint_can_be_rewritten_from_itself(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, SOME.items())
    with Checkpoint(tmp_path) as checkpoint:
        again = ((name, checkpoint.read(name)) for name in checkpoint.tensors)
        write_checkpoint(tmp_path, {}, again, max_shard_bytes=1)
    assert_same(read_all(tmp_path), SOME)


def test_a_write_that_fails_leaves_no_checkpoint_and_no_litter(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, np.ndarray]]:
        yield from SOME.items()
        raise RuntimeError("the disk of the source is gone")

    with pytest.raises(RuntimeError):
        write_checkpoint(tmp_path, {}, failing(), max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("checkpoints.writer.serialize_file", full)
    with pytest.raises(CheckpointError, match="No space left on device .*; free some space"):
        write_checkpoint(tmp_path, {}, SOME.items())
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_checkpoint_as_it_was(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, SOME.items())
    with pytest.raises(ValueError, match="x is int64; a checkpoint holds F8_E4M3, BF16, F16, F32"):
        write_checkpoint(tmp_path, {}, {"x": np.zeros(2, np.int64)}.items())
    assert_same(read_all(tmp_path), SOME)


def test_a_publication_cut_short_is_not_taken_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, {}, SOME.items(), max_shard_bytes=1)
    replace, calls = Path.replace, []

    def replace_twice(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) > 2:
            raise OSError("power cut")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_twice)
    with pytest.raises(OSError, match="power cut"):
        write_checkpoint(tmp_path, {}, SOME.items(), max_shard_bytes=1)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("max_bytes", [1, 1 << 20])
def test_a_name_that_comes_twice_is_refused(tmp_path: Path, max_bytes: int) -> None:
    with pytest.raises(ValueError, match="a comes twice"):
        write_checkpoint(tmp_path, {}, [*SOME.items(), ("a", SOME["a"])], max_shard_bytes=max_bytes)


def test_a_checkpoint_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tensors to write"):
        write_checkpoint(tmp_path, {}, [])
