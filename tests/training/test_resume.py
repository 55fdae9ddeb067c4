"""Stopping and going on: by Ctrl-C, by a signal, by a loss that is not finite; and nothing is lost."""

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
from safetensors.torch import load_file

from racnn_cli import api, evaluation
from racnn_cli.cli import main
from racnn_cli.data import images
from racnn_cli.errors import Interrupted, RacnnError
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run
from racnn_cli.training import checkpoint, phases
from racnn_cli.training.console import Console
from racnn_cli.training.resume import flatten

# Where a run is stopped: the stage as the loop names it, and how many steps of it in this process are made
# before. 24 images in batches of 6 are 4 steps an epoch; the fourth is the last of its epoch.
STOPS = [
    ("pretrain-cnn", 2),
    ("pretrain-cnn", 4),
    ("pretrain-apn", 1),
    ("alternate: CNN phase", 2),
    ("alternate: APN phase", 3),
    ("alternate: APN phase", 4),
    ("alternate: fusion head", 1),
    ("alternate: fusion head", 5),
]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {  # everything that has a state or draws random numbers
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


@pytest.fixture
def stop_at(monkeypatch) -> Callable[..., None]:
    """Raise a signal right after so many steps of a stage, once."""
    plan: dict[str, Any] = {}
    begin, step = Console.begin, Console.step

    def begun(self: Console, name: str, **rest: Any) -> None:
        plan["now"], plan["made"] = name, 0
        begin(self, name, **rest)

    def stepped(self: Console, *rest: Any, **keys: Any) -> None:
        step(self, *rest, **keys)
        plan["made"] += 1
        if (plan["now"], plan["made"]) == plan.get("at"):
            del plan["at"]
            for _ in range(plan["times"]):
                signal.raise_signal(plan["number"])

    def arm(stage: str, steps: int, number: int = signal.SIGINT, times: int = 1) -> None:
        plan.update(at=(stage, steps), number=number, times=times)

    monkeypatch.setattr(Console, "begin", begun)
    monkeypatch.setattr(Console, "step", stepped)
    return arm


def timeless_log(run: Run) -> list[dict[str, Any]]:
    times = ("seconds", "images_per_second")
    return [{key: value for key, value in event.to_json().items() if key not in times} for event in run.read_log()]


def trained(recipe: Recipe, out: Path) -> Run:
    api.train(recipe, out=out, quiet=True)
    return Run.open(out)


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_stopped_in_every_stage_ends_bit_identical(here, data, stop_at, case) -> None:
    recipe = tiny(data, **CASES[case])
    whole = trained(recipe, here / "whole")

    steps = 2 if case == "averaged" else 1  # twice as many batches an epoch

    def go_on() -> None:
        if (here / "parts").exists():
            api.resume(Run.open(here / "parts"), quiet=True)
        else:
            api.train(recipe, out=here / "parts", quiet=True)

    for stage, after in STOPS:
        stop_at(stage, after * steps)
        with pytest.raises(Interrupted):
            go_on()
    api.resume(Run.open(here / "parts"), quiet=True)

    parts = Run.open(here / "parts")
    assert timeless_log(parts) == timeless_log(whole)
    one, two = load_file(whole.weights), load_file(parts.weights)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert sorted(parts.state.glob("*.safetensors"), reverse=True) == checkpoint.list_checkpoints(parts)
    assert len(checkpoint.list_checkpoints(parts)) == 2  # the newest, and one in case that it is damaged
    assert [p.name for p in parts.state.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("at", [1, 2, 5, 7, 9, 11, 13])
def test_a_signal_while_it_validates_costs_nothing(here, data, monkeypatch, at) -> None:
    """At an epoch's end, a round's, a stage's: the validation is not finished first."""
    recipe = tiny(data, train__ema=0.9)
    whole = trained(recipe, here / "whole")
    honest, calls = evaluation.measure, []

    def interrupted(model, batches, *rest, **options):
        calls.append(0)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return honest(model, batches, *rest, **options)

    monkeypatch.setattr(evaluation, "measure", interrupted)
    with pytest.raises(Interrupted):
        api.train(recipe, out=here / "parts", quiet=True)
    assert len(calls) == at
    api.resume(Run.open(here / "parts"), quiet=True)
    parts = Run.open(here / "parts")
    assert timeless_log(parts) == timeless_log(whole)
    one, two = load_file(whole.weights), load_file(parts.weights)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(here, data, stop_at, monkeypatch, capsys, number, code) -> None:
    file = write_recipe(here / "mine.toml", data)
    stop_at("pretrain-cnn", 1, number)
    monkeypatch.setattr(sys, "argv", ["racnn", "train", str(file), "--out", "mine"])
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    said = capsys.readouterr().err
    assert f"stopped by {signal.Signals(number).name}" in said
    assert "racnn train --resume --run mine" in said
    assert "Traceback" not in said
    assert signal.getsignal(number) == before
    assert checkpoint.list_checkpoints(Run(here / "mine"))
    monkeypatch.setattr(sys, "argv", ["racnn", "train", "--resume", "--run", "mine"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert (here / "mine" / "eval.json").is_file()


def test_a_second_ctrl_c_stops_at_once(here, data, stop_at) -> None:
    before = signal.getsignal(signal.SIGINT)
    stop_at("pretrain-cnn", 1, times=2)
    with pytest.raises(KeyboardInterrupt):
        api.train(tiny(data), out=here / "mine", quiet=True)
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_of_a_finished_run_trains_nothing(here, data) -> None:
    run = trained(tiny(data), here / "mine")
    weights, log = run.weights.read_bytes(), run.log.read_bytes()
    run.eval.unlink()
    result = api.resume(run, quiet=True)
    assert run.weights.read_bytes() == weights
    assert run.log.read_bytes() == log
    assert result.images == 12
    assert run.eval.is_file()


def test_lost_weights_of_a_finished_run_come_back(here, data) -> None:
    run = trained(tiny(data), here / "mine")
    weights = run.weights.read_bytes()
    run.weights.unlink()
    api.resume(run, quiet=True)
    assert run.weights.read_bytes() == weights


def test_weights_without_a_checkpoint_are_not_trained_over(here, data, racnn) -> None:
    run = trained(tiny(data), here / "mine")
    shutil.rmtree(run.state)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    for words in (["train", "--resume"], ["pretrain-cnn"], ["alternate"]):
        said = racnn(*words, "--run", run.folder)
        assert said.code == 2
        assert "no checkpoint to continue from" in said.err
    assert {path.name: path.read_bytes() for path in run.folder.iterdir() if path.is_file()} == before


def test_a_baseline_without_the_log_of_its_run_is_not_begun(here, data) -> None:
    run = trained(tiny(data), here / "mine")
    run.recipe_file.write_text(run.recipe_file.read_text().replace("baseline = false", "baseline = true"))
    run.log.unlink()
    with pytest.raises(RacnnError, match=r"log\.jsonl does not say how many rounds"):
        api.resume(run, quiet=True)
    assert not (run.folder / "baseline").exists()


def test_what_the_optimizer_is_bound_to_cannot_change_in_mid_stage(here, data, stop_at) -> None:
    stop_at("pretrain-cnn", 1)
    with pytest.raises(Interrupted):
        api.train(tiny(data, model__scales=1, model__sizes=[64]), out=here / "mine", quiet=True)
    run = Run.open(here / "mine")
    before = run.recipe_file.read_bytes()
    for key, value in (("train.optimizer", "sgd"), ("train.weight_decay", 0.0), ("train.ema", 0.5)):
        with pytest.raises(RacnnError, match=f"in the middle of pretrain-cnn; {key} cannot change"):
            api.resume(run, {key: value}, quiet=True)
    with pytest.raises(RacnnError, match="quick"):
        api.resume(run, {"quick": True}, quiet=True)
    assert run.recipe_file.read_bytes() == before


def test_an_epoch_goes_on_in_smaller_batches_with_the_same_images(here, data, stop_at, monkeypatch) -> None:
    """As the hint says where memory ran out: half the batch, twice as many of them an update."""
    recipe = tiny(data, model__scales=1, model__sizes=[64], model__backbone="test_convnext", pretrain_cnn__epochs=1)
    whole = trained(recipe, here / "whole")
    stop_at("pretrain-cnn", 1)
    with pytest.raises(Interrupted):
        api.train(recipe, out=here / "parts", quiet=True)
    run = Run.open(here / "parts")
    with pytest.raises(RacnnError, match=r"after 12 images; updates of 10 .* do not divide"):
        api.resume(run, {"train.batch": 5, "train.accumulate": 2}, quiet=True)
    read: list[int] = []
    honest = images.ImageDataset.__getitem__
    monkeypatch.setattr(
        images.ImageDataset, "__getitem__", lambda self, key: (read.append(key[1]), honest(self, key))[1]
    )
    api.resume(run, {"train.batch": 3, "train.accumulate": 2}, quiet=True)
    order = images.plan(24, batch=6, epoch=0, seed=3, shuffle=True)
    assert read[:12] == [position for step in order[2:] for position in step]
    losses = [r.epochs()[0].train_loss for r in (whole, run)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, two = load_file(whole.weights), load_file(run.weights)
    for name in one:  # one update of 6 is two batches of 3, but for rounding
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


def test_the_baseline_that_was_stopped_goes_on_with_its_run(here, data, stop_at) -> None:
    recipe = tiny(data, baseline=True)
    api.train(recipe, out=here / "whole", quiet=True)
    steps = len(Run(here / "whole").read_log())
    stop_at("pretrain-cnn", 1)
    with pytest.raises(Interrupted):
        api.train(recipe, out=here / "mine", quiet=True)
    run = Run.open(here / "mine")
    stop_at("alternate: fusion head", 1)
    with pytest.raises(Interrupted):
        api.resume(run, quiet=True)
    # The next call of the loop named pretrain-cnn is the baseline's: what to type is still the run itself.
    stop_at("pretrain-cnn", 1)
    with pytest.raises(Interrupted) as stopped:
        api.resume(run, quiet=True)
    assert (run.folder / "baseline" / "recipe.toml").is_file()
    assert stopped.value.hint == f"`racnn train --resume --run {here / 'mine'}` continues"
    result = api.resume(run, quiet=True)
    assert result.baseline is not None
    assert len(run.read_log()) >= steps


def no_memory(loss: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("no memory left")


@pytest.mark.parametrize(
    ("error", "before", "after"),
    [
        (no_memory, {"train.batch": 6, "train.accumulate": 1}, {"train.batch": 3, "train.accumulate": 2}),
        (lambda loss: loss / 0, {"pretrain_cnn.lr": 3e-4}, {"pretrain_cnn.lr": 3e-5}),
    ],
)
def test_what_a_failed_baseline_says_to_type_reaches_it(here, data, monkeypatch, error, before, after) -> None:
    real = api.baseline_recipe

    def begun(*args: Any, **keys: Any) -> Recipe:  # the next loss is the baseline's first
        explode(monkeypatch, "classification_loss", 1, error)
        return real(*args, **keys)

    monkeypatch.setattr(api, "baseline_recipe", begun)
    with pytest.raises(RacnnError) as caught:
        api.train(tiny(data, baseline=True, alternate__rounds=1), out=here / "mine", quiet=True)
    assert caught.value.exit_code == 1
    run, base = Run.open(here / "mine"), Run.open(here / "mine" / "baseline")
    began = flatten(base.recipe())
    assert before.items() <= began.items()
    said = caught.value.hint.split("`")[1]
    # Keys of which a baseline has values of its own stay as they are, also where the run's are repeated.
    monkeypatch.setattr(sys, "argv", [*shlex.split(said), "--set", "pretrain_cnn.epochs=1", "--set", "name=blobs"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert flatten(base.recipe()) == {**began, **after}
    assert base.eval.is_file()
    # The run itself was trained with the old values, and says so.
    assert before.items() <= flatten(run.recipe()).items()


def test_resume_with_more_epochs_goes_further(here, data, stop_at) -> None:
    recipe = tiny(data, model__scales=1, model__sizes=[64])
    stop_at("pretrain-cnn", 2)
    with pytest.raises(Interrupted):
        api.train(recipe, out=here / "mine", quiet=True)
    run = Run.open(here / "mine")
    api.resume(run, {"pretrain_cnn.epochs": 3}, quiet=True)
    assert [e.epoch for e in run.read_log() if e.event == "epoch"] == [1, 2, 3]
    assert run.recipe().pretrain_cnn.epochs == 3


# ---- not finite


def explode(monkeypatch, name: str, call: int, value: Callable[[Any], Any]) -> None:
    """Let the `call`-th use of a loss in the stages be something else."""
    real = getattr(phases, name)
    made = [0]

    def loss(*args: Any, **keys: Any) -> Any:
        made[0] += 1
        return value(real(*args, **keys)) if made[0] == call else real(*args, **keys)

    monkeypatch.setattr(phases, name, loss)


def infinite_slope(loss: torch.Tensor) -> torch.Tensor:
    return loss + (loss * 0).sqrt()  # the value is that of the loss; the slope of the root at 0 is not finite


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (lambda loss: loss * float("nan"), "the loss `classification 1` is nan"),
        (lambda loss: loss / 0, "the loss `classification 1` is inf"),
        (infinite_slope, "the gradient's norm is nan"),
    ],
)
def test_what_is_not_finite_stops_before_the_update(here, data, monkeypatch, value, part) -> None:
    recipe = tiny(data, model__scales=1, model__sizes=[64])
    explode(monkeypatch, "classification_loss", 7, value)  # the third of four steps in the second epoch
    with pytest.raises(RacnnError) as caught:
        api.train(recipe, out=here / "mine", quiet=True)
    assert caught.value.exit_code == 1
    message = caught.value.message
    assert "pretrain-cnn, epoch 2, step 3" in message
    assert part in message
    newest = checkpoint.list_checkpoints(Run(here / "mine"))[0]
    assert f"{newest} is intact" in message
    assert "lr" in caught.value.hint

    # The checkpoint is that of the first epoch: going on from it is the run that never failed.
    tensors = load_file(newest)
    assert all(torch.isfinite(t).all() for t in tensors.values())
    api.resume(Run.open(here / "mine"), quiet=True)
    whole = trained(recipe, here / "whole")
    one, two = load_file(whole.weights), load_file(here / "mine" / "weights.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_not_finite_in_the_first_epoch_says_that_nothing_is_saved(here, data, monkeypatch) -> None:
    explode(monkeypatch, "classification_loss", 1, lambda loss: loss * float("nan"))
    with pytest.raises(RacnnError, match="no checkpoint was written yet"):
        api.train(tiny(data), out=here / "mine", quiet=True)


def test_not_finite_in_an_apn_phase_names_it(here, data, monkeypatch) -> None:
    explode(monkeypatch, "rank_loss", 5, lambda loss: loss * float("nan"))  # four boxes are tried a step
    with pytest.raises(RacnnError, match=r"alternate: APN phase, epoch 1, step 2: the loss `rank 1-2` is nan"):
        api.train(tiny(data), out=here / "mine", quiet=True)


def test_one_command_starts_a_run_and_goes_on_with_it(racnn, here, data) -> None:
    write_recipe(here / "mine.toml", data)
    words = ["train", "mine.toml", "--out", "mine", "--resume"]
    assert racnn(*words).code == 0
    before, log = load_file(here / "mine" / "weights.safetensors"), (here / "mine" / "log.jsonl").read_text()
    assert racnn(*words).code == 0
    assert (here / "mine" / "log.jsonl").read_text() == log
    after = load_file(here / "mine" / "weights.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    # What was changed on the way stays, and the command that is given again need not say so.
    file = here / "mine" / "recipe.toml"
    file.write_text(file.read_text().replace("batch = 6", "batch = 4"))
    said = racnn(*words)
    assert said.code == 0
    assert "note: the run's own train.batch = 4 is kept, not 6" in said.out + said.err
    said = racnn(*words, "--set", "model.apn_hidden=8")
    assert said.code == 2
    assert "model.apn_hidden is 16 in mine, asked for 8" in said.err
    for wrong in (["mine.toml", "--resume"], ["--out", "mine", "--resume"], [*words[1:], "--run", "mine"]):
        said = racnn("train", *wrong)
        assert said.code == 2, wrong
        assert "--out DIR --resume" in said.err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_same_images_come_and_the_weights_are_near(here, data, stop_at) -> None:
    """Not bit for bit: some of its kernels add up in an order of their own."""
    recipe = tiny(data, train__device="cuda", train__amp=False, train__optimizer="sgd", pretrain_cnn__lr=0.01)
    api.train(recipe, out=here / "whole", quiet=True)
    stop_at("alternate: CNN phase", 1)
    with pytest.raises(Interrupted):
        api.train(recipe, out=here / "parts", quiet=True)
    api.resume(Run.open(here / "parts"), quiet=True)
    one, two = (load_file(here / name / "weights.safetensors") for name in ("whole", "parts"))
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    logs = [[e.to_json().get("views") for e in Run(here / name).read_log()] for name in ("whole", "parts")]
    assert logs[0] == logs[1]
