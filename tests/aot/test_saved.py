"""Engines on disk: built whole, loaded without a compilation, refused when anything differs."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

from glm_jax.aot import saved
from glm_jax.aot.__main__ import main
from glm_jax.aot.saved import EngineMismatchError, load
from glm_jax.config import ModelConfig
from glm_jax.engine.request import Request, SamplingParams
from glm_jax.sharding import make_mesh
from serving.bridge import CannotStartError
from serving.model_engine import build_engine
from serving.start import Start
from serving.tokenizer import ModelTokenizer
from tests.serving.test_model_engine import NANO, answers, options

BF16 = np.dtype(ml_dtypes.bfloat16)
LIMITS = {"max_concurrency": 4, "max_seq_len": 128, "max_batch_tokens": 32}
CONFIG = ModelConfig.from_directory(NANO)


def build(out: Path, **changes: Any) -> Any:
    fields = {"config": NANO, "target": "cpu", "out": out} | LIMITS | changes
    names = {f"--{name.replace('_', '-')}": value for name, value in fields.items()}
    flags = [name if value is True else f"{name}={value}" for name, value in names.items()]
    # In this process, whose settings the command would change for the tests that follow.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glm_jax.aot.topology.stay_off_devices", lambda: None)
        return CliRunner().invoke(main, ["build", *flags])


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # An executable that comes from a compilation cache is not whole enough to be written again.
    out = tmp_path_factory.mktemp("aot") / "engine"
    with cache_off():
        result = build(out)
    assert result.exit_code == 0, result.output
    return out


def test_steps_are_compiled_on_no_other_devices_than_the_target_s(tmp_path: Path) -> None:
    with cache_off():
        result = build(tmp_path / "engine", target="b200x8", on_devices=True)
    assert result.exit_code == 1
    assert "x cpu, which is not b200x8" in result.output and not (tmp_path / "engine").exists()


@contextmanager
def cache_off() -> Iterator[None]:
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


@contextmanager
def compilations() -> Iterator[list[str]]:
    """What JAX compiles, or takes from its cache, while the block runs."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def loaded(directory: Path, config: ModelConfig = CONFIG, **limits: int) -> saved.SavedEngine:
    return load(config, make_mesh(1), BF16, LIMITS | {"num_drafts": 0} | limits, directory)


def requests() -> list[Request]:
    tokenizer = ModelTokenizer.from_directory(NANO)
    texts = ["What is the capital of France?", "What is 7 + 5?", "Hello!"]
    return [
        Request(
            id=str(index),
            prompt=tuple(tokenizer.encode(f"[gMASK]<sop><|user|>{text}<|assistant|><think>")),
            sampling=SamplingParams(max_new_tokens=24, temperature=temperature, seed=5),
        )
        for index, (text, temperature) in enumerate(zip(texts, (0.0, 0.0, 1.0), strict=True))
    ]


@pytest.mark.slow
def test_a_start_from_an_engine_compiles_nothing_and_says_the_same(engine: Path) -> None:
    tokenizer = ModelTokenizer.from_directory(NANO)
    plain = answers(build_engine(options(**LIMITS), tokenizer), requests())
    start = Start()
    jax.clear_caches()
    with compilations() as compiled:
        built = build_engine(options(engine=engine, **LIMITS), tokenizer, start)
        from_engine = answers(built, requests())
    assert not compiled
    assert from_engine == plain
    phases = start.phases
    assert set(phases) == {"load", "weights", "warm_up", "total"}
    assert phases["total"] >= max(phases["load"], phases["weights"], phases["warm_up"]) > 0


@pytest.mark.slow
def test_an_engine_that_guesses_says_the_same_in_fewer_steps(engine: Path, tmp_path: Path) -> None:
    tokenizer = ModelTokenizer.from_directory(NANO)
    limits = LIMITS | {"speculative_tokens": 1}
    with cache_off():
        assert build(tmp_path / "engine", speculative_tokens=1, on_devices=True).exit_code == 0
    built = build_engine(options(engine=tmp_path / "engine", **limits), tokenizer)
    plain = build_engine(options(engine=engine, **LIMITS), tokenizer)
    assert answers(built, requests()) == answers(plain, requests())
    assert built.stats().num_decode_steps < plain.stats().num_decode_steps
    with pytest.raises(CannotStartError, match="limits.num_drafts is 0 there, 1 here"):
        build_engine(options(engine=engine, **limits), tokenizer)


