"""Perturbed boxes: around a proposal to estimate its gradient, and in the CNN phase as augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blobs import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from racnn_cli.core import attention
from racnn_cli.core.draws import Draws, keys
from racnn_cli.core.losses import rank_loss
from racnn_cli.core.model import RACNN, build
from racnn_cli.core.perturb import neighbours, perturbed_loss
from racnn_cli.recipe import Recipe
from racnn_cli.training import phases
from racnn_cli.training.loop import freeze_all_but, set_training_mode
from racnn_cli.training.phases import BoxSource

# ---- the boxes around a proposal


def test_neighbours_are_antithetic_pairs() -> None:
    torch.manual_seed(0)
    proposals = torch.tensor([[0.5, 0.45, 0.1], [0.55, 0.5, 0.08]], dtype=torch.float64)
    samples = neighbours(proposals, 10, 0.2)
    assert samples.shape == (10, 2, 3)
    for boxes, (x, y, half) in zip(samples.unbind(1), proposals, strict=True):
        mirrored = torch.stack([2 * x - boxes[:, 0], 2 * y - boxes[:, 1], 2 * half - boxes[:, 2]], dim=1)
        distances = torch.cdist(mirrored, boxes)
        assert distances.min(dim=1).values.max() < 1e-9
        assert sorted(distances.argmin(dim=1).tolist()) == list(range(10))
        assert (torch.cdist(boxes, boxes) + torch.eye(10)).min() > 1e-3  # ten boxes, not five
    assert not torch.allclose(samples[:, 0] - proposals[0], samples[:, 1] - proposals[1], atol=1e-3)


@pytest.mark.parametrize("spread", [0.05, 0.2])
def test_neighbours_have_the_requested_spread(spread) -> None:
    torch.manual_seed(1)
    proposal = torch.tensor([[0.5, 0.5, 0.06]], dtype=torch.float64)
    samples = neighbours(proposal, 4000, spread)[:, 0]
    sides = (samples[:, :2] - 0.5) / 0.12  # the side is twice tl
    offsets = torch.cat([sides, samples[:, 2:] / 0.06 - 1], dim=1)
    torch.testing.assert_close(offsets.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    covariance = offsets.T @ offsets / len(offsets) / spread**2
    torch.testing.assert_close(covariance, torch.eye(3, dtype=torch.float64), atol=0.1, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.001, 1.0),
    st.integers(1, 8),
    st.integers(0, 1000),
)
def test_every_neighbour_is_a_box_inside_the_image(x, y, fraction, spread, pairs, seed) -> None:
    floor, ceiling, tolerance = 0.2, 0.9, 1e-6  # bounds of the proposal
    torch.manual_seed(seed)
    half = 0.5 * (floor + fraction * (ceiling - floor))
    proposals = torch.tensor([[half + (1 - 2 * half) * x, half + (1 - 2 * half) * y, half]])
    samples = neighbours(proposals, 2 * pairs, spread)[:, 0]
    assert samples.shape == (2 * pairs, 3)
    assert samples[:, 2].min() > 0
    assert (samples[:, :2] - samples[:, 2:]).min() >= -tolerance
    assert (samples[:, :2] + samples[:, 2:]).max() <= 1 + tolerance


def test_the_same_seed_gives_the_same_boxes() -> None:
    proposals = torch.rand(3, 3) * 0.2 + 0.3
    samples = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        samples.append(neighbours(proposals, 6, 0.2))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


# ---- the gradient


def quadratic(boxes: Tensor, target: Tensor) -> Tensor:
    """Squared distance, in units of 0.1 of the centre and 0.3 of the log side: boxes (..., 3) to losses (...)."""
    centre = ((boxes[..., :2] - target[:, :2]) / 0.1).square().sum(-1)
    return centre + ((boxes[..., 2] / target[:, 2]).log() / 0.3).square()


def starts_and_targets(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    start = torch.tensor([0.5, 0.5, 0.1]) + torch.tensor([0.1, 0.1, 0.04]) * (
        torch.rand(count, 3, generator=generator) - 0.5
    )
    offset = torch.tensor([0.2, 0.2, 0.08]) * (torch.rand(count, 3, generator=generator) - 0.5)
    return start.double(), (start + offset).double()


def gradients(start: Tensor, target: Tensor, boxes: int, spread: float) -> tuple[Tensor, Tensor]:
    """The gradient (B, 3) estimated from this many boxes, and the true one."""
    torch.manual_seed(3)
    proposals = start.clone().requires_grad_()
    samples = neighbours(start, boxes, spread)
    loss = perturbed_loss(proposals, samples, quadratic(samples, target), spread)
    (estimate,) = torch.autograd.grad(loss, proposals)
    (true,) = torch.autograd.grad(quadratic(proposals, target).mean(), proposals)
    return estimate, true


def test_the_value_is_the_mean_loss() -> None:
    start, target = starts_and_targets(5)
    samples = neighbours(start, 6, 0.2)
    losses = quadratic(samples, target)
    value = perturbed_loss(start.requires_grad_(), samples, losses, 0.2)
    assert value.shape == ()
    assert value.item() == pytest.approx(losses.mean().item(), rel=1e-12)


def test_a_few_boxes_give_the_direction() -> None:
    estimate, true = gradients(*starts_and_targets(16), 64, 0.1)
    cosine = torch.cosine_similarity(estimate, true, dim=1)
    assert cosine.mean() > 0.9
    assert cosine.min() > 0.7
    assert torch.cosine_similarity(estimate.flatten(), true.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("spread", [0.03, 0.1])
def test_many_boxes_give_the_gradient(spread) -> None:
    """In size and direction, for any spread. (The loss is quadratic in the log of the side, so not quite exactly.)"""
    estimate, true = gradients(*starts_and_targets(4), 20_000, spread)
    torch.testing.assert_close(estimate, true, rtol=0.1, atol=0.04 * true.abs().max().item())


PAIRS = 2**17
BOUNDS = {
    "middle": (0.5, 0.5, 0.15),
    "left border": (0.101, 0.5, 0.1),
    "nearly at the lower border": (0.5, 0.899, 0.1),
    "corner": (0.152, 0.848, 0.15),
    "floor of the side": (0.4, 0.6, 1 / 6),
    "floor in a corner": (1 / 6 + 0.002, 1 / 6 + 0.004, 1 / 6),
    "large": (0.45, 0.56, 0.42),
    "ceiling": (0.5, 0.5, 0.475),
    "ceiling near a border": (0.479, 0.521, 0.475),
}


@pytest.mark.parametrize("box", BOUNDS.values(), ids=BOUNDS.keys())
@pytest.mark.parametrize("curvature", [0.0, 1.0])
def test_the_gradient_is_right_at_and_near_every_bound(box, curvature) -> None:
    """Within 5 % for linear and quadratic losses, whose true gradient is known, coordinate by coordinate."""
    start = torch.tensor([box], dtype=torch.float64)
    uniform = torch.quasirandom.SobolEngine(3).draw(PAIRS, dtype=torch.float64) + 0.5 / PAIRS
    samples = neighbours(start, 2 * PAIRS, 0.2, torch.special.ndtri(uniform).reshape(1, -1))
    center = (samples[..., :2] - start[:, :2]) / (2 * start[:, 2:])
    offsets = torch.cat([center, samples[..., 2:] / start[:, 2:] - 1], dim=2)
    for slope in torch.cat([torch.eye(3), torch.tensor([[1.0, -2.0, 0.5]])]).double():
        losses = offsets @ slope + curvature * offsets.square().sum(dim=2)
        proposals = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(perturbed_loss(proposals, samples, losses, 0.2), proposals)
        scaled = gradient[0] * torch.tensor([2 * box[2], 2 * box[2], box[2]], dtype=torch.float64)
        torch.testing.assert_close(scaled, slope, rtol=0.05, atol=0.05 * slope.abs().max().item())


@pytest.mark.parametrize(
    "raw", [(50.0, 0.0, 0.0), (0.0, -500.0, 0.0), (50.0, 50.0, 20.0), (0.0, 0.0, 50.0), (9.0, -9.0, -50.0)]
)
def test_noise_in_the_losses_does_not_grow_near_a_bound(raw) -> None:
    """Short offsets make the gradient of a box noisy, but an APN hardly moves in their direction there."""
    torch.manual_seed(14)
    apn = attention.APN((4, 3, 5), 8, floor=1 / 3, ceiling=0.95)
    sizes = []
    for position in ((0.0, 0.0, 0.0), raw):
        outputs = torch.tensor([position]).repeat(2000, 1).double().requires_grad_()
        proposals = apn.to_box(outputs)
        samples = neighbours(proposals.detach(), 4, 0.2)
        losses = torch.rand(4, 2000, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(perturbed_loss(proposals, samples, losses, 0.2), outputs)
        sizes.append(gradient.square().mean(dim=0).sqrt())
    assert (sizes[1] < 2 * sizes[0]).all(), sizes


def test_the_moments_do_not_change_the_gradient_in_single_precision() -> None:
    start = torch.tensor(list(BOUNDS.values()), dtype=torch.float64)
    torch.manual_seed(13)
    samples = neighbours(start, 8, 0.2)
    losses = torch.rand(8, len(start), dtype=torch.float64)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        proposals = start.to(dtype).requires_grad_()
        loss = perturbed_loss(proposals, samples.to(dtype), losses.to(dtype), 0.2)
        gradients.append(torch.autograd.grad(loss, proposals)[0].double())
    torch.testing.assert_close(*gradients, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("box", [(0.21, 0.5, 0.2), (0.25, 0.77, 0.2), (0.5, 0.5, 0.47)])
def test_the_border_adds_no_bias(box) -> None:
    """At the optimum of a quadratic loss the gradient is 0, even where the border clamps boxes on one side."""
    torch.manual_seed(8)
    start = torch.tensor([box], dtype=torch.float64)
    samples = neighbours(start, 100_000, 0.2)
    for axis in range(3):
        offsets = torch.cat(
            [(samples[..., :2] - start[:, :2]) / (2 * start[:, 2:]), samples[..., 2:] / start[:, 2:] - 1], dim=2
        )
        sizes = []
        for distance in (0.0, 0.1):
            proposals = start.clone().requires_grad_()
            loss = perturbed_loss(proposals, samples, (offsets[..., axis] - distance).square(), 0.2)
            gradient = torch.autograd.grad(loss, proposals)[0][0]
            sizes.append(abs(gradient[axis].item()))
        assert sizes[0] < 0.3 * sizes[1], (axis, sizes)  # asymmetric pairs would give more than 1


def test_descent_through_an_apns_bounds_reaches_the_optimum() -> None:
    torch.manual_seed(7)
    floor, ceiling = 0.2, 0.9
    apn = attention.APN((4, 3, 5), 8, floor=floor, ceiling=ceiling)
    target = torch.tensor([[0.35, 0.4, 0.15], [0.6, 0.55, 0.25], [0.5, 0.4, 0.13], [0.65, 0.62, 0.18]])
    raw = torch.zeros(4, 3, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        proposals = apn.to_box(raw)
        with torch.no_grad():
            samples = neighbours(proposals, 8, 0.1)
            losses = quadratic(samples, target)
        optimizer.zero_grad()
        perturbed_loss(proposals, samples, losses, 0.1).backward()
        optimizer.step()
        schedule.step()
    boxes = apn.to_box(raw).detach()
    assert (boxes - target)[:, :2].abs().max() < 0.005
    assert (boxes[:, 2] / target[:, 2]).log().abs().max() < 0.03


def test_equal_losses_give_a_zero_gradient() -> None:
    start, _ = starts_and_targets(3)
    proposals = start.clone().requires_grad_()
    samples = neighbours(start, 8, 0.2)
    perturbed_loss(proposals, samples, torch.full((8, 3), 0.25, dtype=torch.float64), 0.2).backward()
    assert proposals.grad is not None
    assert torch.equal(proposals.grad, torch.zeros(3, 3, dtype=torch.float64))


def test_each_image_has_its_own_gradient() -> None:
    start, target = starts_and_targets(3)
    proposals = start.clone().requires_grad_()
    samples = neighbours(start, 8, 0.2)
    losses = quadratic(samples, target)
    losses[:, 1] = 0.5
    perturbed_loss(proposals, samples, losses, 0.2).backward()
    assert proposals.grad is not None
    assert proposals.grad[1].abs().max() < 1e-12
    assert proposals.grad[[0, 2]].abs().min() > 0


def test_only_the_proposals_get_a_gradient() -> None:
    start, target = starts_and_targets(3)
    proposals = start.clone().requires_grad_()
    samples = neighbours(start, 8, 0.2).requires_grad_()
    losses = quadratic(samples.detach(), target).requires_grad_()
    perturbed_loss(proposals, samples, losses, 0.2).backward()
    assert proposals.grad is not None
    assert proposals.grad.abs().min() > 0
    assert losses.grad is None
    assert samples.grad is None


# ---- in the phases of `alternate`

CLASSES = 4


def options(**changes: object) -> Recipe:
    keys = {"data__source": 80, "model__backbone": "small_cnn", "model__scales": 3, "model__apn_hidden": 8}
    keys |= {"model__sizes": [32, 32, 32], "alternate__margin": 1.0}  # never reached
    no_augmentation = {"alternate__jitter": 0.0, "alternate__tighten": 0.0, "alternate__settle": False}
    return tiny(Path("nowhere"), **(keys | no_augmentation | changes))


def network(recipe: Recipe) -> RACNN:
    """A network in eval mode whose predictions and boxes differ from image to image."""
    torch.manual_seed(8)
    model = build(recipe.model, CLASSES, source=recipe.data.source).eval()
    with torch.no_grad():
        for number in range(recipe.model.scales):
            model.scale(number).classifier.weight.normal_()
            if (apn := model.scale(number).apn) is not None:
                apn.box.weight.mul_(20)
    return model


def batch(count: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    image = torch.randint(0, 256, (count, 3, 80, 80), generator=generator, dtype=torch.uint8)
    return {"image": image, "label": torch.arange(count) % CLASSES}


def test_the_apn_phase_perturbs_boxes_and_leaves_the_cnns_frozen() -> None:
    recipe = options(alternate__apn_gradient="perturb", alternate__boxes=6)
    model, stage = network(recipe), phases.apn_phase(recipe)
    calls = [0, 0, 0]

    def count(number: int) -> Callable[..., None]:
        def hook(module: object, inputs: object, features: Tensor) -> None:
            calls[number] += 1
            assert not features.requires_grad  # no backward pass through a CNN

        return hook

    for number in range(3):
        model.scale(number).backbone.register_forward_hook(count(number))
    modules = stage.modules(model)
    trained = freeze_all_but(model, modules)
    set_training_mode(model, modules, freeze_batchnorm=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = []
    for name, loss in stage.losses(model, modules, batch()):
        names.append(name)
        loss.backward()
    assert names == ["rank 1-2", "rank 2-3"]
    assert calls == [1, 6 + 1, 6]  # the middle scale is also the coarse scale of the second pair
    assert len(trained) == 8
    for name, parameter in model.named_parameters():
        if ".apn." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    torch.optim.AdamW(trained, lr=1e-2).step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".apn." not in name), name


def test_the_losses_are_those_of_the_perturbed_boxes() -> None:
    """By hand: each box in turn instead of the APN's, ranked against the unchanged coarser scale."""
    recipe = options(alternate__apn_gradient="perturb", alternate__boxes=4, alternate__spread=0.15)
    model, images = network(recipe), batch()
    images["key"] = keys(10, 0, torch.arange(4))
    stage = phases.apn_phase(recipe)
    modules = stage.modules(model)
    freeze_all_but(model, modules)
    set_training_mode(model, modules, freeze_batchnorm=False)
    losses = {}
    for name, loss in stage.losses(model, modules, images):
        losses[name] = loss.item()
        loss.backward()
    draws, output = Draws.of(images), model(images["image"])
    for number, name in enumerate(losses):
        proposal = output.proposals[number].detach().requires_grad_()
        samples = neighbours(proposal.detach(), 4, 0.15, draws.normal(6))
        rows = []
        for box in samples:
            boxes = [output.proposals[0], box] if number else [box, box]
            fine = model(images["image"], boxes).logits[number + 1]
            rows.append(
                [rank_loss(output.logits[number][[i]], fine[[i]], images["label"][[i]], 1.0).item() for i in range(4)]
            )
        table = torch.tensor(rows)
        assert losses[name] == pytest.approx(table.mean().item(), rel=1e-4)
        apn = model.scale(number).apn
        assert apn is not None
        (gradient,) = torch.autograd.grad(perturbed_loss(proposal, samples, table, 0.15), proposal)
        expected = torch.autograd.grad(output.proposals[number], apn.box.weight, gradient, retain_graph=True)[0]
        torch.testing.assert_close(apn.box.weight.grad, expected, rtol=1e-2, atol=1e-4 * expected.abs().max().item())


