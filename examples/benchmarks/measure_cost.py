"""Measure time per 1,000 images and memory of training, for several models, sizes and numbers of views.

    python examples/benchmarks/measure_cost.py [--device cpu|cuda] [--steps 2] [--only NAME]

Prints a table in Markdown. Each row is measured in a process of its own, which builds the model and the optimiser, takes
steps on random crops without counting the first, and reports the median of the others and the peak memory of the process
(CPU) or of PyTorch's allocator (GPU). Loading images is not included.

The last column is computed, not measured: the memory that 16-mixed needs on a GPU, 16 bytes per trained parameter
(weights, gradients and AdamW's two moments in float32), 4 per frozen one, plus half of what autograd saves for the backward pass in float32.
Workspaces of cuDNN and overhead of the allocator are not included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

# (backbone, image size, views, batch size, gradient checkpointing); the first is the default of `earteach train`
ROWS = (
    ("convnext_tiny", 224, 2, 32, False),
    ("convnext_tiny", 224, 2, 32, True),
    ("convnext_tiny", 224, 1, 32, False),
    ("convnext_tiny", 160, 2, 32, False),
    ("convnext_nano", 160, 2, 32, False),
    ("convnext_atto", 128, 2, 32, False),
    ("tf_efficientnet_lite0", 96, 2, 64, False),
)
COLUMNS = (
    "backbone",
    "parameters, million",
    "image size",
    "views",
    "batch size",
    "--gradient-checkpointing",
    "s per 1,000 images (range)",
    "memory, GB",
    "GPU memory, 16-mixed, computed, GB",
)


def measure(backbone: str, size: int, views: int, batch: int, again: bool, device: str, steps: int) -> dict[str, float]:
    """Return seconds per 1,000 images (`seconds`, `low`, `high`), GB (`gigabytes`, `computed`) and `parameters`."""
    import torch

    from ear_teacher_cli import EarTeacherLightningModule, platform
    from ear_teacher_cli.config import TrainConfig
    from ear_teacher_cli.training.step_trial import one_step, trial_batch

    platform.reuse_freed_memory()  # as `earteach train` does
    objective = {} if views == 2 else {"contrastive_weight": 0.0}  # contrastive learning needs two views
    precision = "16-mixed" if device == "cuda" else "32-true"
    config = TrainConfig(
        backbone=backbone,
        image_size=size,
        views=views,
        batch_size=batch,
        gradient_checkpointing=again,
        precision=precision,
        **objective,
    )
    module = EarTeacherLightningModule(config).to(device).train()  # weights are random until they are loaded
    optimizer = torch.optim.AdamW(module.parameters())
    images = trial_batch(config, batch)
    seconds, saved = [], {}
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        one_step(module, images, 512)
    optimizer.zero_grad()
    trained, frozen = (
        sum(p.numel() for p in module.parameters() if p.requires_grad is learns) for learns in (True, False)
    )
    for _ in range(steps + 1):
        start = time.perf_counter()
        one_step(module, images, 512)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    gigabytes = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else platform.peak_memory() / 1e9
    per_thousand = [1000 * value / batch for value in seconds[1:]]
    return {
        "seconds": statistics.median(per_thousand),
        "low": min(per_thousand),
        "high": max(per_thousand),
        "gigabytes": gigabytes,
        "computed": (16 * trained + 4 * frozen + sum(saved.values()) / 2) / 1e9,
        "parameters": sum(p.numel() for p in module.model.backbone.parameters()),
    }


def main() -> None:
    """Measure every row in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", help="measure the rows of this backbone only")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(*json.loads(args.row), args.device, args.steps)))
        return
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for row in ROWS:
        if args.only and row[0] != args.only:
            continue
        arguments = ["--device", args.device, "--steps", str(args.steps), "--row", json.dumps(row)]
        done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        backbone, size, views, batch, again = row
        # with checkpointing the peak is in the backward pass, which computes a stage again: not what autograd kept
        computed = "–" if again else f"{found['computed']:.1f}"
        print(
            f"| `{backbone}` | {found['parameters'] / 1e6:.1f} | {size} | {views} | {batch} | {'on' if again else 'off'} "
            f"| {found['seconds']:.0f} ({found['low']:.0f}-{found['high']:.0f}) | {found['gigabytes']:.1f} | {computed} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
