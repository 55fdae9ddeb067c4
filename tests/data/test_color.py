"""Every image means what people see: one decoder for all inputs, color profiles, depth and transparency."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from racnn_cli import recipe
from racnn_cli.data.color import ALPHA_NOTE, CLIPPED_NOTE, FLAT_NOTE, PROFILE_NOTE, Levels, choose_range
from racnn_cli.data.decode import ANIMATION_NOTE, PAGES_NOTE, check, decode, read_image
from racnn_cli.data.index import build_index
from racnn_cli.errors import DataError
from racnn_cli.export.loading import load
from racnn_cli.export.prediction import Model
from racnn_cli.run import Run

SRGB = ImageCms.createProfile("sRGB")
RAMP = np.linspace(0, 1, 4096).reshape(64, 64)


def noise(shape: tuple[int, ...], seed: int = 0, high: int = 256, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def profile_bytes(profile: object) -> bytes:
    return ImageCms.ImageCmsProfile(profile).tobytes()  # type: ignore[arg-type]


def wide_gamut() -> bytes:
    """A profile of RGB with the primaries of Adobe RGB and a gamma of 1.8, built from sRGB's bytes."""
    data = bytearray(profile_bytes(SRGB))
    tags = int.from_bytes(data[128:132], "big")

    def place(signature: bytes) -> int:
        for number in range(tags):
            entry = 132 + 12 * number
            if data[entry : entry + 4] == signature:
                return int.from_bytes(data[entry + 4 : entry + 8], "big")
        raise AssertionError(signature)

    primaries = {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
    }
    for signature, values in primaries.items():
        start = place(signature) + 8
        for number, value in enumerate(values):
            data[start + 4 * number : start + 4 * number + 4] = round(value * 65536).to_bytes(4, "big")
    return bytes(data)


# ---- one decoder


class Network:
    """As little as `Model` needs to read images."""

    classes, source, scales = ("a", "b"), 64, 1

    def __init__(self, fit: str, value_range: tuple[float, float] | None = None) -> None:
        self.fit, self.value_range = fit, value_range


def in_memory() -> dict[str, tuple[Image.Image, dict[str, object]]]:
    """File name to an image and how it is saved."""
    rotated = Image.Exif()
    rotated[0x0112] = 6
    rgb = Image.fromarray(noise((60, 90, 3)))
    key = (10, 200, 10)
    keyed = Image.new("RGB", (90, 60), key)
    keyed.paste(rgb.resize((40, 30)), (20, 10))
    palette = rgb.quantize(16)
    cut_out = rgb.convert("RGBA")
    cut_out.putalpha(Image.fromarray(noise((60, 90), 1)))
    gray = rgb.convert("L")
    return {
        "16-bit.png": (Image.fromarray(noise((60, 90), 2, 4096, np.uint16)), {}),
        "16-bit.tif": (Image.fromarray(noise((60, 90), 2, 65536, np.uint16)), {}),
        "float.tif": (Image.fromarray(noise((60, 90), 3, 1000).astype(np.float32) / 999), {}),
        "palette.png": (palette, {}),
        "palette-trns.png": (palette, {"transparency": 3}),
        "rgb-trns.png": (keyed, {"transparency": key}),
        "gray-trns.png": (gray, {"transparency": 100}),
        "gray-alpha.png": (cut_out.convert("LA"), {}),
        "rgba.png": (cut_out, {}),
        "rgba.webp": (cut_out, {"lossless": True}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "cmyk.tif": (rgb.convert("CMYK"), {}),
        "rotated.tif": (rgb, {"exif": rotated}),
        "rotated.jpg": (rgb, {"exif": rotated}),
        "wide.png": (rgb, {"icc_profile": wide_gamut()}),
        "large.jpg": (rgb.resize((900, 600)), {}),
        "bits.png": (gray.convert("1"), {}),
        "first.gif": (palette, {"save_all": True, "append_images": [palette.rotate(90)]}),
    }


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("name", in_memory())
def test_a_file_and_an_image_in_memory_have_the_same_pixels(tmp_path, name, fit) -> None:
    image, options = in_memory()[name]
    path = tmp_path / name
    image.save(path, **options)
    model = Model(Network(fit))  # type: ignore[arg-type]
    from_file, geometry = model._read(path)
    opened, same_geometry = model._read(Image.open(path))
    assert np.array_equal(from_file, opened)
    assert geometry == same_geometry
    loaded = Image.open(path)
    loaded.load()
    difference = np.abs(model._read(loaded)[0].astype(int) - from_file)
    if name == "large.jpg":  # from a file, a JPEG that is much too large is decoded at reduced size
        assert difference.mean() < 2
    elif name == "rotated.tif":  # once loaded, it was rotated by Pillow, before it is resized and not after that
        assert difference.mean() < 0.5
    else:
        assert difference.max() == 0
    assert image.tobytes() == in_memory()[name][0].tobytes()  # what the caller holds has not changed


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("a.png", noise((60, 90, 3))),
        ("a.png", noise((60, 90))),
        ("a.png", noise((60, 90, 4))),
        ("a.png", noise((60, 90), 0, 4096, np.uint16)),
        ("a.tif", noise((60, 90), 0, 4096).astype(np.float32) / 4095),
        ("a.tif", noise((60, 90), 0, 100_000, np.int32)),
    ],
)
def test_a_file_and_an_array_have_the_same_pixels(tmp_path, name, array) -> None:
    Image.fromarray(array).save(tmp_path / name)
    model = Model(Network("crop"))  # type: ignore[arg-type]
    assert np.array_equal(model._read(tmp_path / name)[0], model._read(array)[0])
    assert np.array_equal(
        decode(array[..., None] if array.ndim == 2 else array).image, read_image(tmp_path / name).pixels
    )


