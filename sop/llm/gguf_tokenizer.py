"""The tokenizer of a GGUF file."""

from pathlib import Path
from typing import Any

from sop.files.gguf_file import GgufFile
from sop.llm.gguf_layout import GgufFields
from sop.llm.packages import one_line, require

__all__ = ["gguf_tokenizer"]

_CONTROL_TOKEN = 3  # GGUF token type of <|endoftext|> and the like


def gguf_tokenizer(path: Path, file: GgufFile) -> Any:
    """Byte-level BPE tokenizer from the metadata of an open GGUF file.

    Returns
    -------
    tokenizer : tokenizers.Tokenizer
        Encodes and decodes text as llama.cpp does for this file.

    Raises
    ------
    InputError
        If it is of another kind or broken, or the extra ``llm`` is not installed.
    """
    from gguf import GGUFReader

    fields = GgufFields(path, file)
    fields.string("tokenizer.ggml.model", "gpt2")
    fields.string("tokenizer.ggml.pre", "smollm")
    # GgufFile drops arrays. This reader trusts what it reads, but GgufFile has checked the header.
    reader = GGUFReader(path)

    def array(part: str, kind: type) -> list[Any]:
        key = f"tokenizer.ggml.{part}"
        field = reader.get_field(key)
        try:
            values = None if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise fields.error(key, "not UTF-8") from error
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise fields.error(key, f"expected an array of {kind.__name__}")
        return values

    tokens, kinds, merges = array("tokens", str), array("token_type", int), array("merges", str)
    return _byte_level_bpe(fields, tokens, kinds, merges)


def _byte_level_bpe(
    fields: GgufFields, tokens: list[str], token_type: list[int], merges: list[str]
) -> Any:
    tokenizers = require("tokenizers")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise fields.error("tokenizer.ggml.tokens", "a token is there twice")
    if len(token_type) != len(tokens):
        raise fields.error("tokenizer.ggml.token_type", f"not one for each of {len(tokens)} tokens")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # tokenizers raises no narrower class
        raise fields.error("tokenizer.ggml.merges", one_line(error)) from error
    split = tokenizers.pre_tokenizers  # as llama.cpp does for "smollm": every digit for itself
    tokenizer.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, token_type, strict=True) if kind == _CONTROL_TOKEN]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer
