"""What `torchclip run` says about scripts that clip in a wrong way, and that it says nothing about others."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import in_process
import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils

import torchclip
from torchclip.cli.run import functions, gradients, losses
from torchclip.cli.run.mistakes import Remark
from torchclip.cli.run.recording import recording
from torchclip.cli.run.report import report
from torchclip.cli.run.steps import StepRecorder
from torchclip.cli.run.trial import Trial

# Scripts are run in this process, where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:None of the tensors in `parameters`")

STEPS = 12


def new_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def sgd(*modules: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1)


def loss_of(*models: nn.Module) -> Tensor:
    inputs = torch.randn(8, 4)
    losses = [(model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean() for model in models]
    return torch.stack(losses).sum()


def recorded(script: Callable[[], object], trial: Trial | None = None) -> StepRecorder:
    with recording(trial or Trial()) as found:
        script()
    torchclip.uninstall()
    return found


def remarks_on(script: Callable[[], object], trial: Trial | None = None) -> list[Remark]:
    return recorded(script, trial).mistakes.remarks()


# Scripts with a mistake, and what is said about them


def after_the_step() -> None:
    model = new_model()
    optimizer = sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        utils.clip_grad_norm_(model.parameters(), 1.0)


def before_the_backward_pass(set_to_none: bool = True) -> None:
    model = new_model()
    optimizer = sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=set_to_none)
        utils.clip_grad_norm_(model.parameters(), 1.0)
        loss_of(model).backward()
        optimizer.step()


def gradients_in_place_of_parameters() -> None:
    model = new_model()
    optimizer = sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        utils.clip_grad_norm_([p.grad for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()


def gradients_after_the_step_beside_a_right_call() -> None:
    model = new_model()
    optimizer = sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        utils.clip_grad_norm_([p.grad for p in model.parameters() if p.grad is not None], 1.0)


def copies_in_place_of_parameters() -> None:
    model = new_model()
    other, optimizer = copy.deepcopy(model), sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        torchclip.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()


def an_iterator_that_was_used_up() -> None:
    model = new_model()
    optimizer, parameters = sgd(model), model.parameters()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def an_empty_list() -> None:
    model = new_model()
    optimizer = sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        utils.clip_grad_value_([], 1.0)
        optimizer.step()


def still_scaled(fused: bool = False) -> None:
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


def a_part_after_unfreezing() -> None:
    model = new_model()
    model[0].requires_grad_(False)
    optimizer, trained = sgd(model), [p for p in model.parameters() if p.requires_grad]
    for step in range(STEPS):
        model[0].requires_grad_(step >= 4)
        optimizer.zero_grad()
        loss_of(model).backward()
        utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


def a_second_model() -> None:
    encoder, decoder = new_model(), new_model()
    optimizer = sgd(encoder, decoder)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(encoder, decoder).backward()
        utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()


def each_micro_batch() -> None:
    model = new_model()
    optimizer = sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(3):
            loss_of(model).backward()
            utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def two_thresholds() -> None:
    model = new_model()
    optimizer = sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        utils.clip_grad_norm_(model.parameters(), 1.0)
        utils.clip_grad_norm_(model[0].parameters(), 0.1)
        optimizer.step()


def by_norm_and_by_value() -> None:
    model = new_model()
    optimizer = sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        utils.clip_grad_norm_(model.parameters(), 1.0)
        utils.clip_grad_value_(model.parameters(), 0.1)
        optimizer.step()


def by_two_libraries() -> None:
    library: dict[str, Any] = {"__name__": "library.trainer"}
    code = "def clip(parameters): utils.clip_grad_norm_(parameters, 1.0)"
    exec(
        compile(code, "/somewhere/site-packages/library/trainer.py", "exec"),
        library | {"utils": utils},
        library,
    )
    library["clip"].__globals__["__name__"] = "library.trainer"
    model = new_model()
    optimizer = sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        library["clip"](list(model.parameters()))
        utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def by_a_clipper_and_a_call() -> None:
    model = new_model()
    optimizer = sgd(model)
    torchclip.Clipper(optimizer, 1.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


HERE = r"\S*test_mistakes.py:\d+"
BETWEEN = r"so no step used what it clipped. Call it after backward\(\) and before step\(\)."
NOT_MEANT = "If that is not meant, remove one of them."
WRONG: dict[Callable[[], None], tuple[bool, str]] = {
    after_the_step: (True, rf"{HERE}: clip_grad_norm_ came after the step in 11 of 12 steps, {BETWEEN}"),
    before_the_backward_pass: (
        True,
        rf"{HERE}: clip_grad_norm_ came before the backward pass in 12 of 12 steps, {BETWEEN}",
    ),
    gradients_in_place_of_parameters: (
        True,
        rf"{HERE}: clip_grad_norm_ got gradients in place of parameters in 12 of 12 steps, and clipped "
        r"nothing. Pass the parameters, such as model.parameters\(\).",
    ),
    gradients_after_the_step_beside_a_right_call: (
        True,
        rf"{HERE}: clip_grad_norm_ got gradients in place of parameters in 11 of 12 steps, and clipped "
        r"nothing. Pass the parameters, such as model.parameters\(\).",
    ),
    copies_in_place_of_parameters: (
        True,
        rf"{HERE}: clip_grad_norm_ got tensors without a gradient, perhaps copies, in 12 of 12 steps, and "
        "clipped nothing. Pass the parameters that the optimizer has.",
    ),
    an_iterator_that_was_used_up: (
        True,
        rf"{HERE}: clip_grad_norm_ got an iterator that was used up in 11 of 12 steps, and clipped nothing. "
        r"Pass a list, or call model.parameters\(\) each time.",
    ),
    an_empty_list: (
        True,
        rf"{HERE}: clip_grad_value_ got an empty list in 12 of 12 steps, and clipped nothing. Pass the "
        r"parameters, such as model.parameters\(\).",
    ),
    still_scaled: (
        True,
        rf"{HERE}: clip_grad_norm_ clipped gradients that were still multiplied by the GradScaler's scale in "
        r"12 of 12 steps. Call scaler.unscale_\(optimizer\) before it.",
    ),
    a_part_after_unfreezing: (
        False,
        rf"{HERE}: clip_grad_norm_ did not get all gradients in 8 of 12 steps: the optimizer also stepped "
        "with 0.weight, 0.bias. If that is not meant, pass all parameters of the optimizer.",
    ),
    a_second_model: (
        False,
        rf"{HERE}: clip_grad_norm_ did not get all gradients in 12 of 12 steps: the optimizer also stepped "
        "with Sequential [12].0.weight, .* and 1 more. If .*",
    ),
    each_micro_batch: (
        False,
        rf"{HERE}: clip_grad_norm_ clipped after each backward pass in 12 of 12 steps, and so clipped parts "
        r"of a gradient, not their sum. If that is not meant, call it once before step\(\).",
    ),
    two_thresholds: (
        False,
        rf"{HERE} and {HERE}: these calls clipped the same gradients to different thresholds in 12 of 12 "
        f"steps. {NOT_MEANT}",
    ),
    by_norm_and_by_value: (
        False,
        rf"{HERE} and {HERE}: clip_grad_norm_ and then clip_grad_value_ clipped the same gradients in 12 of "
        f"12 steps. {NOT_MEANT}",
    ),
    by_two_libraries: (
        False,
        rf"library/trainer.py:1 and {HERE}: both lines clipped the same gradients in 12 of 12 steps, one of "
        "them in a library. If that is not meant, remove your call, or the library's option.",
    ),
    by_a_clipper_and_a_call: (
        False,
        rf"{HERE}: clip_grad_norm_ and a torchclip.Clipper clipped the same gradients in 12 of 12 steps. If "
        "that is not meant, remove the call.",
    ),
}


@pytest.mark.filterwarnings("ignore:`parameters` is an empty generator")
@pytest.mark.parametrize("script", WRONG, ids=lambda script: script.__name__)
def test_each_kind_is_said_with_its_line_and_its_remedy(script: Callable[[], None]) -> None:
    is_mistake, expected = WRONG[script]
    (remark,) = remarks_on(script)
    assert remark.is_mistake == is_mistake
    assert re.fullmatch(expected, str(remark)), str(remark)


def test_zeros_before_the_backward_pass_are_as_no_gradients() -> None:
    (remark,) = remarks_on(lambda: before_the_backward_pass(set_to_none=False))
    assert remark.kind == "before backward"


def test_a_fused_optimizer_divides_by_the_scale_itself() -> None:
    (remark,) = remarks_on(lambda: still_scaled(fused=True))
    assert remark.kind == "scaled"


def test_a_mistake_is_seen_in_a_trial_too() -> None:
    (remark,) = remarks_on(gradients_in_place_of_parameters, Trial(max_norm=0.1))
    assert remark.kind == "gradients"


# Scripts that are right


def accumulation() -> None:
    model = new_model()
    optimizer = sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(3):
            loss_of(model).backward()
        utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def amp(fused: bool = False) -> None:
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model) * (float("inf") if step % 5 == 2 else 1.0)).backward()
        scaler.unscale_(optimizer)
        utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


def amp_fused() -> None:
    amp(fused=True)


def a_gan_with_two_calls() -> None:
    generator, critic = new_model(), nn.Linear(1, 1)
    optimizers = sgd(generator), sgd(critic)
    for _ in range(STEPS):
        optimizers[1].zero_grad()
        critic(generator(torch.randn(8, 4))).mean().backward()  # also reaches the generator
        utils.clip_grad_norm_(critic.parameters(), 1.0)
        optimizers[1].step()
        optimizers[0].zero_grad()
        (-critic(generator(torch.randn(8, 4))).mean()).backward()
        utils.clip_grad_norm_(generator.parameters(), 1.0)
        optimizers[0].step()


def one_call_for_two_optimizers() -> None:
    model = new_model()
    optimizers = sgd(model[0]), sgd(model[2])
    for _ in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model).backward()
        utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()


def two_optimizers_of_the_same_parameters() -> None:
    """They step in turn, and only the first one with clipped gradients."""
    model = new_model()
    optimizers = sgd(model), sgd(model)
    for step in range(2 * STEPS):
        model.zero_grad()
        loss_of(model).backward()
        if step % 2 == 0:
            utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers[step % 2].step()


def groups_clipped_apart() -> None:
    model = new_model()
    optimizer = sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        for threshold, part in ((1.0, model[0]), (0.1, model[2])):
            utils.clip_grad_norm_(part.parameters(), threshold)
        optimizer.step()


def one_of_two_optimizers() -> None:
    """Only the critic is clipped, and the call is made in every step."""
    critic, other = new_model(), new_model()
    optimizers = sgd(critic), sgd(other)
    for step in range(STEPS):
        chosen = step % 2
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of((critic, other)[chosen]).backward()
        utils.clip_grad_norm_(critic.parameters(), 1.0)
        optimizers[chosen].step()


def measured_and_then_clipped() -> None:
    model = new_model()
    optimizer = sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        utils.clip_grad_norm_(model.parameters(), float("inf"))
        utils.clip_grads_with_norm_(
            list(model.parameters()),
            1.0,
            utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]),
        )
        optimizer.step()


def with_noise() -> None:
    model = new_model()
    optimizer = sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        utils.clip_grad_norm_(model.parameters(), 1.0)
        for p in model.parameters():
            p.grad = p.grad + 0.01 * torch.randn_like(p)  # type: ignore[operator]
        optimizer.step()


def in_a_closure() -> None:
    model = new_model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)


def with_a_clipper() -> None:
    model = new_model()
    optimizer = sgd(model)
    torchclip.Clipper(optimizer, 1.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def in_the_backward_pass() -> None:
    model = new_model()
    for p in model.parameters():
        optimizer = torch.optim.SGD([p], lr=0.1)

        def step(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            utils.clip_grad_norm_([p], 1.0)
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    for _ in range(STEPS):
        loss_of(model).backward()


RIGHT = [
    accumulation,
    amp,
    amp_fused,
    a_gan_with_two_calls,
    one_call_for_two_optimizers,
    two_optimizers_of_the_same_parameters,
    groups_clipped_apart,
    one_of_two_optimizers,
    measured_and_then_clipped,
    with_noise,
    in_a_closure,
    with_a_clipper,
    in_the_backward_pass,
]


@pytest.mark.parametrize("trial", [Trial(), Trial(max_norm=0.5), Trial(none=True)], ids=str)
@pytest.mark.parametrize("script", RIGHT, ids=lambda script: script.__name__)
def test_nothing_is_said_about_scripts_that_are_right(script: Callable[[], None], trial: Trial) -> None:
    assert remarks_on(script, trial) == []


@pytest.mark.parametrize("script", RIGHT, ids=lambda script: script.__name__)
def test_nor_where_no_norm_is_read_as_on_an_accelerator(
    script: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (functions, gradients, losses):
        monkeypatch.setattr(module, "as_number", lambda value: torch.as_tensor(value).detach().clone())
    monkeypatch.setattr(functions, "_can_be_read", lambda _: False)
    assert remarks_on(script) == []


# Trainers


def lightning() -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = new_model()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.net(batch).square().mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=8))  # type: ignore[arg-type]


def transformers() -> None:
    library = pytest.importorskip("transformers")
    config = library.GPT2Config(vocab_size=16, n_positions=8, n_embd=32, n_layer=2, n_head=2)
    arguments = library.TrainingArguments(
        output_dir="out",
        max_steps=60,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in (torch.randint(16, (64, 1)) + torch.arange(8)) % 16]
    library.Trainer(library.GPT2LMHeadModel(config), arguments, train_dataset=rows).train()


def stable_baselines3() -> None:
    library = pytest.importorskip("stable_baselines3")
    library.PPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu", seed=0).learn(512)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("installs", [False, True])
@pytest.mark.parametrize(
    ("trainer", "verdict"),
    [
        (lightning, r"Whether max_norm=0.5 is right cannot be told. Too early for advice: 8 steps"),
        (transformers, r"Keep max_norm=1: it clips"),
        (stable_baselines3, r"max_norm=0.5 clips every step, .* If that is meant, as in PPO, keep it."),
    ],
)
def test_of_trainers_only_their_threshold_is_judged(
    trainer: Callable[[], None], verdict: str, installs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if installs:
        torchclip.install()
    found = recorded(trainer)
    assert found.mistakes.remarks() == []
    text = " ".join(report(found, "1 s").split())
    assert re.search(rf"advice on clip_grad\w+ at \S+\.py:\d+ {verdict}", text), text
    assert "left their usual range" not in text


def test_a_threshold_that_is_in_the_way_is_told_with_its_line() -> None:
    def script() -> None:
        model = new_model()
        optimizer = torch.optim.Adam(model.parameters(), eps=1e-3)
        for _ in range(60):
            optimizer.zero_grad()
            loss_of(model).backward()
            utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()

    text = " ".join(report(recorded(script), "1 s").split())
    assert re.search(rf"advice on clip_grad_norm_ at {HERE} max_norm=0.001 is in the way: ", text)


def test_each_optimizer_of_a_gan_is_judged_by_itself() -> None:
    lines = report(recorded(a_gan_with_two_calls), "1 s").splitlines()
    found = [line for line in lines if line.startswith("advice on clip_grad_norm_ at ")]
    assert [line[-5:] for line in found] == ["SGD 1", "SGD 2"]
    assert found[0].partition(":")[2] != found[1].partition(":")[2]


# The command


@pytest.fixture
def run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> in_process.Run:
    return in_process.runner(tmp_path, monkeypatch, capfd)


SCRIPT = """
import sys, torch
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([weight], lr=0.1)
for _ in range(6):
    weight.square().sum().backward()
    torch.nn.utils.clip_grad_norm_([weight.grad] if sys.argv[1] == "wrong" else [weight], 1.0)
    optimizer.step()
    optimizer.zero_grad()
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("arguments", "options", "status"),
    [
        (("wrong", "0"), ["--strict"], 1),
        (("wrong", "0"), [], 0),
        (("wrong", "7"), ["--strict"], 7),
        (("right", "0"), ["--strict"], 0),
    ],
)
def test_with_strict_a_mistake_is_an_error(
    run_here: in_process.Run, arguments: tuple[str, ...], options: list[str], status: int
) -> None:
    done = run_here(SCRIPT, *arguments, options=options)
    assert done.returncode == status
    assert ("worth a look\n  script.py:7: " in done.stderr) == (arguments[0] == "wrong")


def test_with_strict_a_mistake_on_another_rank_is_its_error(
    run_here: in_process.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    done = run_here(SCRIPT, "wrong", "0", options=["--strict"])
    assert (done.returncode, done.stderr) == (1, "")


def test_what_is_worth_a_look_is_on_the_page(run_here: in_process.Run, tmp_path: Path) -> None:
    run_here(SCRIPT, "wrong", "0", options=["--html", "a.html"])
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "script.py:7: clip_grad_norm_ got gradients in place of parameters in 6 of 6 steps" in page
