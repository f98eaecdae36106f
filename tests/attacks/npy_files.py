"""Hostile `.npy` and `.npz` files. `ATTACKS` maps a name to (bytes, words that the refusal must hold)."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

CANARY = Path("/tmp/stagebench-canary-of-the-attack-tests")


def npy(stream: bytes, descr: str = "'|O'", shape: str = "()", version: int = 1) -> bytes:
    """An `.npy` file with this content behind an honest header."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = header.ljust(117) + b"\n"
    size = struct.pack("<H", len(header)) if version == 1 else struct.pack("<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + stream


def columns(n: int = 100) -> dict:
    """A good event dict."""
    return {
        "p": (np.arange(n) % 2).astype(np.uint8),
        "t": np.arange(n, dtype=np.int64) + 51_835_949_776,
        "x": np.arange(n, dtype=np.uint16),
        "y": np.arange(n, dtype=np.uint16),
    }


def pickled(value: object, protocol: int = 4) -> bytes:
    """As np.save writes it: the pickle of a 0-d object array."""
    array = np.empty((), dtype=object)
    array[()] = value
    return npy(pickle.dumps(array, protocol=protocol))


class _Touch:
    """Unpickled by Python, this would make the canary."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (CANARY,))


class _Eval:
    def __reduce__(self) -> tuple:
        return (eval, (f"open({str(CANARY)!r}, 'w')",))


def around(inner: bytes) -> bytes:
    """The stream of a 0-d object array whose only object is made by these opcodes (protocol 2)."""
    good = pickle.dumps(np.array({}, dtype=object), protocol=2)
    begin = good.index(b"]q") + 3  # the list of objects, memoized
    return npy(good[:begin] + inner + b"atb.")


def in_dict(value: bytes) -> bytes:
    """The same, with a dict {"x": value made by these opcodes}."""
    return around(b"}U\x01x" + value + b"s")


def _reconstruct(state: bytes) -> bytes:
    return b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R" + state + b"b"


_DTYPE = b"cnumpy\ndtype\nU\x02u2\x89\x88\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def _array(shape: bytes, content: bytes, dtype: bytes = _DTYPE) -> bytes:
    return _reconstruct(b"(K\x01" + shape + dtype + b"\x89" + content + b"t")


def _npz(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _plain(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _twice() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", _plain(np.zeros(3, np.uint16)))
        archive.writestr("y.npy", _plain(np.ones(3, np.uint16)))
    return buffer.getvalue().replace(b"y.npy", b"x.npy")


def _encrypted() -> bytes:
    data = bytearray(_npz({"x.npy": _plain(np.zeros(3, np.uint16))}))
    central = data.index(b"PK\x01\x02")
    data[6] |= 1
    data[central + 8] |= 1
    return bytes(data)


def _laughs(depth: int) -> bytes:
    """A tuple of two tuples of two tuples ...: short in the file, 2**depth items when printed or hashed."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))


def _many_encodes() -> bytes:
    """One text of 1 MB, made into bytes 200 times over."""
    text = b"X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000 + b"q\x63"
    again = b"c_codecs\nencode\nh\x63X\x06\x00\x00\x00latin1\x86R"
    return around(b"}" + text + b"0" + b"(" + again * 200 + b"t")


_matrix = np.zeros((2, 2), np.uint16).view(np.recarray)

ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    **{f"code_protocol_{p}": (lambda p=p: pickled(_Touch(), p), "the callable ") for p in range(6)},
    **{f"code_in_a_value_protocol_{p}": (lambda p=p: pickled({**columns(), "x": _Touch()}, p), "the callable ") for p in range(6)},
    "code_by_eval": (lambda: pickled(_Eval()), "callable builtins.eval"),
    "code_without_array": (lambda: npy(pickle.dumps(_Touch())), "callable"),
    "code_by_inst": (lambda: npy(f"(S'touch {CANARY}'\nios\nsystem\n.".encode()), "opcode 'i'"),
    "code_by_obj": (lambda: npy(f"(cos\nsystem\nS'touch {CANARY}'\no.".encode()), "callable os.system"),
    "code_by_newobj": (lambda: around(b"cnumpy\ndtype\n)\x81"), "opcode"),
    "code_by_dotted_name": (lambda: around(b"\x8c\x05numpy\x8c\x0ef2py.os.system\x93"), "callable numpy.f2py"),
    "numpy_fromfile": (lambda: around(b"cnumpy._core.multiarray\nfromfile\n"), "callable numpy._core.multiarray.fromfile"),
    "persistent_id": (lambda: around(b"Pfile\n"), "opcode 'P'"),
    "persistent_id_binary": (lambda: around(b"U\x04fileQ"), "opcode 'Q'"),
    "extension_code": (lambda: around(b"\x82\x01"), "opcode"),
    "next_buffer": (lambda: in_dict(b"\x97"), "opcode"),
    "name_made_of_numbers": (lambda: around(b"K\x01K\x02\x93"), "named by something that is no text"),
    "call_of_a_number": (lambda: around(b"K\x01)R"), "no named callable"),
    "call_of_ndarray": (lambda: in_dict(b"cnumpy\nndarray\nJ\x00\x00\x00\x40\x85\x85R"), "direct call of numpy.ndarray"),
    "bytes_of_a_number": (lambda: in_dict(b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R"), "bytes made from"),
    "other_encoding": (lambda: in_dict(b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R"), "encoding"),
    "object_array_in_dict": (lambda: pickled({**columns(), "x": np.array([1, "a", None], dtype=object)}), "list of several values"),
    "object_array_of_one": (lambda: pickled({"x": np.array([1], dtype=object)}), "x: of type object array"),
    "object_array_of_arrays": (lambda: pickled({"x": np.array([np.zeros(2), np.zeros(3)], dtype=object)}), "list of several values"),
    "object_array_1d": (lambda: npy(pickle.dumps(np.array([{}], dtype=object)), shape="(1,)"), "object array of shape"),
    "array_of_another_class": (
        lambda: in_dict(b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87R"),
        "a subclass of ndarray",
    ),
    "pointers_as_objects": (
        lambda: in_dict(
            b"cnumpy._core.numeric\n_frombuffer\n(U\x08" + b"\x41" * 8 + b"cnumpy\ndtype\nU\x02O8\x89\x88\x87RK\x01\x85X\x01\x00\x00\x00CtR"
        ),
        "an array of objects inside the dict",
    ),
    "array_subclass": (lambda: pickled({**columns(), "x": _matrix}), "callable numpy"),
    "masked_array": (lambda: pickled({**columns(), "x": np.ma.zeros(3)}), "callable numpy.ma"),
    "fields": (lambda: pickled({**columns(), "x": np.zeros(3, [("a", "<u2")])}), "dtype 'V2'"),
    "dtype_metadata": (lambda: pickled({**columns(), "x": np.zeros(3, np.dtype("u2", metadata={"a": 1}))}), "metadata"),
    "datetime": (lambda: pickled({**columns(), "x": np.zeros(3, "M8[us]")}), "dtype 'M8'"),
    "complex": (lambda: pickled({**columns(), "x": np.zeros(3, complex)}), "dtype 'c16'"),
    "text_array": (lambda: pickled({**columns(), "x": np.array(["a"])}), "dtype 'U1'"),
    "nested_dict": (lambda: pickled({**columns(), "more": {"x": 1}}), "of type dict"),
    "nested_list": (lambda: pickled({**columns(), "x": [1]}), "of type list"),
    "long_list": (lambda: pickled({**columns(), "x": [1, 2, 3]}), "list of several values"),
    "text_value": (lambda: pickled({**columns(), "name": "clip"}), "of type str"),
    "none_value": (lambda: pickled({**columns(), "x": None}), "of type nonetype"),
    "huge_integer": (lambda: pickled({**columns(), "n": 2**100}), "64 bits"),
    "no_dict": (lambda: pickled(1.5), "holds a float"),
    "plain_pickle_of_dict": (lambda: npy(pickle.dumps({"x": 1})), "0-d object array was expected"),
    "dict_that_holds_itself": (lambda: around(b"}q\x63U\x01xh\x63s"), "of type dict"),
    "list_that_holds_itself": (lambda: around(b"]q\x63h\x63a"), "objects inside an object array"),
    "key_twice": (lambda: around(b"}U\x01xK\x01sU\x01xK\x02s"), "twice"),
    "key_of_tuples": (lambda: around(b"}" + _laughs(60) + b"K\x01s"), "dict key"),
    "key_too_long": (lambda: pickled({"k" * 100: np.zeros(1)}), "dict key"),
    "too_many_keys": (lambda: pickled({f"k{i}": np.zeros(1) for i in range(40)}), "40 keys"),
    "shape_of_tuples": (lambda: in_dict(_array(_laughs(60), b"U\x02ab")), "array shape"),
    "shape_negative": (lambda: in_dict(_array(b"J\xff\xff\xff\xff\x85", b"U\x02ab")), "array shape"),
    "shape_beyond_content": (lambda: in_dict(_array(b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85", b"U\x02ab")), "holds 2"),
    "shape_product_runs_over": (lambda: in_dict(_array(b"\x8a\x06\x00\x00\x00\x00\x00\x01q\x60h\x60h\x60\x87", b"U\x02ab")), "holds 2"),
    "shape_of_20_dimensions": (lambda: in_dict(_array(b"(" + b"K\x01" * 20 + b"t", b"U\x02ab")), "array shape"),
    "content_of_a_number": (lambda: in_dict(_array(b"K\x01\x85", b"K\x05")), "content is a int"),
    "content_missing": (lambda: in_dict(_array(b"K\x01\x85", b"N")), "content is a NoneType"),
    "claims_4_exabytes": (lambda: in_dict(b"\x8e" + struct.pack("<Q", 2**62)), "the file holds"),
    "claims_a_4_exabyte_bytearray": (lambda: in_dict(b"\x96" + struct.pack("<Q", 2**62)), "the file holds"),
    "claims_4_gigabytes": (lambda: in_dict(b"B" + struct.pack("<I", 2**32 - 1)), "the file holds"),
    "claims_a_negative_length": (lambda: in_dict(b"T" + struct.pack("<i", -5)), "a value of -5 bytes"),
    "integer_of_a_million_digits": (lambda: in_dict(b"I" + b"9" * 1_000_000 + b"\n"), "characters"),
    "integer_of_3000_digits": (lambda: in_dict(b"L" + b"9" * 3000 + b"L\n"), "digits"),
    "integer_of_a_megabyte": (lambda: in_dict(b"\x8b" + struct.pack("<i", 1_000_000) + b"\x7f" * 1_000_000), "integer of 1,000,000 bytes"),
    "deep_stack": (lambda: around(b"K\x01" * 3000), "values at once"),
    "deep_tuples": (lambda: around(b")" + b"\x85" * 100_000), "opcodes"),
    "endless": (lambda: around(b"K\x010" * 100_000), "opcodes"),
    "same_text_200_times": (_many_encodes, "unfold to more"),
    "memo_never_set": (lambda: around(b"h\x77"), "before it was made"),
    "mark_as_value": (lambda: in_dict(b"(\x85"), "mark"),
    "bytes_after_the_end": (lambda: pickled(columns()) + b"#!/bin/sh\n", "after the pickle's end"),
    "bool_bytes": (lambda: npy(pickle.dumps(np.array({"p": np.ones(4, bool)}, dtype=object)).replace(b"\x01" * 4, b"\x02" * 4)), "0 and 1"),
    "header_64_gib": (lambda: b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{", "a header of"),
    "header_expression": (lambda: npy(b"", shape=f"(open('{CANARY}','w'),)"), "the header"),
    "header_nested": (lambda: npy(b"", shape="(" * 20_000 + ")" * 20_000), "the header"),
    "header_fields": (lambda: npy(b"\x00" * 8, descr="[('x', '<u2')]", shape="(4,)"), "the header"),
    "header_key_twice": (lambda: npy(b"", shape="(), 'shape': ()"), "the header"),
    "version_9": (lambda: npy(b"", version=9), "version 9"),
    "plain_64_gib": (lambda: npy(b"\x00" * 64, descr="'<u8'", shape=f"({2**33},)"), "plain array"),
    "npz_bomb": (lambda: _npz({"x.npy": _plain(np.zeros(100_000_000, np.uint8))}), "at most"),
    "npz_pickled_member": (lambda: _npz({"x.npy": pickled(_Touch())}), "array of objects"),
    "npz_member_claims_64_gib": (lambda: _npz({"x.npy": npy(b"\x00" * 64, descr="'<u8'", shape=f"({2**33},)")}), "holds 64"),
    "npz_name_climbs": (lambda: _npz({"../x.npy": _plain(np.zeros(3))}), "a member named"),
    "npz_other_file": (lambda: _npz({"x.py": b"print()"}), "a member named"),
    "npz_many_members": (lambda: _npz({f"x{i}.npy": b"" for i in range(100)}), "100 members"),
    "npz_member_twice": (_twice, "twice"),
    "npz_encrypted": (_encrypted, "encrypted"),
    "npz_lzma": (lambda: _npz({"x.npy": _plain(np.zeros(3))}, zipfile.ZIP_LZMA), "another method"),
}

GARBLED: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "garbage": lambda: b"not an event file at all" * 20,
    "magic_only": lambda: b"\x93NUMPY",
    "header_cut": lambda: pickled(columns())[:60],
    "pickle_cut": lambda: pickled(columns())[:-700],
    "pickle_empty": lambda: npy(b""),
    "npz_cut": lambda: _npz({"x.npy": _plain(np.zeros(300))})[:-40],
    "npz_bit_rot": lambda: _npz({"x.npy": _plain(np.arange(3000))}, zipfile.ZIP_STORED).replace(b"\x07\x00", b"\x08\x00", 1),
    "empty_dict": lambda: pickled({}),
}
