"""What training costs: time per 1,000 images and memory of a step, for several models, sizes and numbers of views.

    python examples/benchmarks/measure_cost.py [--device cpu|cuda] [--steps 2] [--only NAME]

Prints a table in Markdown. Each row is a process of its own, so that the memory is its own: it builds the model and the
optimiser, does steps on random crops, the first of which is not counted, and reports the median of the others and the
largest memory of the process (CPU) or of PyTorch's allocator (GPU). Loading images is not part of it.

On a CPU the last column is computed, not measured: what a GPU would need in 16-mixed, that is 16 bytes a parameter
(weights, gradients and AdamW's two moments in float32) and half of what autograd saves for the backward pass in float32.
Workspaces of cuDNN and the allocator's own come on top.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

# (backbone, image size, views, batch size); the first is the default of `earteach train`
ROWS = (
    ("convnext_tiny", 224, 2, 32),
    ("convnext_tiny", 224, 1, 32),
    ("convnext_tiny", 160, 2, 32),
    ("convnext_nano", 160, 2, 32),
    ("convnext_atto", 128, 2, 32),
    ("tf_efficientnet_lite0", 96, 2, 64),
)


def measure(backbone: str, size: int, views: int, batch: int, device: str, steps: int) -> dict[str, float]:
    """Seconds per 1,000 images, and GB."""
    import torch

    from ear_teacher_cli import EarTeacherLightningModule
    from ear_teacher_cli.config import TrainConfig
    from ear_teacher_cli.model.freezing import freeze_to_stride
    from ear_teacher_cli.training.dry_run import one_step

    once = {} if views == 2 else {"contrastive_weight": 0.0}
    config = TrainConfig(backbone=backbone, image_size=size, views=views, batch_size=batch, pretrained=False, **once)
    module = EarTeacherLightningModule(config).to(device).train()
    freeze_to_stride(module.model.backbone, TrainConfig.freeze_stride)  # as with pretrained weights
    optimizer = torch.optim.AdamW(module.parameters())
    prototypes = torch.randn(512, config.projection_dim, device=device).requires_grad_()
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    made = {"pixels": pixels, "index": torch.arange(batch)} | ({"view": pixels.flip(0)} if views == 2 else {})
    seconds, saved = [], {}

    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        one_step(module, dict(made), prototypes)
    optimizer.zero_grad()
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast(device, torch.float16, enabled=device == "cuda"):
            one_step(module, dict(made), prototypes)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    gigabytes = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else _largest_memory()
    per_thousand = [1000 * value / batch for value in seconds[1:]]
    return {
        "seconds": statistics.median(per_thousand),
        "low": min(per_thousand),
        "high": max(per_thousand),
        "gigabytes": gigabytes,
        "computed": (16 * trained + sum(saved.values()) / 2) / 1e9,
        "parameters": sum(p.numel() for p in module.model.backbone.parameters()),
    }


def _largest_memory() -> float:
    """Largest resident memory of this process in GB (Linux: kB, macOS: bytes)."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", help="the rows of one backbone")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(*json.loads(args.row), args.device, args.steps)))
        return
    heads = ("backbone", "parameters, million", "image size", "views", "batch size", "s per 1,000 images", "memory, GB")
    print(f"| {' | '.join((*heads, 'GPU, 16-mixed, computed, GB'))} |")
    print("|---" * (len(heads) + 1) + "|")
    for row in ROWS:
        if args.only and row[0] != args.only:
            continue
        words = [
            sys.executable,
            __file__,
            "--device",
            args.device,
            "--steps",
            str(args.steps),
            "--row",
            json.dumps(row),
        ]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        backbone, size, views, batch = row
        print(
            f"| `{backbone}` | {found['parameters'] / 1e6:.1f} | {size} | {views} | {batch} | {found['seconds']:.0f} "
            f"({found['low']:.0f}-{found['high']:.0f}) | {found['gigabytes']:.1f} | {found['computed']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