def augmentation_of(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, round_: int = 0, images: int = 64) -> Tensor:
    """How scale 2's boxes are augmented (B, 3): shift of the center in half-sides, and factor of the side."""
    model = network(recipe)
    fixed = torch.tensor([[0.5, 0.5, 0.3]]).expand(images, 3)
    boxes = []
    original = model.next_view

    def next_view(number: int, source: Tensor, view: Tensor, parent: Tensor, proposal: Tensor):
        boxes.append(proposal)
        return original(number, source, view, parent, proposal)

    monkeypatch.setattr(model, "next_view", next_view)
    torch.manual_seed(11)
    stage = phases.cnn_phase(recipe, BoxSource(proposals=lambda _: [fixed]), round_index=round_)
    with torch.no_grad():
        assert len(list(stage.losses(model, stage.modules(model), batch(images)))) == 2
    assert len(boxes) == 1
    return torch.cat([(boxes[0][:, :2] - 0.5) / 0.3, boxes[0][:, 2:] / 0.3], dim=1)


def two_scales(**changes: object) -> Recipe:
    bounds = {"model__floor": 0.05, "model__ceiling": 0.95}
    return options(model__scales=2, model__sizes=[32, 32], **bounds, **changes)


def test_tighten_in_the_cnn_phase(monkeypatch) -> None:
    boxes = augmentation_of(two_scales(alternate__tighten=1.0), monkeypatch)
    assert boxes[:, :2].abs().max() < 1e-6  # only the side changes
    assert boxes[:, 2].min() >= math.exp(-1) - 1e-6
    assert boxes[:, 2].max() <= 1 + 1e-6
    assert boxes[:, 2].log().mean().item() == pytest.approx(-0.5, abs=0.12)
    assert torch.equal(augmentation_of(two_scales(), monkeypatch)[:, 2], torch.ones(64))


