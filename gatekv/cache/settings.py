"""From what a user asks of a cache to the settings its layers follow: defaults, and what cannot be."""

import math
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from transformers.utils import logging

from gatekv.cache.config import CacheConfig
from gatekv.config import GateSpec, LessSpec, check_choice
from gatekv.gates.relaxations import logit_of
from gatekv.hardware import DTYPES
from gatekv.modules import base_model, gate_spec, wrappers
from gatekv.ops.backends import BACKENDS
from gatekv.policies import Policy, Scorer, resolve
from gatekv.policies.parts import Width
from gatekv.support import LATER, rotates_until

DEFAULT = GateSpec()
logger = logging.get_logger(__name__)


def config_of(
    model: nn.Module,
    policy: Policy | Scorer | str | None,
    budget: float | int | None,
    *,
    prefill: str | None,
    decode: str | None,
    sinks: int | None,
    window: int | None,
    prompt_tokens: int | None,
    turns: bool,
    block_size: int,
    dtype: torch.dtype | str | None,
    backend: str | None,
    kinds: torch.Tensor | None,
    strict: bool,
) -> CacheConfig:
    """Arguments and errors as for `gatekv.KVCache`; the model is gated."""
    active = [w for w in wrappers(model) if w.active()]
    spec = gate_spec(model) or DEFAULT
    policy = resolve(policy if policy is not None else ("gate" if active else "full"), budget)
    learned, streaming = policy.needs.gate, policy.needs.scope == "token"
    if learned and not active:
        raise ValueError("policy 'gate' needs an adapter with gates: load one with peft.PeftModel.from_pretrained.")
    whole = learned and spec.context == "prompt"
    if whole:  # everything was judged when the prompt ended; what follows stays
        decode = decode or "keep"
        prefill = prefill or ("sparse" if streaming and spec.mask_prompt else "dense")
    prefill = prefill or ("sparse" if streaming else "dense")
    allots = policy.width is not None and policy.width.allots
    decode = decode or ("keep" if allots and not learned else policy.scorer.decode)
    _check_modes(policy, learned, streaming, whole, prefill, decode, turns)
    _check_counts(0, sinks=sinks, window=window)
    _check_counts(1, prompt_tokens=prompt_tokens, block_size=block_size)
    if backend is not None:
        check_choice("backend", backend, BACKENDS)
    _check_gates(policy, learned, spec, turns)
    _check_extras(model, policy, learned, decode, prefill)
    if kinds is not None and kinds.ndim != 2:
        raise ValueError(f"kinds is [batch, tokens], as token_kinds(tokenizer)[input_ids]; got {tuple(kinds.shape)}.")
    calibration = active[0].calibration() if active else None
    if learned and policy.budget is not None and (streaming or prefill == "sparse") and calibration is None:
        raise ValueError(
            "a number as budget streams through calibrated thresholds, and this adapter has none: run "
            "gatekv.training.calibrate, leave budget=None, or use prefill='dense' with uniform, ada or global."
        )
    own_sinks = spec.sinks if policy.scorer.sinks is None else policy.scorer.sinks
    own_window = spec.window if policy.scorer.window is None else policy.scorer.window
    geometry = wrappers(model)[0].geometry
    if allots:
        own_sinks = max(own_sinks, cast(Width, policy.width).sinks)
    sinks, window = own_sinks if sinks is None else sinks, own_window if window is None else window
    return CacheConfig(
        policy=policy,
        layers=len(wrappers(model)),
        sinks=sinks,
        window=window,
        dense_prefill=prefill == "dense",
        keep_later=decode == "keep",
        prompt_tokens=prompt_tokens,
        threshold=logit_of(spec.threshold),
        strict=strict,
        turns=turns,
        block_size=block_size,
        dtype=_dtype(dtype),
        backend=backend,
        full_prompt_gate=whole,
        thresholds=LATER if calibration is None else calibration.thresholds(sinks, window),
        kinds=kinds,
        token=(sum(geometry.stored) // 2, (_dtype(dtype) or base_model(model).dtype).itemsize),
        rotates_until=rotates_until(base_model(model).config.get_text_config(decoder=True)),
    )


def _dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    """Of what is held, as the model computes with numbers."""
    name = str(asked).removeprefix("torch.")
    if asked is not None:
        check_choice("dtype", name, DTYPES)
    return None if asked is None else getattr(torch, name)


def _check_counts(least: int, **counts: object) -> None:
    """Numbers of tokens that were given."""
    for name, count in counts.items():
        if count is None or isinstance(count, int) and not isinstance(count, bool) and count >= least:
            continue
        raise ValueError(f"{name} is a number of tokens, a whole one of at least {least}; got {count!r}.")


def _check_modes(
    policy: Policy, learned: bool, streaming: bool, whole: bool, prefill: str, decode: str, turns: bool
) -> None:
    """When flags act, before and behind the prompt's end."""
    check_choice("prefill", prefill, ("dense", "sparse"))
    check_choice("decode", decode, ("evict", "keep"))
    if decode == "evict" and (whole or not policy.scorer.evicts_in_decode):
        what = "a gate that reads the whole prompt" if whole else type(policy.scorer).__name__
        raise ValueError(f"decode='evict': {what} decides once, at the prompt's end; leave decode out.")
    if turns and streaming:
        raise ValueError("turns=True has nothing to do for a threshold gate: it evicts as it goes. Leave it out.")
    if prefill == "sparse" and policy.rule.fades:
        raise ValueError("budget rule 'decay' ranks a whole prompt by age: use prefill='dense', or leave prefill out.")
    if prefill == "sparse" and not learned:
        raise ValueError(
            f"prefill='sparse' needs a causal gate; {type(policy.scorer).__name__} decides after the prompt."
        )
    if whole and prefill == "sparse" and (policy.budget is not None or not streaming):
        raise ValueError(
            "a gate that reads the whole prompt masks the prompt's own queries at its threshold only: leave budget "
            "and rule out, or use prefill='dense'."
        )


def _check_gates(policy: Policy, learned: bool, spec: GateSpec, turns: bool) -> None:
    """Gates whose tokens fade, and the rule made for them."""
    fades = spec.relaxation == "decay"
    if learned and fades != policy.rule.fades:
        raise ValueError(
            "gates whose tokens fade (relaxation='decay') and the budget rule 'decay' belong together: "
            + ("use policy='gate+decay' with a budget." if fades else "this adapter's gates do not fade.")
        )
    if policy.rule.fades and (turns or not learned):
        raise ValueError("budget rule 'decay' is for gates, and decides while decoding: leave turns out.")


def _check_extras(model: nn.Module, policy: Policy, learned: bool, decode: str, prefill: str) -> None:
    """Slot positions, narrow tokens, a remainder: what goes with what."""
    if policy.scorer.cache_positions and policy.width is not None:
        raise ValueError("positions='cache' and narrow tokens are not made for each other: leave think or qaq out.")
    later = policy.rule.fades if learned else policy.scorer.evicts_in_decode
    if policy.remainder is not None and policy.width is not None and later and decode == "evict":
        raise ValueError(
            "narrow tokens cannot be folded later: leave think, qaq or the remainder out (less, merge_similar, "
            "merge_near, what comes with d2o and elastic), or use decode='keep'."
        )
    if policy.width is not None and policy.width.allots:
        if prefill == "sparse":
            raise ValueError(
                "rate shares out the bytes of a whole prompt at its end: use prefill='dense', or leave it out."
            )
        if later and decode == "evict":
            raise ValueError("rate decides once, at a prompt's or turn's end: use decode='keep'.")
    if policy.remainder_segment().counts:
        if learned and (prefill == "sparse" or decode == "evict"):
            raise ValueError(
                "merging rewrites what is kept, where a whole prompt is decided: with a gate use prefill='dense' and "
                "decode='keep'."
            )
        if policy.scorer.cache_positions:
            raise ValueError("positions='cache' and merging are not made for each other: leave the remainder out.")
    if policy.needs.maps:
        maps = next((w.less() for w in wrappers(model) if w.less()), None)
        if maps is None:
            raise ValueError(
                "remainder 'less' needs low-rank maps, and no adapter in force has any: train one with "
                "GateKVConfig(less_rank=8), or leave less out of the policy."
            )
        _warn_of_other_training(maps.spec, policy)


def _warn_of_other_training(spec: LessSpec, policy: Policy) -> None:
    """Low-rank maps work under any policy; they were trained for one."""
    if spec.less_policy is None:
        return
    trained, used = resolve(spec.less_policy, spec.less_budget), replace(policy, remainder=None)
    if str(trained) != str(used) or not math.isclose(trained.budget or 0, used.budget or 0, rel_tol=0.2):
        logger.warning_once(
            f"gatekv: these low-rank maps were trained for {trained} at budget {trained.budget}, not for {used} at "
            f"{used.budget}; measure before relying on it."
        )
