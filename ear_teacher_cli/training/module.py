"""Training: the sum of the loss terms of objectives.py over a teacher, as a LightningModule.

Everything random in a step is a function of (seed, step), every pseudo-label is kept in the checkpoint, and k-means
runs at fixed epochs: a resumed run is the uninterrupted one. B images, V views, D embedding, D' projection, K classes.
"""

from dataclasses import fields, replace
from typing import Any, Self

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping
from torch import nn

from ..config import MONITORS, TrainConfig
from ..console import Console
from ..data.augment import derive_seed
from ..data.datamodule import steps_into_epoch
from ..data.dataset import Batch, EarDataset
from ..data.preprocessing import from_unit, loading_of, normalise, preprocessing_for, resized
from ..distill_config import DistillConfig
from ..distillation import Distillation, Teacher
from ..errors import EarTeachError, WeightsError
from ..model import weights
from ..model.checkpoint import Checkpoint, describe, read_checkpoint, require_fit
from ..model.map_reader import Maps
from ..model.teacher import TeacherModel
from ..quality.collapse import judge
from ..quality.reconstruction import REFERENCES
from .averaging import Averages
from .callbacks import FitWhitening, MeasureBaseline
from .decoder_start import start_decoder
from .epoch_metrics import TrainingMeans, ValidationOutputs, ValidationRows, judged_images
from .guards import StepGuard, StopOnCollapse, StopOnNonFinite, UnreadableImages, is_on_all_ranks, require_data
from .interruption import divide_epoch
from .objectives import ClassTargets, Objective, Outputs
from .optimisation import optimiser_and_schedule, steps_to_shift
from .passes import evaluation_mode, measure_teacher
from .pseudo_labels import PseudoLabels, class_count


