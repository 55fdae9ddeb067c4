"""The contract of `Backbone`, checked for every family of models."""

from __future__ import annotations

import copy
from pathlib import Path

import onnxruntime
import pytest
import torch

from racnn_cli import backbones
from racnn_cli.backbones import Backbone

# Name: size, (C, h, w) of the features, D of the descriptor; one or two of each layout.
FAMILIES = {
    "vgg11": (64, (512, 4, 4), 512),
    "vgg11_bn": (48, (512, 3, 3), 512),
    "small_cnn": (32, (96, 8, 8), 96),  # registered by this package
    "test_resnet": (64, (96, 2, 2), 96),
    "test_convnext": (64, (64, 2, 2), 64),  # trained norm in its head
    "test_efficientnet": (64, (256, 2, 2), 256),
    "mobilenetv3_small_050": (64, (288, 2, 2), 1024),  # trained convolution in its head
    "swin_tiny_patch4_window7_224": (64, (768, 2, 2), 768),  # NHWC
    "test_mambaout": (64, (64, 2, 2), 256),  # NHWC with trained layers in its head
    "test_vit": (64, (64, 4, 4), 64),  # class token
    "test_vit2": (64, (64, 4, 4), 64),  # trained norm behind its pool
    "deit_tiny_distilled_patch16_224": (64, (192, 4, 4), 192),  # two prefix tokens
    "cait_xxs24_224": (64, (192, 4, 4), 192),  # trained layers that only the class token reaches
}
EXPORTED = (
    "vgg11",
    "small_cnn",
    "test_resnet",
    "test_convnext",
    "test_efficientnet",
    "mobilenetv3_small_050",
    "swin_tiny_patch4_window7_224",
    "test_vit",
    "deit_tiny_distilled_patch16_224",
)


@pytest.fixture(scope="module")
def get_backbone():
    """Each family's backbone, built once; noise is added to the weights, because some layers start from zeros."""
    cache: dict[str, Backbone] = {}

    def get(name: str) -> Backbone:
        if name not in cache:
            torch.manual_seed(0)
            cache[name] = backbones.build(name, size=FAMILIES[name][0]).eval()
            with torch.no_grad():
                for weight in cache[name].parameters():
                    weight.add_(0.02 * torch.randn_like(weight))
        return cache[name]

    return get


def images(model: Backbone, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, model.input_size, model.input_size, generator=generator)


@pytest.mark.parametrize("name", FAMILIES)
class TestContract:
    def test_shapes_are_as_promised(self, get_backbone, name: str) -> None:
        model = get_backbone(name)
        size, (channels, height, width), descriptor_width = FAMILIES[name]
        with torch.no_grad():
            features = model(images(model))
            descriptor = model.descriptor(features)
        assert features.shape == (2, channels, height, width)
        assert descriptor.shape == (2, descriptor_width)
        assert (model.channels, model.map_size, model.width) == (channels, (height, width), descriptor_width)
        assert (model.name, model.input_size) == (name, size)
        assert len(model.mean) == len(model.std) == 3

    def test_every_weight_gets_a_gradient(self, get_backbone, name: str) -> None:
        model = get_backbone(name)
        model.zero_grad(set_to_none=True)
        descriptor = model.descriptor(model(images(model)))
        weights = torch.randn(descriptor.shape, generator=torch.Generator().manual_seed(2))
        (descriptor * weights).sum().backward()
        for weight_name, weight in model.named_parameters():
            assert weight.grad is not None, weight_name
            assert weight.grad.isfinite().all(), weight_name
            assert weight.grad.abs().sum() > 0, weight_name
        model.zero_grad(set_to_none=True)

    def test_every_cell_of_the_map_affects_the_descriptor(self, get_backbone, name: str) -> None:
        model = get_backbone(name)
        features = model(images(model, 1)).detach().requires_grad_()
        model.descriptor(features).square().sum().backward()
        assert (features.grad.abs().sum(dim=1) > 0).all()

    def test_float64(self, get_backbone, name: str) -> None:
        model = get_backbone(name)
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            single = model.descriptor(model(images(model)))
            double = exact.descriptor(exact(images(model).double()))
        assert double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3)

    def test_evaluation_changes_no_weight_and_no_buffer(self, get_backbone, name: str) -> None:
        model = get_backbone(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            model.descriptor(model(images(model)))
        after = model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)


def shorten(module: torch.nn.Module) -> None:
    """Keep two of the blocks of each stage: the exporter handles them one by one, and the others are like these."""
    for name, child in module.named_children():
        if name != "blocks":
            shorten(child)
        elif not isinstance(child[0], torch.nn.Sequential):  # MobileNet's blocks are stages
            module.blocks = child[:2]


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_to_onnx_with_any_batch_size(get_backbone, name: str, tmp_path: Path) -> None:
    model = copy.deepcopy(get_backbone(name))
    shorten(model)

    class WithDescriptor(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = model

        def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            features = self.backbone(inputs)
            return features, self.backbone.descriptor(features)

    file = tmp_path / "model.onnx"
    torch.onnx.export(
        WithDescriptor().eval(),
        (images(model, 2),),
        file,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(file)
    for count in (1, 3):
        batch = images(model, count)
        outputs = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        with torch.no_grad():
            expected = WithDescriptor()(batch)
        for output, reference in zip(outputs, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(output), reference, rtol=1e-4, atol=1e-4)
