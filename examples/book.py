"""Why gradients explode, and how clipping helps: the experiments of a chapter, in NumPy and in torchclip.

pip install .
python examples/book.py [--plot chapter.png]

The chapter is 6.1 of "Deep Learning from Scratch 2".  docs/chapter.md explains what this prints.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

import torchclip

Array = NDArray[np.float64]
BATCH, HIDDEN, STEPS, MAX_NORM = 2, 3, 20, 5.0


def clip_grads(grads: Sequence[Array], max_norm: float) -> float:
    """The book's function: all gradients are one long vector, which is shortened to ``max_norm``."""
    norm = np.sqrt(sum(float((grad**2).sum()) for grad in grads))
    rate = max_norm / (norm + 1e-6)
    if rate < 1:
        for grad in grads:
            grad *= rate
    return float(norm)


def clip_with_torchclip(grads: Sequence[Array], max_norm: float) -> float:
    """The same with torch: the gradients belong to parameters."""
    parameters = [torch.nn.Parameter(torch.zeros(grad.shape, dtype=torch.float64)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = torch.from_numpy(grad)  # shares its memory, so that grad is clipped, too
    return torchclip.clip_grad_norm_(parameters, max_norm).item()


def norms_on_the_way_back(weights: Array, clip: Callable[[list[Array], float], float] | None = None) -> Array:
    """The mean norm of a gradient that goes back through the same layer once for every time step."""
    dh, norms = np.ones((BATCH, HIDDEN)), []
    for _ in range(STEPS):
        dh = dh @ weights.T
        if clip is not None:
            clip([dh], MAX_NORM)
        norms.append(np.linalg.norm(dh) / BATCH)
    return np.array(norms)


def factor(weights: Array) -> float:
    """The factor by which each late step multiplies the norm: the largest absolute eigenvalue."""
    return float(np.abs(np.linalg.eigvals(weights)).max())


def compare(grads: Sequence[Array]) -> None:
    """Clip copies with both functions, and print the results."""
    for clip in (clip_grads, clip_with_torchclip):
        copies = [grad.copy() for grad in grads]
        norm = clip(copies, MAX_NORM)
        after = clip(copies, np.inf)
        first = np.array2string(copies[0][0], precision=3)
        print(f"  {clip.__name__:<20} norm {norm:.3f}, after clipping {after:.3f}; first row {first}")


def draw(runs: Mapping[str, Array], path: str) -> None:
    """tanh with its derivative, and the norms of all runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    h = np.arange(-5.0, 5.0, 0.1)
    left.plot(h, np.tanh(h), label="tanh(h)")
    left.plot(h, 1 - np.tanh(h) ** 2, "--", label="its derivative")
    left.set(xlabel="h", title="The activation")
    for name, norms in runs.items():
        right.plot(range(1, STEPS + 1), norms, marker=".", label=name)
    right.set(xlabel="steps back in time", ylabel="mean norm", yscale="log", title="The gradient")
    right.set_xticks(range(0, STEPS + 1, 5))
    left.legend()
    right.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plot", metavar="FILE", help="draw a picture")
    arguments = parser.parse_args()
    stream = np.random.RandomState(3)
    weights = stream.randn(HIDDEN, HIDDEN)
    two, three = ([stream.rand(3, 3) * 10 for _ in range(n)] for n in (2, 3))

    runs = {
        "explodes": norms_on_the_way_back(weights),
        "vanishes, with half the weights": norms_on_the_way_back(weights / 2),
        f"clipped to {MAX_NORM:g} at each step": norms_on_the_way_back(weights, clip_with_torchclip),
    }
    print("The mean norm of a gradient on its way back through a recurrent network:")
    for name, norms in runs.items():
        print(f"  {name:<32} {norms[0]:.2f}, {norms[1]:.2f}, {norms[2]:.2f}, ... {norms[-1]:.5g}")
    whole, half = factor(weights), factor(weights / 2)
    print(f"Each step multiplies it by {whole:.2f} in the end, with half the weights by {half:.2f}.")
    for name, grads in {"Two": two, "Three": three}.items():
        print(f"{name} gradients that share a threshold of {MAX_NORM:g}:")
        compare(grads)
    if arguments.plot:
        draw(runs, arguments.plot)


if __name__ == "__main__":
    main()
