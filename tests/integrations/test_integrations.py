"""torchclip within the frameworks that people train with: real ones, a few steps each."""

import contextlib
import copy
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
import transformers
from accelerate import Accelerator
from helpers import last_of
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import torchclip
from torchclip.history import History, Record
from torchclip.integrations import lightning as for_lightning
from torchclip.integrations import transformers as for_transformers
from torchclip.integrations.loggers import DictLogger, Scalars
from torchclip.integrations.tensorboard import ScalarLogger

# What frameworks warn about depends on their versions and on the machine.
pytestmark = pytest.mark.filterwarnings("ignore")


MAX_NORM = 0.5


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@contextlib.contextmanager
def counted(name: str) -> Iterator[list[Any]]:
    """Torchclip installed, with the calls of one function counted."""
    calls = []
    with torchclip.installed():
        function = getattr(torch.nn.utils, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls.append(function(*args, **kwargs))
            return calls[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.utils, name, counting)
            yield calls


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerances: Any) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **tolerances)


# Stable-Baselines3 under install()


ALGORITHMS: dict[str, Callable[[], Any]] = {
    "PPO": lambda: sb3.PPO(
        "MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32, n_epochs=2, seed=0, device="cpu"
    ),
    "A2C": lambda: sb3.A2C("MlpPolicy", "CartPole-v1", seed=0, device="cpu"),
    "DQN": lambda: sb3.DQN(
        "MlpPolicy", "CartPole-v1", learning_starts=32, max_grad_norm=0.1, seed=0, device="cpu"
    ),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_stable_baselines3_trains_as_before(algorithm: str) -> None:
    steps = 128
    plain = ALGORITHMS[algorithm]().learn(steps)
    with counted("clip_grad_norm_") as norms:
        clipped = ALGORITHMS[algorithm]().learn(steps)
    assert len(norms) >= 8
    assert any(norm > clipped.max_grad_norm for norm in norms)
    assert_same(clipped.policy.state_dict(), plain.policy.state_dict())


# Accelerate


def test_a_clipper_from_before_accelerates_prepare() -> None:
    def train(clip: str) -> tuple[nn.Module, torchclip.Clipper | None]:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper = torchclip.Clipper(optimizer, MAX_NORM) if clip == "clipper" else None
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, data())
        for x, y in loader:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                accelerator.backward(F.mse_loss(model(x), y))
                if clip == "accelerator" and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
        return model, clipper

    (expected, _), (found, clipper) = train("accelerator"), train("clipper")
    assert clipper is not None
    assert clipper.history.summary().clipped == 3
    assert_same(found.state_dict(), expected.state_dict())


def test_accelerate_saves_and_loads_a_clipper(tmp_path: Path) -> None:
    """Training goes on from Accelerate's checkpoint as if it had not been interrupted."""

    def prepared() -> tuple[Accelerator, nn.Module, Any, torchclip.Clipper]:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        clipper = torchclip.Clipper(optimizer, torchclip.Percentile(30.0, warmup=2))
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(clipper)
        return accelerator, model, optimizer, clipper

    def train(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        for x, y in data():
            optimizer.zero_grad()
            accelerator.backward(F.mse_loss(model(x), y))
            optimizer.step()

    accelerator, whole, optimizer, expected = prepared()
    train(accelerator, whole, optimizer)
    accelerator.save_state(str(tmp_path / "state"))
    train(accelerator, whole, optimizer)
    accelerator, resumed, optimizer, found = prepared()
    accelerator.load_state(str(tmp_path / "state"))
    assert len(found.history) == 6
    train(accelerator, resumed, optimizer)
    assert list(found.history) == list(expected.history)
    assert_same(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_accelerates_wrapper_of_an_optimizer_is_refused() -> None:
    model = nn.Linear(4, 1)
    wrapped = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"wrapper without hooks .* pass the optimizer that it wraps"):
        torchclip.Clipper(wrapped, MAX_NORM)
    torchclip.Clipper(wrapped.optimizer, MAX_NORM)


def test_accelerate_clips_with_torchclip() -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(4, 1, bias=False))
    model.weight.grad = torch.full((1, 4), 1e20)
    accelerator.sync_gradients = True
    with counted("clip_grad_norm_") as norms:
        assert accelerator.clip_grad_norm_(model.parameters(), 1.0) == 2e20
    assert norms == [2e20]
    torch.testing.assert_close(model.weight.grad, torch.full((1, 4), 0.5))
    with counted("clip_grad_value_") as calls:
        accelerator.clip_grad_value_(model.parameters(), 0.25)
    assert len(calls) == 1
    torch.testing.assert_close(model.weight.grad, torch.full((1, 4), 0.25))


