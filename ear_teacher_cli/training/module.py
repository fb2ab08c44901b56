"""Training: reconstruction, a margin softmax over pseudo-classes and a comparison of two views, as a LightningModule.

Everything random in a step is a function of (seed, step), every class is kept in the checkpoint, and k-means
runs at fixed epochs: a resumed run is the uninterrupted one. B images, D embedding, D' projection, K classes.
"""

import warnings
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping
from torch import nn

from ..config import MONITORS, TrainConfig
from ..console import Console
from ..data.datamodule import steps_into_epoch
from ..data.dataset import Batch, derive_seed
from ..data.preprocessing import from_unit, normalise, preprocessing_for, to_unit
from ..errors import EarTeachError, ImageError
from ..model import weights, whitening
from ..model.checkpoint import describe
from ..model.teacher import TeacherModel
from ..quality import collapse
from ..quality.identity_metrics import can_be_scored, rank1_and_eer
from . import callbacks, losses
from . import pseudo_labels as classes
from .epoch_metrics import ValidationRows
from .optimisation import parameter_groups, rate_at

# Images, evenly spaced, that a whitening is fitted on: a multiple of the numbers of an embedding is enough.
WHITEN_ON = 2048
# Gradients of a mean over 150,000 pixels vanish in half precision unless scaled.
_GRADIENT_SCALE = 2.0**12


