"""Files become RGB squares, boxes map back to the file, augmentation depends on (seed, epoch, position) only."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from racnn_cli import recipe
from racnn_cli.data.decode import check, read_image
from racnn_cli.data.geometry import Geometry, fit_square
from racnn_cli.data.images import ImageDataset, batches, plan
from racnn_cli.data.square import load_source
from racnn_cli.data.transforms import Augmentation, Placement
from racnn_cli.data.types import Item
from racnn_cli.errors import DataError

FITS = ("crop", "pad", "squash")
ORIENTATION = 0x0112


def data(fit: str = "crop", **augment: object) -> recipe.Data:
    return recipe.Data(path="unused", fit=fit, augment=recipe.Augment(**augment))  # type: ignore[arg-type]


def save(path: Path, pixels: np.ndarray, orientation: int = 1, **options: object) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth random colors (H, W, 3) uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


# ---- geometry


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    orientation=st.integers(1, 8),
    fit=st.sampled_from(FITS),
    side=st.integers(16, 512),
    square=st.tuples(st.floats(0.2, 0.8), st.floats(0.2, 0.8), st.floats(0.01, 0.2)),
)
def test_a_box_survives_the_round_trip_through_the_file(width, height, orientation, fit, side, square):
    tx, ty, tl = square
    box = (tx - tl, ty - tl, tx + tl, ty + tl)
    geometry = fit_square((width, height), orientation, fit, side)
    x0, y0, x1, y1 = geometry.to_file(box)
    assert 0 <= x0 <= x1 <= width
    assert 0 <= y0 <= y1 <= height
    back = geometry.from_file((x0, y0, x1 - x0, y1 - y0))
    left, top, right, bottom = geometry.to_upright(box)
    # A box that was clipped at the file's border does not survive.
    if min(left, top) > 0 and right < geometry.upright[0] and bottom < geometry.upright[1]:
        assert back == pytest.approx(box, abs=1e-6)
    assert geometry.upright_from_stored((x0, y0, x1, y1)) == pytest.approx((left, top, right, bottom))


def test_a_box_outside_the_centre_crop_has_no_area():
    geometry = fit_square((300, 100), 1, "crop", 64)
    x0, y0, x1, y1 = geometry.from_file((0, 10, 50, 20))
    assert (x1 - x0) * (y1 - y0) == 0


def test_x_runs_right_and_y_runs_down_in_a_rotated_file():
    # stored 200 x 100, to be rotated clockwise: the stored top left corner is the upright top right one
    geometry = Geometry(stored=(200, 100), orientation=6, origin=(0.0, 0.0), extent=(100.0, 200.0))
    assert geometry.upright == (100, 200)
    assert geometry.to_upright((0.8, 0, 1, 0.2)) == pytest.approx((80, 0, 100, 40))
    assert geometry.to_file((0.8, 0, 1, 0.2)) == pytest.approx((0, 0, 40, 20))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("fit", FITS)
def test_a_rectangle_in_the_file_maps_to_the_source_and_back(tmp_path, fit, suffix):
    """Draw in the stored file, find it in the source, map back: for each of the eight EXIF orientations."""
    side, (x, y, w, h) = 96, (330, 200, 90, 60)
    stored = np.full((480, 720, 3), 40, np.uint8)
    stored[y : y + h, x : x + w] = (250, 20, 20)
    for orientation in range(1, 9):
        options = {"quality": 95} if suffix in ("jpg", "webp") else {}
        path = save(tmp_path / f"{fit}-{orientation}.{suffix}", stored, orientation, **options)
        source, geometry = load_source(path, data(fit).fit, side)
        assert source.shape == (side, side, 3)
        assert geometry.stored == (720, 480)
        assert geometry.orientation == orientation
        share = (source[..., 0].astype(float) - 40).clip(0, 210) / 210  # (side, side)
        share[np.abs(source - 128.0).max(2) < 12] = 0  # gray borders
        share[share < 0.1] = 0
        rows, columns = share.sum(1), share.sum(0)
        center = ((np.arange(side) + 0.5) / side) @ np.stack([columns, rows], 1) / share.sum()
        x0, y0, x1, y1 = geometry.from_file((x, y, w, h))
        assert center == pytest.approx([(x0 + x1) / 2, (y0 + y1) / 2], abs=0.35 / side)
        assert share.sum() / side**2 == pytest.approx((x1 - x0) * (y1 - y0), rel=0.06)
        # a small square around the rectangle's center maps back to a square around the center in the file
        fx0, fy0, fx1, fy1 = geometry.to_file((*(center - 0.02), *(center + 0.02)))
        assert ((fx0 + fx1) / 2, (fy0 + fy1) / 2) == pytest.approx((x + w / 2, y + h / 2), abs=3.0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_the_standard_says(tmp_path, orientation):
    """Every orientation of one upright image reads as that image."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:4, :6] = (200, 0, 0)
    upright[-4:, :6] = (0, 200, 0)
    stored = {  # what a camera stores so that a viewer shows `upright`
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    for suffix in ("png", "tif", "webp"):
        options = {"lossless": True} if suffix == "webp" else {}
        path = save(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), orientation, **options)
        image = read_image(path)
        assert np.array_equal(image.pixels, upright)
        assert image.orientation == orientation
        assert image.stored_size == (stored.shape[1], stored.shape[0])