@pytest.mark.slow
def test_the_listener_does_hear_a_compilation() -> None:
    jax.clear_caches()
    with compilations() as compiled:
        jax.jit(lambda x: x + 1)(np.float32(1)).block_until_ready()
    assert compiled


@pytest.mark.slow
def test_an_engine_for_other_limits_is_refused_and_says_which(engine: Path) -> None:
    with pytest.raises(
        EngineMismatchError, match="limits.max_seq_len is 128 there, 64 here.*aot build"
    ):
        loaded(engine, max_seq_len=64)


@pytest.mark.slow
def test_every_difference_is_named(engine: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(CONFIG, rope_theta=123.0)
    with pytest.raises(EngineMismatchError, match=r"model.rope_theta is .* there, 123.0 here"):
        loaded(engine, config=other)
    manifest = json.loads((engine / "manifest.json").read_text())
    changes = {
        "jax": "0.1", "jaxlib": "0.1", "devices": 8, "device_kind": "NVIDIA B200", "dtype": "float32",
        "source": "older", "host": "sparc", "xla_flags": ["--xla_x"], "format": 0,
    }  # fmt: skip
    changed = tmp_path / "engine"
    shutil.copytree(engine, changed)
    (changed / "manifest.json").write_text(json.dumps(manifest | changes))
    with pytest.raises(EngineMismatchError) as caught:
        loaded(changed)
    for name, value in changes.items():
        assert f"{name} is {value!r} there" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "decode-4").write_bytes(b"short"), "is damaged"),
        (lambda path: (path / "decode-4").unlink(), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text("{"), "is not readable"),
        (lambda path: (path / "manifest.json").write_text("[]"), "not one of ours"),
        (lambda path: (path / "manifest.json").unlink(), "holds no engine"),
    ],
)
def test_a_damaged_engine_is_refused(engine: Path, tmp_path: Path, damage: Any, words: str) -> None:
    copy = tmp_path / "engine"
    shutil.copytree(engine, copy)
    damage(copy)
    with pytest.raises(EngineMismatchError, match=words):
        loaded(copy)


@pytest.mark.slow
def test_a_server_with_the_wrong_engine_does_not_start_unless_it_may_compile(engine: Path) -> None:
    tokenizer = ModelTokenizer.from_directory(NANO)
    wrong = options(engine=engine, **LIMITS | {"max_concurrency": 2})
    with pytest.raises(
        CannotStartError, match=r"max_concurrency is 4 there, 2 here.*--engine-fall"
    ):
        build_engine(wrong, tokenizer)
    start = Start()
    fallback = dataclasses.replace(wrong, engine_fallback=True)
    build_engine(fallback, tokenizer, start)
    assert {"compile", "total"} <= start.phases.keys()


@pytest.mark.slow
def test_an_engine_with_other_sums_is_refused(engine: Path, tmp_path: Path) -> None:
    tokenizer, plain = ModelTokenizer.from_directory(NANO), tmp_path / "plain"
    with pytest.raises(CannotStartError, match="plain_sums is False there, True here"):
        build_engine(options(engine=engine, plain_sums=True, **LIMITS), tokenizer)
    with cache_off():
        assert build(plain, plain_sums=True).exit_code == 0
    with pytest.raises(CannotStartError, match="plain_sums is True there, False here"):
        build_engine(options(engine=plain, **LIMITS), tokenizer)


@pytest.mark.slow
def test_an_engine_is_replaced_whole_and_other_things_are_left_alone(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(path.name for path in engine.iterdir())
    assert "manifest.json" in names and "cache" in names and len(names) >= 4
    assert not [path for path in engine.parent.iterdir() if path != engine]
    (tmp_path / "diary.txt").write_text("dear diary")
    result = build(tmp_path)
    assert result.exit_code == 1 and "holds other things than an engine" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]
    copy = tmp_path / "copy"
    shutil.copytree(engine, copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def fail(*arguments: Any) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(saved.serialize_executable, "serialize", fail)
    with cache_off():
        assert isinstance(build(copy).exception, OSError)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_a_target_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    result = build(tmp_path / "engine", target="cpux64")
    assert result.exit_code == 1 and "64 devices were asked for" in result.output
    assert not (tmp_path / "engine").exists()
