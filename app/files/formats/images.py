"""Images as the canonical rows have them: decoded once, here, and encoded anew.

What was written beside the pixels (EXIF, comments, thumbnails, whatever follows the image's end) is gone. Equal bytes
give equal bytes under one version of Pillow, whose encoders these are.
"""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError

from app.files.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, MAX_IMAGE_SIDE
from app.files.problems import ReadError

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
#: What Pillow calls a JPEG behind which a phone put others of the same scene (CIPA DC-007). Its own is read.
_SEVERAL = "MPO"
#: Up to so many pixels an image is stored without loss: there it costs little, and small ones are often all they have.
_LOSSLESS_PIXELS = 2**16
_JPEG_QUALITY = 92


def canonical(data: bytes, *, row: int | None = None, column: int | None = None) -> bytes:
    """An RGB image of at most MAX_IMAGE_SIDE pixels a side, upright: PNG up to 65,536 pixels, JPEG above.

    Transparent parts become white, 16-bit grey and CMYK become 8-bit RGB. ReadError, with the place given:
    not_an_image, invalid_image, image_too_large, image_animated.
    """

    def wrong(code: str) -> ReadError:
        return ReadError(code, row=row, column=column)

    if len(data) > MAX_IMAGE_BYTES:
        raise wrong("image_too_large")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes are checked below; the rest is about metadata that goes
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise wrong("image_too_large")
                if getattr(image, "is_animated", False) and image.format != _SEVERAL:
                    raise wrong("image_animated")
                return _encoded(_bounded(image))
        except UnidentifiedImageError:
            raise wrong("not_an_image") from None
        except Image.DecompressionBombError:
            raise wrong("image_too_large") from None
        except (ReadError, MemoryError):
            raise
        except Exception:  # each decoder has errors of its own, from OSError to IndexError and struct.error
            raise wrong("invalid_image") from None


def _bounded(image: Image.Image) -> Image.Image:
    if image.format in ("JPEG", _SEVERAL):
        image.draft("RGB", (2 * MAX_IMAGE_SIDE, 2 * MAX_IMAGE_SIDE))  # decodes at a fraction of the size
    upright = _rgb(ImageOps.exif_transpose(image))
    upright.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE), Image.Resampling.LANCZOS)
    return upright


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _encoded(image: Image.Image) -> bytes:
    # A new image, so that nothing of `info` (profiles, comments) is written.
    plain = Image.new("RGB", image.size)
    plain.paste(image)
    out = io.BytesIO()
    if plain.width * plain.height <= _LOSSLESS_PIXELS:
        plain.save(out, "PNG", compress_level=6)
    else:
        plain.save(out, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return out.getvalue()
