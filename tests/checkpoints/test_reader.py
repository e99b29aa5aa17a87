"""Reading: the right bytes of the right tensor, and every way a file can be broken."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.reader import Checkpoint, CheckpointError
from tests.checkpoints.samples import BF16, F32, FP8, header_of, write_file, write_sharded

RNG = np.random.default_rng(0)
TENSORS = {
    "b": RNG.normal(size=(6, 5)).astype(FP8),
    "a": RNG.normal(size=(7,)).astype(BF16),
    "c": RNG.normal(size=(3, 2, 4)).astype(F32),
    "d": RNG.normal(size=(2, 2)).astype(np.float16),
}
INDEX = "model.safetensors.index.json"


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())


def test_every_dtype_reads_back_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", TENSORS)
    with Checkpoint(tmp_path) as checkpoint:
        assert all(same(checkpoint.read(name), TENSORS[name]) for name in TENSORS)


def test_a_range_of_rows_reads_only_those_rows(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", TENSORS)
    with Checkpoint(tmp_path) as checkpoint:
        assert same(checkpoint.read("b", slice(2, 5)), TENSORS["b"][2:5])
        assert same(checkpoint.read("c", slice(1, 2)), TENSORS["c"][1:2])
        assert same(checkpoint.read("a", slice(3, 3)), TENSORS["a"][3:3])


def test_tensors_come_in_the_order_they_have_on_disk(tmp_path: Path) -> None:
    first = {"z": TENSORS["a"], "y": TENSORS["b"]}
    header = dict(reversed(header_of(first).items()))
    write_sharded(tmp_path, {"model-1.safetensors": first, "model-2.safetensors": {}}, first)
    write_file(tmp_path / "model-1.safetensors", first, header)
    with Checkpoint(tmp_path) as checkpoint:
        assert [info.name for info in checkpoint] == ["z", "y"]


def test_files_are_those_of_the_index_and_mtp(tmp_path: Path) -> None:
    files = {
        "model-00002-of-00002.safetensors": {"a": TENSORS["a"]},
        "model-00001-of-00002.safetensors": {"b": TENSORS["b"]},
        "mtp.safetensors": {"c": TENSORS["c"]},
        "another.safetensors": {"d": TENSORS["d"]},
    }
    write_sharded(tmp_path, files, {"a": TENSORS["a"], "b": TENSORS["b"]})
    with Checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["b", "a", "c"]
        assert same(checkpoint.read("c"), TENSORS["c"])


def test_a_file_and_an_array_of_no_elements_are_fine(tmp_path: Path) -> None:
    empty = {"e": np.zeros((0, 4), F32), "a": TENSORS["a"], "f": np.zeros((2, 0), F32)}
    write_file(tmp_path / "model.safetensors", empty)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("e").shape == (0, 4)
        assert same(checkpoint.read("a"), TENSORS["a"])


def test_the_librarys_own_files_read_back(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    plain = {"c": TENSORS["c"], "d": TENSORS["d"]}
    save_file(plain, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint(tmp_path) as checkpoint:
        assert all(same(checkpoint.read(name), plain[name]) for name in plain)


def broken(**changes: Any) -> dict[str, Any]:
    header = header_of(TENSORS)
    header["a"] = header["a"] | changes
    return header


HEADER = header_of(TENSORS)
TWICE = json.dumps(HEADER)[:-1] + ', "a": ' + json.dumps(HEADER["a"]) + "}"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a": ', "broken header, not valid JSON"),
        (b"[1]", "broken header: not an object"),
        (b"\xff\xfe", "broken header, not valid JSON"),
        (TWICE.encode(), "names a twice"),
        ({"a": {"dtype": "F32"}}, "tensor a has a broken header entry"),
        ({"a": 3}, "tensor a has a broken header entry"),
        (broken(dtype="I64"), "tensor a has dtype 'I64'; only F8_E4M3, BF16, F16, F32 can be read"),
        (broken(shape=[7.5]), "tensor a has shape [7.5], which is not a list of sizes"),
        (broken(shape=[-7]), "tensor a has shape [-7]"),
        (broken(shape=[8]), "tensor a spans 14 bytes, but BF16 [8] takes 16"),
        (broken(data_offsets=[44, 30]), "tensor a has data_offsets [44, 30]"),
        (broken(data_offsets=[28, 42]), "tensor a begins at byte"),
        (broken(data_offsets=[32, 46]), "leaves a gap"),
        ({"a": HEADER["b"], "b": HEADER["b"]}, "tensor b begins at byte"),
        ({"b": HEADER["b"]}, "its tensors end at byte"),
        (HEADER | {"e": {"dtype": "F32", "shape": [9], "data_offsets": [148, 184]}}, "truncated"),
    ],
)
def test_a_broken_header_names_file_and_tensor(tmp_path: Path, header: Any, message: str) -> None:
    write_file(tmp_path / "model.safetensors", TENSORS, header)
    with pytest.raises(CheckpointError) as error:
        Checkpoint(tmp_path)
    assert message in str(error.value)
    assert "model.safetensors" in str(error.value)


def test_an_overlap_is_called_one(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", TENSORS, broken(data_offsets=[28, 42]))
    with pytest.raises(CheckpointError, match="overlaps the tensor before it"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "0 bytes do not hold a header"),
        (7, "7 bytes do not hold a header"),
        (40, "its header takes"),
        (-1, "tensor d ends at byte"),
        (-20, "tensor c ends at byte"),
    ],
)
def test_a_truncated_file_says_where_it_ends(tmp_path: Path, size: int, message: str) -> None:
    path = tmp_path / "model.safetensors"
    write_file(path, TENSORS)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"truncated: .*{message}.*download it again"):
        Checkpoint(tmp_path)


def test_a_file_that_shrinks_while_open_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_file(path, TENSORS)
    with Checkpoint(tmp_path) as checkpoint:
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(CheckpointError, match="ended while d was being read"):
            checkpoint.read("d")


def test_a_git_lfs_pointer_is_recognized_as_no_checkpoint(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
    (tmp_path / "model.safetensors").write_bytes(pointer)
    with pytest.raises(CheckpointError, match="not a safetensors file.*Git LFS pointer"):
        Checkpoint(tmp_path)


def test_an_enormous_header_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"x" * 100)
    with pytest.raises(CheckpointError, match="header would be 1099511627776 bytes long"):
        Checkpoint(tmp_path)


def test_a_directory_without_a_checkpoint_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"holds no checkpoint: expected {INDEX}"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Checkpoint(tmp_path / "absent")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "tensor a into '../x.safetensors'"),
        ('{"weight_map": {"a": 3}}', "tensor a into 3"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "absent.safetensors is missing"),
        ('{"weight_map": {"x": "model.safetensors"}}', "model.safetensors lacks tensor x"),
    ],
)
def test_a_broken_index_names_its_fault(tmp_path: Path, index: str, message: str) -> None:
    write_file(tmp_path / "model.safetensors", TENSORS)
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError) as error:
        Checkpoint(tmp_path)
    assert message in str(error.value)


def test_a_tensor_in_two_files_names_both(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", TENSORS)
    write_file(tmp_path / "mtp.safetensors", {"a": TENSORS["a"]})
    with pytest.raises(CheckpointError, match="a is in both .*model.safetensors and .*mtp.safet"):
        Checkpoint(tmp_path)


def test_an_index_that_misplaces_a_tensor_is_refused(tmp_path: Path) -> None:
    write_file(tmp_path / "one.safetensors", {"a": TENSORS["a"]})
    write_file(tmp_path / "two.safetensors", {"b": TENSORS["b"]})
    where = {"a": "two.safetensors", "b": "one.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    with pytest.raises(
        CheckpointError, match="says tensor a is in .*two.*one.safetensors holds it"
    ):
        Checkpoint(tmp_path)


def test_a_failed_opening_leaves_no_file_open(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        descriptors = Path("/dev/fd")
    before = len(list(descriptors.iterdir()))
    write_file(tmp_path / "model.safetensors", TENSORS, b"[1]")
    with pytest.raises(CheckpointError):
        Checkpoint(tmp_path)
    assert len(list(descriptors.iterdir())) == before
