"""The callback for Hugging Face's Trainer, and its own clipping under install()."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from frameworks import MAX_NORM, OF_ACCELERATE, assert_same, counted
from torch import Tensor

import torchclip
from torchclip.history import History, Record
from torchclip.integrations import transformers as for_transformers
from torchclip.integrations.loggers import DictLogger

# The frameworks' warnings depend on their versions and on the machine.
pytestmark = pytest.mark.filterwarnings("ignore")


TEXT = torch.arange(32).reshape(8, 4) % 16


def language_model() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=16, n_positions=4, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def trainer_of(
    tmp_path: Path, *callbacks: transformers.TrainerCallback, **options: Any
) -> transformers.Trainer:
    """A tiny language model that is trained for six steps."""
    settings: dict[str, Any] = {"max_steps": 6, "max_grad_norm": 0.0, "save_strategy": "no"} | options
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    examples = [{"input_ids": row, "labels": row} for row in TEXT]
    return transformers.Trainer(language_model(), arguments, train_dataset=examples, callbacks=[*callbacks])


def train(*arguments: Any, resume: str | None = None, **options: Any) -> transformers.Trainer:
    trainer = trainer_of(*arguments, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights_of(trainer: transformers.Trainer) -> dict[str, Tensor]:
    assert trainer.model is not None
    return trainer.model.state_dict()


def history_of(callback: for_transformers.ClipperCallback) -> History:
    assert callback.clipper is not None
    return callback.clipper.history


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_the_transformers_callback_clips_as_the_trainer_would(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    plain = train(tmp_path, max_grad_norm=MAX_NORM, **options)
    with counted(*OF_ACCELERATE) as norms:
        installed = train(tmp_path, max_grad_norm=MAX_NORM, **options)
    callback = for_transformers.ClipperCallback(MAX_NORM)
    clipped = train(tmp_path, callback, **options)
    assert len(norms) == len(history_of(callback)) == 6
    assert any(record.clipped for record in history_of(callback))
    np.testing.assert_allclose([r.total_norm for r in history_of(callback)], norms, rtol=1e-4)
    assert_same(weights_of(installed), weights_of(plain), rtol=1e-4, atol=1e-5)
    assert_same(weights_of(clipped), weights_of(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", ["skip_above", "skip_loss_above"])
def test_the_transformers_callback_takes_all_options_of_a_clipper(limit: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {limit: 0.0, "max_skips": 2, "layers_every": 1, "updates": True}
    callback = for_transformers.ClipperCallback(MAX_NORM, **options)
    with pytest.warns(UserWarning, match="max_skips"):
        train(tmp_path, callback)
    history = history_of(callback)
    assert [record.skipped for record in history] == [True, True, False] * 2
    assert history.layers.steps == [*range(6)]
    assert [each.step for each in history.layers.updates["transformer.ln_f.weight"]] == [2, 5]
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'max_skip'"):
        for_transformers.ClipperCallback(MAX_NORM, max_skip=2)


def test_the_transformers_callback_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Record] = []
    callback = for_transformers.ClipperCallback(MAX_NORM, on_clip=seen.append)
    log = train(tmp_path, callback).state.log_history
    records = list(history_of(callback))
    assert seen == records
    assert [entry["clip/total_norm"] for entry in log if "loss" in entry] == [r.total_norm for r in records]
    assert log[-2]["clip/clipped_norm"] == records[-1].clipped_norm
    assert log[-2]["clip/max_norm"] == MAX_NORM
    assert log[-2]["clip/clipped_share"] == sum(r.clipped for r in records) / 6
    assert "clip/total_norm" not in log[-1]  # the summary of the run
    assert capsys.readouterr().out.count("clip/total_norm") == 6


def test_the_trainers_checkpoints_carry_the_clipper(tmp_path: Path) -> None:
    def callback() -> for_transformers.ClipperCallback:
        return for_transformers.ClipperCallback(torchclip.ZScore(warmup=2))

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    expected, found = callback(), callback()
    whole = train(tmp_path, expected, **options)
    resumed = train(tmp_path, found, resume=str(tmp_path / "checkpoint-3"), **options)
    assert_same(weights_of(resumed), weights_of(whole), rtol=0, atol=0)
    assert list(history_of(found)) == list(history_of(expected))


def test_a_checkpoint_from_before_the_transformers_callback(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path, **options)
    callback = for_transformers.ClipperCallback(MAX_NORM)
    train(tmp_path, callback, resume=str(tmp_path / "checkpoint-3"), **options)
    assert len(history_of(callback)) == 3


class Interrupt(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def interrupted(tmp_path: Path, callback: transformers.TrainerCallback) -> transformers.Trainer:
    """A trainer that was interrupted after two steps."""
    interrupt = Interrupt()
    trainer = trainer_of(tmp_path, callback, interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupt)
    return trainer


def test_training_again_starts_anew_also_after_an_interruption(tmp_path: Path) -> None:
    callback = for_transformers.ClipperCallback(MAX_NORM)
    trainer = interrupted(tmp_path, callback)
    for _ in range(2):
        trainer.train()
        assert [record.step for record in history_of(callback)] == list(range(6))


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"restore_callback_states_from_checkpoint": True}, "restore_"),
    ],
)
def test_the_transformers_callback_refuses_what_does_not_go_with_it(
    tmp_path: Path, options: dict[str, Any], argument: str
) -> None:
    with pytest.raises(ValueError, match=argument):
        train(tmp_path, for_transformers.ClipperCallback(MAX_NORM), **options)


class Spoiling(transformers.TrainerCallback):
    """Reads the gradients right before the optimizer's step, and changes one during the backward pass."""

    def __init__(self) -> None:
        self.finite: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        def spoil(grad: Tensor) -> Tensor:
            return grad.index_fill(0, torch.tensor(0), math.inf if state.global_step == 2 else 1.0)

        model.transformer.wpe.weight.register_hook(spoil)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.finite.append(sum(int(p.grad.isfinite().sum()) for p in model.parameters()))