class EarTeacherLightningModule(pl.LightningModule):
    """The teacher and how it learns.

    Takes a `TrainConfig`, or any of its fields as keywords:
    `EarTeacherLightningModule(learning_rate=1e-4, max_epochs=100)`. Fit it with an `EarDataModule`. Pretrained
    weights are loaded when fitting starts (not when a checkpoint is being restored), or by `load_pretrained()`.

    Logs train/loss, train/recon_loss, train/metric_loss, train/contrastive_loss, train/consistency_loss, train/lr,
    train/grad_ratio (gradient the other terms send into the embedding, divided by the reconstruction's); val/loss,
    val/recon_loss, val/metric_loss, val/contrastive_loss, val/consistency_loss, val/psnr (dB on [-1, 1]) and
    val/agreement (share of validation images whose augmented view keeps its class); the quality of the embeddings:
    val/retrieval and, with identities, val/rank1 and val/eer (percent); their health: val/spread,
    val/effective_rank, val/abs_cosine (core.diagnostics); the classes': classes/in_use, classes/entropy,
    classes/largest, and classes/nmi with the round before (core.pseudo_classes).
    """

    def __init__(self, config: TrainConfig | None = None, **options: Any):
        super().__init__()
        self.config = config or TrainConfig(**options)
        self.save_hyperparameters(self.config.as_dict(), logger=False)  # core.loggers says what they are told
        # channels_last: the layout that convolutions are fast in, on CPUs too
        self.model = TeacherModel(self.config).to(memory_format=torch.channels_last)
        self.preprocessing = preprocessing_for(self.config)
        self.prototypes: nn.Parameter | None = None  # K,D': allocated when the number of images is known
        self.classes: classes.PseudoClasses | None = None
        self.receipt: weights.Receipt | None = None
        self.console = Console(quiet=True)  # the verb gives its own
        self._restored: dict[str, Any] | None = None  # what the checkpoint said of itself
        self.bad: dict[tuple[str, int], ImageError] = {}  # (train or val, row index) -> why it was skipped
        self.start: dict[str, float] = {}  # quality and health of the embeddings before training
        self.nmi: float | None = None  # of the last two rounds of k-means
        self.whitening: dict[str, torch.Tensor] | None = None  # `mean` D, `matrix` D,D (core.whitening)
        self.refused: list[tuple[int, str, list[int]]] = []  # steps without a finite loss in a row: number, loss, rows
        self._left_out = False  # the step under way
        self._sums: dict[str, torch.Tensor] = {}  # this epoch's training figures: sum, and count of what was summed
        self.validation_embeddings: ValidationRows | None = None  # of the last validation
        self.baseline_embeddings: ValidationRows | None = None  # of the initial weights, once they are measured
        self._held_out: list[tuple[torch.Tensor, ...]] = []  # this epoch's validation: rows, embeddings, of views

    def compile_model(self) -> None:
        """torch.compile backbone and decoder, in place: names of tensors stay. Costs a minute or two at the first step."""
        torch._functorch.config.donated_buffer = False  # train/grad_ratio goes back through the graph a second time
        # dynamo looks at inputs' gradients, which those in mid-model do not have
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        self.model.backbone.compile()
        self.model.decoder.compile()

    def load_pretrained(self) -> weights.Receipt:
        """Load the backbone's pretrained weights as the configuration says. Raises WeightsError."""
        self.receipt = weights.load_pretrained(self.model.backbone, self.config)
        return self.receipt

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        if self.config.compile:
            self.compile_model()
        dataset = getattr(self.trainer.datamodule, "val_set", None)
        if dataset is not None and dataset.preprocessing != self.preprocessing:
            raise EarTeachError(
                f"data: its crops ({dataset.preprocessing}) are not the model's ({self.preprocessing}); give EarDataModule "
                "and EarTeacherLightningModule the same backbone, image_size, bbox_buffer and pad"
            )
        config = getattr(self.trainer.datamodule, "config", self.config)
        if self.config.compares_views and (config.views, config.augment) != (2, True):
            raise EarTeachError("data: gives one view of each image; give EarDataModule views=2 and augment=True, too")
        if self.trainer.ckpt_path is None:  # a new run, perhaps of a module that load_from_checkpoint gave
            if self.config.pretrained and self.receipt is None and self._restored is None:
                self.load_pretrained()
            self._restored = self.classes = self.prototypes = None
        if self.config.learns_classes and self.prototypes is None:
            manifest = self._train_set().manifest
            self._allocate(classes.class_count(self.config.pseudo_classes, manifest, self.config.num_pseudo_classes))

    def configure_optimizers(self) -> dict[str, Any]:
        groups = parameter_groups(self, self.model.backbone, self.config)
        optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = int(total * self.config.warmup / self.config.max_epochs)
        # Resumed on another number of devices an epoch has other steps: go on from the same epoch, not the same step.
        shift, per_epoch = 0, self.trainer.num_training_batches
        if self._restored and self._restored["steps_per_epoch"] != per_epoch:
            done = self._restored["epochs_completed"] * per_epoch + self._restored.get("steps_done", 0)
            shift = done - self._restored["global_step"]
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_at(max(0, step + shift), warmup, total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_callbacks(self) -> list[pl.Callback]:
        """What belongs to the recipe, whoever makes the Trainer."""
        config, chosen = self.config, []
        if config.early_stop:
            chosen.append(EarlyStopping(config.monitor, patience=config.early_stop, mode=MONITORS[config.monitor]))
        if config.whiten:
            chosen.append(callbacks.FitWhitening())
        if config.ema_decay or config.kept_share:
            chosen.append(callbacks.Averages(config.ema_decay, config.kept_share))
        return chosen

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 B,3,H,W -> embedding float B,D."""
        return self.model.embed(normalise(pixels, self.preprocessing))

    @torch.no_grad()
    def reconstruct(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 B,3,H,W -> what the decoder makes of the embeddings, uint8 B,3,H,W."""
        was_training = self.training
        self.eval()
        images = from_unit(self.model.decoder(self(pixels)))
        self.train(was_training)
        return images

    def on_train_start(self) -> None:
        """A checkpoint's tensors were loaded before the module moved; resumed within an epoch, no other hook comes first."""
        if self.classes is not None:
            self.classes.labels = self.classes.labels.to(self.device)
        self._sums = {name: total.to(self.device) for name, total in self._sums.items()}

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

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self._record_unreadable("train", batch)
        if not self._all_ranks(len(batch["index"]) >= 2):  # too few for batch statistics
            return self._leave_out()
        statistics = [buffer.clone() for buffer in self.buffers()]
        views = [batch[name] for name in ("pixels", "view") if name in batch]
        embedding = self(torch.cat(views))  # V views of B images: VB,3,H,W -> VB,D
        # The first view alone is reconstructed: decoding costs as much as embedding, and the other would add little.
        first, target = embedding[: len(views[0])], batch.get("target", batch["pixels"])
        recon = F.mse_loss(self.model.decoder(first).float(), to_unit(target))
        figures = {"recon_loss": recon, **self._other_losses(embedding, batch["index"])}
        loss, others = self._weigh(figures)
        if not self._all_ranks(bool(torch.isfinite(loss))):  # learning from it would ruin every weight
            self.refused.append((self.global_step, f"{loss.item():g}", batch["index"].tolist()))
            for buffer, before in zip(self.buffers(), statistics, strict=True):
                buffer.copy_(before)  # batch norm has seen what ruined the loss
            return self._leave_out()
        self.refused = []
        if batch_idx == 0 and self.config.reconstruction_weight and len(figures) > 1:
            ratio = _gradient_ratio(others, self.config.reconstruction_weight * recon, embedding)
            self._add_up({"grad_ratio": ratio}, 1)
        self._add_up({"loss": loss, **figures}, len(batch["index"]))
        rate = self.config.learning_rate * self.lr_schedulers().lr_lambdas[0](self.lr_schedulers().last_epoch)
        self.log("train/lr", rate, on_step=True, on_epoch=False)
        return loss

    def _leave_out(self) -> torch.Tensor:
        """Nothing to learn in this step. Lightning takes no None on several devices: a loss without a slope, then."""
        self._left_out = True
        return sum((p * 0).sum() for p in self.parameters() if p.requires_grad)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._left_out:  # without gradients nothing moves, momentum and weight decay included
            optimizer.zero_grad(set_to_none=True)
            self._left_out = False

    def _other_losses(self, embedding: torch.Tensor, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """All but the reconstruction, unweighted, of VB embeddings of B images."""
        config = self.config
        found: dict[str, torch.Tensor] = {}
        if not config.learns_classes and not config.compares_views:
            return found
        projection = self.model.projection(embedding)  # VB,D'
        prediction = self.model.prediction(projection) if self.model.prediction else None
        if config.learns_classes:
            found["metric_loss"] = self._metric_loss(prediction, index)
        if config.contrastive_weight:
            found["contrastive_loss"] = losses.contrastive_loss(projection, config.temperature)
        if config.consistency_weight:
            found["consistency_loss"] = losses.consistency_loss(prediction, projection)
        return found

    def _weigh(self, figures: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(the loss, its part beside the reconstruction)."""
        weight = {
            "metric_loss": self.config.metric_weight,
            "contrastive_loss": self.config.contrastive_weight,
            "consistency_loss": self.config.consistency_weight,
        }
        others = sum((weight[name] * figures[name] for name in weight if name in figures), torch.zeros(()))
        return self.config.reconstruction_weight * figures["recon_loss"] + others, others

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._record_unreadable("val", batch)
        if len(batch["index"]) == 0:
            return
        pixels = batch["pixels"]
        embedding, of_view = self(pixels), self(batch["view"])
        self._held_out.append((batch["index"], embedding, of_view))
        squares = (self.model.decoder(embedding).float() - to_unit(pixels)).square().mean((1, 2, 3))  # B,3,H,W -> B
        figures = {"recon_loss": squares.mean()}
        extra = {"psnr": losses.psnr(squares).mean()}
        if self.config.learns_classes:
            figures["metric_loss"], extra["agreement"] = self._held_out_metric(embedding, of_view)
        if self.config.compares_views and len(pixels) > 1:
            projection = self.model.projection(torch.cat([embedding, of_view]))
            if self.config.contrastive_weight:
                figures["contrastive_loss"] = losses.contrastive_loss(projection, self.config.temperature)
            if self.config.consistency_weight:
                figures["consistency_loss"] = losses.consistency_loss(self.model.prediction(projection), projection)
        self._log_held_out({"loss": self._weigh(figures)[0], **figures, **extra}, len(pixels))

    def on_validation_epoch_start(self) -> None:
        self._held_out = []

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        self._log_training()
        quality, self.validation_embeddings = self._quality(self.current_epoch + 1)
        found = {f"val/{name}": value for name, value in quality.items()}
        if self.classes is not None and self.config.pseudo_classes != "batch":
            state = classes.figures(self.classes.labels.cpu(), self.classes.count)
            found |= {f"classes/{name}": value for name, value in state.items()}
            if self.nmi is not None:
                found["classes/nmi"] = self.nmi
        self.log_dict(found)  # from the same gathered embeddings on every rank: nothing to reduce

    def on_train_epoch_end(self) -> None:
        self._log_training()  # of an epoch without validation

    @torch.no_grad()
    def measure_baseline(self) -> None:
        """Quality and health of the embeddings as they are before the first step, to compare later ones with."""
        self.eval()
        self._held_out = []
        with self.console.progress("looking at the start", len(self.trainer.datamodule.val_set), "pictures") as steps:
            for batch in self.trainer.datamodule.val_dataloader():
                self._record_unreadable("val", batch)
                if len(batch["index"]):
                    views = (self(batch[name].to(self.device)) for name in ("pixels", "view"))
                    self._held_out.append((batch["index"].to(self.device), *views))
                steps.advance(len(batch["index"]) + len(batch["bad"]))
        self.start, self.baseline_embeddings = self._quality(0)
        self.train()

    @torch.no_grad()
    def fit_whitening(self) -> None:
        """Fit `whitening` to the clean training images, at most WHITEN_ON of them, evenly spaced. On rank 0 alone."""
        if not self.trainer.is_global_zero:
            return
        rows = range(0, len(self._train_set()), -(-len(self._train_set()) // WHITEN_ON))
        embeddings = self._embed_train_set(rows)[0].numpy()
        try:
            fitted = whitening.fit(embeddings, shrink=whitening.SHRINK)
        except EarTeachError as error:
            self.console.warn(f"{error}; this epoch has none")
            return
        self.whitening = {name: torch.from_numpy(value).float() for name, value in asdict(fitted).items()}

    def _quality(self, epoch: int) -> tuple[dict[str, float], ValidationRows | None]:
        """Quality of the held-out embeddings of this epoch, of all ranks, and they. Empty with fewer than two images."""
        held_out = [torch.cat(column) for column in zip(*self._held_out, strict=True)]
        self._held_out = []
        if self.trainer.world_size > 1:
            held_out = self._gather(held_out)
        if not held_out or len(held_out[0]) < 2:
            return {}, None
        index, embeddings, of_views = (column.float().cpu() for column in held_out)
        index, order = torch.unique(index.long(), return_inverse=True)  # ranks may share an image to come out even
        first = torch.empty(len(index), dtype=torch.long).scatter_(0, order, torch.arange(len(order)))
        embeddings, of_views = embeddings[first], of_views[first]
        rows = ValidationRows(index, embeddings, epoch)
        if not torch.isfinite(embeddings).all():
            return {}, rows  # diverged: the loss says so
        manifest = self.trainer.datamodule.val_set.manifest
        people = [ear and ear[0] for ear in map(manifest.ear, index.tolist())]
        some = torch.tensor(collapse.judged_rows(people))
        found = {
            "retrieval": collapse.retrieval(embeddings[some], of_views[some]),
            **asdict(collapse.health(embeddings[some])),
        }
        ears = [manifest.ear(i) for i in index[some].tolist()]
        named = [i for i, ear in enumerate(ears) if ear]
        if can_be_scored([ears[i] for i in named]):
            rank1, eer = rank1_and_eer(embeddings[some][named].numpy(), [str(ears[i]) for i in named])
            found |= {"rank1": 100 * rank1, "eer": 100 * eer}
        return found, rows

    def _judged_on(self) -> int:
        """How many images quality and health are measured on."""
        return min(len(self.trainer.datamodule.val_set), collapse.JUDGED_ON)

    def _gather(self, columns: list[torch.Tensor]) -> list[torch.Tensor]:
        """The columns of all ranks, one after the other; a rank whose images were all unreadable has none."""
        everything: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(everything, [column.cpu() for column in columns])
        return [torch.cat(parts) for parts in zip(*(found for found in everything if found), strict=True)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["earteach"] = describe(
            self.config, self.preprocessing, self.model.embedding_dim, self._epochs_completed(), self._steps_per_epoch()
        )
        checkpoint["earteach"] |= {"start": self.start, "judged_on": self._judged_on()}
        if done := steps_into_epoch(self.trainer):
            checkpoint["earteach"]["steps_done"] = done
            share = self.trainer.strategy.reduce  # each rank goes on with an equal part of what all have
            checkpoint["training_sums"] = {k: share(v.clone(), reduce_op="mean") for k, v in self._sums.items()}
        if self.whitening is not None and not steps_into_epoch(self.trainer):  # within an epoch it is of older weights
            checkpoint["whitening"] = self.whitening
        if self.classes is not None:
            checkpoint["pseudo_classes"] = {**self.classes.as_dict(), "nmi": self.nmi}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and checkpoint["earteach"].get("steps_done"):
            self._divide_epoch(checkpoint)
        self._restored = {**checkpoint["earteach"], "global_step": checkpoint["global_step"]}
        self.start = dict(checkpoint["earteach"].get("start", {}))
        self._sums = {name: total.clone() for name, total in checkpoint.get("training_sums", {}).items()}
        state = checkpoint.get("pseudo_classes")
        if state is None:
            return
        if self.prototypes is None:  # load_from_checkpoint, without a trainer
            self._allocate(state["count"])
        expected = self._fingerprint() if self._trainer is not None else None
        self.classes = classes.PseudoClasses.from_dict(state, expected)
        self.nmi = state.get("nmi")

    def _divide_epoch(self, checkpoint: dict[str, Any]) -> None:
        """Count the steps of an epoch under way as this run's processes would have done them.

        Each step of P processes takes P batches of the epoch's one order, so S steps of P are S P / P' of P'. Rounded
        down: less than a step is done again. Changes the loaded checkpoint, of which Lightning then restores its loops.
        """
        options, about = checkpoint["hyper_parameters"], checkpoint["earteach"]
        before, now = options["devices"] * options.get("num_nodes", 1), self.trainer.world_size
        if before == now:
            return
        steps = about["steps_done"] * before // now
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        for name in progress:
            progress[name] += steps - about["steps_done"]
        about["steps_done"] = steps
        checkpoint[type(self.trainer.datamodule).__qualname__]["steps_done"] = steps  # restored after the model
        for total in checkpoint.get("training_sums", {}).values():
            total *= before / now  # each process has an equal part of what all have

    def _metric_loss(self, features: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Of the heads' output VB,D' of V views of the B training images `index`."""
        if self.config.pseudo_classes == "batch":
            labels = classes.batch_labels(len(index), self.classes.count).to(index.device)
        else:
            labels = self.classes.labels[index]
        labels = labels.repeat(len(features) // len(index))
        known = labels >= 0  # unreadable when the classes were made, or without an identity
        if not known.any():
            return features.sum() * 0 + self.prototypes.sum() * 0  # no parameter without a gradient
        margin = losses.margin_at(self.current_epoch, self.config.margin, self.config.margin_warmup_epochs)
        return losses.metric_loss(
            self.config.metric_loss, features[known], self.prototypes, labels[known], margin, self.config.scale
        )

    def _held_out_metric(self, embedding: torch.Tensor, of_view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Held-out images take the class of the prototype nearest to the clean image; the loss (whole margin)
        is that of an augmented view: an image scored against its own nearest prototype would prove nothing."""
        labels = losses.cosines(self.model.predict(embedding), self.prototypes).argmax(1)
        features = self.model.predict(of_view)
        agreement = (losses.cosines(features, self.prototypes).argmax(1) == labels).float().mean()
        loss = losses.metric_loss(
            self.config.metric_loss,
            features,
            self.prototypes,
            labels,
            self.config.margin,
            self.config.scale,
        )
        return loss, agreement

    def _make_classes(self) -> None:
        """A round of pseudo-classes on rank 0, told to all: labels, and class means as prototypes."""
        result: Any = None
        mark = self._fingerprint()
        if self.config.pseudo_classes == "batch":  # nothing of the images is in these classes, nor in their prototypes
            labels = classes.fixed_labels(len(self._train_set()), len(self.prototypes), self.config.seed)
            self.classes = classes.PseudoClasses(labels, len(self.prototypes), 0, mark)
            return
        if self.trainer.is_global_zero:
            try:
                result = self._found_classes(mark)
            except EarTeachError as error:
                result = error
        result = self.trainer.strategy.broadcast(result)
        if isinstance(result, EarTeachError):
            raise EarTeachError.on_all_ranks(str(result))
        state, means = result
        before = self.classes.labels.cpu() if self.classes else None
        self.classes = classes.PseudoClasses.from_dict(state, None)
        self.nmi = None if before is None else classes.agreement_of_rounds(before, self.classes.labels)
        with torch.no_grad():
            self.prototypes.copy_(means)
        for callback in self.trainer.callbacks:
            if isinstance(callback, callbacks.Averages):
                callback.forget("prototypes")  # the average of old ones is of no class
        self.optimizers().optimizer.state.pop(self.prototypes, None)  # old momentum belongs to old prototypes

    def _found_classes(self, mark: str) -> tuple[dict[str, Any], torch.Tensor]:
        """The next round's state and class means."""
        embeddings, rows = self._embed_train_set()
        labels = self._label(embeddings, rows)
        means = self._class_means(embeddings, labels[rows])
        past = self.classes.round + 1 if self.classes else 0
        return classes.PseudoClasses(labels, len(self.prototypes), past, mark).as_dict(), means

    def _fingerprint(self) -> str:
        """Of the training manifest, with the columns that the classes are made from."""
        labelled = self.config.pseudo_classes == "identity" or self.config.side_policy == "separate"
        return classes.fingerprint(self._train_set().manifest, labelled)

    @torch.no_grad()
    def _embed_train_set(self, wanted: range | None = None):
        """(embeddings M,D, their rows M) of the readable training images (`wanted`: of these rows), unaugmented,
        evaluation mode, float32."""
        was_training = self.training
        self.eval()
        found, rows = [], []
        console = (
            self.console if wanted is None else Console(quiet=True)
        )  # a few seconds each epoch are not worth a line
        with console.progress("making pseudo-classes", len(self._train_set()), "pictures") as steps:
            for batch in self.trainer.datamodule.clean_dataloader(wanted):
                self._record_unreadable("train", batch, alone=True)
                if len(batch["index"]):
                    found.append(self(batch["pixels"].to(self.device)).float().cpu())
                    rows.append(batch["index"])
                steps.advance(len(batch["index"]) + len(batch["bad"]))
        self.train(was_training)
        if len(found) == 0:
            raise EarTeachError("training images: not one could be read; run earteach validate-data")
        return torch.cat(found), torch.cat(rows)

    def _label(self, embeddings: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """int64 labels of all N training images, of whatever kind; -1 for kmeans where unreadable."""
        manifest, count, seed = self._train_set().manifest, len(self.prototypes), self.config.seed
        if self.config.pseudo_classes == "instance":
            return torch.arange(len(manifest))
        if self.config.pseudo_classes == "identity":
            return classes.identity_labels(manifest)
        if self.config.pseudo_classes == "fixed":
            return classes.fixed_labels(len(manifest), count, seed)
        if len(rows) < count:
            raise EarTeachError(
                f"{manifest.source}: {len(rows)} readable images cannot fill {count} pseudo-classes; "
                "mend the images or lower --num-pseudo-classes"
            )
        place = {row: i for i, row in enumerate(rows.tolist())}
        apart = [[place[r] for r in group if r in place] for group in classes.same_photo(manifest)]
        start = self.classes.labels.cpu()[rows] if self.classes else None
        labels = torch.full((len(manifest),), -1)
        options: dict[str, Any] = {"start": start, "apart": apart}
        if self.config.side_policy == "separate":
            if count < 4:
                raise EarTeachError(
                    f"{manifest.source}: {count} pseudo-classes are too few for two sides; leave sides as-is"
                )
            sides = [manifest.side(row) for row in rows.tolist()]
            labels[rows] = classes.kmeans_by_side(classes.directions(embeddings), sides, count, seed, **options)
        else:
            labels[rows] = classes.kmeans(classes.directions(embeddings), count, seed, **options)
        return labels

    @torch.no_grad()
    def _class_means(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Class means of the heads' output, K,D'. In training mode: that is what the loss will compare them with."""
        parts = embeddings.tensor_split(-(-len(embeddings) // 65_536))
        outputs = [self.model.predict(part.to(self.device)).float().cpu() for part in parts]
        means = classes.class_means(F.normalize(torch.cat(outputs), dim=1), labels, len(self.prototypes))
        # a class none of whose images could be read keeps the prototype it has
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

    def _record_unreadable(self, split: str, batch: Batch, alone: bool = False) -> None:
        """Count unreadable images. Raises EarTeachError, on all ranks (`alone`: this one is the only one here), when
        they are more than `max_bad` of the split."""
        for index, reason, detail in batch["bad"]:
            self.bad[(split, index)] = ImageError(reason, detail)
        count = sum(which == split for which, _ in self.bad)
        if self.trainer.world_size > 1 and not alone:
            everywhere = self.trainer.strategy.reduce(torch.tensor(float(count), device=self.device), reduce_op="sum")
            count = int(everywhere)
        datamodule = self.trainer.datamodule
        dataset = datamodule.train_set if split == "train" else datamodule.val_set
        if count <= self.config.max_bad * len(dataset):
            return
        bad = self.bad if alone else self.all_unreadable()
        found = {index: error for (which, index), error in sorted(bad.items()) if which == split}
        if len(found) > self.config.max_bad * len(dataset):  # an image that two ranks share was counted twice
            index, error = next(iter(found.items()))
            raise (EarTeachError if alone else EarTeachError.on_all_ranks)(
                f"{dataset.manifest.where(index)}: {error}; {len(found)} of {len(dataset)} images are bad, more than "
                f"--max-bad {self.config.max_bad:g}: bad_images.csv lists them. Run earteach validate-data "
                "--write-clean, or raise --max-bad"
            )

    def all_unreadable(self) -> dict[tuple[str, int], ImageError]:
        """`bad` of all ranks, which all must ask for."""
        if self.trainer.world_size == 1:
            return self.bad
        everything: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(everything, self.bad)
        return {place: error for found in everything for place, error in found.items()}

    def _add_up(self, figures: dict[str, torch.Tensor], count: int) -> None:
        """Add means over `count` images to the epoch's. Kept here, not by Lightning, which forgets the part of an
        epoch before an interruption."""
        for name, mean in figures.items():
            total = self._sums.setdefault(name, torch.zeros(2, device=self.device))
            total += torch.stack((mean.detach().float() * count, total.new_tensor(count)))

    def _log_training(self) -> None:
        """The epoch's training figures, of all ranks; called when it is over, at the end of its validation."""
        if self._sums:
            totals = self.trainer.strategy.reduce(torch.stack(list(self._sums.values())), reduce_op="sum")
            means = (totals[:, 0] / totals[:, 1]).unbind()
            self.log_dict({f"train/{name}": mean for name, mean in zip(self._sums, means, strict=True)})
        self._sums = {}

    def _log_held_out(self, figures: dict[str, torch.Tensor], count: int) -> None:
        values = {f"val/{name}": value.detach() for name, value in figures.items()}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=count, sync_dist=self.trainer.world_size > 1)

    def _all_ranks(self, ready: bool) -> bool:
        """Whether every rank is ready: a step that one leaves out, all must leave out, or they wait for ever."""
        return self.trainer.strategy.reduce_boolean_decision(ready, all=True)

    def _epochs_completed(self) -> int:
        return self.trainer.fit_loop.epoch_progress.current.processed

    def _steps_per_epoch(self) -> int:
        return int(self.trainer.num_training_batches)


def _gradient_ratio(metric: torch.Tensor, reconstruction: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Norm of the gradient the other terms send into the embedding, over that of the reconstruction term."""
    norms = [
        torch.autograd.grad(term * _GRADIENT_SCALE, embedding, retain_graph=True)[0].float().norm()
        for term in (metric, reconstruction)
    ]
    return norms[0] / norms[1].clamp_min(1e-12)