def test_padding_is_gray_and_cropping_takes_the_center(tmp_path):
    stripes = np.zeros((100, 300, 3), np.uint8)
    stripes[:, 100:200] = (0, 0, 255)
    path = save(tmp_path / "a.png", stripes)
    assert (load_source(path, data("crop").fit, 50)[0] == (0, 0, 255)).all(2).mean() > 0.95
    padded = load_source(path, data("pad").fit, 60)[0]
    assert (padded[:20] == 128).all()
    assert (padded[40:] == 128).all()
    assert (padded[30] == (0, 0, 255)).all(1).mean() == pytest.approx(1 / 3, abs=0.1)
    squashed = load_source(path, data("squash").fit, 60)[0]
    assert (squashed == (0, 0, 255)).all(2).mean() == pytest.approx(1 / 3, abs=0.1)


def test_shrinking_is_antialiased(tmp_path):
    checks = np.indices((512, 512)).sum(0) % 2 * 255
    path = save(tmp_path / "a.png", np.repeat(checks[..., None], 3, 2).astype(np.uint8))
    source = load_source(path, data().fit, 64)[0].astype(int)
    assert abs(source - 127).max() <= 3


def test_a_jpeg_decoded_at_reduced_size_looks_the_same(tmp_path):
    jpeg = save(tmp_path / "large.jpg", noise(1400, 2100), 6)
    assert read_image(jpeg, min_side=160).pixels.shape == (2100 // 8 + 1, 1400 // 8, 3)
    for height, width in ((1400, 2100), (250, 340)):  # much and slightly larger than needed
        fine = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        pixels = np.array(Image.fromarray(fine).resize((width, height), Image.Resampling.BICUBIC))
        jpeg = save(tmp_path / "a.jpg", pixels, 6, quality=98, subsampling=0)
        png = save(tmp_path / "a.png", pixels, 6)
        for fit in FITS:
            small, exact = (load_source(path, data(fit).fit, 80)[0].astype(int) for path in (jpeg, png))
            assert np.abs(small - exact).mean() < 3


# ---- image modes


def _modes() -> dict[str, tuple[Image.Image, tuple[int, int, int], str]]:
    """Name to image, expected color, suffix."""
    rgb = Image.new("RGB", (20, 12), (200, 100, 50))
    transparent = Image.new("RGBA", (20, 12), (0, 0, 0, 0))
    transparent.putpixel((0, 0), (0, 0, 0, 255))
    half = Image.new("RGBA", (20, 12), (0, 0, 0, 128))
    palette = Image.new("P", (20, 12), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette_alpha = palette.copy()
    palette_alpha.putpixel((0, 0), 0)
    palette_alpha.info["transparency"] = 1
    sixteen = Image.fromarray(np.full((12, 20), 32896, np.uint16))
    return {
        "rgb": (rgb, (200, 100, 50), "bmp"),
        "grey": (Image.new("L", (20, 12), 90), (90, 90, 90), "png"),
        "one bit": (Image.new("1", (20, 12), 1), (255, 255, 255), "png"),
        "palette": (palette, (10, 200, 30), "png"),
        "palette with a transparent color": (palette_alpha, (255, 255, 255), "png"),
        "transparent": (transparent, (255, 255, 255), "png"),
        "half transparent": (half, (127, 127, 127), "webp"),
        "grey and alpha": (Image.new("LA", (20, 12), (0, 128)), (127, 127, 127), "png"),
        "16 bit png": (sixteen, (128, 128, 128), "png"),
        "16 bit tiff": (sixteen, (128, 128, 128), "tif"),
        "float tiff": (Image.fromarray(np.full((12, 20), 0.5, np.float32)), (128, 128, 128), "tif"),
        "float tiff to 255": (Image.fromarray(np.full((12, 20), 90, np.float32)), (90, 90, 90), "tif"),
        "cmyk jpeg": (Image.new("CMYK", (20, 12), (0, 255, 255, 0)), (255, 0, 0), "jpg"),
        "cmyk tiff": (Image.new("CMYK", (20, 12), (0, 255, 255, 0)), (255, 0, 0), "tif"),
    }


@pytest.mark.parametrize("mode", _modes())
def test_every_mode_becomes_rgb(tmp_path, mode):
    image, color, suffix = _modes()[mode]
    path = tmp_path / f"a.{suffix}"
    image.save(path, **({"lossless": True} if suffix == "webp" else {}))
    pixels = read_image(path).pixels
    assert pixels.dtype == np.uint8
    assert pixels.shape == (12, 20, 3)
    assert np.abs(pixels[6, 10].astype(int) - color).max() <= 3
    assert load_source(path, data("pad").fit, 32)[0].shape == (32, 32, 3)


def test_sixteen_bits_keep_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)
    Image.fromarray(np.tile(ramp, (4, 1))).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png").pixels[0, :, 0], np.arange(256))


def test_the_content_decides_and_not_the_suffix(tmp_path):
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert tuple(read_image(tmp_path / "a.jpg").pixels[0, 0]) == (1, 2, 3)


# ---- errors


def _truncate(path: Path, share: float = 0.6) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    rough = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    path = _truncate(save(tmp_path / f"cut.{suffix}", rough))
    for read in (read_image, check):
        with pytest.raises(DataError, match=r"cut\.\w+ is (damaged|not a)"):
            read(path)


def test_a_truncated_progressive_jpeg_is_refused(tmp_path):
    path = _truncate(save(tmp_path / "cut.jpg", noise(400, 400), progressive=True))
    with pytest.raises(DataError, match="damaged or truncated"):
        check(path)


def test_a_file_that_is_not_an_image_gives_a_one_sentence_error(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "folder.jpg").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "raster.ppm")
    (tmp_path / "page.jpg").write_text("\n <!DOCTYPE html><html>not found</html>")
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    for name, reason in {
        "empty.jpg": "is empty (0 bytes)",
        "text.jpg": "is not a JPEG, PNG, WebP, BMP, TIFF or GIF image",
        "raster.ppm": "is not a JPEG, PNG, WebP, BMP, TIFF or GIF image",
        "page.jpg": "is an HTML page, as a failed download leaves it",
        "phone.jpg": "is a HEIC image, which needs the extra heif",
        "folder.jpg": "is not a regular file",
        "missing.jpg": "does not exist",
    }.items():
        with pytest.raises(DataError) as caught:
            read_image(tmp_path / name)
        assert caught.value.message == f"{tmp_path / name} {reason}"
        assert caught.value.hint


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 9_500)).save(path)
    with pytest.raises(DataError, match=r"bomb\.png is oversized"):
        read_image(path)


