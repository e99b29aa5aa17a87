"""Faults of a conversion: each has an outcome in words, and nothing half-written is taken for whole."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoints import convert as conversion
from checkpoints.convert import convert
from checkpoints.converted import Converted
from checkpoints.export import export
from checkpoints.reader import Checkpoint, CheckpointError
from checkpoints.verify import verify
from tests.checkpoints.kill_convert import digest
from tests.checkpoints.samples import (
    BF16,
    F32,
    FP8,
    Tensors,
    make_config,
    make_tensors,
    write_file,
    write_sharded,
)
from tests.checkpoints.test_convert import CHUNK_BYTES, weights, write_source

WRITE = os.write
CHUNK = "weights/layers.moe.experts.down_proj.values/c.1.9.0.0"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "s", make_tensors(make_config()))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "c"
    convert(source, directory, 8, progress=False, max_chunk_bytes=CHUNK_BYTES)
    return directory


@pytest.fixture
def converted(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "c"))


def flip(file: Path, place: int = -1) -> None:
    raw = bytearray(file.read_bytes())
    raw[place] ^= 4
    file.write_bytes(raw)


def test_the_round_trip_gives_the_same_files(source: Path, whole: Path, tmp_path: Path) -> None:
    export(whole, tmp_path / "back", progress=False)
    assert digest(tmp_path / "back") == digest(source)
    assert verify(whole, source, progress=False).faults == []


@pytest.mark.parametrize(
    "kinds",
    [
        {"scale": BF16},
        {"flat_scales": True},
        {"plain": np.dtype("f2"), "scale": BF16, "flat_scales": True},
        {"has_mtp": False},
    ],
)
def test_the_round_trip_gives_back_whatever_kinds_of_tensors_there_were(
    tmp_path: Path, kinds: dict
) -> None:
    source = write_source(tmp_path / "s", make_tensors(make_config(), **kinds))
    convert(source, tmp_path / "c", 2, progress=False)
    export(tmp_path / "c", tmp_path / "back", progress=False)
    assert digest(tmp_path / "back") == digest(source)


def test_an_mtp_layer_that_is_not_whole_is_kept_though_it_cannot_be_loaded(tmp_path: Path) -> None:
    tensors = make_tensors(make_config())
    del tensors["model.layers.3.eh_proj.weight"]
    source = write_source(tmp_path / "s", tensors)
    convert(source, tmp_path / "c", 8, progress=False)
    export(tmp_path / "c", tmp_path / "back", progress=False)
    assert digest(tmp_path / "back") == digest(source)
    with pytest.raises(CheckpointError, match=r"mtp\..* is missing"):
        weights(tmp_path / "c", make_config(), 1)


def test_an_index_may_lack_a_tensor_of_a_file_but_not_a_file(tmp_path: Path) -> None:
    tensors = make_tensors(make_config(), has_mtp=False)
    source = write_source(tmp_path / "s", {})
    (source / "model.safetensors").unlink()
    first = {name: array for name, array in tensors.items() if name < "model.layers.1"}
    files = {
        "a.safetensors": first,
        "b.safetensors": {n: tensors[n] for n in tensors.keys() - first},
    }
    write_sharded(source, files, {n: a for n, a in tensors.items() if n != "lm_head.weight"})
    convert(source, tmp_path / "c", 8, progress=False)
    export(tmp_path / "c", tmp_path / "back", progress=False)
    assert digest(tmp_path / "back") == digest(source)
    write_sharded(source, files, first)
    with pytest.raises(CheckpointError, match=f"{len(files['b.safetensors'])} tensors are missing"):
        convert(source, tmp_path / "d", 8, progress=False)


def edit_tensors(edit: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def edit_source(directory: Path) -> None:
        tensors = make_tensors(make_config(), has_mtp=False)
        edit(tensors)
        write_file(directory / "model.safetensors", tensors)

    return edit_source


def shorten(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 5000)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shorten, "model.safetensors is truncated: .* download it again"),
        (edit_tensors(lambda t: t.pop("lm_head.weight")), "1 tensor is missing: lm_head.weight"),
        (edit_tensors(lambda t: t.update(x=np.zeros(1, F32))), "1 tensor is unexpected: x"),
        (
            edit_tensors(lambda t: t.update({"model.norm.weight": np.zeros(32, FP8)})),
            "model.norm.weight is F8_E4M3, expected BF16 or F16 or F32",
        ),
    ],
)
def test_a_broken_original_is_not_converted(
    source: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    copied = Path(shutil.copytree(source, tmp_path / "s"))
    damage(copied)
    with pytest.raises(CheckpointError, match=words):
        convert(copied, tmp_path / "c", 8, progress=False)
    assert not (tmp_path / "c").exists()


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (CHUNK, truncate, r"c\.1\.9\.0\.0 has 511 bytes; a chunk .* has 512 bytes: copy the file"),
        (CHUNK, Path.unlink, r"c\.1\.9\.0\.0 is missing; a chunk"),
        (CHUNK, flip, r"c\.1\.9\.0\.0 is damaged: its bytes have CRC-32 \w{8} and manifest.json"),
        ("manifest.json", flip, "manifest.json is damaged; copy it again"),
        ("manifest.json", truncate, "manifest.json is damaged; copy it again"),
    ],
)
def test_a_damaged_conversion_is_not_loaded(
    converted: Path, name: str, damage: Callable[[Path], None], words: str
) -> None:
    damage(converted / name)
    with pytest.raises(CheckpointError, match=words):
        weights(converted, make_config(), 8)


@pytest.mark.parametrize(
    "name", [CHUNK, "tokenizer.json", "source/tensors.json", "weights/_METADATA"]
)
def test_verify_names_each_damaged_file(converted: Path, name: str) -> None:
    flip(converted / name, 0)
    [fault] = verify(converted, progress=False).faults
    assert str(converted / name) in fault


def test_export_does_not_write_a_damaged_tensor(converted: Path, tmp_path: Path) -> None:
    flip(converted / CHUNK)
    with pytest.raises(CheckpointError, match=r"experts.9.down_proj.weight comes out with CRC-32"):
        export(converted, tmp_path / "back", progress=False)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Checkpoint(tmp_path / "back")


def test_verify_compares_with_the_original(source: Path, converted: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(source, tmp_path / "s"))
    flip(changed / "model.safetensors")
    [fault] = verify(converted, changed, progress=False).faults
    assert "lm_head.weight is not what" in fault


def test_verify_looks_at_the_numbers_of_a_published_checkpoint(tmp_path: Path) -> None:
    tensors = make_tensors(make_config(), has_mtp=False)
    for name, array in tensors.items():
        if name.endswith("_scale"):
            tensors[name] = np.abs(array) + 1
    directory = write_source(tmp_path / "s", tensors)
    assert verify(directory, progress=False).faults == []
    up = "model.layers.2.mlp.experts.3.up_proj.weight"
    tensors[up].view(np.uint8)[2, 3] = 0xFF
    tensors[f"{up}_scale"][5] = 0
    tensors["model.norm.weight"][1] = np.inf
    write_file(directory / "model.safetensors", tensors)
    faults = verify(directory, progress=False).faults
    assert [fault.split()[1] for fault in faults] == [up, f"{up}_scale", "model.norm.weight"]


class Disk:
    """A disk that fails once so many bytes were written to it."""

    def __init__(self, room: int, number: int) -> None:
        self.room, self.number = room, number

    def write(self, descriptor: int, raw: memoryview) -> int:
        self.room -= len(raw)
        if self.room < 0:
            raise OSError(self.number, os.strerror(self.number))
        return WRITE(descriptor, raw)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device; free some space, .* run the same command again"),
        (errno.EIO, "Input/output error; see to the disk and run the same command again"),
    ],
)
@pytest.mark.parametrize("room", [0, 30_000])
def test_a_disk_that_fails_is_named_and_the_conversion_goes_on_later(
    source: Path, whole: Path, tmp_path: Path, number: int, words: str, room: int
) -> None:
    disk, destination = Disk(room, number), tmp_path / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", disk.write)
        with pytest.raises(CheckpointError, match=f"cannot write .*: {words}"):
            convert(source, destination, 8, progress=False, max_chunk_bytes=CHUNK_BYTES)
    with pytest.raises(CheckpointError, match="its conversion is not finished; run the same"):
        weights(destination, make_config(), 1)
    assert convert(source, destination, 8, progress=False, max_chunk_bytes=CHUNK_BYTES)
    assert digest(destination) == digest(whole)


def test_a_disk_too_small_for_what_is_left_is_told_before_the_first_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="still to be written and 0.000 GB are free"):
        convert(source, tmp_path / "c", 8, progress=False)


def test_a_directory_that_may_not_be_written_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    words = "cannot write .*c: Permission denied; write to a directory that is yours"
    with pytest.raises(CheckpointError, match=words):
        convert(source, tmp_path / "c", 8, progress=False)


def test_an_original_that_changes_meanwhile_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, destination = Path(shutil.copytree(source, tmp_path / "s")), tmp_path / "c"
    make = conversion._make_piece

    def touch_and_make(*args):
        os.utime(copied / "model.safetensors")
        return make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_make_piece", touch_and_make)
        with pytest.raises(CheckpointError, match="has changed while it was being converted"):
            convert(copied, destination, 8, progress=False)
    with pytest.raises(CheckpointError, match="unfinished conversion of other files"):
        convert(copied, destination, 8, progress=False)
    assert not (destination / "manifest.json").exists()


def test_chunks_of_two_sizes_are_not_mixed(source: Path, tmp_path: Path) -> None:
    destination = tmp_path / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", Disk(30_000, errno.ENOSPC).write)
        with pytest.raises(CheckpointError, match="No space left"):
            convert(source, destination, 8, progress=False)
    with pytest.raises(CheckpointError, match="unfinished conversion of other files"):
        convert(source, destination, 8, progress=False, max_chunk_bytes=CHUNK_BYTES)


def test_a_conversion_is_not_converted_again(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="manifest.json is a conversion's"):
        convert(whole, tmp_path / "c", 8, progress=False)


def test_two_conversions_do_not_write_to_one_directory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "c"
    make = conversion._make_piece
    second: list[CheckpointError] = []

    def convert_meanwhile_and_make(*args):
        if not second:
            with pytest.raises(CheckpointError, match="another process is converting") as error:
                convert(source, destination, 8, progress=False)
            second.append(error.value)
        return make(*args)

    monkeypatch.setattr(conversion, "_make_piece", convert_meanwhile_and_make)
    monkeypatch.setattr(conversion, "_NUM_WORKERS", 1)
    assert convert(source, destination, 8, progress=False)
    assert second


def test_killed_conversions_end_with_the_same_bytes(source: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("kill_convert.py")
    done = subprocess.run(
        [sys.executable, str(script), str(source), str(tmp_path), "3", "0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("3 conversions")


def test_an_unfinished_conversion_says_so(whole: Path, tmp_path: Path) -> None:
    unfinished = Path(shutil.copytree(whole, tmp_path / "c"))
    (unfinished / "journal.jsonl").write_text("")
    (unfinished / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="has no manifest.json: its conversion is not"):
        Converted(unfinished)
    manifest = json.loads((whole / "manifest.json").read_text())
    manifest["manifest"]["format"] = "other"
    (unfinished / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        Converted(unfinished)
