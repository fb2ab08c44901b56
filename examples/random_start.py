"""Write the untrained start of a run: a timm model with seeded random weights, under timm's names.

Training from a file makes the start something that can be measured, too.

    python random_start.py convnext_atto start.safetensors
"""

import argparse

import timm
import torch
from safetensors.torch import save_file


def main(name: str, out: str) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model(name, num_classes=0).state_dict(), out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a timm model, say convnext_atto")
    parser.add_argument("out", help="the .safetensors file to write")
    main(**vars(parser.parse_args()))