def test_a_name_with_escapes_is_printed_safely(tmp_path):
    path = tmp_path / "a\n\x1b[31mred.jpg"
    path.touch()
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert "\x1b" not in caught.value.message
    assert "\n" not in caught.value.message
    assert r"\x1b[31mred.jpg" in caught.value.message


# ---- training images


@pytest.fixture
def items(tmp_path):
    boxes = [(20.0, 10.0, 30.0, 20.0), None]
    return [Item(save(tmp_path / f"{n}.png", noise(60 + 3 * n, 90, seed=n)), n % 3, boxes[n % 2]) for n in range(11)]


def _epoch(images, **options) -> dict[str, torch.Tensor]:
    settings_ = {"batch": 4, "epoch": 0, "seed": 5, "shuffle": True, "workers": 0, **options}
    loaded = list(batches(images, **settings_))
    return {name: torch.cat([batch[name] for batch in loaded]) for name in loaded[0]}


def test_any_number_of_workers_loads_the_same_images(items):
    images = ImageDataset(items, data(scale=0.4, flip="both", rotate=25.0, color=0.5), 32, seed=3, augment=True)
    expected = _epoch(images, epoch=2)
    assert expected["image"].shape == (11, 3, 32, 32)
    assert expected["image"].dtype == torch.uint8
    for workers in (1, 3):
        loaded = _epoch(images, epoch=2, workers=workers)
        assert all(torch.equal(expected[name], loaded[name]) for name in ("image", "label", "index"))


