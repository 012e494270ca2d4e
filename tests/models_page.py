"""The tables of models in README.md and docs/models.md, from tests/fixtures/models.json; docs/tables.py writes them."""

import json
import re
from pathlib import Path

FILE = Path(__file__).parent / "fixtures" / "models.json"
MAPPINGS = {"causal": "AutoModelForCausalLM", "image": "AutoModelForImageTextToText"}
# Families that people know -> the types behind the name. A row of the short table shows those of its kind.
NAMES = {
    "Llama 2, 3": "llama", "Llama 4": "llama4_text", "Mistral": "mistral", "Ministral": "ministral", "Mixtral": "mixtral",
    "Qwen 2.5": "qwen2", "Qwen 3": "qwen3", "Qwen 3 MoE": "qwen3_moe", "Qwen3-Next": "qwen3_next", "Qwen 3.5": "qwen3_5_text",
    "Qwen 3.5 MoE": "qwen3_5_moe_text", "Gemma": "gemma", "Gemma 2": "gemma2", "Gemma 3": "gemma3_text",
    "Gemma 3n": "gemma3n_text", "Gemma 4": "gemma4_text", "gpt-oss": "gpt_oss", "Phi-3, Phi-4": "phi3", "GLM-4": "glm4",
    "GLM-4.5": "glm4_moe", "OLMo 2": "olmo2", "OLMo 3": "olmo3", "SmolLM3": "smollm3", "Granite": "granite",
    "Granite 4 hybrid": "granitemoehybrid", "LFM2": "lfm2", "Falcon": "falcon", "Falcon-H1": "falcon_h1", "Jamba": "jamba",
    "Bamba": "bamba", "Zamba 2": "zamba2", "Nemotron-H": "nemotron_h", "MiniMax": "minimax", "MiMo-V2": "mimo_v2_flash",
    "Command R7B": "cohere2", "EXAONE 4": "exaone4", "StarCoder 2": "starcoder2", "GPT-2": "gpt2", "Pythia": "gpt_neox",
    "GPT-J": "gptj", "OPT": "opt", "BLOOM": "bloom", "MPT": "mpt", "Zaya": "zaya", "DeepSeek V2": "deepseek_v2",
    "DeepSeek V3": "deepseek_v3", "DeepSeek V3.2": "deepseek_v32", "DeepSeek V4": "deepseek_v4", "Kimi Linear": "kimi_linear",
    "MiniCPM 3": "minicpm3", "Mamba": "mamba", "Mamba 2": "mamba2", "RecurrentGemma": "recurrent_gemma",
}  # fmt: skip
STATES = ("Mamba", "recurrence", "linear attention", "convolution", "nothing")
# What a reason matches -> (its heading, what it would take to serve such a model); the first that fits.
GROUPS = {
    r"^no attention$": ("No attention at all", "nothing; a state does not grow"),
    r"caches one latent vector": (
        "Latent attention (MLA)",
        "a cache that evicts latent vectors: one decision for all heads of a layer",
    ),
    r"DynamicIndexedLayer": (
        "An indexer beside the attention",
        "index keys that leave with their tokens, and a selection that goes over what is left",
    ),
    r"remember something else": (
        "Memory of the model's own kind",
        "that each such memory can be copied, counted, saved and evicted from",
    ),
    r"computes attention by itself": (
        "Attention that does not go through transformers' interface",
        "a model in transformers that calls the attention interface; nothing is missing in gatekv",
    ),
    r"every layer of .* has a sliding window, or none": (
        "No layer whose cache grows",
        "nothing; the memory is bounded already",
    ),
    r"caps its attention scores": ("Softcapping", "the cap in every form of attention, kernels included"),
    r"in the mask": (
        "A bias or a weight inside the mask",
        "a bias that moves with the tokens that are kept",
    ),
    r"position_bias|adds a bias to its attention": ("A position bias", "a bias that moves with the tokens that are kept"),
    r"attention sinks that are not": ("Sinks of another form", "what they add to the softmax, in every form of attention"),
    r"chooses the keys": ("Queries that choose keys", "a selection that goes over what is left"),
    r"calls attention more than once": (
        "Several attentions in a layer over one cache",
        "one decision for several calls, and a window of queries for each",
    ),
    r"attention modules for layer|several layers share one": (
        "Attention modules and cache layers that do not pair",
        "a gate for each use of a shared module, or one for several modules",
    ),
    r"hands its attention|do not share them evenly|keys of shape": (
        "Keys that are changed between cache and attention",
        "a map from the heads in the cache to those that the attention is handed",
    ),
    r"is not causal": (
        "Attention that does not call itself causal",
        "decisions for a prompt that sees itself as a whole (PaliGemma, GIT); an encoder has nothing to evict",
    ),
    r"encoder-decoder": ("Encoder-decoders", "caches of two kinds; only the decoder's own grows"),
    r"its config does not say whose": ("Shared keys that the config does not name", "a config that says whose they are"),
    r"no cache but its own": (
        "A cache class that the model insists on",
        "a model in transformers that takes any cache",
    ),
    r"interrupted": (
        "A position bias that the attention reckons from the cache itself",
        "a bias that moves with the tokens that are kept; what is said is the message of another cause",
    ),
}  # fmt: skip


