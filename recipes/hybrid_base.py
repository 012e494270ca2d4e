"""Small bases that recall: what `hybrid.py` measures with. Hybrids of linear and full attention (built as Qwen3.5), one
with sliding and full attention and learned sinks (as gpt-oss), and a dense one (as Llama), pre-trained from nothing.

Rows are bundled text, a byte a token, into which facts (FACT key value) are written at random places; behind the text
keys are asked for (ASK key -> value). Which ones, the text does not say.
"""

import random
import sys
import time
from dataclasses import dataclass

import torch

from gatekv.bundled import TRAIN
from gatekv.policies.l2 import L2Norm
from gatekv.training.schedule import learning_rate_factor

BYTES, WORDS = 128, 32  # ASCII; keys, and values
FACT, ASK = BYTES, BYTES + 1
KEYS, VALUES = BYTES + 2, BYTES + 2 + WORDS
VOCABULARY = VALUES + WORDS


class Recall:
    """Rows of `length` tokens of context with `facts` facts, then `asked` questions; row i is a function of seed and i.

    It stands where `gatekv.training.data.TrainingData` does.
    """

    pack = False

    def __init__(self, length: int, facts: int, asked: int, seed: int | str, texts=None, words: int = WORDS) -> None:
        self.context, self.facts, self.asked, self.seed = length, facts, asked, seed
        self.words, self.length = words, length + 3 * self.asked
        self.texts = texts or [path.read_text() for path in sorted(TRAIN.glob("*.txt"))]

    def row(self, index: int) -> list[int]:
        """Context, then ASK key value of `asked` facts, none again before all were asked for."""
        rng = random.Random(f"{self.seed}/{index}")
        text = rng.choice(self.texts)
        room = self.context - 3 * self.facts
        start = rng.randrange(len(text) - room)
        filler = [b if b < BYTES else 32 for b in text[start : start + room].encode("latin-1", "replace")]
        keys = rng.sample(range(KEYS, KEYS + self.words), self.facts)
        facts = [(key, rng.randrange(VALUES, VALUES + self.words)) for key in keys]
        places = sorted(rng.choices(range(room + 1), k=self.facts))
        ids, last = [], 0
        for place, fact in zip(places, facts):
            ids += [*filler[last:place], FACT, *fact]
            last = place
        ids += filler[last:]
        asked: list[tuple[int, int]] = []
        while len(asked) < self.asked:
            asked += rng.sample(facts, self.facts)
        return ids + [i for key, value in asked[: self.asked] for i in (ASK, key, value)]

    def batch(self, first: int, rows: int, align: bool = False, answer_weight: float = 20.0) -> dict[str, torch.Tensor]:
        """As `TrainingData.batch`; weights: of predicting the next token, text 1, an answer `answer_weight`, else 0."""
        ids = torch.tensor([self.row(i) for i in range(first, first + rows)])
        following = ids.roll(-1, 1)
        weights = (following < BYTES).float()
        weights[:, self.context :] = 0
        weights[:, self.context + 1 :: 3] = answer_weight
        weights[:, -1] = 0
        split = torch.full((rows,), self.context)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "weights": weights, "split": split}


