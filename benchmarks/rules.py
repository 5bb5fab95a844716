"""Pictures of the other rules: how their limits change what the RNN learns, and a tracked threshold.

    pip install '.[demo]'
    python benchmarks/rules.py --limits FILE.png
    python benchmarks/rules.py --quantiles FILE.png

The first trains the RNN of ``examples/char_rnn.py`` with each rule, at limits from too low to too high.  The
second trains a classifier with ``clip_per_example`` and a ``QuantileTracker``.  It takes a minute or two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from language_model import batches, in_parallel, new_model, optimizer_of, perplexity_of, shown, train
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import torchclip
from torchclip.cli.options import picture_file

Clip = Callable[[list[nn.Parameter], float], object]

RULES: dict[str, tuple[str, Clip, Sequence[float]]] = {
    "clip_grad_norm_": ("max_norm", torchclip.clip_grad_norm_, (0.03, 0.1, 0.25, 0.5, 1, 3, 10)),
    "BlockRMS": ("max_rms", torchclip.clip_grad_rms_, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)),
    "Value": ("clip_value", torchclip.clip_grad_value_, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)),
    "Adaptive": ("clip_factor", torchclip.clip_grad_adaptive_, (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1)),
}
SEEDS = range(3)


def perplexity_with(run: tuple[str, float, int]) -> float:
    """Train the RNN once with a rule, a limit and a seed."""
    name, limit, seed = run
    _, clip, _ = RULES[name]
    model = new_model("rnn", seed)
    parameters, head = list(model.parameters()), list(model.output.parameters())  # type: ignore[union-attr]
    if name == "Adaptive":  # which does not clip the last layer
        parameters = parameters[: -len(head)]
    losses = []
    for loss in train(model, [optimizer_of("rnn", model, 3.0)], batches(250)):
        clip(parameters, limit)
        losses.append(loss.item())
    return perplexity_of(losses)


def limits_figure(path: Path) -> None:
    """The final perplexity against the limit, with a panel for each rule and a dot for each run."""
    runs = [
        (name, limit, seed) for name, (_, _, limits) in RULES.items() for limit in limits for seed in SEEDS
    ]
    found = dict(zip(runs, in_parallel(perplexity_with, runs), strict=True))
    figure = Figure((10, 3.6), layout="constrained")
    panels = figure.subplots(1, len(RULES), sharey=True)
    most = 100.0
    for axes, (name, (argument, _, limits)) in zip(panels, RULES.items(), strict=True):
        for limit in limits:
            perplexities = [min(found[name, limit, seed], most) for seed in SEEDS]
            axes.plot([limit] * len(SEEDS), perplexities, "o", color="C1", alpha=0.6, clip_on=False)
        medians = [sorted(min(found[name, limit, seed], most) for seed in SEEDS)[1] for limit in limits]
        axes.plot(limits, medians, color="C1")
        axes.set(title=name, xlabel=argument, xscale="log", yscale="log", ylim=(4, most))
        axes.set_yticks([5, 10, 20, 50, most], ["5", "10", "20", "50", f"{most:.0f} and more"])
        axes.minorticks_off()
        best = min(limits, key=lambda limit: max(found[name, limit, seed] for seed in SEEDS))
        worst = max(found[name, best, seed] for seed in SEEDS)
        print(f"{name}: best limit {best:g}, worst of {len(SEEDS)} runs there {shown(worst)}")
    panels[0].set_ylabel("final perplexity")
    figure.savefig(path)


def quantiles_figure(path: Path) -> None:
    """The tracked threshold and the quantile that it should find, over the training steps."""
    figure = Figure((8, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="norm of an example's gradient", yscale="log")
    for quantile, color in ((0.9, "C0"), (0.5, "C1"), (0.1, "C2")):
        tracked, true = track_quantile(quantile)
        axes.plot(tracked, color=color, label=f"QuantileTracker({quantile})")
        axes.plot(true, color=color, linewidth=0.6, alpha=0.5)
    axes.plot([], [], color="gray", linewidth=0.6, label="the batch's own quantile")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path)


def track_quantile(quantile: float) -> tuple[list[float], list[float]]:
    """Train a classifier: the threshold at each step, and the quantile of its batch's norms."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(20, 4, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tracker = torchclip.QuantileTracker(quantile)
    parameters: dict[str, Tensor] = dict(model.named_parameters())

    def loss_of_one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (x[None],)), y[None])

    tracked, true = [], []
    for _ in range(300):
        inputs = torch.randn(128, 20, generator=generator)
        targets = (inputs @ weights).argmax(dim=1)
        grads = vmap(grad(loss_of_one), in_dims=(None, 0, 0))(parameters, inputs, targets)
        norms = torch.cat([g.flatten(1) for g in grads.values()], dim=1).norm(dim=1)
        tracked.append(tracker.max_norm)
        true.append(norms.quantile(quantile).item())
        sums, clipped = torchclip.clip_per_example(list(grads.values()), tracker.max_norm)
        for parameter, total in zip(parameters.values(), sums, strict=True):
            parameter.grad = total / len(inputs)
        optimizer.step()
        tracker.update(1 - clipped / len(inputs))
    return tracked, true


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limits", type=picture_file, metavar="FILE", help="what the rules' limits do")
    parser.add_argument("--quantiles", type=picture_file, metavar="FILE", help="a threshold that is tracked")
    arguments = parser.parse_args()
    if arguments.limits is None and arguments.quantiles is None:
        parser.error("name a picture to draw: --limits FILE or --quantiles FILE")
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")
    if arguments.limits is not None:
        limits_figure(arguments.limits)
    if arguments.quantiles is not None:
        quantiles_figure(arguments.quantiles)


if __name__ == "__main__":
    main()
