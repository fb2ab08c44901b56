"""Weights of every naming scheme load completely or not at all."""

import os
import pickle

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.errors import WeightsError
from ear_teacher_cli.model.checkpoint import read_checkpoint, read_tensors
from ear_teacher_cli.model.weights import load_file, load_pretrained

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny():
    """Return timm's ConvNeXt-Tiny with random weights."""
    torch.manual_seed(0)
    return timm.create_model("convnext_tiny", num_classes=10).eval()


def facebook_names(model) -> dict[str, torch.Tensor]:
    """Return the weights under the names that the code of facebookresearch/ConvNeXt gives them."""
    own, state = model.state_dict(), {}
    for i in range(4):
        for j in (0, 1):
            for leaf in ("weight", "bias"):
                timm_name = f"stem.{j}.{leaf}" if i == 0 else f"stages.{i}.downsample.{j}.{leaf}"
                state[f"downsample_layers.{i}.{j}.{leaf}"] = own[timm_name]
        for j in range((3, 3, 9, 3)[i]):
            theirs, ours = f"stages.{i}.{j}", f"stages.{i}.blocks.{j}"
            state[f"{theirs}.gamma"] = own[f"{ours}.gamma"]
            for a, b in (("dwconv", "conv_dw"), ("norm", "norm"), ("pwconv1", "mlp.fc1"), ("pwconv2", "mlp.fc2")):
                for leaf in ("weight", "bias"):
                    state[f"{theirs}.{a}.{leaf}"] = own[f"{ours}.{b}.{leaf}"]
    for a, b in (("norm", "head.norm"), ("head", "head.fc")):
        for leaf in ("weight", "bias"):
            state[f"{a}.{leaf}"] = own[f"{b}.{leaf}"]
    return state


def embeds_like(backbone, model) -> bool:
    with torch.no_grad():
        return torch.equal(backbone.eval()(IMAGE), model.forward_head(model.forward_features(IMAGE), pre_logits=True))


def test_facebooks_convnext_tiny_loads_completely_with_a_receipt(tiny, tmp_path):
    state = facebook_names(tiny)
    assert len(state) == 182
    torch.save({"model": state}, tmp_path / "convnext_tiny_22k_224.pth")
    backbone = timm.create_model("convnext_tiny", num_classes=0)
    receipt = load_file(backbone, "convnext_tiny", tmp_path / "convnext_tiny_22k_224.pth")
    assert str(receipt).startswith("backbone 180/180 tensors, facebook -> timm names, 2 classifier tensors left out")
    assert embeds_like(backbone, tiny)


@pytest.mark.slow
def test_torchvisions_convnext_tiny_loads_completely(tmp_path):
    theirs = torchvision.models.convnext_tiny(num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    backbone = timm.create_model("convnext_tiny", num_classes=0).eval()
    receipt = load_file(backbone, "convnext_tiny", tmp_path / "tv.pth")
    assert (receipt.naming, receipt.loaded, receipt.left_out) == ("torchvision", 180, 2)
    with torch.no_grad():
        expected = theirs.classifier[:2](theirs.avgpool(theirs.features(IMAGE)))  # up to the last linear layer
        assert torch.allclose(backbone(IMAGE), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["model.backbone.", "backbone.", "module."])
@pytest.mark.parametrize("naming", ["timm", "facebook"])
def test_lightning_prefixes_over_any_names(tiny, tmp_path, prefix, naming):
    state = facebook_names(tiny) if naming == "facebook" else tiny.state_dict()
    state = {prefix + name: tensor for name, tensor in state.items()}
    if "backbone" in prefix:
        state["decoder.weight"] = torch.zeros(3)  # other tensors of a training checkpoint are ignored
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "x.ckpt")
    backbone = timm.create_model("convnext_tiny", num_classes=0)
    receipt = load_file(backbone, "convnext_tiny", tmp_path / "x.ckpt")
    assert receipt.loaded == 180 and naming in receipt.naming
    assert embeds_like(backbone, tiny)


def test_timm_safetensors_without_classifier(tiny, tmp_path):
    state = {k: v for k, v in tiny.state_dict().items() if not k.startswith("head.fc")}
    save_file(state, tmp_path / "x.safetensors")
    backbone = timm.create_model("convnext_tiny", num_classes=0)
    assert load_file(backbone, "convnext_tiny", tmp_path / "x.safetensors").left_out == 0
    assert embeds_like(backbone, tiny)


def test_one_missing_tensor_is_an_error_that_names_it(tiny, tmp_path):
    state = facebook_names(tiny)
    del state["stages.2.4.dwconv.weight"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"1 missing: stages\.2\.blocks\.4\.conv_dw\.weight"):
        load_file(timm.create_model("convnext_tiny", num_classes=0), "convnext_tiny", tmp_path / "x.pth")


def test_one_unexpected_tensor_is_an_error_that_names_it(tiny, tmp_path):
    torch.save({**facebook_names(tiny), "stages.0.7.gamma": torch.zeros(96)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"1 unexpected: stages\.0\.blocks\.7\.gamma"):
        load_file(timm.create_model("convnext_tiny", num_classes=0), "convnext_tiny", tmp_path / "x.pth")


def test_another_architecture_is_refused_naming_keys(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(WeightsError, match=r"0 of 180 tensors fit convnext_tiny.*missing.*unexpected: bn1\.bias"):
        load_file(timm.create_model("convnext_tiny", num_classes=0), "convnext_tiny", tmp_path / "resnet.pth")


def test_a_larger_sibling_is_refused(tmp_path):
    torch.save(timm.create_model("test_convnext2", num_classes=0).state_dict(), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="tensors fit test_convnext "):
        load_file(timm.create_model("test_convnext", num_classes=0), "test_convnext", tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "missing", "folder", "no tensors"])
def test_damaged_files_are_named(tmp_path, name, damage):
    path = tmp_path / name
    state = timm.create_model("test_convnext", num_classes=0).state_dict()
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    if damage == "garbage":
        path.write_bytes(os.urandom(5000))
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no tensors":
        torch.save({"a": 1}, path)
    else:
        path.unlink()
    if damage == "folder":
        path.mkdir()
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        read_tensors(path)


class Command:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("reader", [read_tensors, read_checkpoint])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path, reader, zipped):
    proof = tmp_path / "proof"
    torch.save({"state_dict": Command(f"touch {proof}")}, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"evil\.ckpt.*system.*nothing was run"):
        reader(tmp_path / "evil.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Command(f"touch {proof}")))
    with pytest.raises(WeightsError):
        reader(tmp_path / "plain.ckpt")
    assert not proof.exists()


def test_without_file_and_network_both_alternatives_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig()
    with pytest.raises(WeightsError, match=r"convnext_tiny\.fb_in22k.*--pretrained-path.*--no-pretrained"):
        load_pretrained(timm.create_model("convnext_tiny", num_classes=0), config)


def test_the_default_file_is_used_if_it_exists(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    torch.save({"model": facebook_names(tiny)}, tmp_path / TrainConfig.pretrained_path)
    backbone = timm.create_model("convnext_tiny", num_classes=0)
    assert load_pretrained(backbone, TrainConfig()).naming == "facebook"
    assert embeds_like(backbone, tiny)


def test_a_named_file_that_is_absent_is_not_replaced_by_the_hub(tmp_path):
    config = TrainConfig(pretrained_path=str(tmp_path / "nope.pth"))
    with pytest.raises(WeightsError, match="nope.pth: no such file"):
        load_pretrained(timm.create_model("convnext_tiny", num_classes=0), config)