class EarTeacherLightningModule(pl.LightningModule):
    """The teacher and how it is trained.

    Takes a `TrainConfig`, or its fields as keywords (`EarTeacherLightningModule(max_epochs=100)`). Fit it with an
    `EarDataModule`. Pretrained weights are loaded when fitting starts without a checkpoint, or by `load_pretrained()`.

    Logs train/loss, train/{term}_loss and val/{term}_loss of each term, val/psnr, val/agreement and train/grad_ratio
    (objectives.py), train/lr, train/gradient_norm, val/loss; the constants that val/psnr is compared with (quality/reconstruction.py);
    val/retrieval, val/rank1, val/eer and the health of the validation embeddings (epoch_metrics.py); classes/in_use,
    classes/entropy, classes/largest and classes/nmi (pseudo_labels.py).

    `baseline`: quality of the embeddings before training, and the references of the PSNR; `verdict`: of the embeddings
    of the last validation against it, a state and the reason (quality/collapse.py). `validation_embeddings`,
    `baseline_embeddings`: what they were measured on.
    """

    def __init__(self, config: TrainConfig | None = None, **options: Any):
        super().__init__()
        self.config = config or TrainConfig(**options)
        self.save_hyperparameters(self.config.as_dict(), logger=False)  # loggers.py logs them
        self.objective = Objective(self.config)
        # channels_last: the layout that convolutions are fast in, on CPUs too
        self.model = TeacherModel(self.config, self.objective.heads).to(memory_format=torch.channels_last)
        self.preprocessing = preprocessing_for(self.config)
        self.distillation = self._distillation()
        self.prototypes: nn.Parameter | None = None  # K,D': allocated when the number of images is known
        self.pseudo_labels = PseudoLabels(self.config)
        self.receipt: weights.Receipt | None = None
        self.console = Console(quiet=True)  # the command line gives its own
        self.baseline: dict[str, float] = {}
        self.verdict = ("", "")
        self.validation_embeddings: ValidationRows | None = None
        self.baseline_embeddings: ValidationRows | None = None
        self.whitening: dict[str, torch.Tensor] | None = None  # `mean` D, `matrix` D,D (model/whitening.py)
        self.unreadable = UnreadableImages(self.config)
        self.guard = StepGuard()
        self._needs_weights, self._needs_decoder = False, self.config.decodes and self.config.decoder_start == "linear"
        self._restored: dict[str, Any] | None = None  # the `earteach` part of the checkpoint that was loaded
        self._training_means = TrainingMeans()
        self._batch_means: list[tuple[dict[str, torch.Tensor], int]] = []  # of the batch that is not checked yet
        self._validation_outputs = ValidationOutputs()

    def _distillation(self) -> Distillation | None:
        """Return what distils the student of a DistillConfig, with its teacher; None for others. Raises EarTeachError."""
        config, model = self.config, self.model
        if not isinstance(config, DistillConfig):
            return None
        teacher = Teacher(config.teacher, config.map_strides, config.teacher_size)
        found = teacher.preprocessing
        if teacher.fingerprint != config.teacher_fingerprint:
            raise WeightsError(
                f"{teacher.name}: is not the teacher that this run began with (fingerprint {teacher.fingerprint[:16]}, not "
                f"{config.teacher_fingerprint[:16]}); give the same, or start anew"
            )
        if config.whole_images or (teacher.size, config.pad) != (found.image_size, found.pad):
            teacher.statistics = {}  # those of an export are of crops at its size, padded or not
        channels = {stride: model.reader.shapes[stride][0] for stride in config.map_strides} if model.reader else {}
        return Distillation(teacher, channels, model.embedding_dim if config.embedding_weight else None)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **options: Any) -> Self:
        """Open a checkpoint, with Lightning's arguments; options that its version did not have get the values of what
        that did."""
        saved = read_checkpoint(checkpoint_path).config
        changes = {spec.name: options.pop(spec.name) for spec in fields(saved) if spec.name in options}
        config = replace(saved, **changes)
        return super().load_from_checkpoint(checkpoint_path, *args, **{"config": config, **options})

    def load_pretrained(self) -> weights.Receipt:
        """Load the backbone's pretrained weights according to the configuration. Raises WeightsError."""
        self.receipt = weights.load_pretrained(self.model.backbone, self.config)
        if self.model.anchor is not None:
            self.model.anchor.follow(self.model.backbone)
        return self.receipt

    @property
    def train_set(self) -> EarDataset:
        """Return the training images. Raises EarTeachError without an EarDataModule."""
        dataset = getattr(self.trainer.datamodule, "train_set", None)
        if dataset is None:
            raise EarTeachError(
                "pseudo-classes: belong to a data set; fit with trainer.fit(model, datamodule=EarDataModule(...))"
            )
        return dataset

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        if self.config.compile:
            self.model.compile_parts()
        require_data(self.config, loading_of(self.config), self.trainer.datamodule)
        # a module from load_from_checkpoint has trained weights, and starts a new run with them
        self._needs_weights = self.config.pretrained and self.receipt is None and self._restored is None
        self._needs_decoder = self._needs_decoder and self._restored is None
        self._restored = self.prototypes = None
        self.guard = StepGuard()
        self.pseudo_labels = PseudoLabels(self.config)
        if self.config.learns_classes:
            manifest, most = self.train_set.manifest, self.config.num_pseudo_classes
            self._allocate(class_count(self.config.pseudo_classes, manifest, most))

    def _allocate(self, count: int) -> None:
        seeded = torch.Generator().manual_seed(self.config.seed)
        prototypes = torch.randn(count, self.config.projection_dim, generator=seeded)
        self.prototypes = nn.Parameter(F.normalize(prototypes, dim=1))

    def on_fit_start(self) -> None:
        if self._restored is not None:  # a checkpoint is resumed: it has been loaded by now
            return
        if self._needs_weights:
            self.load_pretrained()
        if self._needs_decoder:
            start_decoder(self)
            self._needs_decoder = False
        if self.distillation is not None:
            measure_teacher(self, self.distillation)

    def configure_optimizers(self) -> dict[str, Any]:
        total = int(self.trainer.estimated_stepping_batches)  # makes the loaders, and so num_training_batches
        batches, accumulate = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        shift = steps_to_shift(self._restored, int(batches), accumulate) if self._restored else 0
        return optimiser_and_schedule(self, self.model.backbone, self.config, total, shift)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return what belongs to the training, whichever Trainer runs it."""
        config = self.config
        chosen: list[pl.Callback] = [StopOnNonFinite(), MeasureBaseline()]
        if config.fail_on_collapse:
            chosen.append(StopOnCollapse())
        if config.early_stop:
            chosen.append(EarlyStopping(config.monitor, patience=config.early_stop, mode=MONITORS[config.monitor]))
        if config.whiten:
            chosen.append(FitWhitening())
        if config.ema_decay or config.kept_share:
            chosen.append(Averages(config.ema_decay, config.kept_share))
        return chosen

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 B,3,H,W -> embedding float B,D."""
        return self.model.embed(self._input_of(pixels))

    def features(self, pixels: torch.Tensor) -> tuple[torch.Tensor, Maps]:
        """uint8 B,3,H,W -> embedding float B,D, and the feature maps that losses need (TeacherModel.embed_with_maps)."""
        return self.model.embed_with_maps(self._input_of(pixels))

    def _input_of(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what the backbone takes, float B,3,H,W, of loaded crops."""
        return normalise(resized(pixels, self.config.image_size), self.preprocessing)

    def reconstruct(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the decoder's reconstructions: uint8 B,3,H,W -> uint8 B,3,H,W."""
        assert self.model.decoder is not None
        with evaluation_mode(self):
            return from_unit(self.model.decoder(self.model.decoder_input(*self.features(pixels))))

    def on_train_start(self) -> None:
        # a checkpoint's tensors were loaded before the module moved to its device
        self.pseudo_labels.move_to(self.device)
        self._training_means.move_to(self.device)

    def on_train_epoch_start(self) -> None:
        if self.config.learns_classes and self.pseudo_labels.is_due(self.current_epoch):
            means = self.pseudo_labels.make_round(self)
            if means is not None:
                assert self.prototypes is not None
                with torch.no_grad():
                    self.prototypes.copy_(means)
                self.optimizers().optimizer.state.pop(self.prototypes, None)  # momentum of other classes
            self.pseudo_labels.move_to(self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Stochastic depth draws from the global generator: tie it to the batch, so that resuming is exact.
        batches = self.trainer.accumulate_grad_batches
        number = self.global_step * batches + batch_idx % batches
        torch.manual_seed(derive_seed(self.config.seed, number, self.global_rank))

    def training_outputs(self, batch: Batch, classes: ClassTargets | None) -> Outputs:
        """Return the teacher's outputs for a training batch on the module's device."""
        views = torch.cat([batch[name] for name in ("pixels", "view") if name in batch])  # VB,3,H,W
        embedding, maps = self.features(views)
        clean = batch.get("clean", batch["pixels"])
        target = clean if self.config.denoise else batch["pixels"]
        return Outputs(self.model, embedding, target, classes, clean, maps, self.distillation)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.unreadable.record("train", batch, self.trainer)
        if not is_on_all_ranks(self, len(batch["index"]) >= 2):  # too few for batch statistics
            return self.guard.skip(self)
        self.guard.begin(self)
        classes = None
        if self.config.learns_classes:
            labels = self.pseudo_labels.labels_of(batch["index"])
            classes = ClassTargets(self.prototypes, labels, self.current_epoch)
        outputs = self.training_outputs(batch, classes)
        found = self.objective.training(outputs)
        self.guard.watch(self, found.total, batch["index"])
        # without their graphs, which would be kept until the next step
        self._batch_means = [({k: value.detach() for k, value in found.metrics.items()}, len(batch["index"]))]
        if batch_idx == 0 and (ratio := self.objective.gradient_ratio(found, outputs)) is not None:
            self._batch_means.append(({"grad_ratio": ratio}, 1))
        if self.trainer.accumulate_grad_batches > 1 and not self._check_batch():
            return self.guard.skip(self)
        rate = self.config.learning_rate * self.lr_schedulers().lr_lambdas[0](self.lr_schedulers().last_epoch)
        # a tensor of the CPU: a number would be copied to the GPU, which waits for all queued work
        self.log("train/lr", torch.tensor(rate), on_step=True, on_epoch=False)
        return found.total * self._share_of_step(batch_idx)

    def _check_batch(self) -> bool:
        """Return whether the loss of the batch is finite on all ranks, and if so count its metrics."""
        if not self.guard.is_finite(self):
            return False
        for metrics, images in self._batch_means:
            self._training_means.add(metrics, images)
        return True

    def _share_of_step(self, batch_idx: int) -> float:
        """Return what to multiply a loss by, so that the gradient of an optimizer step is the mean over its batches:
        Lightning divides by accumulate_grad_batches, also in the last step of an epoch, which may have fewer."""
        batches, total = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        first = batch_idx // batches * batches
        return batches / min(batches, total - first) if batches > 1 else 1.0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.guard.is_watching:
            self._check_batch()
        self.guard.before_optimizer_step(optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of all parameters together and measure their norm, after `on_before_optimizer_step`.

        The configuration's limit holds with any Trainer; a `gradient_clip_val` of the Trainer overrides it.
        """
        limit = gradient_clip_val or self.config.gradient_clip_val
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, limit, gradient_clip_algorithm)
            limit = 0
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if parameters:  # none in a step that is skipped
            norm = torch.nn.utils.clip_grad_norm_(parameters, limit or torch.inf)
            self._training_means.add_finite({"gradient_norm": norm})

    def on_train_epoch_end(self) -> None:
        self._log_training()  # of an epoch without validation

    def _log_training(self) -> None:
        means = self._training_means.finish(self.trainer.strategy)
        self.log_dict({f"train/{name}": mean for name, mean in means.items()})

    def on_validation_epoch_start(self) -> None:
        self._validation_outputs.clear()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.unreadable.record("val", batch, self.trainer)
        if len(batch["index"]) == 0:
            return
        pixels = batch["pixels"]
        embedding, maps = self.features(pixels)
        of_view = self(batch["view"])
        self._validation_outputs.add(batch["index"], embedding, of_view)
        classes = ClassTargets(self.prototypes) if self.config.learns_classes else None
        both = torch.cat([embedding, of_view])
        found = self.objective.validation(Outputs(self.model, both, pixels, classes, pixels, maps, self.distillation))
        values = {f"val/{name}": value.detach() for name, value in found.metrics.items()}
        self.log_dict(values, on_epoch=True, batch_size=len(pixels), sync_dist=self.trainer.world_size > 1)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        self._log_training()
        self.validation_embeddings, quality = self._validation_outputs.finish(self.trainer, self.current_epoch + 1)
        if not self.config.distils:  # a student follows its teacher, and may begin anywhere
            self.verdict = judge(quality, self.baseline, judged_images(self.trainer))
        classes = self.pseudo_labels.metrics()
        references = {name: self.baseline[name] for name in REFERENCES if name in self.baseline}
        found = {f"val/{k}": v for k, v in (quality | references).items()}
        found |= {f"classes/{k}": v for k, v in classes.items()}
        self.log_dict(found)  # from the same gathered embeddings on every rank: nothing to reduce

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        epochs, steps = self.trainer.fit_loop.epoch_progress.current.processed, int(self.trainer.num_training_batches)
        about = describe(self.config, self.preprocessing, self.model.embedding_dim, epochs, steps)
        checkpoint["earteach"] = {**about, "start": self.baseline, "judged_on": judged_images(self.trainer)}
        if done := steps_into_epoch(self.trainer):
            checkpoint["earteach"]["steps_done"] = done
            checkpoint["training_sums"] = self._training_means.share_of_rank(self.trainer.strategy)
        elif self.whitening is not None:  # within an epoch it is of older weights
            checkpoint["whitening"] = self.whitening
        if (state := self.pseudo_labels.state_dict()) is not None:
            checkpoint["pseudo_classes"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        about, trainer = checkpoint["earteach"], self._trainer  # None: load_from_checkpoint
        if trainer is not None and about.get("steps_done"):
            divide_epoch(checkpoint, trainer.world_size, type(trainer.datamodule).__qualname__)
        self._restored = {**about, "global_step": checkpoint["global_step"]}
        self.baseline = dict(about.get("start", {}))
        self._training_means.sums = {k: total.clone() for k, total in checkpoint.get("training_sums", {}).items()}
        if (state := checkpoint.get("pseudo_classes")) is not None:
            if self.prototypes is None:
                self._allocate(state["count"])
            self.pseudo_labels.load_state_dict(state, self.train_set.manifest if trainer is not None else None)


def module_of(checkpoint: Checkpoint) -> EarTeacherLightningModule:
    """Return the module of a checkpoint, with its weights, in evaluation mode. Raises WeightsError if they do not fit."""
    module = EarTeacherLightningModule(checkpoint.config)
    require_fit(checkpoint, module.model.state_dict())
    module.model.load_state_dict(checkpoint.model_state, strict=True)
    return module.eval()