def test_a_dataset_can_be_pickled_for_a_spawned_worker(items):
    images = ImageDataset(items, data(rotate=25.0), 32, seed=3, augment=True)
    assert torch.equal(pickle.loads(pickle.dumps(images))[(1, 2)]["image"], images[(1, 2)]["image"])


def test_a_loader_does_not_use_the_global_random_generator(items):
    images = ImageDataset(items, data(), 32, seed=3, augment=True)
    state = torch.get_rng_state()
    _epoch(images)
    assert torch.equal(state, torch.get_rng_state())


def test_augmentation_depends_on_seed_epoch_and_position_only(items):
    settings_ = data(scale=0.4, rotate=25.0, color=0.5)
    duplicates = [items[0], items[0]]
    images = ImageDataset(duplicates, settings_, 32, seed=3, augment=True)
    first = images[(0, 0)]["image"]
    different = [images[(0, 1)], images[(1, 0)], ImageDataset(duplicates, settings_, 32, seed=4, augment=True)[(0, 0)]]
    assert all(not torch.equal(first, sample["image"]) for sample in different)
    assert torch.equal(first, images[(0, 0)]["image"])


def test_each_transform_has_its_own_random_stream(items):
    """The flip must not depend on the crop: it is as frequent among wide as among narrow crops."""
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, 64)  # redder to the right
    path = save(items[0].path, ramp)
    images = ImageDataset([Item(path, 0, None)], data(scale=0.3, rotate=0.0, color=0.0), 32, seed=1, augment=True)
    spans = [
        image[0, :, -1].float().mean() - image[0, :, 0].float().mean()
        for image in (images[(epoch, 0)]["image"] for epoch in range(200))
    ]
    width, flipped = np.abs(spans), np.array(spans) < 0
    assert 0.35 < flipped.mean() < 0.65
    narrow = width < np.median(width)
    assert abs(flipped[narrow].mean() - flipped[~narrow].mean()) < 0.25