def test_augmentation_settles_round_by_round(monkeypatch) -> None:
    keys = {"alternate__tighten": 0.6, "alternate__jitter": 0.2, "alternate__rounds": 4}
    settling, constant = two_scales(alternate__settle=True, **keys), two_scales(**keys)
    rounds = [augmentation_of(settling, monkeypatch, number) for number in range(4)]
    assert torch.equal(rounds[0], augmentation_of(constant, monkeypatch))
    assert torch.equal(rounds[0], augmentation_of(constant, monkeypatch, 3))  # no settling
    assert torch.equal(rounds[3], torch.tensor([[0.0, 0.0, 1.0]]).expand(64, 3))
    for number, left in enumerate((1, 2 / 3, 1 / 3)):
        shift, scale = rounds[number][:, :2].abs(), rounds[number][:, 2].log()
        assert 0.9 * 0.2 * left < shift.max() <= 0.2 * left + 1e-5
        assert -0.8 * left - 1e-5 <= scale.min() < -0.65 * left
        assert scale.max() <= 0.2 * left + 1e-5


def test_a_single_round_does_not_settle(monkeypatch) -> None:
    keys = {"alternate__tighten": 0.6, "alternate__rounds": 1}
    single = augmentation_of(two_scales(alternate__settle=True, **keys), monkeypatch)
    assert torch.equal(single, augmentation_of(two_scales(**keys), monkeypatch))


def test_tighten_starts_from_the_apns_proposals(monkeypatch) -> None:
    recipe = two_scales(alternate__tighten=1.0)
    model, images = network(recipe), batch(32)
    boxes = []
    original = model.next_view

    def next_view(number: int, source: Tensor, view: Tensor, parent: Tensor, proposal: Tensor):
        boxes.append(proposal)
        return original(number, source, view, parent, proposal)

    with torch.no_grad():
        proposals = model(images["image"]).proposals[0]
        monkeypatch.setattr(model, "next_view", next_view)
        phase = phases.cnn_phase(recipe)
        list(phase.losses(model, phase.modules(model), images))
    ratio = boxes[0][:, 2] / proposals[:, 2]
    torch.testing.assert_close(boxes[0][:, :2], proposals[:, :2])
    assert ratio.max() <= 1 + 1e-5
    assert ratio.mean() < 0.8
