"""Reports: pictures of full and degenerate results, keep maps that equal the cache's flags, a page that cannot leak."""

import html.parser
import json
import re

import numpy
import pytest
import torch
from conftest import gated, tiny
from letters import letters
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import gatekv
from gatekv import report
from gatekv.evaluation import keepmap
from gatekv.recipes import report as report_recipe
from gatekv.report.page import HERE, embed
from gatekv.report.style import styles

POLICIES = ["gate+global", "gate", "snapkv", "snapkv+ada", "l2", "sinks_recent", "random", "untrained+global"]
HOSTILE = ["</script>", "<script>alert(1)</script>", "<!--<script>", '"><img src=x onerror=alert(1)>', "\u2028", "&lt;"]


def row(policy, budget, task="niah_multikey", score=0.5, **more):
    out = {"policy": policy, "budget": budget, "task": task, "mode": "agnostic", "seed": 0, "score": score, "n": 20}
    out |= {"kl": 0.1 if task == "ppl" else None, "bytes_ratio": budget * 1.01, "bytes_ratio_end": budget * 1.1}
    return out | {"ci_low": score - 0.1, "ci_high": score + 0.1} | more


def full_results():
    cells = [{"depth": d / 4, "tokens": t, "score": d / 4, "n": 5} for d in range(5) for t in (512, 1024, 2048)]
    rows = [row("full", 1.0, task) for task in ("niah_multikey", "ppl", "passkey")]
    rows += [row(p, b, task) for task in ("niah_multikey", "ppl") for p in POLICIES for b in (0.5, 0.25, 0.0625)]
    rows += [row(p, 0.25, "passkey", cells=cells) for p in POLICIES[:5]]
    rows.append(row("l2", 0.03, score=0) | {"score": None, "kl": None, "n": 0, "refused": "below the 36 protected"})
    run = {"commit": "abc1234", "versions": {"gatekv": "0", "torch": "2"}, "command": "python recipes/evaluate.py"}
    return {"rows": rows, "comparisons": [], "run": run}


def some_maps(tokens, layers=2, heads=3):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: keepmap.pack(torch.rand(layers, heads, len(tokens), generator=generator) < 0.4)  # noqa: E731
    entries = [
        {"policy": p, "budget": b, "ratio": b, "keep": draw()} for p in ("snapkv", "random") for b in (0.5, 0.25)
    ]
    out = {"tokens": tokens, "layers": layers, "heads": heads, "layer_indices": list(range(layers))}
    return out | {"maps": entries, "refused": []}


