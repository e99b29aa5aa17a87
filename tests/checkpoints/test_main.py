"""The command line: a whole checkpoint passes, a broken one is explained."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from checkpoints.__main__ import main
from checkpoints.inspection import device_bytes, parameters_of
from checkpoints.quantize import tensor_kinds
from checkpoints.reader import Checkpoint
from glm_jax.aot.presets import PRESETS
from glm_jax.config import ModelConfig
from tests.checkpoints.kill_convert import digest
from tests.checkpoints.samples import (
    config_json,
    make_config,
    make_tensors,
    raw_config,
    write_file,
)


def test_inspect_passes_a_whole_checkpoint(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", make_tensors(make_config(is_fp8=False)))
    (tmp_path / "config.json").write_text(json.dumps(config_json()))
    result = CliRunner().invoke(main, ["inspect", str(tmp_path), "--all"])
    assert result.exit_code == 0
    assert "[96, 32]            model.layers.0.self_attn.q_proj.weight" in result.output
    assert f"in {len(make_tensors(make_config(is_fp8=False)))} tensors" in result.output


def test_inspect_names_what_is_missing_and_what_is_unexpected(tmp_path: Path) -> None:
    tensors = make_tensors(make_config(is_fp8=False))
    tensors["stray"] = tensors.pop("model.norm.weight")
    write_file(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(config_json()))
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert "missing: model.norm.weight\nunexpected: stray\n" in result.output


def test_inspect_says_what_is_wrong_with_a_directory(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert "config.json does not exist" in result.output


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def dummy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FP8 checkpoint, made with one layer more than its config has."""
    directory = tmp_path_factory.mktemp("dummy")
    (directory / "config.json").write_text(json.dumps(raw_config()))
    run("dummy", directory / "d", "--config", directory, "--layers", 4, "--dense-layers", 2)
    return directory / "d"


def test_a_dummy_is_a_whole_checkpoint_of_its_config(dummy: Path) -> None:
    raw = json.loads((dummy / "config.json").read_text())
    assert (raw["num_hidden_layers"], raw["first_k_dense_replace"]) == (4, 2)
    assert "nothing wrong with 0.000 GB" in run("verify", dummy)
    with Checkpoint(dummy) as checkpoint:
        assert set(checkpoint.tensors) == set(tensor_kinds(ModelConfig.from_directory(dummy)))
        scale = checkpoint.read("model.layers.2.mlp.experts.1.up_proj.weight_scale")
        values = checkpoint.read("model.layers.2.mlp.experts.1.up_proj.weight")
    deviation = (values.astype("f4") * scale).std() * 32**0.5
    assert deviation == pytest.approx(0.7, rel=0.1)


def test_a_checkpoint_goes_through_convert_verify_inspect_and_export(
    dummy: Path, tmp_path: Path
) -> None:
    converted, back = tmp_path / "c", tmp_path / "back"
    assert "is whole" in run("convert", dummy, converted)
    assert "was whole already" in run("convert", dummy, converted)
    assert "nothing wrong" in run("verify", converted, "--original", dummy)
    shown = run("inspect", converted, "--all", "--target", "b200x8")
    assert "in chunks [2, 2, 2, 16, 32]           layers.moe.experts.gate_up_proj.values" in shown
    assert "GB  of weights on each device of b200x8 of 191.5 GB" in shown
    run("export", converted, back)
    assert digest(back) == digest(dummy)
    (converted / "tokenizer.json").write_text("")  # is not the conversion's, so nobody minds
    (converted / "weights" / "norm.weight" / "c.0").write_bytes(b"\0" * 64)
    assert "1 faults in" in run("verify", converted, code=1)
    output = run("convert", dummy, tmp_path / "x", "--target", "b200x3", code=1)
    assert "3 devices cannot share" in output


def test_a_dummy_that_has_no_room_is_not_begun(
    dummy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoint(dummy) as checkpoint:
        nbytes = sum(info.nbytes for info in checkpoint)
    usage = shutil.disk_usage(tmp_path)
    for free, code in ((nbytes - 1, 1), (nbytes, 0)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: usage._replace(free=free))
        said = run("dummy", tmp_path, "--config", dummy, code=code)
        assert ("are still to be written" in said) == (code == 1)
        assert (tmp_path / "config.json").exists() == (code == 0)


def test_inspect_counts_the_published_models_parameters_and_bytes() -> None:
    # 352.8 billion, of which a token meets 32.86: the numbers of the model's card.
    config = ModelConfig.from_dict(PRESETS["glm-4.7"])
    found = parameters_of(config)
    assert found.total == 352_797_829_024
    assert found.active == pytest.approx(32.86e9, rel=1e-3)
    assert found.mtp == 3_988_069_792
    decoder, mtp = device_bytes(config, 8)
    assert 8 * decoder == pytest.approx(354.90e9, rel=0.01)
    assert 8 * mtp == pytest.approx(4.05e9, rel=0.2)  # eh_proj is whole on each


def test_nano_s_card_counts_its_parameters_as_inspect_does() -> None:
    nano = Path(__file__).parents[2] / "checkpoints" / "nano"
    found = parameters_of(ModelConfig.from_directory(nano))
    total, active, mtp = (
        f"{number / 1e6:.1f} M" for number in (found.total, found.active, found.mtp)
    )
    row = f"| parameters | {total}, of which {active} work on each token; {mtp} more in the MTP layer |"
    assert row in (nano / "README.md").read_text(encoding="utf-8")


def test_quantize_writes_the_published_format(tmp_path: Path) -> None:
    plain, quantized = tmp_path / "plain", tmp_path / "fp8"
    plain.mkdir()
    write_file(plain / "model.safetensors", make_tensors(make_config(is_fp8=False)))
    (plain / "config.json").write_text(json.dumps(config_json()))
    (plain / "tokenizer.json").write_text("{}")
    run("quantize", plain, quantized)
    assert ModelConfig.from_directory(quantized).is_fp8
    assert (quantized / "tokenizer.json").read_text() == "{}"
    assert "nothing wrong" in run("verify", quantized)
    assert "is FP8 already" in run("quantize", quantized, tmp_path / "again", code=1)
