"""The embeddings of a validation pass.

N validation images, D embedding.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ValidationRows:
    """Embeddings of validation images as the model gives them: not at unit length, not whitened, without augmentation.

    `index`: int64 N, rows of the validation list, sorted and unique. `embeddings`: float32 N,D. Both on the CPU.
    `epoch`: epochs completed with these weights; 0 for the initial ones.
    """

    index: torch.Tensor
    embeddings: torch.Tensor
    epoch: int = 0
