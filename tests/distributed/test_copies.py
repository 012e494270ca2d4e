"""Two processes copy a run to the Hub: one of them does, and what goes wrong there leaves nobody waiting."""

import time

import pytest
from backends import end, save_base, start
from huggingface_hub import HfApi

from gatekv.training import rotation


@pytest.fixture
def processes(hub, tmp_path, monkeypatch):
    """Begin a run of recipes/cpt.py that is copied to `name`, its base on the Hub too."""
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    save_base(tmp_path / "base")
    HfApi().create_repo("alice/base", private=True)
    HfApi().upload_folder(repo_id="alice/base", folder_path=tmp_path / "base")
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    options = ["--model", "alice/base", "--dtype", "float32", "--sequence_length", "100", "--max_steps", "2"]
    options += ["--save_every", "1", "--window", "4", "--hidden", "8", "--retrieval_share", "0", "--target_keep", "0.5"]

    def run(name: str):
        where = ["--output_dir", str(tmp_path / "run"), "--push_to", name]
        return start(["recipes/cpt.py", *options, *where], "ddp", **environment)

    return run


@pytest.mark.exhaustive  # a minute of it is the Hub's client waiting before it tries again; one process: unit/test_upload.py
def test_one_of_two_processes_copies_the_run_and_a_copy_that_fails_ends_both_with_it_whole(hub, processes, tmp_path):
    both = processes("alice/run")
    limit = time.monotonic() + 240
    while "alice/run" not in hub.repos or not hub.files("alice/run"):
        assert time.monotonic() < limit and both[0].poll() is None, end(both)
        time.sleep(0.02)
    hub.cut_uploads = 10  # from here on: a checkpoint is there, the adapter will not be
    texts = end(both)
    assert [p.returncode for p in both] == [1, 0], texts
    assert "the adapter is whole in" in texts[0] and "hf upload alice/run" in texts[0]
    assert hub.files("alice/run").keys() == {f"last-checkpoint/{name}" for name in (rotation.TENSORS, rotation.STATE)}
    assert rotation.steps(tmp_path / "run") == [1, 2] and (tmp_path / "run" / "adapter_model.safetensors").is_file()
    made = [path for method, path in hub.log if method == "POST" and path == "/api/repos/create"]
    assert len(made) == 2, "the base's, and one for the run"


@pytest.mark.exhaustive
def test_both_hear_that_they_may_not_write(processes, tmp_path):
    both = processes("bob/run")
    texts = end(both)
    assert [p.returncode for p in both] == [1, 1], texts
    assert all("push_to='bob/run'" in text and "Traceback" not in text for text in texts), texts
    assert not (tmp_path / "run").exists()
