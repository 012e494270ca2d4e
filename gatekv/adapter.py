"""Gates as a PEFT method: config, tuner layer and tuner in one file; with gatekv.lora all that touches PEFT.

`import gatekv` registers the type "GATEKV"; then get_peft_model, PeftModel.from_pretrained, AutoPeftModelForCausalLM,
disable_adapter (= the plain base), save_pretrained and push_to_hub work. Where stock PEFT would warn and go on with
random weights we raise. Tensors are named `gatekv_gate.*`, `gatekv_less.*` and, PEFT's own LoRA, `lora_*`.
"""

import functools
import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging

from gatekv import lora, modules
from gatekv.adapter_file import AGAIN, check_shapes, find, read_config, read_shapes
from gatekv.bases import commit_of, local_name, public_name
from gatekv.config import GateSpec, LessSpec, check_keys, check_types, strict
from gatekv.fingerprint import HASHES, fingerprint, tensors_sha256
from gatekv.gates import build_gate
from gatekv.gates.calibration import Calibration
from gatekv.geometry import Geometry, geometry_of, readers_of
from gatekv.less.maps import LessMaps
from gatekv.modules import PARTS, attention_layers, use_attention
from gatekv.version import VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.get_logger(__name__)

PREFIX = "gatekv_"


class _PeftType(str):
    """PEFT's own enum cannot be extended; a str that has `.value` passes wherever the enum does."""

    value = property(str.__str__)


GATEKV = _PeftType("GATEKV")


