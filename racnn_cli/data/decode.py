"""Decode image files to 8-bit RGB, with one clear `DataError` for each file that cannot be read."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from racnn_cli.data import color
from racnn_cli.data.color import Levels, ValueRange
from racnn_cli.errors import DataError

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF"]
"""Names of the formats, as Pillow writes them; AVIF and HEIF where this machine can read them."""
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"}
"""Supported file name suffixes, in lower case."""
OTHER_SUFFIXES = {".jp2", ".jxl", ".svg", ".psd", ".ico", ".ppm", ".pgm", ".tga", ".heic", ".heif", ".hif", ".avif"}
"""Suffixes of images that cannot be read; they are named and never dropped."""
MAX_PIXELS = 178_956_970
"""Pillow's limit for a decompression bomb; a larger image is refused before its pixels are decoded."""

_HINT = "fix or remove the file; JPEG, PNG, WebP, BMP, TIFF and GIF are supported"
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

ANIMATION_NOTE = "an animation; only its first frame is used"
PAGES_NOTE = "a file of several pages; only the first is used"

_SIGNATURES = (
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"GIF8", "a GIF image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (0, b"II+\0", "a TIFF image"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (4, b"JXL ", "a JPEG XL image"),
    (4, b"jP  ", "a JPEG 2000 image"),
    (4, b"ftypavi", "an AVIF image"),
    (4, b"ftyphei", "a HEIC image"),
    (4, b"ftyphev", "a HEIC image"),
    (4, b"ftypmif1", "a HEIC image"),
    (4, b"ftyp", "a video"),
    (0, b"\x1a\x45\xdf\xa3", "a video"),
    (128, b"DICM", "a DICOM file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (0, b"<!doctype html", "an HTML page, as a failed download leaves it"),
    (0, b"<html", "an HTML page, as a failed download leaves it"),
    (0, b"<?xml", "an XML or SVG file"),
    (0, b"<svg", "an SVG drawing"),
)
"""Position, first bytes (text in lower case) and name of what files hold that claim to be images."""


def _register_optional_formats() -> None:
    if features.check("avif"):
        FORMATS.append("AVIF")
        SUFFIXES.add(".avif")
    with contextlib.suppress(ImportError):
        import pillow_heif  # the extra `heif`

        pillow_heif.register_heif_opener()
        FORMATS.append("HEIF")
        SUFFIXES.update((".heic", ".heif", ".hif"))
    OTHER_SUFFIXES.difference_update(SUFFIXES)


Image.init()  # register all readers before the first thread opens a file
_register_optional_formats()
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
        levels: the values of an image with more than 8 bits, else None.
        notes: what was ignored, such as further frames.
    """

    image: Image.Image
    orientation: int
    stored_size: tuple[int, int]
    reduction: int
    levels: Levels | None = None
    notes: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class FileCheck:
    """What reading a whole file tells about it.

    Attributes:
        stored_size: (width, height) in pixels.
        digest: 16-byte hash of the file's contents; equal for copies.
        levels, notes: as in `StoredImage`, with a note on an image that is nearly one color.
    """

    stored_size: tuple[int, int]
    digest: bytes
    levels: Levels | None
    notes: tuple[str, ...]


ImageSource = Path | str | Image.Image | np.ndarray
"""A file, an image in memory, or an array (H, W), (H, W, 1..4) of integers or floats."""


def read_image(source: ImageSource, *, min_side: int = 0, value_range: ValueRange | None = None) -> UprightImage:
    """Read an image as upright RGB; arguments and errors are those of `decode`."""
    stored = decode(source, min_side=min_side, value_range=value_range)
    pixels = np.array(upright(stored.image, stored.orientation))  # (H, W, 3)
    return UprightImage(pixels, stored.orientation, stored.stored_size)


def decode(source: ImageSource, *, min_side: int = 0, value_range: ValueRange | None = None) -> StoredImage:
    """Read an image as 8-bit sRGB in its stored orientation; cropping before rotating is exact and cheaper.

    Every image that racnn sees is read here, so that a file, an image in memory and an array have the same pixels.

    Args:
        source: a file, an image or an array. Of an animation or a file with several pages, the first one is read.
        min_side: 0 decodes at full size. Otherwise a JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size (much
            faster), as long as its shorter side keeps at least `min_side` pixels.
        value_range: values of grays and colors with more than 8 bits that become 0 and 255; None: the range that fits
            the image, as `color.choose_range` finds it.

    Raises:
        DataError: the file is missing, empty, truncated, oversized or not an image; an array that is not one.
    """
    if isinstance(source, np.ndarray):
        return _decode_array(source, value_range)
    if isinstance(source, Image.Image):
        return _decode_image(source, min_side, value_range)
    with _explained(source) as name:
        _check_file(source, name)
        with open(source, "rb") as file:
            return _decode_file(file, name, min_side, value_range)


def check(path: Path | str) -> FileCheck:
    """Read and decode a whole file; errors are those of `decode`."""
    with _explained(path) as name:
        _check_file(path, name)
        with open(path, "rb", buffering=0) as file:
            content = file.read()
        stored = _decode_file(io.BytesIO(content), name, min_side=1, value_range=None)
    flat = (color.FLAT_NOTE,) if color.is_flat(stored.image) else ()
    digest = hashlib.sha256(content).digest()[:16]  # faster than others where the CPU has it
    return FileCheck(stored.stored_size, digest=digest, levels=stored.levels, notes=stored.notes + flat)


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Apply an EXIF orientation to a stored image."""
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def show(path: object) -> str:
    """Return a name that is safe to print: control characters, line breaks and undecodable bytes are escaped."""
    text = str(path)
    return text if text.isprintable() else repr(text)


@contextlib.contextmanager
def _explained(source: object) -> Iterator[str]:
    """Yield the name of a file, and raise one clear DataError for whatever goes wrong while it is read."""
    name = show(source)
    try:
        yield name
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{name} does not exist", "check the path") from None
    except PermissionError:
        raise DataError(f"{name} cannot be read: permission denied", "change its permissions") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name} is oversized: more than {MAX_PIXELS:,} pixels", "shrink the image") from None
    # Damaged bytes raise almost anything in Pillow's readers (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} is damaged or truncated: {reason}", _HINT) from None


