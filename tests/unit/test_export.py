"""Exported flags are the cache's, row for row, and carry what they are flags of."""

import numpy
import pytest
import torch
from conftest import gated, tiny
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import gatekv
from gatekv.recipes import export


@pytest.fixture
def folders(tmp_path):
    """(base with a tokenizer of characters, adapter, two texts)."""
    letters = Tokenizer(models.WordLevel({chr(i): i - 32 for i in range(32, 127)} | {"\n": 95}, unk_token=" "))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(tmp_path / "base")
    tiny(dtype=torch.float32).save_pretrained(tmp_path / "base")
    gated(dtype=torch.float32, window=4, sinks=2).save_pretrained(tmp_path / "adapter")
    texts = ["".join(chr(33 + (i * i + n) % 90) for i in range(length)) for n, length in ((0, 210), (7, 100))]
    for n, text in enumerate(texts):
        (tmp_path / f"{n}.txt").write_text(text)
    return tmp_path, texts


def exported(folder, *more):
    data = f"{folder / '0.txt'},{folder / '1.txt'}"
    export.main(["--model", str(folder / "base"), "--dtype", "float32", "--data", data, "--tokens", "64", "--budget", ".5",
                 "--out", str(folder / "out"), *more])  # fmt: skip
    found = []
    for path in sorted((folder / "out").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.append((file.get_tensor("input_ids"), file.get_tensor("keep"), file.metadata()))
    return found


def test_flags_are_the_caches(folders, monkeypatch):
    folder, texts = folders
    monkeypatch.setattr(export, "SHARD", 3)
    first, second = exported(folder, "--adapter", str(folder / "adapter"))
    ids = torch.cat([first[0], second[0]])
    assert ids.tolist() == [[ord(c) - 32 for c in t[a : a + 64]] for t, a in ((texts[0], 0), (texts[0], 64),
                                                                             (texts[0], 128), (texts[1], 0))]  # fmt: skip
    keep = numpy.unpackbits(torch.cat([first[1], second[1]]).numpy(), axis=-1).astype(bool)
    model = gated(dtype=torch.float32, window=4, sinks=2)
    for row, kept in zip(ids, keep):
        wanted = gatekv.flags(model, row[None].long(), policy="gate+global", budget=0.5)[:, 0]
        assert kept.shape == (2, 3, 64) and numpy.array_equal(kept, wanted.numpy()) and kept.mean() == 0.5
    assert first[2]["policy"] == "gate+global" and first[2]["layers"] == "0,1" and len(first[2]["adapter"]) == 64


def test_training_free_and_at_most_so_many_rows(folders):
    ((ids, keep, said),) = exported(folders[0], "--policy", "keydiff", "--rows", "2")
    assert len(ids) == len(keep) == 2 and said["policy"] == "keydiff" and said["adapter"] == ""


@pytest.mark.parametrize("more,match", [
    (["--tokens", "60"], "a multiple of 8"), (["--tokens", "640"], "as long as --tokens 640"), (["--rows", "0"], "at least"),
    (["--policy", "gates"], "Did you mean"), (["--budget", "1.5"], "budget"),
])  # fmt: skip
def test_what_cannot_be_exported_is_refused(folders, more, match):
    with pytest.raises((TypeError, ValueError), match=match):
        exported(folders[0], *more)
