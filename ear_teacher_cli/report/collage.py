"""`collage`: originals above, their reconstructions below."""

from dataclasses import dataclass
from pathlib import Path

from .. import run_folder
from ..config import Reading
from ..data.dataset import EarDataset
from ..data.manifest import read_manifest
from ..drawing import collage as draw_collage
from ..drawing import psnr_of_bytes, save_image
from ..errors import EarTeachError, ManifestError, UsageError
from ..files import printable, refuse_existing
from ..model.checkpoint import read_checkpoint
from ..training.callbacks import sample_pixels
from ..training.module import module_of


@dataclass(frozen=True)
class Collage:
    """A collage that was written, and of how many images of which manifest it is. `psnr`: their mean, dB."""

    path: Path
    images: int
    psnr: float
    metadata: str


def collage(
    source: str | Path,
    out: str | Path,
    *,
    metadata: str | None = None,
    root_dir: str | None = None,
    reading: Reading | None = None,
    num_samples: int = 10,
    seed: int = 0,
    overwrite: bool = False,
) -> Collage:
    """Write a PNG of `num_samples` images of `metadata` (default: the validation manifest) and their reconstructions.

    `seed` chooses the images. Raises EarTeachError if none can be read, ManifestError or WeightsError.
    """
    if Path(out).suffix.lower() != ".png":
        raise UsageError(f"{printable(out)}: name a .png file; other images are not written")
    out = refuse_existing(out, overwrite, inputs=(source, metadata))
    checkpoint = read_checkpoint(run_folder.checkpoint_of(Path(source), best=True))
    config = checkpoint.config
    if not config.decodes:
        raise EarTeachError(
            f"{printable(source)}: is of a distilled student, which reconstructs nothing; draw its teacher"
        )
    try:
        manifest = (
            read_manifest(metadata, root_dir, reading)
            if metadata
            else read_manifest(config.val_metadata, root_dir or config.root_dir, config.reading)
        )
    except ManifestError as error:
        where = (
            ""
            if metadata
            else " (the run's paths start from the folder where it was trained; or name images with --metadata)"
        )
        raise ManifestError(f"{error}{where}") from error
    module = module_of(checkpoint)
    pixels = sample_pixels(EarDataset(manifest, checkpoint.preprocessing), num_samples, seed)
    if pixels is None:
        raise EarTeachError(
            f"{manifest.source}: no image could be read; check --root-dir, or run earteach validate-data"
        )
    reconstructions = module.reconstruct(pixels)
    decibels = psnr_of_bytes(pixels, reconstructions)
    save_image(draw_collage(pixels, reconstructions, f"{config.experiment_name}, epoch {checkpoint.epoch}"), out)
    return Collage(out, len(pixels), sum(decibels) / len(decibels), manifest.source)
