"""The bundled model from Python: batches, streams, conversations, and a look inside."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_jax.engine.request import SamplingParams
from serving.llm import LLM

NANO = Path(__file__).parents[2] / "checkpoints" / "nano"
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)
DRAWN = SamplingParams(max_new_tokens=12, temperature=1.0, seed=5, num_logprobs=2)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(NANO, max_concurrency=4, max_seq_len=256, max_batch_tokens=64) as llm:
        yield llm


def test_a_batch_gives_what_each_prompt_gives_alone(llm: LLM):
    prompts = ["Hello there", "What is 7 + 5?", [1, 2, 3], "a", "Name a river", "Oslo is"]
    together = llm.generate(prompts, DRAWN)
    for prompt, completion in zip(prompts, together, strict=True):
        [alone] = llm.generate(prompt, DRAWN)
        assert (alone.tokens, alone.logprobs) == (completion.tokens, completion.logprobs)
        assert alone.text == completion.text


def test_a_stream_is_the_completion_token_by_token(llm: LLM):
    [whole] = llm.generate("Count from 3 to 8.", DRAWN)
    tokens = list(llm.stream("Count from 3 to 8.", DRAWN))
    assert [token.token for token in tokens] == whole.tokens
    assert "".join(token.text for token in tokens) == whole.text
    assert [token.finish_reason is None for token in tokens[:-1]] == [True] * (len(tokens) - 1)
    assert tokens[-1].finish_reason == whole.finish_reason
    assert all(len(token.top_logprobs) == 2 for token in tokens)


def test_a_stream_left_early_frees_the_engine(llm: LLM):
    for _ in llm.stream("Hello", SamplingParams(max_new_tokens=200), ignore_eos=True):
        break
    [after] = llm.generate("Hello", GREEDY)
    assert after.tokens
    assert llm.engine.stats().num_running == 0


def test_a_stop_string_ends_the_text_before_it(llm: LLM):
    [free] = llm.generate("Count from 3 to 8.", GREEDY, ignore_eos=True)
    stop = free.text[3:6]
    [cut] = llm.generate("Count from 3 to 8.", GREEDY, stop=[stop], ignore_eos=True)
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.tokens == free.tokens[: len(cut.tokens)]


def test_a_chat_is_rendered_and_taken_apart(llm: LLM):
    long = SamplingParams(max_new_tokens=120, temperature=0.0)
    one, other = llm.chat([QUESTION, [{"role": "user", "content": "Hello!"}]], long)
    [alone] = llm.chat(QUESTION, long)
    assert (one.tokens, one.content, one.reasoning) == (
        alone.tokens,
        alone.content,
        alone.reasoning,
    )
    assert one.prompt == llm.render(QUESTION).tokens and one.prompt != other.prompt
    assert one.content.strip() in one.text and one.reasoning.strip() in one.text
    assert one.content or one.reasoning
    [quick] = llm.chat(QUESTION, long, reasoning_effort="none")
    assert quick.reasoning == "" and quick.content


def test_the_same_prompt_again_is_found_in_the_cache(llm: LLM):
    prompt = list(range(100, 200))
    first, second = (llm.generate(prompt, DRAWN)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 64)
    assert (first.tokens, first.logprobs) == (second.tokens, second.logprobs)


def test_a_prompt_is_as_likely_as_the_answer_that_it_was(llm: LLM):
    [made] = llm.generate("What is 7 + 5?", replace(GREEDY, num_logprobs=3), ignore_eos=True)
    whole = [*made.prompt, *made.tokens]
    [read] = llm.generate([whole], replace(GREEDY, num_prompt_logprobs=3))
    assert [each.token for each in read.prompt_logprobs] == whole[1:]
    told = read.prompt_logprobs[len(made.prompt) - 1 :]
    np.testing.assert_allclose([each.logprob for each in told], made.logprobs, atol=1e-5)
    assert [each.rank for each in told] == [1] * len(made.tokens)
    assert [each.top[0][0] for each in told] == made.tokens
    # The whole pass rounds differently, but not by much.
    logits = llm.forward(whole).logits[:-1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    whole_pass = np.take_along_axis(logprobs, np.array(whole[1:])[:, None], axis=1)[:, 0]
    gaps = np.abs(whole_pass - [each.logprob for each in read.prompt_logprobs])
    assert np.median(gaps) < 0.02 and gaps.max() < 0.5


def test_what_cannot_fit_is_refused_and_leaves_the_engine_as_it_was(llm: LLM):
    with pytest.raises(ValueError, match="at most 255 fit"):
        llm.generate(["a", [1] * 300], GREEDY)
    assert llm.generate("a", GREEDY)[0].tokens


def test_what_nothing_would_heed_is_refused(llm: LLM):
    with pytest.raises(ValueError, match="temperature is nothing to say of a chat here"):
        llm.chat(QUESTION, temperature=1.0)
    for ask in (llm.generate, llm.forward, lambda prompt: next(llm.stream(prompt))):
        for prompt, words in (("", "at least one token"), ([5, 99999], "in 0 to 2047")):
            with pytest.raises(ValueError, match=words):
                ask(prompt)


def test_a_chat_has_the_form_that_is_asked_for(llm: LLM):
    long = SamplingParams(max_new_tokens=120, temperature=0.0)
    fast: dict[str, Any] = {"reasoning_effort": "none"}
    asked = [QUESTION, [{"role": "user", "content": "Hello!"}]]
    for answer in llm.chat(asked, long, guided_regex="[a-z]{3} [0-9]{2}", **fast):
        assert re.fullmatch("[a-z]{3} [0-9]{2}", answer.content)
    [alone] = llm.chat(QUESTION, long, response_format={"type": "json_object"}, **fast)
    assert alone.content.startswith("{")
    tool = {"type": "function", "function": {"name": "now"}}
    [called] = llm.chat(QUESTION, long, tools=[tool], tool_choice="required", **fast)
    assert [call.name for call in called.calls][:1] == ["now"] and not called.content
    [brief] = llm.chat(QUESTION, long, thinking_token_budget=2)
    assert len(llm.tokenizer.encode(brief.reasoning)) == 2 and brief.content


def test_a_message_that_is_continued_keeps_its_white_space(llm: LLM):
    begun = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    [answer] = llm.chat(begun, GREEDY, reasoning_effort="none", continue_final_message=True)
    assert answer.content.startswith(" Paris")


def test_the_inside_agrees_with_the_outside(llm: LLM):
    prompt = llm.render(QUESTION).tokens
    seen = llm.forward(prompt)
    config = llm.model.config
    num_tokens, num_moe = len(prompt), config.num_moe_layers
    assert seen.logits.shape == (num_tokens, config.vocab_size)
    assert seen.hidden.shape == (config.num_hidden_layers, num_tokens, config.hidden_size)
    assert seen.experts.shape == (num_moe, num_tokens, config.num_experts_per_tok)
    assert seen.weights.shape == seen.experts.shape
    picked = np.take_along_axis(seen.scores, seen.experts, axis=-1)
    shares = picked / picked.sum(-1, keepdims=True) * config.routed_scaling_factor
    np.testing.assert_allclose(seen.weights, shares, rtol=1e-4)
    assert seen.attention.shape[2:] == (num_tokens, num_tokens)
    np.testing.assert_allclose(seen.attention.sum(-1), 1, atol=1e-4)
    # The paged step and the whole pass round differently, but not by much.
    [answer] = llm.generate(prompt, GREEDY)
    logits = seen.logits[-1]
    logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert abs(logprobs[answer.tokens[0]] - answer.logprobs[0]) < 0.05
