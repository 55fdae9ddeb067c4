"""Boxes that are moved on purpose: around a proposal to find its slope, and in the CNN phase to train on."""

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
from racnn_cli.training import stages
from racnn_cli.training.loop import freeze_all_but

# ---- the boxes around a proposal


def test_neighbours_lie_in_pairs_on_opposite_sides() -> None:
    torch.manual_seed(0)
    proposals = torch.tensor([[0.5, 0.45, 0.1], [0.55, 0.5, 0.08]], dtype=torch.float64)
    tried = neighbours(proposals, 10, 0.2)
    assert tried.shape == (10, 2, 3)
    for boxes, (x, y, half) in zip(tried.unbind(1), proposals, strict=True):
        mirrored = torch.stack([2 * x - boxes[:, 0], 2 * y - boxes[:, 1], half**2 / boxes[:, 2]], dim=1)
        apart = torch.cdist(mirrored, boxes)
        assert apart.min(dim=1).values.max() < 1e-9
        assert sorted(apart.argmin(dim=1).tolist()) == list(range(10))
        assert (torch.cdist(boxes, boxes) + torch.eye(10)).min() > 1e-3  # ten boxes, not five
    assert not torch.allclose(tried[:, 0] - proposals[0], tried[:, 1] - proposals[1], atol=1e-3)


@pytest.mark.parametrize("spread", [0.05, 0.2])
def test_they_spread_as_far_as_is_said(spread) -> None:
    torch.manual_seed(1)
    proposal = torch.tensor([[0.5, 0.5, 0.06]], dtype=torch.float64)
    tried = neighbours(proposal, 4000, spread)[:, 0]
    sides = (tried[:, :2] - 0.5) / 0.12  # the side is twice tl
    moves = torch.cat([sides, (tried[:, 2:] / 0.06).log()], dim=1)
    torch.testing.assert_close(moves.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    cover = moves.T @ moves / len(moves) / spread**2
    torch.testing.assert_close(cover, torch.eye(3, dtype=torch.float64), atol=0.1, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.001, 1.0),
    st.integers(1, 8),
    st.integers(0, 1000),
)
def test_every_neighbour_is_a_box_inside_the_image(x, y, share, spread, pairs, seed) -> None:
    floor, ceiling, slack = 0.2, 0.9, 1e-6  # of the proposal
    torch.manual_seed(seed)
    half = 0.5 * (floor + share * (ceiling - floor))
    proposals = torch.tensor([[half + (1 - 2 * half) * x, half + (1 - 2 * half) * y, half]])
    tried = neighbours(proposals, 2 * pairs, spread)[:, 0]
    assert tried.shape == (2 * pairs, 3)
    assert tried[:, 2].min() > 0
    assert (tried[:, :2] - tried[:, 2:]).min() >= -slack
    assert (tried[:, :2] + tried[:, 2:]).max() <= 1 + slack


def test_the_same_seed_tries_the_same_boxes() -> None:
    proposals = torch.rand(3, 3) * 0.2 + 0.3
    drawn = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        drawn.append(neighbours(proposals, 6, 0.2))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# ---- the slope


def bowl(boxes: Tensor, target: Tensor) -> Tensor:
    """Squared distance, in units of 0.1 of the centre and 0.3 of the log side: boxes (..., 3) to losses (...)."""
    centre = ((boxes[..., :2] - target[:, :2]) / 0.1).square().sum(-1)
    return centre + ((boxes[..., 2] / target[:, 2]).log() / 0.3).square()


