"""Leave-one-out rank-1: for how many photos is the nearest other photo the same ear of the same person?

Reads what `earteach embed eval.csv X.npy` wrote (X.npy, and X.csv for the names) and the identities and sides
of eval.csv. Left and right ears of a person count as two. The +- is the standard error over photos; photos of one
ear are not independent, so the true one is larger.

    python rank1.py eval.csv start.npy teacher.npy
"""

import csv
import sys
from pathlib import Path

import numpy as np


def main(labels: str, *embeddings: str) -> None:
    with open(labels, newline="") as file:
        ear_of = {row["image_path"]: (row["identity"], row["side"]) for row in csv.DictReader(file)}
    for path in embeddings:
        with open(Path(path).with_suffix(".csv"), newline="") as file:
            ears = [ear_of[row["path"]] for row in csv.DictReader(file) if row["row"]]
        hits = rank1_hits(np.load(path), ears)
        share, spread = np.mean(hits), np.std(hits) / np.sqrt(len(hits))
        print(
            f"{Path(path).stem:12} rank-1 {100 * share:5.1f} % +- {100 * spread:.1f}  ({sum(hits)} of {len(hits)} photos, "
            f"{len(set(ears))} ears; by chance {100 * chance(ears):.1f} %)"
        )


def rank1_hits(rows: np.ndarray, ears: list) -> list[bool]:
    """rows [N, D] of unit length; N booleans."""
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -np.inf)  # a photo is not its own neighbour
    return [ears[i] == ears[j] for i, j in enumerate(similarity.argmax(1))]


def chance(ears: list) -> float:
    return float(np.mean([(ears.count(ear) - 1) / (len(ears) - 1) for ear in ears]))


if __name__ == "__main__":
    main(*sys.argv[1:])
