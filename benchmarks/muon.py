"""What clipping does for a Transformer that Muon and AdamW train: none, both together, or AdamW alone.

    python benchmarks/muon.py [--seeds 5] [--steps 300]

The model and the text are those of ``examples/char_rnn.py --model transformer``.  Muon trains the
matrices of the two layers, AdamW the embeddings, the biases and the output.  Every run starts from the
weights of its seed.  It prints the mean loss over the last tenth of the steps, as mean and standard deviation
over the seeds, and how many steps were clipped.
"""

from __future__ import annotations

import math
from statistics import fmean, stdev

import torch
from language_model import batches, new_model, train
from torch import nn
from turns import options_of

import torchclip
from torchclip.cli.options import count

WAYS = ("no clipping", "all together", "AdamW alone")
MUON_LRS = (0.02, 0.1)


def optimizers_of(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else."""
    within = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name}
    matrices = [p for p in model.parameters() if id(p) in within]
    others = [p for p in model.parameters() if id(p) not in within]
    assert matrices
    return [torch.optim.Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=3e-3)]


def run(way: str, seed: int, muon_lr: float, max_norm: float, steps: int) -> tuple[float, float]:
    """The final loss, and the share of steps that were clipped."""
    model = new_model("transformer", seed)
    optimizers = optimizers_of(model, muon_lr)
    if way == "AdamW alone":
        optimizers[0].param_groups[0]["max_norm"] = None
    clipper = torchclip.Clipper(optimizers, math.inf if way == "no clipping" else max_norm)
    losses = [loss.item() for loss in train(model, optimizers, batches(steps))]
    clipped = sum(record.clipped for record in clipper.history) / len(losses)
    return fmean(losses[-len(losses) // 10 :]), clipped


def main() -> None:
    """Train and print."""
    parser = options_of(__doc__)
    parser.add_argument("--seeds", type=count, default=5, metavar="N", help="runs of each way (default: 5)")
    parser.add_argument("--steps", type=count, default=300, metavar="N", help="of each run (default: 300)")
    parser.add_argument("--max-norm", type=float, default=0.5, metavar="C", help="(default: 0.5)")
    arguments = parser.parse_args()
    print("| Muon's learning rate | clipped | loss in the end | steps clipped |\n|---:|---|---:|---:|")
    for lr in MUON_LRS:
        for way in WAYS:
            ends = [
                run(way, seed, lr, arguments.max_norm, arguments.steps) for seed in range(arguments.seeds)
            ]
            losses, clipped = zip(*ends, strict=True)
            spread = stdev(losses) if len(losses) > 1 else 0.0
            print(f"| {lr} | {way} | {fmean(losses):.3f} ± {spread:.3f} | {fmean(clipped):.0%} |", flush=True)


if __name__ == "__main__":
    main()
