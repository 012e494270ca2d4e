"""LESS's objective, layer by layer in one pass: every layer learns to say what it would have said (2402.09398, §3.2).

The paper stores each layer's inputs for a corpus and trains layer after layer. Here the dense pass runs on as it is,
and each layer's branch adds its own error beside it: nothing is stored, no gradient crosses a layer, and all layers
learn at once at a little more than the cost of a forward. End to end is offered too: the model with its remainder is
distilled from the model with its whole cache.
"""

from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from gatekv.adapter import GateKVConfig
from gatekv.bundled import adapter_path
from gatekv.cache.hybrid import HybridKVLayer
from gatekv.cache.kvcache import KVCache
from gatekv.cache.layer import KVLayer
from gatekv.cache.segments.foreign import Foreign
from gatekv.config import GateSpec, LessSpec, check_choice
from gatekv.modules import base_model, gated_pass, wrappers
from gatekv.passes import Remainder, RemainderError
from gatekv.policies import resolve
from gatekv.precision import wide
from gatekv.recompute import whole_layers
from gatekv.training.head import LogitHead
from gatekv.training.losses import distillation_loss, row_shares, stacked
from gatekv.training.noise import announce, as_evaluated, quiet
from gatekv.training.rows import Batch
from gatekv.training.start import check_form, rebuilt

KINDS = ("attention_mse", "kl")


class LessObjective(nn.Module):
    """How far the model is off behind a compressed prompt: layer by layer, or at its end.

    Args:
        model: PEFT model with low-rank maps; its base, and its gates if it has any, are frozen.
        policy: whose decisions the maps learn to live with, as for `KVCache`, without the remainder.
        objective: "attention_mse": mean over layers of the squared error of the layer's output, as a share of its
            square (the paper's, layer-local); "kl": to the same model with its whole cache, through all layers; steps
            that are `warm` still learn layer by layer, which is cheaper and where end to end has to begin.

    Raises:
        ValueError: an adapter without low-rank maps, a policy that does not exist.
    """

    multiplier: torch.Tensor

    def __init__(self, model: PeftModel, policy: str, objective: str = "attention_mse") -> None:
        super().__init__()
        check_choice("objective", objective, KINDS)
        self.model, self.policy, self.objective = model, policy, objective
        self.head = LogitHead(model)
        announce(model)
        if any(w.less() is None for w in wrappers(model)):
            raise ValueError("this adapter has no low-rank maps to train: create it with GateKVConfig(less_rank=8).")
        resolve(policy, 1.0)
        self.register_buffer("multiplier", torch.zeros(1))  # part of every objective's checkpoint

    @torch.no_grad()
    def _prompt(self, batch: Batch, split: int, budget: float) -> tuple[KVCache, list[torch.Tensor]]:
        """(the whole prompt's cache, what the policy keeps of it per layer [batch, kv_heads, split])."""
        ids = batch["input_ids"][:, :split]
        mask = batch["attention_mask"][:, :split].to(ids.device)
        cache = KVCache.undecided(self.model, queries=resolve(self.policy, budget).needs.queries)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        base_model(self.model)(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        )
        kept = cache.decide(self.policy, budget, decode="keep", strict=True).flags()
        return cache, kept

    def _behind(self, batch: Batch, split: int, prompt: KVCache) -> torch.Tensor:
        """Last hidden states of the tokens behind the prompt, given its cache, which stays as it is."""
        past = DynamicCache(config=base_model(self.model).config.get_text_config(decoder=True))
        for i, layer in enumerate(prompt.layers):
            if isinstance(layer, KVLayer):
                past.update(layer.window.keys, layer.window.values, i)
            else:  # a sliding layer holds what its window sees, another one its state
                past.layers[i] = Foreign(layer).fork().layer
            if isinstance(layer, HybridKVLayer):
                layer.state.give(past.layers[i])
        ids = batch["input_ids"][:, split:]
        mask = batch["attention_mask"].to(ids.device)
        return self.head.decoder(
            input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, split:],
        ).last_hidden_state  # fmt: skip

    def forward(self, batch: Batch, target: float, warm: bool = False, seed: int | None = None) -> dict:
        """batch: input_ids, attention_mask [batch, tokens], split [batch], one value for all rows; target: the budget.

        Returns {"loss", "task", "alone" (the policy's own error), "sparsity", "keep", "gap"} as the loop takes it.
        """
        self.head.ready()
        with quiet(self.model, lora=False), whole_layers(self.model):  # LoRA beside the maps is as frozen as the base
            return self._step(batch, target, warm)

    def _step(self, batch: Batch, target: float, warm: bool) -> dict:
        split = int(batch["split"][0])
        prompt, kept = self._prompt(batch, split, target)
        mask = batch["attention_mask"].to(batch["input_ids"].device)
        flags = {w.layer_idx: f for w, f in zip(wrappers(self.model), kept)}
        with torch.no_grad(), gated_pass(self.model, RemainderError(kept=flags)) as found:
            teacher = self._behind(batch, split, prompt)
        lessons = list(found.values())
        loss = stacked(lesson.error for lesson in lessons).mean()
        if self.objective == "kl" and not warm:
            shares = row_shares(wide(batch["weights"][:, split:], teacher))
            with gated_pass(self.model, Remainder(kept=flags)):
                student = self._behind(batch, split, prompt)
            loss = distillation_loss(student, teacher, self.head, shares)
        alone, real = stacked(lesson.alone for lesson in lessons).mean(), mask[:, None, :split].bool()
        keep = torch.stack([(f & real).sum() / (real.sum() * f.shape[1]) for f in kept]).mean()
        zero = torch.zeros((), device=loss.device)
        return {"loss": loss, "task": loss.detach(), "alone": alone, "sparsity": zero, "keep": keep, "gap": zero[None]}

    def move_multipliers(self, gap: torch.Tensor) -> None:
        """Nothing to move."""

    @torch.no_grad()
    def soft_hard(self, batch: Batch, target: float) -> dict[str, float]:
        """The layers' error on a row kept apart, beside the policy's own, and the share of that which is closed; end to
        end, the divergence too."""
        with as_evaluated(self.model):
            out = self(batch, target, warm=True)
            error, alone = float(out["loss"]), float(out["alone"])
            found = {"error": error, "alone": alone, "closed": 1 - error / alone, "soft_hard_gap": error - alone}
            if self.objective == "kl":
                found["kl"] = float(self(batch, target)["loss"])
        return found


