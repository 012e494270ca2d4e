"""Named recipes: what each paper does, and what measured best here. A preset is a plain dict of `recipes/cpt.py` keys.

What a paper leaves open was chosen here, and stands under "reconstructed". Windows are the papers': rows must be longer
than sinks + window, so short rows need `--window 32`.
"""

from gatekv.config import check_choice

PRESETS = {
    # Attention-Gate (arXiv 2410.12876): MHA' over the whole prompt, straight-through flags that act for the prompt's
    # own queries too, LM loss + |mean - target| per layer, no grace window. Reconstructed (the paper gives none):
    # module sizes, strength, threshold, sinks, learning rate, steps; split points, without which its LM loss leaks.
    "attention-gate": {
        "gate": "attention", "context": "prompt", "mask_prompt": True, "relaxation": "ste", "window": 0, "sinks": 4,
        "objective": "lm", "sparsity": "abs", "scope": "layer", "sparsity_weight": 1.0, "target_keep": 0.4,
    },
    # DMS (arXiv 2506.05345): one linear map, its logit loud (x 100, bias 5), Gumbel noise at .1, distillation, a
    # one-sided penalty on the mean over all heads, the target falling over the whole run, a wide window. Reconstructed:
    # strength, rate; its target falls linearly in the compression ratio, ours in the share kept.
    "dms": {
        "gate": "linear", "logit_scale": 100.0, "initial_logit": 5.0, "relaxation": "gumbel", "temperature": 0.1,
        "window": 256, "sinks": 0, "objective": "kl", "sparsity": "hinge", "scope": "global", "sparsity_weight": 10.0,
        "target_keep": 0.25, "target_share": 1.0, "learning_rate": 1e-3,
    },
    # WG-KV: an MLP per KV head over its key before and after RoPE, log-gate, last hidden states to the full cache's,
    # a price on 1 - (1 - g)^2 for all tokens outside the window, hard at g > .1. Reconstructed: the price; the paper
    # clamps g at 1e-3, we at e^-30.
    "wg-kv": {
        "gate": "key_mlp", "hidden": 256, "relaxation": "log", "window": 256, "sinks": 0, "threshold": 0.1,
        "objective": "hidden_mse", "sparsity": "concave", "scope": "global", "sparsity_weight": 0.1,
    },
    # TRIM-KV: each token keeps a share beta of its weight from step to step, distillation, a price on more tokens than
    # the buffer holds; deployed with `gate+decay`: the faintest leave a buffer of fixed size. Reconstructed: the price.
    "trim-kv": {
        "gate": "mlp", "hidden": 512, "initial_logit": 10.0, "relaxation": "decay", "window": 128, "sinks": 4,
        "objective": "kl", "sparsity": "capacity", "scope": "global", "sparsity_weight": 10.0, "target_keep": 0.2,
    },
    # KVzap: the score itself is regressed, layer by layer, and nothing else is trained. Reconstructed: the target is
    # the most attention a token receives later in its own row (KVzip asks the model to repeat the prompt).
    "kvzap": {
        "gate": "mlp", "hidden": 512, "initial_logit": -5.0, "relaxation": "ste", "window": 128, "sinks": 4,
        "objective": "none", "sparsity": "budget", "oracle_weight": 1.0, "target_share": 0.0,
    },
    # What measured best on SmolLM2-135M in six minutes on two cores (docs/lab-notes/training-objective.md). The oracle
    # gives every token of every head a target, so half of the steps need no student; then straight-through flags at
    # exact, sampled budgets.
    "default": {
        "gate": "mlp", "relaxation": "ste", "window": 32, "sinks": 4, "initial_logit": -5.0, "objective": "kl",
        "sparsity": "budget", "scope": "global", "target_keep": 0.2, "target_share": 0.5,
        "oracle_weight": 0.3, "warm_share": 0.5, "max_steps": 140,
    },
    # The same for `rate`: a byte budget keeps more tokens, in few bits; the student reads them so.
    "rate": {
        "gate": "mlp", "relaxation": "ste", "window": 32, "sinks": 4, "initial_logit": -5.0, "objective": "kl",
        "prefill": "rate", "sparsity": "budget", "scope": "global", "target_keep": 0.25,
        "budget_spread": 2.5, "target_share": 0.5, "oracle_weight": 0.3, "warm_share": 0.5, "retrieval_share": 0.5,
        "recite_share": 0.2, "sequence_length": 1024, "max_steps": 260,
    },
}  # fmt: skip


def preset(name: str) -> dict:
    """A copy of the preset's settings; ValueError lists the names."""
    check_choice("preset", name, PRESETS)
    return dict(PRESETS[name])
