"""The bundled model converted: the same files back, and the same text from both forms."""

from pathlib import Path

import pytest

from checkpoints.convert import convert
from checkpoints.export import export
from glm_jax.engine.request import Request, SamplingParams
from serving.model_engine import build_engine
from serving.start import Start
from serving.tokenizer import ModelTokenizer
from tests.checkpoints.kill_convert import digest
from tests.serving.test_model_engine import NANO, PROMPTS, answers, options


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nano") / "c"
    convert(NANO, directory, 8, progress=False)
    return directory


def test_the_round_trip_gives_the_same_files(converted: Path, tmp_path: Path) -> None:
    export(converted, tmp_path / "back", progress=False)
    assert digest(tmp_path / "back") == digest(NANO)


@pytest.mark.slow
def test_greedy_text_is_equal_from_both_forms_and_phases_are_told(converted: Path) -> None:
    tokenizer = ModelTokenizer.from_directory(converted)
    requests = [
        Request(
            id=str(index),
            prompt=tuple(tokenizer.encode(f"[gMASK]<sop><|user|>{text}<|assistant|></think>")),
            sampling=SamplingParams(max_new_tokens=16, temperature=0.0),
        )
        for index, text in enumerate(PROMPTS[:6])
    ]
    few = {"max_concurrency": 6, "max_seq_len": 128, "max_prompt_tokens": 64, "max_new_tokens": 16}
    told: list[str] = []
    forms: list[object] = []
    texts = []
    for directory in (NANO, converted):
        start = Start(lambda phase, seconds: told.append(phase))
        engine = build_engine(options(model_dir=directory, **few), tokenizer, start)
        texts.append(answers(engine, requests))
        forms.append(start.facts["model"].values["form"])
    assert forms == ["as published", "converted"]
    assert texts[0] == texts[1]
    assert len(set(map(tuple, texts[0].values()))) > 3
    assert sorted(told) == sorted(["weights", "compile", "warm_up", "total"] * 2)
