"""Picking frames and reading them from folders."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stagebench.errors import CorruptClipError, NoVideoError, RefusedClipError, ShortClipError, SourceError, TooLargeError, UnsafeFileError
from stagebench.sources import frames
from stagebench.sources.frames import choose, natural_key, pick, read_folder, read_images

SAMPLINGS = st.sampled_from(["linspace", "stride"])


@pytest.mark.parametrize(
    ("total", "count", "sampling", "expected"),
    [
        (10, 4, "linspace", [0, 3, 6, 9]),
        (221, 8, "linspace", [0, 31, 62, 94, 125, 157, 188, 220]),
        (221, 8, "stride", [0, 27, 55, 82, 110, 138, 165, 193]),
        (9, 1, "linspace", [4]),
        (10, 1, "linspace", [4]),
        (10, 1, "stride", [0]),
        (1, 1, "linspace", [0]),
        (3, 8, "linspace", [0, 0, 0, 0, 1, 1, 1, 2]),
        (3, 8, "stride", [0, 0, 0, 1, 1, 1, 2, 2]),
        (1, 3, "linspace", [0, 0, 0]),
    ],
)
def test_pick_by_hand(total: int, count: int, sampling: str, expected: list[int]) -> None:
    assert pick(total, count, sampling) == expected


@given(st.integers(1, 10**12), st.integers(1, 300), SAMPLINGS)
def test_pick_is_ordered_inside_and_without_repeats_where_it_can_be(total: int, count: int, sampling: str) -> None:
    chosen = pick(total, count, sampling)
    assert len(chosen) == count
    assert chosen == sorted(chosen)
    assert all(0 <= index < total for index in chosen)
    if total >= count:
        assert len(set(chosen)) == count
    if sampling == "linspace" and count > 1:
        assert (chosen[0], chosen[-1]) == (0, total - 1)


@given(st.integers(1, 2000), st.integers(1, 64))
def test_stride_is_the_floor_of_numpy_arange(total: int, count: int) -> None:
    assert pick(total, count, "stride") == [i * total // count for i in range(count)]
    if total % count == 0:
        assert pick(total, count, "stride") == np.arange(0, total, total // count).tolist()


@pytest.mark.parametrize("arguments", [(0, 4, "linspace"), (4, 0, "stride"), (4, 4, "uniform")])
def test_pick_refuses_wrong_arguments(arguments: tuple[int, int, str]) -> None:
    with pytest.raises(ValueError, match="expected"):
        pick(*arguments)


def test_choose_names_both_counts_and_the_remedy() -> None:
    with pytest.raises(ShortClipError, match=r"a/b: 5 decodable frames, 8 asked for\..*frames\.short_clips: repeat"):
        choose("a/b", 5, 8)
    assert choose("a/b", 5, 8, "linspace", "repeat") == pick(5, 8)
    with pytest.raises(ValueError, match="short_clips 'pad'"):
        choose("a/b", 5, 8, "linspace", "pad")


def test_natural_order() -> None:
    names = ["f_10.png", "f_2.png", "f_1.png", "e_3.png", "f_02.png", "f.png"]
    assert sorted(names, key=natural_key) == ["e_3.png", "f.png", "f_1.png", "f_02.png", "f_2.png", "f_10.png"]


@given(st.lists(st.text(alphabet="a_.012³٣9", min_size=1, max_size=8)))
def test_natural_key_orders_any_names(names: list[str]) -> None:
    sorted(names, key=natural_key)


def _write(path: Path, value: int, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> Path:
    Image.new(mode, size, value if len(mode) == 1 else (value, 2 * value, 3 * value, 255)[: len(mode)]).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "000069"
    root.mkdir()
    for i in range(12):
        _write(root / f"frame_{i}.png", i)
    (root / "notes.txt").write_text("passed over")
    (root / ".hidden.png").write_bytes(b"passed over")
    return root


def test_read_folder_in_natural_order(folder: Path) -> None:
    read = read_folder(folder, 12)
    assert read.pixels.dtype == np.uint8 and read.pixels.shape == (12, 6, 8, 3) and read.pixels.flags.c_contiguous
    assert read.pixels[:, 0, 0].tolist() == [[i, 2 * i, 3 * i] for i in range(12)]
    assert read.indices.tolist() == read.pts.tolist() == list(range(12))
    assert read.indices.dtype == read.pts.dtype == np.int64
    assert (len(read), read.available) == (12, 12)


def test_read_folder_picks(folder: Path) -> None:
    assert read_folder(folder, 4).pixels[:, 0, 0, 0].tolist() == pick(12, 4)
    assert read_folder(folder, 5, "stride").pixels[:, 0, 0, 0].tolist() == pick(12, 5, "stride")
    assert read_folder(folder, 30, short_clips="repeat").pixels[:, 0, 0, 0].tolist() == pick(12, 30)
    with pytest.raises(ShortClipError, match="12 decodable frames, 13 asked for"):
        read_folder(folder, 13)


def test_a_frame_of_another_size_is_named(folder: Path) -> None:
    _write(folder / "frame_11.png", 11, (9, 6))
    with pytest.raises(RefusedClipError, match=r"frame_11\.png: 9x6 pixels, 8x6 in frame_0\.png"):
        read_folder(folder, 12)


def test_folder_without_frames(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(NoVideoError, match="no PNG or JPEG among its 1 entries"):
        read_folder(tmp_path, 1)
    with pytest.raises(NoVideoError, match="cannot be listed"):
        read_folder(tmp_path / "missing", 1)
    with pytest.raises(NoVideoError):
        read_folder("nul\0", 1)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = _write(tmp_path / "outside.png", 1)
    (folder / "frame_12.png").symlink_to(outside)
    with pytest.raises(UnsafeFileError, match="frame_12.png: a link that leaves its folder"):
        read_folder(folder, 1)


def test_images_keep_their_sizes_and_order(tmp_path: Path) -> None:
    paths = [_write(tmp_path / f"{i}.png", i, (4 + i, 3)) for i in (3, 1, 2)]
    assert [image.shape for image in read_images(paths)] == [(3, 7, 3), (3, 5, 3), (3, 6, 3)]


@pytest.mark.parametrize(("mode", "expected"), [("L", [7, 7, 7]), ("RGBA", [7, 14, 21]), ("P", [0, 0, 0]), ("1", [255, 255, 255])])
def test_any_8_bit_image_becomes_rgb(tmp_path: Path, mode: str, expected: list[int]) -> None:
    if mode == "P":
        image = Image.new("P", (4, 4), 1)
        image.putpalette([9, 9, 9, 0, 0, 0])
        image.save(tmp_path / "a.png")
    else:
        _write(tmp_path / "a.png", 7, mode=mode)
    (read,) = read_images([tmp_path / "a.png"])
    assert read.shape[2] == 3 and read[0, 0].tolist() == expected


def test_png_is_exact_and_jpeg_is_read(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (33, 17, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.JPG", format="JPEG", quality=95)
    png, jpeg = read_images([tmp_path / "a.png", tmp_path / "b.JPG"])
    assert (png == pixels).all()
    assert jpeg.shape == pixels.shape


def test_more_than_8_bits_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(RefusedClipError, match="more than 8 bits"):
        read_images([tmp_path / "a.png"])


def test_bad_images(tmp_path: Path) -> None:
    good = _write(tmp_path / "good.png", 5, (64, 64)).read_bytes()
    for name, data, error in [
        ("empty.png", b"", NoVideoError),
        ("garbage.png", b"\x00\x01 nothing" * 50, CorruptClipError),
        ("cut.png", good[: len(good) // 2], CorruptClipError),
        ("bmp.png", b"BM" + good, CorruptClipError),  # only PNG and JPEG are parsed, whatever else Pillow knows
    ]:
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(error, match=name):
            read_images([path])
    with pytest.raises(NoVideoError, match="No such file"):
        read_images([tmp_path / "missing.png"])
    with pytest.raises(NoVideoError, match="expected a file"):
        read_images([tmp_path])


def test_every_flipped_byte_gives_an_image_or_a_source_error(tmp_path: Path) -> None:
    good = bytearray(_write(tmp_path / "good.png", 5, (16, 16)).read_bytes())
    path = tmp_path / "a.png"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for at in range(len(good)):
            path.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
            try:
                (image,) = read_images([path])
            except SourceError:
                continue
            assert image.dtype == np.uint8 and image.shape[2] == 3


@pytest.mark.parametrize("size", [(12_000, 12_000), (60_000, 60_000)])
def test_decompression_bomb(tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        data = _write(tmp_path / "bomb.png", 0, (10, 10)).read_bytes()
    header = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    import zlib

    chunk = b"IHDR" + header + data[24:29]
    (tmp_path / "bomb.png").write_bytes(data[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[33:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TooLargeError, match=f"{frames.MAX_IMAGE_PIXELS:,}"):
            read_images([tmp_path / "bomb.png"])
