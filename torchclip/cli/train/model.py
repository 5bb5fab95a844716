"""The language model of ``torchclip train``: its layers, how it writes text, how it is saved and loaded.

Load and use a model that ``--save`` wrote:

    from torchclip.cli.train.model import load_model, sample

    model, vocabulary = load_model("model.pt")
    print(sample(model, vocabulary, length=500, seed=1))
"""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torchclip.cli.options import writing
from torchclip.cli.train.options import Options

EMBEDDING = 32
CONTEXT = 64  # how many characters a transformer looks back when it writes

State: TypeAlias = Tensor | tuple[Tensor, Tensor] | None  # an LSTM's has two parts; None at the beginning
Weights: TypeAlias = dict[str, Any]  # what a module's state_dict() returns


class Model(nn.Module):
    """A recurrent network that reads characters and returns a score for every possible next character."""

    def __init__(self, cell: str, vocabulary_size: int, hidden: int) -> None:
        super().__init__()
        recurrent = {"rnn": nn.RNN, "lstm": nn.LSTM}[cell]
        self.embedding = nn.Embedding(vocabulary_size, EMBEDDING)
        self.recurrent = recurrent(EMBEDDING, hidden, batch_first=True)
        self.output = nn.Linear(hidden, vocabulary_size)

    def forward(self, tokens: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Continue from a state.

        Args:
            tokens: int64, of shape ``(batch, time)``.
            state: the state that the last call returned.

        Returns:
            scores of shape ``(batch, time, vocabulary_size)``, and the new state.
        """
        hidden, state = self.recurrent(self.embedding(tokens), state)
        return self.output(hidden), state


class Transformer(nn.Module):
    """The same with attention: two layers that see all characters of a call."""

    def __init__(self, vocabulary_size: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, hidden)
        layer = nn.TransformerEncoderLayer(
            hidden, nhead=4, dim_feedforward=4 * hidden, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(hidden)
        self.output = nn.Linear(hidden, vocabulary_size)

    def forward(self, tokens: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Continue from a state, as ``Model`` does.

        The state is the text before, at most ``CONTEXT`` characters.  Only ``model.eval()`` uses it; in
        training each window starts without a past.
        """
        before = state if isinstance(state, Tensor) and not self.training else tokens[:, :0]
        seen = torch.cat([before, tokens], dim=1)
        length = seen.shape[1]
        hidden = self.embedding(seen) + _positions(length, self.embedding.embedding_dim)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        scores: Tensor = self.output(self.norm(self.layers(hidden, mask=mask, is_causal=True)))
        return scores[:, before.shape[1] :], seen[:, -CONTEXT:]


def _positions(length: int, size: int) -> Tensor:
    """Waves of different lengths that give each position its own code, of shape ``(length, size)``."""
    angles = torch.outer(torch.arange(length), torch.logspace(0, -4, (size + 1) // 2))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :size]


def new_model(cell: str, vocabulary_size: int, hidden: int) -> nn.Module:
    """A model with random weights."""
    if cell == "transformer":
        return Transformer(vocabulary_size, hidden)
    return Model(cell, vocabulary_size, hidden)


def detached(state: State) -> State:
    """The state without its graph: this truncates backpropagation through time."""
    if isinstance(state, tuple):
        return state[0].detach(), state[1].detach()
    return None if state is None else state.detach()


@torch.no_grad()
def sample(model: nn.Module, vocabulary: str, length: int, seed: int) -> str | None:
    """Text that the model writes, or None if its scores are not finite.  Puts the model into ``eval()``."""
    model.eval()  # only then does a transformer use its state
    generator = torch.Generator().manual_seed(seed)
    token = torch.zeros(1, 1, dtype=torch.int64)  # in most texts, the line break
    state, text = None, ""
    for _ in range(length):
        scores, state = model(token, state)
        if not scores.isfinite().all():
            return None
        token = scores[:, -1].softmax(-1).multinomial(1, generator=generator)
        text += vocabulary[int(token)]
    return text


def model_of(weights: Weights, vocabulary: str, cell: str, hidden: int) -> nn.Module:
    """A model with these weights."""
    model = new_model(cell, len(vocabulary), hidden)
    model.load_state_dict(weights)
    return model


def save_model(path: Path, weights: Weights, vocabulary: str, options: Options) -> None:
    """Save a model's weights, and what ``load_model`` needs to build it again."""
    stored = io.BytesIO()  # torch.save does not say which file it could not write
    torch.save({"model": weights, "vocabulary": vocabulary, "options": asdict(options)}, stored)
    with writing(path):
        path.write_bytes(stored.getbuffer())


def load_model(path: str | Path) -> tuple[nn.Module, str]:
    """The model in a file that ``torchclip train --save`` wrote, and its vocabulary."""
    stored = torch.load(path, weights_only=True)
    vocabulary, options = stored["vocabulary"], stored["options"]
    return model_of(stored["model"], vocabulary, options["cell"], options["hidden"]), vocabulary