@strict
@dataclass
class GateKVConfig(PeftConfig, GateSpec, LessSpec):
    """Config of a gatekv adapter: a gate, a low-rank remainder, LoRA, or any of them; `GateKVConfig()` is usable as is.

    Fields: see also `gatekv.config.GateSpec` and `LessSpec`.

    Attributes:
        target_modules: names, or their ends, of the attention modules to gate; None: all full-attention layers.
        lora: PEFT's LoRA beside the gate, in the same adapter: fields of peft.LoraConfig (see gatekv.lora.FIELDS), or
            None.
        base_fingerprint: shapes and a weight hash of the base model, filled in on creation, checked on loading.
        calibration: ratios, levels and table of `gatekv.gates.calibration.Calibration`, or None before calibration.
        weights_sha256: of the tensors in the adapter file, written on saving, checked when that file is loaded. It
            says nothing of the tensors of a model, which training and averaging change.
        gatekv_version: that wrote the config.
    """

    target_modules: list[str] | None = None
    lora: dict | None = None
    base_fingerprint: dict | None = None
    calibration: dict | None = None
    weights_sha256: str | None = None
    gatekv_version: str = VERSION

    # Not fields: name -> shape of the tensors in the file that the config came with; their hash, until they are loaded.
    if TYPE_CHECKING:
        file_shapes: dict[str, tuple[int, ...]] | None = None
        file_sha256: str | None = None
    else:
        file_shapes = file_sha256 = None

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        check_types(GateKVConfig, self)
        GateSpec.__post_init__(self)
        LessSpec.__post_init__(self)
        self.peft_type = GATEKV
        self.file_sha256 = self.weights_sha256
        if self.lora is not None:
            self.lora = lora.checked(self.lora)
        if self.gate == "none" and not self.less_rank and self.lora is None:
            raise ValueError("gate='none' leaves an adapter without anything in it: set less_rank, e.g. 8, or lora.")
        if self.task_type not in (None, "CAUSAL_LM"):
            raise ValueError(f"task_type {self.task_type!r}: there is a KV cache in task_type='CAUSAL_LM' only.")
        if self.calibration is not None:
            known = {f.name for f in fields(Calibration)}
            check_keys("calibration", self.calibration, known)
            check_keys("what a calibration needs", known, self.calibration)
            Calibration(**self.calibration)
        self.base_model_name_or_path = local_name(self.base_model_name_or_path, self.revision)

    def to_dict(self) -> dict:
        """What is written: the base by the name that others know it by."""
        return super().to_dict() | {"base_model_name_or_path": public_name(self.base_model_name_or_path)}

    def gate_spec(self) -> GateSpec:
        return GateSpec(**{f.name: vars(self)[f.name] for f in fields(GateSpec)})

    def less_spec(self) -> LessSpec:
        return LessSpec(**{f.name: vars(self)[f.name] for f in fields(LessSpec)})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Also records the hash of the weights, which PEFT writes into the same folder just before."""
        weights = os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)
        if os.path.isfile(weights):
            self.weights_sha256 = tensors_sha256(load_file(weights))
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "GateKVConfig":
        """As PeftConfig's, of a folder or a Hub name; checks both files of the adapter before anything is built on it.

        Raises:
            ValueError: nothing there, or not for you; another type of adapter; weights missing, pickled, truncated or
                not those that were saved. TypeError: an unknown key, or a value of another type.
        """
        hub, _, _ = cls._split_kwargs(kwargs)
        name = os.fspath(pretrained_model_name_or_path)
        file = lambda filename: find(name, filename, subfolder, **hub)  # noqa: E731
        config = file(CONFIG_NAME)
        if config is None:
            raise ValueError(f"{name} has no {CONFIG_NAME}: it is no adapter, or was copied in part; {AGAIN}.")
        found = read_config(config)
        if found.get("peft_type") != GATEKV:
            raise ValueError(f"{name} is an adapter of type {found.get('peft_type')!r}, not {GATEKV}: use PeftModel.")
        weights = file(SAFETENSORS_WEIGHTS_NAME)
        if weights is None:
            hint = f"{WEIGHTS_NAME} is a pickle, which gatekv never loads" if file(WEIGHTS_NAME) else AGAIN
            raise ValueError(f"{name} has no {SAFETENSORS_WEIGHTS_NAME}: {hint}.")
        shapes = read_shapes(weights)
        try:
            config = super().from_pretrained(name, subfolder=subfolder, **kwargs)
        except TypeError as error:
            saved = found.get("gatekv_version")
            hint = (
                f" Saved by gatekv {saved!r:.20}, this is {VERSION}: pip install -U gatekv." if saved != VERSION else ""
            )
            raise TypeError(f"{error}{hint}") from error
        if tensors_sha256(load_file(weights)) != config.weights_sha256:
            raise ValueError(
                f"the tensors in {weights} do not have the sha256 that {CONFIG_NAME} records: the file was damaged or "
                f"edited; {AGAIN}."
            )
        config.file_shapes = shapes
        return config


def _hidden_size(model: nn.Module) -> int:
    return cast("PreTrainedModel", model).config.get_text_config(decoder=True).hidden_size


def parts_of(config: GateKVConfig, hidden_size: int, layer: Geometry) -> dict[str, nn.Module]:
    """A layer's parts, by the submodule of its attention that holds them. hidden_size: of the language model."""
    parts: dict[str, nn.Module] = {}
    if config.gate != "none":
        parts["gatekv_gate"] = build_gate(config.gate_spec(), hidden_size, layer.kv_heads, layer.key_dim)
    if config.less_rank:
        parts["gatekv_less"] = LessMaps(config.less_spec(), layer.heads, layer.kv_heads, layer.key_dim)
    return parts


