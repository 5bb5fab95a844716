"""What `torchclip run` says about scripts that clip in a wrong way, and that it says nothing about others."""

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
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

run_here = in_process.run_here

# Scripts are run in this process, where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:None of the tensors in `parameters`")

HELPERS = """
def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

def sgd(*modules, **options):
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1, **options)

def loss_of(*models):
    inputs = torch.randn(8, 4)
    return sum((model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean() for model in models)

def backward():
    optimizer.zero_grad()
    loss_of(model).backward()

def gradients():
    return [p.grad for p in model.parameters()]

model = new_model()
optimizer = sgd(model)
clip = utils.clip_grad_norm_
"""


@dataclass(frozen=True)
class Program:
    """A training script: what it does in each of 12 steps, and before them."""

    step: str
    before: str = ""

    def __call__(self) -> None:
        names: dict[str, Any] = {"torch": torch, "nn": nn, "utils": utils, "torchclip": torchclip}
        exec(HELPERS, names)
        # The loop begins in line 1.
        exec(textwrap.dedent(self.before), names)
        loop = "for i in range(12):\n" + textwrap.indent(textwrap.dedent(self.step).strip(), "    ")
        exec(compile(loop, "script.py", "exec"), names)


def recorded(script: Callable[[], object], trial: Trial | None = None) -> StepRecorder:
    with recording(trial or Trial()) as found:
        script()
    torchclip.uninstall()
    return found


def remarks_on(script: Callable[[], object], trial: Trial | None = None) -> list[Remark]:
    return recorded(script, trial).mistakes.remarks()