def test_a_crop_keeps_its_share_and_disabled_augmentation_does_nothing(tmp_path):
    ramp = np.zeros((200, 200, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 200), np.linspace(0, 255, 200)[:, None]
    items = [Item(save(tmp_path / "a.png", ramp), 0, None)]
    for fit in FITS:
        disabled = ImageDataset(
            items, data(fit, scale=1.0, flip="none", rotate=0.0, color=0.0), 64, seed=0, augment=True
        )
        plain = ImageDataset(items, data(fit), 64, seed=0, augment=False)
        assert torch.equal(disabled[(0, 0)]["image"], plain[(0, 0)]["image"])
        cropped = ImageDataset(
            items, data(fit, scale=0.5, flip="none", rotate=0.0, color=0.0), 64, seed=0, augment=True
        )
        shares = []
        for epoch in range(40):
            image = cropped[(epoch, 0)]["image"].float()
            shares.append(float((image[0, 0, -1] - image[0, 0, 0]) * (image[1, -1, 0] - image[1, 0, 0])) / 255**2)
        assert min(shares) > 0.45
        assert min(shares) < 0.7 < max(shares)


def test_flip_none_horizontal_both(tmp_path):
    corner = np.zeros((40, 40, 3), np.uint8)
    corner[:10, :10] = 255
    items = [Item(save(tmp_path / "a.png", corner), 0, None)]

    def positions(flip: str) -> set[tuple[int, int]]:
        dataset = ImageDataset(items, data(scale=1.0, flip=flip, rotate=0.0, color=0.0), 40, seed=0, augment=True)
        images = [dataset[(epoch, 0)]["image"][0] for epoch in range(40)]
        return {divmod(int(image.flatten().argmax()), 40) for image in images}

    assert positions("none") == {(0, 0)}
    assert positions("horizontal") == {(0, 0), (0, 30)}
    assert positions("both") == {(0, 0), (0, 30), (30, 0), (30, 30)}


def test_boxes_are_shares_of_the_source(items):
    plain = ImageDataset(items, data("squash"), 32, seed=0, augment=False)
    assert plain[(0, 0)]["box"].tolist() == pytest.approx([20 / 90, 10 / 60, 50 / 90, 30 / 60])
    assert plain[(0, 1)]["box"].isnan().all()
    augmented = ImageDataset(items, data("squash"), 32, seed=0, augment=True)
    assert augmented[(0, 1)]["box"].isnan().all()
    assert plain[(7, 4)]["index"] == 4
    assert plain[(7, 4)]["label"] == 1


@pytest.mark.parametrize(
    "settings_",
    [
        data(color=0.0),
        data("pad", flip="both", rotate=45.0, color=0.0),
        data("squash", flip="both", rotate=20.0, color=0.0),
        data("crop", scale=1.0, rotate=45.0, color=0.0),
    ],
    ids=["crop", "pad", "squash", "whole"],
)
def test_a_box_is_augmented_with_its_image(tmp_path, settings_):
    """A white disc on black: the box must be where the augmented image is bright."""
    rows, columns = np.mgrid[:180, :120] + 0.5
    pixels = np.zeros((180, 120, 3), np.uint8)
    pixels[np.hypot(rows - 80, columns - 54) < 22] = 255
    stored = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)  # upright once it is turned back
    exif = Image.Exif()
    exif[274] = 6
    stored.save(tmp_path / "white.png", exif=exif)
    items = [Item(tmp_path / "white.png", 0, (80 - 22, 120 - 54 - 22, 44, 44))]
    images = ImageDataset(items, settings_, 96, seed=1, augment=True)
    seen = []
    for epoch in range(30):
        sample = images[(epoch, 0)]
        bright = sample["image"][0].numpy() > 150
        down, right = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
        corners = np.array([right[0], down[0], right[-1] + 1, down[-1] + 1]) / 96
        # The box around a rotated square box is larger than the disc in it, but has its center.
        box = sample["box"].numpy()
        inside = (corners > 0.02).all() and (corners < 0.98).all()
        if inside:
            np.testing.assert_allclose((box[:2] + box[2:]) / 2, (corners[:2] + corners[2:]) / 2, atol=1.2 / 96)
        assert (box[:2] <= corners[:2] + 1.5 / 96).all()
        assert (box[2:] >= corners[2:] - 1.5 / 96).all()
        seen.append(corners)
    assert np.ptp(seen, axis=0).min() > 0.03


def test_a_box_outside_of_the_crop_is_nan():
    placement = Placement(center=(50.0, 50.0), size=(20.0, 20.0))
    assert placement.apply((40, 40, 60, 60)) == (0, 0, 1, 1)
    assert placement.apply((45, 40, 50, 60)) == (0.25, 0, 0.5, 1)
    x0, _, x1, _ = placement.apply((70, 45, 90, 55))
    assert x0 == x1 == 1
    turned = Placement(center=(50.0, 50.0), size=(20.0, 20.0), flip=True, turns=1)
    pixels = np.zeros((20, 20), int)
    pixels[2:5, 10:18] = 1  # y 42 to 45, x 50 to 58
    rows, columns = np.nonzero(np.rot90(pixels[:, ::-1], 1))
    expected = columns.min() / 20, rows.min() / 20, (columns.max() + 1) / 20, (rows.max() + 1) / 20
    assert turned.apply((50, 42, 58, 45)) == pytest.approx(expected)


