"""Training survives: killed anywhere and resumed it ends where the uninterrupted run ends, bit for bit."""

import contextlib
import multiprocessing
import os
import signal
import threading

import pytest
import torch
from accelerate import Accelerator
from test_training import ToyData, config, make

from gatekv.training import checkpoint, rotation
from gatekv.training.guard import LossGuard
from gatekv.training.loop import train
from gatekv.training.signals import Stopped

KIND = dict(sparsity="lagrange", scope="layer")


class At(ToyData):
    """Does something when the batch of a step is fetched."""

    def __init__(self, step, act):
        self.first, self.act = 2 * step, act

    def batch(self, first, rows, **kwargs):
        batch = super().batch(first, rows, **kwargs)
        if first == self.first and rows == 2:
            batch = self.act(batch) or batch
        return batch


def run(folder, rows=None, **changes):
    """Train toy gates for 6 steps; returns (module, records)."""
    module = make(**KIND)
    settings = config(folder, **{**KIND, "max_steps": 6, "save_every": 2, **changes})
    return module, train(module, rows or ToyData(), settings, Accelerator(cpu=True))


def state_of(module):
    return {n: p.detach().clone() for n, p in checkpoint.trained(module).items()} | {"multiplier": module.multiplier}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(tensors, records) of the uninterrupted run."""
    module, records = run(tmp_path_factory.mktemp("whole"))
    return state_of(module), records


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_resuming_is_the_uninterrupted_run(tmp_path, whole, number):
    before = signal.getsignal(number)
    for step in (1, 3):  # twice in a row
        with pytest.raises(Stopped, match=f"after step {step + 1} of 6; .*checkpoint-{step + 1} is saved.*--resume"):
            run(tmp_path, At(step, lambda batch: os.kill(os.getpid(), number)), save_every=0, resume="auto")
        assert rotation.steps(tmp_path)[-1] == step + 1
        assert signal.getsignal(number) == before, "outside the loop signals are what they were"
    module, records = run(tmp_path, save_every=2, resume="auto")
    assert same(state_of(module), whole[0])
    assert [r["loss"] for r in records] == [r["loss"] for r in whole[1]], "records of the whole run"
    again, _ = run(tmp_path, resume="auto")  # a finished run
    assert same(state_of(again), whole[0])


def test_the_newest_stay(tmp_path):
    run(tmp_path, save_every=1, keep_checkpoints=3)
    assert rotation.steps(tmp_path) == [4, 5, 6]
    saved = (tmp_path / "checkpoint-6/state.safetensors").stat().st_size
    trained = sum(p.numel() for p in checkpoint.trained(make(**KIND)).values())
    assert saved < 12 * trained + 20_000, "the base is never saved"
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-5", "checkpoint-6"}
    run(tmp_path, save_every=4, max_steps=5)  # a new run, in the old one's place
    assert rotation.steps(tmp_path) == [4, 5], "of later steps: the old run's, gone"


def test_checkpoints_by_the_clock(tmp_path):
    run(tmp_path, save_every=0, save_minutes=1e-9, keep_checkpoints=9)
    assert rotation.steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    run(tmp_path / "never", save_every=0, save_minutes=0, keep_checkpoints=9)
    assert rotation.steps(tmp_path / "never") == [6], "the end is saved all the same"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no tensors", "no state", "half a state"])
def test_a_damaged_checkpoint_is_passed_over_or_refused(tmp_path, whole, damage, caplog):
    run(tmp_path)
    tensors, state = tmp_path / "checkpoint-6/state.safetensors", tmp_path / "checkpoint-6/state.json"
    data = tensors.read_bytes()
    if damage == "truncated":
        tensors.write_bytes(data[:-9])
    elif damage == "flipped":
        tensors.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "half a state":
        state.write_text(state.read_text()[:40])
    else:
        (tensors if damage == "no tensors" else state).unlink()
    with pytest.raises(ValueError, match="checkpoint-6.*(damaged|is no checkpoint).*Name a whole checkpoint"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-6"))
    module, _ = run(tmp_path, resume="auto")
    assert "Going back to the checkpoint before it" in caplog.text
    assert same(state_of(module), whole[0]) and rotation.read(tmp_path / "checkpoint-6")


def test_with_nothing_whole_resuming_is_an_error_and_with_nothing_at_all_a_start(tmp_path, caplog, whole):
    module, _ = run(tmp_path, resume="auto")
    assert "no checkpoint in" in caplog.text and same(state_of(module), whole[0])
    for step in rotation.steps(tmp_path):
        (tmp_path / f"checkpoint-{step}/state.json").unlink()
    with pytest.raises(ValueError, match="none of the 2 checkpoints in .* is whole: start anew"):
        run(tmp_path, resume="auto")
    with pytest.raises(ValueError, match="nowhere is no checkpoint"):
        run(tmp_path, resume="nowhere")


@pytest.mark.parametrize("changes,match", [
    (dict(max_steps=7), "max_steps=7, but .* max_steps=6"), (dict(seed=1), "seed=1, but"), (dict(data=["a.txt"]), "data="),
    (dict(sequence_length=512), "sequence_length=512"), (dict(sparsity="abs"), "sparsity='abs'"), (dict(hidden=9), "hidden=9"),
    (dict(learning_rate=1e-3), "learning_rate=0.001"), (dict(batch_size=1), "a step reads 1 rows .* read 2"),
])  # fmt: skip
def test_other_options_are_refused_by_name(tmp_path, changes, match):
    run(tmp_path, max_steps=6, save_every=4)
    with pytest.raises(ValueError, match=match):
        run(tmp_path, resume="auto", **changes)
    assert rotation.steps(tmp_path) == [4, 6], "nothing was touched"


def test_options_without_a_say_in_the_result_may_change(tmp_path, whole):
    run(tmp_path / "a", save_every=4)
    changes = dict(save_every=1, save_minutes=3, keep_checkpoints=1, max_loss_ratio=0, batch_size=1, accumulation=2)
    module, _ = run(tmp_path / "b", resume=str(tmp_path / "a/checkpoint-4"), **changes)
    for name, tensor in state_of(module).items():  # the same rows in other portions: other rounding
        torch.testing.assert_close(tensor, whole[0][name], rtol=1e-4, atol=1e-5)
    assert rotation.steps(tmp_path / "b") == [6] and rotation.steps(tmp_path / "a") == [4, 6]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked")
def test_rows_read_ahead_are_asked_for_again(tmp_path, whole):
    """What workers had read when a run ended is read by the run that goes on, whoever reads there."""

    def later():
        os.kill(os.getpid(), signal.SIGTERM)  # while workers read the rows of steps to come

    timer = threading.Timer(0.3, later)
    timer.start()
    with contextlib.suppress(Stopped):
        run(tmp_path, dataloader_num_workers=2, resume="auto")
    timer.join()
    for _ in range(2):
        module, records = run(tmp_path, dataloader_num_workers=2, resume="auto")
        assert same(state_of(module), whole[0]) and [r["loss"] for r in records] == [r["loss"] for r in whole[1]]


def test_another_text_is_refused(tmp_path):
    class Other(ToyData):
        def __getitem__(self, index):
            return super().__getitem__(index + 1)

    run(tmp_path)
    with pytest.raises(ValueError, match="the training text or the tokenizer is not what"):
        run(tmp_path, Other(), resume="auto")


def test_another_gate_is_refused(tmp_path):
    module, other = make(), make(gate="attention")
    optimizer, alone = torch.optim.AdamW(checkpoint.trained(module).values()), Accelerator(cpu=True)
    with pytest.raises(ValueError, match="of another gate"):
        checkpoint.restore(alone, checkpoint.tensors_of(alone, module, optimizer), other, optimizer)


def test_dropout_is_a_function_of_the_row(tmp_path):
    """Else a resumed run would draw other numbers."""

    def noisy(folder, **changes):
        module = make(**KIND)
        forward = module.forward

        def dropped(*args, **kwargs):
            out = forward(*args, **kwargs)
            return out | {"loss": torch.nn.functional.dropout(out["loss"].expand(8), 0.5).mean()}

        module.forward = dropped
        settings = config(folder, **{**KIND, "max_steps": 6, "save_every": 2, **changes})
        train(module, ToyData(), settings, Accelerator(cpu=True))
        return state_of(module)

    wanted = noisy(tmp_path)
    torch.rand(100)
    got = noisy(tmp_path / "b", resume=str(tmp_path / "checkpoint-4"))
    assert same(got, wanted)
    assert not same(wanted, state_of(run(tmp_path / "c")[0])), "the noise does something"


def spoiled(folder, at, factor, **changes):
    """Train with the loss of one step multiplied."""
    module, calls = make(**KIND), []

    def spoil(module, args, out):
        calls.append(1)
        return out | {"loss": out["loss"] * (factor if len(calls) == at + 1 else 1)}

    module.register_forward_hook(spoil)
    settings = config(folder, **{**KIND, "max_steps": 6, "save_every": 2, **changes})
    train(module, ToyData(), settings, Accelerator(cpu=True))


def test_a_loss_that_is_no_number_names_its_rows_and_keeps_the_checkpoint(tmp_path):
    digest = checkpoint.batch_sha256(ToyData().batch(6, 2))
    with pytest.raises(
        FloatingPointError, match=rf"nan at step 3; worst: rows 6…7 \(input_ids sha256 {digest}\), loss nan"
    ):
        spoiled(tmp_path, 3, float("nan"))
    assert rotation.steps(tmp_path) == [2]
    rotation.read(tmp_path / "checkpoint-2")
    assert not list(tmp_path.glob("*.partial"))


def test_an_exploding_loss_stops_unless_told_otherwise(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"exploded to .* at step 22; worst: rows 44…45 .*--max_loss_ratio 0.*-20 is"
    ):
        spoiled(tmp_path / "a", 22, 1e3, max_steps=24, save_every=20)
    spoiled(tmp_path / "b", 22, 1e3, max_steps=24, save_every=0, max_loss_ratio=0)
    spoiled(tmp_path / "c", 22, 4, max_steps=24, save_every=0)


def test_the_guard_judges_by_the_median_and_remembers_it_over_a_resume():
    guard = LossGuard(20, [0.1] * 19)
    assert not guard.verdict(1e6, None), "too few steps to judge"
    assert not guard.verdict(19.9, 0.1), "twenty times next to nothing is next to nothing"
    assert "exploded to 20.1" in guard.verdict(20.1, 0.1)
    assert not LossGuard(20, [3.0] * 20).verdict(59, None) and LossGuard(20, [3.0] * 20).verdict(61, None)
    assert not LossGuard(0, [3.0] * 20).verdict(1e9, None)


def test_a_gradient_that_is_no_number_is_noticed_before_it_is_saved(tmp_path):
    module = make(**KIND)
    next(iter(checkpoint.trained(module).values())).register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match="the gradient's norm is .* at step 0.*no checkpoint was saved yet"):
        train(module, ToyData(), config(tmp_path, **KIND, save_every=1), Accelerator(cpu=True))
    assert not rotation.steps(tmp_path)
