"""Sources: weights, names, and streamed sets whose rows depend on (seed, index) alone, at bounded memory."""

import codecs
import csv
import gzip
import json
import warnings
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gatekv.training import sources
from gatekv.training.data import TrainingData
from gatekv.training.sources import open_source, read_source, weighted
from gatekv.training.streams import RESERVED, Corpus, HubSource

load_dataset = datasets.load_dataset


class Words:
    """A tokenizer whose tokens are words."""

    chat_template = ""

    def __call__(self, text, add_special_tokens=False):
        return type("Encoding", (), {"input_ids": [sum(map(ord, w)) % 90 + 1 for w in text.split()]})()


def document(i: int) -> str:
    return f"Document {i} begins here. " + f"It says {i} again. " * (i % 5)


def jsonl(folder, sizes):
    """A streamed set of one jsonl file a size; its documents are numbered through."""
    files, start = [], 0
    for size in sizes:
        path = folder / f"{len(files)}.jsonl"
        path.write_text("\n".join(json.dumps({"text": document(i)}) for i in range(start, start + size)) + "\n")
        files.append(str(path))
        start += size
    return load_dataset("json", data_files=files, split="train", streaming=True)


def parquet(folder, size, group):
    table = pyarrow.table({"content": [document(i) for i in range(size)], "id": list(range(size))})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=group)
    return load_dataset("parquet", data_files=str(folder / "a.parquet"), split="train", streaming=True)


def source(stream, column="text", **changes):
    return HubSource(stream, column, "a/set", **{**dict(rows=4, seed=0, limit=1000, documents=10), **changes})


def numbers(corpus: Corpus) -> list[int]:
    return [int(corpus[i].split()[1]) for i in range(len(corpus))]


@pytest.mark.parametrize("entries,weights", [
    (["a", "b"], {"a": 1, "b": 1}), (["a=0.3", "b=2", "c=0"], {"a": 0.3, "b": 2}), (["a", "a"], {"a": 2}),
    (["org/set:name=1e-1"], {"org/set:name": 0.1}),
])  # fmt: skip
def test_weights(entries, weights):
    assert weighted(entries) == weights


@pytest.mark.parametrize("entry", ["a=-1", "a=x", "a=", "a=nan", "a=inf", "=1"])
def test_bad_weights_name_their_entry(entry):
    with pytest.raises(ValueError, match=f"'{entry}'.*name=0.3"):
        weighted(["b", entry])
    with pytest.raises(ValueError, match="'a=0', 'b=0.0'.*above 0"):
        weighted(["a=0", "b=0.0"])


def test_a_file_may_have_a_sign_in_its_name(tmp_path):
    (tmp_path / "k=3.txt").write_text("text")
    name = str(tmp_path / "k=3.txt")
    assert weighted([name]) == {name: 1} and weighted([name + "=3"]) == {name: 3}
    assert read_source(name) == "text"


def test_rows_follow_the_weights(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 3000)
    data = TrainingData(Words(), [f"{tmp_path}/a.txt=1", f"{tmp_path}/b.txt=3"], 64, retrieval_share=0,
                        answer_weight=1, seed=0)  # fmt: skip
    count = Counter(data[i].ids[0] for i in range(400))
    assert 0.2 < count[ord("a") % 90 + 1] / 400 < 0.3


def test_documents_are_the_text_in_pieces():
    corpus = Corpus(["one", "  ", None, "two\n\nand", "three"])
    assert [corpus[i] for i in range(len(corpus))] == ["one", "two\n\nand", "three"]
    assert corpus.text == "one\n\ntwo\n\nand\n\nthree"


def test_blocks_are_runs_of_the_stream_and_start_over_at_its_end(tmp_path):
    s = source(jsonl(tmp_path, [35]))
    assert numbers(s.corpus(RESERVED[0])) == list(range(10)), "block 0 is for the rows that judge"
    assert [numbers(s.corpus(i))[0] for i in range(16)] == [10] * 4 + [20] * 4 + [30] * 4 + [0] * 4
    assert numbers(s.corpus(8)) == list(range(30, 35)), "the last block is what is left"
    assert numbers(s.corpus(4 * 1002)) == numbers(source(jsonl(tmp_path, [35])).corpus(4 * 1002)) == list(range(30, 35))


