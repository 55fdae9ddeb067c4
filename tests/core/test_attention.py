"""Boxes, APN and crop: axes, identity, gradients, bounds, composition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from racnn_cli.core import attention
from racnn_cli.core.attention import APN, compose, peak_target, relative, zoom

FRACTIONS = st.floats(0.0, 1.0)


def boxes_in(count: int, seed: int, low: float = 0.15, high: float = 0.4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = low + (high - low) * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    centre = half + (1 - 2 * half) * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return torch.cat([centre, half], dim=1)


def smooth_images(count: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, rows // 6, columns // 6, generator=generator, dtype=torch.float64)
    return F.interpolate(coarse, (rows, columns), mode="bicubic", align_corners=False)


@pytest.mark.parametrize(
    ("gradient", "k"), [("exact", 0.5), ("exact", 2.0), ("exact", math.inf), ("bilinear", math.inf)]
)
@pytest.mark.parametrize("size", [7, 23])  # smaller and larger than the box
def test_gradcheck(gradient, k, size) -> None:
    channels = 3 if size == 7 else 1  # the larger crop has ten times as many pixels to differentiate
    images = smooth_images(2, 18, 24)[:, :channels]
    boxes = boxes_in(2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: zoom(images, b, size, k=k, gradient=gradient), (boxes,))


def reference_crop(images: Tensor, boxes: Tensor, size: int, k: float) -> Tensor:
    """A slow reference for `zoom`: all pixels of both axes, one output pixel at a time."""
    crops = []
    for image, (x, y, half) in zip(images, boxes, strict=True):
        axes = []
        for centre, length in ((x, image.shape[2]), (y, image.shape[1])):
            low, high = (centre - half) * length, (centre + half) * length
            step = (high - low) / size
            width = step if step > 1 else torch.ones_like(step)
            pixel = torch.arange(length, dtype=image.dtype) + 0.5
            rows = []
            for number in range(size):
                distance = (pixel - (low + (number + 0.5) * step)).abs() / width
                weight = torch.where(distance < 1, 1 - distance, torch.zeros_like(distance))
                rows.append(weight / weight.sum())
            weights = torch.stack(rows)  # (size, length)
            if k != math.inf:
                weights = weights * (1 / (1 + (-k * (pixel - low)).exp()) - 1 / (1 + (-k * (pixel - high)).exp()))
            axes.append(weights)
        crops.append(torch.einsum("chw,ih,jw->cij", image, axes[1], axes[0]))
    return torch.stack(crops)


CORNERS = [[0.1, 0.1, 0.1], [0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.9, 0.9, 0.1]]
SMALL_BOXES = {
    "inside": [[0.413, 0.587, 0.071], [0.62, 0.31, 0.093]],
    "in the corners": CORNERS,
    "less than a pixel": [[0.51, 0.49, 0.004], [0.003, 0.997, 0.003]],
    "of different sizes": [[0.513, 0.488, 0.021], [0.303, 0.701, 0.203], [0.951, 0.049, 0.049]],
    "on pixel borders": [[0.25, 0.25, 0.125], [0.5, 0.5, 0.25]],
    "nearly the full image": [[0.5, 0.5, 0.45], [0.5, 0.5, 0.5]],
}


@pytest.mark.parametrize("k", [0.5, 3.0, math.inf])
@pytest.mark.parametrize("size", [3, 9, 31])  # reduced, about the same, enlarged
@pytest.mark.parametrize("shape", [(40, 40), (24, 56), (56, 24), (5, 64)])
@pytest.mark.parametrize("kind", SMALL_BOXES)
def test_crop_matches_the_reference(kind, shape, size, k) -> None:
    """Values, and gradients with respect to the image and the box, however little of the image is read."""
    generator = torch.Generator().manual_seed(7)
    boxes = torch.tensor(SMALL_BOXES[kind], dtype=torch.float64).requires_grad_()
    images = torch.randn(len(boxes), 3, *shape, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(len(boxes), 3, size, size, generator=generator, dtype=torch.float64)
    crop, expected = zoom(images, boxes, size, k=k), reference_crop(images, boxes, size, k)
    torch.testing.assert_close(crop, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((c * weights).sum(), (images, boxes)) for c in (crop, expected)]
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=0, atol=1e-12)
    if kind != "on pixel borders":  # where |x| has no derivative
        torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.005, 0.3), st.integers(8, 60), st.integers(8, 60), st.integers(1, 24))
def test_crop_of_any_small_box_matches_the_reference(seed, half, rows, columns, size) -> None:
    images = torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    boxes = boxes_in(2, seed, half / 3, half)
    for k in (0.5, math.inf):
        torch.testing.assert_close(
            zoom(images, boxes, size, k=k), reference_crop(images, boxes, size, k), rtol=0, atol=1e-12
        )


def test_crop_reads_only_pixels_near_the_boxes() -> None:
    """It reads the box, a margin, and what the largest box of the batch needs; pixels far away may be NaN."""
    image = torch.full((2, 3, 60, 90), math.nan)
    image[0, :, 10:40, 20:60] = 1.0  # (rows, columns) around the first box
    image[1, :, 35:60, 55:90] = 2.0
    boxes = torch.tensor([[35 / 90, 20 / 60, 0.1], [78 / 90, 52 / 60, 0.13]], requires_grad=True)
    crop = zoom(image, boxes, 16, k=math.inf)
    torch.testing.assert_close(crop, torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 3, 16, 16))
    (gradient,) = torch.autograd.grad(crop.sum(), boxes)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("gradient", "k"), [("exact", 0.5), ("exact", 2.0), ("exact", math.inf), ("bilinear", math.inf)]
)
@pytest.mark.parametrize("size", [4, 13])  # smaller and larger than the box
def test_gradcheck_of_small_boxes(gradient, k, size) -> None:
    images = smooth_images(2, 36, 48)[:, : 3 if size == 4 else 1]
    boxes = boxes_in(2, seed=8, low=0.05, high=0.11)  # at most 11 of 48 columns and the margin
    boxes[1, 0] = boxes[1, 2] + 1e-3  # at the image's border
    boxes.requires_grad_()
    assert torch.autograd.gradcheck(lambda b: zoom(images, b, size, k=k, gradient=gradient), (boxes,))


@pytest.mark.parametrize("half", [0.1, 0.45])
def test_nan_boxes_give_nan_crops(half) -> None:
    """The crop must not raise, because the training loop reports which loss was not finite."""
    boxes = torch.tensor([[0.5, 0.5, half], [math.nan, math.nan, math.nan]])
    crop = zoom(torch.ones(2, 3, 64, 64), boxes, 8, k=math.inf)
    torch.testing.assert_close(crop[0], torch.ones(3, 8, 8))
    assert crop[1].isnan().all()


def test_gradient_reaches_the_image() -> None:
    images = smooth_images(1, 18, 24).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: zoom(x, boxes_in(1, seed=2), 9, k=0.5), (images,))


def test_the_exact_gradient_is_the_sum_of_the_others() -> None:
    images, boxes = smooth_images(3, 30, 30), boxes_in(3, seed=3)
    parts = {}
    for gradient in ("exact", "boxcar", "bilinear", "none"):
        variable = boxes.clone().requires_grad_()
        crop = zoom(images, variable, 12, k=0.7, gradient=gradient)
        if gradient == "none":
            assert not crop.requires_grad
        else:
            parts[gradient] = torch.autograd.grad(crop.square().sum(), variable)[0]
    # By the product rule.
    torch.testing.assert_close(parts["exact"], parts["boxcar"] + parts["bilinear"])
    assert (parts["boxcar"] - parts["bilinear"]).abs().max() > 1e-3


@pytest.mark.parametrize("k", [0.5, 3.0, math.inf])
def test_values_do_not_depend_on_the_gradient(k) -> None:
    images, boxes = smooth_images(2, 24, 24).float(), boxes_in(2, seed=4).float()
    crops = [zoom(images, boxes, 10, k=k, gradient=g) for g in ("exact", "boxcar", "bilinear", "none")]
    assert all(torch.equal(crops[0], crop) for crop in crops[1:])


def test_x_points_right_and_y_points_down() -> None:
    # 12 rows, 20 columns, one bright pixel at row 3, column 15.
    image = torch.zeros(1, 3, 12, 20)
    image[:, :, 3, 15] = 1
    box = torch.tensor([[15.5 / 20, 3.5 / 12, 0.2]])
    crop = zoom(image, box, 11, k=math.inf)
    peak = int(crop[0, 0].flatten().argmax())
    assert (peak // 11, peak % 11) == (5, 5)
    # When the box moves right, the spot moves left in the crop; when it moves down, the spot moves up.
    right = zoom(image, box + torch.tensor([[0.05, 0.0, 0.0]]), 11, k=math.inf)[0, 0]
    down = zoom(image, box + torch.tensor([[0.0, 0.05, 0.0]]), 11, k=math.inf)[0, 0]
    columns, rows = torch.arange(11.0), torch.arange(11.0)
    assert (right.sum(0) * columns).sum() / right.sum() < 4.5
    assert (down.sum(1) * rows).sum() / down.sum() < 4.5
    # A corner of a non-square image: the top right quarter.
    ramp = torch.arange(240.0).view(1, 1, 12, 20).expand(1, 3, 12, 20)
    quarter = zoom(ramp, torch.tensor([[0.75, 0.25, 0.25]]), 10, k=math.inf)
    assert quarter[0, 0, 0, -1] == pytest.approx(19.0, abs=3)
    assert quarter[0, 0, -1, 0] == pytest.approx(10 + 5 * 20, abs=6)


def test_the_full_box_is_the_identity() -> None:
    image = torch.randn(2, 3, 17, 17)
    assert torch.equal(zoom(image, attention.full_box(image), 17, k=math.inf), image)


def test_enlarging_is_bilinear_interpolation() -> None:
    image = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    crop = zoom(image, torch.tensor([[0.5, 0.5, 0.5]], dtype=torch.float64), 40, k=math.inf)
    torch.testing.assert_close(crop, F.interpolate(image, (40, 40), mode="bilinear", align_corners=False))


def test_reducing_is_antialiased() -> None:
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    crop = zoom(image, torch.tensor([[0.5, 0.5, 0.5]], dtype=torch.float64), 16, k=math.inf)
    torch.testing.assert_close(crop, F.interpolate(image, (16, 16), mode="bilinear", antialias=True))
    stripes = (torch.arange(64) % 2).to(torch.float64).expand(1, 3, 64, 64)
    grey = zoom(stripes, torch.tensor([[0.47, 0.5, 0.45]], dtype=torch.float64), 14, k=math.inf)
    assert (grey - 0.5).abs().max() < 0.04  # without the wider triangle: stripes of 0 and 1


def test_mask_is_half_at_the_border_and_a_step_for_large_k() -> None:
    centre, half = torch.tensor([0.5]), torch.tensor([0.25])
    mask = attention.boxcar(centre, half, 40, 0.5)[0]
    assert mask[9:11].mean() == pytest.approx(0.5, abs=1e-3)
    assert mask[20] > 0.98
    assert mask[0] < 0.02
    step = attention.boxcar(centre, half, 40, 50.0)[0]
    assert torch.allclose(step, torch.tensor([0.0] * 10 + [1.0] * 20 + [0.0] * 10), atol=1e-6)


def real_image() -> Tensor:
    """A photograph-like image without a download: the drawn birds of this package, 160 px."""
    from racnn_cli.data.datasets.fieldguide import draw

    images = [torch.from_numpy(draw(label, size=160, seed=3, index=label)[0].copy()) for label in range(4)]
    return torch.stack(images).permute(0, 3, 1, 2).double() / 255 - 0.5


def test_gradient_sign_agrees_with_central_differences_on_images() -> None:
    """Central differences over ±6 px; agreement must be well above chance."""
    images = real_image().repeat(8, 1, 1, 1)
    boxes = boxes_in(32, seed=5)
    weights = smooth_images(1, 48, 48, seed=6)

    def score(b: Tensor) -> Tensor:
        return (zoom(images, b, 48, k=0.5, gradient="exact") * weights).mean(dim=(1, 2, 3))

    variable = boxes.clone().requires_grad_()
    gradient = torch.autograd.grad(score(variable).sum(), variable)[0]
    agreement = []
    for axis in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[axis] = 6 / 160
        difference = score(boxes + step) - score(boxes - step)
        agreement.append(float((difference.sign() == gradient[:, axis].sign()).double().mean()))
    assert min(agreement) >= 0.75, agreement


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1e6, 1e6), st.floats(1e-3, 1e4))
def test_every_proposal_is_a_box_inside_the_image(seed, bias, spread) -> None:
    torch.manual_seed(seed)
    floor, ceiling = 1 / 3, 0.9
    apn = APN((4, 3, 5), 8, floor=floor, ceiling=ceiling)
    boxes = apn.to_box(torch.randn(16, 3) * spread + bias)
    check_boxes(boxes, floor, ceiling)
    check_boxes(apn(torch.randn(6, 4, 3, 5) * spread), floor, ceiling)


def check_boxes(boxes: Tensor, floor: float, ceiling: float) -> None:
    assert torch.isfinite(boxes).all()
    side, tolerance = 2 * boxes[:, 2], 1e-6
    assert side.min() >= floor - tolerance
    assert side.max() <= ceiling + tolerance
    assert (boxes[:, :2] - boxes[:, 2:]).min() >= -tolerance
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 1 + tolerance


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("bias", [0.0, 100.0, -1e4])
def test_every_parameter_keeps_a_gradient_at_extreme_activations(size, bias) -> None:
    torch.manual_seed(0)
    apn = APN((6, 4, 4), 16, floor=1 / 3, ceiling=0.95)
    with torch.no_grad():
        apn.hidden.weight.mul_(1 + abs(bias))
        apn.box.bias.add_(bias)
    apn((torch.rand(5, 6, 4, 4) + 0.1) * size).sum().backward()
    for name, parameter in apn.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        # Each row belongs to one unit, and none may lose its gradient.
        assert (parameter.grad.flatten(1) if parameter.grad.ndim > 1 else parameter.grad[:, None]).abs().sum(
            1
        ).min() > 0, name


def test_an_untrained_apn_proposes_the_centre_with_half_the_side() -> None:
    torch.manual_seed(1)
    boxes = APN((8, 7, 7), 32, floor=1 / 3, ceiling=0.95)(torch.rand(64, 8, 7, 7))
    torch.testing.assert_close(boxes.mean(0), torch.tensor([0.5, 0.5, 0.25]), atol=0.03, rtol=0)


def test_an_apn_can_learn_the_peak_target_everywhere() -> None:
    """The target's side is one half (tl = 1/4); the corners are included."""
    torch.manual_seed(2)
    features = torch.zeros(4, 3, 6, 8)
    for row, (y, x) in enumerate([(0, 0), (5, 7), (0, 7), (3, 2)]):
        features[row, :, y, x] = 1
    target = peak_target(features, 0.5)
    corners = [[0.25, 0.25, 0.25], [0.75, 0.75, 0.25], [0.75, 0.25, 0.25], [2.5 / 8, 3.5 / 6, 0.25]]
    torch.testing.assert_close(target, torch.tensor(corners))
    apn = APN((3, 6, 8), 64, floor=1 / 3, ceiling=0.95)
    optimizer = torch.optim.Adam(apn.parameters(), lr=3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        F.smooth_l1_loss(apn(features), target, beta=0.05).backward()
        optimizer.step()
    assert (apn(features) - target).abs().max() < 0.03


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_composed_boxes_match_nested_crops(seed) -> None:
    image = torch.linspace(0, 1, 90, dtype=torch.float64).expand(2, 3, 90, 90).clone()
    image[:, 1] = image[:, 1].transpose(1, 2)
    first, second = boxes_in(2, seed), boxes_in(2, seed + 1)
    nested = zoom(zoom(image, first, 90, k=math.inf), second, 20, k=math.inf)
    direct = zoom(image, compose(first, second), 20, k=math.inf)
    assert (nested - direct)[..., 1:-1, 1:-1].abs().max() < 0.005
    full = torch.full((2, 3), 0.5, dtype=torch.float64)
    torch.testing.assert_close(compose(full, second), second)
    torch.testing.assert_close(compose(first, full), first)
    torch.testing.assert_close(relative(first, compose(first, second)), second)
    third = boxes_in(2, seed + 2)
    torch.testing.assert_close(compose(compose(first, second), third), compose(first, compose(second, third)))


@settings(max_examples=50, deadline=None)
@given(FRACTIONS, FRACTIONS, st.floats(0.01, 0.9), st.floats(0.0, 1.0))
def test_jittered_and_bounded_boxes_are_valid(x, y, half, amount) -> None:
    box = torch.tensor([[x, y, half]])
    check_boxes(attention.bound(box, 1 / 3, 0.9), 1 / 3, 0.9)
    check_boxes(attention.jitter(box, amount, 1 / 3, 0.9), 1 / 3, 0.9)


@pytest.mark.parametrize(("amount", "tighten"), [(0.2, 0.6), (0.0, 1.0), (0.3, 0.0)])
def test_tighten_shrinks_boxes_by_its_amount(amount, tighten) -> None:
    torch.manual_seed(5)
    box = torch.tensor([[0.5, 0.5, 0.15]], dtype=torch.float64)
    jittered = attention.jitter(box.expand(4000, 3), amount, 0.01, 0.99, tighten)
    scale = (jittered[:, 2] / 0.15).log()  # uniform between -amount - tighten and amount
    low, high = -amount - tighten, amount
    assert scale.min() >= low - 1e-9
    assert scale.max() <= high + 1e-9
    assert scale.min() < low + 0.01
    assert scale.max() > high - 0.01
    assert scale.mean().item() == pytest.approx(-tighten / 2, abs=0.02)
    shift = (jittered[:, :2] - 0.5) / 0.15  # in half-sides of the original box
    assert shift.abs().max() <= amount + 1e-9
    assert shift.abs().max() >= 0.98 * amount


@settings(max_examples=50, deadline=None)
@given(FRACTIONS, FRACTIONS, st.floats(0.01, 0.9), st.floats(0.0, 1.0), st.floats(0.0, 2.0))
def test_tightened_boxes_are_valid(x, y, half, amount, tighten) -> None:
    check_boxes(attention.jitter(torch.tensor([[x, y, half]]), amount, 1 / 3, 0.9, tighten), 1 / 3, 0.9)


def test_an_apn_refuses_contradicting_bounds() -> None:
    for floor, side, ceiling in ((0.5, 0.4, 0.9), (0.5, 0.95, 0.9), (0.5, 0.5, 0.5), (0.0, 0.5, 0.9)):
        with pytest.raises(ValueError, match="floor <= side <= ceiling"):
            APN((4, 3, 3), 8, floor=floor, ceiling=ceiling, side=side)


def test_zoom_refuses_wrong_shapes_and_unknown_gradients() -> None:
    with pytest.raises(ValueError, match="images"):
        zoom(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3), 4)
    with pytest.raises(ValueError, match="boxcar"):
        zoom(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3), 4, gradient="both")