GRADIENTS = Program("backward(); clip(gradients(), 1.0); optimizer.step()")
BETWEEN = "so no step used what it clipped. Call it after backward() and before step()."
PARAMETERS = "Pass the parameters, such as model.parameters()."
SCALED = """
scaler.scale(loss_of(model)).backward()
clip(model.parameters(), 1.0)
scaler.step(optimizer); scaler.update(); optimizer.zero_grad()
"""
SCALER = "optimizer, scaler = sgd(model, fused={}), torch.amp.GradScaler('cpu', init_scale=2.0**10)"
LIBRARY = """
trainer = {"__name__": "library.trainer", "utils": utils}
code = "def clip(parameters): utils.clip_grad_norm_(parameters, 1.0)"
exec(compile(code, "/somewhere/site-packages/library/trainer.py", "exec"), trainer)
"""
# Scripts with a mistake, and what is said about them
WRONG: list[tuple[str, Program, str]] = [
    (
        "after the step",
        Program("backward(); optimizer.step()\nclip(model.parameters(), 1.0)"),
        f"script.py:3: clip_grad_norm_ came after the step in 11 of 12 steps, {BETWEEN}",
    ),
    (
        "before backward",
        Program("optimizer.zero_grad(); clip(model.parameters(), 1.0); backward(); optimizer.step()"),
        f"script.py:2: clip_grad_norm_ came before the backward pass in 12 of 12 steps, {BETWEEN}",
    ),
    (
        "before backward",  # zeros are as no gradients
        Program("optimizer.zero_grad(False); clip(model.parameters(), 1.0); backward(); optimizer.step()"),
        f"script.py:2: clip_grad_norm_ came before the backward pass in 12 of 12 steps, {BETWEEN}",
    ),
    (
        "gradients",
        GRADIENTS,
        "script.py:2: clip_grad_norm_ got gradients in place of parameters in 12 of 12 steps, and clipped "
        f"nothing. {PARAMETERS}",
    ),
    (
        "gradients",  # after the step, beside a right call
        Program("backward(); clip(model.parameters(), 1.0); optimizer.step()\nclip(gradients(), 1.0)"),
        "script.py:3: clip_grad_norm_ got gradients in place of parameters in 11 of 12 steps, and clipped "
        f"nothing. {PARAMETERS}",
    ),
    (
        "copies",
        Program(
            "backward(); torchclip.clip_grad_norm_(other.parameters(), 1.0); optimizer.step()",
            "other = new_model()",
        ),
        "script.py:2: clip_grad_norm_ got tensors without a gradient, perhaps copies, in 12 of 12 steps, and "
        "clipped nothing. Pass the parameters that the optimizer has.",
    ),
    (
        "used up",
        Program("backward(); clip(parameters, 1.0); optimizer.step()", "parameters = model.parameters()"),
        "script.py:2: clip_grad_norm_ got an iterator that was used up in 11 of 12 steps, and clipped "
        "nothing. Pass a list, or call model.parameters() each time.",
    ),
    (
        "empty",
        Program("backward(); utils.clip_grad_value_([], 1.0); optimizer.step()"),
        "script.py:2: clip_grad_value_ got an empty list in 12 of 12 steps, and clipped nothing. "
        f"{PARAMETERS}",
    ),
    *(
        (
            "scaled",  # a fused optimizer divides by the scale itself
            Program(SCALED, SCALER.format(fused)),
            "script.py:3: clip_grad_norm_ clipped gradients that were still multiplied by the GradScaler's "
            "scale in 12 of 12 steps. Call scaler.unscale_(optimizer) before it.",
        )
        for fused in (False, True)
    ),
    (
        "part",
        Program(
            "model[0].requires_grad_(i >= 4); backward(); clip(trained, 1.0); optimizer.step()",
            "trained = [*model[2].parameters()]",
        ),
        "script.py:2: clip_grad_norm_ did not get all gradients in 8 of 12 steps: the optimizer also stepped "
        "with 0.weight, 0.bias. If that is not meant, pass all parameters of the optimizer.",
    ),
    (
        "part",
        Program(
            "optimizer.zero_grad(); loss_of(model, decoder).backward(); clip(model, 1.0); optimizer.step()",
            "decoder = new_model(); optimizer = sgd(model, decoder)",
        ),
        "script.py:2: clip_grad_norm_ did not get all gradients in 12 of 12 steps: the optimizer also "
        "stepped with Sequential 2.0.weight, Sequential 2.0.bias, Sequential 2.2.weight and 1 more. If that "
        "is not meant, pass all parameters of the optimizer.",
    ),
    (
        "micro-batch",
        Program(
            """
            optimizer.zero_grad()
            for _ in range(3):
                loss_of(model).backward()
                clip(model.parameters(), 1.0)
            optimizer.step()
            """
        ),
        "script.py:5: clip_grad_norm_ clipped after each backward pass in 12 of 12 steps, and so clipped "
        "parts of a gradient, not their sum. If that is not meant, call it once before step().",
    ),
    (
        "two thresholds",
        Program(
            """
            backward()
            clip(model.parameters(), 1.0)
            clip(model[0].parameters(), 0.1)
            optimizer.step()
            """
        ),
        "script.py:3 and script.py:4: these calls clipped the same gradients to different thresholds in 12 "
        "of 12 steps. If that is not meant, remove one of them.",
    ),
    (
        "two rules",
        Program(
            """
            backward()
            clip(model.parameters(), 1.0)
            utils.clip_grad_value_(model.parameters(), 0.1)
            optimizer.step()
            """
        ),
        "script.py:3 and script.py:4: clip_grad_norm_ and then clip_grad_value_ clipped the same gradients "
        "in 12 of 12 steps. If that is not meant, remove one of them.",
    ),
    (
        "two libraries",
        Program(
            """
            backward()
            trainer["clip"](list(model.parameters()))
            clip(model.parameters(), 1.0)
            optimizer.step()
            """,
            LIBRARY,
        ),
        "library/trainer.py:1 and script.py:4: both lines clipped the same gradients in 12 of 12 steps, one "
        "of them in a library. If that is not meant, remove your call, or the library's option.",
    ),
    (
        "clipper",
        Program(
            "backward(); clip(model.parameters(), 1.0); optimizer.step()",
            "clipper = torchclip.Clipper(optimizer, 1.0)",
        ),
        "script.py:2: clip_grad_norm_ and a torchclip.Clipper clipped the same gradients in 12 of 12 steps. "
        "If that is not meant, remove the call.",
    ),
]


@pytest.mark.filterwarnings("ignore:`parameters` is an empty generator")
@pytest.mark.parametrize(("kind", "program", "expected"), WRONG, ids=[kind for kind, *_ in WRONG])
def test_each_kind_is_said_with_its_line_and_its_remedy(kind: str, program: Program, expected: str) -> None:
    (remark,) = remarks_on(program)
    assert (remark.kind, str(remark)) == (kind, expected)
    assert remark.is_mistake == ("If that is not meant" not in expected)


def test_a_mistake_is_seen_in_a_trial_too() -> None:
    (remark,) = remarks_on(GRADIENTS, Trial(max_norm=0.1))
    assert remark.kind == "gradients"


