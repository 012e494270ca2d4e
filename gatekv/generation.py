"""`generate` and `ContextQA`: texts in, texts out, with a smaller cache."""

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoTokenizer

from gatekv.cache.kvcache import KVCache
from gatekv.modules import base_model, gate_spec
from gatekv.policies import FastGen, Policy, Scorer, resolve
from gatekv.policies.fastgen import token_kinds
from gatekv.prompts import Inputs, Prompts, read_prompts
from gatekv.support import LATER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    GateModel = torch.nn.Module  # a transformers or PEFT model

CACHE_OPTIONS = set(inspect.signature(KVCache.__init__).parameters) - {"self", "model", "policy", "budget"}
OURS = {  # what `model.generate` takes and this sets itself
    "past_key_values": "leave it out (policy= and budget= make the cache), or use model.generate with a cache of yours",
    "prompt_tokens": "leave it out: it is the length of the prompt",
    "cache_implementation": "leave it out: policy= says how the cache is kept",
    "input_ids": "pass token ids as inputs",
}


@dataclass
class Generation:
    """What `generate(…, return_dict=True)` returns.

    Attributes:
        text: the answers, a list behind token ids (None without a tokenizer given). sequences: [rows, tokens], as
        `model.generate` returns them: prompt, question, answer; pads on the left, and behind a row that is shorter.
        caches: the caches that were used, one, or one for each length of question. prompt: `KVCache.memory()` when the
        context had been compressed; None without a question, where the answer starts in the same call.
    """

    text: str | list[str] | None
    sequences: torch.Tensor
    caches: list[KVCache] = field(repr=False)
    prompt: dict | None = None

    def memory(self) -> dict[str, float]:
        """As `KVCache.memory`, summed over the caches, at the end."""
        return _summed([cache.memory() for cache in self.caches])


@torch.no_grad()
def generate(
    model: "GateModel",
    inputs: Inputs,
    policy: Policy | Scorer | str | None = None,
    budget: float | int | None = None,
    question: str | list[str] | list[int] | None = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    attention_mask: torch.Tensor | None = None,
    return_dict: bool = False,
    **options: Any,
) -> str | list[str] | torch.Tensor | Generation:
    """Generate with a cache from which tokens leave: `model.generate`, with `KVCache` and the prompt's end set.

        gatekv.generate(model, "Once upon a time", "snapkv", 0.25, max_new_tokens=50)
        gatekv.generate(model, notes, question="Who owns the lantern?", budget=512, max_new_tokens=50)

    Args:
        model: a transformers or PEFT model, on any device; gated in place (`gatekv.detach` undoes it).
        inputs: a text, a list of texts, chat messages or a list of chats (the tokenizer's chat template is applied),
            token ids [tokens] or [batch, tokens], or a mapping with input_ids and attention_mask. Texts are batched
            with pads on the left; they are not taken for a chat, unless there is a question.
        policy, budget: as for `KVCache`. With neither, the adapter's gate ("gate+global", or "gate+decay" where its
            tokens fade) or, without an adapter, "snapkv", at .25.
        question: asked after the inputs alone have been compressed: one text, or a list with one for each input. It
            continues the user's turn behind the context, where the tokenizer has a chat template. Behind token ids it
            is fed as it is written, or as ids.
        tokenizer: default: the one that lies beside the model. attention_mask: of token ids.
        return_dict: return a `Generation`, with the ids and the caches beside the text.
        options: of `KVCache` (prefill, decode, sinks, window, turns, block_size, backend, kinds, strict), by name; all
            others go to `model.generate`: max_new_tokens, do_sample, num_beams, streamer, prefill_chunk_size, …

    Returns the new text (a str for one text or chat, else a list of str, with `num_return_sequences` of each); for
    token ids the ids [rows, tokens] that `model.generate` returns.

    Raises:
        ValueError: as `KVCache`; inputs that are none of these; no tokenizer; an option that is set here.
    """
    own, options = _separated(options)
    policy, budget = _chosen(model, policy, budget)
    named = _Lazy(model, tokenizer)
    prompt: dict[str, float] | None = None
    prompts = read_prompts(inputs, question, named, attention_mask)
    pad = _pad(model, named if prompts.text else None, options)
    ids, mask = prompts.padded(pad, base_model(model).device)
    if prompts.text:
        own = _with_kinds(own, policy, budget, named, ids)
    if prompts.asks is None:
        if own.get("kinds") is not None and len(own["kinds"]) == len(ids):
            own["kinds"] = own["kinds"].repeat_interleave(_copies(model, options), 0)
        cache = KVCache(model, policy, budget, prompt_tokens=ids.shape[1], **own)
        out = _sequences(
            cast(Any, model).generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)
        )
        answers, found, caches = list(out[:, ids.shape[1] :]), list(out), [cache]
    else:
        cache = _compressed(model, ids, mask, policy, budget, options.pop("prefill_chunk_size", None), own)
        prompt = cache.memory()
        answers, found, caches = _asked(model, cache, ids, mask, prompts.asks, options)
    sequences = torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=pad)
    text: str | list[str] | None = None
    if prompts.text or named.tokenizer is not None:
        texts = [cast(str, named().decode(answer, skip_special_tokens=True)) for answer in answers]
        text = texts[0] if prompts.single and len(texts) == 1 else texts
    if return_dict:
        return Generation(text, sequences, caches, prompt)
    return sequences if text is None or not prompts.text else text