def _check_file(path: Path | str, name: str) -> None:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{name} is not a regular file", _HINT)
    if status.st_size == 0:
        raise DataError(f"{name} is empty (0 bytes)", _HINT)


def _decode_file(file: BinaryIO, name: str, min_side: int, value_range: ValueRange | None) -> StoredImage:
    try:
        with Image.open(file, formats=FORMATS) as image:
            return _load(image, name, min_side, value_range)
    except UnidentifiedImageError:
        file.seek(0)
        raise _unidentified(name, file.read(512)) from None


def _unidentified(name: str, start: bytes) -> DataError:
    """The error for a file without an image of a supported format; names what it holds."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for position, signature, kind in _SIGNATURES:
        content = text if signature[:1] in b"<v" else start[position:]
        if content.startswith(signature):
            hint = _HINT
            if kind == "a HEIC image":
                kind += ", which needs the extra heif"
                hint = "pip install 'racnn[heif]', or convert it to JPEG or PNG"
            elif kind in ("a JPEG image", "a PNG image", "a GIF image", "a TIFF image"):
                kind += " of a kind that cannot be read, or damaged"
            return DataError(f"{name} is {kind}", hint)
    return DataError(f"{name} is not a JPEG, PNG, WebP, BMP, TIFF or GIF image", _HINT)


def _decode_image(image: Image.Image, min_side: int, value_range: ValueRange | None) -> StoredImage:
    """Decode an image in memory; one that was opened and not loaded yet is read from its file."""
    name = show(getattr(image, "filename", "") or "the image")
    with _explained(name):
        if 0 in image.size:
            raise DataError(f"an image of {image.width}×{image.height} pixels is empty", "leave it out")
        file = getattr(image, "fp", None)
        if file is not None and getattr(image, "tile", []) and image.format in FORMATS and image.tell() == 0:
            position = file.tell()
            file.seek(0)
            content = file.read()
            file.seek(position)
            return _decode_file(io.BytesIO(content), name, min_side, value_range)
        return _load(image.copy(), name, 0, value_range)


def _decode_array(values: np.ndarray, value_range: ValueRange | None) -> StoredImage:
    channels = 1 if values.ndim == 2 else values.shape[2] if values.ndim == 3 else 0
    deep = values.dtype in (np.uint16, np.int16, np.int32, np.float32, np.float64)
    if channels not in (1, 2, 3, 4) or not ((deep and channels in (1, 3)) or values.dtype == np.uint8):
        raise DataError(
            f"an array of shape {values.shape} and type {values.dtype} is not an image",
            "give (H, W, 3) arrays of type uint8, RGB; or (H, W) arrays of integers or floats",
        )
    if 0 in values.shape:
        raise DataError(f"an image of {values.shape[1]}×{values.shape[0]} pixels is empty", "leave it out")
    values = values[..., 0] if values.ndim == 3 and channels == 1 else values
    image, levels, notes = color.deep_to_rgb(values, value_range) if deep else color.to_rgb(Image.fromarray(values))
    return StoredImage(image, orientation=1, stored_size=image.size, reduction=1, levels=levels, notes=tuple(notes))


def _load(image: Image.Image, name: str, min_side: int, value_range: ValueRange | None) -> StoredImage:
    width, height = stored_size = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name} is oversized: {width} x {height} is more than {MAX_PIXELS:,} pixels", "shrink the image"
        )
    deep = _deep_color(image)  # first of all: reading a PNG's EXIF data loads its pixels
    exif_orientation = image.getexif().get(_ORIENTATION, 1)
    orientation = exif_orientation if exif_orientation in _UPRIGHT else 1
    reduction = 1
    # A copy in memory has lost its file's tags, and with them the rotation that Pillow applied.
    stored_tiff = image.format == "TIFF" and hasattr(image, "tag_v2")
    if stored_tiff:
        stored_size = (int(image.tag_v2[256]), int(image.tag_v2[257]))  # type: ignore[attr-defined]
    elif min_side and (window := image.draft(None, (min_side, min_side))):
        reduction = round(width / window[1][2])
    notes = [note] if (note := _frames_note(image)) else []
    image.load()
    if deep is None:
        rgb, levels, more = color.to_rgb(image, value_range)
    else:
        rgb, levels, more = color.deep_to_rgb(deep, value_range)
    if stored_tiff and orientation != 1 and _ORIENTATION not in image.getexif() and deep is None:
        # Pillow has already applied a TIFF's orientation; undo that, so that all formats behave alike.
        rgb = rgb.transpose(_UPRIGHT[{6: 8, 8: 6}.get(orientation, orientation)])
    return StoredImage(
        rgb, orientation=orientation, stored_size=stored_size, reduction=reduction, levels=levels, notes=(*notes, *more)
    )


def _frames_note(image: Image.Image) -> str:
    if not getattr(image, "is_animated", False) or image.format in ("MPO", "HEIF"):
        return ""  # a photograph with a preview or a second view
    return PAGES_NOTE if image.format == "TIFF" else ANIMATION_NOTE


def _deep_color(image: Image.Image) -> np.ndarray | None:
    """The pixels of a PNG or TIFF file with 16 bits per color, (H, W, 3), of which Pillow would keep 8; else None."""
    if image.mode not in ("RGB", "RGBA") or image.format not in ("PNG", "TIFF"):
        return None
    if image.format == "PNG":
        deep = any("16B" in str(tile[3]) for tile in getattr(image, "tile", []))
    else:
        deep = 16 in getattr(image, "tag_v2", {}).get(258, ())
    if not deep:
        return None
    import cv2  # slow to import, and few files need it

    file: BinaryIO = image.fp  # type: ignore[attr-defined]  # an image that was opened from a file
    position = file.tell()
    file.seek(0)
    pixels = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    file.seek(position)
    if pixels is None or pixels.ndim != 3 or pixels.dtype != np.uint16:
        return None
    return pixels[..., 2::-1]  # BGR or BGRA to RGB
