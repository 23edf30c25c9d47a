"""Bit planes against one Python integer that holds the whole plane."""

import numpy as np
import pytest
from numpy.typing import NDArray

import golden.packing
from golden.errors import InputError
from golden.packing import pack_bits, plane_bytes, unpack_bits

WIDTHS = range(1, 17)
COUNTS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 100, 257)


def plane_by_integer(elements: list[int], width: int) -> bytes:
    """Element i shifted to bit i * width of one integer, lowest byte first."""
    number = sum(element << i * width for i, element in enumerate(elements))
    return number.to_bytes((len(elements) * width + 7) // 8, "little")


def random_elements(count: int, width: int, seed: int) -> NDArray[np.unsignedinteger]:
    dtype = np.uint8 if width <= 8 else np.uint16
    elements = np.random.default_rng(seed).integers(0, 1 << width, count).astype(dtype)
    elements[-1:] = (1 << width) - 1  # the last bits of the plane are set
    return elements


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("seed", [91])
def test_planes_equal_the_integer_and_unpack_again(width: int, seed: int) -> None:
    for count in COUNTS:
        elements = random_elements(count, width, seed + count)
        plane = pack_bits(elements, width)
        assert plane.dtype == np.uint8
        assert plane.tobytes() == plane_by_integer(elements.tolist(), width), f"seed {seed + count}"
        assert plane.shape == (plane_bytes(count, width),)
        back = unpack_bits(plane, width, count)
        assert back.dtype == elements.dtype
        assert back.shape == (count,)
        assert np.array_equal(back, elements)


@pytest.mark.parametrize("chunk", [8, 16, 40])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("seed", [92])
def test_chunk_borders_do_not_show(
    monkeypatch: pytest.MonkeyPatch, width: int, chunk: int, seed: int
) -> None:
    monkeypatch.setattr(golden.packing, "_CHUNK", chunk)
    for count in (0, 1, chunk - 1, chunk, chunk + 1, 2 * chunk, 5 * chunk + 3):
        elements = random_elements(count, width, seed + count)
        plane = pack_bits(elements, width)
        assert plane.tobytes() == plane_by_integer(elements.tolist(), width), f"seed {seed + count}"
        assert np.array_equal(unpack_bits(plane, width, count), elements)


@pytest.mark.parametrize("seed", [93])
def test_the_default_chunk_is_a_multiple_of_eight_elements(seed: int) -> None:
    """Otherwise a chunk would end inside a byte."""
    assert golden.packing._CHUNK % 8 == 0
    count = golden.packing._CHUNK + 5
    elements = random_elements(count, 3, seed)
    bits = np.unpackbits(pack_bits(elements, 3), bitorder="little")[: 3 * count].reshape(-1, 3)
    assert np.array_equal(bits @ np.array([1, 2, 4]), elements)
    assert np.array_equal(unpack_bits(pack_bits(elements, 3), 3, count), elements)


def test_four_bits_go_low_nibble_first() -> None:
    assert pack_bits(np.array([0x1, 0xA, 0x7], np.uint8), 4).tolist() == [0xA1, 0x07]
    assert unpack_bits(np.array([0xA1, 0x07], np.uint8), 4, 3).tolist() == [0x1, 0xA, 0x7]


def test_twelve_bits_by_hand() -> None:
    """0xABC and 0x123 are the integer 0x123ABC."""
    assert pack_bits(np.array([0xABC, 0x123], np.uint16), 12).tolist() == [0xBC, 0x3A, 0x12]


@pytest.mark.parametrize("width", [3, 4, 8, 12])
@pytest.mark.parametrize("seed", [94])
def test_elements_are_taken_in_row_major_order(width: int, seed: int) -> None:
    elements = random_elements(60, width, seed).reshape(3, 4, 5)
    wanted = plane_by_integer(elements.ravel().tolist(), width)
    for array in (elements, np.asfortranarray(elements), np.repeat(elements, 2, axis=2)[..., ::2]):
        assert pack_bits(array, width).tobytes() == wanted


@pytest.mark.parametrize("width", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("seed", [95])
def test_wide_arrays_of_narrow_elements_pack_alike(width: int, seed: int) -> None:
    narrow = random_elements(33, width, seed)
    assert np.array_equal(pack_bits(narrow.astype(np.uint16), width), pack_bits(narrow, width))


@pytest.mark.parametrize("width", [3, 4, 8, 16])
@pytest.mark.parametrize("seed", [96])
def test_results_are_new_arrays(width: int, seed: int) -> None:
    elements = random_elements(16, width, seed)
    kept = elements.copy()
    plane = pack_bits(elements, width)
    kept_plane = plane.copy()
    back = unpack_bits(plane, width, 16)
    back[:] = 0
    assert np.array_equal(plane, kept_plane)
    plane[:] = 0
    assert np.array_equal(elements, kept)


@pytest.mark.parametrize("width", range(1, 16))
def test_elements_that_do_not_fit_are_refused(width: int) -> None:
    elements = np.zeros(9, np.uint16)
    elements[4] = 1 << width
    with pytest.raises(ValueError, match=f"element {1 << width} does not fit into {width} bits"):
        pack_bits(elements, width)
    elements[4] -= 1
    pack_bits(elements, width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("wrong", [-1, 1])
def test_planes_of_the_wrong_length_are_refused(width: int, wrong: int) -> None:
    bytes_needed = -(-9 * width // 8)
    plane = np.zeros(bytes_needed + wrong, np.uint8)
    message = (
        rf"plane of 9 x {width} bits has {bytes_needed} bytes, not \({bytes_needed + wrong},\)"
    )
    with pytest.raises(InputError, match=message):
        unpack_bits(plane, width, 9)


def test_a_plane_has_one_axis() -> None:
    with pytest.raises(InputError, match=r"has 2 bytes, not \(1, 2\)"):
        unpack_bits(np.zeros((1, 2), np.uint8), 8, 2)


@pytest.mark.parametrize("width", [width for width in WIDTHS if width % 8])
def test_set_bits_after_the_last_element_are_refused(width: int) -> None:
    for count in (1, 3, 9):
        for bit in range(count * width, 8 * plane_bytes(count, width)):
            plane = np.zeros(plane_bytes(count, width), np.uint8)
            plane[bit // 8] = 1 << bit % 8
            with pytest.raises(InputError, match="bits set after its last element"):
                unpack_bits(plane, width, count)


def test_plane_bytes() -> None:
    assert [plane_bytes(count, 12) for count in (0, 1, 2, 3)] == [0, 2, 3, 5]
    assert plane_bytes(8, 4) == 4
