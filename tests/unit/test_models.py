"""Every type of model that transformers builds: served as recorded, refused with the recorded reason, or not tried.

The record, tests/fixtures/models.json, is written by `python tests/record_models.py`; docs/models.md is made from it.
A few types run in `make test`, all of them in `make test-all`.
"""

import re

import models_page
import pytest
import record_models
import torch
import transformers
import zoo
from peft import get_peft_model
from test_images import WRAPPERS

import gatekv
from gatekv import GateKVConfig
from gatekv.modules import wrappers

RECORD = models_page.read()
SAMPLE = {  # of each kind of attention one that is not in conftest.KINDS, which many tests run over
    "causal": "qwen3_5_text gemma4_text falcon_h1 gpt2 mimo_v2_flash gemma2 deepseek_v3 xglm diffllama",
    "image": "lfm2_vl",
}


def cases(status: str) -> list:
    """Types of one status that this transformers has; those outside the sample are exhaustive."""
    out = []
    for mapping, types in record_models.MAPPINGS.items():
        for model_type in types():
            if RECORD[mapping].get(model_type, {}).get("status") == status:
                marks = [] if model_type in SAMPLE[mapping].split() else [pytest.mark.exhaustive]
                out.append(pytest.param(mapping, model_type, marks=marks, id=f"{mapping}-{model_type}"))
    return out


SAME = transformers.__version__ == RECORD["transformers"]  # another version may build a type otherwise, or not at all


def built(mapping: str, model_type: str):
    entry = RECORD[mapping][model_type]
    try:
        return zoo.build(model_type, mapping == "image", getattr(torch, entry["dtype"]))
    except Exception as error:
        if SAME:
            raise
        pytest.skip(f"not to be built with transformers {transformers.__version__}: {error}")


@pytest.mark.parametrize("mapping,model_type", cases("served"))
def test_a_served_type_is_the_plain_model_at_a_full_budget_and_its_gates_learn(mapping, model_type):
    entry, model = RECORD[mapping][model_type], built(mapping, model_type)
    if SAME:
        assert entry["model"] == type(model).__name__
        assert entry["layers"] == record_models.layers_of(model), "run python tests/record_models.py"
        assert entry.get("traits", []) == record_models.traits_of(model), "run python tests/record_models.py"
    elif said := record_models.first_calls(model)[1]:
        pytest.skip(f"refused with transformers {transformers.__version__}: {said}")
    zoo.check(model)
    if entry["training"]:
        zoo.check_gates(built(mapping, model_type))
    else:
        assert entry["reason"] in record_models.first_calls(built(mapping, model_type), gates=True)[1]


def state(model) -> tuple:
    """What a refusal must leave as it was."""
    classes = [(name, type(module).__name__) for name, module in model.named_modules()]
    return classes, list(model.state_dict()), model.config.to_dict(), model.config._attn_implementation


@pytest.mark.parametrize("mapping,model_type", cases("refused"))
def test_a_refused_type_says_why_and_is_left_as_it_was(mapping, model_type):
    entry, model = RECORD[mapping][model_type], built(mapping, model_type)
    assert models_page.group_of(entry), "docs/models.md has no group for this reason"
    batch = zoo.inputs(model)
    answer = zoo.logits(model, batch, use_cache=False)  # first: BigBird changes its attention at a short text
    before = state(model)
    when, said = record_models.first_calls(model)
    if not SAME and said != entry["reason"]:
        pytest.skip(f"other words with transformers {transformers.__version__}: {said or 'served'}")
    assert (when, said) == (entry["when"], entry["reason"])
    assert state(model) == before and (when == "first call" or not wrappers(model))
    assert torch.equal(zoo.logits(model, batch, use_cache=False), answer)
    gatekv.detach(model)
    assert state(model) == before and not wrappers(model)
    if when == "made":  # an adapter is refused with the same words
        with pytest.raises(ValueError, match=re.escape(said)):
            get_peft_model(model, GateKVConfig())
        assert state(model) == before and not wrappers(model)
    else:
        assert record_models.first_calls(model, gates=True)[1]


@pytest.mark.parametrize("mapping", list(record_models.MAPPINGS))
def test_every_type_of_transformers_is_in_the_record(mapping):
    missing = [t for t in record_models.MAPPINGS[mapping]() if t not in RECORD[mapping]]
    assert not missing, (
        f"transformers {transformers.__version__} builds {', '.join(missing)} ({mapping}), and docs/models.md does not "
        f"say whether gatekv serves them: run `python tests/record_models.py {' '.join(missing)}`, then "
        "`python docs/tables.py`, and commit both. Where a tiny model cannot be made, see tests/zoo.py."
    )


def test_the_record_knows_which_types_ran_with_images():
    assert sorted(WRAPPERS) == sorted(t for t, entry in RECORD["image"].items() if entry.get("image"))


@pytest.mark.parametrize("mapping", list(record_models.MAPPINGS))
def test_the_record_is_whole(mapping):
    for model_type, entry in RECORD[mapping].items():
        assert entry["status"] in ("served", "refused", "not tried"), f"{model_type}: {entry['reason']}"
        if entry["status"] == "not tried":
            assert entry["reason"] == zoo.UNBUILT.get(model_type), model_type
        else:
            assert sum(entry["layers"].values()) > 0 and entry["model"]
        if entry["status"] == "refused":
            assert entry["when"] in ("made", "first call") and entry["reason"]
        if entry["status"] == "served":
            assert entry["since"] and entry["prefill"] and entry["decode"]
            assert entry["training"] or entry["reason"]
