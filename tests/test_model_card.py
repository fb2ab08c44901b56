"""The header of the model card: YAML that any reader opens, whatever the user typed."""

import pytest
import yaml
from huggingface_hub import ModelCard

from ear_teacher_cli.command_config import ExportConfig
from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.export.export import export_backbone
from ear_teacher_cli.export.model_card import _base_model
from ear_teacher_cli.files import printable


@pytest.mark.slow
@pytest.mark.parametrize(
    "license",
    ["MIT", 'My "own": licence # x', "it's\n---\nlibrary_name: other", "- [a, {b}] & *c !d", "\u202ertl\x1b[31m é"],
)
def test_the_header_is_yaml_whatever_the_licence_is_called(license, run, tmp_path):
    export_backbone(run, tmp_path / "x", ExportConfig(consent="drawn, nobody", license=license))
    text = (tmp_path / "x" / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license_name"] == printable(license) and header["license"] == "other"
    assert header["library_name"] == "timm" and header["pipeline_tag"] == "image-feature-extraction" and header["tags"]
    card = ModelCard(text)
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results.keys() >= {"retrieval", "psnr", "effective_rank"} and card.data.base_model is None


def test_the_base_model_is_named_where_it_is_known():
    assert _base_model(TrainConfig()) == "timm/convnext_tiny.fb_in22k"
    assert _base_model(TrainConfig(backbone="convnext_atto")) == "timm/convnext_atto.d2_in1k"
    assert _base_model(TrainConfig(pretrained=False)) is None
    assert _base_model(TrainConfig(pretrained_path="mine.pth")) is None


def test_private_options_are_neither_in_the_card_nor_in_the_report_nor_logged():
    from dataclasses import fields

    from ear_teacher_cli.config import TrainConfig
    from ear_teacher_cli.export import model_card
    from ear_teacher_cli.report import page

    private = [spec.name for spec in fields(TrainConfig) if spec.metadata.get("private")]
    assert {"train_metadata", "root_dir", "pretrained_path", "identity_column"} <= set(private)
    secret = {name: f"/secret/{name}" for name in private if name != "experiment_name"}
    config = TrainConfig(**secret, experiment_name="secret")
    assert "secret" not in str(model_card._recipe(config)) and "secret" not in str(config.loggable())
    for name, value in secret.items():
        assert "/secret" not in page._option(name, value)
