"""Tokenizers of whole words, for toy vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simgrad.errors import InputError


def word_tokenizer(
    words: Sequence[str],
    bos: str | None = None,
    eos: str | None = None,
    unk: str | None = None,
    pad: str | None = None,
) -> Any:
    """A ``PreTrainedTokenizerFast`` in which word i has id i and words stand between whitespace.

    Special tokens are words too, and may follow a word without a space ("yes</s>").

    Args:
        words: the vocabulary, in order of ids.
        bos: put before every text, unless ``add_special_tokens=False``.
        eos: end of sequence; never appended to a text.
        unk: stands for all other words; without it they raise an error when a text is encoded.
        pad: fills up batches.

    >>> tokenizer = word_tokenizer(["<s>", "</s>", "yes", "no"], bos="<s>", eos="</s>")
    >>> tokenizer("yes no yes")["input_ids"]
    [0, 2, 3, 2]
    >>> tokenizer.decode([2, 3, 1])
    'yes no </s>'

    Raises:
        InputError: a word is there twice or is not one word; a special token is no word of the
        vocabulary,
            or part of another word.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = _ids(words)
    special = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}
    special = {name: token for name, token in special.items() if token is not None}
    for name, token in special.items():
        if token not in ids:
            raise InputError(f"{name} {token!r} is not among the words")
        if longer := next((word for word in words if token in word and token != word), None):
            raise InputError(
                f"{name} {token!r} is part of the word {longer!r}: texts would be ambiguous"
            )
    core = Tokenizer(
        models.WordLevel(ids, unk_token=unk or "")
    )  # "" is no word: unknown words raise
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos is not None:
        start: Any = {"id": "START", "ids": [ids[bos]], "tokens": [bos]}
        core.post_processor = processors.TemplateProcessing(
            single="START $A", pair="START $A $B", special_tokens=[start]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **special
    )


def _ids(words: Sequence[str]) -> dict[str, int]:
    if isinstance(words, str):
        raise InputError(f"words takes a list of words: {words.split()!r} instead of {words!r}")
    ids: dict[str, int] = {}
    for i, word in enumerate(words):
        if word.split() != [word]:
            raise InputError(
                f"word {i} is {word!r}: words hold at least one character and no whitespace"
            )
        if word in ids:
            raise InputError(f"word {word!r} is there twice, as {ids[word]} and {i}")
        ids[word] = i
    return ids
