"""Engines behind one question: generate so many tokens for each of these prompts, and say how long it took.

Knows nothing of how they are compared. `against_peers.py` runs one process per engine, each in an
environment that has it, and keeps them idle between rounds:

    python -P tests/perf/peer_engines.py glm-jax|vllm|transformers|transformers-batch MODEL_DIR LENGTH SLOTS

A line of JSON on stdin has the prompts and output_len; the line of JSON that answers has tokens and
seconds. Greedy, no end token heeded, bf16, no prefix cache.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

Prompts = list[list[int]]
# Prompts and tokens for each of them -> tokens generated in all.
Generate = Callable[[Prompts, int], int]

# What must not be closed before the process ends.
_OPEN = ExitStack()


def glm_jax(model_dir: str, length: int, slots: int) -> Generate:
    from serving.bench.decode import built, options_for

    options = options_for(
        Path(model_dir), max_concurrency=slots, length=length, num_gpus=1, load_format="auto"
    )
    bench = _OPEN.enter_context(built(options, {}))
    rounds = iter(range(10**9))

    def generate(prompts: Prompts, output_len: int) -> int:
        found = bench.round(prompts, output_len, f"round-{next(rounds)}")
        return int(found["output_tokens"])

    return generate


def vllm(model_dir: str, length: int, slots: int) -> Generate:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    model = LLM(
        model_dir,
        dtype="bfloat16",
        max_model_len=length,
        max_num_seqs=slots,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )

    def generate(prompts: Prompts, output_len: int) -> int:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False
        )
        asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = model.generate(asked, sampling, use_tqdm=False)
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    return generate


def _transformers_model(model_dir: str, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, **options).eval()
    model.generation_config.eos_token_id = None
    return model


def transformers(model_dir: str, length: int, slots: int) -> Generate:
    import torch

    model = _transformers_model(model_dir)

    def generate(prompts: Prompts, output_len: int) -> int:
        ids = torch.tensor(prompts)
        answers = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output_len,
            min_new_tokens=output_len,
            do_sample=False,
            pad_token_id=0,
        )
        return answers[:, ids.shape[1] :].numel()

    return generate


def transformers_batch(model_dir: str, length: int, slots: int) -> Generate:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _transformers_model(model_dir, attn_implementation="paged|sdpa")
    pages = slots * (-(-length // 256) + 1)
    batching = ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=2048)

    def generate(prompts: Prompts, output_len: int) -> int:
        options = GenerationConfig(
            max_new_tokens=output_len, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        answers = model.generate_batch(
            prompts, options, continuous_batching_config=batching, progress_bar=False
        )
        return sum(len(answer.generated_tokens) for answer in answers.values())

    return generate


ENGINES: dict[str, Callable[[str, int, int], Generate]] = {
    "glm-jax": glm_jax,
    "vllm": vllm,
    "transformers": transformers,
    "transformers-batch": transformers_batch,
}


def main() -> None:
    # Libraries print what they like; answers go where nobody else writes.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, model_dir, length, slots = sys.argv[1:]
    generate = ENGINES[name](model_dir, int(length), int(slots))
    print(json.dumps({"ready": name}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        tokens = generate(asked["prompts"], asked["output_len"])
        seconds = time.perf_counter() - began
        print(json.dumps({"tokens": tokens, "seconds": seconds}), file=answers)
    # Threads of engines would keep the process.
    os._exit(0)


if __name__ == "__main__":
    main()
