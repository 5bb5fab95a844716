"""A language model reads Python's own documentation, character by character, and its gradients explode.

python examples/char_rnn.py --model rnn
torchclip run --try none --plot char_rnn.png examples/char_rnn.py

There is no torchclip in this file: it is an ordinary training loop, which calls torch's clip_grad_norm_.
The second command trains with clipping, as the file says, and without, and plots both losses.
"""

import argparse
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, TIME = 32, 64  # the number of texts that are read together, and of their characters in a step
HIDDEN, EMBEDDING = 128, 32
# A learning rate that is as high as clipping allows, and the threshold.
DEFAULTS = {"rnn": (3.0, 0.5), "lstm": (30.0, 0.25), "transformer": (0.01, 1.0)}
State = Tensor | tuple[Tensor, Tensor] | None  # an LSTM has two tensors; None before the first character


class Recurrent(nn.Module):
    """Reads characters, and returns a score for every character that may come next."""

    def __init__(self, kind: str, vocabulary: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.recurrent = {"rnn": nn.RNN, "lstm": nn.LSTM}[kind](EMBEDDING, hidden, batch_first=True)
        self.output = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor, state: State = None) -> tuple[Tensor, State]:
        states, state = self.recurrent(self.embedding(tokens), state)
        return self.output(states), state


class Transformer(nn.Module):
    """The same with attention: two layers, which see all characters of a call and keep no state."""

    def __init__(self, vocabulary: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        layer = nn.TransformerEncoderLayer(
            hidden, nhead=4, dim_feedforward=4 * hidden, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(hidden)
        self.output = nn.Linear(hidden, vocabulary)
        angles = torch.outer(torch.arange(TIME), torch.logspace(0, -4, hidden // 2))
        self.positions = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)

    def forward(self, tokens: Tensor, state: State = None) -> tuple[Tensor, State]:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.embedding(tokens) + self.positions[:length]
        return self.output(self.norm(self.layers(hidden, mask=mask, is_causal=True))), None


def new_model(kind: str, vocabulary: int, hidden: int = HIDDEN) -> nn.Module:
    return Transformer(vocabulary, hidden) if kind == "transformer" else Recurrent(kind, vocabulary, hidden)


def read() -> tuple[Tensor, str]:
    """The text as numbers, and the character of each number."""
    text = "\n".join(topics[name] for name in sorted(topics))
    vocabulary = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(vocabulary)}
    return torch.tensor([number[character] for character in text]), vocabulary


def batches(tokens: Tensor, steps: int, batch: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of the text, and the same windows one character later, which are the targets.

    Each window begins where the last one ended, so that the network can keep its state.
    """
    length = len(tokens) // batch
    texts = tokens[: batch * length].view(batch, length)
    for step in range(steps):
        start = step * TIME % (length - TIME)
        yield texts[:, start : start + TIME], texts[:, start + 1 : start + TIME + 1]


def detached(state: State) -> State:
    """The state without its graph: gradients flow back through one window only."""
    if isinstance(state, tuple):
        return state[0].detach(), state[1].detach()
    return None if state is None else state.detach()


@torch.no_grad()
def write(model: nn.Module, vocabulary: str, length: int) -> str:
    """Text that the model writes.  Before each new character it reads its last ones again."""
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(length):
        scores, _ = model(tokens[:, -TIME:])
        tokens = torch.cat([tokens, scores[:, -1].softmax(-1).multinomial(1)], dim=1)
    return "".join(vocabulary[token] for token in tokens[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=DEFAULTS, default="rnn")
    parser.add_argument("--max-norm", type=float, help="inf for no clipping")
    parser.add_argument("--lr", type=float, help="the learning rate")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lr, max_norm = DEFAULTS[arguments.model]
    if arguments.lr is not None:
        lr = arguments.lr
    if arguments.max_norm is not None:
        max_norm = arguments.max_norm

    torch.set_num_threads(1)  # enough for a small model, and the same numbers on any machine
    torch.manual_seed(arguments.seed)
    tokens, vocabulary = read()
    model = new_model(arguments.model, len(vocabulary))
    kind = torch.optim.AdamW if arguments.model == "transformer" else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=lr)

    state, losses = None, []
    for inputs, targets in batches(tokens, arguments.steps):
        scores, state = model(inputs, detached(state))
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()

        losses.append(loss.item())
        if len(losses) % 50 == 0:
            print(f"step {len(losses)}: loss {sum(losses[-20:]) / 20:.2f}")
    print(write(model, vocabulary, 300))


if __name__ == "__main__":
    main()
