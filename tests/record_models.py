"""What gatekv makes of every type of model: writes tests/fixtures/models.json, which tests and pages are made from.

    python tests/record_models.py                # every type of both mappings: a second or two each
    python tests/record_models.py llama gpt_oss  # these only, the rest stays as it is
    python tests/record_models.py --status refused broken  # those that are recorded so
    python tests/record_models.py --tidy         # tries nothing; drops types that transformers no longer has
    python docs/tables.py                        # then renew the pages

A type that transformers has added: run it by name. Where its tiny model cannot be made, tests/zoo.py takes what its
config needs (`CHANGES`), its released shape (`REAL`), or why it cannot be made (`UNBUILT`).
"""

import argparse
import contextlib
import gc
import json
import logging
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
import zoo
from models_page import FILE
from peft import get_peft_model
from transformers import DynamicCache

import gatekv
from gatekv import GateKVConfig

MAPPINGS = {"causal": zoo.causal_types, "image": zoo.image_types}
IMAGES = (
    "gemma3",
    "internvl",
    "llava",
    "mistral3",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_vl",
)  # tests/unit/test_images.py runs them
SINCE = "unreleased"  # version that a type is written down with when it is served for the first time
# What a layer keeps, by transformers' name of its cache layer; `{state}` is told from the modules.
KEPT = {
    "DynamicLayer": "full",
    "DynamicSlidingWindowLayer": "sliding",
    "LinearAttentionLayer": "{state}",
    "LinearAttentionAndFullAttentionLayer": "full and {state}",
    "LinearAttentionAndSlidingWindowAttentionLayer": "sliding and {state}",
    "DummyLayer": "nothing",
    "DynamicIndexedLayer": "indexed",
}
STATES = {"Mamba": "Mamba", "Mixer": "Mamba", "Recurrent": "recurrence", "DeltaNet": "linear attention",
          "LightningAttention": "linear attention", "Conv": "convolution", "CCA": "convolution"}  # fmt: skip
TRAITS = {  # what an attention module has -> what it is called
    "learned sinks": lambda m: getattr(m, "sinks", None) is not None,
    "softcap": lambda m: bool(getattr(m, "attn_logit_softcapping", None)),
    "narrow values": lambda m: (getattr(m, "v_head_dim", 0) or 99999) < (getattr(m, "head_dim", 0) or 0),
}


def state_of(names: list[str]) -> str:
    """What a state is called, by the classes of the modules that hold it."""
    return next((what for part, what in STATES.items() if any(part in name for name in names)), "linear attention")


def layers_of(model) -> dict[str, int]:
    """What the layers of the text decoder keep -> how many of the tiny model do."""
    config = model.config.get_text_config(decoder=True)
    places: dict[int, list[str]] = {}
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            places.setdefault(module.layer_idx, []).append(type(module).__name__)
    everywhere = [type(m).__name__ for m in model.modules()]
    kinds = getattr(config, "layer_types", None) or []
    found: Counter[str] = Counter()
    for i, layer in enumerate(DynamicCache(config=config).layers):
        name, here = type(layer).__name__, places.get(i, [])
        what = KEPT.get(name, name)
        if "{state}" in what:
            own = [n for n in here if any(part in n for part in STATES)]
            what = what.format(state=state_of(own or everywhere))
        elif name == "DynamicLayer" and getattr(config, "kv_lora_rank", None):
            what = "latent"
        elif name == "DynamicLayer" and here and all("CrossAttention" in n for n in here):
            what = "cross-attention"  # to images alone
        elif name == "DynamicSlidingWindowLayer" and i < len(kinds) and "chunked" in kinds[i]:
            what = "chunked"
        elif name == "DummyLayer" and any("Attention" in n for n in here):
            what = "shared"  # it reads an earlier layer's keys and values
        found[what] += 1
    return dict(found)


