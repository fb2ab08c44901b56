"""Embed a folder with thingsvision as its README shows, once for each line on stdin, and print the seconds of each.

    python of_thingsvision.py FOLDER MODEL BATCH SIDE

measure_embedding.py runs it with the Python of a separate environment, because thingsvision needs an older torch.
"""

import sys
import time
from contextlib import redirect_stdout
from importlib.metadata import version

import thingsvision
import torch
from thingsvision.utils.data import DataLoader, ImageDataset
from timm.data import create_transform


def main(folder: str, model: str, batch: int, side: int) -> None:
    """Print the versions, then the seconds of embedding the folder for each line on stdin."""
    stdout = sys.stdout
    with redirect_stdout(sys.stderr):  # thingsvision prints messages
        extractor = thingsvision.get_extractor(model_name=model, source="timm", device="cpu", pretrained=False)
        # its own transform would have the input size of the model's configuration
        transforms = create_transform((3, side, side), is_training=False, crop_pct=1.0, interpolation="bicubic")
        layer = next(name for name in ("head.flatten", "global_pool") if name in extractor.get_module_names())
    versions = f"thingsvision {version('thingsvision')}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(versions, file=stdout, flush=True)
    for _ in sys.stdin:
        with redirect_stdout(sys.stderr):
            start = time.perf_counter()
            dataset = ImageDataset(folder, f"{folder}-order", backend="pt", transforms=transforms)
            batches = DataLoader(dataset, batch, backend="pt")
            rows = extractor.extract_features(batches, module_name=layer, flatten_acts=True, output_type="ndarray")
            seconds = time.perf_counter() - start
            assert len(rows) == len(dataset) > 0
        print(seconds, file=stdout, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