# ---- color profiles


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("color", [(200, 40, 40), (60, 160, 70), (128, 128, 128), (40, 90, 200)])
def test_a_wide_gamut_image_has_the_colors_that_a_viewer_shows(tmp_path, mode, color) -> None:
    stored = ImageCms.profileToProfile(
        Image.new("RGB", (32, 32), color), SRGB, ImageCms.ImageCmsProfile(io.BytesIO(wide_gamut())), renderingIntent=1
    )
    assert np.abs(np.array(stored)[0, 0].astype(int) - color).max() >= (0 if color[0] == color[1] else 10)
    image = stored.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else stored.convert(mode)
    image.save(tmp_path / "a.png", icc_profile=wide_gamut())
    assert np.abs(read_image(tmp_path / "a.png").pixels[16, 16].astype(int) - color).max() <= 2


def test_profiles_of_gray_and_cmyk_and_lab_are_applied(tmp_path) -> None:
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (8, 8), (200, 40, 40)), SRGB, ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    lab.save(tmp_path / "lab.tif")
    assert np.abs(read_image(tmp_path / "lab.tif").pixels[4, 4].astype(int) - (200, 40, 40)).max() <= 2


def test_an_srgb_profile_changes_nothing(tmp_path) -> None:
    pixels = noise((20, 30, 3))
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile_bytes(SRGB))
    assert np.array_equal(read_image(tmp_path / "a.png").pixels, pixels)
    assert decode(tmp_path / "a.png").notes == ()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_damaged_or_foreign_profile_is_ignored_with_a_note(tmp_path, mode) -> None:
    image = Image.fromarray(noise((20, 30, 3))).convert(mode)
    profiles = {"damaged": b"no profile at all" * 10, "cut": profile_bytes(SRGB)[:200]}
    if mode == "L":
        profiles["of RGB"] = profile_bytes(SRGB)
    for name, profile in profiles.items():
        image.save(tmp_path / "a.png", icc_profile=profile)
        stored = decode(tmp_path / "a.png")
        assert np.array_equal(np.array(stored.image), np.array(image.convert("RGB"))), name
        assert stored.notes == (PROFILE_NOTE,), name


# ---- depth


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_integers_of_every_depth_use_all_levels(tmp_path, bits) -> None:
    Image.fromarray((RAMP * (2**bits - 1)).round().astype(np.uint16)).save(tmp_path / "a.tif")
    pixels = read_image(tmp_path / "a.tif").pixels
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert len(np.unique(pixels)) == 256


@pytest.mark.parametrize(("top", "white"), [(1.0, 255), (1.02, 255), (255.0, 255), (260.0, 255), (65535.0, 255)])
def test_floats_with_a_slight_overshoot_use_all_levels(tmp_path, top, white) -> None:
    Image.fromarray((RAMP * top).astype(np.float32)).save(tmp_path / "a.tif")
    pixels = read_image(tmp_path / "a.tif").pixels
    assert pixels.max() == white
    assert len(np.unique(pixels)) == 256


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_colors_of_12_bits_in_a_16_bit_file_are_not_black(tmp_path, suffix) -> None:
    """Pillow keeps the upper 8 of 16 bits per color, which leaves 16 levels of them."""
    cv2 = pytest.importorskip("cv2")
    values = np.stack([RAMP * 4095, RAMP[::-1] * 4095, RAMP.T * 4095], axis=2).round().astype(np.uint16)
    path = str(tmp_path / f"a.{suffix}")
    cv2.imwrite(path, values[..., ::-1])
    pixels = read_image(path).pixels
    assert len(np.unique(pixels)) == 256
    assert np.abs(pixels.astype(float) - values / 4095 * 255).max() <= 0.51
    assert np.array_equal(read_image(Image.open(path)).pixels, pixels)
    assert np.array_equal(read_image(values, value_range=(0, 4095)).pixels, pixels)


def test_a_transparent_gray_of_16_bits_is_white(tmp_path) -> None:
    values = noise((20, 30), 0, 3000, np.uint16)
    values[:10] = 7
    Image.fromarray(values).save(tmp_path / "a.png", transparency=7)
    pixels = read_image(tmp_path / "a.png").pixels
    assert (pixels[:10] == 255).all()
    assert (pixels[10:] < 255).any()


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(-100, 70_000), st.integers(0, 70_000)), min_size=1, max_size=5),
    st.sampled_from(["integer", "float"]),
)
def test_the_range_holds_all_values(pairs, kind) -> None:
    levels = [Levels(kind, float(low), float(low + width)) for low, width in pairs]
    low, high = choose_range(levels)
    slack = 0.05 * high if kind == "float" else 0
    assert all(low - slack <= entry.low and entry.high <= high + slack for entry in levels)
    assert choose_range(levels[::-1]) == (low, high)


