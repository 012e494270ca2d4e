"""Train low-rank maps (LESS) on a frozen model, for what a policy evicts.

    accelerate launch recipes/less.py                                            # over SnapKV at 12.5 %: five minutes
    accelerate launch recipes/less.py --policy sinks_recent --max_steps 20       # a short trial
    accelerate launch recipes/less.py --adapter checkpoints/demo --policy gate+global      # beside a trained gate
    accelerate launch recipes/less.py --adapter checkpoints/sft --policy gate+global       # beside a gate and LoRA
    accelerate launch recipes/less.py --policy gate+global --train_gate true               # a gate and maps, together
    accelerate launch recipes/less.py --resume                                   # go on from the newest checkpoint
    python recipes/less.py --dry_run                                             # memory, tokens; loads no weights

Options: gatekv.training.less_config.LessConfig. Writes the adapter (with the gate and LoRA that it began with), its
card and training.json to output_dir, checkpoints before; use it as KVCache(model, "snapkv+less", 0.125).
"""

from gatekv.recipes.common import run
from gatekv.recipes.frame import begin, finish, fit, judge, predict, save


def main(argv: list[str]) -> dict | None:
    from gatekv.training.calibrate import calibrate
    from gatekv.training.data import TrainingData
    from gatekv.training.joint import JointObjective
    from gatekv.training.less_config import LessConfig
    from gatekv.training.lesson import LessObjective, with_maps
    from gatekv.training.options import load_config
    from gatekv.training.sharding import in_parts, whole_sample

    def gated(model):
        maps = {f"less_{name}": getattr(config, name) for name in ("form", "rank", "hidden", "dropout")}
        with whole_sample(model):
            maps |= {"less_policy": config.policy, "less_budget": config.target_keep}
            return with_maps(model, config.adapter, config.fresh_gate, config.train_gate, **maps)

    config = load_config(argv, LessConfig, __doc__)
    if config.dry_run:
        return predict(config, gated)
    accelerator, model, tokenizer = begin(config)
    shares = {
        "retrieval_share": config.retrieval_share,
        "recite_share": config.recite_share,
        "answer_weight": 20.0 if config.train_gate else 1.0,
    }
    data = TrainingData(tokenizer, config.data, config.sequence_length, seed=config.seed, **shares)
    model = gated(model)
    if config.train_gate:
        objective = JointObjective(model, config.policy)
    else:
        objective = LessObjective(model, config.policy, config.objective)
    records, seconds = fit(objective, data, config, accelerator)
    found = judge(objective, data, config, accelerator)
    if config.train_gate:
        with in_parts(objective):
            calibrate(model, data, keep=config.target_keep)
    save(accelerator, model, tokenizer, config, records, seconds, found)
    finish(accelerator)


if __name__ == "__main__":
    run(main)
