"""Attention: boxes, the attention proposal network (APN), the boxcar mask, and the differentiable crop.

Implements section 3.2 of RA-CNN (Fu, Zheng, Mei, CVPR 2017). Conventions:

* A box is `(tx, ty, tl)` in [0, 1] of the image it was proposed on: x points right, y points down, and `tl` is
  half the side. On a non-square image, `tl` is a fraction of each axis, so the box keeps the image's aspect ratio.
* Pixel m of an axis covers [m, m + 1], with its center at m + 1/2. Cropping the full box at the image's own size
  is the identity.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gradient = Literal["exact", "boxcar", "bilinear", "none"]


def full_box(like: Tensor) -> Tensor:
    """Return the box (B, 3) that covers the entire image, for a batch like `like` (B, ...)."""
    return like.new_tensor((0.5, 0.5, 0.5)).expand(like.shape[0], 3)


def compose(parent: Tensor, child: Tensor) -> Tensor:
    """Map boxes from the coordinates of a crop to those of the image.

    Args:
        parent: (B, 3) boxes on the image.
        child: (B, 3) boxes on the crop of `parent`.

    Returns:
        (B, 3) `child` in the coordinates of the image.
    """
    side = 2 * parent[:, 2:3]
    corner = parent[:, :2] - parent[:, 2:3]
    return torch.cat([corner + side * child[:, :2], side * child[:, 2:3]], dim=1)


def relative(parent: Tensor, box: Tensor) -> Tensor:
    """Map boxes from the coordinates of the image to those of a crop; the inverse of `compose`.

    Args:
        parent: (B, 3) boxes on the image.
        box: (B, 3) boxes on the same image.

    Returns:
        (B, 3) `box` in the coordinates of the crop of `parent`; it may extend beyond [0, 1].
    """
    side = 2 * parent[:, 2:3]
    corner = parent[:, :2] - parent[:, 2:3]
    return torch.cat([(box[:, :2] - corner) / side, box[:, 2:3] / side], dim=1)


def bound(boxes: Tensor, floor: float, ceiling: float) -> Tensor:
    """Clamp boxes (B, 3) to a side in [floor, ceiling] and to the image.

    Clamped values have no gradient, so this is for targets and random boxes, not for proposals.
    """
    half = boxes[:, 2:3].clamp(floor / 2, ceiling / 2)
    centre = torch.minimum(torch.maximum(boxes[:, :2], half), 1 - half)
    return torch.cat([centre, half], dim=1)


def jitter(
    boxes: Tensor, amount: float, floor: float, ceiling: float, tighten: float = 0.0, uniform: Tensor | None = None
) -> Tensor:
    """Shift boxes by up to ±`amount` half-sides and scale them by exp(-`amount` - `tighten`) to exp(`amount`).

    Args:
        boxes: (B, 3).
        amount: largest shift in half-sides, and largest change of the log side.
        floor, ceiling: bounds of the side.
        tighten: additional shrinking of the log side.
        uniform: (B, 3) samples from U(0, 1); None draws them from torch's global generator.

    Returns:
        (B, 3) boxes inside the image.
    """
    noise = (torch.rand_like(boxes) if uniform is None else uniform.to(boxes.dtype)) * 2 - 1
    half = boxes[:, 2:3] * torch.exp((amount + tighten / 2) * noise[:, 2:3] - tighten / 2)
    centre = boxes[:, :2] + amount * boxes[:, 2:3] * noise[:, :2]
    return bound(torch.cat([centre, half], dim=1), floor, ceiling)


def peak_target(features: Tensor, side: float) -> Tensor:
    """Return the square around the strongest response of the last convolution (paper, section 3.4).

    Args:
        features: (B, C, h, w) feature maps; the response of a cell is its mean absolute value over channels.
        side: side of the square as a fraction of the image's side.

    Returns:
        (B, 3) boxes of exactly that side, moved inside the image where the peak is near its border.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    response = features.detach().to(dtype).abs().mean(dim=1)  # (B, h, w)
    _, rows, columns = response.shape
    peak = response.flatten(1).argmax(dim=1)  # (B,)
    x = ((peak % columns).to(dtype) + 0.5) / columns
    y = ((peak // columns).to(dtype) + 0.5) / rows
    half = torch.full_like(x, side / 2)
    return bound(torch.stack([x, y, half], dim=1), side, side)


class APN(nn.Module):
    """Attention proposal network: two fully connected layers from features to one box (paper, equation 2).

    The first layer is applied to each cell of the map with shared weights, and a softmax over the cells turns each
    of its outputs into an attention map. The second layer reads these maps. It is initialized to their expected
    position, so a strong response pulls the box towards itself from the first step. (A layer over the flattened
    features, as in the paper's Caffe model, has a hundred times the weights and overfits small data sets; see
    `docs/notes.md`.)

    Every output is a valid box (inside the image, side in [floor, ceiling]) and every parameter keeps a nonzero
    gradient, because nothing is clamped. The features are normalized, and the bounded non-linearities are
    x / (1 + |x|): its slope decays as 1 / x², where those of tanh and the sigmoid underflow to 0. The side is
    interpolated in log space, the center over the range that the side leaves.

    Args:
        features: shape (C, h, w) of one image's features.
        hidden: number of attention maps.
        floor, ceiling: bounds of the box's side as a fraction of the image's side.
        side: side of the box that an untrained APN proposes.

    Raises:
        ValueError: not 0 < floor <= side <= ceiling < 1, or floor == ceiling.
    """

    SHARPNESS = 3.0  # slope of the softmax's argument at 0
    LARGEST = 20.0  # bound of the softmax's argument; exp(-2 · 20) does not underflow

    def __init__(
        self, features: tuple[int, int, int], hidden: int, *, floor: float, ceiling: float, side: float = 0.5
    ) -> None:
        if not 0 < floor <= side <= ceiling < 1 or floor == ceiling:
            raise ValueError(
                f"need 0 < floor <= side <= ceiling < 1 and floor < ceiling, got {floor}, {side}, {ceiling}"
            )
        super().__init__()
        channels, rows, columns = features
        self.floor, self.ceiling = floor, ceiling
        self.hidden = nn.Linear(channels, hidden)
        self.box = nn.Linear(hidden * rows * columns, 3)
        size = math.log(side / floor) / math.log(ceiling / floor)
        x = (torch.arange(columns) + 0.5) / columns
        y = (torch.arange(rows) + 0.5) / rows
        with torch.no_grad():
            self.box.bias.copy_(_inverse_softsign(torch.tensor([0.5, 0.5, size])))
            weight = self.box.weight.zero_().view(3, hidden, rows, columns)
            weight[0] = _inverse_softsign((x - side / 2) / (1 - side)) / hidden
            weight[1] = _inverse_softsign((y - side / 2) / (1 - side))[:, None] / hidden

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, C, h, w) to boxes (B, 3)."""
        # Half precision would round a box by more than a pixel.
        with torch.autocast(features.device.type, enabled=False):
            cells = features.to(self.hidden.weight.dtype).flatten(2).transpose(1, 2)  # (B, h * w, C)
            cells = cells / cells.detach().abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
            cells = cells * cells.square().mean(dim=(1, 2), keepdim=True).clamp_min(1e-12).rsqrt()
            response = self.hidden(cells).transpose(1, 2)  # (B, hidden, h * w)
            bounded = self.LARGEST * F.softsign(self.SHARPNESS / self.LARGEST * response)
            return self.to_box(self.box(bounded.softmax(dim=2).flatten(1)))

    def to_box(self, raw: Tensor) -> Tensor:
        """Map unbounded numbers (B, 3) to valid boxes (B, 3)."""
        fraction = 0.5 + 0.5 * F.softsign(raw)
        half = 0.5 * self.floor * torch.exp(math.log(self.ceiling / self.floor) * fraction[:, 2:3])
        centre = half + (1 - 2 * half) * fraction[:, :2]
        return torch.cat([centre, half], dim=1)


def _inverse_softsign(fraction: Tensor) -> Tensor:
    """The x that x / (1 + |x|) maps to `fraction` of its range, which is clamped because 0 and 1 are at infinity."""
    value = 2 * fraction.clamp(0.1, 0.9) - 1
    return value / (1 - value.abs())


def boxcar(centre: Tensor, half: Tensor, length: int, k: float, pixel: Tensor | None = None) -> Tensor:
    """Compute the attention mask along one axis (paper, equations 3 to 5): about 1 inside the box, 0 outside.

    Args:
        centre, half: (B,) in [0, 1] of the axis.
        length: length of the axis in pixels.
        k: steepness per pixel; the mask rises over about 4 / k pixels. Its slope is sampled once per pixel, so it
            is aliased above about 1, and it vanishes far from the border.
        pixel: (N,) or (B, N) centers of the pixels to evaluate; None evaluates all pixels of the axis.

    Returns:
        (B, N) mask at the pixel centers.
    """
    pixel = _centres(length, centre) if pixel is None else pixel
    low = ((centre - half) * length)[:, None]
    high = ((centre + half) * length)[:, None]
    return torch.sigmoid(k * (pixel - low)) - torch.sigmoid(k * (pixel - high))


def interpolation(centre: Tensor, half: Tensor, length: int, size: int, pixel: Tensor | None = None) -> Tensor:
    """Compute the weights that resample the box's range of an axis to `size` pixels (paper, equation 6).

    Bilinear where the box is enlarged. Where it is reduced, the triangle filter widens with the reduction, which
    prevents aliasing. The weights of each output pixel sum to 1; they are renormalized at the image's border.

    Args:
        centre, half, length, pixel: as in `boxcar`; `pixel` must contain every pixel that the box touches.
        size: length of the result in pixels.

    Returns:
        (B, size, N) weights.
    """
    pixel = _centres(length, centre) if pixel is None else pixel
    low = (centre - half) * length
    step = 2 * half * length / size
    position = low[:, None] + _centres(size, centre) * step[:, None]  # (B, size)
    width = step.clamp_min(1.0)[:, None, None]
    weight = F.relu(1 - (pixel.unsqueeze(-2) - position[:, :, None]).abs() / width)  # (B, size, N)
    return weight / weight.sum(dim=2, keepdim=True)


def zoom(images: Tensor, boxes: Tensor, size: int, *, k: float = 0.5, gradient: Gradient = "exact") -> Tensor:
    """Crop a box from each image and resample it to a square (paper, equations 3 to 6).

    The image is multiplied by the mask, then interpolated at the box's positions. Both are separable, so the crop
    is two batched matrix products. `gradient` selects what the boxes get a gradient through; values are the same:

    * `exact`: mask and positions, the true derivative.
    * `boxcar`: the mask only, as in the paper.
    * `bilinear`: the positions only; the true derivative when k is infinite.
    * `none`: no gradient.

    Args:
        images: (B, 3, H, W), normalized to zero mean, because the mask fades to 0.
        boxes: (B, 3), `(tx, ty, tl)` in [0, 1] of the image.
        size: side of the result in pixels.
        k: steepness of the mask per pixel of `images`; `math.inf` disables the mask.
        gradient: see above.

    Returns:
        (B, 3, size, size) crops.

    Raises:
        ValueError: shapes do not match, or `gradient` is not one of the four.
    """
    if images.ndim != 4 or boxes.ndim != 2 or boxes.shape[1] != 3 or images.shape[0] != boxes.shape[0]:
        raise ValueError(
            f"zoom needs images (B, 3, H, W) and boxes (B, 3), got {tuple(images.shape)}, {tuple(boxes.shape)}"
        )
    if gradient not in ("exact", "boxcar", "bilinear", "none"):
        raise ValueError(f"gradient must be exact, boxcar, bilinear or none, got {gradient!r}")
    # Positions are fractions of a pixel: half precision would move the crop.
    with torch.autocast(images.device.type, enabled=False):
        dtype = torch.promote_types(images.dtype, torch.float32)
        images, boxes = images.to(dtype), boxes.to(dtype)
        fixed = boxes.detach()
        positions = boxes if gradient in ("exact", "bilinear") else fixed
        mask = boxes if gradient in ("exact", "boxcar") else fixed
        lengths = images.shape[3], images.shape[2]
        columns, rows = (_pixels_read(fixed[:, i], fixed[:, 2], lengths[i], size=size) for i in (0, 1))
        if columns.ndim == 2 or rows.ndim == 2:
            images = _gather(images, columns, rows)
        axes = []
        for axis, (length, index) in enumerate(zip(lengths, (columns, rows), strict=True)):
            pixel = index + 0.5
            weights = interpolation(positions[:, axis], positions[:, 2], length, size=size, pixel=pixel)
            if k != math.inf:
                window = boxcar(mask[:, axis], mask[:, 2], length, k=k, pixel=pixel)
                weights = weights * window.unsqueeze(1)
            axes.append(weights)
        horizontal, vertical = axes  # (B, size, W or less), (B, size, H or less)
        resampled = images @ horizontal.transpose(1, 2)[:, None]  # (B, 3, H or less, size)
        return vertical[:, None] @ resampled  # (B, 3, size, size)


def _centres(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device, dtype=like.dtype) + 0.5


def _pixels_read(centre: Tensor, half: Tensor, length: int, *, size: int) -> Tensor:
    """Indices of the pixels that the crops read along an axis: (length,), or (B, N) where that saves time.

    N is what the largest box needs. An exported graph reads all pixels: its shapes must not depend on the boxes.
    """
    index = _centres(length, centre) - 0.5
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not len(centre):  # type: ignore[no-untyped-call]
        return index
    margin = (2 * half * length / size).clamp_min(1.0)
    low = ((centre - half) * length - margin).floor()
    widest = (2 * (half * length + margin)).max().item() + 2
    if not widest < 0.7 * length:  # copying would cost more than it saves; also true for NaN
        return index
    count = math.ceil(widest)
    return low.clamp(0, length - count)[:, None] + index[:count]  # (B, N)


def _gather(images: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Select columns (W',) or (B, W') and rows (H',) or (B, H') of images (B, 3, H, W): (B, 3, H', W')."""
    batch, channels, height, width = images.shape
    first = torch.arange(batch * channels, device=images.device).view(batch, channels, 1) * height
    lines = (first + rows.long().expand(batch, -1)[:, None]).flatten()
    strips = images.reshape(-1, width).index_select(0, lines).view(batch, channels, -1, width)
    index = columns.long().expand(batch, -1)[:, None, None]  # (B, 1, 1, W')
    return strips.gather(3, index.expand(-1, channels, strips.shape[2], -1))