def deep_folder(root: Path, tops: tuple[float, ...], dtype: type = np.uint16) -> Path:
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for number, top in enumerate(tops * 3):
            values = np.random.default_rng((number, ord(label))).random((8, 8)) * top
            values[0, 0] = top
            Image.fromarray(values.astype(dtype)).save(root / label / f"{number}.tif")
    return root


def test_one_range_holds_for_a_data_set_and_is_kept_with_the_run(tmp_path, racnn, here) -> None:
    root = deep_folder(tmp_path / "data", (300, 4000, 1000, 4095))
    index = build_index(recipe.Data(path=str(root)), seed=0)
    assert index.value_range == (0.0, 4095.0)
    assert "24 image(s) have more than 8 bits: 0..4095 becomes 0..255" in "\n".join(index.notes)
    result = racnn("pretrain-cnn", "tiny", "--data", root, "--set", "data.augment.scale=1.0", "--out", "run")
    assert result.code == 0, result.err
    assert Run(here / "run").recipe().data.range == (0.0, 4095.0)
    assert Run(here / "run").recipe().data.path == str(root)
    dark = root / "a" / "0.tif"
    assert load("run").value_range == (0.0, 4095.0)
    assert read_image(dark, value_range=(0.0, 4095.0)).pixels.max() == round(300 / 4095 * 255)
    assert read_image(dark).pixels.max() == round(300 / 1023 * 255)


def test_integers_and_floats_in_one_data_set_are_refused(tmp_path) -> None:
    root = deep_folder(tmp_path / "data", (300, 4000))
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(root / "a" / "float.tif")
    with pytest.raises(DataError, match=r"0\.\.1 \(float\) and 0\.\.4095 \(integer\)") as caught:
        build_index(recipe.Data(path=str(root)), seed=0)
    assert "data.range" in caught.value.hint


def test_a_set_range_is_used_and_clipped_values_are_counted(tmp_path) -> None:
    root = deep_folder(tmp_path / "data", (300, 4000))
    index = build_index(recipe.Data(path=str(root), range=(0.0, 1023.0)), seed=0)
    assert index.value_range == (0.0, 1023.0)
    assert "6 image(s) have values outside data.range = [0.0, 1023.0], which were clipped" in index.notes
    stored = decode(root / "a" / "1.tif", value_range=(0.0, 1023.0))
    assert stored.notes == (CLIPPED_NOTE,)
    assert np.array(stored.image)[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("value", ["[5]", "[5, 5]", "[9, 1]", "[1, 2, 3]"])
def test_a_range_must_rise(value, racnn) -> None:
    result = racnn("recipes", "show", "own", "--set", f"data.range={value}")
    assert result.code == 2
    assert "two numbers that rise" in result.err


# ---- transparency, flat images, frames


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_that_is_zero_everywhere_is_no_transparency(tmp_path, mode) -> None:
    image = Image.fromarray(noise((20, 30, 3))).convert(mode)
    opaque = np.array(image.convert("RGB"))
    image.putalpha(0)
    for name in ("a.png", "a.tif"):
        image.save(tmp_path / name)
        stored = decode(tmp_path / name)
        assert np.array_equal(np.array(stored.image), opaque)
        assert stored.notes == (ALPHA_NOTE,)


def test_images_of_nearly_one_color_are_counted_and_named(tmp_path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(6):
            Image.fromarray(noise((9, 9, 3), number + 10 * ord(label))).save(tmp_path / label / f"{number}.png")
    Image.new("RGB", (9, 9), (0, 0, 90)).save(tmp_path / "a" / "blank.png")
    Image.fromarray(100 + noise((9, 9, 3), 3, 7)).save(tmp_path / "b" / "dim.png")
    notes = build_index(recipe.Data(path=str(tmp_path)), seed=0).notes
    assert any(note.startswith(f"2 image(s): {FLAT_NOTE}, such as ") for note in notes)
    assert check(tmp_path / "a" / "0.png").notes == ()


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_the_first_frame_of_an_animation_is_used_with_a_note(tmp_path, name) -> None:
    frames = [Image.new("RGB", (20, 12), color) for color in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    stored = decode(tmp_path / name)
    assert np.abs(np.array(stored.image)[5, 5].astype(int) - (200, 0, 0)).max() <= 3
    assert stored.notes == (PAGES_NOTE if name == "a.tif" else ANIMATION_NOTE,)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot read AVIF")
def test_avif_is_read_where_pillow_can(tmp_path) -> None:
    Image.new("RGB", (40, 24), (200, 40, 40)).save(tmp_path / "a.avif", quality=95)
    assert np.abs(read_image(tmp_path / "a.avif").pixels[9, 9].astype(int) - (200, 40, 40)).max() <= 6