# Lightning


class Module(pl.LightningModule):
    def __init__(
        self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **options: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer, self.options = optimizer, {"lr": 0.1} | options

    def training_step(self, batch: Any, _: int) -> Any:
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), **self.options)


class TwoByHand(Module):
    """Manual optimization, an optimizer a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> Any:
        loss = super().training_step(batch, index)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


def data(batch_size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 4, generator=generator)
    return DataLoader(TensorDataset(x, 10 * x.sum(1, keepdim=True)), batch_size)


def fit(
    module: pl.LightningModule,
    tmp_path: Path,
    *callbacks: pl.Callback,
    resume: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[*callbacks],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data(), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_lightnings_own_clipping_under_install(tmp_path: Path, algorithm: str) -> None:
    options: dict[str, Any] = {"gradient_clip_val": MAX_NORM, "gradient_clip_algorithm": algorithm}
    plain, clipped = Module(), Module()
    fit(plain, tmp_path, **options)
    with counted(f"clip_grad_{algorithm}_") as calls:
        fit(clipped, tmp_path, **options)
    assert len(calls) == 6
    assert_same(clipped.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str
)
def test_the_lightning_callback_clips_as_the_trainer_would(tmp_path: Path, options: dict[str, Any]) -> None:
    plain, clipped = Module(), Module()
    fit(plain, tmp_path, gradient_clip_val=MAX_NORM, **options)
    callback = for_lightning.ClipperCallback(MAX_NORM)
    fit(clipped, tmp_path, callback, **options)
    (clipper,) = callback.clippers
    assert len(clipper.history) == 6 // options.get("accumulate_grad_batches", 1)
    assert all(record.clipped for record in clipper.history)
    assert_same(clipped.state_dict(), plain.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_the_lightning_callback_with_a_grad_scaler(tmp_path: Path, fused: bool) -> None:
    def mixed_precision() -> MixedPrecision:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return MixedPrecision("16-mixed", "cpu", scaler)

    plain, clipped = Module(torch.optim.Adam), Module(torch.optim.Adam, fused=fused)
    fit(plain, tmp_path, gradient_clip_val=MAX_NORM, plugins=mixed_precision())
    callback = for_lightning.ClipperCallback(MAX_NORM)
    fit(clipped, tmp_path, callback, plugins=mixed_precision())
    assert len(callback.clippers[0].history) == 6
    assert all(MAX_NORM < record.total_norm < 100 for record in callback.clippers[0].history)
    assert_same(clipped.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


def test_the_lightning_callback_with_several_optimizers_by_hand(tmp_path: Path) -> None:
    module = TwoByHand()
    before = copy.deepcopy(module.state_dict())
    callback = for_lightning.ClipperCallback(MAX_NORM)
    trainer = fit(module, tmp_path, callback, max_steps=2)
    assert [len(clipper.history) for clipper in callback.clippers] == [1, 1]
    for layer in (0, 2):
        moved = [
            module.state_dict()[f"net.{layer}.{n}"] - before[f"net.{layer}.{n}"] for n in ("weight", "bias")
        ]
        assert torchclip.get_total_norm(moved) == pytest.approx(0.1 * MAX_NORM, rel=1e-4)
    assert {"clip_0/total_norm", "clip_1/clipped_share"} <= trainer.logged_metrics.keys()


def test_the_lightning_callback_logs(tmp_path: Path) -> None:
    callback = for_lightning.ClipperCallback(MAX_NORM)
    logged = fit(Module(), tmp_path, callback).logged_metrics
    last = last_of(callback.clippers[0])
    assert logged["clip/total_norm"] == pytest.approx(last.total_norm, rel=1e-6)
    assert logged["clip/max_norm"] == MAX_NORM
    assert logged["clip/clipped_share"] == 1.0
    assert not fit(Module(), tmp_path, for_lightning.ClipperCallback(MAX_NORM, log=False)).logged_metrics


def test_lightnings_checkpoints_carry_the_clipper(tmp_path: Path) -> None:
    """A run that is resumed ends where an uninterrupted one does."""

    def callback() -> for_lightning.ClipperCallback:
        return for_lightning.ClipperCallback(torchclip.Percentile(30.0, warmup=2))

    whole, first, second = Module(), Module(), Module()
    expected, interrupted, found = callback(), callback(), callback()
    fit(whole, tmp_path, expected, max_epochs=2)
    trainer = fit(first, tmp_path, interrupted, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(second, tmp_path, found, max_epochs=2, resume=tmp_path / "half.ckpt")
    assert_same(second.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert list(found.clippers[0].history) == list(expected.clippers[0].history)


def switched_off(step: int) -> float:
    """Clips in six steps, and never again."""
    return 1e-6 if step < 6 else math.inf


def test_another_fit_goes_on_with_the_clippers(tmp_path: Path) -> None:
    module = Module()
    for max_norm in (torchclip.Percentile(30.0, warmup=2), switched_off):
        callback = for_lightning.ClipperCallback(max_norm)
        trainer = fit(module, tmp_path, callback)
        before = list(callback.clippers[0].history)
        assert trainer.logged_metrics["clip/clipped_share"] > 0
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, data())
        (clipper,) = callback.clippers
        assert [record.step for record in clipper.history] == list(range(12))
        assert clipper.history[:6] == before
        shares = sum(record.clipped for record in clipper.history) / 12
        assert trainer.logged_metrics["clip/clipped_share"] == pytest.approx(shares)


def test_a_fit_of_another_module_starts_anew(tmp_path: Path) -> None:
    callback = for_lightning.ClipperCallback(torchclip.Percentile(30.0))
    fit(Module(), tmp_path, callback)
    fit(Module(), tmp_path, callback)
    assert [record.step for record in callback.clippers[0].history] == list(range(6))


def test_a_checkpoint_prevails_over_what_a_fit_has_left(tmp_path: Path) -> None:
    def save(trainer: pl.Trainer) -> Path:
        trainer.save_checkpoint(tmp_path / "one.ckpt")
        return tmp_path / "one.ckpt"

    module = Module()
    callback = for_lightning.ClipperCallback(MAX_NORM)
    checkpoint = save(fit(module, tmp_path, callback, max_epochs=1))
    fit(module, tmp_path, callback, max_epochs=3)
    fit(module, tmp_path, callback, max_epochs=2, resume=checkpoint)
    assert [record.step for record in callback.clippers[0].history] == list(range(12))
    # One that was saved before the first step has nothing to go on with.
    callback.load_state_dict({"clippers": []})
    fit(module, tmp_path, callback, max_epochs=1)
    assert [record.step for record in callback.clippers[0].history] == list(range(6))


def test_a_checkpoint_of_another_number_of_optimizers_is_refused(tmp_path: Path) -> None:
    callback = for_lightning.ClipperCallback(MAX_NORM)
    fit(TwoByHand(), tmp_path, callback).save_checkpoint(tmp_path / "two.ckpt")
    state = callback.state_dict()
    callback.load_state_dict(state)
    with pytest.raises(ValueError, match="state of 2 clippers, but there are 1 optimizers"):
        fit(Module(), tmp_path, callback)
    fit(Module(), tmp_path, callback)


@pytest.mark.parametrize("first", [False, True])
def test_the_learning_rate_finder_leaves_no_trace(tmp_path: Path, first: bool) -> None:
    module: Any = Module()
    module.lr = 0.1
    clipping = for_lightning.ClipperCallback(MAX_NORM)
    finder = LearningRateFinder(num_training_steps=5, early_stop_threshold=None)
    fit(module, tmp_path, *([finder, clipping] if first else [clipping, finder]))
    assert [record.step for record in clipping.clippers[0].history] == list(range(6))


def test_the_clipped_share_goes_on_when_a_fit_is_resumed(tmp_path: Path) -> None:
    fit(Module(), tmp_path, for_lightning.ClipperCallback(switched_off)).save_checkpoint(
        tmp_path / "half.ckpt"
    )
    callback = for_lightning.ClipperCallback(switched_off)
    trainer = fit(Module(), tmp_path, callback, max_epochs=2, resume=tmp_path / "half.ckpt")
    assert trainer.logged_metrics["clip/clipped_share"] == 0.5


def test_the_lightning_callback_leaves_the_optimizer_as_it_was(tmp_path: Path) -> None:
    class Failing(Module):
        def training_step(self, batch: Any, index: int) -> Any:
            if index == 1:
                raise FloatingPointError
            return super().training_step(batch, index)

    for module in (Module(), Failing()):
        callback = for_lightning.ClipperCallback(MAX_NORM)
        expectation = (
            pytest.raises(FloatingPointError) if isinstance(module, Failing) else contextlib.nullcontext()
        )
        with expectation:
            fit(module, tmp_path, callback)
        torchclip.Clipper(callback.clippers[0].optimizer, MAX_NORM)


def test_the_lightning_callback_refuses_to_clip_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gradient_clip_val"):
        fit(Module(), tmp_path, for_lightning.ClipperCallback(MAX_NORM), gradient_clip_val=1.0)


def test_the_lightning_callback_refuses_gradients_that_it_cannot_see() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer._accelerator_connector.strategy = FSDPStrategy()  # which no Trainer takes without a GPU
    with pytest.raises(ValueError, match="FSDPStrategy shards"):
        for_lightning.ClipperCallback(MAX_NORM).on_fit_start(trainer, Module())


# Hugging Face


TEXT = torch.arange(32).reshape(8, 4) % 16


def language_model() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=16, n_positions=4, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def trainer_of(
    tmp_path: Path, *callbacks: transformers.TrainerCallback, **options: Any
) -> transformers.Trainer:
    """A tiny language model, to be trained for six steps."""
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
    with counted("clip_grad_norm_") as norms:
        installed = train(tmp_path, max_grad_norm=MAX_NORM, **options)
    callback = for_transformers.ClipperCallback(MAX_NORM)
    clipped = train(tmp_path, callback, **options)
    assert len(norms) == len(history_of(callback)) == 6
    assert any(record.clipped for record in history_of(callback))
    np.testing.assert_allclose([r.total_norm for r in history_of(callback)], norms, rtol=1e-4)
    assert_same(weights_of(installed), weights_of(plain), rtol=1e-4, atol=1e-5)
    assert_same(weights_of(clipped), weights_of(plain), rtol=1e-4, atol=1e-5)


def test_the_transformers_callback_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Record] = []
    callback = for_transformers.ClipperCallback(MAX_NORM, on_clip=seen.append)
    log = train(tmp_path, callback).state.log_history
    records = list(history_of(callback))
    assert seen == records
    assert [entry["clip/total_norm"] for entry in log if "loss" in entry] == [r.total_norm for r in records]
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


def test_training_again_after_an_interruption(tmp_path: Path) -> None:
    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    callback, interrupt = for_transformers.ClipperCallback(MAX_NORM), Interrupt()
    trainer = trainer_of(tmp_path, callback, interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupt)
    trainer.train()
    assert [record.step for record in history_of(callback)] == list(range(6))


def test_training_again_starts_anew(tmp_path: Path) -> None:
    callback = for_transformers.ClipperCallback(MAX_NORM)
    trainer = train(tmp_path, callback)
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
    """Looks at the gradients right before the optimizer's step, and spoils one while backward runs."""

    def __init__(self) -> None:
        self.finite: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        def spoil(grad: Tensor) -> Tensor:
            return grad.index_fill(0, torch.tensor(0), math.inf if state.global_step == 2 else 1.0)

        model.transformer.wpe.weight.register_hook(spoil)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.finite.append(sum(int(p.grad.isfinite().sum()) for p in model.parameters()))


