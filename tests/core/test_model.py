"""RACNN: construction, views, losses, and saving and loading of weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from blobs import tiny, write_blobs
from safetensors.torch import load_file, save_file

import racnn_cli
from racnn_cli import backbones, recipe
from racnn_cli.core import attention, store
from racnn_cli.core.losses import classification_loss, rank_loss
from racnn_cli.core.model import RACNN, build, resolve, sizes_of
from racnn_cli.errors import RunError, SizeRefused
from racnn_cli.recipe import Recipe
from racnn_cli.training import phases, stages
from racnn_cli.training.loop import freeze_all_but, make_optimizer, set_training_mode

CLASSES = 4


def network(scales: int = 3, sizes: tuple[int, ...] | None = None, source: int = 96, **keys: object) -> RACNN:
    """A small network in eval mode whose boxes differ from image to image."""
    torch.manual_seed(0)
    options = recipe.Model(
        **({"backbone": "test_resnet", "weights": "none", "apn_hidden": 8, "scales": scales} | keys),  # type: ignore[arg-type]
        sizes=sizes or (64,) * scales,
    )
    model = build(options, CLASSES, source=source).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "apn.box.weight" in name:
                tensor.mul_(50)
            if "classifier.weight" in name or "fusion.weight" in name:
                tensor.normal_()
    return model


def random_images(side: int = 96, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, side, side, generator=generator)


# ---- construction


def test_plain_keywords_build_what_a_recipe_builds() -> None:
    keywords = {"zoom": "nested", "floor": 0.2, "ceiling": 0.9, "side": 0.4, "apn_hidden": 4, "k": 2.0}
    section = recipe.Model(backbone="small_cnn", weights="none", scales=2, sizes=(48, 32), **keywords)  # type: ignore[arg-type]
    models = []
    for make in (
        lambda: build(section, CLASSES, source=96),
        lambda: RACNN("small_cnn", CLASSES, source=96, scales=2, sizes=(48, 32), **keywords),
        lambda: RACNN(backbones.build_scales("small_cnn", (48, 32)), CLASSES, source=96, **keywords),
    ):
        torch.manual_seed(5)
        models.append(make().eval())
    outputs = [model(random_images()) for model in models]
    for model, output in zip(models[1:], outputs[1:], strict=True):
        assert model.state_dict().keys() == models[0].state_dict().keys()
        assert torch.equal(output.probabilities, outputs[0].probabilities)
        assert torch.equal(output.boxes[0], outputs[0].boxes[0])
        assert (model.floor, model.ceiling, model.side, model.k) == (0.2, 0.9, 0.4, 2.0)


def test_a_name_alone_takes_the_native_sizes() -> None:
    model = RACNN("small_cnn", 3)
    assert (model.sizes, model.source, model.zoom) == ((32, 32, 32), 32, "source")


def test_contradicting_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="2 entries for 3 scales"):
        RACNN("small_cnn", 3, sizes=(32, 32))
    with pytest.raises(ValueError, match="zoom must be source or nested"):
        RACNN("small_cnn", 3, zoom="both")  # type: ignore[arg-type]
    with pytest.raises(SizeRefused, match="1×1 feature map at 32 px"):
        RACNN("test_resnet", 3, scales=2, sizes=(32, 32))


# ---- shapes


@pytest.mark.parametrize("scales", [1, 2, 3, 4, 5])
def test_shapes_for_any_number_of_scales(scales) -> None:
    sizes = (96, 64, 64, 48, 32)[:scales]
    model = network(scales, sizes)
    with torch.no_grad():
        output = model(random_images(count=3))
    assert model.sizes == sizes
    assert [tuple(v.shape) for v in output.views] == [(3, 3, s, s) for s in sizes]
    assert [tuple(x.shape) for x in output.logits] == [(3, CLASSES)] * scales
    assert [tuple(b.shape) for b in output.boxes] == [(3, 3)] * (scales - 1)
    assert [tuple(b.shape) for b in output.proposals] == [(3, 3)] * (scales - 1)
    assert output.probabilities.shape == output.fused.shape == (3, CLASSES)
    torch.testing.assert_close(output.probabilities.sum(1), torch.ones(3))
    for box in output.boxes:
        assert (box[:, :2] - box[:, 2:] > -1e-6).all()
        assert (box[:, :2] + box[:, 2:] < 1 + 1e-6).all()


def test_one_scale_is_the_plain_backbone() -> None:
    model = network(1, (64,), source=64)
    assert model.fusion is None
    assert not any("apn" in name or "fusion" in name for name in model.state_dict())
    images = random_images(64)
    with torch.no_grad():
        output = model(images)
        scale = model.scale(0)
        features = scale.backbone((images - model.mean) / model.std)
        expected = scale.classifier(scale.backbone.descriptor(features))
    torch.testing.assert_close(output.probabilities, expected.softmax(1))
    torch.testing.assert_close(output.fused, output.logits[0])


def test_the_last_scale_has_no_apn_and_every_other_has() -> None:
    model = network(3)
    assert [model.scale(n).apn is not None for n in range(3)] == [True, True, False]


def test_sizes_default_to_the_backbones_native_sizes() -> None:
    vgg = recipe.Model(backbone="vgg19", weights="none", scales=3)
    assert sizes_of(vgg) == (448, 224, 224)
    assert sizes_of(recipe.Model(backbone="test_resnet", weights="none", scales=2)) == (160, 160)
    assert sizes_of(vgg.model_copy(update={"sizes": (64, 32, 32)})) == (64, 32, 32)


# ---- views


@pytest.mark.parametrize("zoom", ["source", "nested"])
def test_views_are_crops_of_the_source_or_of_the_previous_view(zoom) -> None:
    model = network(3, (64, 48, 32), zoom=zoom)
    images = random_images()
    with torch.no_grad():
        output = model(images)
    source = model.normalise(images)
    first = attention.zoom(source, attention.full_box(source), 64, k=math.inf, gradient="none")
    torch.testing.assert_close(output.views[0], first)
    torch.testing.assert_close(output.boxes[0], output.proposals[0])
    torch.testing.assert_close(output.boxes[1], attention.compose(output.boxes[0], output.proposals[1]))
    k = model.k
    for number, size in ((1, 48), (2, 32)):
        if zoom == "source":
            expected = attention.zoom(source, output.boxes[number - 1], size, k=k)
        else:
            expected = attention.zoom(output.views[number - 1], output.proposals[number - 1], size, k=k)
        torch.testing.assert_close(output.views[number], expected)


def test_a_crop_of_the_source_is_sharper_than_a_nested_crop() -> None:
    stripes = (torch.arange(192) // 2 % 2).float().expand(1, 3, 192, 192)
    contrast = {}
    for zoom in ("source", "nested"):
        model = network(2, (64, 64), zoom=zoom, k=math.inf)
        with torch.no_grad():
            source = model.normalise(stripes)
            view, box = model.first_view(source), attention.full_box(source)
            proposal = torch.tensor([[0.5, 0.5, 1 / 6]])
            contrast[zoom] = model.next_view(1, source, view, box, proposal)[0].std().item()
    assert contrast["source"] > 3 * contrast["nested"]


def test_a_box_gets_a_gradient_from_its_own_crop_only() -> None:
    model = network(3)
    source = model.normalise(random_images(count=1))
    view = model.first_view(source)
    parent = torch.tensor([[0.4, 0.6, 0.3]], requires_grad=True)
    proposal = torch.tensor([[0.5, 0.4, 0.25]], requires_grad=True)
    crop, box = model.next_view(2, source, view, parent, proposal)
    torch.testing.assert_close(box, torch.tensor([[0.4, 0.54, 0.15]]))
    (crop.square().sum() + box.sum()).backward()
    assert parent.grad is None
    assert proposal.grad is not None
    assert (proposal.grad != 0).all()


def test_bytes_and_floats_give_the_same_result() -> None:
    model = network(2)
    as_bytes = (random_images() * 255).round().to(torch.uint8)
    with torch.no_grad():
        from_bytes, from_floats = model(as_bytes), model(as_bytes.float() / 255)
    torch.testing.assert_close(from_bytes.probabilities, from_floats.probabilities)
    torch.testing.assert_close(from_bytes.boxes[0], from_floats.boxes[0])


def test_normalisation_is_the_backbones() -> None:
    model = network(1, (64,))
    pixel = torch.tensor([0.2, 0.4, 0.6])[None, :, None, None].expand(1, 3, 64, 64)
    mean, std = model.scale(0).backbone.mean, model.scale(0).backbone.std
    expected = [(v - m) / s for v, m, s in zip((0.2, 0.4, 0.6), mean, std, strict=True)]
    torch.testing.assert_close(model.normalise(pixel)[0, :, 0, 0], torch.tensor(expected))


# ---- weights


def test_scales_start_equal_and_share_no_weights() -> None:
    model = build(
        recipe.Model(backbone="test_resnet", weights="none", scales=3, sizes=(64, 64, 64), apn_hidden=8),
        CLASSES,
        source=64,
    )
    states = [model.scale(number).backbone.state_dict() for number in range(3)]
    for name in states[0]:
        assert all(torch.equal(states[0][name], other[name]) for other in states[1:]), name
    pointers = [p.data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    with torch.no_grad():
        next(model.scale(0).backbone.parameters()).add_(1)
    second = next(model.scale(1).backbone.parameters())
    assert not torch.equal(next(model.scale(0).backbone.parameters()), second)


def test_save_and_load_are_exact(tmp_path) -> None:
    model, other = network(3), network(3)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    file = tmp_path / "weights.safetensors"
    store.save_weights(file, model)
    store.load_weights(file, other)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    # Only one key: safetensors orders several differently in each process, and equal weights must give equal bytes.
    assert store.read_tensors(file)[1] == {"racnn": racnn_cli.__version__}
    images = random_images()
    with torch.no_grad():
        assert torch.equal(model(images).probabilities, other(images).probabilities)


def test_channels_last_weights_are_saved_unchanged(tmp_path) -> None:
    model = network(2)
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    store.save_weights(tmp_path / "w.safetensors", model)
    for name, tensor in load_file(tmp_path / "w.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_weights_of_another_network_are_refused_and_nothing_is_loaded(tmp_path) -> None:
    file = tmp_path / "weights.safetensors"
    store.save_weights(file, network(2))
    model = network(3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(RunError) as caught:
        store.load_weights(file, model)
    assert "scales.2.backbone" in caught.value.message
    assert "more" in caught.value.message
    assert str(file) in caught.value.message
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_different_shape_is_reported_with_both_shapes(tmp_path) -> None:
    model = network(2)
    tensors = dict(model.state_dict())
    tensors["fusion.bias"] = torch.zeros(CLASSES + 3)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(RunError, match=r"fusion.bias: \(7,\) where \(4,\) is needed"):
        store.load_weights(tmp_path / "w.safetensors", model)


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "folder"])
def test_damaged_weights_are_a_failure(tmp_path, damage) -> None:
    file = tmp_path / "weights.safetensors"
    model = network(1, (64,))
    store.save_weights(file, model)
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": b"\x07" * 999}[damage])
    with pytest.raises(RunError) as caught:
        store.load_weights(file, model)
    assert "weights.safetensors" in caught.value.message
    assert caught.value.exit_code == (2 if damage == "folder" else 1)


# ---- fusion


def test_fusion_starts_as_the_mean_of_the_logits() -> None:
    model = network(3)
    torch.manual_seed(2)
    norms = [3.0, 0.5, 8.0]
    descriptors = [F.normalize(torch.randn(5, model.scale(n).backbone.width), dim=1) * norms[n] for n in range(3)]
    with torch.no_grad():
        for number in range(3):
            model.scale(number).classifier.bias.normal_()
        stages.initialise_fusion(model, norms)
        logits = torch.stack([model.scale(n).classifier(descriptors[n]) for n in range(3)])
        torch.testing.assert_close(model.fuse(descriptors, list(logits)), logits.mean(0))
        # Each descriptor is normalized, so its length does not matter.
        longer = [d * (n + 2) for n, d in enumerate(descriptors)]
        torch.testing.assert_close(model.fuse(longer, list(logits)), logits.mean(0))


# ---- the source


@pytest.mark.parametrize(
    ("sizes", "side", "files", "changes", "expected"),
    [
        ((224, 224, 224), 0.5, 4000, {}, 896),  # 224 / 0.5², a pixel per pixel of the finest box
        ((224, 224, 224), 0.5, 600, {}, 600),  # the files have no more
        ((224, 224, 224), 0.5, 100, {}, 224),
        ((288, 288, 288), 0.85, 4000, {}, 399),
        ((448, 224, 224), 0.5, 4000, {}, 896),
        ((224, 224, 224), 0.5, 4000, {"model.zoom": "nested"}, 224),
        ((224, 224, 224), 0.2, 4000, {"train.batch": 64}, 1182),  # a batch of it takes a gigabyte
        ((224, 224, 224), 0.5, 0, {}, 224),  # files of an unknown size
        ((224, 224, 224), 0.5, 4000, {"data.source": 300}, 300),
    ],
)
def test_the_source_has_a_pixel_for_each_pixel_of_the_finest_view(sizes, side, files, changes, expected) -> None:
    keys = {"model.weights": "none", "model.sizes": list(sizes), "model.side": side, "model.floor": 0.1}
    recipe = Recipe.model_validate({"model": {"weights": "none"}}).override(keys | changes)
    assert resolve(recipe, side=files).data.source == expected


# ---- losses


def test_classification_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    labels = torch.tensor([1, 1])
    expected = -(math.log(3 / 4) + math.log(1 / 5)) / 2
    assert classification_loss(logits, labels).item() == pytest.approx(expected)
    # Smoothing s gives each of the N classes s / N, and the true class the rest.
    smooth = -(0.9 * math.log(3 / 4) + 0.1 * math.log(1 / 4) + 0.9 * math.log(1 / 5) + 0.1 * math.log(4 / 5))
    assert classification_loss(logits, labels, 0.2).item() == pytest.approx(smooth / 2)


def test_rank_loss_by_hand() -> None:
    # p_t of the coarse scale: 0.75, 0.2, 0.5; of the fine scale: 0.5, 0.8, 0.53.
    coarse = torch.tensor([[0.75, 0.25], [0.8, 0.2], [0.5, 0.5]]).log()
    fine = torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.53, 0.47]]).log()
    labels = torch.tensor([0, 1, 0])
    expected = ((0.75 - 0.5 + 0.05) + 0.0 + (0.5 - 0.53 + 0.05)) / 3
    assert rank_loss(coarse, fine, labels, 0.05).item() == pytest.approx(expected)
    assert rank_loss(coarse + 5, fine - 3, labels, 0.05).item() == pytest.approx(expected)  # softmax, not logits
    assert rank_loss(fine, fine, labels, 0.05).item() == pytest.approx(0.05)


def test_the_reference_of_the_rank_loss_is_detached() -> None:
    coarse = torch.randn(4, 3, requires_grad=True)
    fine = torch.randn(4, 3, requires_grad=True)
    rank_loss(coarse, fine, torch.tensor([0, 1, 2, 0]), 1.0).backward()
    assert coarse.grad is None
    assert fine.grad is not None
    assert fine.grad.abs().sum() > 0


# ---- a training step of every stage


def one_step_of_every_stage(model: RACNN, options: recipe.Recipe, batch: int) -> None:
    images = torch.randint(0, 256, (batch, 3, model.source, model.source), dtype=torch.uint8)
    labels = torch.arange(batch) % CLASSES
    factories = (phases.pretrain_cnn, phases.pretrain_apn, phases.cnn_phase, phases.apn_phase, phases.fusion)
    for make_stage in factories:
        stage = make_stage(options)
        modules = stage.modules(model)
        trained = freeze_all_but(model, modules)
        set_training_mode(model, modules, freeze_batchnorm=False)
        before = [p.detach().clone() for p in trained]
        optimizer = make_optimizer(options, stage, model)
        for name, loss in stage.losses(model, modules, {"image": images, "label": labels}):
            assert math.isfinite(loss.item()), name
            loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained), stage.name
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        unchanged = [tuple(a.shape) for a, b in zip(before, trained, strict=True) if torch.equal(a, b)]
        assert not unchanged, f"{stage.name}: {unchanged}"


def vgg_recipe(folder, name: str, sizes: list[int]) -> recipe.Recipe:
    changes = {"model__backbone": name, "model__scales": 3, "model__sizes": sizes, "alternate__margin": 1.0}
    return tiny(folder, data__source=sizes[0], model__side=0.6, **changes)


def test_vgg_takes_a_step_of_every_stage(tmp_path) -> None:
    options = vgg_recipe(write_blobs(tmp_path / "data", {"train": 1}), "vgg11", [64, 32, 32])
    torch.manual_seed(0)
    one_step_of_every_stage(build(options.model, CLASSES, source=64), options, 2)


def test_vgg19_at_the_papers_sizes_takes_a_step_of_every_stage(tmp_path) -> None:
    options = vgg_recipe(write_blobs(tmp_path / "data", {"train": 1}), "vgg19", [448, 224, 224])
    torch.manual_seed(0)
    one_step_of_every_stage(build(options.model, CLASSES, source=448), options, 1)
