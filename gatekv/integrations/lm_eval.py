"""lm-evaluation-harness with a smaller cache: its own tasks, tokenisation, templates and scores.

    lm_eval.simple_evaluate(model=GateKVLM("checkpoints/base", adapter="checkpoints/demo", budget=.25), tasks=[…])
    python -m gatekv.integrations.lm_eval --model gatekv \
        --model_args adapter=checkpoints/demo,policy=gate+global,budget=.25 --tasks … --output_path results

A context is read and compressed, and then its last token is fed to what is left of it: the first token of a
continuation, scored or generated, comes from the compressed cache. The bytes really held go into results["config"].
Tasks that generate are also read as LongBench and RULER read their prompts, where asked to: see `PromptFormat`.
The harness (0.4.13) loads no plugins, so that `--model gatekv` needs this module's own command line.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from peft import PeftModel
from tqdm import tqdm

from gatekv.adapter import GateKVConfig
from gatekv.cache.decision import rooms
from gatekv.cache.kvcache import KVCache
from gatekv.config import check_choice
from gatekv.integrations.lm_eval_prompts import Framed, Prompt, PromptFormat
from gatekv.policies.budgets import BudgetError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Request = tuple[
    tuple[str, str], list[int], list[int]
]  # (strings, context ids, continuation ids), as the harness has it
Answer = tuple[float, bool]  # (log-likelihood of the continuation, is it what greedy decoding gives)


@dataclass
class Held:
    """Bytes of the caches of one kind of request, summed over the prompts that were read.

    Attributes:
        prompts: how many. whole: those among them that were too short for the budget, and evicted nothing.
        bytes, full_bytes: held, and of a full cache, when a prompt has been compressed. bytes_end, full_bytes_end: at
        the last token that was scored or generated, of all copies of the prompt.
    """

    prompts: int = 0
    whole: int = 0
    bytes: float = 0
    full_bytes: float = 0
    bytes_end: float = 0
    full_bytes_end: float = 0

    def report(self) -> dict:
        """As lm-eval's results name it; ratios are of sums."""
        return {
            "kv_prompts": self.prompts,
            "kv_prompts_whole": self.whole,
            "kv_bytes_held": self.bytes,
            "kv_bytes_full": self.full_bytes,
            "kv_ratio": self.bytes / self.full_bytes if self.full_bytes else None,
            "kv_ratio_end": self.bytes_end / self.full_bytes_end if self.full_bytes_end else None,
        }


