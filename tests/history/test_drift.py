"""Which norms drift: a trend after the start of a run that chance does not explain."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchclip import Clipper
from torchclip.history import Advice, History
from torchclip.reference import Array

SEEDS = 25
Noise = Callable[[np.random.Generator, int], Array]


def advice_on(norms: Array) -> Advice:
    history = History(100_000)
    for step, norm in enumerate(norms.tolist()):
        history.append(step, norm, math.inf, 1.0)
    return history.suggest()


def drifting(make: Callable[[np.random.Generator, int], Array], steps: int) -> int:
    """How many of the runs drift, from the logarithms of their norms."""
    return sum(advice_on(np.exp(make(np.random.default_rng(seed), steps))).drifts for seed in range(SEEDS))


def returning(memory: float, deviation: float) -> Noise:
    """A random walk that returns to its mean."""

    def make(rng: np.random.Generator, steps: int) -> Array:
        found = [rng.normal(scale=deviation)]
        for change in rng.normal(scale=deviation * math.sqrt(1 - memory**2), size=steps - 1):
            found.append(memory * found[-1] + change)
        return np.array(found)

    return make


CHANCE: dict[str, Noise] = {
    "calm": lambda rng, steps: rng.normal(scale=0.3, size=steps),
    "wide": lambda rng, steps: rng.normal(scale=0.8, size=steps),
    "heavy tails": lambda rng, steps: 0.4 * rng.standard_t(2, size=steps),
    "short memory": returning(0.5, 0.5),
    "long memory": returning(0.9, 0.5),
}


@pytest.mark.parametrize("steps", [100, 200, 1000])
@pytest.mark.parametrize("noise", CHANCE.values(), ids=CHANCE)
def test_chance_is_no_drift(noise: Noise, steps: int) -> None:
    assert drifting(noise, steps) <= 1


@pytest.mark.parametrize("memory", [0.95, 0.98, 0.99])
@pytest.mark.parametrize("steps", [100, 300, 1000])
def test_a_walk_that_returns_slowly_is_seldom_taken_for_a_drift(memory: float, steps: int) -> None:
    """In a hundred steps it hardly returns, and looks like a drift."""
    assert drifting(returning(memory, 0.5), steps) <= 2


STARTS: dict[str, Callable[[Array], Array]] = {
    "falls within a tenth": lambda at: np.log(1 + 4 * np.exp(-at / (0.1 * len(at)))),
    "falls far and early": lambda at: np.log(1 + 8 * np.exp(-at / (0.05 * len(at)))),
    "falls ever more slowly": lambda at: -0.3 * np.log1p(at),
    "falls until three tenths": lambda at: -np.log1p(np.minimum(at, 0.3 * len(at)) / (0.03 * len(at))),
    "warms up": lambda at: np.log(np.minimum((at + 1) / (0.1 * len(at)), 1)),
}


@pytest.mark.parametrize("steps", [100, 200, 1000])
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_the_start_is_no_drift(start: Callable[[Array], Array], steps: int) -> None:
    def norms(rng: np.random.Generator, steps: int) -> Array:
        return start(np.arange(steps)) + rng.normal(scale=0.25, size=steps)

    assert drifting(norms, steps) <= 1


@pytest.mark.parametrize(("steps", "ratio"), [(1000, 2.0), (1000, 0.5), (100, 12.0), (100, 1 / 12)])
def test_a_small_change_does_not_matter_nor_one_as_training_begins(steps: int, ratio: float) -> None:
    """Of 100 steps the second half counts, in which a change to 12 times is one to 2.5 times."""

    def norms(rng: np.random.Generator, steps: int) -> Array:
        return np.linspace(0, math.log(ratio), steps) + rng.normal(scale=0.1, size=steps)

    assert drifting(norms, steps) <= 1


@pytest.mark.parametrize("ratio", [4.0, 0.25, 10.0, 0.1])
@pytest.mark.parametrize(("steps", "deviation"), [(300, 0.2), (1000, 0.3), (1000, 0.5)])
def test_a_trend_is_a_drift(ratio: float, steps: int, deviation: float) -> None:
    def norms(rng: np.random.Generator, steps: int) -> Array:
        return np.linspace(0, math.log(ratio), steps) + rng.normal(scale=deviation, size=steps)

    assert drifting(norms, steps) >= SEEDS - 1


def test_a_large_trend_is_seen_in_a_short_run() -> None:
    def norms(rng: np.random.Generator, steps: int) -> Array:
        return np.linspace(0, math.log(10), steps) + rng.normal(scale=0.3, size=steps)

    assert drifting(norms, 200) >= 0.8 * SEEDS


# A transformer that begins to learn, as in nanoGPT

WIDTH, HEADS, CONTEXT, VOCABULARY = 32, 4, 32, 32


class Block(nn.Module):
    """Attention and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.inputs, self.outputs = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.forward_part = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inputs(self.norms[0](x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.outputs(attended.transpose(1, 2).flatten(-2))
        found: Tensor = x + self.forward_part(self.norms[1](x))
        return found


class Transformer(nn.Module):
    """A small language model."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block(), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.blocks(self.tokens(tokens) + self.positions.weight))
        return found


def text(generator: torch.Generator) -> Tensor:
    """Words of a small language, in an order like that of words in a text: frequent ones most often."""
    words = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in [2, 3, 4, 5] * 15]
    frequency = 1 / torch.arange(1, len(words) + 1)
    chosen = torch.multinomial(frequency, 4000, replacement=True, generator=generator)
    return torch.cat([F.pad(words[i], (0, 1)) for i in chosen.tolist()])  # 0 is the space


@pytest.mark.parametrize("max_norm", [math.inf, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_a_hundred_steps_of_a_transformer_are_not_told_to_drift(seed: int, max_norm: float) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens, model = text(generator), Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    clipper = Clipper(optimizer, max_norm)
    for _ in range(100):
        starts = torch.randint(len(tokens) - CONTEXT - 1, (8, 1), generator=generator)
        batch = tokens[starts + torch.arange(CONTEXT + 1)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        clipper.loss = loss
        optimizer.step()
    advice = clipper.history.suggest()
    assert not advice.drifts
    assert "Percentile" not in str(advice)
    assert (advice.explodes, advice.verdict) == (None, None if max_norm == math.inf else "keep")