class Parts(nn.ModuleDict, BaseTunerLayer):
    """One kind of an attention's parts, adapter name -> module, which PEFT switches, freezes and deletes by its rules.

    The attention itself is no tuner layer, so that PEFT finds, freezes and adapts what lies inside it as in any model.
    """

    adapter_layer_names = ("adapters",)

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.__dict__["attention"] = attention  # not a submodule of what it holds

    @property
    def adapters(self) -> "Parts":
        """Where PEFT looks for adapters by name."""
        return self

    def get_base_layer(self) -> nn.Module:
        """Nothing lies under gates."""
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """A gate has nothing to merge; LoRA's own layers do it."""

    def unmerge(self) -> None:
        """As `merge`."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self:  # gates keep their own dtype
            self[adapter_name].to(device or modules.device_of(cast(nn.Module, self.attention)))


def add_parts(module: nn.Module, adapter_name: str, active: list[str], config: GateKVConfig, hidden_size: int) -> None:
    """Add an adapter's parts to an attention module, where it runs. active: the adapters in force; hidden_size: of the
    language model. Under `low_cpu_mem_usage` they are on the meta device until PEFT loads them."""
    device = modules.device_of(module)
    layer = modules.gate(module)
    layer.calibrations[adapter_name] = Calibration(**config.calibration) if config.calibration else None
    if config.gate != "none":
        layer.specs[adapter_name] = config.gate_spec()
    for name in PARTS:
        if name not in module._modules:
            module.add_module(name, Parts(module))
    for name, part in parts_of(config, hidden_size, layer.geometry).items():
        empty = any(p.device.type == "meta" for p in part.parameters())
        cast(Parts, module._modules[name])[adapter_name] = part if empty else part.to(device)
    for name in PARTS:
        held = cast(Parts, module._modules[name])
        held.set_adapter(active)
        if adapter_name in held and adapter_name not in active:
            held[adapter_name].requires_grad_(False)


class GateKVModel(BaseTuner):
    """PEFT tuner that puts gates into every full-attention layer, in place; PEFT's LoRA goes beside them."""

    prefix = PREFIX
    peft_config: dict[str, GateKVConfig]  # type: ignore[assignment]  # its configs are gatekv's
    tuner_layer_cls = BaseTunerLayer  # gates and LoRA's layers are switched, frozen and deleted together
    target_module_mapping = {}
    _gated_layers: set[int]  # while an adapter is put in: ids of the attention modules that get gates

    def _pre_injection_hook(  # type: ignore[override]  # its configs are gatekv's
        self, model: "PreTrainedModel", config: GateKVConfig, adapter_name: str
    ) -> None:
        layers = attention_layers(model)  # says why, where a model cannot be gated
        use_attention(model)
        if config.gate == "key_mlp" and geometry_of(layers[0][1]).latent:
            raise ValueError(
                f"{type(model).__name__} caches latents (MLA), not the keys that gate='key_mlp' reads: use mlp."
            )
        if config.less_rank and geometry_of(layers[0][1]).latent:
            raise ValueError(f"{type(model).__name__} caches latents (MLA), of which there are no maps: less_rank=0.")
        if config.less_rank and readers_of(model):
            raise ValueError(
                f"later layers of {type(model).__name__} read earlier ones' keys and values, and low-rank maps belong "
                "to the queries of one layer: set less_rank=0."
            )
        self._prepare_adapter_config(config, {})
        found, wanted = fingerprint(model), config.base_fingerprint
        if wanted is None:
            config.base_fingerprint = found
            config.revision = config.revision or commit_of(model.name_or_path)
            wanted = found
        for key, value in wanted.items():
            if key not in HASHES and found.get(key) != value:
                raise ValueError(
                    f"this adapter was trained for a base with {key}={value}, but this model has {found.get(key)}: "
                    f"load it on {config.base_model_name_or_path or 'the base it was trained on'}."
                )
        hashes = [(wanted.get(key), found[key]) for key in HASHES]  # adapters before 2026-11-22 have one
        if any(None not in pair and pair[0] != pair[1] for pair in hashes):
            logger.warning(
                "gatekv: the base model's weights differ from those of the adapter's base (quantised, tuned, merged?); "
                "measure before relying on it."
            )
        if config.file_shapes is not None:
            found = {self._remove_adapter_name_from_key(k, "default"): v for k, v in config.file_shapes.items()}
            gates = {k: v for k, v in found.items() if f".{PREFIX}" in k}
            check_shapes(gates, self._shapes(model, config))

    def _prepare_adapter_config(self, config: GateKVConfig, model_config: dict) -> GateKVConfig:  # type: ignore[override]
        """Where no module is named, all that are gated are."""
        model = self.model
        layers, names = attention_layers(model), {id(module): name for name, module in model.named_modules()}
        if config.target_modules is None:
            config.target_modules = sorted({names[id(module)].split(".")[-1] for _, module in layers})
        for name in config.target_modules:
            if not any(f".{names[id(module)]}".endswith(f".{name}") for _, module in layers):
                raise ValueError(
                    f"target_modules names {name!r:.60}, and no full-attention layer of {type(model).__name__} is "
                    f"called so: they are called …{names[id(layers[0][1])].split('.')[-1]}. Leave it out to gate all."
                )
        return config

    def _shapes(self, model: "PreTrainedModel", config: GateKVConfig) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that an adapter file of `config` has; nothing is allocated."""
        layers = {id(module) for _, module in attention_layers(model)}
        hidden_size, out = _hidden_size(model), cast("dict[str, tuple[int, ...]]", {})
        for key, module in model.named_modules():
            if id(module) not in layers or not self._check_target_module_exists(config, key):
                continue
            with torch.device("meta"):
                parts = parts_of(config, hidden_size, geometry_of(module))
            for name, part in parts.items():
                start = f"base_model.model.{key}.{name}."
                out |= {start + k: tuple(v.shape) for k, v in part.state_dict().items()}
        return out

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """LoRA first, whose layers freeze as the base does; then PEFT's own way, which also says who is active.

        Raises:
            ValueError: the base has adapters of its own, which would be switched, trained and saved with the gates.
        """
        tuned = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        if isinstance(model, PeftModel) or tuned and not any(isinstance(m, Parts) for m in tuned):
            raise ValueError(
                f"{type(modules.base_model(model)).__name__} has an adapter already, which gates on top of it would "
                "train and save as their own: merge it first (model = model.merge_and_unload()), or let LoRA learn "
                "with the gates (GateKVConfig(lora={...}))."
            )
        config = self._prepare_adapter_config(self.peft_config[adapter_name], {})
        self._gated_layers = {id(module) for _, module in attention_layers(model)}
        if (fields := config.lora) is not None:
            if config.file_shapes is not None:
                lora.check_ranks(model, fields, config.file_shapes)
            lora.inject(model, adapter_name, fields, low_cpu_mem_usage)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        del self._gated_layers
        modules.attach_readers(model)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; the adapter that is active next is one for all layers, whatever each of them holds."""
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        for parts in [m for m in self.model.modules() if isinstance(m, Parts)]:  # PEFT passes over names with a prefix
            parts.delete_adapter(adapter_name)
        if was_active:
            self.set_adapter([n for n in self.active_adapters if n in self.peft_config] or list(self.peft_config)[:1])

    def merge_lora(self) -> None:
        """Fold LoRA into the base's weights for good; the gate and low-rank maps stay, now an adapter of that base.

        Raises:
            ValueError: several adapters, none with LoRA, or one with nothing else.
        """
        if len(self.peft_config) != 1:
            raise ValueError(
                f"merge_lora changes the base under all adapters: delete all but one of {[*self.peft_config]}."
            )
        (config,) = self.peft_config.values()
        if config.lora is None:
            raise ValueError("this adapter has no LoRA to merge.")
        if config.gate == "none" and not config.less_rank:
            raise ValueError("nothing would be left of this adapter: use merge_and_unload().")
        super()._unload_and_optionally_merge()
        self.model.peft_config = self.peft_config
        config.lora, config.base_fingerprint = None, fingerprint(self.model)

    def _unload_and_optionally_merge(  # type: ignore[override]  # all arguments are passed on
        self, *args: Any, **kwargs: Any
    ) -> nn.Module:
        """merge_and_unload and unload: the plain transformers model, LoRA in its weights or not, without gates."""
        super()._unload_and_optionally_merge(*args, **kwargs)
        return modules.detach(self.model)

    def _create_and_replace(  # type: ignore[override]  # its configs are gatekv's
        self,
        config: GateKVConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if id(target) in self._gated_layers:  # no sliding layer, no image tower
            add_parts(target, adapter_name, self.active_adapters, config, _hidden_size(self.model))

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """As PEFT's, under the names that files have had from the first version on."""
        found = super()._get_adapter_state_dict(model, *args, **kwargs)
        names = modules.saved_names(model, found)
        return {names[key]: tensor for key, tensor in found.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """A file does not tell under which name its adapter was held, so that it loads under any."""
        for part in PARTS:  # PEFT takes a name out next to last, where LoRA has it
            key = key.replace(f".{part}.{adapter_name}.", f".{part}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]  # its configs are gatekv's
        cls, model: nn.Module, config: GateKVConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Strict: every tensor has its place and shape, and no part is left without one; those of a folder have the
        hash that its config records too, since the file may have changed after the config was read."""
        names = {k: k.replace(".base_layer.", ".") for k in state_dict}  # modules.saved_names
        plain = {cls._remove_adapter_name_from_key(names[k], "default"): v for k, v in state_dict.items()}
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, plain)
        mine = re.compile(rf"\.(gatekv_gate|gatekv_less|lora_\w+)\.{re.escape(adapter_name)}(\.|$)")
        expected = {k: v for k, v in model.state_dict().items() if mine.search(k)}
        cure = "the file belongs to another config or was edited: load the folder as it was saved."
        if base := sorted(set(mapped) & _embeddings(model)):  # PEFT's choice, in files before 2026-11-30
            logger.warning(
                f"gatekv: the adapter file holds {len(base)} embeddings of its base, which had been resized; they are "
                "left out, because no adapter changes its base: where new tokens matter, load the base that has them."
            )
            mapped = {name: tensor for name, tensor in mapped.items() if name not in base}
        if stray := sorted(set(mapped) - set(expected)):
            raise ValueError(f"stray tensor '{stray[0]}' ({len(stray)} in all) in the adapter file: {cure}")
        if missing := sorted(set(expected) - set(mapped)):
            raise ValueError(f"missing tensor '{missing[0]}' ({len(missing)} in all) in the adapter file: {cure}")
        for key, tensor in mapped.items():
            if tensor.shape != expected[key].shape:
                found, wanted = tuple(tensor.shape), tuple(expected[key].shape)
                raise ValueError(f"tensor '{key}' has shape {found}, the config asks for {wanted}: {cure}")
        if _from_folder.get():
            if config.file_sha256 is not None and tensors_sha256(state_dict) != config.file_sha256:
                raise ValueError(f"the adapter's tensors do not have the sha256 its config records: {cure}")
        elif config.calibration is not None and any(not torch.equal(t.to(w), w) for t, w in _pairs(mapped, expected)):
            logger.warning_once(
                "gatekv: new weights were put into an adapter whose thresholds were calibrated for other ones: "
                "calibrate again (gatekv.training.calibrate)."
            )
        return mapped


_NAME = cast(PeftType, GATEKV)
PEFT_TYPE_TO_CONFIG_MAPPING[_NAME] = GateKVConfig
PEFT_TYPE_TO_TUNER_MAPPING[_NAME] = GateKVModel
PEFT_TYPE_TO_PREFIX_MAPPING[_NAME] = PREFIX


_from_folder = ContextVar("_from_folder", default=False)  # whether PEFT loads an adapter's file, not a caller's tensors


def _pairs(
    mapped: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(a tensor to load, the gate's that it replaces), but for those without numbers yet."""
    gates = [name for name in mapped if ".gatekv_gate." in name and expected[name].device.type != "meta"]
    return [(mapped[name], expected[name]) for name in gates]


def _embeddings(model: nn.Module) -> set[str]:
    """Names of the base's own input and output embeddings."""
    inner = modules.base_model(model)
    mine = {id(m) for m in (inner.get_input_embeddings(), inner.get_output_embeddings()) if m is not None}
    return {f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if id(module) in mine}


def _saving(save: Callable[..., Any]) -> Callable[..., Any]:
    """PeftModel.save_pretrained, which adds the embeddings of a base that was resized: ours are the base's, not the
    adapter's, which is put on a base that has them. Asked for by name, they are saved for whoever reads the file."""

    @functools.wraps(save)
    def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> Any:
        if all(isinstance(config, GateKVConfig) for config in self.peft_config.values()) and len(args) < 3:
            kwargs.setdefault("save_embedding_layers", False)
        return save(self, save_directory, *args, **kwargs)

    return save_pretrained


def _reloading(load: Callable[..., Any]) -> Callable[..., Any]:
    """PeftModel.load_adapter, which reads no config for an adapter that is there (hot reload, Trainer's best model):
    for ours the folder's own is read, so that its file is checked and its calibration comes with its weights."""

    @functools.wraps(load)
    def load_adapter(self: PeftModel, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        live, saved = self.peft_config.get(adapter_name), None
        if isinstance(live, GateKVConfig):
            hub, _ = self._split_kwargs(dict(kwargs))
            saved = GateKVConfig.from_pretrained(os.fspath(model_id), **hub)
            if saved.file_sha256 == live.file_sha256:
                saved = None  # PeftModel.from_pretrained, whose config came with this file and may have been edited
            else:
                live.file_sha256 = saved.file_sha256
        token = _from_folder.set(True)
        try:
            out = load(self, model_id, adapter_name, *args, **kwargs)
        finally:
            _from_folder.reset(token)
            if isinstance(live, GateKVConfig):
                live.file_sha256 = None
        if saved is not None:
            _take_over(self, adapter_name, saved)
        elif isinstance(loaded := self.peft_config[adapter_name], GateKVConfig):
            loaded.file_sha256 = None
        return out

    return load_adapter


def _take_over(model: nn.Module, name: str, saved: GateKVConfig) -> None:
    """Thresholds belong to the weights they were measured with; all else stays the adapter's own."""
    live = cast("dict[str, GateKVConfig]", model.peft_config)[name]
    for layer in modules.wrappers(model):
        if name in layer.calibrations:
            layer.calibrations[name] = Calibration(**saved.calibration) if saved.calibration else None
            if name in layer.specs:
                layer.specs[name].threshold = saved.threshold
    live.calibration, live.threshold = saved.calibration, saved.threshold
    mine, other = ({**vars(c.gate_spec()), **vars(c.less_spec())} for c in (live, saved))
    if differs := sorted(key for key in mine if mine[key] != other[key]):
        logger.warning(
            f"gatekv: {', '.join(differs)} of the adapter '{name}' are not those that the loaded weights were saved "
            "with, and stay: load the folder under another name to use it as it was saved."
        )


PeftModel.load_adapter = _reloading(PeftModel.load_adapter)  # type: ignore[method-assign]
PeftModel.save_pretrained = _saving(PeftModel.save_pretrained)  # type: ignore[method-assign]


def set_calibration(model: nn.Module, calibration: Calibration | None, threshold: float | None = None) -> None:
    """Store a calibration, and a new tau if given, in the active adapter: in force at once, saved with its config."""
    for layer in modules.wrappers(model):
        name = cast(str, layer.active())
        layer.calibrations[name] = calibration
        if threshold is not None:
            layer.specs[name].threshold = threshold
    config = cast("dict[str, GateKVConfig]", model.peft_config)[name]
    config.calibration = None if calibration is None else asdict(calibration)
    if threshold is not None:
        config.threshold = threshold
