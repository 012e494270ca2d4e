"""A round trip through the Hub's client, against a Hub on this machine: what is pulled is what was pushed, or says why."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import gated, padded_batch, tiny
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file

import gatekv
from gatekv import GateKVConfig, bases

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "adapter_model.safetensors"


def adapter(seed=0):
    base = tiny(dtype=torch.float32)
    return gated(model=base, dtype=torch.float32, window=5, sinks=2, seed=seed, task_type="CAUSAL_LM")


def pull(name="alice/gates", **kwargs):
    return PeftModel.from_pretrained(tiny(dtype=torch.float32), name, **kwargs)


def results(model):
    """(logits, flags) of a padded batch behind a compressed prompt."""
    ids, mask = padded_batch([60, 45])
    cache = gatekv.KVCache(model, "gate+global", 0.5)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, past_key_values=cache).logits
    return logits, gatekv.flags(model, ids[:1], policy="gate+global", budget=0.5)


def same(a, b):
    return torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x, y in zip(a[1], b[1]))


PULL = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM
sys.path.insert(0, {tests!r})
from test_hub import results
model = AutoPeftModelForCausalLM.from_pretrained("alice/gates", token="hf_alice").eval()
from safetensors.torch import save_file
logits, flags = results(model)
save_file({{"logits": logits}} | {{f"flags.{{i}}": f.contiguous() for i, f in enumerate(flags)}}, {out!r})
config = model.peft_config["default"]
print(json.dumps([config.base_model_name_or_path, config.revision]))
"""


def test_pushed_here_pulled_in_a_clean_process(hub, tmp_path):
    """Base and adapter from private repositories, an empty HF_HOME; logits and flags bit for bit."""
    from transformers import AutoModelForCausalLM

    tiny(dtype=torch.float32).push_to_hub("alice/base", private=True, token="hf_alice")
    base = AutoModelForCausalLM.from_pretrained("alice/base", token="hf_alice")
    model = gated(model=base, dtype=torch.float32, window=5, sinks=2, task_type="CAUSAL_LM")
    commit = hub.repos["alice/base"].branches["main"]
    model.push_to_hub("alice/gates", private=True, token="hf_alice")
    assert hub.repos["alice/gates"].private
    code = PULL.format(tests=str(Path(__file__).parent), out=str(tmp_path / "pulled.safetensors"))
    env = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["alice/base", commit], "the base is pinned"
    pulled = load_file(tmp_path / "pulled.safetensors")
    flags = [pulled[f"flags.{i}"] for i in range(len(pulled) - 1)]
    assert same(results(model), (pulled["logits"], flags))
    assert not any(path.endswith(".bin") for _, path in hub.log if "alice/gates" in path), "no pickle was asked for"


def test_revisions_branches_and_commits(hub):
    first, second = adapter(0), adapter(1)
    first.push_to_hub("alice/gates", token="hf_alice")
    commit = hub.repos["alice/gates"].branches["main"]
    second.push_to_hub("alice/gates", token="hf_alice", revision="try")  # to a repository that exists
    second.push_to_hub("alice/gates", token="hf_alice")
    assert same(results(pull()), results(second)) and same(results(pull(revision="try")), results(second))
    assert same(results(pull(revision=commit)), results(first)), "an adapter is pinned by its commit"
    with pytest.raises(ValueError, match="has no revision 'nope': name a branch"):
        GateKVConfig.from_pretrained("alice/gates", revision="nope")


def test_private_missing_and_mistyped_repositories_say_what_to_do(hub):
    adapter().push_to_hub("alice/gates", private=True, token="hf_alice")
    cure = "no repository on the Hub that you may read: check the name; for a private one pass token="
    for name, token in (("alice/gates", None), ("alice/gates", "hf_bob"), ("alice/none", "hf_alice"), ("a/b/c", None)):
        with pytest.raises(ValueError, match=cure):
            GateKVConfig.from_pretrained(name, token=token)
        with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):  # PEFT's word, before ours
            pull(name, token=token)
    assert GateKVConfig.from_pretrained("alice/gates", token="hf_alice").window == 5


def test_a_place_that_is_not_yours_is_refused_and_nothing_is_pushed(hub):
    model = adapter()
    for token in ("hf_bob", "hf_nobody"):
        with pytest.raises(OSError, match="40[13]"):
            model.push_to_hub("alice/gates", token=token)
    assert not hub.repos
    model.push_to_hub("alice/gates", token="hf_alice")
    with pytest.raises(OSError, match="403"):
        model.push_to_hub("alice/gates", token="hf_bob")


