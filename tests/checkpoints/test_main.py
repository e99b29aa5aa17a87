"""The command line: a whole checkpoint passes, a broken one is explained."""

import json
from pathlib import Path

from click.testing import CliRunner

from checkpoints.__main__ import main
from tests.checkpoints.samples import config_json, make_config, make_tensors, write_file


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
