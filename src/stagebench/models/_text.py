"""Tokenizers behind two calls, `encode` and `decode`: transformers' own, or a bare sentencepiece file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from stagebench.errors import ModelError
from stagebench.files import bounded_text

__all__ = ["FastCodec", "SentencePieceCodec", "TextCodec", "load_codec", "load_tokenizer", "read_json"]

MAX_JSON_BYTES = 256 << 20
"""Of a checkpoint's JSON files; the largest tokenizers take tens of MiB."""


class TextCodec(Protocol):
    """What adapters need of a tokenizer."""

    pad_id: int
    eos_ids: tuple[int, ...]

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of `text`; with `special`, as the model wants a prompt to begin (one BOS for Llama families)."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""

    def id_of(self, token: str) -> int | None:
        """Id of one token's text, or None when the vocabulary has none."""

    def digest(self) -> str:
        """Equal for tokenizers that map the same ids to the same pieces."""


class FastCodec:
    """A transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        eos = tokenizer.eos_token_id
        self.eos_ids: tuple[int, ...] = () if eos is None else (int(eos),)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.unk_token_id
        self.pad_id = int(pad if pad is not None else (self.eos_ids or (0,))[0])

    def encode(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def id_of(self, token: str) -> int | None:
        found = self.tokenizer.get_vocab().get(token)
        return None if found is None else int(found)

    def digest(self) -> str:
        return _digest(self.tokenizer.get_vocab())


class SentencePieceCodec:
    """A `tokenizer.model` with added tokens, as transformers' slow (legacy) Llama tokenizer reads it.

    Used where a checkpoint has no `tokenizer.json`: transformers would need protobuf to convert the file, and its converted tokenizer cuts
    text behind an added token differently from the one that the checkpoint was trained with. Each stretch between added tokens is encoded
    by sentencepiece alone, which puts its word-begin mark in front.
    """

    def __init__(self, model: Path, added: dict[str, int]) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._pieces = SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{model}: not a sentencepiece model: {error}. Fetch the checkpoint's tokenizer.model again.") from error
        self.bos_id = int(self._pieces.bos_id())
        self.eos_ids: tuple[int, ...] = (int(self._pieces.eos_id()),)
        self.pad_id = max(int(self._pieces.pad_id()), 0)  # -1 stands for "none": Llama pads with 0
        self._added = added
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if added else None

    def encode(self, text: str, *, special: bool) -> list[int]:
        ids = [self.bos_id] if special else []
        for part in self._split.split(text) if self._split else [text]:
            if part in self._added:
                ids.append(self._added[part])
            elif part:
                ids.extend(self._pieces.encode(part))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        special = {*self._added.values(), self.bos_id, *self.eos_ids}
        return str(self._pieces.decode([int(i) for i in ids if int(i) not in special and 0 <= int(i) < self._pieces.get_piece_size()]))

    def id_of(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        found = int(self._pieces.piece_to_id(token))
        return None if found == self._pieces.unk_id() and token != self._pieces.id_to_piece(found) else found

    def digest(self) -> str:
        return _digest({self._pieces.id_to_piece(i): i for i in range(self._pieces.get_piece_size())} | self._added)


def load_codec(folder: Path) -> TextCodec:
    """The tokenizer of a checkpoint folder. Raises ModelError naming the file that is missing."""
    config = read_json(folder / "tokenizer_config.json")
    model = folder / "tokenizer.model"
    if model.is_file() and not (folder / "tokenizer.json").is_file() and config.get("legacy", True):
        added = {str(text): int(i) for text, i in read_json(folder / "added_tokens.json").items()}
        added |= {entry["content"]: int(i) for i, entry in config.get("added_tokens_decoder", {}).items()}
        return SentencePieceCodec(model, added)
    return FastCodec(load_tokenizer(folder))


def load_tokenizer(folder: Path) -> Any:
    """transformers' own tokenizer of a checkpoint folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here; all mean that the files do not make a tokenizer
        raise ModelError(
            f"{folder}: no tokenizer could be built: {error}. Put tokenizer.json (or a legacy tokenizer.model) into the folder."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty when there is no such file, or no object in it. Raises ModelError for bytes that are no JSON."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(bounded_text(path, MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}. Fetch the checkpoint again.") from error
    return found if isinstance(found, dict) else {}


def _digest(vocabulary: dict[str, int]) -> str:
    text = json.dumps(sorted(vocabulary.items(), key=lambda item: item[1]), ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
