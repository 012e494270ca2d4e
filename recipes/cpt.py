"""Continual pre-training of gates on a frozen model.

    accelerate launch recipes/cpt.py                                   # the demo: six minutes on two cores
    accelerate launch recipes/cpt.py --max_steps 6 --output_dir checkpoints/try      # a two-minute trial
    accelerate launch recipes/cpt.py --config recipes/configs/paper.yaml --learning_rate 1e-3
    accelerate launch recipes/cpt.py --resume                          # go on from the newest checkpoint in output_dir
    python recipes/cpt.py --dry_run                                    # memory, tokens, schedules; loads no weights
    python recipes/cpt.py --config recipes/configs/llama-3.1-8b.yaml --dry_run fsdp2:8

Writes checkpoints, then the adapter, its card and training.json to
output_dir. SIGTERM and Ctrl-C finish the step, save a checkpoint and exit with code 75: --resume goes on.
"""

from gatekv.recipes.common import run
from gatekv.recipes.frame import begin, finish, fit, judge, predict, save


def main(argv: list[str]) -> dict | None:
    from peft import get_peft_model

    from gatekv import GateKVConfig
    from gatekv.policies.rate import Rate
    from gatekv.recompute import recompute_layers
    from gatekv.training.calibrate import calibrate
    from gatekv.training.config import CPTConfig
    from gatekv.training.data import TrainingData
    from gatekv.training.objective import Objective
    from gatekv.training.options import load_config
    from gatekv.training.sharding import in_parts, whole_sample

    def gated(model):
        with whole_sample(model):
            return get_peft_model(model, GateKVConfig(task_type="CAUSAL_LM", **vars(config.spec)))

    config = load_config(argv, CPTConfig, __doc__)
    if config.dry_run:
        return predict(config, gated)
    accelerator, model, tokenizer = begin(config)
    data = TrainingData(
        tokenizer,
        config.data,
        config.sequence_length,
        retrieval_share=config.retrieval_share,
        recite_share=config.recite_share,
        answer_weight=config.answer_weight,
        seed=config.seed,
        pack=config.pack,
    )
    model = gated(model)
    if config.gradient_checkpointing:
        recompute_layers(model)
    objective = Objective(
        model,
        objective=config.objective,
        prefill="dense" if config.prefill == "rate" else config.prefill,
        sparsity=config.sparsity,
        scope=config.scope,
        sparsity_weight=config.sparsity_weight,
        polarise_weight=config.polarise_weight,
        oracle_weight=config.oracle_weight,
        width=Rate() if config.prefill == "rate" else None,
    )
    records, seconds = fit(objective, data, config, accelerator)
    model.train()
    found = judge(objective, data, config, accelerator)
    data.pack = False  # thresholds are read off rows as they will be used
    with in_parts(objective):
        calibrate(model, data, keep=config.target_keep if config.sparsity == "budget" else None)
    save(accelerator, model, tokenizer, config, records, seconds, found)
    finish(accelerator)


if __name__ == "__main__":
    run(main)
