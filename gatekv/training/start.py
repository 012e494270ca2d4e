"""A new adapter that begins with parts of a trained one: first plain text, then a task."""

from typing import cast

from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from gatekv.adapter import GateKVConfig
from gatekv.bundled import adapter_path
from gatekv.config import GateSpec, LessSpec
from gatekv.lora import detach

FORM = ("gate", "context", "hidden", "heads", "head_dim", "context_window", "mask_prompt", "logit_scale")


def check_form(
    adapter: str, what: str, old: GateSpec | LessSpec, new: GateSpec | LessSpec, names: tuple[str, ...]
) -> None:
    """ValueError unless the fields `names` of two configs are the same: what is trained on must be built alike."""
    for name in names:
        before, now, option = getattr(old, name), getattr(new, name), name.removeprefix("less_")
        if before != now:
            raise ValueError(f"{adapter} has {what} with {option} {before!r}, and {option} is {now!r}: go on with "
                             f"--{option} {before}, or leave --adapter out for fresh ones.")  # fmt: skip


def rebuilt(trained: PeftModel, config: GateKVConfig, *kinds: str) -> PeftModel:
    """The PEFT model of `config` in the place of `trained`, with the parameters of it that have one of kinds in their
    names."""
    parts = {name: p.detach() for name, p in trained.named_parameters() if any(kind in name for kind in kinds)}
    model = get_peft_model(detach(trained), config)
    left = model.load_state_dict(parts, strict=False)
    assert not left.unexpected_keys
    return model


def start_from(model: PreTrainedModel, adapter: str, config: GateKVConfig) -> PeftModel:
    """The PEFT model of `config` on `model`, with the weights of the gates in `adapter`, a folder or Hub name; empty:
    fresh gates. Window, sinks, threshold and relaxation are config's.

    Raises:
        ValueError: the adapter has no gate, one of another form, or LoRA, or is of another base.
    """
    if not adapter:
        return get_peft_model(model, config)
    trained = PeftModel.from_pretrained(model, adapter_path(adapter))
    old = cast(GateKVConfig, trained.peft_config["default"])
    if old.gate == "none":
        raise ValueError(f"{adapter} has no gate to begin with: leave --adapter out for a fresh one.")
    if old.lora is not None:
        raise ValueError(f"the gates of {adapter} belong to a base tuned by its LoRA: merge it into the base first, "
                         "with merge_lora(), or go on with that run by --resume.")  # fmt: skip
    check_form(adapter, "gates", old, config, FORM)
    return rebuilt(trained, config, "gatekv_gate")