def read() -> dict:
    """The record."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def group_of(entry: dict) -> str | None:
    """Heading under which a refusal stands, or None."""
    attends = any(name.startswith(("full", "sliding", "chunked", "latent", "indexed")) for name in entry["layers"])
    known = all(name in STATES for name in entry["layers"])
    said = entry["reason"] if attends or not known else "no attention"
    return next((GROUPS[pattern][0] for pattern in GROUPS if re.search(pattern, said)), None)


def attention(entry: dict) -> str:
    """What the layers keep, in words: "full, sliding; learned sinks"."""
    kept = ", ".join(name for name in sorted(entry["layers"], key=order) if name != "nothing")
    return "; ".join([kept, *entry.get("traits", [])])


def order(kept: str) -> tuple:
    """Full attention first."""
    return not kept.startswith("full"), kept


def kind(entry: dict) -> str:
    """The row of the short table that a served type belongs to."""
    layers = set(entry["layers"]) - {"nothing", "cross-attention"}
    if "latent" in layers:
        return "latent attention"
    if "shared" in layers:
        return "layers that share keys and values"
    if any(name.startswith("full and") for name in layers):
        return "attention and a state in one layer"
    if layers <= {"full"}:
        return "full attention"
    if layers <= {"full", "sliding", "chunked"}:
        return "full and sliding-window layers"
    return "full attention among layers with a state"


GATED = {  # kind -> what is gated, and what is left as it is
    "full attention": "every layer",
    "full and sliding-window layers": "full-attention layers; windows keep their own cache",
    "full attention among layers with a state": "attention layers; linear attention, Mamba and convolutions keep their state",
    "attention and a state in one layer": "the layers' attention; their state stays",
    "layers that share keys and values": "the full-attention layers that own theirs; those that share read what is left",
    "latent attention": "every layer, one decision for all its heads",
}


def counts() -> str:
    """How many types are served."""
    record, out = read(), []
    for mapping, name in MAPPINGS.items():
        types = record[mapping].values()
        tally = {s: sum(e["status"] == s for e in types) for s in ("served", "refused", "not tried")}
        trained = sum(bool(e.get("training")) for e in types)
        out.append(
            f"| `{name}` | {len(types)} | {tally['served']} | {trained} | {tally['refused']} | {tally['not tried']} |"
        )
    head = ["| mapping | types | served | and trained | refused | not tried |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *out, "", f"*Of transformers {record['transformers']}.*"]) + "\n"


def kinds() -> str:
    """Short: what is gated in which families."""
    record = read()
    lines = ["| attention | families | gated | types |", "|---|---|---|---|"]
    for name, gated in GATED.items():
        of_kind = [t for t, e in record["causal"].items() if e["status"] == "served" and kind(e) == name]
        known = [shown for shown, model_type in NAMES.items() if model_type in of_kind]
        if of_kind:
            lines.append(f"| {name} | {', '.join(known)} | {gated} | {len(of_kind)} |")
    return "\n".join(lines) + "\n"


def short() -> str:
    """The short table, how many types there are, and which well-known families are refused."""
    record = read()
    said = []
    for mapping, noun in (("causal", "causal"), ("image", "image-text")):
        types = record[mapping].values()
        served = sum(e["status"] == "served" for e in types)
        said.append(f"{served} of {len(types)} {noun} types")
    reasons: dict[str, list[str]] = {}
    for shown, model_type in NAMES.items():
        entry = record["causal"].get(model_type, {})
        if entry.get("status") == "refused":
            reasons.setdefault(group_of(entry) or "", []).append(shown)
    refused = "; ".join(f"{lower(why)} ({', '.join(names)})" for why, names in sorted(reasons.items()))
    return f"{kinds()}\ngatekv serves {' and '.join(said)} of transformers {record['transformers']}. Refused with the reason: {refused}.\n"


def lower(words: str) -> str:
    """Without the capital of a sentence's beginning."""
    return words[:1].lower() + words[1:]