class ContextQA:
    """Questions about one long text, which is read and compressed once, before any question is seen.

        qa = gatekv.ContextQA(model, budget=0.25, max_new_tokens=50)
        answers = qa(context=report, questions=["Who wrote it?", "When?"])
        more = qa(question="And why?")                          # about the same context

    Args:
        model, policy, budget, tokenizer, options: as for `generate`.

    Attributes:
        cache: the compressed context, or None before there was one; every question has a snapshot of it.
    """

    def __init__(
        self,
        model: "GateModel",
        policy: Policy | Scorer | str | None = None,
        budget: float | int | None = None,
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        **options: Any,
    ) -> None:
        self.model, (self.policy, self.budget) = model, _chosen(model, policy, budget)
        self._own, self._options = _separated(options)
        self._tokenizer = _Lazy(model, tokenizer)
        self.cache: KVCache | None = None
        self._context: str | list[dict] | None = None
        self._ids: torch.Tensor = LATER
        self._mask: torch.Tensor = LATER
        KVCache(model, self.policy, self.budget, **self._own)  # what is refused, is refused here

    @torch.no_grad()
    def __call__(
        self,
        context: str | list[dict] | None = None,
        question: str | None = None,
        *,
        questions: list[str] | None = None,
        **options: Any,
    ) -> str | list[str]:
        """The answer to `question`, or the answers to `questions`, each asked of the context alone.

        context: a text, or chat messages that end with it; None: the last one. options: of `model.generate`, for this
        call.

        Raises:
            ValueError: no context, no question or both of question and questions, and as `generate`.
        """
        asked = [question] if questions is None else questions
        if (question is None) == (questions is None) or isinstance(asked, str):
            raise ValueError("give one text as question=, or a list of texts as questions=.")
        if context is None and self._context is None:
            raise ValueError("there is no context yet: give context=, the text that the questions are about.")
        own, options = _separated(options)
        if own:
            raise ValueError(f"{', '.join(own)}: options of the cache belong to ContextQA(…), where it is made.")
        options = self._options | options
        context = self._context if context is None else context
        chats = read_prompts([context] * len(asked), cast("list[str]", asked), self._tokenizer)
        if any(row != chats.rows[0] for row in chats.rows):
            raise ValueError("the tokenizer's chat template writes something of the question before the context.")
        chunk = options.pop("prefill_chunk_size", None)
        pad = _pad(self.model, self._tokenizer, options)
        if context != self._context:
            self._read(context, Prompts(chats.rows[:1], len(chats.rows[0]), None, True, True), pad, chunk)
        rows = torch.zeros(len(asked), dtype=torch.long)
        copies = cast(KVCache, self.cache).snapshot()
        copies.batch_select_indices(rows.to(self._ids.device))
        answers, _, _ = _asked(
            self.model, copies, self._ids[rows], self._mask[rows], cast("list[list[int]]", chats.asks), options
        )
        found = [cast(str, self._tokenizer().decode(answer, skip_special_tokens=True)).strip() for answer in answers]
        return found[0] if questions is None and len(found) == 1 else found

    def _read(self, context: str | list[dict] | None, prompt: Prompts, pad: int, chunk: int | None) -> None:
        ids, mask = prompt.padded(pad, base_model(self.model).device)
        own = _with_kinds(self._own, self.policy, self.budget, self._tokenizer, ids)
        self.cache = _compressed(self.model, ids, mask, self.policy, self.budget, chunk, own)
        self._context, self._ids, self._mask = context, ids, mask

    def memory(self) -> dict[str, float]:
        """`KVCache.memory()` of the compressed context.

        Raises:
            ValueError: before there was one.
        """
        if self.cache is None:
            raise ValueError("nothing has been read yet: ask a question about a context first.")
        return self.cache.memory()


# -- what both are made of


class _Lazy:
    """() -> the tokenizer: the one given, or the model's own, loaded when it is first needed."""

    def __init__(self, model: "GateModel", tokenizer: "PreTrainedTokenizerBase | None") -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(self) -> "PreTrainedTokenizerBase":
        if self.tokenizer is None:
            name = base_model(self.model).name_or_path
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(name)
            except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
                said = (str(error).splitlines() or [""])[0]
                raise ValueError(f"no tokenizer beside the model {name!r} ({said}): pass tokenizer=….") from error
        return self.tokenizer


