"""Named recipes: what the paper does, and what measured best. A preset is a plain dict of `recipes/cpt.py` keys."""

from gatekv.config import check_choice

PRESETS = {
    # Attention-Gate (arXiv 2410.12876): LM loss, straight-through flags, |mean - target| per layer, no grace window.
    # Reconstructed (the paper gives none of them): module sizes, strength, threshold, sinks, learning rate, steps.
    "attention-gate": {
        "gate": "attention", "relaxation": "ste", "window": 0, "sinks": 4, "objective": "lm",
        "sparsity": "abs", "scope": "layer", "sparsity_weight": 1.0, "target_keep": 0.4,
    },
    # What measured best on SmolLM2-135M in six minutes on two cores; see LOG.md. The oracle gives every token of every
    # head a target, so half of the steps need no student; then straight-through flags at exact, sampled budgets.
    "default": {
        "gate": "mlp", "relaxation": "ste", "window": 32, "sinks": 4, "initial_logit": -5.0, "objective": "kl",
        "sparsity": "budget", "scope": "global", "target_keep": 0.2, "target_share": 0.5,
        "oracle_weight": 0.3, "warm_share": 0.5, "max_steps": 140,
    },
}  # fmt: skip


def preset(name: str) -> dict:
    """A copy of the preset's settings; ValueError lists the names."""
    check_choice("preset", name, PRESETS)
    return dict(PRESETS[name])