def sharpness(image: torch.Tensor) -> float:
    """Energy of the Laplacian, away from the borders."""
    values = image.float().mean(dim=0)
    laplacian = 4 * values[1:-1, 1:-1] - values[:-2, 1:-1] - values[2:, 1:-1] - values[1:-1, :-2] - values[1:-1, 2:]
    return laplacian[20:-20, 20:-20].square().mean().item()


@pytest.mark.parametrize("ratio", [1.0, 1.3, 2.0, 5.0])
@pytest.mark.parametrize("fit", FITS)
def test_training_images_are_as_sharp_as_those_of_evaluation(tmp_path, ratio, fit):
    """One resampling with the same kernel. Resizing and then rotating had left two thirds of this energy."""
    generator = np.random.default_rng(0)
    side = round(128 * ratio)
    noise = generator.standard_normal((side, side))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    texture = np.fft.ifft2(np.fft.fft2(noise) / (frequency + 0.02)).real  # like that of photographs
    texture = np.clip(128 + 40 * texture / texture.std(), 0, 255).astype(np.uint8)
    Image.fromarray(np.stack([texture] * 3, axis=2)).save(tmp_path / "a.png")
    items = [Item(tmp_path / "a.png", 0, None)]
    expected = sharpness(ImageDataset(items, data(fit), 128, seed=0, augment=False)[(0, 0)]["image"])
    images = ImageDataset(items, data(fit, scale=1.0, rotate=20.0, color=0.0), 128, seed=0, augment=True)
    energies = [sharpness(images[(epoch, 0)]["image"]) / expected for epoch in range(12)]
    assert sum(abs(energy - 1) < 1e-9 for energy in energies) >= 2  # not rotated
    # An image of the output's own size is not resampled at all in evaluation, and has no resolution to spare here.
    assert min(energies) > (0.75 if ratio == 1 else 0.85)
    assert np.mean(energies) == pytest.approx(1, abs=0.2 if ratio == 1 else 0.1)


def test_erasing_replaces_a_rectangle_in_its_share_of_the_images(items):
    keys = {"scale": 1.0, "flip": "none", "rotate": 0.0, "color": 0.0}
    images = ImageDataset(items, data(erase=0.5, **keys), 64, seed=0, augment=True)
    plain = ImageDataset(items, data(**keys), 64, seed=0, augment=True)
    shares = []
    for epoch in range(60):
        changed = (images[(epoch, 0)]["image"] != plain[(epoch, 0)]["image"]).any(dim=0)
        if changed.any():
            rows, columns = changed.any(dim=1).nonzero(), changed.any(dim=0).nonzero()
            area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert changed.sum() > 0.95 * area  # a rectangle
            shares.append(area.item() / 64**2)
    assert 15 < len(shares) < 45
    assert min(shares) > 0.015
    assert max(shares) < 0.36


def test_half_of_the_images_are_rotated():
    augmentation = Augmentation(data(rotate=10.0), 64)
    placements = [augmentation.place((100, 80), np.random.default_rng(number)) for number in range(400)]
    angles = np.array([placement.angle for placement in placements])
    assert 0.4 < (angles != 0).mean() < 0.6
    assert np.abs(angles).max() < math.radians(10)
    for placement in placements:
        x0, y0, x1, y1 = placement.rect
        assert min(x0, y0, 100 - x1, 80 - y1) > -1e-9
        assert (x1 - x0) * (y1 - y0) >= 0.6 * 100 * 80 - 1e-6
        assert 0.74 < (x1 - x0) / (y1 - y0) < 1.34


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes_during_training_is_one_clear_error(items, workers):
    images = ImageDataset(items, data(), 32, seed=0, augment=False)
    items[6].path.unlink()
    with pytest.raises(DataError) as caught:
        _epoch(images, workers=workers)
    assert caught.value.message == f"{items[6].path} does not exist"


