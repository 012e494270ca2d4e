"""Every policy at every budget on the same samples: one dense prefill per sample, then one compressed copy each."""

from dataclasses import dataclass, field

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tqdm import tqdm

from gatekv.adapter import GateKVConfig
from gatekv.cache.kvcache import KVCache
from gatekv.evaluation.statistics import interval, paired_interval
from gatekv.evaluation.tasks import TASKS, Item
from gatekv.policies import Gate, resolve
from gatekv.policies.budgets import Threshold

UNTRAINED = "untrained"


@dataclass
class Cell:
    """What one policy did at one budget on one task; lists run over contexts, inner ones over their questions."""

    policy: str
    budget: float
    scores: list[list[float]] = field(default_factory=list)
    kls: list[list[float]] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    ratios_end: list[float] = field(default_factory=list)
    refused: str | None = None


def add_untrained(model) -> None:
    """A second adapter of the same form with random weights: the control for "is it the training?"."""
    config = model.peft_config["default"]
    fields = {k: v for k, v in vars(config.gate_spec()).items()}
    model.add_adapter(UNTRAINED, GateKVConfig(**fields))
    state = get_peft_model_state_dict(model, adapter_name=UNTRAINED)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith(("out.weight", "out_weight")):  # zero at the start of training: every score would tie
            state[name] = torch.randn(tensor.shape, generator=generator) * tensor.shape[1] ** -0.5
    set_peft_model_state_dict(model, state, adapter_name=UNTRAINED)


def _compressed(model, undecided: KVCache, context: torch.Tensor, policy: str, budget: float) -> KVCache:
    """The context under one policy: from the shared prefill, or by a prefill of its own where flags act inside it."""
    learned = policy.split("+")[0] in ("gate", UNTRAINED)
    if learned:
        model.set_adapter(UNTRAINED if policy.startswith(UNTRAINED) else "default")
        policy = policy.replace(UNTRAINED, "gate")
    resolved = resolve(policy, budget)
    if isinstance(resolved.scorer, Gate) and isinstance(resolved.rule, Threshold):
        cache = KVCache(model, policy, budget)
        model(context, past_key_values=cache, logits_to_keep=1)
        return cache
    return undecided.decide(
        policy, budget, decode="keep"
    )  # as training-free policies do: the same bytes at the end too


def _ask(model, cache: KVCache, asks: list) -> tuple[list[torch.Tensor], float]:
    """Feed every (query, answer) to its own copy of a one-row cache; asks of equal length share a forward.

    Pads between context and question would shift the window, so unequal ones do not. Returns per ask the logits
    [answer tokens, vocabulary] in float32, and the bytes ratio at the end of the first.
    """
    answers: list = [None] * len(asks)
    ratio = 0.0
    for shape in sorted({(len(q), len(a)) for q, a in asks}):
        members = [i for i, (q, a) in enumerate(asks) if (len(q), len(a)) == shape]
        copies = cache.snapshot()
        copies.batch_repeat_interleave(len(members))
        ids = torch.tensor([asks[i][0] + asks[i][1] for i in members], device=model.device)
        out = model(ids, past_key_values=copies, logits_to_keep=shape[1] + 1).logits[:, :-1].float()
        for i, logits in zip(members, out):
            answers[i] = logits
        if 0 in members:
            ratio = copies.memory()["ratio"]
    return answers, ratio


