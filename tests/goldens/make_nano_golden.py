"""What torch and transformers answer with checkpoints/nano; not part of the test run.

    /tmp/peer/bin/pip install compressed-tensors==0.20.0  # beside what make_goldens needs
    /tmp/peer/bin/python -m tests.goldens.make_nano_golden

Run from the repository's root, on a CPU. Writes tests/goldens/nano_answers.json.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.goldens.nano_prompts import PROMPTS

NANO = Path("checkpoints/nano")
MAX_NEW_TOKENS = 80


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: dict[str, Any]) -> dict[str, Any]:
    """The greedy answer, and how far its least certain token was ahead of the runner-up."""
    conversation = {**prompt, "tools": prompt["tools"] or None}
    messages = conversation.pop("messages")
    ids = tokenizer.apply_chat_template(
        messages, **conversation, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, ids.shape[1] :].tolist()
    best = torch.stack(out.logits)[:, 0].float().topk(2).values
    return {
        "prompt": ids[0].tolist(),
        "answer": tokens,
        "text": tokenizer.decode(tokens),
        "least_lead": round(float((best[:, 0] - best[:, 1]).min()), 3),
    }


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    # No dtype and no quantization argument: as config.json says, through compressed-tensors.
    model = AutoModelForCausalLM.from_pretrained(NANO).eval()
    answers = [answer(model, tokenizer, prompt) for prompt in PROMPTS]
    weights = (NANO / "model-00001-of-00001.safetensors").read_bytes()
    golden = {"weights_sha256": hashlib.sha256(weights).hexdigest(), "answers": answers}
    path = Path(__file__).with_name("nano_answers.json")
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for each in answers:
        print(f"{each['least_lead']:8.3f}  {each['text']!r}")


if __name__ == "__main__":
    main()