GAN = Program(
    """
    optimizers[1].zero_grad()
    critic(generator(torch.randn(8, 4))).mean().backward()  # also reaches the generator
    clip(critic.parameters(), 1.0)
    optimizers[1].step()
    optimizers[0].zero_grad()
    (-critic(generator(torch.randn(8, 4))).mean()).backward()
    clip(generator.parameters(), 1.0)
    optimizers[0].step()
    """,
    "generator, critic = new_model(), nn.Linear(1, 1); optimizers = sgd(generator), sgd(critic)",
)
AMP = """
scaler.scale(loss_of(model) * (float("inf") if i % 5 == 2 else 1.0)).backward()
scaler.unscale_(optimizer)
clip(model.parameters(), 1.0)
scaler.step(optimizer); scaler.update(); optimizer.zero_grad()
"""
# Scripts that are right
RIGHT = {
    "accumulation": Program(
        """
        optimizer.zero_grad()
        for _ in range(3):
            loss_of(model).backward()
        clip(model.parameters(), 1.0)
        optimizer.step()
        """
    ),
    "amp": Program(AMP, SCALER.format(False)),
    "amp, fused": Program(AMP, SCALER.format(True)),
    "a GAN with two calls": GAN,
    "one call for two optimizers": Program(
        "backward(); clip(model, 1.0); optimizer.step(); second.step(); second.zero_grad()",
        "optimizer, second = sgd(model[0]), sgd(model[2])",
    ),
    "two optimizers of the same parameters, which step in turn, and only one is clipped": Program(
        """
        backward()
        if i % 2 == 0:
            clip(model.parameters(), 1.0)
        optimizers[i % 2].step()
        """,
        "optimizers = sgd(model), sgd(model)",
    ),
    "groups clipped apart": Program(
        "backward(); clip(model[0].parameters(), 1.0); clip(model[2].parameters(), 0.1); optimizer.step()"
    ),
    "only the first of two models is clipped, and the call is made in every step": Program(
        """
        for each in models:
            each.zero_grad()
        loss_of(models[i % 2]).backward()
        clip(models[0].parameters(), 1.0)
        optimizers[i % 2].step()
        """,
        "models = new_model(), new_model(); optimizers = [*map(sgd, models)]",
    ),
    "clipped before another model's backward pass": Program(
        """
        for each in (model, critic):
            each.zero_grad()
            loss_of(each).backward()
            clip(each.parameters(), 1.0)
        optimizer.step()
        second.step()
        """,
        "critic = new_model(); second = sgd(critic)",
    ),
    "a call for a model that is not trained yet": Program(
        "backward(); clip(model.parameters(), 1.0); clip(later.parameters(), 1.0); optimizer.step()",
        "later = new_model()",
    ),
    "measured, and then clipped": Program(
        """
        backward()
        clip(model.parameters(), float("inf"))
        utils.clip_grads_with_norm_(list(model.parameters()), 1.0, utils.get_total_norm(gradients()))
        optimizer.step()
        """
    ),
    "with noise": Program(
        """
        backward()
        clip(model.parameters(), 1.0)
        for p in model.parameters():
            p.grad = p.grad + 0.01 * torch.randn_like(p)
        optimizer.step()
        """
    ),
    "in a closure": Program(
        "optimizer.step(closure)",
        """
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            clip(model.parameters(), 1.0)
            return loss
        """,
    ),
    "with a Clipper": Program("backward(); optimizer.step()", "clipper = torchclip.Clipper(optimizer, 1.0)"),
    "in the backward pass": Program(
        "loss_of(model).backward()",
        """
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

        def step(p):
            clip([p], 1.0)
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in optimizers:
            p.register_post_accumulate_grad_hook(step)
        """,
    ),
}


@pytest.mark.parametrize("trial", [Trial(), Trial(max_norm=0.5), Trial(none=True)], ids=str)
@pytest.mark.parametrize("program", RIGHT.values(), ids=RIGHT)
def test_nothing_is_said_about_scripts_that_are_right(program: Program, trial: Trial) -> None:
    assert remarks_on(program, trial) == []


@pytest.mark.parametrize("program", RIGHT.values(), ids=RIGHT)
def test_nor_where_no_norm_is_read_as_on_an_accelerator(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (functions, gradients, losses):
        monkeypatch.setattr(module, "as_number", lambda value: torch.as_tensor(value).detach().clone())
    monkeypatch.setattr(functions, "_can_be_read", lambda _: False)
    assert remarks_on(program) == []


def test_steps_that_a_script_leaves_out_by_itself_are_no_micro_batches() -> None:
    program = Program(
        """
        optimizer.zero_grad()
        (loss_of(model) * (float("inf") if i % 5 == 2 else 1.0)).backward()
        if clip(model.parameters(), 1.0).isfinite():
            optimizer.step()
        """
    )
    assert remarks_on(program) == []


# Trainers


def lightning() -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 1)

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
    program = Program(
        """
        for _ in range(5):
            backward()
            clip(model.parameters(), 1e-3)
            optimizer.step()
        """,
        "optimizer = torch.optim.Adam(model.parameters(), eps=1e-3)",
    )
    text = " ".join(report(recorded(program), "1 s").split())
    assert "advice on clip_grad_norm_ at script.py:4 max_norm=0.001 is in the way: " in text


def test_each_optimizer_of_a_gan_is_judged_by_itself() -> None:
    lines = report(recorded(GAN), "1 s").splitlines()
    found = [line for line in lines if line.startswith("advice on ")]
    assert found == [
        "advice on clip_grad_norm_ at script.py:4 for SGD 1",
        "advice on clip_grad_norm_ at script.py:8 for SGD 2",
    ]


# The command


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
