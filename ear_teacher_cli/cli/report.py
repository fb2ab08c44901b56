"""`earteach report` and `earteach collage`."""

from dataclasses import MISSING, dataclass
from typing import Annotated

from ..config_fields import OPTIONS, Checked, ListOptions, option, shared
from ..console import Console
from ..files import printable
from .options import argument, command


@dataclass(frozen=True)
class ReportOptions(Checked):
    """Options of `report`."""

    out: str | None = option(
        None,
        OPTIONS,
        "Default: report.html in RUN, which is replaced.",
        short="-o",
        metavar="FILE.html",
        private=True,
    )
    root_dir: str | None = shared("root_dir")
    images: bool = shared("images", help="Show images of ears and their people, if the run keeps images.")
    overwrite: bool = shared("overwrite")


@dataclass(frozen=True, kw_only=True)
class CollageOptions(ListOptions):
    """Options of `collage`."""

    out: str = option(MISSING, OPTIONS, "Image to write.", short="-o", metavar="FILE.png", private=True)
    metadata: str | None = option(
        None, OPTIONS, "Manifest or folder to take images from. Default: the run's validation list.", private=True
    )
    num_samples: int = shared("num_collage_samples", panel=OPTIONS, help="Number of images.")
    seed: int = shared("seed", help="Random seed of the choice of images.")
    overwrite: bool = shared("overwrite")


@command("report", example="earteach report ear_teacher/outputs/ear_teacher")
def report(
    run: Annotated[str, argument("RUN", "An experiment folder.")], options: ReportOptions, console: Console
) -> None:
    """Write a run as one HTML page: curves, collages, neighbours, comparison with the initial weights.

    The page is one file and loads nothing from elsewhere. `train` writes it at the end, too.
    """
    from ..report.write import report as write_report

    written = write_report(
        run, console, options.out, root_dir=options.root_dir, images=options.images, overwrite=options.overwrite
    )
    console.info(f"{printable(written)}: written")


@command("collage", example="earteach collage ear_teacher/outputs/ear_teacher -o collage.png")
def collage(
    checkpoint: Annotated[str, argument("CKPT", "A checkpoint, or an experiment folder (its best checkpoint).")],
    options: CollageOptions,
    console: Console,
) -> None:
    """Draw images with their reconstructions below them."""
    from ..report.collage import collage as draw_collage

    made = draw_collage(
        checkpoint,
        options.out,
        metadata=options.metadata,
        root_dir=options.root_dir,
        reading=options.reading,
        num_samples=options.num_samples,
        seed=options.seed,
        overwrite=options.overwrite,
    )
    console.info(
        f"{printable(made.path)}: {made.images} images of {printable(made.metadata)}, mean PSNR {made.psnr:.1f} dB"
    )