def fresh(kind: str, seed: int = 0):
    """A small model without training: "hybrid", three linear layers and one of full attention; "wide", the same with
    states eight times as large; "sinks", sliding and full attention by turns, learned sinks, experts; or "dense"."""
    import transformers as t

    torch.manual_seed(seed)
    common = dict(
        vocab_size=VOCABULARY, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.08,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    if kind in ("hybrid", "wide"):
        heads, width = (2, 16) if kind == "hybrid" else (4, 32)
        config = t.Qwen3_5TextConfig(
            **common, num_hidden_layers=4, intermediate_size=128, linear_num_key_heads=heads,
            linear_num_value_heads=heads, linear_key_head_dim=width, linear_value_head_dim=width,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
        )  # fmt: skip
        model = t.Qwen3_5ForCausalLM(config)
        for name, p in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                p.data.fill_(0.5)  # normed queries and keys of 32 numbers are too short to look at one token of 200
        return model
    if kind == "sinks":
        config = t.GptOssConfig(
            **common, num_hidden_layers=4, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2,
            sliding_window=16, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )  # fmt: skip
        config._attn_implementation = "eager"
        return t.GptOssForCausalLM(config)
    return t.LlamaForCausalLM(t.LlamaConfig(**common, num_hidden_layers=4, intermediate_size=128))


@dataclass
class L2Everywhere(L2Norm):
    """L2 that leaves no layer whole: only one or two have keys here."""

    skip_layers: tuple[int, ...] = ()


class Muon(torch.optim.SGD):
    """SGD with Nesterov's momentum whose steps are made orthogonal in float32 (torch.optim.Muon does it in bfloat16,
    which a CPU is slow at); it needs a fraction of AdamW's steps here."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, lr=lr)

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        shapes: dict[torch.Size, list] = {}
        for p in group["params"]:
            if p.grad is not None:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                shapes.setdefault(p.shape, []).append((p, p.grad.lerp(momentum, 0.95)))
        for shape, pairs in shapes.items():
            x = torch.stack([step for _, step in pairs])
            x = x if shape[0] <= shape[1] else x.mT
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
            for (p, _), step in zip(pairs, x if shape[0] <= shape[1] else x.mT):
                p.sub_(step, alpha=group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5)


@torch.no_grad()
def recalled(model, data: Recall, rows: int = 32, first: int = 10**6) -> float:
    """Share of the questions that the full cache answers."""
    ids = data.batch(first, rows)["input_ids"]
    model.eval()
    said = model(ids, use_cache=False).logits.argmax(-1)
    asked = torch.arange(data.context + 1, ids.shape[1], 3)
    return (said[:, asked] == ids[:, asked + 1]).float().mean().item()


def pretrain(kind: str, length: int, facts: int, steps: int, rate: float = 4e-3, tokens: int = 2048, seed: int = 0):
    """A base after `steps` of about `tokens`. Whenever rows are recalled, harder ones come: few keys at first (with all
    32 at once nothing is learned for hundreds of steps), then all, then longer rows with more facts."""
    model, start = fresh(kind, seed).train(), time.monotonic()
    stages = [(24, 4, 8), (24, 4, 16)]
    stages += [(length * i // 16, facts * i // 16, WORDS) for i in (2, 4, 8, 16)]
    wide = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "head" not in name]
    others = [p for p in model.parameters() if all(p is not w for w in wide)]
    optimizers = Muon(wide, 5 * rate), torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.0)
    stage, smooth, seen, data = 0, 0.0, 0, Recall(*stages[0][:2], 16, seed, words=stages[0][2])
    for step in range(steps):
        rows = tokens // data.length
        batch, seen = data.batch(seen, rows), seen + rows
        ids, weights = batch["input_ids"], batch["weights"][:, :-1]
        logits = model(ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        (losses[weights > 1].mean() + 0.1 * losses[weights == 1].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = learning_rate_factor(step, steps, 0.03, 0.05)
        for optimizer, peak in zip(optimizers, (5 * rate, rate)):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        asked = slice(data.context + 1, ids.shape[1], 3)
        right = (logits[:, asked].argmax(-1) == ids[:, data.context + 2 :: 3]).float().mean().item()
        smooth = 0.9 * smooth + 0.1 * right
        if step % 20 == 19:
            state = f"{data.context} tokens, {data.facts} of {data.words} facts, answered {smooth:.2f}"
            print(
                f"{kind} base {time.monotonic() - start:4.0f} s step {step + 1}: {state}", file=sys.stderr, flush=True
            )
        if smooth > 0.85 and stage + 1 < len(stages):
            stage, smooth = stage + 1, 0.0
            data = Recall(*stages[stage][:2], 16, seed + stage, words=stages[stage][2])
    return model.eval()
