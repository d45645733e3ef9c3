"""Files that a kill or a full disk must not leave half written."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlr_ray.utils.files import replace_file


def test_a_file_is_replaced_and_never_written_in_place(tmp_path: Path) -> None:
    """Who has the old one open still reads it whole."""
    file = tmp_path / "file"
    file.write_text("old")
    with file.open() as reader:
        replace_file(file, lambda part: part.write_text("new"))
        assert reader.read() == "old" and file.read_text() == "new"


def test_a_write_that_fails_leaves_the_file_as_it_was_and_no_part(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        part.write_text("ne")
        raise OSError(28, "No space left on device")

    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(OSError, match=r"No space left on device.*file"):
        replace_file(file, fail)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
