"""Images: what comes out is upright RGB without a word beside the pixels, and the same each time."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from app.files.formats.images import canonical
from app.files.limits import MAX_IMAGE_BYTES
from app.files.problems import Problem, ReadError
from tests.app.files.reading import SECRET, parquet, problem_of, read_profile, rows_of


def encoded(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format_, **options)
    return out.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(canonical(data)))
    assert image.mode == "RGB"
    assert image.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    return image


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("format_", ["PNG", "BMP", "WEBP"])
def test_small_images_keep_every_pixel(format_: str) -> None:
    image = gradient(40, 30)
    options = {"lossless": True} if format_ == "WEBP" else {}
    out = decoded(encoded(image, format_, **options))
    assert (out.format, out.size) == ("PNG", (40, 30))
    np.testing.assert_array_equal(pixels(out), pixels(image))


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "BMP"])
def test_large_images_are_bounded_and_look_the_same(format_: str) -> None:
    image = gradient(3000, 1500)
    out = decoded(encoded(image, format_))
    assert (out.format, out.size) == ("JPEG", (512, 256))
    expected = image.resize((512, 256), Image.Resampling.LANCZOS)
    assert np.abs(pixels(out) - pixels(expected)).mean() < 3


def test_metadata_goes_and_orientation_is_applied() -> None:
    image = gradient(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    exif[0x010E] = SECRET
    given = encoded(image, "PNG", exif=exif) + SECRET.encode()
    assert SECRET.encode() in given
    assert SECRET.encode() not in canonical(given)
    np.testing.assert_array_equal(pixels(decoded(given)), pixels(image.rotate(-90, expand=True)))
    assert canonical(given) == canonical(encoded(image.rotate(-90, expand=True)))


def test_of_a_photograph_that_holds_others_its_own_is_read() -> None:
    """Phones put a depth map or a brighter picture behind it (CIPA DC-007); viewers show one."""
    picture, other = gradient(640, 480), gradient(640, 480).rotate(180)
    several = encoded(picture, "MPO", save_all=True, append_images=[other], quality=95)
    assert several.startswith(b"\xff\xd8\xff")
    assert canonical(several) == canonical(encoded(picture, "JPEG", quality=95))


def test_other_modes_become_rgb() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert pixels(decoded(encoded(clear))).min() == 255  # what was hidden stays so
    half = Image.new("LA", (4, 4), (0, 128))
    assert set(pixels(decoded(encoded(half))).ravel()) <= {126, 127, 128}
    deep = Image.fromarray(np.full((4, 4), 0x8012, dtype=np.uint16))
    assert set(pixels(decoded(encoded(deep))).ravel()) == {0x80}
    print_ = gradient(40, 30).convert("CMYK")
    assert np.abs(pixels(decoded(encoded(print_, "JPEG", quality=95))) - pixels(gradient(40, 30))).mean() < 12
    for mode in ("1", "L", "P"):
        assert decoded(encoded(gradient(8, 8).convert(mode))).size == (8, 8)


def test_what_is_no_image_is_refused() -> None:
    frames = [gradient(8, 8), gradient(8, 8).rotate(90)]
    moving = {"save_all": True, "append_images": frames[1:]}
    damaged = bytearray(encoded(gradient(64, 64)))
    damaged[len(damaged) // 2] ^= 0xFF
    for data, code in (
        (b"", "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        (encoded(frames[0], "GIF"), "not_an_image"),
        (encoded(frames[0], "TIFF"), "not_an_image"),
        (encoded(frames[0], "ICO"), "not_an_image"),
        (encoded(frames[0], "PNG", **moving), "image_animated"),
        (encoded(frames[0], "WEBP", **moving), "image_animated"),
        (encoded(gradient(64, 64))[:-40], "invalid_image"),
        (encoded(gradient(640, 64), "JPEG")[:-900], "invalid_image"),
        (encoded(gradient(640, 64), "WEBP")[:-90], "invalid_image"),
        (bytes(damaged), "invalid_image"),
        (encoded(Image.new("1", (7000, 7000))), "image_too_large"),
        (encoded(gradient(4, 4)) + bytes(MAX_IMAGE_BYTES), "image_too_large"),
    ):
        with pytest.raises(ReadError) as caught:
            canonical(data, row=3, column=2)
        assert caught.value.problem == Problem(code, row=3, column=2)


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_with_image_bytes(tmp_path: Path, as_struct: bool) -> None:
    cells = [encoded(gradient(8, 8)), encoded(gradient(600, 300), "JPEG"), None]
    column: Any = [cell and {"bytes": cell, "path": f"{SECRET}.png"} for cell in cells] if as_struct else cells
    made = parquet(tmp_path, image=column, label=[0, 1, 1])
    rows = rows_of(tmp_path, made, "train.parquet")
    assert rows == [(cell and canonical(cell), str(label)) for cell, label in zip(cells, (0, 1, 1), strict=True)]
    assert SECRET.encode() not in (tmp_path / "rows.parquet").read_bytes()
    image, label = read_profile(tmp_path, made, "train.parquet")["columns"]
    assert image == {
        "name": "image",
        "type": "image",
        **dict.fromkeys(("distinct", "classes", "lists", "unequal", "list_items", "elements", "range", "chat")),
        "nulls": {"count": 1, "row": 3, "line": None},
    }
    assert label["classes"] == ["0", "1"]


def test_bad_cells_of_an_image_column_have_their_row(tmp_path: Path) -> None:
    good = encoded(gradient(8, 8))
    made = parquet(tmp_path, text=["x", "y"], pic=[good, SECRET.encode()])
    assert problem_of(tmp_path, made, "a.parquet") == Problem("not_an_image", row=2, column=2)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    elsewhere = pa.array([{"bytes": None, "path": "/etc/passwd"}], kind)
    assert problem_of(tmp_path, parquet(tmp_path, pic=elsewhere), "a.parquet") == Problem(
        "not_an_image", row=1, column=1
    )
    made = parquet(tmp_path, text=["x"], pic=[good])
    assert problem_of(tmp_path, made, "a.parquet", "pic") == Problem("unit_is_image")


def test_large_rows_stay_within_small_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.files.formats.canonical._GROUP_BYTES", 100_000)
    cells = [encoded(gradient(8 + n % 9, 8)) for n in range(5000)]
    rows = rows_of(tmp_path, parquet(tmp_path, image=cells, label=["a", "b"] * 2500), "a.parquet")
    assert rows == [(canonical(cell), "ab"[n % 2]) for n, cell in enumerate(cells)]
    with pq.ParquetFile(tmp_path / "rows.parquet") as file:
        groups = [file.read_row_group(n).to_pylist() for n in range(file.num_row_groups)]
    sizes = [[len(row["image"]) + 1 for row in group] for group in groups]
    assert all(sum(size) >= 100_000 > sum(size[:-1]) for size in sizes[:-1])