def traits_of(model) -> list[str]:
    """What is special about the decoder's attention, and whether there is a tower beside it."""
    modules = [m for m in model.modules() if getattr(m, "layer_idx", None) is not None]
    found = [name for name, has in TRAITS.items() if any(has(m) for m in modules)]
    if "softcap" not in found and getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        found.append("softcap")
    return found


@torch.no_grad()
def first_calls(model, gates: bool = False) -> tuple[str, str]:
    """(when, what gatekv says) as it refuses a model: when a cache or an adapter is "made", or at the "first call".

    ("", "") where it does not.
    """
    when, batch = "made", zoo.inputs(model)
    try:
        if gates:
            peft = get_peft_model(model, GateKVConfig(gate="linear", window=4, sinks=2))
            when = "first call"
            with gatekv.parallel(peft):
                zoo.logits(peft, batch, use_cache=False)
        else:
            cache = gatekv.KVCache(model, "snapkv", 0.5)
            when = "first call"
            zoo.logits(model, batch, [60 - 1], cache)
    except ValueError as error:
        return when, " ".join(str(error).split())
    return "", ""


def tried(model_type: str, image: bool, before: dict, found: dict | None = None) -> dict:
    """The entry of one type; before: the one that it replaces; found: what `zoo.survey_type` said, where it ran."""
    if model_type in zoo.UNBUILT:
        return {"status": "not tried", "reason": zoo.UNBUILT[model_type]}
    found = found or zoo.survey_type(model_type, image)
    if found["plain"] != "ok":
        return {"status": "not tried", "reason": found["plain"]}
    model = zoo.build(model_type, image, getattr(torch, found["dtype"]))
    entry = {"model": found["model"], "dtype": found["dtype"], "layers": layers_of(model)}
    if traits := traits_of(model):
        entry["traits"] = traits
    if "own_cache_gap" in found:
        entry["own_cache_gap"] = found["own_cache_gap"]
    cache, gates = found["cache"].split()[0].strip(":"), found["gates"].split()[0].strip(":")
    if cache == "ok":
        entry |= {"status": "served", "prefill": True, "decode": True, "training": gates == "ok"}
        if image:
            entry["image"] = model_type in IMAGES
        entry["since"] = before.get("since", SINCE)
        if gates != "ok":
            entry["reason"] = found["gates"] if gates != "refused" else first_calls(model, gates=True)[1]
        return entry
    if cache != "wrong":
        when, reason = "", ""
        with contextlib.suppress(Exception):  # what the survey said of it is written down
            zoo.logits(model, zoo.inputs(model), use_cache=False)  # BigBird changes its attention at a short text
            when, reason = first_calls(model)
        if reason:  # transformers may be who says it: MiniMax takes no cache but its own
            return entry | {"status": "refused", "when": when, "reason": reason}
    return entry | {"status": "broken", "reason": f"{found['cache']} | {found['gates']}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--mapping", choices=list(MAPPINGS), help="this one only")
    parser.add_argument("--status", nargs="+", help="types only that are recorded so, such as refused or broken")
    parser.add_argument("--tidy", action="store_true")
    parser.add_argument("--found", type=Path, help="with --mapping: what tests/zoo.py --json wrote, in place of a run")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found = json.loads(args.found.read_text()) if args.found else {}
    record = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name, types in MAPPINGS.items():
        held, known = record.setdefault(name, {}), types()
        for model_type in known if not args.tidy and args.mapping in (None, name) else ():
            if args.status and held.get(model_type, {}).get("status") not in args.status:
                continue
            if (args.types and model_type not in args.types) or (found and model_type not in found):
                continue
            held[model_type] = tried(model_type, name == "image", held.get(model_type, {}), found.get(model_type))
            print(name, model_type, held[model_type]["status"], held[model_type].get("reason", ""), flush=True)
            FILE.write_text(json.dumps(record, indent=1) + "\n")
            gc.collect()
        record[name] = {t: held[t] for t in sorted(held) if t in known}
        record["transformers"] = transformers.__version__
        FILE.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
