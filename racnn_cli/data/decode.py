"""An image file becomes pixels: proper 8-bit RGB, or one `RacnnError` that says what is wrong with it."""

from __future__ import annotations

import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from racnn_cli.errors import RacnnError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF")
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff"}
"""File name endings that are read, in lower case."""
MAX_PIXELS = 178_956_970
"""Pillow's own limit for a decompression bomb; a larger image is refused before its pixels are decoded."""

_HINT = "fix or remove the file; JPEG, PNG, WebP, BMP and TIFF are read"
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

Image.init()  # all readers are there before the first thread opens a file
# What matters is raised as an error here; Pillow's remarks on odd metadata would only break the progress bar.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Decoded:
    """Pixels as they lie in the file.

    Attributes:
        image: RGB, 8 bits, NOT yet turned upright.
        orientation: EXIF orientation, 1..8; `upright` applies it.
        stored_size: (width, height) of the file in pixels.
        reduction: 1, 2, 4 or 8: the image has `ceil(stored_size / reduction)` pixels.
    """

    image: Image.Image
    orientation: int
    stored_size: tuple[int, int]
    reduction: int


@dataclass(frozen=True)
class ImageInput:
    """An image as it is meant to be seen.

    Attributes:
        pixels: (H, W, 3) uint8, upright RGB.
        orientation: EXIF orientation of the file, 1..8.
        stored_size: (width, height) of the file in pixels, before it was turned upright.
    """

    pixels: np.ndarray
    orientation: int
    stored_size: tuple[int, int]


def read_image(path: Path | str, *, least: int = 0) -> ImageInput:
    """Read a file as upright RGB.

    Args:
        path: a JPEG, PNG, WebP, BMP or TIFF file; of several pages the first one is read.
        least: 0 reads every pixel; otherwise a JPEG may come reduced by 2, 4 or 8 (which is much faster),
            as long as its shorter side keeps at least `least` pixels.

    Raises:
        RacnnError: the file is missing, empty, truncated, oversized or no image.
    """
    decoded = decode(path, least=least)
    pixels = np.array(upright(decoded.image, decoded.orientation))  # (H, W, 3)
    return ImageInput(pixels, decoded.orientation, decoded.stored_size)


def decode(path: Path | str, *, least: int = 0) -> Decoded:
    """As `read_image`, but not turned upright yet: a crop before turning is exact and cheaper."""
    name = show(path)
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise RacnnError(f"{name} is not a regular file", _HINT)
        if status.st_size == 0:
            raise RacnnError(f"{name} is empty (0 bytes)", _HINT)
        with Image.open(path, formats=FORMATS) as image:
            return _load(image, name, least)
    except RacnnError:
        raise
    except FileNotFoundError:
        raise RacnnError(f"{name} does not exist", "check the path") from None
    except PermissionError:
        raise RacnnError(f"{name} may not be read (permission denied)", "change its permissions") from None
    except UnidentifiedImageError:
        raise RacnnError(f"{name} is not a JPEG, PNG, WebP, BMP or TIFF image", _HINT) from None
    except Image.DecompressionBombError:
        raise RacnnError(
            f"{name} is oversized: more than {MAX_PIXELS:,} pixels", "shrink the image"
        ) from None
    # Damaged bytes surface as any exception of Pillow's readers (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RacnnError(f"{name} is damaged or truncated: {reason}", _HINT) from None


def check(path: Path | str) -> tuple[int, int]:
    """Decode the whole file and throw the pixels away.

    Returns:
        (width, height) of the file as stored.

    Raises:
        RacnnError: as `read_image`.
    """
    return decode(path, least=1).stored_size


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turn an image as stored into the way it is meant to be seen."""
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def show(path: object) -> str:
    """A name safe to print: control characters, line breaks and undecodable bytes are escaped."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def _load(image: Image.Image, name: str, least: int) -> Decoded:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise RacnnError(
            f"{name} is oversized: {width} x {height} is more than {MAX_PIXELS:,} pixels",
            "shrink the image",
        )
    orientation = image.getexif().get(_ORIENTATION, 1)
    orientation = orientation if orientation in _UPRIGHT else 1
    stored, reduction = (width, height), 1
    if image.format == "TIFF":
        stored = (int(image.tag_v2[256]), int(image.tag_v2[257]))  # type: ignore[attr-defined]
    elif least and (window := image.draft(None, (least, least))):
        reduction = round(width / window[1][2])
    image.load()
    if image.format == "TIFF" and orientation != 1 and _ORIENTATION not in image.getexif():
        # Pillow has turned the TIFF upright by itself; take that back, so that all formats are alike.
        back = _UPRIGHT[{6: 8, 8: 6}.get(orientation, orientation)]
        return Decoded(_to_rgb(image).transpose(back), orientation, stored, reduction)
    return Decoded(_to_rgb(image), orientation, stored, reduction)


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
    """(H, W) of integers or floats to uint8: the range is the smallest usual one that holds all values."""
    if values.dtype.itemsize == 2:
        return (values.astype(np.float32) * (255 / 65535) + 0.5).astype(np.uint8)
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    usual = [top for top in (1.0, 255.0, 65535.0) if low >= 0 and high <= top]
    low, high = (0.0, usual[0]) if usual else (low, high)
    return ((values - low) * (255 / max(high - low, 1e-12)) + 0.5).clip(0, 255).astype(np.uint8)
