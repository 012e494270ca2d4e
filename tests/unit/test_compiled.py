"""torch.compile of what is trained, as `accelerate launch --dynamo_backend …` asks for it: the same loss and gradient."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, GradientState
from test_training import ToyData, config, make
from torch._dynamo.utils import counters

from gatekv.training import checkpoint, sharding


@pytest.fixture
def accelerator():
    """An accelerator that captures what it prepares, and compiles nothing; forgotten behind the test."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch._dynamo.reset()
        counters.clear()

    reset()
    yield Accelerator(dynamo_backend="eager")
    reset()


def test_a_captured_objective_has_the_same_loss_and_gradient(tmp_path, accelerator):
    found, batch = [], ToyData().batch(0, 1)
    for captured in (False, True):
        module = run = make(objective="lm", layers=1)  # capturing takes ten seconds a layer
        learning = checkpoint.trained(module)
        if captured:
            run, _ = sharding.prepare(accelerator, module, torch.optim.AdamW(learning.values()), config(tmp_path))
        assert counters["stats"]["unique_graphs"] == 0
        loss = run(batch, 0.5)["loss"]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in learning.values())])
    assert counters["stats"]["unique_graphs"] > 0
    for plain, same in zip(*found):
        torch.testing.assert_close(same, plain, rtol=1e-5, atol=1e-6)
    assert all(t.abs().sum() > 0 for t in found[0])


def test_what_is_sharded_is_not_compiled(tmp_path, accelerator):
    accelerator.state.distributed_type = DistributedType.FSDP
    with pytest.raises(ValueError, match="dynamo_backend=EAGER .*launch with --dynamo_backend no"):
        sharding.prepare(accelerator, make(), None, config(tmp_path))
