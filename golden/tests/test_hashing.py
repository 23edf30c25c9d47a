import hashlib
from pathlib import Path

from golden.hashing import file_sha256, text_sha256


def test_hashes_of_files_and_texts(tmp_path: Path) -> None:
    """Known values, and a file of more than one chunk."""
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # FIPS 180-4
    (tmp_path / "empty").touch()
    assert file_sha256(tmp_path / "empty") == text_sha256("") == empty
    content = bytes(range(256)) * 9000
    (tmp_path / "large").write_bytes(content)
    assert file_sha256(tmp_path / "large") == hashlib.sha256(content).hexdigest()
    assert text_sha256("é") == hashlib.sha256(b"\xc3\xa9").hexdigest()