def test_the_trainer_leaves_the_gradients_as_backward_left_them(tmp_path: Path) -> None:
    """Infinite elements are set to 0 by the clipper, and nothing has spread from them before."""
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
    with pytest.raises(RuntimeError, match=r"Non-finite: [^,]* of shape \(4, 8\) \(8 inf, 0 nan\)\.$"):
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
    """The largest element is not what the Trainer calls the norm, nor is the norm of a part."""
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
    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise KeyboardInterrupt

    callback, interrupt = for_transformers.ClipperCallback(MAX_NORM), Interrupt()
    trainer = trainer_of(tmp_path, callback, interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(callback)
    trainer.remove_callback(interrupt)
    trainer.train()
    assert all(map(math.isfinite, grad_norms(trainer)))


def test_the_clipped_share_goes_on_when_training_is_resumed(tmp_path: Path) -> None:
    """Clipped before the checkpoint and not after it: the share falls step by step."""

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


# Loggers


def clip_three_steps(on_clip: Callable[[Record], object]) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    torchclip.Clipper(optimizer, 2.0, on_clip=on_clip)
    for norm in (1.0, 4.0, math.inf):
        weight.grad = torch.tensor([0.0, norm])
        optimizer.step()


def test_scalars_in_tensorboard(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:
        clip_three_steps(ScalarLogger(writer, prefix="clipping"))
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["clipping/total_norm"] == [(0, 1.0), (1, 4.0), (2, math.inf)]
    assert found["clipping/max_norm"] == [(0, 2.0), (1, 2.0), (2, 2.0)]
    assert found["clipping/clipped_share"] == [(0, 0.0), (1, 0.5), (2, pytest.approx(2 / 3))]


def test_a_logger_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`log` must be callable, got 3 \(int\)"):
        DictLogger(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`writer` must be a SummaryWriter, got 3 \(int\)"):
        ScalarLogger(3)  # type: ignore[arg-type]


def test_a_window_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="`window` must be at least 1, got 0"):
        Scalars(window=0)


def test_loggers_go_on_from_a_history(tmp_path: Path) -> None:
    history = History()
    for step, coefficient in enumerate([0.5, 0.5, 1.0]):
        history.append(step, 4.0, 2.0, coefficient)
    logged: list[dict[str, float]] = []
    by_function = DictLogger(logged.append)
    by_function.resume(history)
    clip_three_steps(by_function)
    shares = [2 / 4, 3 / 5, 4 / 6]
    assert [entry["clip/clipped_share"] for entry in logged] == shares
    with SummaryWriter(tmp_path) as writer:
        to_tensorboard = ScalarLogger(writer)
        to_tensorboard.resume(history)
        clip_three_steps(to_tensorboard)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("clip/clipped_share")
    assert [event.value for event in events] == pytest.approx(shares)


def test_scalars_for_any_logger() -> None:
    logged: list[dict[str, float]] = []
    clip_three_steps(DictLogger(logged.append))
    assert logged[:2] == [
        {"clip/total_norm": 1.0, "clip/max_norm": 2.0, "clip/clipped_share": 0.0},
        {"clip/total_norm": 4.0, "clip/max_norm": 2.0, "clip/clipped_share": 0.5},
    ]


# Extras


@pytest.mark.parametrize("framework", ["lightning", "transformers"])
def test_a_missing_framework_is_named_with_its_extra(framework: str) -> None:
    source = f"""
import sys
sys.modules[{framework!r}] = None  # as if it were not installed
import torchclip
import torchclip.integrations.{framework}
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert f"pip install 'torchclip[{framework}]'" in done.stderr.splitlines()[-1]


def test_torchclip_imports_no_framework() -> None:
    frameworks = ["lightning", "transformers", "accelerate", "stable_baselines3", "tensorboard"]
    source = f"import sys, torchclip; print([name for name in {frameworks} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", source], capture_output=True, text=True).stdout == "[]\n"
