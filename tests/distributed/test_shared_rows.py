"""Rows whose tokens and heads two processes share (gatekv.ops.sequence): losses, gradients and runs of whole rows."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType, ParallelismConfig
from backends import HERE, SHARING, chosen_of, end, launch, save_base, start, to_run
from conftest import tiny
from sharer import CASES, build
from test_training import ToyData
from test_two_processes import adapters_agree, compare

from gatekv.attention import valid_tokens
from gatekv.ops.sequence import ALONE, Sequence
from gatekv.training import shared
from gatekv.training.plain import PlainObjective
from gatekv.training.rows import Rows

RUNS = [(backend, "gate") for backend in SHARING] + [("sequence_ddp", "accumulated"), ("sequence_ddp", "recomputed")]
TWENTY, RESUMED = "test_twenty_steps_are_those_of_one_process", "test_resumed_is_uninterrupted"
CORE = {("sequence_zero2", "gate")}  # by launch/sequence.yaml, the file that the README names


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory) -> Path:
    """A folder for each backend, and one for a process alone, of what is trained there in 20 steps."""
    twenty, sources = to_run(request, TWENTY), [source for (source,) in to_run(request, RESUMED)]
    recipe = ["recipes:cpt"] * any(item.originalname == "test_the_recipe" for item in request.session.items)
    out, base = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("base")
    save_base(base, num_key_value_heads=2)
    for backend in ("single", *SHARING):
        (out / backend).mkdir()
        jobs = [job for b, job in twenty if backend in (b, "single")]
        jobs += ["gate"] if backend == "single" and sources else []
        tasks = [*dict.fromkeys(jobs)] + (recipe if backend in ("single", "sequence_zero2") else [])
        if backend in ("single", "sequence_ddp") and sources:
            tasks += ["gate:stop"]
        if backend == "sequence_ddp" and sources:
            shutil.copytree(out / "single" / "gate-stop", out / backend / "gate-of-one")
            tasks += [f"gate:{out / backend / source}" for source in sources]
        if tasks:
            launch("worker.py", backend, base, out / backend, *tasks)
    return out


@pytest.mark.parametrize("backend,job", chosen_of(RUNS, CORE))
def test_twenty_steps_are_those_of_one_process(backend, job, runs):
    compare(runs / "single" / job, runs / backend / job)


@pytest.mark.exhaustive
@pytest.mark.parametrize("source", ["gate-stop", "gate-of-one"])
def test_resumed_is_uninterrupted(source, runs):
    """From a checkpoint of shared rows, and from one of a single process."""
    compare(runs / "single" / "gate", runs / "sequence_ddp" / f"gate-resumed-{source}")


@pytest.mark.exhaustive
def test_the_recipe(runs):
    """With launch/sequence.yaml: calibration, and the row that is judged, too."""
    one, two = runs / "single" / "recipe-cpt", runs / "sequence_zero2" / "recipe-cpt"
    adapters_agree(one, two)
    a, b = (json.loads((f / "adapter_config.json").read_text())["calibration"]["table"] for f in (one, two))
    for row, wanted in zip(b, a, strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)
    found, wanted = (json.loads((f / "training.json").read_text())["soft_hard"] for f in (two, one))
    assert found == pytest.approx(wanted, abs=1e-5)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("shared") / "found.json"
    processes = start([str(HERE / "sharer.py"), str(out)], "ddp")
    errors = end(processes)
    assert not any(p.returncode for p in processes), errors[0][-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_whole_rows(case, found):
    result = found[case]
    assert result["size"] > 1e-5, "every tensor learns: else agreeing would mean little"
    assert result["gradient"] < 1e-9
    for key, (mine, whole) in result["values"].items():
        assert mine == pytest.approx(whole, rel=1e-6, abs=1e-6), key
    mine, whole = result["probe"]
    assert mine == pytest.approx(whole, rel=1e-5, abs=1e-6, nan_ok=True)


def launched(kind=DistributedType.MULTI_GPU, processes=4, **split):
    return SimpleNamespace(
        parallelism_config=ParallelismConfig(**split), distributed_type=kind, num_processes=processes
    )


@pytest.mark.parametrize("change,match", [
    ({"tp_size": 2}, "tp_size and cp_size"), ({"cp_size": 2}, "by sp_size"),
    ({"sp_size": 2, "kind": DistributedType.FSDP}, "not supported under FSDP2.*sequence.yaml"),
    ({"sp_size": 3}, "sp_size=3 must divide the number of processes, which is 4"),
])  # fmt: skip
def test_launches_that_cannot_share_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        shared.sequence_of(launched(**change))


def test_whole_rows_need_no_group():
    assert shared.sequence_of(SimpleNamespace(parallelism_config=None)) is ALONE
    assert shared.sequence_of(launched(dp_replicate_size=4)) is ALONE


@pytest.mark.parametrize("options,size,match", [
    ({}, 4, "sp_size=4 must divide the model's 2 KV heads"),
    ({"family": "gemma3"}, 2, "layers with a sliding window or a state"),
    ({"gate": "attention"}, 2, "gate='attention' reads other tokens"),
    ({"prefill": "dense"}, 2, "use prefill='sparse'"),
])  # fmt: skip
def test_what_cannot_be_shared_is_refused(options, size, match):
    objective = build(**options)
    with pytest.raises(ValueError, match=match):
        objective.share_rows(Sequence(None, 0, size))
    assert objective.sequence is ALONE


def test_eager_attention_is_refused():
    objective = build()
    objective.model.get_base_model().config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        objective.share_rows(Sequence(None, 0, 2))


def test_parts_differ_by_one_token_at_most():
    sequences = [Sequence(None, rank, 4).of(10) for rank in range(4)]
    assert sequences[0].parts() == [3, 3, 2, 2]
    row = torch.arange(10)[None]
    assert torch.equal(torch.cat([s.part(row, 1) for s in sequences], 1), row)
    assert all(s.part(row, 1).shape[1] == n for s, n in zip(sequences, sequences[0].parts()))


def test_a_process_alone_exchanges_nothing():
    x = torch.randn(1, 2, 3)
    for same in (ALONE.into(x), ALONE.out_of(x), ALONE.together(x, 1), ALONE.part(x, 1), ALONE.mean(x)):
        assert torch.equal(same, x)


def test_a_mask_is_made_only_where_one_is_needed():
    model, ones = tiny(), torch.ones(2, 5).long()
    whole = {"input_ids": ones, "attention_mask": ones, "position_ids": ones.cumsum(-1) - 1}
    one, two = torch.zeros(2, 5).long(), torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    assert Rows.of(whole, model).mask is None and Rows.of(whole | {"segments": one}, model).mask is None
    seen = Rows.of(whole | {"segments": two}, model).mask
    assert seen.shape == (2, 1, 5, 5) and seen[0, 0, 3].tolist() == [False, False, True, True, False]
    padded = {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.tensor([[0, 1, 1]])}
    assert valid_tokens(Rows.of(padded, model).mask, 1, 3, None).tolist() == [[False, True, True]]


def test_only_gates_share_rows(monkeypatch, tmp_path):
    from gatekv.training import loop

    monkeypatch.setattr(loop.shared, "sequence_of", lambda accelerator: Sequence(None, 0, 2))
    with pytest.raises(ValueError, match="PlainObjective computes whole rows"):
        loop.train(
            PlainObjective(build(lora={"r": 2}).model), ToyData(), SimpleNamespace(output_dir=str(tmp_path)),
            SimpleNamespace(num_processes=2),
        )  # fmt: skip
