"""Where to look: boxes, the attention proposal network, the boxcar mask, crop and zoom.

The idea of RA-CNN (Fu, Zheng, Mei, CVPR 2017, section 3.2) on one page. Two readings are fixed here, once:

* A box is `(tx, ty, tl)` in [0, 1] of the image that it was proposed on: x runs right (columns), y runs down
  (rows), and `tl` is HALF the side. On an image that is not square, `tl` is taken along each axis in that
  axis' own unit, so that the box has the image's own aspect ratio.
* Pixel m of an axis covers [m, m + 1], its centre is m + 1/2: a box over the whole image at the image's own
  size is the identity.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gradient = Literal["exact", "boxcar", "bilinear", "none"]

WHOLE = (0.5, 0.5, 0.5)


def whole(like: Tensor) -> Tensor:
    """The box (B, 3) that covers the whole of each image of `like` (B, ...)."""
    return like.new_tensor(WHOLE).expand(like.shape[0], 3)


def compose(parent: Tensor, child: Tensor) -> Tensor:
    """A box given inside another box, in the coordinates that the other box is given in.

    Args:
        parent: (B, 3) boxes on an image.
        child: (B, 3) boxes on the crop that `parent` cuts out.

    Returns:
        (B, 3) boxes on the image of `parent`.
    """
    side = 2 * parent[:, 2:3]
    corner = parent[:, :2] - parent[:, 2:3]
    return torch.cat([corner + side * child[:, :2], side * child[:, 2:3]], dim=1)


def relative(parent: Tensor, box: Tensor) -> Tensor:
    """A box of an image in the coordinates of another one's crop: `compose(parent, relative(parent, box)) == box`.

    Args:
        parent, box: (B, 3) boxes on the same image.

    Returns:
        (B, 3) boxes on the crop that `parent` cuts out; they may reach beyond it.
    """
    side = 2 * parent[:, 2:3]
    corner = parent[:, :2] - parent[:, 2:3]
    return torch.cat([(box[:, :2] - corner) / side, box[:, 2:3] / side], dim=1)


def bound(boxes: Tensor, floor: float, ceiling: float) -> Tensor:
    """The nearest boxes (B, 3) whose side lies in [floor, ceiling] and that lie inside the image.

    A clamp, and so without a gradient where it acts: for targets and random boxes, not for proposals.
    """
    half = boxes[:, 2:3].clamp(floor / 2, ceiling / 2)
    centre = torch.minimum(torch.maximum(boxes[:, :2], half), 1 - half)
    return torch.cat([centre, half], dim=1)


def jitter(
    boxes: Tensor,
    amount: float,
    floor: float,
    ceiling: float,
    tighten: float = 0.0,
    chance: Tensor | None = None,
) -> Tensor:
    """Boxes (B, 3) shifted by up to ±`amount` half-sides and scaled, within the bounds.

    The factor of the scale lies between exp(-`amount` - `tighten`) and exp(`amount`).

    Args:
        boxes: (B, 3).
        amount, tighten: see above.
        floor, ceiling: of the side.
        chance: (B, 3), evenly spread between 0 and 1; None: from torch's global generator.
    """
    noise = (torch.rand_like(boxes) if chance is None else chance.to(boxes.dtype)) * 2 - 1
    half = boxes[:, 2:3] * torch.exp((amount + tighten / 2) * noise[:, 2:3] - tighten / 2)
    centre = boxes[:, :2] + amount * boxes[:, 2:3] * noise[:, :2]
    return bound(torch.cat([centre, half], dim=1), floor, ceiling)


def peak_target(features: Tensor, side: float) -> Tensor:
    """The square around the highest response of the last convolution (paper, section 3.4).

    Args:
        features: (B, C, h, w) feature maps; the response of a cell is its mean absolute value over channels.
        side: side of the square as a share of the image's side.

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

    The first layer looks at one cell of the map at a time, with the same weights for all cells; for each of its
    outputs a softmax over the cells says where it responds. The second layer reads all of these maps, and starts
    as their expected position, so that a strong response pulls the box towards itself from the first step. (One
    layer over the flattened features, as in the paper's Caffe model, has a hundred times the weights and learns
    a small data set's boxes by heart: `recipes/NOTES.md` has the figures.)

    Every output is a valid box (inside the image, side in [floor, ceiling]) and every parameter keeps a
    gradient, with no clamp on the way: the features are brought to unit size, and the bounded non-linearities
    are x / (1 + |x|), whose slope falls off as 1 / x² where tanh and the sigmoid underflow to 0. The side is
    interpolated in log space, the centre over what the side leaves free.

    Args:
        features: shape (C, h, w) of one image's features; the input dimension is inferred from it.
        hidden: number of maps that the first layer makes.
        floor, ceiling: bounds of the box's side as a share of the image's side.
        side: side of the box that an untrained APN proposes.
    """

    SHARPNESS = 3.0  # of the softmax, for responses of about unit size
    LARGEST = 20.0  # bound of the softmax's argument: exp(-2 · 20) is still a number

    def __init__(
        self, features: tuple[int, int, int], hidden: int, floor: float, ceiling: float, side: float = 0.5
    ) -> None:
        super().__init__()
        channels, rows, columns = features
        self.floor, self.ceiling = floor, ceiling
        self.hidden = nn.Linear(channels, hidden)
        self.box = nn.Linear(hidden * rows * columns, 3)
        size = math.log(side / floor) / math.log(ceiling / floor)
        x = (torch.arange(columns) + 0.5) / columns
        y = (torch.arange(rows) + 0.5) / rows
        with torch.no_grad():
            self.box.bias.copy_(_before_softsign(torch.tensor([0.5, 0.5, size])))
            reach = self.box.weight.zero_().view(3, hidden, rows, columns)
            reach[0] = _before_softsign((x - side / 2) / (1 - side)) / hidden
            reach[1] = _before_softsign((y - side / 2) / (1 - side))[:, None] / hidden

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, C, h, w) to boxes (B, 3)."""
        # Half precision would round a box by more than a pixel.
        with torch.autocast(features.device.type, enabled=False):
            cells = features.to(self.hidden.weight.dtype).flatten(2).transpose(1, 2)  # (B, h * w, C)
            cells = cells / cells.detach().abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
            cells = cells * cells.square().mean(dim=(1, 2), keepdim=True).clamp_min(1e-12).rsqrt()
            response = self.hidden(cells).transpose(1, 2)  # (B, hidden, h * w)
            bounded = self.LARGEST * F.softsign(self.SHARPNESS / self.LARGEST * response)
            return self.to_box(self.box(bounded.softmax(dim=2).flatten(1)))

    def to_box(self, raw: Tensor) -> Tensor:
        """Any real numbers (B, 3) to valid boxes (B, 3)."""
        share = 0.5 + 0.5 * F.softsign(raw)
        half = 0.5 * self.floor * torch.exp(math.log(self.ceiling / self.floor) * share[:, 2:3])
        centre = half + (1 - 2 * half) * share[:, :2]
        return torch.cat([centre, half], dim=1)


def _before_softsign(share: Tensor) -> Tensor:
    """What x / (1 + |x|) maps to `share` of its range; shares near its ends, which are never reached, less."""
    value = 2 * share.clamp(0.1, 0.9) - 1
    return value / (1 - value.abs())


def boxcar(centre: Tensor, half: Tensor, length: int, k: float, pixel: Tensor | None = None) -> Tensor:
    """The attention mask along one axis (paper, equations 3 to 5): about 1 inside the box, 0 outside.

    Args:
        centre, half: (B,) in [0, 1] of the axis.
        length: pixels of the axis.
        k: steepness per pixel: the mask rises over about 4 / k pixels. Its slope is sampled once a pixel, so
            that above about 1 it is aliased, and far from the border it vanishes.
        pixel: (N,) or (B, N) centres of the pixels that are asked for; None: all of the axis.

    Returns:
        (B, N) mask at the pixel centres.
    """
    pixel = _centres(length, centre) if pixel is None else pixel
    low = ((centre - half) * length)[:, None]
    high = ((centre + half) * length)[:, None]
    return torch.sigmoid(k * (pixel - low)) - torch.sigmoid(k * (pixel - high))


def interpolation(
    centre: Tensor, half: Tensor, length: int, size: int, pixel: Tensor | None = None
) -> Tensor:
    """Weights that resample the box's share of an axis to `size` pixels (paper, equation 6).

    Bilinear where the box is enlarged; where it is reduced, the triangle widens with the reduction, so that
    nothing is aliased. The weights of one output pixel sum to 1 (at the image's border the outermost pixel
    counts for what lies beyond).

    Args:
        centre, half, length, pixel: as in `boxcar`; `pixel` must hold all that the box touches.
        size: pixels of the result.

    Returns:
        (B, size, N).
    """
    pixel = _centres(length, centre) if pixel is None else pixel
    low = (centre - half) * length
    step = 2 * half * length / size
    position = low[:, None] + _centres(size, centre) * step[:, None]  # (B, size)
    width = step.clamp_min(1.0)[:, None, None]
    weight = F.relu(1 - (pixel.unsqueeze(-2) - position[:, :, None]).abs() / width)  # (B, size, N)
    return weight / weight.sum(dim=2, keepdim=True)


def zoom(images: Tensor, boxes: Tensor, size: int, *, k: float = 0.5, gradient: Gradient = "exact") -> Tensor:
    """Cut a box out of each image and resample it to a square: the one crop of this package.

    `X_att = X ⊙ M`, then bilinear interpolation at the box's positions, both separable, so that the crop is
    two batched matrix products. The values do not depend on `gradient`; what a box learns through does:

    * `exact`: mask and positions, the true derivative.
    * `boxcar`: the mask alone, as the paper derives it.
    * `bilinear`: the positions alone; the true derivative when k is infinite.
    * `none`: nothing; the boxes are constants.

    Args:
        images: (B, 3, H, W); the mask draws towards 0, so give images with the mean taken off.
        boxes: (B, 3), `(tx, ty, tl)` in [0, 1] of the image.
        size: side of the result in pixels.
        k: steepness of the mask per pixel of `images`; `math.inf` leaves the mask away.
        gradient: what the gradient with respect to `boxes` passes through.

    Returns:
        (B, 3, size, size).

    Raises:
        ValueError: shapes do not fit, or `gradient` is not one of the four.
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
        moving = boxes if gradient in ("exact", "bilinear") else fixed
        masking = boxes if gradient in ("exact", "boxcar") else fixed
        lengths = images.shape[3], images.shape[2]
        places = [_touched(fixed[:, axis], fixed[:, 2], lengths[axis], size) for axis in (0, 1)]
        if places[0].ndim == 2 or places[1].ndim == 2:
            images = _window(images, *places)
        axes = []
        for axis, (length, place) in enumerate(zip(lengths, places, strict=True)):
            pixel = place + 0.5
            weights = interpolation(moving[:, axis], moving[:, 2], length, size, pixel)
            if k != math.inf:
                weights = weights * boxcar(masking[:, axis], masking[:, 2], length, k, pixel).unsqueeze(1)
            axes.append(weights)
        across, down = axes  # (B, size, W or less), (B, size, H or less)
        columns = images @ across.transpose(1, 2)[:, None]  # (B, 3, H or less, size)
        return down[:, None] @ columns  # (B, 3, size, size)


def _centres(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device, dtype=like.dtype) + 0.5


def _touched(centre: Tensor, half: Tensor, length: int, size: int) -> Tensor:
    """Numbers of the pixels of an axis that a crop reads: (length,), or (B, N) where that is much less.

    As many for each image as the largest box needs. An exported graph has no such shortcut: its shapes must not
    depend on the boxes.
    """
    pixel = _centres(length, centre) - 0.5
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not len(centre):
        return pixel
    reach = (2 * half * length / size).clamp_min(1.0)
    low = ((centre - half) * length - reach).floor()
    most = (2 * (half * length + reach)).max().item() + 2
    if not most < 0.7 * length:  # the copy would cost more than it saves; also where a box is no number
        return pixel
    count = math.ceil(most)
    return low.clamp(0, length - count)[:, None] + pixel[:count]  # (B, N)


def _window(images: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """The given columns (W',) or (B, W') and rows (H',) or (B, H') of each image (B, 3, H, W): (B, 3, H', W')."""
    batch, channels, height, width = images.shape
    first = torch.arange(batch * channels, device=images.device).view(batch, channels, 1) * height
    down = (first + rows.long().expand(batch, -1)[:, None]).flatten()
    lines = images.reshape(-1, width).index_select(0, down).view(batch, channels, -1, width)
    across = columns.long().expand(batch, -1)[:, None, None]  # (B, 1, 1, W')
    return lines.gather(3, across.expand(-1, channels, lines.shape[2], -1))
