"""Write a timm model with seeded random weights, under timm's names, as initial weights of a run.

A file of the initial weights can be evaluated too, as the untrained baseline.

    python random_start.py convnext_atto start.safetensors
"""

import argparse

import timm
import torch
from safetensors.torch import save_file


def main(name: str, out: str) -> None:
    """Write the weights of timm model `name` to `out`."""
    torch.manual_seed(0)
    save_file(timm.create_model(name, num_classes=0).state_dict(), out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="timm model, e.g. convnext_atto")
    parser.add_argument("out", help=".safetensors file to write")
    main(**vars(parser.parse_args()))
