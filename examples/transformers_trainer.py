"""Hugging Face Trainer: a callback clips instead of the Trainer.

pip install '.[transformers]'
python examples/transformers_trainer.py
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from torchclip.integrations.transformers import ClipperCallback

set_seed(0)
config = GPT2Config(
    vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
)
model = GPT2LMHeadModel(config)
starts = torch.randint(64, (256, 1))
sequences = (starts + 3 * torch.arange(32)) % 64  # counts in threes

clipping = ClipperCallback(max_norm=0.7)
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        max_grad_norm=0.0,  # by default the Trainer itself clips at 1.0
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=[{"input_ids": row, "labels": row} for row in sequences],
    callbacks=[clipping],
)
trainer.train()  # logs clip/total_norm, clip/clipped_norm and others with the loss

if clipping.clipper is not None:  # made when training begins
    print(clipping.clipper.history.summary())
