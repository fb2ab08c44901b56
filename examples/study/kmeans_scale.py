"""Measure time and memory of k-means, which computes the pseudo-classes, on synthetic embeddings.

    python kmeans_scale.py 1000000 768 512

Arguments: number of images, dimension, number of classes. The embeddings are unit vectors around 10,000 random centres.
"""

import resource
import sys
import time

import torch
import torch.nn.functional as F

from ear_teacher_cli.training.kmeans import kmeans
from ear_teacher_cli.training.pseudo_labels import class_metrics

CENTRES, SPREAD, CHUNK = 10_000, 0.7, 16_384


def main(images: int, size: int, classes: int) -> None:
    """Cluster synthetic embeddings and print time and memory."""
    random = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(CENTRES, size, generator=random), dim=1)
    rows = torch.empty(images, size)
    for part in rows.split(CHUNK):
        chosen = centres[torch.randint(0, CENTRES, (len(part),), generator=random)]
        noise = torch.randn(len(part), size, generator=random) / size**0.5
        part.copy_(F.normalize(chosen + SPREAD * noise, dim=1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    labels = kmeans(rows, classes, seed=0)
    seconds = time.perf_counter() - start
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    state = class_metrics(labels, classes)
    print(
        f"{images} x {size}, {classes} classes: {seconds:.0f} s on {torch.get_num_threads()} threads, "
        f"{extra / 2**10:.0f} MB in addition to the {rows.numel() * 4 / 2**20:.0f} MB of embeddings; in use {state['in_use']:.3f}, "
        f"entropy {state['entropy']:.3f}, largest {state['largest']:.4f}"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
