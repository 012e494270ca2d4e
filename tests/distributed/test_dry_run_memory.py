"""What a dry run says of two processes is what each of them holds."""

import json

import pytest
from backends import chosen_of, launch


@pytest.mark.parametrize("backend", chosen_of([("ddp",), ("zero2",), ("zero3",), ("fsdp2",)], {("fsdp2",)}))
def test_each_process_holds_what_was_predicted(tmp_path, backend):
    launch("holder.py", backend, tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    said, found = result["said"], result["found"]
    assert len(found) == 5
    for part, size in found.items():
        assert said[part] == pytest.approx(size, rel=0.1), part
    assert said["total"] == pytest.approx(sum(found.values()), rel=0.1)
    # Whatever there is, known to the lines above or not: only ZeRO-3 holds gradients between steps.
    staying = said["frozen"] + said["trained"] + said["optimizer"] + said["gradients"] * (backend == "zero3")
    assert staying == pytest.approx(result["between_steps"], rel=0.1)
