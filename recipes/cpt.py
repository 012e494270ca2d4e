"""Continual pre-training of gates on a frozen model.

    accelerate launch recipes/cpt.py                                   # the demo: six minutes on two cores
    accelerate launch recipes/cpt.py --max_steps 6 --output_dir checkpoints/try      # a two-minute trial
    accelerate launch recipes/cpt.py --config recipes/configs/paper.yaml --learning_rate 1e-3
    accelerate launch recipes/cpt.py --resume                          # go on from output_dir/checkpoint

Options: gatekv.training.config.CPTConfig. Writes the adapter, its card and training.json to output_dir.
"""

import time

from common import load_model, run, save_run


def main(argv: list[str]) -> None:
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from peft import get_peft_model

    from gatekv import GateKVConfig
    from gatekv.training.calibrate import calibrate
    from gatekv.training.config import load_config
    from gatekv.training.data import TrainingData, check_length
    from gatekv.training.loop import PROBE_ROW, train
    from gatekv.training.objective import Objective
    from gatekv.training.recompute import recompute_layers
    from gatekv.training.sharding import embeddings, in_parts

    config = load_config(argv)
    accelerator = Accelerator(log_with=None if config.log_with == "none" else config.log_with)
    set_seed(config.seed)

    model, tokenizer = load_model(config.model, config.dtype)
    check_length(config.sequence_length, model.config)
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
    with embeddings(model):
        model = get_peft_model(model, GateKVConfig(task_type="CAUSAL_LM", **vars(config.spec)))
    model.train()
    if config.gradient_checkpointing:
        recompute_layers(model)
    if accelerator.is_main_process:
        model.print_trainable_parameters()
    accelerator.init_trackers("gatekv", config=config.options() | {"data": ",".join(config.data)})

    objective = Objective(
        model,
        objective=config.objective,
        prefill=config.prefill,
        sparsity=config.sparsity,
        scope=config.scope,
        sparsity_weight=config.sparsity_weight,
        polarise_weight=config.polarise_weight,
        oracle_weight=config.oracle_weight,
    )
    start = time.monotonic()
    records = train(objective, data, config, accelerator)
    seconds = round(time.monotonic() - start, 1)

    batch = {k: v.to(accelerator.device) for k, v in data.batch(PROBE_ROW, 1, align=True).items()}
    model.train()
    with in_parts(objective):
        gap = objective.soft_hard(batch, config.target_keep)
        data.pack = False  # thresholds are read off rows as they will be used
        calibrate(model, data, keep=config.target_keep if config.sparsity == "budget" else None)
    save_run(accelerator, model, tokenizer, config, records, gap, seconds)
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
