"""Prompts with images, in the wrappers that people run: one image in a row and two, in a left-padded batch."""

import pytest
import torch
import zoo

import gatekv
from gatekv.modules import base_model

PROMPT, TOKENS, SIDE = 60, 68, 4  # SIDE: patches along an edge; two by two become one token, so an image is four
PLACES = ([9], [7, 30])  # where images begin, counted from each row's first token
LENGTHS = (68, 55)


def rows_of_patches(channels: int):
    """Qwen's form: one row a patch, two frames of one image, and a grid that says which belong together."""

    def make(images: int) -> dict:
        pixels = noise(images * SIDE * SIDE, channels)
        return dict(pixel_values=pixels, image_grid_thw=torch.tensor([[1, SIDE, SIDE]] * images))

    return make


def pictures(edge: int, sizes: bool = False):
    """An image is three planes; sizes: its height and width beside it."""

    def make(images: int) -> dict:
        more = dict(image_sizes=torch.tensor([[edge, edge]] * images)) if sizes else {}
        return dict(pixel_values=noise(images, 3, edge, edge), **more)

    return make


def noise(*shape: int):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


# Type -> (what its tiny config needs, its image inputs, the name of what says which tokens are an image's).
WRAPPERS = {
    "qwen2_5_vl": ({}, rows_of_patches(2 * 3 * 14 * 14), "mm_token_type_ids"),
    "qwen3_vl": (
        dict(vision_config=dict(deepstack_visual_indexes=[0, 1], num_position_embeddings=64)),
        rows_of_patches(2 * 3 * 16 * 16), "mm_token_type_ids",
    ),
    "qwen3_5": (dict(vision_config=dict(num_position_embeddings=64)), rows_of_patches(2 * 3 * 16 * 16), "mm_token_type_ids"),
    "llava": (dict(vision_config=dict(image_size=28)), pictures(28), None),
    "gemma3": (dict(mm_tokens_per_image=4, vision_config=dict(image_size=64)), pictures(64), "token_type_ids"),
    "internvl": (dict(image_seq_length=4, vision_config=dict(image_size=[56, 56])), pictures(56), None),
    "mistral3": (dict(image_token_index=120, vision_config=dict(image_size=56)), pictures(56, sizes=True), None),
}  # fmt: skip
TOLERANCE = {"qwen3_5": 1e-4}  # whose state is float32 whatever the model's dtype, and is rounded by chunk


@pytest.fixture(params=[n if n in ("qwen3_vl", "gemma3") else pytest.param(n, marks=pytest.mark.exhaustive) for n in WRAPPERS])  # fmt: skip
def wrapper(request):
    return request.param


def built(wrapper: str):
    return zoo.build(wrapper, image=True, dtype=torch.float64, more=WRAPPERS[wrapper][0])


def prompts(wrapper: str, model, rows=(0, 1)) -> dict:
    """Ids, mask, images and which tokens are theirs, of a left-padded batch or of one of its rows alone."""
    config, ids = model.config, zoo.inputs(model, LENGTHS)["input_ids"]
    token = next(v for n in ("image_token_id", "image_token_index") if (v := getattr(config, n, None)) is not None)
    mask = zoo.inputs(model, LENGTHS)["attention_mask"]
    for row, places in enumerate(PLACES):
        for place in places:
            start = TOKENS - LENGTHS[row] + place
            ids[row, start : start + 4] = token
            if "qwen" in wrapper:  # its positions in the image follow this sign
                ids[row, start - 1] = config.vision_start_token_id
    images = WRAPPERS[wrapper][1](sum(map(len, PLACES)))
    start = 0 if 0 in rows else len(PLACES[0])
    for name, value in images.items():
        each = len(value) // 3
        images[name] = value[start * each : (start + sum(len(PLACES[r]) for r in rows)) * each]
    left = TOKENS - max(LENGTHS[r] for r in rows)
    ids, mask = ids[list(rows), left:], mask[list(rows), left:]
    kinds = {WRAPPERS[wrapper][2]: (ids == token).long()} if WRAPPERS[wrapper][2] else {}
    return dict(input_ids=ids, attention_mask=mask, images=images, kinds=kinds)


