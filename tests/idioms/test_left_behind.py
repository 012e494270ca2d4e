"""A step that ends in the middle leaves the gated layers as they were before it."""

import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from test_logit_head import batch_of, tiny

from gatekv import GateKVConfig
from gatekv.modules import base_model, wrappers
from gatekv.recompute import recompute_layers
from gatekv.training.joint import JointObjective
from gatekv.training.lesson import LessObjective
from gatekv.training.objective import Objective

OUT = torch.OutOfMemoryError("out of memory")
MAPS = dict(less_rank=4, less_hidden=8, less_dropout=0.0)


def gated(**spec):
    return get_peft_model(tiny("llama", torch.float32), GateKVConfig(**{"window": 4, "sinks": 2} | spec)).train()


def failing(model, at, monkeypatch):
    """The last layer's MLP fails when it is called for the at-th time. Returns weak references to what it was given."""
    mlp, seen = base_model(model).model.layers[-1].mlp, []
    forward = mlp.forward

    def fail(x):
        seen.append(weakref.ref(x))
        if len(seen) == at:
            raise OUT
        return forward(x)

    monkeypatch.setattr(mlp, "forward", fail)
    return seen


OBJECTIVES = {
    "kl": lambda: Objective(gated(), objective="kl", oracle_weight=0.3),
    "dense": lambda: Objective(gated(), objective="kl", prefill="dense"),
    "layers": lambda: Objective(gated(), objective="attention_mse", scope="layer"),
    "gumbel": lambda: Objective(gated(relaxation="gumbel"), objective="lm", sparsity="abs", kl_weight=1.0),
    "maps": lambda: LessObjective(gated(gate="none", **MAPS), "snapkv", "kl"),
    "joint": lambda: JointObjective(gated(**MAPS), "gate+global"),
}


@pytest.mark.parametrize("call", ["step", "soft_hard"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_pass_and_no_graph_outlives_a_step_that_fails(name, call, monkeypatch):
    objective, batch = OBJECTIVES[name](), batch_of(n=96, split=72)
    modes = [m.training for m in objective.model.modules()]

    def step():
        if call == "soft_hard":
            return objective.soft_hard(batch, 0.7)
        return objective(batch, 0.7, warm=name == "joint", seed=3)

    for at in range(1, 9):
        with monkeypatch.context() as patch:
            seen = failing(objective.model, at, patch)
            try:
                result = step()
            except torch.OutOfMemoryError as error:
                error.__traceback__ = None
                result = None
        assert [m.training for m in objective.model.modules()] == modes
        assert all(w.running is None for w in wrappers(objective.model)), f"call {at}"
        if result is not None:
            break
        gc.collect()
        assert not any(x() is not None for x in seen)
    assert 2 <= at < 9, "some calls failed, and in the end none did"


def test_the_step_after_is_what_it_would_have_been(monkeypatch):
    for recomputed in (False, True):
        objective, batch = Objective(gated(), objective="kl"), batch_of()
        if recomputed:
            recompute_layers(objective.model)
        loss = objective(batch, 0.5, seed=1)["loss"].detach()
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            failing(objective.model, 2, patch)
            objective(batch, 0.3, seed=1)
        assert torch.equal(objective(batch, 0.5, seed=1)["loss"].detach(), loss)
