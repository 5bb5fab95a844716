"""The callback for Lightning, and Lightning's own clipping under install()."""

import contextlib
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from frameworks import MAX_NORM, assert_same, counted, data
from helpers import last_of
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.nn import functional as F

import torchclip
from torchclip.integrations import lightning as for_lightning

# The frameworks' warnings depend on their versions and on the machine.
pytestmark = pytest.mark.filterwarnings("ignore")


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
    """Manual optimization, with one optimizer per layer."""

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


@pytest.mark.parametrize("limit", ["skip_above", "skip_loss_above"])
def test_the_lightning_callback_takes_all_options_of_a_clipper(limit: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {limit: 0.0, "max_skips": 2, "layers_every": 1, "updates": True}
    callback = for_lightning.ClipperCallback(MAX_NORM, **options)
    with pytest.warns(UserWarning, match="max_skips"):
        fit(Module(), tmp_path, callback)
    (clipper,) = callback.clippers
    assert [record.skipped for record in clipper.history] == [True, True, False] * 2
    assert clipper.history.layers.names == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    assert clipper.history.layers.steps == [*range(6)]
    assert [each.step for each in clipper.history.layers.updates["net.0.bias"]] == [2, 5]
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'max_skip'"):
        for_lightning.ClipperCallback(MAX_NORM, max_skip=2)


def test_one_loss_does_not_judge_several_optimizers(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`skip_loss_above` judges the loss of one optimizer.* has 2; do not"
    ):
        fit(TwoByHand(), tmp_path, for_lightning.ClipperCallback(MAX_NORM, skip_loss_above=1.0))


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
    # A checkpoint from before the first step has nothing to continue with.
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
    with pytest.raises(ValueError, match="FSDPStrategy hides gradients"):
        for_lightning.ClipperCallback(MAX_NORM).on_fit_start(trainer, Module())
