"""Stop and resume: after Ctrl-C, a signal or a loss that is not finite, a run continues and nothing is lost."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blobs import tiny, write_blobs, write_recipe
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from racnn_cli import api, evaluation
from racnn_cli.cli import main
from racnn_cli.data import images
from racnn_cli.errors import DataError, Interrupted, RecipeError, RunError
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run
from racnn_cli.training import baseline as baselines
from racnn_cli.training import checkpoint, phases
from racnn_cli.training.console import Console
from racnn_cli.training.resume import flatten

# Where a run is stopped: the title of a phase, and the number of its steps that this process runs before the signal.
# 24 images in batches of 6 are 4 steps per epoch; the fourth is the last of its epoch.
STOPS = [
    ("pretrain-cnn", 2),
    ("pretrain-cnn", 4),
    ("pretrain-apn", 1),
    ("alternate: CNN phase", 2),
    ("alternate: APN phase", 3),
    ("alternate: CNN phase", 4),
    ("alternate: fusion head", 1),
    ("alternate: fusion head", 5),
]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {  # everything that keeps state or draws random numbers
        "train__optimizer": "sgd",
        "train__ema": 0.9,
        "train__accumulate": 2,
        "train__batch": 3,
        "pretrain_cnn__patience": 5,
        "pretrain_cnn__lr": 0.01,
        "model__dropout": 0.3,
        "alternate__jitter": 0.3,
        "model__scales": 3,
        "model__sizes": [96, 64, 64],
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_blobs(tmp_path_factory.mktemp("blobs") / "data")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data: Path) -> Run:
    """The run of `tiny(data)`, which tests must not change."""
    return train(tiny(data), tmp_path_factory.mktemp("finished") / "mine")


@pytest.fixture
def mine(finished: Run, here: Path) -> Run:
    """A copy of that run."""
    shutil.copytree(finished.folder, here / "mine")
    return Run(here / "mine")


@pytest.fixture
def stop_at(monkeypatch) -> Callable[..., None]:
    """A function that arranges for a signal after a given number of steps of a phase, once."""
    plan: dict[str, Any] = {}
    original_begin, original_step = Console.begin, Console.step

    def begin(self: Console, name: str, **options: Any) -> None:
        plan["phase"], plan["steps"] = name, 0
        original_begin(self, name, **options)

    def step(self: Console, *args: Any, **options: Any) -> None:
        original_step(self, *args, **options)
        plan["steps"] += 1
        if (plan["phase"], plan["steps"]) == plan.get("at"):
            del plan["at"]
            for _ in range(plan["times"]):
                signal.raise_signal(plan["number"])

    def schedule(phase: str, steps: int, number: int = signal.SIGINT, times: int = 1) -> None:
        plan.update(at=(phase, steps), number=number, times=times)

    monkeypatch.setattr(Console, "begin", begin)
    monkeypatch.setattr(Console, "step", step)
    return schedule


def log_without_times(run: Run) -> list[dict[str, Any]]:
    times = ("seconds", "images_per_second")
    return [{key: value for key, value in event.to_json().items() if key not in times} for event in run.read_log()]


def train(recipe: Recipe, out: Path) -> Run:
    api.train(recipe, out=out, quiet=True)
    return Run.open(out)


def differing_tensors(first: Run, second: Run) -> list[str]:
    """Names of the weights that are not bit-identical."""
    expected, weights = load_file(first.weights), load_file(second.weights)
    assert expected.keys() == weights.keys()
    return [name for name in expected if not torch.equal(expected[name], weights[name])]


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_in_every_stage_ends_bit_identical(here, data, finished, stop_at, case) -> None:
    recipe = tiny(data, **CASES[case])
    uninterrupted = finished if case == "plain" else train(recipe, here / "uninterrupted")

    factor = 2 if case == "averaged" else 1  # twice as many batches per epoch

    def start_or_resume() -> None:
        if (here / "mine").exists():
            api.resume(Run.open(here / "mine"), quiet=True)
        else:
            api.train(recipe, out=here / "mine", quiet=True)

    for phase, steps in STOPS:
        stop_at(phase, steps * factor)
        with pytest.raises(Interrupted):
            start_or_resume()
    api.resume(Run.open(here / "mine"), quiet=True)

    run = Run.open(here / "mine")
    assert log_without_times(run) == log_without_times(uninterrupted)
    assert differing_tensors(uninterrupted, run) == []
    assert sorted(run.state.glob("*.safetensors"), reverse=True) == checkpoint.list_checkpoints(run)
    assert len(checkpoint.list_checkpoints(run)) == 2  # the newest, and one in case that it is damaged
    assert [path.name for path in run.state.iterdir() if path.name.startswith(".")] == []


def test_a_signal_during_validation_loses_nothing(here, data, monkeypatch) -> None:
    """At the end of an epoch, a round or a stage; training stops before the validation is finished.

    One run is stopped in one validation after the other. A validation that was stopped is repeated after the resume.
    """
    recipe = tiny(data, train__ema=0.9)
    uninterrupted = train(recipe, here / "uninterrupted")
    measure, stops = evaluation.measure, [1, 2, 5, 7, 9, 11, 13]
    plan = {"call": 0, "at": 0}

    def interrupted_measure(model, batches, *args, **options):
        plan["call"] += 1
        if plan["call"] == plan["at"]:
            signal.raise_signal(signal.SIGTERM)
        return measure(model, batches, *args, **options)

    monkeypatch.setattr(evaluation, "measure", interrupted_measure)
    for previous, call in zip([1, *stops], stops, strict=False):
        plan.update(call=0, at=call - previous + 1)
        with pytest.raises(Interrupted):
            api.train(recipe, out=here / "mine", or_resume=True, quiet=True)
        assert plan["call"] == plan["at"]
    run = Run.open(here / "mine")
    plan.update(at=0)
    api.resume(run, quiet=True)
    assert log_without_times(run) == log_without_times(uninterrupted)
    assert differing_tensors(uninterrupted, run) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_prints_how_to_resume(here, data, stop_at, monkeypatch, capsys, number, code) -> None:
    file = write_recipe(here / "mine.toml", data)
    stop_at("pretrain-cnn", 1, number)
    monkeypatch.setattr(sys, "argv", ["racnn", "train", str(file), "--out", "mine"])
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == code
    err = capsys.readouterr().err
    assert f"stopped by {signal.Signals(number).name}" in err
    assert "racnn train --resume --run mine" in err
    assert "Traceback" not in err
    assert signal.getsignal(number) == before
    assert checkpoint.list_checkpoints(Run(here / "mine"))
    monkeypatch.setattr(sys, "argv", ["racnn", "train", "--resume", "--run", "mine"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert not exit_info.value.code
    assert (here / "mine" / "eval.json").is_file()


def test_a_second_ctrl_c_stops_at_once(here, data, stop_at) -> None:
    before = signal.getsignal(signal.SIGINT)
    stop_at("pretrain-cnn", 1, times=2)
    with pytest.raises(KeyboardInterrupt):
        api.train(tiny(data), out=here / "mine", quiet=True)
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_of_a_finished_run_trains_nothing(mine) -> None:
    run = mine
    weights, log = run.weights.read_bytes(), run.log.read_bytes()
    run.eval.unlink()
    result = api.resume(run, quiet=True)
    assert run.weights.read_bytes() == weights
    assert run.log.read_bytes() == log
    assert result.images == 12
    assert run.eval.is_file()


def test_a_finished_run_follows_its_data_to_another_place(here, data) -> None:
    """Only the evaluation is left, which reads the recipe; the baseline has the same data."""
    shutil.copytree(data, here / "before")
    run = train(tiny(here / "before", baseline=True), here / "mine")
    weights, expected = run.weights.read_bytes(), run.read_eval()
    (here / "before").rename(here / "after")
    run.eval.unlink()
    with pytest.raises(DataError, match="does not exist"):
        api.resume(run, quiet=True)
    result = api.resume(run, {"data.path": str(here / "after")}, quiet=True)
    assert run.recipe().data.path == Run(run.folder / "baseline").recipe().data.path == str(here / "after")
    assert (result.fused, result.baseline) == (expected.fused, expected.baseline)
    assert run.weights.read_bytes() == weights
    assert api.evaluate(run).fused == expected.fused


def test_lost_weights_of_a_finished_run_are_restored(mine) -> None:
    run = mine
    weights = run.weights.read_bytes()
    run.weights.unlink()
    api.resume(run, quiet=True)
    assert run.weights.read_bytes() == weights


def test_weights_without_a_checkpoint_are_not_overwritten(mine, racnn) -> None:
    run = mine
    shutil.rmtree(run.state)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    for command in (["train", "--resume"], ["pretrain-cnn"], ["alternate"]):
        result = racnn(*command, "--run", run.folder)
        assert result.code == 2
        assert "no checkpoint to continue from" in result.err
    assert {path.name: path.read_bytes() for path in run.folder.iterdir() if path.is_file()} == before


def test_a_baseline_is_not_started_without_the_log_of_its_run(mine) -> None:
    run = mine
    run.recipe_file.write_text(run.recipe_file.read_text().replace("baseline = false", "baseline = true"))
    run.log.unlink()
    with pytest.raises(RunError, match=r"log\.jsonl does not say how many epochs"):
        api.resume(run, quiet=True)
    assert not (run.folder / "baseline").exists()


def test_optimizer_settings_cannot_change_in_the_middle_of_a_stage(here, data, stop_at) -> None:
    stop_at("pretrain-cnn", 1)
    with pytest.raises(Interrupted):
        api.train(tiny(data, model__scales=1, model__sizes=[64]), out=here / "mine", quiet=True)
    run = Run.open(here / "mine")
    before = run.recipe_file.read_bytes()
    for key, value in (("train.optimizer", "sgd"), ("train.weight_decay", 0.0), ("train.ema", 0.5)):
        with pytest.raises(RecipeError, match=f"in the middle of pretrain-cnn; {key} cannot change"):
            api.resume(run, {key: value}, quiet=True)
    with pytest.raises(RecipeError, match="quick"):
        api.resume(run, {"quick": True}, quiet=True)
    assert run.recipe_file.read_bytes() == before


def test_an_epoch_continues_in_smaller_batches_with_the_same_images(here, data, stop_at, monkeypatch) -> None:
    """As the hint for a lack of memory says: half the batch size, twice as many batches per update."""
    recipe = tiny(data, model__scales=1, model__sizes=[64], model__backbone="test_convnext", pretrain_cnn__epochs=1)
    uninterrupted = train(recipe, here / "uninterrupted")
    stop_at("pretrain-cnn", 1)
    with pytest.raises(Interrupted):
        api.train(recipe, out=here / "mine", quiet=True)
    run = Run.open(here / "mine")
    with pytest.raises(RecipeError, match=r"after 12 of 24 images; updates of 10 .* do not end there"):
        api.resume(run, {"train.batch": 5, "train.accumulate": 2}, quiet=True)
    read: list[int] = []
    getitem = images.ImageDataset.__getitem__
    monkeypatch.setattr(
        images.ImageDataset, "__getitem__", lambda self, key: (read.append(key[1]), getitem(self, key))[1]
    )
    api.resume(run, {"train.batch": 3, "train.accumulate": 2}, quiet=True)
    order = images.plan(24, batch=6, epoch=0, seed=3, shuffle=True)
    assert read[:12] == [position for batch in order[2:] for position in batch]
    expected_losses, losses = uninterrupted.epochs()[0].train_loss, run.epochs()[0].train_loss
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    expected, weights = load_file(uninterrupted.weights), load_file(run.weights)
    for name in expected:  # one batch of 6 and two batches of 3 give the same update, except for rounding
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-3, atol=1e-4)


@given(count=st.integers(1, 40), batch=st.integers(1, 12), world=st.integers(1, 3), seen=st.data(), resumed=st.data())
def test_an_epoch_continues_with_exactly_the_images_that_are_left(count, batch, world, seen, resumed) -> None:
    def images_of(step: int, batch: int, world: int) -> tuple[set[int], int]:
        shares = [
            images.plan(count, batch=batch, epoch=0, seed=0, shuffle=True, rank=rank, world=world)
            for rank in range(world)
        ]
        return {position for share in shares for part in share[:step] for position in part}, len(shares[0])

    steps = images_of(0, batch, world)[1]
    step = seen.draw(st.integers(1, steps))
    before = images_of(step, batch, world)[0]
    new_batch, new_world = resumed.draw(st.integers(1, 12)), resumed.draw(st.integers(1, 3))
    position = images.step_after(len(before), count, batch=new_batch, world=new_world)
    if position is not None:
        after, new_steps = images_of(position, new_batch, new_world)
        assert after == before
        assert position <= new_steps
        assert (position == new_steps) == (step == steps)
    assert position == step or (new_batch, new_world) != (batch, world)


def test_a_stopped_baseline_continues_with_its_run(here, data, stop_at) -> None:
    recipe = tiny(data, baseline=True)
    uninterrupted = train(recipe, here / "uninterrupted")
    stop_at("pretrain-cnn", 1)
    with pytest.raises(Interrupted):
        api.train(recipe, out=here / "mine", quiet=True)
    run = Run.open(here / "mine")
    stop_at("alternate: fusion head", 1)
    with pytest.raises(Interrupted):
        api.resume(run, quiet=True)
    # The next pretrain-cnn phase is the baseline's, but the command to type still names the run itself.
    stop_at("pretrain-cnn", 1)
    with pytest.raises(Interrupted) as interruption:
        api.resume(run, quiet=True)
    assert (run.folder / "baseline" / "recipe.toml").is_file()
    assert interruption.value.hint == f"`racnn train --resume --run {here / 'mine'}` continues"
    result = api.resume(run, quiet=True)
    assert result.baseline is not None
    assert len(run.read_log()) >= len(uninterrupted.read_log())


def run_out_of_memory(loss: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("no memory left")


@pytest.mark.parametrize(
    ("error", "before", "after"),
    [
        (run_out_of_memory, {"train.batch": 6, "train.accumulate": 1}, {"train.batch": 3, "train.accumulate": 2}),
        (lambda loss: loss / 0, {"pretrain_cnn.lr": 3e-4}, {"pretrain_cnn.lr": 3e-5}),
    ],
)
def test_the_command_in_the_hint_of_a_failed_baseline_changes_it(here, data, monkeypatch, error, before, after) -> None:
    original = baselines.baseline_recipe

    def baseline_recipe(*args: Any, **keys: Any) -> Recipe:  # the next loss is the baseline's first
        plain = original(*args, **keys)
        replace_loss(monkeypatch, "classification_loss", 1, error)
        return plain

    monkeypatch.setattr(baselines, "baseline_recipe", baseline_recipe)
    with pytest.raises(RunError) as caught:
        api.train(tiny(data, baseline=True, alternate__rounds=1), out=here / "mine", quiet=True)
    assert caught.value.exit_code == 1
    run, baseline = Run.open(here / "mine"), Run.open(here / "mine" / "baseline")
    values = flatten(baseline.recipe())
    assert before.items() <= values.items()
    command = caught.value.hint.split("`")[1]
    # Keys for which a baseline has values of its own do not change, even if the run's values are repeated.
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--set", "pretrain_cnn.epochs=1", "--set", "name=blobs"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert not exit_info.value.code
    assert flatten(baseline.recipe()) == {**values, **after}
    assert baseline.eval.is_file()
    # The recipe of the run still has the values that the run was trained with.
    assert before.items() <= flatten(run.recipe()).items()


def test_resume_with_more_epochs_trains_longer(here, data, stop_at) -> None:
    recipe = tiny(data, model__scales=1, model__sizes=[64])
    stop_at("pretrain-cnn", 2)
    with pytest.raises(Interrupted):
        api.train(recipe, out=here / "mine", quiet=True)
    run = Run.open(here / "mine")
    api.resume(run, {"pretrain_cnn.epochs": 3}, quiet=True)
    assert [e.epoch for e in run.read_log() if e.event == "epoch"] == [1, 2, 3]
    assert run.recipe().pretrain_cnn.epochs == 3


# ---- losses and gradients that are not finite


def replace_loss(monkeypatch, name: str, call: int, change: Callable[[Any], Any]) -> None:
    """Apply `change` to the value of the `call`-th call of a loss function in the phases."""
    original = getattr(phases, name)
    calls = [0]

    def loss(*args: Any, **keys: Any) -> Any:
        calls[0] += 1
        value = original(*args, **keys)
        return change(value) if calls[0] == call else value

    monkeypatch.setattr(phases, name, loss)


def with_infinite_gradient(loss: torch.Tensor) -> torch.Tensor:
    return loss + (loss * 0).sqrt()  # the same value, but the gradient of the square root at 0 is not finite


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda loss: loss * float("nan"), "the loss `classification 1` is nan"),
        (lambda loss: loss / 0, "the loss `classification 1` is inf"),
        (with_infinite_gradient, "the gradient's norm is nan"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(here, data, monkeypatch, change, reason) -> None:
    recipe = tiny(data, model__scales=1, model__sizes=[64])
    replace_loss(monkeypatch, "classification_loss", 7, change)  # the third of four steps in the second epoch
    with pytest.raises(RunError) as caught:
        api.train(recipe, out=here / "mine", quiet=True)
    assert caught.value.exit_code == 1
    message = caught.value.message
    assert "pretrain-cnn, epoch 2, step 3" in message
    assert reason in message
    newest = checkpoint.list_checkpoints(Run(here / "mine"))[0]
    assert f"{newest} is intact" in message
    assert "lr" in caught.value.hint

    # The checkpoint is that of the first epoch, and continuing from it gives the run that never failed.
    tensors = load_file(newest)
    assert all(torch.isfinite(t).all() for t in tensors.values())
    api.resume(Run.open(here / "mine"), quiet=True)
    uninterrupted = train(recipe, here / "uninterrupted")
    assert differing_tensors(uninterrupted, Run(here / "mine")) == []


def test_a_loss_that_is_not_finite_in_the_first_epoch_leaves_no_checkpoint(here, data, monkeypatch) -> None:
    replace_loss(monkeypatch, "classification_loss", 1, lambda loss: loss * float("nan"))
    with pytest.raises(RunError, match="no checkpoint was written yet"):
        api.train(tiny(data), out=here / "mine", quiet=True)


def test_a_loss_that_is_not_finite_in_an_apn_phase_is_named(here, data, monkeypatch) -> None:
    replace_loss(monkeypatch, "rank_loss", 5, lambda loss: loss * float("nan"))  # four boxes are tried per step
    with pytest.raises(RunError, match=r"alternate: APN phase, epoch 1, step 2: the loss `rank 1-2` is nan"):
        api.train(tiny(data), out=here / "mine", quiet=True)


def test_one_command_starts_a_run_and_continues_it(racnn, here, data) -> None:
    write_recipe(here / "mine.toml", data)
    arguments = ["train", "mine.toml", "--out", "mine", "--resume"]
    assert racnn(*arguments).code == 0
    before, log = load_file(here / "mine" / "weights.safetensors"), (here / "mine" / "log.jsonl").read_text()
    assert racnn(*arguments).code == 0
    assert (here / "mine" / "log.jsonl").read_text() == log
    after = load_file(here / "mine" / "weights.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    # A value that was changed in between stays, although the same command does not repeat the change.
    file = here / "mine" / "recipe.toml"
    file.write_text(file.read_text().replace("batch = 6", "batch = 4"))
    result = racnn(*arguments)
    assert result.code == 0
    assert "note: the run's own train.batch = 4 is kept, not 6" in result.out + result.err
    result = racnn(*arguments, "--set", "model.apn_hidden=8")
    assert result.code == 2
    assert "model.apn_hidden is 16 in mine, asked for 8" in result.err
    for wrong in (["mine.toml", "--resume"], ["--out", "mine", "--resume"], [*arguments[1:], "--run", "mine"]):
        result = racnn("train", *wrong)
        assert result.code == 2, wrong
        assert "--out DIR --resume" in result.err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_a_resumed_run_has_the_same_images_and_close_weights(here, data, stop_at) -> None:
    """Not bit for bit: some kernels sum in an order that is not deterministic."""
    recipe = tiny(data, train__device="cuda", train__amp=False, train__optimizer="sgd", pretrain_cnn__lr=0.01)
    uninterrupted = train(recipe, here / "uninterrupted")
    stop_at("alternate: CNN phase", 1)
    with pytest.raises(Interrupted):
        api.train(recipe, out=here / "mine", quiet=True)
    run = Run.open(here / "mine")
    api.resume(run, quiet=True)
    weights = load_file(run.weights)
    for name, expected in load_file(uninterrupted.weights).items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    views = [[event.to_json().get("views") for event in each.read_log()] for each in (uninterrupted, run)]
    assert views[0] == views[1]
