"""gatekv trains a frozen language model to decide which of its cached tokens to keep, and ships that as an adapter."""

from gatekv import policies
from gatekv.adapter import GateKVConfig
from gatekv.bundled import adapter_path
from gatekv.cache.kvcache import KVCache, flags
from gatekv.generation import ContextQA, generate
from gatekv.lora import detach
from gatekv.modules import attach, gated_pass, parallel
from gatekv.presets import preset
from gatekv.version import VERSION

__version__ = VERSION
__all__ = ["ContextQA", "GateKVConfig", "KVCache", "adapter_path", "attach", "detach", "flags", "generate"]
__all__ += ["gated_pass", "parallel", "policies", "preset"]
