"""Packed rows keep their documents apart; splits and alignment put contexts where they are asked to stand."""

import json

import pytest
import torch
from conftest import VOCAB, tiny

from gatekv.gates.documents import Documents
from gatekv.passes import Relaxed
from gatekv.training.data import TrainingData
from gatekv.training.packing import Row, collate, joined


class Letters:
    """A tokenizer whose tokens are characters."""

    chat_template = "<|im_start|>"

    def __call__(self, text, add_special_tokens=False):
        return type("Encoding", (), {"input_ids": [ord(c) % 90 + 1 for c in text]})()


DOCUMENTS = [chr(97 + i % 26) * (7 * i % 90 + 5) for i in range(40)] + ["a long one " * 300]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": d}) for d in DOCUMENTS))
    return str(path)


def data(file, length=200, **changes):
    options = dict(retrieval_share=0.0, answer_weight=20.0, seed=0, pack=True)
    return TrainingData(Letters(), [file], length, **{**options, **changes})


def test_rows_are_filled_with_documents(file):
    rows, known = [data(file)[i] for i in range(40)], [Letters()(d).input_ids for d in DOCUMENTS]
    assert all(sum(r.lengths) == len(r.ids) == len(r.weights) and 184 < len(r.ids) <= 200 for r in rows)
    assert sum(len(r.lengths) > 1 for r in rows) > 20
    for r in rows:
        pieces = torch.tensor(r.ids).split(r.lengths)
        assert all(p.tolist() in known for p in pieces[:-1]), "only the last one is cut"
        assert all(p[-1] == 0 and all(p[:-1] == 1) for p in torch.tensor(r.weights).split(r.lengths))
    assert data(file)[3] == rows[3] != rows[4]


def test_rows_that_hold_every_document_end_there(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("first", "second", "third")))
    row = data(str(tmp_path / "a.jsonl"))[0]
    assert sorted(row.lengths) == [5, 5, 6], "none twice"


def test_rows_with_facts_are_one_document(file):
    rows = [data(file, 900, retrieval_share=1.0)[i] for i in range(5)]
    assert all(r.lengths == [len(r.ids)] for r in rows)


def test_segments_positions_and_borders(file):
    batch = data(file).batch(0, 6)
    real = batch["attention_mask"].bool()
    assert ((batch["segments"] == -1) == ~real).all()
    for r in range(6):
        for s in range(int(batch["segments"][r].max()) + 1):
            inside = batch["segments"][r] == s
            assert batch["position_ids"][r, inside].tolist() == list(range(int(inside.sum())))
            assert batch["weights"][r, inside][-1] == 0
    assert "segments" not in data(file, pack=False).batch(0, 2)


