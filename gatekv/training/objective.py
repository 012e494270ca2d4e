"""The training objective as a module: one forward = losses of one micro-batch. This is what DDP and DeepSpeed wrap."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import DynamicCache

from gatekv.attention import relaxed_flags
from gatekv.config import GateSpec
from gatekv.gates.relaxations import logit_of
from gatekv.geometry import readers_of, remembers
from gatekv.modules import base_model, gate_spec, gated_pass, wrappers
from gatekv.ops.sequence import ALONE, Sequence
from gatekv.passes import GateOutput, Observe, PassContext, Plain, Relaxed
from gatekv.policies.rate import Rate
from gatekv.precision import wide
from gatekv.recompute import whole_layers
from gatekv.training import shared
from gatekv.training.coded import Coding
from gatekv.training.head import LogitHead
from gatekv.training.losses import distillation_loss, hidden_loss, lm_loss, oracle_loss, row_shares, stacked
from gatekv.training.noise import announce, as_evaluated, quiet
from gatekv.training.prompt import gated_prompt
from gatekv.training.rows import Batch, Rows
from gatekv.training.sparsity import budget_cut, keep_rates, overfull, sparsity_gap, sparsity_loss, undecided

KINDS = ("kl", "reverse_kl", "lm", "hidden_mse", "attention_mse", "none")
LOCAL = ("attention_mse", "none")  # without a student's pass


class Teacher(NamedTuple):
    """What the plain model's pass gave.

    Attributes:
        hidden: [batch, tokens, hidden_size], or None where no loss needs it. past: its cache, for a student that runs
            behind the prompt alone. said: by layer index, what its gates judge. thresholds: by layer index, on the
            logits, [batch, kv_heads, tokens], of a "budget". oracle: scalar, the regression to received attention.
    """

    hidden: torch.Tensor | None
    past: DynamicCache | None
    said: dict[int, GateOutput]
    thresholds: dict[int, torch.Tensor] | None
    oracle: torch.Tensor


def _counted(rows: Rows, asked: dict[str, Any]) -> torch.Tensor:
    """[batch, tokens] bool: the real tokens that gates judge, by prompt or document, where the batch was read."""
    return rows.valid[:, : asked["split"]] if rows.documents is None else rows.documents.on_host


class Objective(nn.Module):
    """Task loss + sparsity_weight · sparsity loss of a PEFT model with gates.

    Args:
        model: PEFT model; it doubles as the teacher, with the gates switched off. Its base is frozen; LoRA of the same
            adapter learns with the gates, and is the teacher's too.
        objective: "kl" or "reverse_kl" to the same model with gates off, "lm", "hidden_mse" of the last hidden state,
            "attention_mse" of each layer's own attention output (no backward through the model), "none".
        prefill: "sparse": flags act as tokens leave the window, inside the prompt too; "dense": they act on the first
            batch["split"] tokens of a row for what follows (see gatekv.training.prompt; where LoRA learns, the prompt
            is the student's own, because its keys and values learn too).
        kl_weight: with "lm": of the KL to the same model with gates off, beside it.
        width: with prefill="dense": what is kept of the prompt is read as this width would store it.
        sparsity, scope: see gatekv.training.sparsity. "budget": no penalty; each step holds exactly the target, at the
            threshold where the gates' logits in the teacher's pass would. sparsity_weight: alpha.
        polarise_weight: of the mean of 4p(1 - p). oracle_weight: of the layer-local regression to the attention that
            tokens receive in the teacher's pass.

    Raises:
        ValueError: a combination that cannot be computed; the message says what to change.
    """

    multiplier: torch.Tensor

    def __init__(
        self,
        model: PeftModel,
        *,
        objective: str = "kl",
        prefill: str = "sparse",
        sparsity: str = "budget",
        scope: str = "global",
        sparsity_weight: float = 1.0,
        polarise_weight: float = 0.0,
        oracle_weight: float = 0.0,
        kl_weight: float = 0.0,
        width: Rate | None = None,
    ) -> None:
        super().__init__()
        self.model, self.head = model, LogitHead(model)
        self.objective, self.prefill, self.sparsity, self.scope = objective, prefill, sparsity, scope
        self.sparsity_weight, self.polarise_weight, self.oracle_weight = sparsity_weight, polarise_weight, oracle_weight
        self.kl_weight, self.width = kl_weight, width
        self.below_learns = any(p.requires_grad for name, p in model.named_parameters() if "gatekv_" not in name)
        announce(model)
        layers, inner = wrappers(model), base_model(model)
        # Behind a prompt neither states, nor latents, nor keys that later layers read are at hand: rows run whole.
        self.whole_rows = remembers(inner) or bool(readers_of(inner)) or layers[0].geometry.latent
        self.spec = cast(GateSpec, gate_spec(model))
        self.sequence = ALONE
        check_objective(objective, prefill, sparsity, scope, self.spec, width is not None)
        if width is not None and (self.below_learns or self.whole_rows):
            raise ValueError(
                "training for rate reads a prompt's keys and values from the teacher's cache: leave LoRA out, and use "
                "a model without states, latents and shared keys."
            )
        heads = layers[0].geometry.kv_heads
        units = {"global": 1, "layer": len(layers), "head": len(layers) * heads}[scope]
        self.register_buffer("multiplier", torch.zeros(units))

    def share_rows(self, sequence: Sequence) -> None:
        """From here on each row is computed by several processes (`gatekv.training.shared`); all get the same batches.

        Raises:
            ValueError: model, gate or objective cannot be computed so.
        """
        shared.check(self.model, self.spec, self.prefill, sequence)
        self.sequence = sequence

    def _prepare(self, batch: Batch, seed: int | None) -> tuple[Rows, dict[str, Any]]:
        """(the rows, what they ask of the gated layers in each of their passes)."""
        self.head.ready()
        rows = Rows.of(batch, self.model, self.sequence)
        prompt = self.prefill == "dense" or self.spec.context == "prompt"
        split = int(batch["split"][0]) if prompt else None
        return rows, {"split": split, "documents": rows.documents, "seed": seed, "sequence": rows.sequence}

    def _local_threshold(
        self, counted: torch.Tensor, target: float
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor | float]:
        def threshold(logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor | float:
            if self.sparsity != "budget":
                return logit_of(self.spec.threshold)
            return self._cut(logits[None], counted, target)[0]

        return threshold

    def _cut(self, logits: torch.Tensor, valid: torch.Tensor, target: float) -> torch.Tensor:
        """See `budget_cut`; logits: [layers, batch, kv_heads, tokens]. In a shared row, of this process."""
        every = self.sequence.together(logits.detach(), 2)
        cut = budget_cut(every, valid, target, self.spec.sinks, self.spec.window, self.scope)
        return self.sequence.part(cut, 2)

    def _teacher(self, rows: Rows, target: float, asked: dict[str, Any]) -> Teacher:
        """The plain model's pass, which also tells where a "budget" threshold must lie."""
        spec, zero = self.spec, torch.zeros((), device=rows.ids.device)
        local = self._local_threshold(_counted(rows, asked), target) if self.objective == "attention_mse" else None
        suffix = self.prefill == "dense" and local is None and not (self.below_learns or self.whole_rows)
        observe = suffix or self.sparsity == "budget" or self.oracle_weight > 0 or self.objective in LOCAL
        if self.objective == "lm" and not observe and not self.kl_weight:
            return Teacher(None, None, {}, None, zero)
        past = DynamicCache() if suffix else None  # without a config: sliding layers keep the whole prompt too
        context: PassContext = Plain(sequence=asked["sequence"])
        if observe:
            context = Observe(**asked, received=self.oracle_weight > 0, local=local)
        with torch.no_grad(), gated_pass(self.model, context) as said, quiet(self.model, lora=False):
            hidden = rows.hidden(self.head.decoder, past)
        oracle, thresholds = zero, None
        if self.oracle_weight > 0:
            losses = [
                oracle_loss(o.logits, cast(torch.Tensor, o.received), o.valid, spec.sinks, spec.window)
                for o in said.values()
            ]
            oracle = stacked(losses).mean()
        if self.sparsity == "budget":
            cut = self._cut(stacked(o.logits.detach() for o in said.values()), _counted(rows, asked), target)
            thresholds = {i: c.to(o.logits.device) for (i, o), c in zip(said.items(), cut)}
        return Teacher(hidden, past, said, thresholds, oracle)

    def _student(self, rows: Rows, teacher: Teacher, context: Relaxed) -> tuple[torch.Tensor, dict[int, GateOutput]]:
        """(hidden states under the gates, what they said); behind the split only, where the teacher has a cache."""
        if teacher.past is None:
            with gated_pass(self.model, context) as said:
                return rows.hidden(self.head.decoder), said
        assert context.split is not None  # a teacher's cache is that of a prompt
        weights = {
            i: relaxed_flags(
                o.logits, o.valid, self.spec, form=cast(str, context.form), threshold=self._threshold(teacher, i),
                split=context.split, seed=context.noise_seed(i),
            )
            for i, o in teacher.said.items()
        }  # fmt: skip
        codings = None if self.width is None else {
            i: Coding.of(self.width, o.logits - self._threshold(teacher, i), o.valid, self.spec.sinks)
            for i, o in teacher.said.items()
        }  # fmt: skip
        past = gated_prompt(teacher.past, context.split, weights, self.spec, codings)
        return rows.hidden(self.head.decoder, past, context.split), teacher.said

    def _threshold(self, teacher: Teacher, layer_idx: int) -> torch.Tensor | float:
        return logit_of(self.spec.threshold) if teacher.thresholds is None else teacher.thresholds[layer_idx]

    def _task(
        self, rows: Rows, teacher: Teacher, form: str, asked: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[int, GateOutput]]:
        """(the task's loss, what the gates said in the pass that it is taken from)."""
        if self.objective == "none":
            return torch.zeros((), device=rows.ids.device), teacher.said
        if self.objective == "attention_mse":
            return stacked(cast(torch.Tensor, o.error) for o in teacher.said.values()).mean(), teacher.said
        student, said = self._student(rows, teacher, Relaxed(**asked, form=form, threshold=teacher.thresholds))
        head, labels, split, hidden = self.head, rows.ids.roll(-1, 1), asked["split"], teacher.hidden
        weights = wide(cast(torch.Tensor, rows.weights), student)  # weights[t]: of predicting token t + 1
        if split is not None:  # before it a prompt gate's flags know the future, and a dense prompt is the teacher's
            weights = weights * (torch.arange(weights.shape[1], device=weights.device) >= split)
        if teacher.past is not None:
            assert hidden is not None
            weights, labels, hidden = weights[:, split:], labels[:, split:], hidden[:, split:]
        labels, shares = self.sequence.part(labels, 1), self.sequence.size * self.sequence.part(row_shares(weights), 1)
        if self.objective == "lm":
            loss = lm_loss(student, labels, head, shares)
            if not self.kl_weight:
                return loss, said
        assert hidden is not None
        if self.objective == "lm":
            return loss + self.kl_weight * distillation_loss(student, hidden, head, shares), said
        if self.objective == "hidden_mse":
            return hidden_loss(student, hidden, shares), said
        return distillation_loss(student, hidden, head, shares, reverse=self.objective == "reverse_kl"), said

    def forward(
        self, batch: Batch, target: float, warm: bool = False, seed: int | None = None
    ) -> dict[str, torch.Tensor]:
        """batch: input_ids, attention_mask, weights [batch, tokens], split [batch], one value for all rows; input_ids
        on the model's device, the rest best on the CPU (`gatekv.training.rows`), where to look at it is free; target:
        keep rate aimed at ("budget": held); seed: of the gumbel noise.

        warm: the oracle alone, without the student's pass (a third of the time); needs oracle_weight > 0.
        Returns {"loss", "task", "oracle", "sparsity", "keep" (hard rate, scalar), "gap" [units] for the multipliers}.
        """
        behind = self.prefill == "dense" and not self.below_learns  # a short pass, which reads a cache
        with quiet(self.model), whole_layers(self.model) if behind else nullcontext():
            return self._step(batch, target, warm, seed)

    def _step(self, batch: Batch, target: float, warm: bool, seed: int | None) -> dict[str, torch.Tensor]:
        spec, (rows, asked) = self.spec, self._prepare(batch, seed)
        teacher = self._teacher(rows, target, asked)
        task, said, oracle = torch.zeros((), device=teacher.oracle.device), teacher.said, teacher.oracle
        if not warm:
            task, said = self._task(rows, teacher, spec.relaxation, asked)
            task = task.to(oracle.device)  # where layers lie on several devices, it is of the last
        soft, hard, shrugs = [], [], []
        noise = Relaxed(seed=seed)
        for i, (logits, valid, *_) in said.items():
            threshold = self._threshold(teacher, i)
            rule: dict[str, Any] = dict(threshold=threshold, seed=noise.noise_seed(i))
            weight = relaxed_flags(logits, valid, spec, form=spec.relaxation, **rule)
            weight = 1 - (1 - weight).square() if self.sparsity == "concave" else weight
            if self.sparsity == "capacity":
                soft.append(overfull(weight, valid, target))
            else:
                soft.append(keep_rates(weight, valid, spec.sinks, spec.window))
            flags = relaxed_flags(logits, valid, spec, form="hard", **rule)
            hard.append(keep_rates(flags, valid, spec.sinks, spec.window))
            shrugs.append(undecided(logits - threshold, valid, spec.sinks, spec.window))
        rates = self.sequence.together(stacked(soft), 2)
        gap = sparsity_gap(rates, 0.0 if self.sparsity == "capacity" else target, self.scope)
        penalty = sparsity_loss(gap, self.sparsity, self.multiplier)
        loss = task + self.oracle_weight * oracle + self.polarise_weight * stacked(shrugs).mean()
        if self.sparsity != "budget":
            loss = loss + self.sparsity_weight * penalty
        return {
            "loss": loss, "task": task.detach(), "oracle": oracle.detach(), "sparsity": penalty.detach(),
            "keep": stacked(hard).detach().mean(), "gap": gap.detach().mean(1),
        }  # fmt: skip

    @torch.no_grad()
    def move_multipliers(self, gap: torch.Tensor, rate: float = 0.5) -> None:
        """Gradient ascent on the multipliers, once an optimizer step; gap [units] averaged over the global batch."""
        if self.sparsity == "lagrange":
            self.multiplier += rate * gap

    @torch.no_grad()
    def soft_hard(self, batch: Batch, target: float) -> dict[str, float]:
        """Train soft, deploy hard: task loss under both, their gap, and how undecided the gates are (share of .05 < p <
        .95). A layer-local objective has no hard loss of its own: nan."""
        mean = lambda part: float(self.sequence.mean(part))  # noqa: E731
        with as_evaluated(self.model):  # and so without checkpointing
            rows, asked = self._prepare(batch, None)
            teacher = self._teacher(rows, target, asked)
            loss, said = self._task(rows, teacher, self.spec.relaxation, asked)
            soft = mean(loss)
            p = stacked((o.logits - self._threshold(teacher, i)).sigmoid() for i, o in said.items())
            real = next(iter(said.values())).valid[:, None].expand(p.shape[1:])
            local = self.objective == "attention_mse"
            hard = float("nan") if local else mean(self._task(rows, teacher, "hard", asked)[0])
        shrugs = mean(((p > 0.05) & (p < 0.95))[:, real].float().mean())
        return {"soft": soft, "hard": hard, "soft_hard_gap": hard - soft, "undecided": shrugs}


def check_objective(
    objective: str, prefill: str, sparsity: str, scope: str, spec: GateSpec, coded: bool = False
) -> None:
    """ValueError for combinations that cannot be computed; coded: what is kept of a prompt is stored in few bits."""
    if coded and (prefill != "dense" or objective in LOCAL or spec.relaxation == "decay"):
        raise ValueError(
            "training for rate codes a prompt for what follows it: use prefill='dense', an objective of the model's "
            "output (kl, reverse_kl, lm, hidden_mse), and gates that do not fade."
        )
    if (spec.relaxation == "decay") != (sparsity == "capacity"):
        raise ValueError("relaxation='decay' and sparsity='capacity' belong together: set both, or neither.")
    if objective == "attention_mse" and sparsity == "budget" and scope == "global":
        raise ValueError(
            "objective='attention_mse' is computed layer by layer, before heads of other layers are known: use "
            "scope='layer' or 'head' with sparsity='budget', or a penalty."
        )
    if prefill == "dense" and spec.context == "prompt" and spec.mask_prompt:
        raise ValueError("a gate that masks its own prompt trains with prefill='sparse'; or set mask_prompt=false.")
