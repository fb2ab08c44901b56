"""`earteach embed`."""

from dataclasses import asdict, dataclass
from typing import Annotated

from ..command_config import EmbedConfig
from ..config_fields import Checked, shared
from ..console import Console
from ..distributed import is_first_process
from ..errors import UsageError
from ..files import printable
from . import json_output
from .options import argument, command


@dataclass(frozen=True)
class OutputOptions(Checked):
    """Options of `embed` that are not about the embeddings."""

    json: str | None = shared("json", help="Write counts and names of the outputs as JSON; - for stdout.")


@command("embed", example="find photos -name '*.jpg' | earteach embed - - --format npy > rows.npy")
def embed(
    input: Annotated[str, argument("INPUT", "A folder, a manifest, an image, or - for paths on stdin.")],
    out: Annotated[str, argument("OUT", "A .npy, .npz or .csv file, or - for stdout.")],
    config: EmbedConfig,
    options: OutputOptions,
    console: Console,
) -> None:
    """Write one embedding per image, with names and provenance in files beside it."""
    if out == options.json == "-":
        raise UsageError("--json -: stdout has the embeddings already; name a file for one of the two")
    json_output.require_free(options.json, config.overwrite, input, out)
    from ..embedding.writer import embed as write_embeddings

    done = write_embeddings(input, out, config, console)
    if is_first_process():
        skipped = f", {done.skipped} skipped" if done.skipped else ""
        console.info(f"{'stdout' if out == '-' else printable(out)}: {done.rows} rows of {done.dim}{skipped}")
        json_output.write(options.json, asdict(done))
