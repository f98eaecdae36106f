"""Whether an H.264 picture empties the decoder by memory_management_control_operation 5: the next one is numbered 1, whatever came before.

The operation stands near the end of a slice's header, so all before it is read (ITU-T H.264, 7.3.2.2, 7.3.3 and 7.3.3.1 to 7.3.3.3).
"""

from __future__ import annotations

from typing import NamedTuple

from stagebench.sources._bits import Bits

__all__ = ["Parameters", "empties", "parameters"]

_P, _B, _SP = 0, 1, 3
_EMPTIES, _OF_TWO = 5, 3


class Parameters(NamedTuple):
    """What of a picture parameter set says how a slice's header is laid out."""

    bottom: bool
    """Behind the picture order count stands the bottom field's."""
    references: tuple[int, int]
    """Pictures of each list, where a slice does not say otherwise."""
    weighted: bool
    weighted_b: bool
    redundant: bool
    """Slices say which redundant copy they are."""


def parameters(bits: Bits) -> tuple[int, Parameters | None]:
    """Of a picture parameter set behind its first byte: its number, and what it says; None with slice groups."""
    number = bits.golomb()
    bits.golomb()
    bits.take(1)
    bottom = bits.take(1)
    if bits.golomb():  # num_slice_groups_minus1
        return number, None
    references = bits.golomb() + 1, bits.golomb() + 1
    weighted, weighted_b = bits.take(1), bits.take(2)
    for _ in range(3):
        bits.golomb()
    bits.take(2)
    return number, Parameters(bool(bottom), references, bool(weighted), weighted_b == 1, bool(bits.take(1)))


def empties(bits: Bits, said: Parameters, *, number: int, order: int, chroma: bool) -> bool:
    """Whether a slice says so; `bits` stands behind its first_mb_in_slice.

    Of a picture that others refer to and that is no IDR picture; `number` and `order` are the bits of frame_num (with colour_plane_id
    before it) and of the picture order count, 0 for none.
    """
    kind = bits.golomb() % 5
    bits.golomb()
    bits.take(number + order)
    if order and said.bottom:
        bits.golomb()
    if said.redundant:
        bits.golomb()
    references = list(said.references)
    if kind == _B:
        bits.take(1)
    lists = {_P: 1, _SP: 1, _B: 2}.get(kind, 0)
    if lists and bits.take(1):  # num_ref_idx_active_override_flag
        references[:lists] = [bits.golomb() + 1 for _ in range(lists)]
    for _ in range(lists):
        if bits.take(1):  # ref_pic_list_modification_flag
            while bits.golomb() != 3:
                bits.golomb()
    if said.weighted_b if kind == _B else said.weighted and lists:
        _pass_weights(bits, references[:lists], chroma)
    if not bits.take(1):  # adaptive_ref_pic_marking_mode_flag
        return False
    while operation := bits.golomb():
        if operation == _EMPTIES:
            return True
        for _ in range(1 + (operation == _OF_TWO)):
            bits.golomb()
    return False


def _pass_weights(bits: Bits, references: list[int], chroma: bool) -> None:
    for _ in range(1 + chroma):
        bits.golomb()
    for count in references:
        for _ in range(count):
            for numbers in (2, 4)[: 1 + chroma]:
                for _ in range(numbers * bits.take(1)):
                    bits.golomb()
