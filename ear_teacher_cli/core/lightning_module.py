"""Training: reconstruction plus a margin softmax over pseudo-classes, as a LightningModule.

Everything random in a step is a function of (seed, step), every class is kept in the checkpoint, and k-means
runs at fixed epochs: a resumed run is the uninterrupted one. B pictures, D embedding, D' projection, K classes.
"""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import nn

from ..config import TrainConfig
from ..data.dataset import Batch, derive_seed
from ..data.pixels import from_unit, normalise, preprocessing_of, to_unit
from ..errors import EarTeachError, PictureError
from ..talk import Talk
from . import losses, weights
from . import pseudo_classes as classes
from .checkpoint import describe
from .model import TeacherModel
from .schedule import rate_at

# Gradients of a mean over 150,000 pixels vanish in half precision unless scaled.
_GRADIENT_SCALE = 2.0**12


class EarTeacherLightningModule(pl.LightningModule):
    """The teacher and how it learns.

    Takes a `TrainConfig`, or any of its fields as keywords:
    `EarTeacherLightningModule(learning_rate=1e-4, max_epochs=100)`. Fit it with an `EarDataModule`. Pretrained
    weights are loaded when fitting starts (not when a checkpoint is being restored), or by `load_pretrained()`.

    Logs train/loss, train/recon_loss, train/metric_loss, train/lr, train/grad_ratio (gradient the metric term
    sends into the embedding, divided by the reconstruction's), val/loss, val/recon_loss, val/metric_loss,
    val/psnr (dB on [-1, 1]) and val/agreement (share of validation pictures whose augmented view keeps its class).
    """

    def __init__(self, config: TrainConfig | None = None, **options: Any):
        super().__init__()
        self.config = config or TrainConfig(**options)
        self.save_hyperparameters(self.config.as_dict())
        self.model = TeacherModel(self.config)
        self.preprocessing = preprocessing_of(
            self.config.backbone, self.config.image_size, self.config.bbox_buffer, self.config.pad
        )
        self.prototypes: nn.Parameter | None = None  # K,D': allocated when the number of pictures is known
        self.classes: classes.PseudoClasses | None = None
        self.receipt: weights.Receipt | None = None
        self.talk = Talk(quiet=True)  # the verb gives its own
        self._restored: dict[str, Any] | None = None  # what the checkpoint said of itself
        self.bad: dict[tuple[str, int], PictureError] = {}  # (train or val, row index) -> why it was skipped

    def load_pretrained(self) -> weights.Receipt:
        """Load the backbone's pretrained weights as the configuration says. Raises WeightsError."""
        self.receipt = weights.load_pretrained(self.model.backbone, self.config)
        return self.receipt

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        dataset = getattr(self.trainer.datamodule, "val_set", None)
        if dataset is not None and dataset.preprocessing != self.preprocessing:
            raise EarTeachError(
                f"data: its crops ({dataset.preprocessing}) are not the model's ({self.preprocessing}); give EarDataModule "
                "and EarTeacherLightningModule the same backbone, image_size, bbox_buffer and pad"
            )
        if self.trainer.ckpt_path is None:  # a new run, perhaps of a module that load_from_checkpoint gave
            if self.config.pretrained and self.receipt is None and self._restored is None:
                self.load_pretrained()
            self._restored = self.classes = self.prototypes = None
        if self.config.learns_classes and self.prototypes is None:
            pictures = len(self._train_set())
            self._allocate(classes.class_count(self.config.pseudo_classes, pictures, self.config.num_pseudo_classes))

    def configure_optimizers(self) -> dict[str, Any]:
        groups = param_groups_weight_decay(self, self.config.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = int(total * self.config.warmup / self.config.max_epochs)
        # Resumed on another number of devices an epoch has other steps: go on from the same epoch, not the same step.
        shift, per_epoch = 0, self.trainer.num_training_batches
        if self._restored and self._restored["steps_per_epoch"] != per_epoch:
            shift = self._restored["epochs_completed"] * per_epoch - self._restored["global_step"]
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_at(max(0, step + shift), warmup, total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 B,3,H,W -> embedding float B,D."""
        return self.model.embed(normalise(pixels, self.preprocessing))

    @torch.no_grad()
    def reconstruct(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 B,3,H,W -> what the decoder makes of the embeddings, uint8 B,3,H,W."""
        was_training = self.training
        self.eval()
        pictures = from_unit(self.model.decoder(self(pixels)))
        self.train(was_training)
        return pictures

    def on_train_epoch_start(self) -> None:
        config = self.config
        if not config.learns_classes:
            return
        again = config.pseudo_classes == "kmeans" and classes.is_round(
            self.current_epoch, config.cluster_every, config.max_epochs
        )
        if self.classes is None or again:
            self._make_classes()
        self.classes.labels = self.classes.labels.to(self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Stochastic depth draws from the global generator: tie it to the step, so that resuming is exact.
        torch.manual_seed(derive_seed(self.config.seed, self.global_step, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor | None:
        self._note_bad("train", batch)
        if len(batch["index"]) < 2:  # too few readable pictures for batch statistics: the step is skipped
            return None
        pixels = batch["pixels"]
        embedding = self(pixels)  # B,D
        figures = {"recon_loss": F.mse_loss(self.model.decoder(embedding).float(), to_unit(pixels))}
        loss = self.config.reconstruction_weight * figures["recon_loss"]
        if self.config.learns_classes:
            figures["metric_loss"] = self._metric_loss(embedding, batch["index"])
            metric = self.config.metric_weight * figures["metric_loss"]
            if batch_idx == 0 and self.config.reconstruction_weight:
                self.log(
                    "train/grad_ratio",
                    _gradient_ratio(metric, loss, embedding),
                    on_step=False,
                    on_epoch=True,
                    batch_size=1,
                )
            loss = loss + metric
        self._log("train", loss, figures, len(pixels))
        self.log("train/lr", self.lr_schedulers().get_last_lr()[0], on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._note_bad("val", batch)
        if len(batch["index"]) == 0:
            return
        pixels = batch["pixels"]
        embedding = self(pixels)
        squares = (self.model.decoder(embedding).float() - to_unit(pixels)).square().mean((1, 2, 3))  # B,3,H,W -> B
        figures = {"recon_loss": squares.mean(), "psnr": losses.psnr(squares).mean()}
        loss = self.config.reconstruction_weight * figures["recon_loss"]
        if self.config.learns_classes:
            figures["metric_loss"], figures["agreement"] = self._held_out_metric(embedding, batch["view"])
            loss = loss + self.config.metric_weight * figures["metric_loss"]
        self._log("val", loss, figures, len(pixels))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["earteach"] = describe(
            self.config, self.preprocessing, self.model.embedding_dim, self._epochs_completed(), self._steps_per_epoch()
        )
        if self.classes is not None:
            checkpoint["pseudo_classes"] = self.classes.as_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = {**checkpoint["earteach"], "global_step": checkpoint["global_step"]}
        state = checkpoint.get("pseudo_classes")
        if state is None:
            return
        if self.prototypes is None:  # load_from_checkpoint, without a trainer
            self._allocate(state["count"])
        expected = classes.fingerprint(self._train_set().manifest) if self._trainer is not None else None
        self.classes = classes.PseudoClasses.from_dict(state, expected)

    def _metric_loss(self, embedding: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        labels = self.classes.labels[index]
        known = labels >= 0  # a picture that was unreadable when the classes were made has none
        features = self.model.predict(embedding)
        if not known.any():
            return features.sum() * 0
        margin = losses.margin_at(self.current_epoch, self.config.margin, self.config.margin_warmup_epochs)
        return losses.metric_loss(
            self.config.metric_loss, features[known], self.prototypes, labels[known], margin, self.config.arcface_scale
        )

    def _held_out_metric(self, embedding: torch.Tensor, view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Held-out pictures take the class of the prototype nearest to the clean picture; the loss (whole margin)
        is that of an augmented view: a picture scored against its own nearest prototype would prove nothing."""
        labels = losses.cosines(self.model.predict(embedding), self.prototypes).argmax(1)
        features = self.model.predict(self(view))
        agreement = (losses.cosines(features, self.prototypes).argmax(1) == labels).float().mean()
        loss = losses.metric_loss(
            self.config.metric_loss,
            features,
            self.prototypes,
            labels,
            self.config.margin,
            self.config.arcface_scale,
        )
        return loss, agreement

    def _make_classes(self) -> None:
        """A round of pseudo-classes on rank 0, told to all: labels, and class means as prototypes."""
        result = None
        if self.trainer.is_global_zero:
            mark = classes.fingerprint(self._train_set().manifest)
            embeddings, rows = self._embed_train_set()
            labels = self._label(embeddings, rows)
            means = self._class_means(embeddings, labels[rows])
            past = self.classes.round + 1 if self.classes else 0
            result = classes.PseudoClasses(labels, len(self.prototypes), past, mark).as_dict(), means
        state, means = self.trainer.strategy.broadcast(result)
        self.classes = classes.PseudoClasses.from_dict(state, None)
        with torch.no_grad():
            self.prototypes.copy_(means)
        self.optimizers().optimizer.state.pop(self.prototypes, None)  # old momentum belongs to old prototypes

    @torch.no_grad()
    def _embed_train_set(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(embeddings M,D, their rows M) of all readable training pictures, unaugmented, evaluation mode, float32."""
        self.eval()
        found, rows = [], []
        with self.talk.progress("making pseudo-classes", len(self._train_set()), "pictures") as steps:
            for batch in self.trainer.datamodule.clean_dataloader():
                self._note_bad("train", batch)
                if len(batch["index"]):
                    found.append(self(batch["pixels"].to(self.device)).float().cpu())
                    rows.append(batch["index"])
                steps.advance(len(batch["index"]) + len(batch["bad"]))
        self.train()
        if len(found) == 0:
            raise EarTeachError("training pictures: not one could be read; run earteach validate-data")
        return torch.cat(found), torch.cat(rows)

    def _label(self, embeddings: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """int64 labels of all N training pictures, of whatever kind; -1 for kmeans where unreadable."""
        manifest, count, seed = self._train_set().manifest, len(self.prototypes), self.config.seed
        if self.config.pseudo_classes == "instance":
            return torch.arange(len(manifest))
        if self.config.pseudo_classes == "fixed":
            return classes.fixed_labels(len(manifest), count, seed)
        if len(rows) < count:
            raise EarTeachError(
                f"{manifest.source}: {len(rows)} readable pictures cannot fill {count} pseudo-classes; "
                "mend the pictures or lower --num-pseudo-classes"
            )
        place = {row: i for i, row in enumerate(rows.tolist())}
        apart = [[place[r] for r in group if r in place] for group in classes.same_photo(manifest)]
        start = self.classes.labels.cpu()[rows] if self.classes else None
        labels = torch.full((len(manifest),), -1)
        labels[rows] = classes.kmeans(classes.directions(embeddings), count, seed, start=start, apart=apart)
        return labels

    @torch.no_grad()
    def _class_means(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Class means of the heads' output, K,D'. In training mode: that is what the loss will compare them with."""
        parts = embeddings.tensor_split(-(-len(embeddings) // 65_536))
        outputs = [self.model.predict(part.to(self.device)).float().cpu() for part in parts]
        means = classes.class_means(F.normalize(torch.cat(outputs), dim=1), labels, len(self.prototypes))
        # a class none of whose pictures could be read keeps the prototype it has
        return torch.where(means.norm(dim=1, keepdim=True) > 0, means, self.prototypes.detach().cpu())

    def _allocate(self, count: int) -> None:
        start = torch.randn(
            count, self.config.projection_dim, generator=torch.Generator().manual_seed(self.config.seed)
        )
        self.prototypes = nn.Parameter(F.normalize(start, dim=1))

    def _train_set(self):
        datamodule = self.trainer.datamodule
        if datamodule is None or getattr(datamodule, "train_set", None) is None:
            raise EarTeachError(
                "pseudo-classes: belong to a data set; fit with trainer.fit(model, datamodule=EarDataModule(...))"
            )
        return datamodule.train_set

    def _note_bad(self, split: str, batch: Batch) -> None:
        """Count unreadable pictures. Raises EarTeachError when they are more than `max_bad` of the split."""
        if not batch["bad"]:
            return
        for index, reason, detail in batch["bad"]:
            self.bad[(split, index)] = PictureError(reason, detail)
        datamodule = self.trainer.datamodule
        dataset = datamodule.train_set if split == "train" else datamodule.val_set
        count = sum(which == split for which, _ in self.bad)
        if count > self.config.max_bad * len(dataset):
            (_, index), error = next((k, e) for k, e in self.bad.items() if k[0] == split)
            raise EarTeachError(
                f"{dataset.manifest.where(index)}: {error}; {count} of {len(dataset)} pictures are bad, more than "
                f"--max-bad {self.config.max_bad:g}; run earteach validate-data --write-clean, or raise --max-bad"
            )

    def _log(self, split: str, loss: torch.Tensor, figures: dict[str, torch.Tensor], count: int) -> None:
        values = {f"{split}/{name}": value.detach() for name, value in {"loss": loss, **figures}.items()}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=count, sync_dist=self.trainer.world_size > 1)

    def _epochs_completed(self) -> int:
        return self.trainer.fit_loop.epoch_progress.current.processed

    def _steps_per_epoch(self) -> int:
        return int(self.trainer.num_training_batches)


def _gradient_ratio(metric: torch.Tensor, reconstruction: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Norm of the gradient the metric term sends into the embedding, over that of the reconstruction term."""
    norms = [
        torch.autograd.grad(term * _GRADIENT_SCALE, embedding, retain_graph=True)[0].float().norm()
        for term in (metric, reconstruction)
    ]
    return norms[0] / norms[1].clamp_min(1e-12)