@pytest.mark.parametrize("make,column", [
    (lambda p: jsonl(p, [35, 3, 50]), "text"), (lambda p: jsonl(p, [20]), "text"), (lambda p: parquet(p, 95, 30), "content"),
    (lambda p: jsonl(p, [2] * 20), "text"),
])  # fmt: skip
@pytest.mark.parametrize("many", [512, 2])
def test_what_a_row_reads_does_not_depend_on_what_was_read(tmp_path, monkeypatch, make, column, many):
    monkeypatch.setattr(HubSource, "MANY", many)  # 2: shards are not kept open
    through = source(make(tmp_path), column)
    order = [numbers(through.corpus(i)) for i in range(80)]
    for i in (79, 3, 41, 40, 0, 62):
        assert numbers(source(make(tmp_path), column).corpus(i)) == order[i]
        assert numbers(through.corpus(i)) == order[i]
    size = {"text": sum(1 for _ in make(tmp_path)), "content": 95}[column]
    assert len({n for found in order for n in found}) > 0.8 * size, "the set is read, not a corner of it"
    other = source(make(tmp_path), column, seed=2)
    assert through.shards == 1 or [numbers(other.corpus(i)) for i in range(80)] != order


def test_row_groups_are_shards(tmp_path):
    assert source(parquet(tmp_path, 95, 30), "content").shards == 4
    assert source(jsonl(tmp_path, [2] * 20)).shards == HubSource.CURSORS


def count_reads(monkeypatch) -> list[str]:
    """Every document that is read from here on."""
    read = []
    texts = HubSource.__init__.__globals__["texts"]

    def counted(*args):
        for text in texts(*args):
            read.append(text)
            yield text

    monkeypatch.setitem(HubSource.__init__.__globals__, "texts", counted)
    return read


def test_reading_on_skips_nothing_and_holds_two_blocks(tmp_path, monkeypatch):
    read = count_reads(monkeypatch)
    s = source(jsonl(tmp_path, [200, 200]))
    for i in range(4 * 30):
        s.corpus(i)
        assert len(s.held) <= 2
    assert len(read) == 31 * 10