@torch.no_grad()
def run_item(model, item: Item, task: str, cells: list[Cell]) -> None:
    """Score every cell on one item. cells[0] must be the full cache: KL is taken against it."""
    device = model.device
    context = torch.tensor([item.context], device=device)
    undecided = KVCache.undecided(model)
    model(context, past_key_values=undecided, logits_to_keep=1)
    reference: list[torch.Tensor] = []
    for cell in cells:
        if cell.refused:
            continue
        try:
            cache = _compressed(model, undecided, context, cell.policy, cell.budget)
        except ValueError as error:
            cell.refused = str(error)
            continue
        cell.ratios.append(cache.memory()["ratio"])
        answers, ratio_end = _ask(model, cache, item.asks)
        scores, kls = [], []
        for i, (logits, (_, answer)) in enumerate(zip(answers, item.asks)):
            truth = torch.tensor(answer, device=device)
            if task == "ppl":
                log_p = logits.log_softmax(-1)
                if cell is cells[0]:
                    reference.append(log_p)
                loss = -log_p.gather(-1, truth[:, None]).mean()
                full = -reference[i].gather(-1, truth[:, None]).mean()
                scores.append(float(loss - full))
                kls.append(float((reference[i].exp() * (reference[i] - log_p)).sum(-1).mean()))
            else:
                scores.append(float((logits.argmax(-1) == truth).all()))
        cell.ratios_end.append(ratio_end)
        cell.scores.append(scores)
        cell.kls.append(kls)


def evaluate(model, tokenizer, texts, policies: list[str], budgets: list[float], task: str, mode: str, n: int,
             seed: int, tokens: int | None = None, progress: bool = True) -> list[Cell]:  # fmt: skip
    """At least n scored answers per cell, over contexts of about `tokens` (None: the task's own length).

    Returns the cells, the full cache first.
    """
    control = any(p.startswith(UNTRAINED) for p in policies)
    if control:
        add_untrained(model)
    cells = [Cell("full", 1.0)] + [Cell(p, b) for p in policies if p != "full" for b in budgets]
    try:
        done, index = 0, 0
        bar = tqdm(total=n, desc=f"{task} {mode}", disable=not progress)
        while done < n:
            item = TASKS[task](tokenizer, texts, mode, index, seed, tokens)
            run_item(model, item, task, cells)
            bar.update(min(len(item.asks), n - done))
            done, index = done + len(item.asks), index + 1
        bar.close()
    finally:
        if control:
            model.set_adapter("default")
            model.delete_adapter(UNTRAINED)
    return cells


def rows(cells: list[Cell], task: str, mode: str, seed: int) -> list[dict]:
    """Rows of results.json; a refused cell has score null and says why."""
    out = []
    for c in cells:
        row = {"policy": c.policy, "budget": c.budget, "task": task, "mode": mode, "seed": seed}
        if c.refused:
            out.append(row | {"score": None, "kl": None, "n": 0, "refused": c.refused})
            continue
        flat = [x for group in c.scores for x in group]
        low, high = interval(c.scores)
        kls = [x for group in c.kls for x in group]
        row |= {"score": sum(flat) / len(flat), "kl": sum(kls) / len(kls) if kls else None, "n": len(flat)}
        row |= {"bytes_ratio": sum(c.ratios) / len(c.ratios), "bytes_ratio_end": sum(c.ratios_end) / len(c.ratios_end)}
        out.append(row | {"ci_low": low, "ci_high": high})
    return out


def comparisons(cells: list[Cell], task: str, mode: str) -> list[dict]:
    """Best learned policy against the best training-free one at each budget, paired on the same samples."""
    better = min if task == "ppl" else max
    values = lambda c: c.kls if task == "ppl" else c.scores  # noqa: E731
    mean = lambda c: sum(map(sum, values(c))) / sum(map(len, values(c)))  # noqa: E731
    out = []
    ran = [c for c in cells[1:] if not c.refused]
    for budget in sorted({c.budget for c in ran}, reverse=True):
        here = [c for c in ran if c.budget == budget]
        learned = [c for c in here if c.policy.split("+")[0] == "gate"]
        free = [c for c in here if c.policy.split("+")[0] not in ("gate", UNTRAINED)]
        if learned and free:
            a, b = better(learned, key=mean), better(free, key=mean)
            difference, low, high = paired_interval(values(a), values(b))
            entry = {"task": task, "mode": mode, "budget": budget, "learned": a.policy, "training_free": b.policy}
            entry |= {"learned_value": mean(a), "training_free_value": mean(b), "full_value": mean(cells[0])}
            out.append(entry | {"difference": difference, "ci_low": low, "ci_high": high})
    return out
