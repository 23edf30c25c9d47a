from pathlib import Path

import pytest

from golden.codebook_file import MAX_FILE_BYTES, read_codebooks
from golden.codebooks import lut_from_levels
from golden.errors import InputError
from golden.formats import HIF7, HIF8T, HifFormat

EVEN = [k / 8 for k in range(-8, 8)]
SKEWED = [-1.0, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("hif", [HIF7, HIF8T], ids=["HIF7", "HIF8T"])
def test_codebooks_come_rounded_to_the_grid_in_the_order_of_the_file(
    tmp_path: Path, hif: HifFormat
) -> None:
    path = write(
        tmp_path / "mine.toml",
        f"[codebooks.skewed2]\nlevels = {SKEWED}\n[codebooks.even]\nlevels = {EVEN}\n",
    )
    books = read_codebooks(path, hif)
    assert list(books) == ["skewed2", "even"]
    assert books["even"] == lut_from_levels(EVEN, hif)
    assert books["skewed2"] == lut_from_levels([float(x) for x in SKEWED], hif)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[codebooks.a", "mine.toml: not TOML"),
        ("levels = 3\n", "unknown table 'levels'"),
        ("", r"holds no \[codebooks.NAME\]"),
        ("codebooks = 3\n", r"holds no \[codebooks.NAME\]"),
        (f"[codebooks.NF4]\nlevels = {EVEN}\n", "codebook 'NF4': names must be a lower-case"),
        (f"[codebooks.{'a' * 25}]\nlevels = {EVEN}\n", "up to 23 letters and digits"),
        (f"[codebooks.a-b]\nlevels = {EVEN}\n", "codebook 'a-b': names must be"),
        (f"[codebooks.a]\nvalues = {EVEN}\n", "codebook 'a': must hold `levels` and nothing"),
        (f"[codebooks.a]\nlevels = {EVEN}\nx = 1\n", "'a': must hold `levels` and nothing"),
        ("[codebooks]\na = 4\n", "'a': must hold `levels`"),
        (f"[codebooks.a]\nlevels = {EVEN[1:]}\n", "levels must be a list of 16 numbers"),
        ("[codebooks.a]\nlevels = 'x'\n", "levels must be a list of 16 numbers"),
        (f"[codebooks.a]\nlevels = {[*EVEN[1:], '1']}\n", "level 15 is '1', not a number"),
        ("[codebooks.a]\nlevels = [true" + ", 0.5" * 15 + "]\n", "level 0 is True, not a number"),
        (f"[codebooks.a]\nlevels = {[*EVEN[:-1], 1.5]}\n", r"must lie in \[-1, 1\]"),
        (f"[codebooks.a]\nlevels = {EVEN[::-1]}\n", "ascending"),
        ("[codebooks.a]\nlevels = [nan" + ", 0.5" * 15 + "]\n", "finite"),
        (f"[codebooks.a]\nlevels = {[*EVEN[:-1], 10**400]}\n", "codebook 'a'"),
        (
            f"[codebooks.a]\nlevels = {[k / 32 for k in range(16)]}\n",
            "on both sides of zero|ascend strictly",
        ),
    ],
)
def test_what_is_no_codebook_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "mine.toml", text)
    with pytest.raises(InputError, match=message) as caught:
        read_codebooks(path, HIF7)
    assert str(path) in str(caught.value)


def test_files_that_are_not_text_or_too_large_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"mine\.toml: is UTF-16 text; save it as UTF-8"):
        read_codebooks(path, HIF7)
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(InputError, match="larger than"):
        read_codebooks(path, HIF7)
    with pytest.raises(FileNotFoundError):
        read_codebooks(tmp_path / "none.toml", HIF7)