def test_long_documents_are_cut(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "word " * 1000}))
    s = source(load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", streaming=True))
    assert len(s.corpus(0).text) == 1000


def test_shards_without_text_are_passed_over(tmp_path):
    for name, text in (("a", " "), ("b", "here "), ("c", "")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    files = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    s = source(load_dataset("json", data_files=files, split="train", streaming=True))
    assert all(s.corpus(i).text == "here " for i in range(20))
    with pytest.raises(ValueError, match="'a/set' holds no text in column 'text'"):
        source(load_dataset("json", data_files=files[:1], split="train", streaming=True))


def test_errors_name_the_set(tmp_path):
    with pytest.raises(ValueError, match="'a/set' has no column 'text'; it has content, id: name one as name:"):
        source(parquet(tmp_path, 5, 5))

    def broken(i):
        raise OSError("no route")

    with pytest.raises(ConnectionError, match="'a/set' broke off in block 0: no route"):
        source(jsonl(tmp_path, [35]).map(broken))


def test_hub_names_carry_a_configuration_and_a_column(tmp_path, monkeypatch):
    asked = []

    def fake(name, configuration, **options):
        asked.append((name, configuration, options))
        return parquet(tmp_path, 95, 30)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    rows = [TrainingData(Words(), ["org/set-v1.5:sample-10BT:content=0.5"], 64, retrieval_share=0.5, answer_weight=1, seed=0)
            for _ in range(2)]  # fmt: skip
    assert asked[0] == ("org/set-v1.5", "sample-10BT", {"split": "train", "streaming": True})
    assert rows[0][9] == rows[1][9] and rows[0][9] != rows[0][10]
    assert read_source("org/set::content", max_documents=3).startswith("Document 0 begins here")
    assert asked[-1][:2] == ("org/set", None)
    with pytest.raises(ValueError, match="too many colons"):
        open_source("a:b:c:d", 64, 0)


def test_local_files_have_columns_too(tmp_path):
    parquet(tmp_path, 5, 5)
    assert read_source(f"{tmp_path}/a.parquet::content").startswith("Document 0")
    with pytest.raises(ValueError, match="no column 'text'; it has content, id"):
        read_source(f"{tmp_path}/a.parquet")


def test_without_the_extra_the_error_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install gatekv\[data\]"):
        sources.open_source("org/set", 64, 0)


@pytest.mark.parametrize("sizes,most", [([60] * 8, 480), ([2] * 600, 40)])
def test_a_resumed_run_reads_the_same_rows_and_where_shards_are_many_little_more(tmp_path, monkeypatch, sizes, most):
    """Rows 100 … of a set opened anew are those of one that was read through; `most` documents are read for them."""
    monkeypatch.setattr(sources, "BLOCK_TOKENS", 4 * 64)
    monkeypatch.setattr(sources, "_open_stream", lambda *args: jsonl(tmp_path, sizes))
    monkeypatch.setattr(HubSource, "FOOTERS", 0)
    options = dict(retrieval_share=0, answer_weight=1, seed=3)
    through = TrainingData(Words(), ["a/set"], 64, **options)
    wanted = [through.batch(i, 2) for i in range(0, 110, 2)][50:]
    read = count_reads(monkeypatch)
    resumed = TrainingData(Words(), ["a/set"], 64, **options)
    opened = len(read)
    for first, batch in zip(range(100, 110, 2), wanted):
        got = resumed.batch(first, 2)
        assert all((got[k] == batch[k]).all() for k in batch)
    assert 0 < len(read) - opened <= most


TEXT = 'Some words, "quoted".\u2028More\u2029words\x85and\x0bmore\x0cstill: é, 中, 😀.'


def line(text, **other) -> str:
    return json.dumps({"text": text} | other, ensure_ascii=False)


def written(path, data: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


READ = {
    "a.txt": TEXT + "\n\nSecond", "a.md": TEXT + "\r\n\r\nSecond",
    "a.jsonl": line(TEXT) + "\n" + line("Second") + "\n", "last.jsonl": line(TEXT) + "\n" + line("Second"),
    "crlf.jsonl": line(TEXT) + "\r\n\r\n" + line("Second") + "\r\n", "blank.jsonl": "\n\n" + line(TEXT) + "\n \n\n" + line("Second"),
    "raw.jsonl": line(TEXT).replace("\\u000b", "\x0b").replace("\\f", "\x0c") + "\n" + line("Second"),
    "strings.jsonl": json.dumps(TEXT) + '\n"Second"\n', "nulls.jsonl": "\n".join((line(TEXT), line(None), "null", line("Second"))),
    "joined.jsonl": line(TEXT) + "\n\ufeff" + line("Second"),
    "parts.jsonl": line([{"type": "text", "text": TEXT[:9]}, {"type": "text", "text": TEXT[9:], "image": None}]) + "\n" + line("Second"),
    "a.json": json.dumps([{"text": TEXT}, {"text": "Second"}], indent=1), "strings.json": json.dumps([TEXT, "Second"]),
    "lines.json": line(TEXT) + "\n" + line("Second"),
    "a.csv": 'id,text\r\n1,"' + TEXT.replace('"', '""') + '"\r\n\r\n2,Second\r\n',
}  # fmt: skip


@pytest.mark.parametrize("folder", ["", "deep/er"])
@pytest.mark.parametrize("form", ["", ".gz", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", READ)
def test_a_text_is_read_as_it_was_written(tmp_path, name, form, folder):
    data, suffix = READ[name].encode(form if form[:1] == "u" else "utf-8"), form if form[:1] == "." else ""
    path = written(tmp_path / "set" / folder / (name + suffix), data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_source(str(tmp_path / "set") if folder else path) == TEXT + "\n\nSecond"
    assert len(open_source(path, 64, 0).corpus(0)) == (1 if name in ("a.txt", "a.md") else 2)


def test_names_may_be_in_capitals_and_gzip_is_known_by_its_content(tmp_path):
    assert read_source(written(tmp_path / "A.TXT", gzip.compress(TEXT.encode()))) == TEXT
    (tmp_path / "b.jsonl.gz").write_text(line(TEXT))
    assert read_source(str(tmp_path / "b.jsonl.gz")) == TEXT


def test_a_field_of_a_csv_file_may_be_a_book(tmp_path):
    before = csv.field_size_limit()
    assert len(read_source(written(tmp_path / "a.csv", "text\n" + "a" * 200_000))) == 200_000
    assert csv.field_size_limit() == before


def test_a_folder_is_read_whole_and_what_is_left_out_is_named(tmp_path):
    for name in ("b/z.jsonl", "a.md", "c.txt.gz", "b/c/d.csv"):
        written(tmp_path / name, {"b/z.jsonl": line("jsonl"), "a.md": "md", "b/c/d.csv": "text\ncsv"}.get(name, "txt"))
    parquet(tmp_path / "b", 1, 1)
    (tmp_path / "b/a.parquet").rename(tmp_path / "b/a.bin")
    written(tmp_path / ".git/notes.txt", "hidden")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    with pytest.warns(
        UserWarning, match=r"left out \.git/notes\.txt, b/a\.bin, link; what is read is \.txt, \.md"
    ) as said:
        assert read_source(str(tmp_path)) == "md\n\ncsv\n\njsonl\n\ntxt"
    assert len(said) == 1
    for i in range(20):
        written(tmp_path / f"many/{i}.pdf", "x")
    with pytest.warns(UserWarning, match="17.pdf and 10 more;"), pytest.raises(ValueError, match="holds no text"):
        read_source(str(tmp_path / "many"))


@pytest.mark.parametrize("name,data,match", [
    ("a.jsonl", line("x") + "\n\n{oops\n", "line 3 is not JSON: .*; mend"), ("a.jsonl", line("x")[:-3], "line 1 is not JSON"),
    ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "line 1 is not JSON"), ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
    ("a.jsonl", "[\n" + line("x") + "\n]", "line 1 is not JSON.*is a .json file"),
    ("a.jsonl", '["x"]', "line 1 is no JSON object or text but an array: .* one array .json"),
    ("a.jsonl", line("x") + "\n3", "line 2 is a number, 3: a row is a text, or an object with one as"),
    ("a.jsonl", line("x") + '\n{"body": "x", "id": 1}', "line 2 has no column 'text'; it has body, id: name one as .*a.jsonl::column"),
    ("a.jsonl", line("x") + "\n" + line(3), "line 2, column 'text' is a number, 3: write it as one text"),
    ("a.jsonl", line(True), "line 1, column 'text' is a truth value, true: write"), ("a.jsonl", line({"a": 1}), "is an object with a: write"),
    ("a.jsonl", line(["x", "y"]), "is a list whose first element is a text: write"), ("a.jsonl", line([]), "is an empty list"),
    ("a.jsonl", line([{"type": "image", "url": "x"}]), "part 1 is of type 'image': only text can be learned; leave"),
    ("a.jsonl", line([{"role": "user", "content": "x"}]), "part 1 is an object with role, content"),
    ("a.jsonl", '{"text": "a\\ud83d"}', "holds .* half of a character, at 1: write"),
    ("a.jsonl", line(None) + "\n" + line(" "), "holds no text"), ("a.json", "", "holds no text"), ("a.csv", "", "holds no text"),
    ("a.json", '[{"text": "x"},\n{oops]', "a.json' is not JSON: .*line 2.*; mend"), ("a.json", line("x") + "\n{oops", "line 2 is not JSON"),
    ("a.json", '[{"text": "x"}, {"a": 1}]', "row 2 has no column"), ("a.json", '{"data": []}', "row 1 has no column 'text'; it has data"),
    ("a.csv", "id;text\n1;x", "line 2 has no column 'text'; it has id;text"), ("a.csv", "text,id\nx,1\na, b,2", "line 3 has 3 fields where line 1 names 2: .*quotes"),
    ("a.csv", "text,id\nx", "line 2 has 1 fields"), ("a.csv", 'text\n"open\nx', "is not CSV: unexpected end of data; close every quote"),
    ("a.csv", "text,text\nx,y", "line 1 names the column 'text' twice"),
    ("a.txt", "text\nna\xefve".encode("latin1"), r"a.txt' is no UTF-8 text \(byte 0xef at offset 7, line 2\).*iconv"),
    ("a.txt", b"\x89PNG\r\n\x1a\n", "is no UTF-8 text"), ("a.txt", b"abc\0def", "NUL characters.*else leave it out"),
    ("a.txt", "text".encode("utf-16-le"), "NUL characters, as .* UTF-16 without its mark: save it as UTF-8"),
    ("a.txt", codecs.BOM_UTF16_LE + b"a\0b", "is no UTF-16 text"), ("a.jsonl", b"\xff\xff", "is no UTF-8 text"),
    ("a.txt", gzip.compress(b"text" * 99, mtime=0)[:-9], "is gzipped, but broken"), ("a.txt", b"\x1f\x8bno", "is gzipped, but broken"),
    ("a.parquet", "text", "is no parquet file"), ("a.docx", "text", "is a file of no known kind; known are .txt, .*: rename or convert"),
    ("a.parquet.gz", "text", "is a file of no known kind"),
])  # fmt: skip
def test_what_cannot_be_read_rightly_is_refused_with_its_place_and_cure(tmp_path, name, data, match):
    path = written(tmp_path / name, data)
    for source in (path, str(tmp_path)) if sources.kind(name) else (path,):
        with pytest.raises(ValueError, match=match) as error:
            read_source(source)
        assert type(error.value) is ValueError and str(tmp_path) in str(error.value)


def test_columns_of_local_files_are_named_as_those_of_sets(tmp_path):
    path = written(tmp_path / "a.csv", "id,body\n1,x")
    assert read_source(f"{path}::body") == read_source(f"{tmp_path}::body") == "x"
    with pytest.raises(ValueError, match="has no configuration; name a column as .*a.csv::column"):
        read_source(f"{path}:body")
    with pytest.raises(ValueError, match=r"a \.txt file has no columns; leave 'body' out"):
        read_source(written(tmp_path / "a.txt", "x") + "::body")


@pytest.mark.parametrize(
    "values,match", [([1, 2], "is a number, 1"), ([["a"], ["b"]], "is a list whose first element is a text")]
)
def test_columns_that_are_no_texts_are_refused_in_tables_and_streams_too(tmp_path, values, match):
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    stream = load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=True)
    for read in (lambda: read_source(f"{tmp_path}/a.parquet"), lambda: source(stream)):
        with pytest.raises(ValueError, match=f"column 'text' {match}"):
            read()
