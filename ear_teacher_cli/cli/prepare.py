"""`earteach prepare`."""

from dataclasses import dataclass
from typing import Annotated

from ..config_fields import OPTIONS, ListOptions, option, shared
from ..console import Console
from .options import argument, command


@dataclass(frozen=True)
class PrepareOptions(ListOptions):
    """Options of `prepare`."""

    val_share: float = option(
        0.2, OPTIONS, "Share of the ears of every source (entry of RAW) for validation, above 0 and below 1."
    )
    seed: int = shared("seed", help="Random seed of the split.")
    format: str = option("npy", OPTIONS, "Format of the lists.", choices=("npy", "csv"))
    folder_identities: bool = option(
        False,
        OPTIONS,
        "Take folder names as people where lists name none: RAW/source/p017/left.jpg, or RAW/p017/left.jpg if no image "
        "lies deeper.",
        switch=True,
    )
    num_workers: int = shared("num_workers")
    dry_run: bool = shared("dry_run", help="Read everything and print the result, but write nothing.")
    overwrite: bool = shared("overwrite")


@command("prepare", example="earteach prepare photos/ data --folder-identities")
def prepare(
    raw: Annotated[
        str, argument("RAW", "A folder of images and their annotations from one or more sources; or a list.")
    ],
    out: Annotated[str, argument("OUT", "Folder for the two lists and the report prepare.json.")],
    options: PrepareOptions,
    console: Console,
) -> None:
    """Make a training and a validation list from a folder of mixed sources, with no person, photo or duplicate in both.

    RAW may hold crops, COCO (.json), CSV (*_annotations.csv), .pts and YOLO labels. Images are not copied: paths in
    the lists start from the working directory if RAW is below it, else from RAW, and other commands need --root-dir
    RAW.
    """
    from ..data.prepare import prepare as prepare_lists

    prepare_lists(
        raw,
        out,
        console,
        val_share=options.val_share,
        seed=options.seed,
        format=options.format,
        reading=options.reading,
        root_dir=options.root_dir,
        folder_identities=options.folder_identities,
        num_workers=options.num_workers,
        dry_run=options.dry_run,
        overwrite=options.overwrite,
    )