def test_the_trainer_leaves_the_gradients_as_backward_left_them(tmp_path: Path) -> None:
    """The clipper sets infinite elements to 0, and they have not spread before."""
    spoiling = Spoiling()
    callback = for_transformers.ClipperCallback(MAX_NORM, nonfinite="zero")
    trainer = train(tmp_path, callback, spoiling)
    elements = sum(p.numel() for p in weights_of(trainer).values())
    assert spoiling.finite[2] >= elements / 2
    assert spoiling.finite[1] - spoiling.finite[2] == 8
    assert [record.nonfinite for record in history_of(callback)] == [False, False, True, False, False, False]
    assert all(tensor.isfinite().all() for tensor in weights_of(trainer).values())


def test_the_error_blames_the_parameter_that_is_to_blame(tmp_path: Path) -> None:
    callback = for_transformers.ClipperCallback(MAX_NORM, nonfinite="error")
    with pytest.raises(
        RuntimeError, match=r"Non-finite: '?transformer\.wpe\.weight'? of shape \(4, 8\) \(8 inf, 0 nan\)\.$"
    ):
        train(tmp_path, callback, Spoiling())


def grad_norms(trainer: transformers.Trainer) -> list[float]:
    return [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_the_logged_norm_takes_no_pass_of_its_own(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = grad_norms(train(tmp_path, max_grad_norm=MAX_NORM, **options))
    for name in ("clip_grad_norm_", "get_total_norm"):  # torch's, to be left alone
        monkeypatch.delattr(torch.nn.utils, name)
    callback = for_transformers.ClipperCallback(MAX_NORM)
    trainer = train(tmp_path, callback, **options)
    assert grad_norms(trainer) == [record.total_norm for record in history_of(callback)]
    np.testing.assert_allclose(grad_norms(trainer), expected, rtol=1e-4)
    assert "clip_grad_norm_" not in vars(trainer.accelerator)


def test_the_logged_norm_is_of_the_whole_model_whatever_the_clipper_measures(tmp_path: Path) -> None:
    """Neither the largest element nor the norm of a part is the norm that the Trainer logs."""
    callback = for_transformers.ClipperCallback(MAX_NORM, norm_type="inf")
    trainer = train(tmp_path, callback)
    first, *_ = grad_norms(train(tmp_path))
    assert grad_norms(trainer)[0] == pytest.approx(first, rel=1e-6)
    trainer = trainer_of(tmp_path, for_transformers.ClipperCallback(MAX_NORM))
    model: Any = trainer.model
    trainer.optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    trainer.train()
    assert grad_norms(trainer)[0] == pytest.approx(first, rel=1e-6)


def test_a_trainer_measures_itself_again_without_the_callback(tmp_path: Path) -> None:
    callback = for_transformers.ClipperCallback(MAX_NORM)
    trainer = interrupted(tmp_path, callback)
    trainer.remove_callback(callback)
    trainer.train()
    assert all(map(math.isfinite, grad_norms(trainer)))


def test_the_clipped_share_goes_on_when_training_is_resumed(tmp_path: Path) -> None:
    """It clips before the checkpoint and not after it, so the share falls step by step."""

    def threshold(step: int) -> float:
        return 1e-6 if step < 3 else math.inf

    def shares(log: list[dict[str, float]]) -> list[float]:
        return [entry["clip/clipped_share"] for entry in log if "clip/clipped_share" in entry]

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path, for_transformers.ClipperCallback(threshold), **options)
    logged: list[dict[str, float]] = []
    callback = for_transformers.ClipperCallback(threshold, on_clip=DictLogger(logged.append))
    resumed = train(tmp_path, callback, resume=str(tmp_path / "checkpoint-3"), **options)
    assert shares(resumed.state.log_history) == [1.0, 1.0, 1.0, 3 / 4, 3 / 5, 3 / 6]
    assert shares(logged) == [3 / 4, 3 / 5, 3 / 6]
