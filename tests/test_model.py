"""Shapes of the teacher model, and a gradient for every parameter."""

import pytest
import timm
import torch

from ear_teacher_cli.config import DECODER_INPUTS, TrainConfig, preset
from ear_teacher_cli.data.preprocessing import from_unit, normalise, preprocessing_of, to_unit
from ear_teacher_cli.errors import ConfigError
from ear_teacher_cli.model.teacher import TeacherModel


def config(**changes):
    return TrainConfig(**{"backbone": "test_convnext", "image_size": 64, "pretrained": False, **changes})


@pytest.mark.parametrize("given", DECODER_INPUTS)
@pytest.mark.parametrize("size", [64, 96, 224])
def test_shapes_from_pixels_to_pixels(size, given):
    model = TeacherModel(config(image_size=size, decoder_input=given))
    embedding = model.embed(torch.zeros(2, 3, size, size))
    assert embedding.shape == (2, 64) and model.embedding_dim == 64
    assert model.predict(embedding).shape == (2, 256)
    features = model.embed_with_maps(torch.zeros(2, 3, size, size))
    assert model.decoder(model.decoder_input(*features)).shape == (2, 3, size, size)


@pytest.mark.slow
def test_the_model_of_the_original_package_has_768_dimensions_and_224_pixels():
    model = TeacherModel(TrainConfig(pretrained=False, embedding_dim=768, **preset("original")))
    assert model.embedding_dim == 768
    assert model.decoder(torch.zeros(1, 768)).shape == (1, 3, 224, 224)


def test_embedding_dim_must_agree():
    with pytest.raises(ConfigError, match="512 given, but test_convnext has 64"):
        TeacherModel(config(embedding_dim=512))


def test_an_unknown_backbone_is_an_error_that_names_similar_ones():
    with pytest.raises(ConfigError, match="convnext_tiny"):
        TeacherModel(config(backbone="convnext_tin"))


@pytest.mark.parametrize("given", DECODER_INPUTS)
def test_every_parameter_gets_a_gradient(given):
    model = TeacherModel(config(decoder_input=given, decoder_start="random"))
    embedding, maps = model.embed_with_maps(torch.randn(4, 3, 64, 64))
    images = model.decoder(model.decoder_input(embedding, maps))
    (images.square().mean() + model.predict(embedding).square().mean()).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # the gradient of a bias before batch normalisation or ReLU may be exactly 0, but not None
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert not any(name.endswith("weight") for name in still)


def test_without_a_metric_loss_there_are_no_heads():
    model = TeacherModel(config(), heads=())
    assert model.projection is None and model.prediction is None


def test_statistics_are_those_of_the_backbone():
    tiny = preprocessing_of("convnext_tiny", 224, 0.1, True)
    assert tiny.mean == (0.485, 0.456, 0.406) and tiny.std == (0.229, 0.224, 0.225)
    lite = preprocessing_of("tf_efficientnet_lite0", 224, 0.1, True)
    assert lite.mean == lite.std == (0.5, 0.5, 0.5)


def test_normalise_by_hand_and_back():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    tiny = preprocessing_of("convnext_tiny", 224, 0.1, True)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert normalise(pixels, tiny).flatten().tolist() == pytest.approx(expected, abs=1e-5)
    assert to_unit(pixels).flatten().tolist() == pytest.approx([-1, 128 / 127.5 - 1, 1], abs=1e-6)
    assert torch.equal(from_unit(to_unit(pixels)), pixels)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224"])
def test_any_timm_model_with_pooling(name):
    model = TeacherModel(config(backbone=name))
    assert model.embed(torch.zeros(1, 3, 64, 64)).shape == (1, model.embedding_dim)
    assert model.embedding_dim == timm.create_model(name, num_classes=0).num_features
