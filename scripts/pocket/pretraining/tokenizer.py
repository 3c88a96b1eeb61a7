"""A CLIPTokenizer of the pocket's own: byte-level BPE of the captions' words, so that any text has tokens."""

import json
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from prefopt.pocket.world import PHRASINGS, caption, train_scenes

_START, _END, _SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"
_MAX_LENGTH = 32


def make_tokenizer() -> CLIPTokenizer:
    """Every byte, every byte that ends a word, the merges of the training captions, two special tokens."""
    texts = [caption(scene, phrasing) for scene in train_scenes() for phrasing in range(PHRASINGS)]
    learner = Tokenizer(models.BPE(end_of_word_suffix=_SUFFIX))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1000, end_of_word_suffix=_SUFFIX, show_progress=False)
    )
    merges = _merges(learner)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        *alphabet,
        *(letter + _SUFFIX for letter in alphabet),
        *(a + b for a, b in merges),
        _START,
        _END,
    ]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=_MAX_LENGTH)


def _merges(learner: Tokenizer) -> list[Any]:
    return [(a, b) for a, b in json.loads(learner.to_str())["model"]["merges"]]
