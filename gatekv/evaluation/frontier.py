"""Every policy at every budget on the same samples: one dense prefill per sample, then one compressed copy each."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from tqdm import tqdm

from gatekv.adapter import GateKVConfig
from gatekv.cache.kvcache import KVCache
from gatekv.cache.segments.segment import Shape
from gatekv.evaluation.names import FULL, UNTRAINED, is_control, resolved, told
from gatekv.evaluation.records import Records
from gatekv.evaluation.tasks import TASKS, Generated, Item
from gatekv.modules import wrappers
from gatekv.policies import Policy
from gatekv.policies.amount import share_of
from gatekv.policies.fastgen import token_kinds

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    GateModel = PeftModel | PreTrainedModel


def add_untrained(model: "PeftModel") -> None:
    """A second adapter of the same form with random weights: the control for "is it the training?"."""
    config = cast(GateKVConfig, model.peft_config["default"])
    fields = {k: v for k, v in vars(config.gate_spec()).items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same control in every run and for every task
        model.add_adapter(UNTRAINED, GateKVConfig(**fields))
    state = get_peft_model_state_dict(model, adapter_name=UNTRAINED, save_embedding_layers=False)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith(("out.weight", "out_weight")):  # zero at the start of training: every score would tie
            state[name] = torch.randn(tensor.shape, generator=generator) * tensor.shape[1] ** -0.5
    set_peft_model_state_dict(model, state, adapter_name=UNTRAINED)


def use_gate(model: "PeftModel", name: str) -> None:
    """Put one adapter's gates in force, or the trained ones' ("default"), beside whatever maps there are."""
    others = [other for other in model.peft_config if other not in (name, UNTRAINED)]
    tuner = cast(BaseTuner, model.base_model)
    tuner.set_adapter([name, *others], inference_mode=True)  # the first that has a gate judges


def _fitted(model: "GateModel", undecided: KVCache, policy: Policy, budget: float) -> tuple[Policy, float]:
    """(policy, budget of tokens to keep) for a budget of bytes: a state costs tokens, narrow ones leave room.

    So a policy without its remainder, at the same budget, is LESS's control with the state's bytes as extra tokens.

    Raises:
        ValueError: a budget below the state alone, or that the width cannot meet ("unreachable").
    """
    window = undecided.evicting()[0].window
    keys, length, value_dim = window.keys, window.keys.shape[2], window.values.shape[3]
    head_dim = (keys.shape[3] + value_dim) // 2
    if policy.remainder is None and policy.width is None:
        return policy, budget
    budget, token = share_of(budget, length), 2 * head_dim * keys.element_size()
    if policy.remainder is not None:
        maps = next((w.less() for w in wrappers(model) if w.less()), None)
        if policy.needs.maps and maps is None:
            raise ValueError("this adapter has no low-rank maps: leave less out of --policies, or load one that has.")
        rest = policy.remainder_segment()
        rest.use(maps)
        budget -= rest.forecast_bytes(Shape(1, 1, keys.shape[3], keys.dtype, value_dim=value_dim), 0) / token / length
        if budget <= 0:
            raise ValueError(f"budget is unreachable: the remainder alone costs more than {length} tokens' share.")
        if rest.counts:  # beside each kept token stands how many it stands for
            budget /= 1 + torch.int32.itemsize / token
    if policy.width is not None:
        width, budget = policy.width.fit(budget, length, head_dim, keys.element_size(), policy.scorer.evicts)
        policy = replace(policy, width=width)
    return policy, budget


def _compressed(
    model: "GateModel", undecided: KVCache, context: torch.Tensor, policy: str, budget: float, options: dict
) -> KVCache:
    """The context under one policy: from the shared prefill, or by a prefill of its own where flags act inside it."""
    asked = resolved(policy, budget)
    if asked.needs.gate:
        use_gate(cast("PeftModel", model), UNTRAINED if is_control(policy) else "default")
    fitted, budget = _fitted(model, undecided, asked, budget)
    options = {**options, "strict": True} | ({} if fitted.scorer.evicts_in_decode else {"decode": "keep"})
    if fitted.needs.scope == "token":
        cache = KVCache(model, fitted, budget, dtype=undecided.config.dtype, **options)
        model(context, past_key_values=cache, logits_to_keep=1)
        return cache
    return undecided.decide(fitted, budget, **options)


def _ask(
    model: "GateModel", cache: KVCache, asks: list[tuple[list[int], list[int]]]
) -> tuple[list[torch.Tensor], float]:
    """Feed every (query, answer) to its own copy of a one-row cache, all in one forward.

    An answer's last token is not fed, so choices of one token share a row. Shorter rows get pads behind them, which
    nothing before looks at. Returns per ask the logits [answer tokens, vocabulary] in float32, and the bytes ratio
    when the longest ask's last token is chosen.
    """
    fed = [tuple(query + answer[:-1]) for query, answer in asks]
    rows = list(dict.fromkeys(fed))
    copies = cache.snapshot()
    copies.batch_repeat_interleave(len(rows))
    longest = max(map(len, rows))
    first = min(len(query) for query, _ in asks) - 1  # the earliest token whose logits are wanted
    ids = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows], device=model.device)
    logits = model(ids, past_key_values=copies, logits_to_keep=longest - first).logits
    starts = [len(query) - 1 - first for query, _ in asks]
    answers = [logits[rows.index(f), a : a + len(ask[1])].float() for f, a, ask in zip(fed, starts, asks)]
    return answers, copies.memory()["ratio"]


def _generate(model: "GateModel", cache: KVCache, item: Generated) -> tuple[list[int], float]:
    """The greedy answer's token ids, from a copy of a one-row cache, and the bytes ratio when its last is chosen."""
    copy = cache.snapshot()
    ids = torch.tensor([item.context + item.query], device=model.device)
    own = model.generation_config.eos_token_id
    ends = [*(own if isinstance(own, list) else [own]), *item.stops]
    ends = [end for end in ends if end is not None]
    out = cast(Any, model).generate(
        input_ids=ids,
        past_key_values=copy,
        max_new_tokens=item.tokens,
        min_new_tokens=1 if item.stops else 0,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    return out[0, ids.shape[1] :].tolist(), copy.memory()["ratio"]


@torch.no_grad()
def run_item(
    model: "GateModel",
    item: Item | Generated,
    cells: list[tuple[str, float]],
    kinds: torch.Tensor | None = None,
    **options: Any,
) -> list[dict]:
    """What each (policy, budget) does on one item, as the fields of a record; see `Records`.

    cells[0] must be FULL: KL is taken against it. kinds: [vocabulary], what each token is, for scorers that ask.
    options: of `KVCache`: decode, sinks, window; cache_dtype: its dtype.
    """
    context = torch.tensor([item.context], device=model.device)
    asked = [resolved(policy, budget) for policy, budget in cells]
    queries, dtype = max(policy.needs.queries for policy in asked), options.pop("cache_dtype", None)
    undecided = KVCache.undecided(model, queries=queries, dtype=dtype)
    model(context, past_key_values=undecided, logits_to_keep=1)
    options = options if kinds is None else {**options, "kinds": kinds[torch.tensor([item.context])]}
    full, found = None, []
    for (policy, budget), what in zip(cells, asked):
        record = {"policy": policy, "budget": budget, "scores": [], "kls": [], "ratio": None, "ratio_end": None}
        record |= {"place": item.place, "refused": None, **told(policy, what)}
        found.append(record)
        try:
            cache = _compressed(model, undecided, context, policy, budget, options)
        except ValueError as error:
            if (policy, budget) == FULL:
                raise  # without the full cache there is nothing to compare with
            record["refused"] = str(error)
            continue
        record["ratio"] = cache.memory()["ratio"]
        if isinstance(item, Generated):
            ids, record["ratio_end"] = _generate(model, cache, item)
            record["scores"] = [item.score(ids)]
            continue
        logits, record["ratio_end"] = _ask(model, cache, item.asks)
        log_p = [x.log_softmax(-1) for x in logits]
        full = log_p if full is None else full
        record["scores"], record["kls"] = item.score(log_p, [answer for _, answer in item.asks], full)
    return found


def evaluate(
    model: "GateModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    policies: list[str],
    budgets: list[float | int],
    task: str,
    mode: str,
    n: int,
    seed: int,
    records: Records,
    *,
    tokens: int | None = None,
    progress: bool = True,
    build: Callable[..., Item | Generated] | None = None,
    **options: Any,
) -> None:
    """Score every policy at every budget on at least n questions; what `records` holds already is not done again.

    Args:
        records: gets a line per sample, policy and budget, as soon as a sample is through, and the full cache's.
        tokens: about the length of contexts; None: the task's own. build: makes the items, instead of TASKS[task].
        options: of `KVCache`: decode, sinks, window; cache_dtype: its dtype.
    """
    cells = [FULL] + [(p, b) for p in policies if p != "full" for b in budgets]
    make: Callable[..., Item | Generated] = build or TASKS[task]
    control = any(is_control(p) for p in policies)
    kinds = token_kinds(tokenizer) if any(resolved(p, b).needs.kinds for p, b in cells) else None
    if control:
        add_untrained(cast("PeftModel", model))
    try:
        done, index = 0, 0
        with tqdm(total=n, desc=f"{task} {mode} seed {seed}", disable=not progress) as bar:
            while done < n:
                held = records.of(task, mode, seed, index)
                missing = [cell for cell in cells if cell not in held]
                if missing:
                    item = make(tokenizer, texts, mode, index, seed, tokens)
                    found = run_item(model, item, [FULL, *(c for c in missing if c != FULL)], kinds=kinds, **options)
                    key = {"task": task, "mode": mode, "seed": seed, "index": index}
                    records.append([key | r for r in found if (r["policy"], r["budget"]) in missing])
                scored = len(records.of(task, mode, seed, index)[FULL]["scores"])
                bar.update(min(scored, n - done))
                done, index = done + scored, index + 1
    finally:
        if control:
            use_gate(cast("PeftModel", model), "default")
            model.delete_adapter(UNTRAINED)
