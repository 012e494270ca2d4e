"""Train low-rank maps (LESS) on a frozen model, for what a policy evicts.

    accelerate launch recipes/less.py                                            # over SnapKV at 12.5 %: five minutes
    accelerate launch recipes/less.py --policy sinks_recent --max_steps 20       # a short trial
    accelerate launch recipes/less.py --adapter checkpoints/demo --policy gate+global      # beside a trained gate
    accelerate launch recipes/less.py --resume                                   # go on from output_dir/checkpoint

Options: gatekv.training.less_config.LessConfig. Writes the adapter (with the gate, if there is one), its card and
training.json to output_dir; use it as KVCache(model, "snapkv+less", 0.125).
"""

import time

from common import load_model, run, save_run


def main(argv: list[str]) -> None:
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from gatekv.training.config import load_config
    from gatekv.training.data import TrainingData, check_length
    from gatekv.training.less_config import LessConfig
    from gatekv.training.lesson import LessObjective, with_maps
    from gatekv.training.loop import PROBE_ROW, train
    from gatekv.training.sharding import embeddings, in_parts

    config = load_config(argv, LessConfig)
    accelerator = Accelerator(log_with=None if config.log_with == "none" else config.log_with)
    set_seed(config.seed)

    model, tokenizer = load_model(config.model, config.dtype)
    check_length(config.sequence_length, model.config)
    shares = {"retrieval_share": config.retrieval_share, "recite_share": config.recite_share, "answer_weight": 1.0}
    data = TrainingData(tokenizer, config.data, config.sequence_length, seed=config.seed, **shares)
    maps = {"less_rank": config.rank, "less_hidden": config.hidden, "less_dropout": config.dropout}
    with embeddings(model):
        model = with_maps(model, config.adapter, **maps, less_policy=config.policy, less_budget=config.target_keep)
    model.train()
    if accelerator.is_main_process:
        model.print_trainable_parameters()
    accelerator.init_trackers("gatekv", config=config.options() | {"data": ",".join(config.data)})

    objective = LessObjective(model, config.policy, config.objective)
    start = time.monotonic()
    records = train(objective, data, config, accelerator)
    seconds = round(time.monotonic() - start, 1)

    batch = {k: v.to(accelerator.device) for k, v in data.batch(PROBE_ROW, 1, align=True).items()}
    with in_parts(objective):
        found = objective.soft_hard(batch, config.target_keep)
    save_run(accelerator, model, tokenizer, config, records, found, seconds)
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
