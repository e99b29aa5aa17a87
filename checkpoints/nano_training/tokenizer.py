"""Trains nano's byte-level BPE tokenizer on its own data and writes it in the published layout.

Knows GLM's special tokens and in which order they follow the learned vocabulary.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import AddedToken as Added
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from checkpoints.nano_training.data import conversations
from checkpoints.nano_training.rendering import NANO_DIRECTORY, render
from checkpoints.nano_training.tool_catalog import FAMILIES
from checkpoints.nano_training.tool_names import telling_names

VOCABULARY_SIZE = 2000
SEED = 0
NUM_CONVERSATIONS = 20_000

# The added tokens of GLM-4.5 to 4.7 in their order of ids; the real ones start at 151329.
SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>",
    "<|begin_of_video|>", "<|end_of_video|>", "<|begin_of_audio|>", "<|end_of_audio|>",
    "<|begin_of_transcription|>", "<|end_of_transcription|>", "<|code_prefix|>", "<|code_middle|>",
    "<|code_suffix|>",
)  # fmt: skip
# Part of what the model says, so decoding keeps them.
TAGS: tuple[str, ...] = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink", "<|begin_of_box|>",
    "<|end_of_box|>",
)  # fmt: skip
MEDIA_TOKENS: tuple[str, ...] = ("<|image|>", "<|video|>")

# Digits stand alone, and a sign between two takes its spaces, which arithmetic needs. A word takes the space before it only when it starts
# in lower case: names are then the same tokens in a question, in an argument and in JSON.
_PIECES = (
    r""" [-+*/=] |"""
    r"""(?:'s|'t|'re|'ve|'m|'ll|'d)"""
    r"""|\p{Lu}\p{L}*|[ _]?[\p{Ll}\p{Lt}\p{Lm}\p{Lo}]\p{L}*|\p{N}"""
    r"""| ?["{}\[\]:,]+(?: ["{}\[\]:,]+)*[\r\n]*"""
    r"""| ?[^\s\p{L}\p{N}"{}\[\]:,]+[\r\n]*|\s*[\r\n]+|\s+"""
)


def train_tokenizer() -> Tokenizer:
    """The tokenizer, the same on every machine: learned entries first, then GLM's tokens."""
    added = [
        *(Added(token, special=True, normalized=False) for token in SPECIAL_TOKENS),
        *(Added(token, special=False, normalized=False) for token in TAGS),
        *(Added(token, special=False, normalized=False) for token in MEDIA_TOKENS),
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tags = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + TAGS)))
    texts = (
        piece
        for each in conversations(SEED, NUM_CONVERSATIONS)
        for piece in tags.split(render(each))
    )
    # So often that each word of a tool's name is one token: a name is chosen by its words.
    names = [name for family in FAMILIES for name in telling_names(family, unseen=False)]
    tokenizer.train_from_iterator([*texts, *names * 300], trainer)
    if tokenizer.get_vocab_size() != VOCABULARY_SIZE:
        raise ValueError(
            f"the data yields {tokenizer.get_vocab_size()} tokens, not {VOCABULARY_SIZE}: "
            "it is too uniform for this vocabulary"
        )
    tokenizer.add_tokens(added)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(directory / "tokenizer.json"))
    decoder = {
        str(id): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    config = {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "extra_special_tokens": {},
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_tokenizer(train_tokenizer(), NANO_DIRECTORY)
