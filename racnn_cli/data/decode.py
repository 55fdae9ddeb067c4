"""Decode image files to 8-bit RGB, with one clear `DataError` for each file that cannot be read."""

from __future__ import annotations

import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from racnn_cli.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF")
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff"}
"""Supported file name suffixes, in lower case."""
MAX_PIXELS = 178_956_970
"""Pillow's limit for a decompression bomb; a larger image is refused before its pixels are decoded."""

_HINT = "fix or remove the file; JPEG, PNG, WebP, BMP and TIFF are supported"
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Image.init()  # register all readers before the first thread opens a file
# Real problems are raised as errors; Pillow's warnings about odd metadata would only break the progress bar.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class StoredImage:
    """A decoded file before its EXIF orientation is applied.

    Attributes:
        image: 8-bit RGB, as stored.
        orientation: EXIF orientation, 1..8; `upright` applies it.
        stored_size: (width, height) of the file in pixels.
        reduction: 1, 2, 4 or 8; the image has `ceil(stored_size / reduction)` pixels.
    """

    image: Image.Image
    orientation: int
    stored_size: tuple[int, int]
    reduction: int


@dataclass(frozen=True)
class UprightImage:
    """A decoded file with its EXIF orientation applied.

    Attributes:
        pixels: (H, W, 3) uint8 RGB.
        orientation: EXIF orientation of the file, 1..8.
        stored_size: (width, height) of the file in pixels, before rotation.
    """

    pixels: np.ndarray
    orientation: int
    stored_size: tuple[int, int]


def read_image(path: Path | str, *, min_side: int = 0) -> UprightImage:
    """Read a file as upright RGB.

    Args:
        path: a JPEG, PNG, WebP, BMP or TIFF file; only the first page of a multi-page file is read.
        min_side: 0 decodes at full size. Otherwise a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size (much faster),
            as long as its shorter side keeps at least `min_side` pixels.

    Raises:
        DataError: the file is missing, empty, truncated, oversized or not an image.
    """
    stored = decode(path, min_side=min_side)
    pixels = np.array(upright(stored.image, stored.orientation))  # (H, W, 3)
    return UprightImage(pixels, stored.orientation, stored.stored_size)


def decode(path: Path | str, *, min_side: int = 0) -> StoredImage:
    """Read a file as RGB in its stored orientation; cropping before rotating is exact and cheaper.

    Arguments and errors are those of `read_image`.
    """
    name = show(path)
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{name} is not a regular file", _HINT)
        if status.st_size == 0:
            raise DataError(f"{name} is empty (0 bytes)", _HINT)
        with Image.open(path, formats=FORMATS) as image:
            return _load(image, name, min_side)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{name} does not exist", "check the path") from None
    except PermissionError:
        raise DataError(f"{name} cannot be read: permission denied", "change its permissions") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is not a JPEG, PNG, WebP, BMP or TIFF image", _HINT) from None
    except Image.DecompressionBombError:
        raise DataError(f"{name} is oversized: more than {MAX_PIXELS:,} pixels", "shrink the image") from None
    # Damaged bytes raise almost anything in Pillow's readers (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} is damaged or truncated: {reason}", _HINT) from None


def check(path: Path | str) -> tuple[int, int]:
    """Decode the whole file and return its stored (width, height); errors are those of `read_image`."""
    return decode(path, min_side=1).stored_size


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Apply an EXIF orientation to a stored image."""
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def show(path: object) -> str:
    """Return a name that is safe to print: control characters, line breaks and undecodable bytes are escaped."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def _load(image: Image.Image, name: str, min_side: int) -> StoredImage:
    width, height = stored_size = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name} is oversized: {width} x {height} is more than {MAX_PIXELS:,} pixels", "shrink the image"
        )
    orientation = image.getexif().get(_ORIENTATION, 1)
    orientation = orientation if orientation in _UPRIGHT else 1
    reduction = 1
    if image.format == "TIFF":
        stored_size = (int(image.tag_v2[256]), int(image.tag_v2[257]))  # type: ignore[attr-defined]
    elif min_side and (window := image.draft(None, (min_side, min_side))):
        reduction = round(width / window[1][2])
    image.load()
    rgb = _to_rgb(image)
    if image.format == "TIFF" and orientation != 1 and _ORIENTATION not in image.getexif():
        # Pillow has already applied a TIFF's orientation; undo that, so that all formats behave alike.
        rgb = rgb.transpose(_UPRIGHT[{6: 8, 8: 6}.get(orientation, orientation)])
    return StoredImage(image=rgb, orientation=orientation, stored_size=stored_size, reduction=reduction)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale (H, W) integers or floats to uint8, from the smallest of the common value ranges that fits."""
    if values.dtype.itemsize == 2:
        return (values.astype(np.float32) * (255 / 65535) + 0.5).astype(np.uint8)
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    ranges = [top for top in (1.0, 255.0, 65535.0) if low >= 0 and high <= top]
    low, high = (0.0, ranges[0]) if ranges else (low, high)
    return ((values - low) * (255 / max(high - low, 1e-12)) + 0.5).clip(0, 255).astype(np.uint8)