def positions_of(model, batch: dict):
    """As the model's own `generate` counts: a number a token, or three of them (time, height, width)."""
    mask = batch["attention_mask"]
    if "mm_token_type_ids" not in batch["kinds"]:
        return (mask.cumsum(-1) - 1).clamp_min(0)
    grid, ids = batch["images"]["image_grid_thw"], batch["input_ids"]
    inner = base_model(model).model
    return inner.get_rope_index(ids, image_grid_thw=grid, attention_mask=mask, **batch["kinds"])[0]


@torch.no_grad()
def logits(model, batch: dict, steps: int = 0, cache=None):
    """Logits; the last `steps` tokens come one at a time, the images with what is before."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    width, pieces = ids.shape[1], []
    edges = [0, *range(width - steps, width + 1)] if steps else [0, width]
    positions = positions_of(model, batch)
    for a, b in zip(edges, edges[1:]):
        call = dict(input_ids=ids[:, a:b], attention_mask=mask[:, :b], use_cache=cache is not None)
        call["position_ids"] = positions[..., a:b]
        call |= {name: kind[:, a:b] for name, kind in batch["kinds"].items()}
        out = model(**call, past_key_values=cache, **(batch["images"] if a == 0 else {}))
        pieces.append(out.logits)
    return torch.cat(pieces, 1)


def test_a_full_budget_is_the_plain_model(wrapper):
    model = built(wrapper)
    batch = prompts(wrapper, model)
    wanted = logits(model, batch)
    assert wanted[batch["attention_mask"].bool()].isfinite().all()
    other = {**batch, "images": {**batch["images"], "pixel_values": -batch["images"]["pixel_values"]}}
    assert zoo.difference(logits(model, other), wanted, batch["attention_mask"]) > 1e-3, "the images are seen"
    cache = gatekv.KVCache(model, "snapkv", 1.0, decode="keep")
    zoo.close(
        "logits",
        logits(model, batch, TOKENS - PROMPT, cache),
        wanted,
        batch["attention_mask"],
        TOLERANCE.get(wrapper, 1e-6),
    )
    asked = dict(
        batch["images"], **batch["kinds"], input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    )
    plain = zoo.generate(model, asked)
    cache = gatekv.KVCache(model, "snapkv", 1.0, decode="keep")
    assert torch.equal(zoo.generate(model, asked, past_key_values=cache), plain)


def test_half_a_budget_saves_memory_and_rows_do_not_know_of_each_other(wrapper):
    model, rows = built(wrapper), []
    for chosen in ((0, 1), (1,)):
        cache = gatekv.KVCache(model, "snapkv", 0.5, window=4)
        batch = prompts(wrapper, model, chosen)
        rows.append(logits(model, batch, TOKENS - PROMPT, cache)[-1:, -LENGTHS[1] :])
        assert cache.memory()["ratio"] < 1 and rows[-1].isfinite().all()
    zoo.close("row alone", rows[1], rows[0], torch.ones(1, LENGTHS[1]), TOLERANCE.get(wrapper, 1e-6))


def test_what_is_trained_is_what_is_deployed(wrapper):
    peft = zoo.gated(built(wrapper))
    batch = prompts(wrapper, base_model(peft))
    with gatekv.parallel(peft):
        wanted = logits(peft, batch)
    with gatekv.modules.gates_off(peft):
        assert zoo.difference(logits(peft, batch), wanted, batch["attention_mask"]) > 1e-4, "the gates evict nothing"
    got = logits(peft, batch, TOKENS - PROMPT, gatekv.KVCache(peft, "gate"))
    zoo.close("the two forms", got, wanted, batch["attention_mask"], TOLERANCE.get(wrapper, 1e-6))