def test_an_upload_that_is_cut_leaves_the_repository_and_the_folder_as_they_were(hub, tmp_path):
    model = adapter()
    model.save_pretrained(tmp_path / "gates")
    before = {p.name: p.read_bytes() for p in (tmp_path / "gates").iterdir()}
    model.push_to_hub("alice/gates", token="hf_alice")
    commit, hub.cut_uploads = hub.repos["alice/gates"].branches["main"], 50
    other = adapter(1)
    with pytest.raises(RuntimeError, match=f"Error while uploading '{WEIGHTS}'"):
        other.push_to_hub("alice/gates", token="hf_alice")
    assert hub.repos["alice/gates"].branches["main"] == commit and same(results(pull()), results(model))
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "gates").iterdir()}
    hub.cut_uploads = 0
    other.push_to_hub("alice/gates", token="hf_alice")  # again, and it is whole
    assert same(results(pull()), results(other))


@pytest.mark.parametrize("case", ["flipped", "other", "cut"])
def test_a_file_served_otherwise_than_it_was_pushed_is_refused_and_again_is_cured(hub, case):
    model = adapter()
    model.push_to_hub("alice/gates", token="hf_alice")
    whole = hub.files("alice/gates")[WEIGHTS]
    flipped = whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]
    hub.served[WEIGHTS] = {"flipped": flipped, "other": b"x" * len(whole), "cut": whole[:-100]}[case]
    with pytest.raises((ValueError, OSError), match="force_download=True|Consistency check"):
        pull()
    hub.served.clear()
    assert same(results(pull(force_download=case != "cut")), results(model))


def test_a_repository_with_a_pickle_alone_is_refused_before_it_is_fetched(hub, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "boom",)

    adapter().push_to_hub("alice/gates", token="hf_alice")
    files = dict(hub.files("alice/gates"))
    del files[WEIGHTS]
    hub.repos["alice/gates"].commit("main", files | {"adapter_model.bin": pickle.dumps(Bomb())})
    hub.log.clear()
    with pytest.raises(ValueError, match="adapter_model.bin is a pickle, which gatekv never loads"):
        pull()
    assert not (tmp_path / "boom").exists()
    assert not any(method == "GET" and path.endswith(".bin") for method, path in hub.log), "looked for, not fetched"


def test_a_repository_with_both_gives_the_safetensors(hub):
    model = adapter()
    model.push_to_hub("alice/gates", token="hf_alice")
    hub.repos["alice/gates"].commit("main", hub.files("alice/gates") | {"adapter_model.bin": b"never read"})
    assert same(results(pull()), results(model))
    assert not any(path.endswith(".bin") for _, path in hub.log)


def test_what_was_pulled_once_loads_without_a_network(hub, monkeypatch):
    model = adapter()
    model.push_to_hub("alice/gates", token="hf_alice")
    pull()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(results(pull()), results(model))
    with pytest.raises(ValueError, match="not in the cache and cannot be downloaded"):
        GateKVConfig.from_pretrained("alice/others")


def test_what_is_cached_but_may_no_longer_be_read_is_refused_and_no_pickle_is_tried(hub):
    adapter().push_to_hub("alice/gates", private=True, token="hf_alice")
    pull(token="hf_alice")
    with pytest.raises(ValueError, match="no repository on the Hub that you may read"):
        pull()
    assert not any(path.endswith(".bin") for _, path in hub.log)


def test_a_hub_that_is_down_says_so(hub):
    adapter().push_to_hub("alice/gates", token="hf_alice")
    hub.down = True
    with pytest.raises(ValueError, match="cannot be downloaded .*503.*HF_HUB_OFFLINE=1"):
        GateKVConfig.from_pretrained("alice/gates")
    hub.server_close()
    hub.shutdown()
    with pytest.raises(ValueError, match="cannot be downloaded .*HF_HUB_OFFLINE=1"):
        GateKVConfig.from_pretrained("alice/gates")


def test_the_embedded_base_has_the_hubs_name_in_a_file_and_the_folders_here(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "checkpoints" / "SmolLM2-135M-Instruct"
    tiny(dtype=torch.float32).save_pretrained(folder)
    monkeypatch.setattr(bases, "FOLDER", folder)
    model = gated(model=AutoModelForCausalLM.from_pretrained(folder), dtype=torch.float32, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "gates")
    saved = json.loads((tmp_path / "gates/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == bases.HUB_NAME and saved["revision"] is None
    config = GateKVConfig.from_pretrained(tmp_path / "gates")
    assert config.base_model_name_or_path == str(folder), "where it was fetched it is used"
    assert config.to_dict()["base_model_name_or_path"] == bases.HUB_NAME, "and pushed again under the Hub's name"
    assert bases.local_name(bases.HUB_NAME, "a" * 40) == bases.HUB_NAME, "pinned weights are those of the Hub"
    shutil.rmtree(folder)
    assert GateKVConfig.from_pretrained(tmp_path / "gates").base_model_name_or_path == bases.HUB_NAME
    assert bases.public_name("/data/some/model") == "/data/some/model" and bases.public_name(None) is None


def test_the_embedded_base_is_what_the_fetch_script_makes():
    from gatekv import fetch

    assert (bases.HUB_NAME, bases.FOLDER) == (fetch.HUB_NAME, fetch.FOLDER)