def byte_tokenizer():
    """A real byte-level tokenizer without merges: every character above 127 is split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def is_png(path):
    return path.read_bytes()[:4] == b"\x89PNG"


class Page(html.parser.HTMLParser):
    """What a browser would find: elements, attributes, and the text of each script."""

    def __init__(self, path):
        super().__init__(convert_charrefs=False)
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"
        self.scripts += [""] * self.inside

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def test_pictures_of_full_results(tmp_path):
    results = full_results()
    report.frontier(results, tmp_path / "frontier.png")
    assert report.needle(results, tmp_path / "needle.png") and report.keep(some_maps(["a"] * 9), tmp_path / "keep.png")
    assert all(is_png(tmp_path / f"{name}.png") for name in ("frontier", "needle", "keep"))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row("full", 1.0)],
        [row("full", 1.0), row("l2", 0.25) | {"score": None, "kl": None, "refused": "no"}],
        [row("snapkv", 0.25)],
        [row("snapkv", 0.25, "ppl", score=2.5)],
        [row("snapkv", 0.25, "passkey", cells=[{"depth": 0.5, "tokens": 64, "score": 1.0, "n": 1}])],
        [row("snapkv", 0.25, "ruler", cells=[{"family": "variables", "score": 1.0, "kl": None, "n": 1}])],
    ],
)
def test_pictures_and_page_of_degenerate_results(tmp_path, rows):
    report.frontier({"rows": rows}, tmp_path / "frontier.png")
    assert is_png(tmp_path / "frontier.png")
    has_cells = any(r.get("cells") and "depth" in r["cells"][0] for r in rows)
    assert report.needle({"rows": rows}, tmp_path / "needle.png") is has_cells is (tmp_path / "needle.png").exists()
    report.page({"rows": rows}, None, tmp_path / "report.html")
    data = Page(tmp_path / "report.html").data
    assert data["maps"] is None and len(data["needles"]) == has_cells and len(data["rows"]) == len(rows)
    assert not report.bits({"maps": []}, tmp_path / "bits.png") and not (tmp_path / "bits.png").exists()
    assert not report.keep({"maps": []}, tmp_path / "keep.png") and not (tmp_path / "keep.png").exists()


def test_fifteen_policies_stay_apart():
    names = POLICIES + ["gate+ada", "snapkv+global", "value_norm", "h2o", "tova", "keydiff", "pyramid"]
    looks = styles(names)
    assert len({(s["color"], s["marker"], tuple(s["dash"])) for s in looks.values()}) == len(names)
    blues = [n for n, s in looks.items() if s["color"][0] == "#1f5fbf"]
    assert sorted(blues) == ["gate", "gate+ada", "gate+global"]
    assert looks == styles(names)


def test_page_holds_its_data_and_reaches_for_nothing(tmp_path):
    results, maps = full_results(), some_maps(["one", " two", "\n"])
    report.page(results, maps, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert [r["policy"] for r in page.data["rows"]] == [r["policy"] for r in results["rows"]]
    assert page.data["maps"] == maps and page.data["run"] == results["run"] and len(page.data["needles"]) == 5
    assert page.data["needles"][0]["scores"][2] == [0.5, 0.5, 0.5]
    assert set(page.data["styles"]) == {"full", *POLICIES}
    assert len(page.scripts) == 2 and "__" not in "".join(re.findall(r"__[A-Z]+__", page.scripts[1]))
    for tag, attrs in page.tags:
        assert not {"src", "srcset", "action", "style"} & set(attrs), (tag, attrs)
        assert tag not in ("link", "iframe", "img", "object") and attrs.get("href", "#").startswith("#")
    for name in ("page.html", "page.css", "page.js"):
        source = (HERE / name).read_text(encoding="utf-8")
        assert not re.search(r"https?:|//\w+\.|@import|url\(|fetch\(|XMLHttp|WebSocket|innerHTML|eval\(", source), name
        assert len(source.splitlines()) <= 450, name


def test_hostile_text_stays_text(tmp_path):
    maps = some_maps(HOSTILE)
    results = {"rows": [row("<b>snapkv</b>", 0.5, score=0.3)], "run": {"command": HOSTILE[1], "commit": "__DATA__"}}
    report.page(results, maps, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.data["maps"]["tokens"] == HOSTILE and page.data["run"] == results["run"]
    clean = tmp_path / "clean.html"
    report.page({"rows": []}, None, clean)
    assert page.tags == Page(clean).tags, "no element came from the data"
    assert "<" not in embed({"x": HOSTILE})
    assert json.loads(embed({"x": [float("nan"), 1.5, (float("inf"),)]})) == {"x": [None, 1.5, [None]]}


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (4, 2, 8), (3, 3, 41)])
def test_packed_bits_come_back(shape):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    assert numpy.array_equal(keepmap.unpack(keepmap.pack(keep), shape), keep.numpy())
    with pytest.raises(ValueError, match="pass the shape that was packed"):
        keepmap.unpack(keepmap.pack(keep), (*shape, 99))


@pytest.mark.parametrize("text", ["plain words\n\n two", "café – 日本語 🙂🙂 end", "🙂", "\ufffd twice \ufffd\ufffd"])
def test_token_texts_join_to_the_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text).input_ids
    texts = keepmap.token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text
    cut = ids[:-1]  # possibly inside a character
    assert "".join(keepmap.token_texts(tokenizer, cut)) == tokenizer.decode(cut)


def test_keep_map_is_what_the_cache_says():
    model, tokenizer = gated(model=tiny(vocab_size=300), window=4, sinks=2), byte_tokenizer()
    ids = tokenizer("The castle costs exactly 12345 coins – naïve, and so on it goes for a while.").input_ids
    maps = keepmap.keep_map(model, tokenizer, ids, ["gate+global", "snapkv+ada", "gate", "random"], [0.5, 0.25])
    shape = (2, 3, len(ids))
    assert (maps["layers"], maps["heads"], len(maps["tokens"])) == shape and maps["layer_indices"] == [0, 1]
    assert json.loads(json.dumps(maps)) == maps
    assert [(m["policy"], m["budget"]) for m in maps["maps"]] == [
        ("gate+global", 0.5),
        ("gate+global", 0.25),
        ("snapkv+ada", 0.5),
        ("random", 0.5),
    ]
    for m in maps["maps"]:
        want = gatekv.flags(model, torch.tensor([ids]), policy=m["policy"], budget=m["budget"])[:, 0]
        assert numpy.array_equal(keepmap.unpack(m["keep"], shape), want.numpy()) and 0 < m["ratio"]
    refused = {(r["policy"], r["budget"]): r["refused"] for r in maps["refused"]}
    assert set(refused) == {("gate", 0.5), ("gate", 0.25), ("snapkv+ada", 0.25), ("random", 0.25)}
    assert "calibrated thresholds" in refused["gate", 0.5] and "below the 36" in refused["random", 0.25]


def test_a_threshold_gate_gets_a_prefill_of_its_own():
    model, tokenizer = gated(model=tiny(vocab_size=300), window=4, sinks=2), byte_tokenizer()
    ids = torch.tensor([tokenizer("a text that is long enough to lose some of its tokens").input_ids])
    maps = keepmap.keep_map(model, tokenizer, ids, ["gate"], [None])
    want = gatekv.flags(model, ids, policy="gate")[:, 0]
    assert numpy.array_equal(keepmap.unpack(maps["maps"][0]["keep"], tuple(want.shape)), want.numpy())


def test_keep_map_names_what_is_wrong():
    model, tokenizer = tiny(vocab_size=300), byte_tokenizer()
    with pytest.raises(ValueError, match="Did you mean 'snapkv'"):
        keepmap.keep_map(model, tokenizer, [1, 2], ["snapkw"], [0.5])
    with pytest.raises(ValueError, match="untrained.*leave it out"):
        keepmap.keep_map(model, tokenizer, [1, 2], ["untrained+global"], [0.5])
    for ids in ([], [[1, 2], [3, 4]]):
        with pytest.raises(ValueError, match="ids must be one text"):
            keepmap.keep_map(model, tokenizer, ids, ["l2"], [0.5])
    maps = keepmap.keep_map(model, tokenizer, [[1, 2, 3]], ["random", "gate+global"], [0.5])
    assert not maps["maps"] and "below" in maps["refused"][0]["refused"] and "adapter" in maps["refused"][1]["refused"]


@pytest.mark.parametrize("name,message", [("other.json", "has no rows"), ("absent.json", "is no file")])
def test_recipe_refuses_what_is_no_results_file(tmp_path, name, message):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=message) as error:
        report_recipe.main(["--results", str(tmp_path / name), "--out", str(tmp_path)])
    assert "\n" not in str(error.value)


def test_tables_say_what_the_rows_say():
    text = report.tables(full_results()["rows"])
    niah, ppl, passkey = text.split("\n\n## ")
    assert niah.startswith(
        "## `niah_multikey`, agnostic: n = 20, full cache .50\n\n| policy | 50 % | 25 % | 6.25 % | 3 % |"
    )
    assert "| `l2` | .50 | .50 | .50 | – |" in niah and "| `gate` | .50 | .50 | .50 |  |" in niah
    assert "KL to the full cache" in ppl and "| `gate` | .100 | .100 | .100 |  |" in ppl
    assert passkey.count("\n| `") == 5 and "| `gate+global` |  | .50 |  |  |" in passkey
    assert report.tables([row("full", 1.0, score=1.0), row("l2", 0.5, score=-1.25)]).count("| -1.25 |") == 1


@torch.no_grad()
def test_bits_of_a_text_are_mapped_and_drawn(tmp_path):
    model, ids = tiny(dtype=torch.float32, head_dim=64, hidden_size=384), list(range(1, 90)) * 3
    maps = keepmap.keep_map(model, letters(), ids, ["h2o+rate", "tova"], [0.1])
    coded, whole = maps["maps"]
    cache = gatekv.KVCache(model, "h2o+rate", 0.1, decode="keep")
    model(torch.tensor([ids]), past_key_values=cache)
    shape = (maps["layers"], maps["heads"], len(ids))
    wanted = torch.stack([bits[0] for bits in cache.bits()]).numpy()
    assert (keepmap.widths(coded["bits"], shape) == wanted).all() and "bits" not in whole
    assert (keepmap.unpack(coded["keep"], shape) == (wanted[..., 0] > 0)).all()
    assert report.bits(maps, tmp_path / "bits.png") and (tmp_path / "bits.png").stat().st_size > 5000
