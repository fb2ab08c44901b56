"""`earteach prepare`."""

from typing import Annotated

from ..command_config import PrepareConfig
from ..console import Console
from .options import argument, command


@command("prepare", example="earteach prepare photos/ data --folder-identities")
def prepare(
    raw: Annotated[
        str, argument("RAW", "A folder of images and their annotations from one or more sources; or a list.")
    ],
    out: Annotated[str, argument("OUT", "Folder for the two lists and the report prepare.json.")],
    config: PrepareConfig,
    console: Console,
) -> None:
    """Make a training and a validation list from a folder of mixed sources, with no person, photo or duplicate in both.

    RAW may hold crops, COCO (.json), CSV (*_annotations.csv), .pts and YOLO labels. Images are not copied: paths in
    the lists start from the working directory if RAW is below it, else from RAW, and other commands need --root-dir
    RAW.
    """
    from ..data.prepare import prepare as prepare_lists

    prepare_lists(raw, out, config, console)
