"""Taking tokens back: for assisted decoding, and whoever cuts a cache."""

from typing import TYPE_CHECKING

from gatekv.cache.gate_stream import FOLD, ROLLBACK

if TYPE_CHECKING:
    from gatekv.cache.layer import KVLayer


def croppable(layer: "KVLayer") -> int:
    """How many of the last tokens can be taken back without a trace."""
    config = layer.config
    if not layer.decided and (config.waits or config.defer):
        return 0
    delay = 0 if layer.decided and layer.stage.whole else max(config.eviction_delay - 1, 0)
    limit = len(layer.window) - delay if layer.folded else layer.seen
    if config.waits:
        limit = min(limit, layer.seen - layer.base)
    if (unread := layer.evictor.rewindable()) is not None:
        limit = min(limit, unread)
    return max(limit, 0)


def crop(layer: "KVLayer", tokens_to_remove: int) -> None:
    """Take back the last -tokens_to_remove tokens, as if they had never been seen.

    Raises:
        ValueError: when some of what they displaced is gone (call `activate_past_recording` first), or when the cut
            would fall inside a compressed prompt.
    """
    if tokens_to_remove > 0:
        raise ValueError("crop takes minus the number of tokens to remove, as in transformers' own caches.")
    if not layer.is_initialized:
        return
    if remove := -tokens_to_remove:
        if remove > (most := croppable(layer)):
            raise ValueError(
                f"cannot take back {remove} tokens, only the last {most}: more has been evicted since, or is a "
                "compressed prompt. Call cache.activate_past_recording() before they are fed (the last "
                f"{ROLLBACK} can be taken back then), or keep a cache.snapshot()."
            )
        if layer.history is not None:
            if not bool(layer.history[:, -remove:].all()):
                raise ValueError(
                    f"cannot take back {remove} tokens: there are pads among them, behind tokens that stay. Keep a "
                    "cache.snapshot() from before they were fed."
                )
            layer.history = layer.history[:, :-remove]
        window = layer.window
        layer.real = layer.real - window.valid[:, len(window) - remove :].sum(-1, keepdim=True)
        window.drop(back=remove)
        layer.seen -= remove
        layer.evictor.rewind(remove)
        layer.evidence.crop(remove)
    layer.evictor.recorded()
    if layer.decided and not layer.stage.whole:
        layer.fold(FOLD, rollback=0)
