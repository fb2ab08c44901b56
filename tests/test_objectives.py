"""The loss terms: one registry for training, validation, --dry-run, the heads and the summary."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, small_config

from ear_teacher_cli.console import Console
from ear_teacher_cli.data.datamodule import EarDataModule
from ear_teacher_cli.data.preprocessing import to_unit
from ear_teacher_cli.training import losses, objectives
from ear_teacher_cli.training.dry_run import estimate
from ear_teacher_cli.training.module import EarTeacherLightningModule
from ear_teacher_cli.training.objectives import ClassTargets, LossTerm, Objective, Outputs
from ear_teacher_cli.training.step_trial import one_step

QUIET = Console(quiet=True)
TWO_VIEWS = {"views": 2, "augment": True}


def objective(**options) -> Objective:
    return Objective(small_config(["", "", "", ""], **options))


@pytest.mark.parametrize(
    ("options", "terms", "heads"),
    [
        ({"metric_loss": "none"}, ["recon"], set()),
        ({}, ["recon", "metric"], {"projection", "prediction"}),
        ({"metric_loss": "none", "contrastive_weight": 1, **TWO_VIEWS}, ["recon", "contrastive"], {"projection"}),
        (
            {"metric_weight": 0, "consistency_weight": 1, "reconstruction_weight": 0, **TWO_VIEWS},
            ["recon", "consistency"],
            {"projection", "prediction"},
        ),
    ],
)
def test_a_configuration_chooses_terms_and_heads(options, terms, heads):
    chosen = objective(**options)
    assert [term.name for term in chosen.terms] == terms and chosen.heads == heads


def test_every_term_is_described_with_its_weight():
    options = {"contrastive_weight": 0.7, "consistency_weight": 0.25, "metric_weight": 0.5, **TWO_VIEWS}
    described = [term.describe() for term in objective(**options).terms]
    assert [text.split()[0] for text in described] == ["1", "0.5", "0.7", "0.25"]
    assert described[0] == "1 reconstruction" and "arcface (margin 0.5, scale 64) over kmeans classes" in described[1]


@pytest.fixture(scope="module")
def trained_on(manifests):
    """(module, batch, class targets) of a run with every term and a target of its own."""
    options = {"contrastive_weight": 0.7, "consistency_weight": 0.25, "denoise": True, **TWO_VIEWS}
    config = small_config(manifests, **options)
    data = EarDataModule(config)
    data.setup("fit")
    module = EarTeacherLightningModule(config).train()
    batch = next(iter(data.train_dataloader()))
    labels = torch.arange(len(batch["index"])) % 3
    labels[0] = -1
    prototypes = torch.randn(3, config.projection_dim, generator=torch.Generator().manual_seed(0))
    return module, batch, ClassTargets(prototypes, labels, epoch=9)


def test_the_training_loss_by_hand(trained_on):
    module, batch, classes = trained_on
    model, config, count = module.model, module.config, len(batch["index"])
    outputs = module.training_outputs(batch, classes)
    found = module.objective.training(outputs)
    ratio = module.objective.gradient_ratio(found, outputs)
    assert ratio is not None and ratio > 0
    with torch.no_grad():
        embedding = module(torch.cat([batch["pixels"], batch["view"]]))
        projection = model.projection(embedding)
        prediction = model.prediction(projection)
        known = (classes.labels >= 0).repeat(2)
        expected = {
            "recon_loss": F.mse_loss(model.decoder(embedding[:count]), to_unit(batch["clean"])),
            "metric_loss": losses.metric_loss(
                "arcface", prediction[known], classes.prototypes, classes.labels.repeat(2)[known], 0.5, 64
            ),
            "contrastive_loss": losses.contrastive_loss(projection, config.temperature),
            "consistency_loss": losses.consistency_loss(prediction, projection),
        }
    for name, value in expected.items():
        assert found.metrics[name].item() == pytest.approx(value.item(), rel=1e-5), name
    weights = {"recon_loss": 1, "metric_loss": 0.1, "contrastive_loss": 0.7, "consistency_loss": 0.25}
    total = sum(weights[name] * value.item() for name, value in expected.items())
    assert found.total.item() == found.metrics["loss"].item() == pytest.approx(total, rel=1e-5)
    assert found.others.item() == pytest.approx(total - expected["recon_loss"].item(), rel=1e-5)


def test_a_batch_without_a_label_still_gives_every_parameter_a_gradient(trained_on):
    module, batch, classes = trained_on
    prototypes = classes.prototypes.clone().requires_grad_()
    unknown = ClassTargets(prototypes, torch.full_like(classes.labels, -1))
    found = module.objective.training(module.training_outputs(batch, unknown))
    assert found.metrics["metric_loss"].item() == 0
    found.total.backward()
    assert prototypes.grad is not None and all(p.grad is not None for p in module.parameters() if p.requires_grad)
    module.zero_grad()


def test_a_validation_batch_of_one_image_has_no_loss_between_views(trained_on):
    module, batch, classes = trained_on
    module.eval()
    with torch.no_grad():
        embedding = module(torch.cat([batch["pixels"][:1], batch["view"][:1]]))
        found = module.objective.validation(Outputs(module.model, embedding, batch["pixels"][:1], classes))
    module.train()
    assert set(found.metrics) == {"loss", "recon_loss", "psnr", "metric_loss", "agreement"}


def test_dry_run_prints_the_objective_of_the_training_step(manifests):
    """With --denoise the target is not the input."""
    config = small_config(manifests, metric_loss="none", denoise=True, augment=True)
    data = EarDataModule(config)
    data.setup("fit")
    torch.manual_seed(0)
    module = EarTeacherLightningModule(config).train()
    batch = next(iter(data.train_dataloader()))
    loss = one_step(module, batch, 2)
    with torch.no_grad():
        remade = module.model.decoder(module(batch["pixels"]))
    assert loss == pytest.approx(float(F.mse_loss(remade, to_unit(batch["clean"]))), rel=1e-5)
    assert loss != pytest.approx(float(F.mse_loss(remade, to_unit(batch["pixels"]))), rel=1e-3)
    assert estimate(config, QUIET)[1].loss > 0


class Size(LossTerm):
    """A term that is no margin softmax: the mean square of the embedding."""

    name = "size"

    @property
    def weight(self) -> float:
        return 0.5

    def training_loss(self, outputs: Outputs) -> torch.Tensor:
        return outputs.embedding.square().mean()


@pytest.mark.slow
def test_a_new_term_is_one_class(manifests, tmp_path, monkeypatch, earteach):
    monkeypatch.setattr(objectives, "TERMS", (*objectives.TERMS, Size))
    said = earteach("train", *manifests, *SMALL, "--max-epochs", 1, "--output-dir", tmp_path)
    assert said.code == 0 and "0.5 size" in said.err, said.err
    header = (tmp_path / "ear_teacher" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/size_loss", "val/size_loss"} <= set(header)
    said = earteach("train", *manifests, *SMALL, "--dry-run")
    assert said.code == 0 and "0.5 size" in said.err