def served(mapping: str) -> str:
    """Every served type of a mapping."""
    image = mapping == "image"
    lines = [
        "| `model_type` | model class | attention | prefill, decode | training |"
        + (" images |" if image else "")
        + " since |",
        "|---|---|---|---|---|" + ("---|" if image else "") + "---|",
    ]
    for model_type, e in read()[mapping].items():
        if e["status"] == "served":
            training = "yes" if e["training"] else "no"
            images = (" tested |" if e.get("image") else " text tested |") if image else ""
            lines.append(
                f"| `{model_type}` | `{e['model']}` | {attention(e)} | yes | {training} |{images} {e['since']} |"
            )
    return "\n".join(lines) + "\n"


def refused() -> str:
    """Refused types by reason: one message of each, and what it would take."""
    found: dict[str, list[tuple[str, str]]] = {}
    for mapping in MAPPINGS:
        for model_type, e in read()[mapping].items():
            if e["status"] == "refused":
                found.setdefault(group_of(e) or "Other", []).append((model_type, e["reason"]))
    takes = dict(GROUPS.values())
    out = []
    for name in [*takes, "Other"]:
        if name in found:
            types = sorted({model_type for model_type, _ in found[name]})
            out += [f"**{name}** ({len(types)}): {', '.join(f'`{t}`' for t in types)}", ""]
            out += [f"> {found[name][0][1]}", "", f"What it would take: {takes.get(name, 'a closer look')}.", ""]
    return "\n".join(out)


def untrained() -> str:
    """Types that are served without gates, and why."""
    rows = [
        f"| `{t}` | {e['reason']} |"
        for mapping in MAPPINGS
        for t, e in read()[mapping].items()
        if e["status"] == "served" and not e["training"]
    ]
    if not rows:
        return "Every type that is served can be trained.\n"
    return "\n".join(["| `model_type` | why it cannot be trained |", "|---|---|", *sorted(set(rows))]) + "\n"


def gaps() -> str:
    """Models whose own cache answers otherwise than a pass without."""
    found: dict[str, list[str]] = {}
    for mapping in MAPPINGS:
        for model_type, e in read()[mapping].items():
            if "own_cache_gap" in e and e["status"] == "served":
                size = "more than a thousandth" if float(e["own_cache_gap"]) > 1e-3 else "less than a thousandth"
                found.setdefault(size, []).append(model_type)
    lines = ["| difference, relative to the largest logit | `model_type` |", "|---|---|"]
    for size in sorted(found, reverse=True):
        lines.append(f"| {size} | {', '.join(f'`{t}`' for t in sorted(set(found[size])))} |")
    return "\n".join(lines) + "\n"


def not_tried() -> str:
    """Types of which no tiny model is made, or that do not continue text."""
    found: dict[str, list[str]] = {}
    for mapping in MAPPINGS:
        for model_type, e in read()[mapping].items():
            if e["status"] == "not tried":
                found.setdefault(e["reason"], []).append(model_type)
    lines = ["| `model_type` | why |", "|---|---|"]
    lines += [f"| {', '.join(f'`{t}`' for t in sorted(set(types)))} | {why} |" for why, types in found.items()]
    return "\n".join(lines) + "\n"