def _chosen(
    model: "GateModel", policy: Policy | Scorer | str | None, budget: float | int | None
) -> tuple[Policy | Scorer | str, float | int | None]:
    """(policy, budget), where neither was given: the adapter's gate, or SnapKV, at a quarter."""
    if policy is None:
        spec, budget = gate_spec(model), 0.25 if budget is None else budget
        policy = "snapkv" if spec is None else "gate+decay" if spec.relaxation == "decay" else "gate+global"
    return policy, budget


def _separated(options: dict) -> tuple[dict, dict]:
    """(options of the cache, options of `model.generate`)."""
    for name, cure in OURS.items():
        if options.get(name) is not None:
            raise ValueError(f"{name}= is set by gatekv itself: {cure}.")
    if options.get("use_cache") is False:
        raise ValueError("use_cache=False would leave nothing to compress: leave it out, or use model.generate.")
    own = {name: value for name, value in options.items() if name in CACHE_OPTIONS}
    return own, {name: value for name, value in options.items() if name not in own and name not in OURS}


def _with_kinds(
    own: dict, policy: Policy | Scorer | str, budget: float | int | None, tokenizer: _Lazy, ids: torch.Tensor
) -> dict:
    """The cache's options, and for FastGen what each token is."""
    if own.get("kinds") is None and isinstance(resolve(policy, budget).scorer, FastGen):
        return own | {"kinds": token_kinds(tokenizer())[ids.cpu()]}
    return dict(own)


def _pad(model: "GateModel", tokenizer: _Lazy | None, options: dict) -> int:
    """The id of pads, which `model.generate` is told too, if it does not know one."""
    config = options.get("generation_config") or cast(Any, model).generation_config
    known = options.get("pad_token_id", config.pad_token_id)
    if known is None:
        eos = options.get("eos_token_id", config.eos_token_id)
        found = (tokenizer and tokenizer().pad_token_id, eos[0] if isinstance(eos, list) else eos, 0)
        known = options["pad_token_id"] = next(i for i in found if i is not None)
    return int(known)


def _copies(model: "GateModel", options: dict) -> int:
    """How many rows `model.generate` makes of one."""
    config = options.get("generation_config") or cast(Any, model).generation_config
    return max(options.get(n) or getattr(config, n, None) or 1 for n in ("num_beams", "num_return_sequences"))


def _compressed(
    model: "GateModel",
    ids: torch.Tensor,
    mask: torch.Tensor,
    policy: Policy | Scorer | str | None,
    budget: float | int | None,
    chunk: int | None,
    own: dict,
) -> KVCache:
    """A cache that has read the contexts ids [batch, tokens], in calls of `chunk` tokens, and compressed them."""
    cache, n = KVCache(model, policy, budget, prompt_tokens=ids.shape[1], **own), ids.shape[1]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for a in range(0, n, chunk or n):
        c = min(n, a + (chunk or n))
        model(
            input_ids=ids[:, a:c], attention_mask=mask[:, :c], position_ids=positions[:, a:c], past_key_values=cache,
            logits_to_keep=1,
        )  # fmt: skip
    return cache


def _asked(
    model: "GateModel",
    cache: KVCache,
    ids: torch.Tensor,
    mask: torch.Tensor,
    asks: list[list[int]],
    options: dict,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[KVCache]]:
    """(answers, whole rows of ids, caches): every row of the compressed contexts is asked its own question.

    Questions of one length are asked together, others in calls of their own: no pads stand behind a context.
    """
    lengths: dict[int, list[int]] = {}
    for row, ask in enumerate(asks):
        lengths.setdefault(len(ask), []).append(row)
    copies, caches = _copies(model, options), []
    answers, found = {}, {}
    for rows in lengths.values():
        part = cache if len(lengths) == 1 else cache.snapshot()
        index = torch.tensor(rows, device=ids.device)
        if len(lengths) > 1:
            part.batch_select_indices(index)
        if copies > 1:
            part.batch_repeat_interleave(copies)
        fed = torch.cat([ids[index], torch.tensor([asks[row] for row in rows], device=ids.device)], 1)
        seen = torch.cat([mask[index], mask.new_ones(len(rows), fed.shape[1] - ids.shape[1])], 1)
        out = _sequences(cast(Any, model).generate(input_ids=fed, attention_mask=seen, past_key_values=part, **options))
        each = len(out) // len(rows)
        for i, row in enumerate(rows):
            found[row] = list(out[i * each : (i + 1) * each])
            answers[row] = [ids_of[fed.shape[1] :] for ids_of in found[row]]
        caches.append(part)
    order = range(len(asks))
    return [a for row in order for a in answers[row]], [f for row in order for f in found[row]], caches


def _sequences(out: Any) -> torch.Tensor:
    """The ids of what `model.generate` returned, also under return_dict_in_generate."""
    return out if isinstance(out, torch.Tensor) else out.sequences


def _summed(sizes: list[dict]) -> dict[str, float]:
    total = {name: sum(size[name] for size in sizes) for name in ("bytes", "full_bytes", "whole_rows")}
    return total | {"ratio": total["bytes"] / total["full_bytes"] if total["full_bytes"] else 0.0}