def bowls(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    start = torch.tensor([0.5, 0.5, 0.1]) + torch.tensor([0.1, 0.1, 0.04]) * (
        torch.rand(count, 3, generator=generator) - 0.5
    )
    away = torch.tensor([0.2, 0.2, 0.08]) * (torch.rand(count, 3, generator=generator) - 0.5)
    return start.double(), (start + away).double()


def slopes(start: Tensor, target: Tensor, boxes: int, spread: float) -> tuple[Tensor, Tensor]:
    """The slope (B, 3) that is found from the losses of so many boxes, and the true one."""
    torch.manual_seed(3)
    proposals = start.clone().requires_grad_()
    tried = neighbours(start, boxes, spread)
    loss = perturbed_loss(proposals, tried, bowl(tried, target), spread)
    (found,) = torch.autograd.grad(loss, proposals)
    (true,) = torch.autograd.grad(bowl(proposals, target).mean(), proposals)
    return found, true


def test_the_value_is_the_mean_loss() -> None:
    start, target = bowls(5)
    tried = neighbours(start, 6, 0.2)
    losses = bowl(tried, target)
    value = perturbed_loss(start.requires_grad_(), tried, losses, 0.2)
    assert value.shape == ()
    assert value.item() == pytest.approx(losses.mean().item(), rel=1e-12)


def test_a_few_boxes_point_the_way() -> None:
    found, true = slopes(*bowls(16), 64, 0.1)
    cosine = torch.cosine_similarity(found, true, dim=1)
    assert cosine.mean() > 0.9
    assert cosine.min() > 0.7
    assert torch.cosine_similarity(found.flatten(), true.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("spread", [0.03, 0.1])
def test_many_boxes_give_the_slope_itself(spread) -> None:
    """In size as well as in direction, whatever the spread: a bowl is as steep on average as at its middle."""
    found, true = slopes(*bowls(4), 20_000, spread)
    torch.testing.assert_close(found, true, rtol=0.1, atol=0.02 * true.abs().max().item())


def test_boxes_cut_short_at_the_border_still_point_the_way() -> None:
    """The displacements that were really made count, not those that were drawn."""
    torch.manual_seed(6)
    corner = torch.tensor([[0.101, 0.101, 0.1005]], dtype=torch.float64)
    target = torch.tensor([[0.4, 0.3, 0.3]], dtype=torch.float64)
    proposals = corner.clone().requires_grad_()
    tried = neighbours(corner, 512, 0.2)
    loss = perturbed_loss(proposals, tried, bowl(tried, target), 0.2)
    (found,) = torch.autograd.grad(loss, proposals)
    assert (found < 0).all()  # right, down and larger make it smaller


@pytest.mark.parametrize("box", [(0.21, 0.5, 0.2), (0.25, 0.77, 0.2), (0.5, 0.5, 0.47)])
def test_the_border_is_no_slope(box) -> None:
    """At the optimum of a curved loss the slope is 0, also where a border cuts boxes short on one side."""
    torch.manual_seed(8)
    start = torch.tensor([box], dtype=torch.float64)
    tried = neighbours(start, 100_000, 0.2)
    for axis, one_tenth_off in enumerate(torch.eye(3, dtype=torch.float64) * 0.1):
        moves = torch.cat(
            [(tried[..., :2] - start[:, :2]) / (2 * start[:, 2:]), (tried[..., 2:] / start[:, 2:]).log()],
            dim=2,
        )
        found = []
        for away in (0.0, one_tenth_off[axis].item()):
            proposals = start.clone().requires_grad_()
            loss = perturbed_loss(proposals, tried, (moves[..., axis] - away).square(), 0.2)
            gradient = torch.autograd.grad(loss, proposals)[0][0]
            found.append(abs(gradient[axis].item()))
        assert found[0] < 0.3 * found[1], (axis, found)  # lopsided pairs come to more than 1


def test_descent_through_an_apns_bounds_ends_at_the_optimum() -> None:
    torch.manual_seed(7)
    floor, ceiling = 0.2, 0.9
    apn = attention.APN((4, 3, 5), 8, floor, ceiling)
    target = torch.tensor([[0.35, 0.4, 0.15], [0.6, 0.55, 0.25], [0.5, 0.4, 0.13], [0.65, 0.62, 0.18]])
    raw = torch.zeros(4, 3, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        proposals = apn.to_box(raw)
        with torch.no_grad():
            tried = neighbours(proposals, 8, 0.1)
            losses = bowl(tried, target)
        optimizer.zero_grad()
        perturbed_loss(proposals, tried, losses, 0.1).backward()
        optimizer.step()
        schedule.step()
    found = apn.to_box(raw).detach()
    assert (found - target)[:, :2].abs().max() < 0.005
    assert (found[:, 2] / target[:, 2]).log().abs().max() < 0.03


def test_equal_losses_are_level() -> None:
    start, _ = bowls(3)
    proposals = start.clone().requires_grad_()
    tried = neighbours(start, 8, 0.2)
    perturbed_loss(proposals, tried, torch.full((8, 3), 0.25, dtype=torch.float64), 0.2).backward()
    assert proposals.grad is not None
    assert torch.equal(proposals.grad, torch.zeros(3, 3, dtype=torch.float64))


def test_each_image_has_its_own_slope() -> None:
    start, target = bowls(3)
    proposals = start.clone().requires_grad_()
    tried = neighbours(start, 8, 0.2)
    losses = bowl(tried, target)
    losses[:, 1] = 0.5
    perturbed_loss(proposals, tried, losses, 0.2).backward()
    assert proposals.grad is not None
    assert proposals.grad[1].abs().max() < 1e-12
    assert proposals.grad[[0, 2]].abs().min() > 0


def test_nothing_but_the_proposals_learns() -> None:
    start, target = bowls(3)
    proposals = start.clone().requires_grad_()
    tried = neighbours(start, 8, 0.2).requires_grad_()
    losses = bowl(tried.detach(), target).requires_grad_()
    perturbed_loss(proposals, tried, losses, 0.2).backward()
    assert proposals.grad is not None
    assert proposals.grad.abs().min() > 0
    assert losses.grad is None
    assert tried.grad is None


# ---- in the phases of `alternate`

CLASSES = 4


def options(**changes: object) -> Recipe:
    keys = {"data__source": 80, "model__backbone": "small_cnn", "model__scales": 3, "model__apn_hidden": 8}
    keys |= {"model__sizes": [32, 32, 32], "alternate__margin": 1.0}  # a margin that is never met
    still = {"alternate__jitter": 0.0, "alternate__tighten": 0.0, "alternate__settle": False}
    return tiny(Path("nowhere"), **(keys | still | changes))


def network(recipe: Recipe) -> RACNN:
    """In eval mode, with classifiers that have an opinion and boxes that differ from image to image."""
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


def test_the_apn_phase_tries_boxes_and_leaves_the_cnns_alone() -> None:
    recipe = options(alternate__apn_gradient="perturb", alternate__boxes=6)
    model, stage = network(recipe), stages.apn_phase(recipe)
    passes = [0, 0, 0]

    def count(number: int) -> Callable[..., None]:
        def hook(module: object, given: object, features: Tensor) -> None:
            passes[number] += 1
            assert not features.requires_grad  # no backward pass through a CNN

        return hook

    for number in range(3):
        model.scale(number).backbone.register_forward_hook(count(number))
    moving = freeze_all_but(model, stage.moving(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = []
    for name, loss in stage.losses(model, batch()):
        names.append(name)
        loss.backward()
    assert names == ["rank 1-2", "rank 2-3"]
    assert passes == [1, 6 + 1, 6]  # the middle scale is also the coarse one of the second pair
    assert len(moving) == 8
    for name, parameter in model.named_parameters():
        if ".apn." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    torch.optim.AdamW(moving, lr=1e-2).step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".apn." not in name), name


def test_the_losses_are_those_of_the_boxes_that_were_tried() -> None:
    """By hand: each box in turn instead of the APN's, ranked against the scale before as it is."""
    recipe = options(alternate__apn_gradient="perturb", alternate__boxes=4, alternate__spread=0.15)
    model, given = network(recipe), batch()
    given["key"] = keys(10, 0, torch.arange(4))
    stage = stages.apn_phase(recipe)
    freeze_all_but(model, stage.moving(model))
    found = {}
    for name, loss in stage.losses(model, given):
        found[name] = loss.item()
        loss.backward()
    draws, plain = Draws.of(given), model(given["image"])
    for number, name in enumerate(found):
        proposal = plain.proposals[number].detach().requires_grad_()
        tried = neighbours(proposal.detach(), 4, 0.15, draws.normal(6))
        losses = []
        for one in tried:
            boxes = [plain.proposals[0], one] if number else [one, one]
            fine = model(given["image"], boxes).logits[number + 1]
            losses.append(
                [
                    rank_loss(plain.logits[number][[i]], fine[[i]], given["label"][[i]], 1.0).item()
                    for i in range(4)
                ]
            )
        table = torch.tensor(losses)
        assert found[name] == pytest.approx(table.mean().item(), rel=1e-4)
        apn = model.scale(number).apn
        assert apn is not None
        (slope,) = torch.autograd.grad(perturbed_loss(proposal, tried, table, 0.15), proposal)
        wanted = torch.autograd.grad(plain.proposals[number], apn.box.weight, slope, retain_graph=True)[0]
        torch.testing.assert_close(
            apn.box.weight.grad, wanted, rtol=1e-2, atol=1e-4 * wanted.abs().max().item()
        )


def seen(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, round_: int = 0, images: int = 64) -> Tensor:
    """The factors of the centre's shift, in half-sides, and of the side that scale 2's boxes get: (B, 3)."""
    model = network(recipe)
    given = torch.tensor([[0.5, 0.5, 0.3]]).expand(images, 3)
    boxes = []
    view = model.next_view

    def next_view(number: int, source: Tensor, before: Tensor, parent: Tensor, proposal: Tensor):
        boxes.append(proposal)
        return view(number, source, before, parent, proposal)

    monkeypatch.setattr(model, "next_view", next_view)
    torch.manual_seed(11)
    stage = stages.cnn_phase(recipe, lambda _: [given], round_)
    with torch.no_grad():
        assert len(list(stage.losses(model, batch(images)))) == 2
    assert len(boxes) == 1
    return torch.cat([(boxes[0][:, :2] - 0.5) / 0.3, boxes[0][:, 2:] / 0.3], dim=1)


def two_scales(**changes: object) -> Recipe:
    bounds = {"model__floor": 0.05, "model__ceiling": 0.95}
    return options(model__scales=2, model__sizes=[32, 32], **bounds, **changes)


def test_tighter_boxes_in_the_cnn_phase(monkeypatch) -> None:
    boxes = seen(two_scales(alternate__tighten=1.0), monkeypatch)
    assert boxes[:, :2].abs().max() < 1e-6  # nothing but the side
    assert boxes[:, 2].min() >= math.exp(-1) - 1e-6
    assert boxes[:, 2].max() <= 1 + 1e-6
    assert boxes[:, 2].log().mean().item() == pytest.approx(-0.5, abs=0.12)
    assert torch.equal(seen(two_scales(), monkeypatch)[:, 2], torch.ones(64))


def test_the_boxes_settle_round_by_round(monkeypatch) -> None:
    keys = {"alternate__tighten": 0.6, "alternate__jitter": 0.2, "alternate__rounds": 4}
    settling, restless = two_scales(alternate__settle=True, **keys), two_scales(**keys)
    rounds = [seen(settling, monkeypatch, number) for number in range(4)]
    assert torch.equal(rounds[0], seen(restless, monkeypatch))
    assert torch.equal(rounds[0], seen(restless, monkeypatch, 3))  # settling has to be asked for
    assert torch.equal(rounds[3], torch.tensor([[0.0, 0.0, 1.0]]).expand(64, 3))
    for number, left in enumerate((1, 2 / 3, 1 / 3)):
        shift, scale = rounds[number][:, :2].abs(), rounds[number][:, 2].log()
        assert 0.9 * 0.2 * left < shift.max() <= 0.2 * left + 1e-5
        assert -0.8 * left - 1e-5 <= scale.min() < -0.65 * left
        assert scale.max() <= 0.2 * left + 1e-5


def test_a_single_round_has_nothing_to_settle_to(monkeypatch) -> None:
    keys = {"alternate__tighten": 0.6, "alternate__rounds": 1}
    alone = seen(two_scales(alternate__settle=True, **keys), monkeypatch)
    assert torch.equal(alone, seen(two_scales(**keys), monkeypatch))


def test_tighter_boxes_start_from_what_the_apn_proposes(monkeypatch) -> None:
    recipe = two_scales(alternate__tighten=1.0)
    model, given = network(recipe), batch(32)
    boxes = []
    view = model.next_view

    def next_view(number: int, source: Tensor, before: Tensor, parent: Tensor, proposal: Tensor):
        boxes.append(proposal)
        return view(number, source, before, parent, proposal)

    with torch.no_grad():
        proposals = model(given["image"]).proposals[0]
        monkeypatch.setattr(model, "next_view", next_view)
        list(stages.cnn_phase(recipe).losses(model, given))
    ratio = boxes[0][:, 2] / proposals[:, 2]
    torch.testing.assert_close(boxes[0][:, :2], proposals[:, :2])
    assert ratio.max() <= 1 + 1e-5
    assert ratio.mean() < 0.8