@register_model("gatekv")
class GateKVLM(HFLM):
    """The harness' Hugging Face model, whose cache evicts.

    With the full budget every row is read in one forward of the harness' own shapes, and its numbers are those of `hf`.

    Args:
        pretrained: folder, Hub name, or a transformers or PEFT model; "": the base that the adapter names.
        adapter: folder or Hub name of a gatekv adapter, or None.
        policy, budget, prefill, decode, sinks, window: as for `gatekv.KVCache`; budget=512 are tokens, .25 a share.
        short: prompts too short for the budget: "refuse", or "whole": they evict nothing, and are counted in the
            results (`kv_prompts_whole`).
        compress: "prompt", or "before_question": the question of a generating task is not seen when tokens are evicted.
        truncate: "left", as the harness does, or "middle", as LongBench does, of a generating task's prompt.
        no_chat: tasks without the chat template, as patterns with "+" between them; "longbench": LongBench's own.
            compress, truncate and no_chat: see `PromptFormat`.
        batch_size: prompts read together, and continuations scored together; a number.
        harness: of `lm_eval.models.huggingface.HFLM`.

    Attributes:
        held: kind of request -> `Held`, since this object was made, or `held.clear()`.

    Raises:
        ValueError: what gatekv refuses of the model, policy or budget, and what it cannot measure honestly.
    """

    def __init__(self, pretrained: Any = "", *, adapter: str | None = None, policy: str | None = None,
                 budget: float | int | None = None, prefill: str | None = None, decode: str | None = None,
                 sinks: int | None = None, window: int | None = None, short: str = "refuse",
                 compress: str = "prompt", truncate: str = "left", no_chat: str | list[str] = "",
                 batch_size: int | str = 1, **harness: Any) -> None:  # fmt: skip
        check_choice("short", short, ("refuse", "whole"))
        self.format = PromptFormat.of(compress, truncate, no_chat)
        self._framed: dict[str, Framed] = {}  # text with the chat template -> what it was put around
        self._prompts: dict[str, Prompt] = {}  # text of the requests that are answered now -> its parts
        self._asked: list[int] = []  # tokens of the batch's questions, row by row
        _refuse(batch_size, harness)
        if isinstance(pretrained, str) and not pretrained:
            if adapter is None:
                raise ValueError("pretrained=…, the model, or adapter=…, which names its base: give one.")
            config = GateKVConfig.from_pretrained(adapter)
            pretrained = config.base_model_name_or_path
            harness = {"revision": config.revision or "main"} | harness
        device = harness.pop("device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, batch_size=batch_size, device=device, **harness)
        if adapter is not None:
            self._model: Any = PeftModel.from_pretrained(self._model, adapter).eval()
        self.held: dict[str, Held] = defaultdict(Held)
        self.kind = "loglikelihood"  # of the requests that are answered now
        self._options: dict[str, Any] = {
            "policy": policy,
            "budget": budget,
            "prefill": prefill,
            "decode": decode,
            "sinks": sinks,
            "window": window,
            "strict": short == "refuse",
        }
        empty = self._cache()  # what gatekv refuses, it refuses here
        self.settings = empty.config

    @property
    def keeps_all(self) -> bool:
        """Nothing is ever evicted or thinned."""
        return self.settings.policy.budget == 1 and not self.settings.waits

    @property
    def needs_prompt(self) -> bool:
        """Something is decided at a prompt's end; a gate that reads all of it must not see what is scored."""
        return self.settings.waits or self.settings.full_prompt_gate

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Raises ValueError: an answer from a file was given by no cache."""
        raise ValueError("use_cache=… answers from a file, and no bytes are held for that: leave it out.")

    def get_model_info(self) -> dict:
        """What the harness writes into results["config"], the bytes held among it: see `Held`."""
        every = Held(*(sum(column) for column in zip(*(asdict(held).values() for held in self.held.values()))))
        kinds = {kind: held.report() for kind, held in self.held.items()}
        settings = {"kv_policy": str(self.settings.policy), "kv_budget": self.settings.policy.budget}
        settings |= {f"kv_{name}": value for name, value in asdict(self.format).items()}
        return super().get_model_info() | settings | every.report() | {"kv_by_request": kinds}

    # -- the three kinds of request

    def loglikelihood(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[Answer]:
        """As the harness asks; see the module. Raises ValueError where the question is to be seen later."""
        if self.format.compress == "before_question":
            raise ValueError(
                "compress='before_question' is for tasks that generate; this one scores continuations: use "
                "compress='prompt', or leave such tasks out."
            )
        with self._of("loglikelihood"):
            return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[float]:
        """As the harness asks, for policies that evict as tokens come: a text is no prompt with an end.

        Raises:
            ValueError: under any other policy, and where a text is too short for its budget.
        """
        if self.needs_prompt:
            raise ValueError(
                f"loglikelihood_rolling scores a text from its first token on, and {self.settings.policy} decides "
                "where a prompt ends: use a causal gate's threshold (policy='gate') or budget=1, or leave such tasks "
                "out."
            )
        with self._of("loglikelihood_rolling"):
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """As the harness asks; see the module, and `PromptFormat` for what it raises."""
        prompts: dict[str, Prompt] = {}
        for request in [] if self.format.plain else requests:
            text = request.args[0]
            prompt = self.format.prompt(request.task_name or "", request.doc, text, self._framed.get(text))
            if prompts.setdefault(text, prompt) != prompt:
                raise ValueError(f"{request.task_name} and another task read one prompt in two ways: run them apart.")
        before, self._prompts = self._prompts, prompts
        try:
            with self._of("generate_until"):
                return super().generate_until(requests, disable_tqdm)
        finally:
            self._prompts, self._asked = before, []

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As the harness asks; what the template was put around is remembered where prompts are taken apart."""
        text = super().apply_chat_template(chat_history, add_generation_prompt)
        if not self.format.plain:
            self._framed[text] = Framed(tuple((m["role"], m["content"]) for m in chat_history), text)
        return text

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, mask), [batch, tokens] each: prompts padded on the left, of at most left_truncate_len tokens."""
        if not all(text in self._prompts for text in strings):
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        parts = []
        for text in strings:
            prompt = self._prompts[text]
            begun = has_bos_prefix(prompt.before or prompt.body, getattr(self.tokenizer, "bos_token", None))
            parts.append(
                prompt.ids(self.tokenizer, cast(int, left_truncate_len), False if begun else self.add_bos_token)
            )
        self._asked = [len(question) for _, question in parts]
        return _padded([context + question for context, question in parts], self.tokenizer.pad_token_id)

    # -- what they come down to

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[batch, tokens, vocabulary]: the harness' own forward, through a cache that keeps all."""
        cache = self._cache()
        with torch.no_grad():
            logits = self.model(inps, past_key_values=cache).logits
        self._count(cache, len(inps), start=True, end=True)
        return logits

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        if self.keeps_all:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        contexts, lone = defaultdict(list), defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            row = (context + continuation)[-(self.max_length + 1) :]
            if not 0 < len(continuation) < len(row):
                raise ValueError(f"request {i}: {len(continuation)} tokens to score, of {self.max_length} at most.")
            if len(row) == len(continuation) + 1:
                lone[len(row)].append(i)
            else:
                contexts[tuple(row[: -len(continuation)])].append(i)
        answers: list = [None] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for batch in self._batches(list(contexts)):
                asked = [(row, i) for row, context in enumerate(batch) for i in contexts[context]]
                said = self._score(batch, [(row, requests[i][2]) for row, i in asked])
                for (_, i), answer in zip(asked, said):
                    answers[i] = answer
                bar.update(len(asked))
            for same in lone.values():
                for some in _chunks(same, self.batch_size):
                    for i, answer in zip(some, self._score_lone([requests[i][1:] for i in some])):
                        answers[i] = answer
                    bar.update(len(some))
        return answers

    def _batches(self, contexts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """The longest first; those too short for the budget by themselves."""
        kinds = defaultdict(list)
        for context in sorted(contexts, key=len, reverse=True):
            kinds[self._too_short(len(context) - 1)].append(context)
        return [batch for group in kinds.values() for batch in _chunks(group, self.batch_size)]

    @torch.no_grad()
    def _score(self, contexts: list[tuple[int, ...]], asked: list[tuple[int, list[int]]]) -> list[Answer]:
        """Answers to (row of contexts, continuation) pairs, behind one prefill of the contexts but for last tokens."""
        cache, mask = self._prefilled([list(c[:-1]) for c in contexts])
        answers = []
        for some in _chunks(asked, self.batch_size):
            rows = torch.tensor([row for row, _ in some], device=self.device)
            copies = cache.snapshot()
            copies.reorder_cache(cast(torch.LongTensor, rows))
            fed = [[contexts[row][-1], *continuation[:-1]] for row, continuation in some]
            longest = max(map(len, fed))
            # Shorter rows get tokens behind them, which nothing before looks at.
            ids = torch.tensor([f + f[-1:] * (longest - len(f)) for f in fed], device=self.device)
            seen = torch.cat([mask[rows], torch.ones_like(ids)], 1)
            positions = seen.cumsum(-1)[:, mask.shape[1] :] - 1
            logits = self.model(ids, attention_mask=seen, position_ids=positions, past_key_values=copies).logits
            answers += self._answers(logits, [continuation for _, continuation in some])
            self._count(copies, len(some), end=True)
        return answers

    @torch.no_grad()
    def _score_lone(self, pairs: list[tuple[list[int], list[int]]]) -> list[Answer]:
        """Answers to (context of one token, continuation) pairs of the same length: what is scored is evicted too."""
        rows = [[*context[-1:], *continuation[:-1]] for context, continuation in pairs]
        whole = self._too_short(0 if self.needs_prompt else len(rows[0]))  # nothing stands before what is scored
        cache = self._cache(whole)
        logits = self.model(torch.tensor(rows, device=self.device), past_key_values=cache).logits
        self._count(cache, len(rows), whole, start=True, end=True)
        return self._answers(logits, [continuation for _, continuation in pairs])

    def _answers(self, logits: torch.Tensor, continuations: list[list[int]]) -> list[Answer]:
        """logits [rows, tokens, vocabulary], each row's first ones of its continuation."""
        found = []
        for row, continuation in zip(logits.log_softmax(-1, dtype=self.softmax_dtype), continuations):
            row, truth = row[: len(continuation)], torch.tensor(continuation, device=self.device)
            likelihood = row.gather(-1, truth[:, None]).sum()
            found.append((float(likelihood), bool((row.argmax(-1) == truth).all())))
        return found

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        """The harness' own, with a cache that has read and compressed what stands before every question.

        Where prompts are not taken apart, the question is the last token.
        """
        if self.keeps_all:
            return self._generate(self._cache(), context, max_length, stop, **options)
        if options.get("num_beams", 1) != 1 or options.get("num_return_sequences", 1) != 1:
            raise ValueError("several sequences from one compressed prompt are not generated here: leave num_beams=1.")
        mask, kinds = options.pop("attention_mask"), defaultdict(list)
        for row, (tokens, asked) in enumerate(zip(mask.sum(-1).tolist(), self._asked or [1] * len(context))):
            kinds[asked, self._too_short(tokens - asked)].append(row)
        out = context.new_full((len(context), max_length), self.tokenizer.pad_token_id)
        longest = 0
        for (asked, whole), rows in kinds.items():  # rows of a batch have their questions at the same place
            cache = self._cache(whole)
            if not whole:
                prompts = [ids[real.bool()].tolist()[:-asked] for ids, real in zip(context[rows], mask[rows])]
                cache, _ = self._prefilled(prompts, context.shape[1] - asked)
            part = self._generate(cache, context[rows], max_length, stop, whole, attention_mask=mask[rows], **options)
            out[rows, : part.shape[1]] = part
            longest = max(longest, part.shape[1])
        return out[:, :longest]

    def _generate(
        self,
        cache: KVCache,
        context: torch.Tensor,
        max_length: int,
        stop: list[str],
        whole: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        unread = not cache.get_seq_length()  # then what was held at the prompt's end cannot be told apart
        out = super()._model_generate(context, max_length, stop, past_key_values=cache, **options)
        self._count(cache, len(context), whole, start=unread, end=True)
        return out

    # -- caches

    def _cache(self, whole: bool = False, prompt_tokens: int | None = None) -> KVCache:
        if whole:
            return KVCache(self.model, "full")
        return KVCache(self.model, **self._options, prompt_tokens=prompt_tokens)

    @torch.no_grad()
    def _prefilled(self, rows: list[list[int]], width: int | None = None) -> tuple[KVCache, torch.Tensor]:
        """(a cache that has read and compressed the rows, padded on the left to width, their mask [rows, width]).

        Either all of the rows are too short for the budget, or none is.
        """
        whole = self._too_short(len(rows[0]))
        width = max(map(len, rows)) if width is None else width
        cache = self._cache(whole, width if self.settings.waits else None)
        ids, mask = (part.to(self.device) for part in _padded(rows, self.tokenizer.pad_token_id, width))
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        self._count(cache, len(rows), whole, start=True)
        return cache, mask

    def _too_short(self, prompt: int) -> bool:
        """Whether a prompt of so many tokens can only be held whole; BudgetError where that is refused."""
        why: str | None = "one token of context leaves nothing before it to compress: use longer prompts."
        if prompt:
            why = rooms(self.settings, prompt)[1]
        if why is not None and self.settings.strict:
            raise BudgetError(f"{why} Or evict nothing from such prompts, and count them: short='whole'.")
        return why is not None

    def _count(
        self, cache: KVCache, prompts: int, whole: bool = False, *, start: bool = False, end: bool = False
    ) -> None:
        held, memory = self.held[self.kind], cache.memory()
        if start:
            held.prompts, held.whole = held.prompts + prompts, held.whole + whole * prompts
            held.bytes, held.full_bytes = held.bytes + memory["bytes"], held.full_bytes + memory["full_bytes"]
        if end:
            held.bytes_end += memory["bytes"]
            held.full_bytes_end += memory["full_bytes"]

    @contextmanager
    def _of(self, kind: str) -> Iterator[None]:
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before


def _padded(rows: list[list[int]], pad: int, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), [rows, width] each: rows with pads on their left, up to width or the longest."""
    width = max(map(len, rows)) if width is None else width
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def _chunks(items: list, size: int) -> list[list]:
    return [items[a : a + size] for a in range(0, len(items), size)]


def _refuse(batch_size: int | str, harness: dict) -> None:
    """ValueError for what of the harness this class cannot do, or cannot count."""
    wrong = {
        "peft": "give a gatekv adapter as adapter=…",
        "parallelize": "give a model that fits on one device, or load it yourself and pass it as pretrained",
        "tp_plan": "KV heads of one layer would lie in several processes",
        "mixed_precision_dtype": "give dtype=…, in which the cache is held and counted",
    }
    for name, cure in wrong.items():
        if harness.get(name):
            raise ValueError(f"{name}={harness[name]!r} is not supported: {cure}.")
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise ValueError(f"batch_size={batch_size!r}: give a number; what fits is found out with a full cache.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("bytes are counted in one process: leave accelerate launch and torchrun out.")


if __name__ == "__main__":
    cli_evaluate()
