"""The shapes of the gradients of real models, and series of sizes that show how costs grow.

For small models the cost of clipping depends on the number of tensors, for large models on memory traffic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["SCALING", "WORKLOADS", "Shapes", "Workload"]

Shapes = list[tuple[int, ...]]


class Workload(NamedTuple):
    """The shapes of a model's gradients, in the order of its parameters."""

    title: str
    shapes: Shapes
    dtype: torch.dtype = torch.float32

    @property
    def elements(self) -> int:
        """The number of elements of all gradients together."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def bytes(self) -> int:
        """Their size in memory."""
        return self.elements * self.dtype.itemsize


def _ppo_policy(observations: int = 3, actions: int = 1, hidden: int = 64) -> Shapes:
    """Stable-Baselines3's ``MlpPolicy`` on Pendulum-v1: a log standard deviation, two hidden layers each for
    actor and critic, and a last layer for each.

    CartPole's actions are discrete and have no standard deviation, so its policy has 12 tensors.
    """
    layers: Shapes = [(hidden, observations), (hidden,), (hidden, hidden), (hidden,)]
    return [(actions,), *layers, *layers, (actions, hidden), (actions,), (1, hidden), (1,)]


def _book_language_model(vocabulary: int = 1000, wordvec: int = 100, hidden: int = 100) -> Shapes:
    """The book's ``Rnnlm``: an embedding, one LSTM layer, an affine layer."""
    return [
        (vocabulary, wordvec),
        *[(wordvec, 4 * hidden), (hidden, 4 * hidden), (4 * hidden,)],
        *[(hidden, vocabulary), (vocabulary,)],
    ]


def _resnet50() -> Shapes:
    """torchvision's ``resnet50``: each convolution is followed by the weight and bias of a batch norm."""

    def convolution(outputs: int, inputs: int, size: int) -> Shapes:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]

    shapes = convolution(64, 3, 7)
    inputs = 64
    for width, blocks in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        for block in range(blocks):
            shapes += convolution(width, inputs, 1) + convolution(width, width, 3)
            shapes += convolution(4 * width, width, 1)
            if block == 0:
                shapes += convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def _gpt2(vocabulary: int = 50257, context: int = 1024, width: int = 768, layers: int = 12) -> Shapes:
    """GPT-2 small: two embeddings, twelve blocks, a last layer norm; the output layer is the embedding."""
    norm: Shapes = [(width,), (width,)]
    attention: Shapes = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    perceptron: Shapes = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    block = norm + attention + norm + perceptron
    return [(vocabulary, width), (context, width), *(block * layers), *norm]


WORKLOADS = {
    "two-3x3": Workload("two 3×3 (the book)", [(3, 3), (3, 3)]),
    "ppo": Workload("PPO policy, tanh MLP 64-64", _ppo_policy()),
    "rnnlm": Workload("the book's RNN language model", _book_language_model()),
    "1000x64": Workload("1,000 gradients of 64", [(64,)] * 1000),
    "resnet50": Workload("ResNet-50", _resnet50()),
    "gpt2": Workload("GPT-2 small", _gpt2()),
    "gpt2-bfloat16": Workload("GPT-2 small in bfloat16", _gpt2(), torch.bfloat16),
}

SCALING = {
    **{
        f"{n}-tensors": Workload(f"{n:,} gradients of 64", [(64,)] * n)
        for n in (10, 100, 1000, 10_000, 100_000)
    },
    **{
        f"{2**k}-bytes": Workload(f"one gradient of {2**k:,} bytes", [(2**k // 4,)]) for k in range(10, 32, 3)
    },
}
