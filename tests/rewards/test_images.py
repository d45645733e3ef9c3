"""Pictures of files: upright, in their mode, and refused with words if they are none."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from rlr_ray.errors import UserError
from rlr_ray.models.arguments import _read
from rlr_ray.rewards.images import read_picture


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """16 x 8 pixels, taken with the camera on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    Image.new("RGB", (16, 8)).save(tmp_path / "photo.jpg", exif=exif)
    return tmp_path / "photo.jpg"


def test_a_photo_stands_as_its_camera_says(photo: Path) -> None:
    assert read_picture(photo).size == (8, 16) and read_picture(photo).mode == "RGB"
    assert _read("image", str(photo)).size == (8, 16) and _read("mask_image", str(photo)).mode == "L"


def test_a_file_that_is_no_picture_or_too_large_is_told(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photo.parent / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"column image is '.*broken\.png', which could not be opened as a picture"):
        _read("image", str(photo.parent / "broken.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match=r"photo\.jpg', which could not be opened .*decompression bomb"):
        _read("image", str(photo))