@pytest.mark.parametrize("align", [False, True])
@torch.no_grad()
def test_packed_documents_get_the_logits_they_get_alone(align):
    model, generator = tiny(), torch.Generator().manual_seed(0)
    rows = []
    for lengths in ((11, 1, 20), (7, 9), (30,)):
        documents = [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]
        ids, weights, lengths = joined(documents)
        rows.append((documents, Row(ids, weights, len(ids) // 2, lengths)))
    batch = collate([r for _, r in rows], align)
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    assert logits.isfinite().all()
    for r, (documents, _) in enumerate(rows):
        for s, document in enumerate(documents):
            alone = model(torch.tensor([document]), use_cache=False).logits[0]
            assert (logits[r, batch["segments"][r] == s] - alone).abs().max() < 1e-9


def test_splits(file):
    plain = data(file, pack=False)
    shares = [plain[i].split / len(plain[i].ids) for i in range(200)]
    assert 0.5 <= min(shares) < 0.52 and 0.88 < max(shares) <= 0.9
    assert plain[5] == data(file, pack=False)[5] and plain[5].split != data(file, pack=False, seed=1)[5].split
    letters = Letters()
    for i in range(10):
        row = data(file, 900, retrieval_share=1.0)[i]
        header, query = letters("<|im_start|>user\n").input_ids, letters("\n\n").input_ids
        assert row.ids[: len(header)] == header and row.ids[row.split : row.split + 2] == query
        assert row.weights[: row.split] == [1.0] * row.split, "no answer inside the context"


@pytest.mark.parametrize("pack", [False, True])
def test_aligned_rows_split_at_one_column(file, pack):
    rows = data(file, 900, retrieval_share=0.5, pack=pack)
    plain, aligned = rows.batch(0, 8), rows.batch(0, 8, align=True)
    assert plain["split"].tolist() == [rows[i].split for i in range(8)]
    column = int(plain["split"].max())
    assert aligned["split"].tolist() == [column] * 8
    width = aligned["input_ids"].shape[1]
    assert width == column + max(len(rows[i].ids) - rows[i].split for i in range(8))
    for r in range(8):
        row = rows[r]
        real = aligned["attention_mask"][r].bool()
        assert aligned["input_ids"][r, real].tolist() == row.ids
        assert aligned["weights"][r, real].tolist() == row.weights and not aligned["weights"][r, ~real].any()
        assert int(real[:column].sum()) == row.split
        assert real.nonzero()[-1] - real.nonzero()[0] + 1 == len(row.ids), "one piece"
        assert (
            aligned["position_ids"][r, real].tolist()
            == plain["position_ids"][r, plain["attention_mask"][r].bool()].tolist()
        )


def packed_and_apart(lengths=((20, 31, 9), (44,))):
    """The same documents as packed rows and one to a row."""
    generator = torch.Generator().manual_seed(0)
    documents = [[torch.randint(1, 97, (n,), generator=generator).tolist() for n in row] for row in lengths]
    packed = collate([Row(*joined(row)[:2], 1, joined(row)[2]) for row in documents])
    apart = collate([Row(*joined([d])[:2], 1, [len(d)]) for row in documents for d in row])
    del apart["segments"]
    return packed, apart


def test_documents_apart_and_together():
    packed, apart = packed_and_apart()
    documents = Documents(packed["segments"])
    assert torch.equal(documents.valid, apart["attention_mask"].bool())
    x = torch.randn(2, 60, 3)
    assert documents.apart(x).shape == (4, 44, 3)
    assert torch.equal(documents.apart(x)[1, :31], x[0, 20:51]) and not documents.apart(x)[1, 31:].any()
    back = documents.together(documents.apart(x))
    real = packed["segments"] >= 0
    assert torch.equal(back[real], x[real]) and not back[~real].any()
    y = x.movedim(1, 2)
    assert torch.equal(documents.apart(y, 2).movedim(2, 1), documents.apart(x))


@pytest.mark.parametrize("gate", ["linear", "mlp", "key_mlp", "attention"])
@pytest.mark.parametrize("sparsity,oracle", [("budget", 0.3), ("abs", 0.0)])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_rows_train_as_unpacked_ones(gate, sparsity, oracle, family):
    """Attention, gates, sinks, windows, rates and thresholds all end at a document's border."""
    from test_training import make

    seen = []
    for batch in packed_and_apart():
        module = make(sparsity=sparsity, gate=gate, oracle_weight=oracle, family=family, dtype=torch.float64)
        rows, asked = module._prepare(batch, None)
        teacher = module._teacher(rows, 0.5, asked)
        student, said = module._student(rows, teacher, Relaxed(**asked, form="log", threshold=teacher.thresholds))
        logits = torch.stack([o.logits for o in said.values()])
        out = module(batch, 0.5)
        seen.append((teacher.hidden, student, teacher.oracle, logits, out["keep"], out["gap"]))
    (packed_teacher, packed_student, *a), (teacher, student, *b) = seen
    documents = Documents(packed_and_apart()[0]["segments"])
    real = documents.valid
    for x, y in ((packed_teacher, teacher), (packed_student, student)):
        torch.testing.assert_close(documents.apart(x)[real], y[real], rtol=1e-9, atol=1e-9)
    for x, y in zip(a, b):
        x, y = (t.masked_fill(~real[:, None], 0) if t.dim() == 4 else t for t in (x, y))
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    assert (packed_student - packed_teacher).abs().max() > 1e-3


def test_a_layers_own_error_counts_every_document():
    from test_training import make

    errors = []
    for batch in packed_and_apart(((20,), (31,))):
        module = make("attention_mse", "budget", "layer", dtype=torch.float64)
        rows, asked = module._prepare(batch, None)
        teacher = module._teacher(rows, 0.5, asked)
        errors.append(teacher.said[0].error.item())
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


def test_packing_is_for_flags_that_act_as_tokens_pass():
    from gatekv.training.config import CPTConfig

    with pytest.raises(ValueError, match="prefill='sparse'"):
        CPTConfig(**{"pack": True, "prefill": "dense"})