def with_maps(
    model: PreTrainedModel, adapter: str, gate: GateSpec | None = None, train_gate: bool = False, **less: Any
) -> PeftModel:
    """A PEFT model with low-rank maps: alone, beside a fresh gate, or beside the gates and LoRA of a trained adapter.

    adapter: folder or Hub name, or empty; maps that it has are where these begin, else they are fresh. LoRA that it has
    stays as it is, in the model whose whole cache is the teacher too. gate: of an empty adapter. train_gate: the
    adapter's gates learn too; else only the maps do. less: fields of `gatekv.config.LessSpec`.

    Raises:
        ValueError: the adapter's maps are of another form or size, or it has no gate to train.
    """
    if not adapter:
        fields = {"gate": "none"} if gate is None else vars(gate)
        return cast(PeftModel, get_peft_model(model, GateKVConfig(task_type="CAUSAL_LM", **fields, **less)))
    trained = PeftModel.from_pretrained(model, adapter_path(adapter))
    old = cast(GateKVConfig, trained.peft_config["default"])
    if old.less_rank:
        check_form(adapter, "maps", old, LessSpec(**less), ("less_form", "less_rank", "less_hidden"))
    if train_gate and old.gate == "none":
        raise ValueError(f"{adapter} has no gate to train: leave --train_gate out, or --adapter for a fresh one.")
    still = old.lora and old.lora | {"lora_dropout": 0.0}  # what does not learn drops nothing
    spec = vars(old.gate_spec()) | less
    config = GateKVConfig(task_type="CAUSAL_LM", calibration=old.calibration, lora=still, **spec)
    both = rebuilt(trained, config, "gatekv_", ".lora_")
    for name, p in both.named_parameters():
        p.requires_grad_("gatekv_less" in name or train_gate and "gatekv_gate" in name)
    return both