# ---- order


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(count=st.integers(1, 60), batch=st.integers(1, 9), world=st.integers(1, 5), epoch=st.integers(0, 3))
def test_the_order_of_an_epoch(count, batch, world, epoch):
    def shares(shuffle: bool) -> list[list[list[int]]]:
        options = {"batch": batch, "epoch": epoch, "seed": 1, "shuffle": shuffle}
        return [plan(count, rank=rank, world=world, **options) for rank in range(world)]

    evaluated = [position for rank in shares(False) for step in rank for position in step]
    assert sorted(evaluated) == list(range(count))
    trained = shares(True)
    assert len({len(rank) for rank in trained}) == 1
    assert all(1 <= len(step) <= batch + (batch > 1 and 2) for rank in trained for step in rank)
    assert all(len(step) <= batch for rank in trained for step in rank[:-1])
    single = any(len(step) == 1 for rank in trained for step in rank)
    assert single == (batch == 1 or count < 2 * world)
    loaded = [position for rank in trained for step in rank for position in step]
    assert set(loaded) == set(range(count))
    assert len(loaded) - count < world


@pytest.mark.parametrize(
    ("count", "batch", "world", "sizes"),
    [
        (25, 24, 1, [[25]]),
        (26, 24, 1, [[24, 2]]),
        (25, 8, 1, [[8, 8, 9]]),
        (9, 2, 2, [[2, 3], [2, 2]]),
        (11, 4, 2, [[6], [5]]),
        (19, 4, 2, [[4, 6], [4, 5]]),
        (3, 4, 2, [[2], [1]]),
        (1, 4, 2, [[1], [1]]),
        (3, 1, 1, [[1, 1, 1]]),
        (3, 1, 2, [[1, 1], [1, 1]]),
    ],
)
def test_a_last_batch_of_one_image_joins_the_one_before(count, batch, world, sizes):
    options = {"batch": batch, "epoch": 2, "seed": 5, "world": world}
    ranks = [plan(count, rank=rank, shuffle=True, **options) for rank in range(world)]
    assert [[len(step) for step in steps] for steps in ranks] == sizes
    order = plan(count, batch=count, epoch=2, seed=5, shuffle=True)[0]
    joined = [
        step[position]
        for steps in zip(*ranks, strict=True)
        for position in range(batch + 2)
        for step in steps
        if position < len(step)
    ]
    assert joined[:count] == order
    plain = [[len(step) for step in plan(count, rank=rank, shuffle=False, **options)] for rank in range(world)]
    assert sum(map(sum, plain)) == count
    assert max(map(max, filter(None, plain))) <= batch


def test_several_processes_divide_the_order_of_one(items):
    images = ImageDataset(items, data(), 32, seed=0, augment=False)
    steps = plan(11, batch=4, epoch=3, seed=5, shuffle=True)
    halves = [_epoch(images, batch=2, epoch=3, rank=rank, world=2)["index"].tolist() for rank in (0, 1)]
    assert sorted(halves[0][:2] + halves[1][:2]) == sorted(steps[0])
    assert _epoch(images, epoch=3)["index"].tolist() == [position for step in steps for position in step]
    assert plan(11, batch=4, epoch=4, seed=5, shuffle=True) != steps != plan(11, batch=4, epoch=3, seed=6, shuffle=True)


def test_an_epoch_continues_in_the_middle(items):
    images = ImageDataset(items, data(), 32, seed=0, augment=True)
    full, rest = _epoch(images, epoch=1), _epoch(images, epoch=1, skip=2)
    assert torch.equal(full["image"][8:], rest["image"])
    options = {"batch": 4, "epoch": 1, "seed": 5, "shuffle": True, "workers": 2}
    assert len(batches(images, skip=1, **options)) == 2
    assert list(batches(images, skip=3, **options)) == []


def test_prediction_does_not_import_albumentations():
    code = "import sys, racnn_cli.data.images; sys.exit('albumentations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
