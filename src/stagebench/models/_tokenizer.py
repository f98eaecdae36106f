"""Tokenizers for random-weight presets, built in code: no hub, no data file, the same on every machine.

What matters for timing is how many tokens a prompt has. The real tokenizers are not at hand without a download, so a preset's tokenizer is
made to give the published number for the standard query: 598 for LLaVA-1.5 (576 visual + 22), 2078 for Video-LLaVA (2056 + 22), 642 for
EventGPT (582 + 60). How:

* The pieces are found by longest match from the left over the byte-level text, so a vocabulary alone decides where a text is cut.
* Words of common queries are one piece each: the standard query has 9 (8 words and the question mark), as with Llama's tokenizer.
* A template's own text is cut where `TEMPLATES` says. Its pieces are in the vocabulary, and nothing longer that would match there is.
* The rest of the vocabulary, up to the real size, is pronounceable syllables: an unknown word costs a token for about four letters,
  and random ids decode to something that can be read.

Every byte is a piece too, so any text can be tokenized and any ids can be decoded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

__all__ = ["STANDARD_QUERY", "TEMPLATES", "build_tokenizer"]

STANDARD_QUERY = "What are the key elements in this scene?"

TEMPLATES: dict[str, tuple[str, ...]] = {
    # BOS + 12 + query 9 = 22
    "llava": ("USER:", " ", "\n", "This image shows", " 8", " video frames", " arranged in", " a grid", ".", "\n", "ASSISTANT", ":"),
    # BOS + 12 + query 9 = 22
    "video_llava": ("US", "ER", ":", " ", "\n", " A", "SS", "I", "ST", "AN", "T", ":"),
    # BOS + 50 + query 9 = 60; <ev_start> and <ev_end> are tokens of their own and two of the 50
    "eventgpt": (
        *(
            "A",
            " chat",
            " bet",
            "ween",
            " a",
            " cur",
            "ious",
            " human",
            " and",
            " an",
            " artific",
            "ial",
            " intellig",
            "ence",
            " assistant",
            ".",
        ),
        *(
            " The",
            " assistant",
            " giv",
            "es",
            " help",
            "ful",
            ",",
            " detail",
            "ed",
            ",",
            " and",
            " pol",
            "ite",
            " answer",
            "s",
            " to",
            " the",
        ),
        *(" human", "'s", " question", "s", ".", " US", "ER", ":", " ", "\n", " A", "SS", "IST", "ANT", ":"),
    ),
    "qwen": ("system", "user", "assistant", "\n", "You", " are", " a", " helpful", "."),
}
"""Pieces of each template's text, in order. The llava template has multi-word pieces because 598 was published for the short prompt."""

_WORDS = tuple(
    """
    a about after all along an and any are around as at away be before behind being between bicycle bike both bridge building bus by
    camera can car cars change changes city clear close cross crossing cyclist danger day describe detail did direction do does
    driving each edge elements event events far fast feature few first for frame frames from front give going green ground happening
    has have highway how if image in intersection into is it its key know lane lanes left light lights like line lines look main
    many more motion motorcycle move moving near next no not object objects of off on one only or other out over parked pass passing
    pedestrian pedestrians people person place position present question red right road roads scene see seen shadow short show shows
    side sign signs six slow so some sort speed static stop street summary that the their them there these they thing things this
    time to traffic tree trees truck trucks tunnel turn turning two type under up using van vehicle vehicles very video view visible
    was way weather were what when where which while white who why will with within would you your
    """.split()  # noqa: SIM905 - a list literal of 190 words is a page
)

_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"


@lru_cache(maxsize=8)
def build_tokenizer(
    template: str, size: int, specials: tuple[tuple[str, int], ...], bos: str | None, eos: str, pad: str, unk: str | None = None
) -> Any:
    """A `PreTrainedTokenizerFast` with `size` ids below the added ones.

    specials: (text, id) of special tokens, ids below `size` or following on from it.
    bos: put in front of each text when special tokens are asked for; None for families that have none.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = _vocabulary(TEMPLATES[template], size, dict(specials))
    core = Tokenizer(
        models.WordPiece(vocab=vocabulary, unk_token=unk or eos, continuing_subword_prefix="", max_input_chars_per_word=1_000_000)
    )
    # no regular expression: a text between special tokens is one word, cut by longest match alone
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, normalized=False, special=True) for text, _ in sorted(specials, key=lambda s: s[1])])
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _vocabulary(template: Sequence[str], size: int, specials: dict[str, int]) -> dict[str, int]:
    """piece -> id: specials at their ids, then bytes, template pieces, words, syllables, until every id below `size` has a piece."""
    taken = set(specials.values())
    free = [i for i in range(size) if i not in taken]
    text = "".join(template)
    starts = list(itertools.accumulate((len(piece) for piece in template), initial=0))
    cuts = list(itertools.pairwise(starts))

    def overruns(piece: str) -> bool:
        """Whether longest match would take this piece across a cut of the template."""
        return piece in text and any(text.startswith(piece, begin) and begin + len(piece) > end for begin, end in cuts)

    words = [f"{space}{word}" for w in _WORDS for word in (w, w.capitalize()) for space in ("", " ")]
    kept = (piece for piece in itertools.chain(words, _syllables()) if not overruns(piece))
    pieces = dict.fromkeys(itertools.chain(_BYTES.values(), map(_visible, template), map(_visible, kept)))
    # zip ends with the ids: far more syllables are on offer than are taken
    return specials | dict(zip((p for p in pieces if p not in specials), free, strict=False))


def _syllables() -> Iterator[str]:
    """'ba', 'ab', 'st', 'bas', 'baca' and each behind a space: pronounceable, in a fixed order, more than a vocabulary needs."""
    open_, closed = [c + v for c in _CONSONANTS for v in _VOWELS], [v + c for v in _VOWELS for c in _CONSONANTS]
    clusters = [a + b for a in _CONSONANTS for b in _CONSONANTS]
    three = [a + b for a in open_ for b in _CONSONANTS]
    four = [a + b for a in open_ for b in open_]
    for group in (open_, closed, clusters, three, _strided(four)):
        for piece in group:
            yield from (f" {piece}", piece)
    for piece in _strided([a + b for a in four for b in _CONSONANTS]):
        yield f" {piece}"


def _strided(pieces: list[str]) -> list[str]:
    """The same pieces in a fixed but mixed order, so that a part of them does not all begin with the same letter."""
    step = 7919  # a prime that divides none of the lengths here
    return [pieces[i * step % len(pieces)] for i in range(len(pieces))]


def _byte_table() -> dict[int, str]:
    """Byte -> printable character, as the byte-level pre-tokenizer of `tokenizers` writes it: printable Latin-1 stays, others move."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = iter(range(0x100, 0x200))
    return {byte: chr(byte) if byte in printable else chr(next(moved)) for byte in range(256)}


_BYTES = _byte_table()


def _visible(text: str) -> str:
    return "".join(_BYTES[byte] for byte in text.encode())