def test_an_apn_generalizes_from_few_images() -> None:
    """The APN must not overfit a small data set: 48 images, 60 channels."""
    torch.manual_seed(3)
    pattern = torch.rand(60, generator=torch.Generator().manual_seed(9))

    def draw(count: int) -> tuple[Tensor, Tensor]:
        features = torch.rand(count, 60, 7, 7)
        cells = torch.randint(0, 49, (count,))
        for image, cell in enumerate(cells):
            features[image, :, cell // 7, cell % 7] += 3 * pattern
        target = torch.stack([(cells % 7 + 0.5) / 7, (cells // 7 + 0.5) / 7, torch.full((count,), 0.25)], dim=1)
        return features, attention.bound(target, 0.5, 0.5)

    (features, target), (test_features, truth) = draw(48), draw(200)
    apn = APN((60, 7, 7), 16, floor=1 / 3, ceiling=0.95)
    optimizer = torch.optim.AdamW(apn.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        F.smooth_l1_loss(apn(features), target, beta=0.05).backward()
        optimizer.step()
    error = (apn(test_features) - truth).abs()[:, :2].mean()
    constant = (target.mean(0) - truth).abs()[:, :2].mean()
    assert error < 0.25 * constant, (error, constant)


def test_half_precision_does_not_move_a_box() -> None:
    """Under autocast the box stays in float32: bfloat16 would move it by more than a pixel."""
    torch.manual_seed(4)
    apn, features = (APN((12, 7, 7), 16, floor=1 / 3, ceiling=0.95), torch.rand(32, 12, 7, 7).bfloat16().float())
    exact = apn(features)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(apn(features.bfloat16()), exact)
        torch.testing.assert_close(peak_target(features.bfloat16(), 0.5), peak_target(features, 0.5))
    assert len(exact[:, 0].unique()) == 32


def affine_grid_crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The crop without mask and antialiasing, by torch's own sampler."""
    zero = torch.zeros_like(boxes[:, 0])
    across = torch.stack([2 * boxes[:, 2], zero, 2 * boxes[:, 0] - 1], dim=1)
    down = torch.stack([zero, 2 * boxes[:, 2], 2 * boxes[:, 1] - 1], dim=1)
    shape = [len(images), images.shape[1], size, size]
    grid = F.affine_grid(torch.stack([across, down], dim=1), shape, align_corners=False)  # (B, s, s, 2)
    return F.grid_sample(images, grid, align_corners=False)


def per_sample_crop(images: Tensor, boxes: Tensor, size: int, k: float) -> Tensor:
    """The paper's crop in a loop over the batch: mask, cut at whole pixels, enlarge."""
    side, crops = images.shape[-1], []
    for image, box in zip(images, boxes, strict=True):
        across, down = (attention.boxcar(box[axis : axis + 1], box[2:], side, k)[0] for axis in (0, 1))
        masked = image * (down[:, None] * across[None, :])
        x, y = ((box[:2] - box[2]) * side).floor().int().clamp_min(0).tolist()
        width = max(round(2 * box[2].item() * side), 1)
        cut = masked[None, :, y : y + width, x : x + width]
        crops.append(F.interpolate(cut, (size, size), mode="bilinear", align_corners=False))
    return torch.cat(crops)


def test_zoom_agrees_with_grid_sample_and_with_a_loop_over_the_batch() -> None:
    from racnn_cli.data.datasets.fieldguide import draw

    drawn = [torch.from_numpy(draw(label, size=96, seed=3, index=label)[0].copy()) for label in range(2)]
    images = (torch.stack(drawn).permute(0, 3, 1, 2).double() / 127.5 - 1).float()
    # Boxes at whole pixels, enlarged: except for the mask and the border, all three are the same bilinear crop.
    boxes = torch.tensor([[0.5, 0.5, 0.25], [0.375, 0.5, 0.25]])
    unmasked = zoom(images, boxes, 96, k=math.inf)
    torch.testing.assert_close(affine_grid_crop(images, boxes, 96), unmasked, atol=1e-5, rtol=0)
    masked = zoom(images, boxes, 96, k=0.5)
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    loop = per_sample_crop(images, boxes, 96, k=0.5)
    torch.testing.assert_close(loop[inner], masked[inner], atol=0.03, rtol=0)
