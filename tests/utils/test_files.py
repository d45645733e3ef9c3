"""Files that a kill or a full disk must not leave half written."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlr_ray.errors import UserError
from rlr_ray.utils.files import make_folder, refuse_foreign, remove_parts, replace_file


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


def test_only_parts_that_were_begun_here_are_removed(tmp_path: Path) -> None:
    ours, theirs = tmp_path / f".metrics.{'0a' * 16}.part", tmp_path / ".film.mp4.part"
    for file in (ours, theirs):
        file.touch()
    remove_parts(tmp_path)
    assert list(tmp_path.iterdir()) == [theirs]


def test_a_folder_that_is_a_link_is_made_anew_where_it_leads(tmp_path: Path) -> None:
    folder, link = tmp_path / "disk" / "run", tmp_path / "run"
    folder.mkdir(parents=True)
    link.symlink_to(folder)
    (folder / "old").touch()
    make_folder(link, anew=True)
    assert link.is_symlink() and list(link.iterdir()) == [] and [*folder.parent.iterdir()] == [folder]


def test_a_folder_is_foreign_if_it_holds_more_than_a_kill_leaves(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    refuse_foreign(tmp_path, "run", ["samples"])
    (tmp_path / "samples" / "holiday.png").touch()
    with pytest.raises(UserError, match="holds no run, but samples; a run begins in a folder of its own"):
        refuse_foreign(tmp_path, "run", ["samples"])
