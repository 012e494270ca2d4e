"""`ppl`: the log-loss of held-out text behind a compressed prefix."""

import random
from typing import TYPE_CHECKING

from gatekv.evaluation.tasks.item import Item, encode, log_loss
from gatekv.facts import paragraph_window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def ppl(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    mode: str,
    index: int,
    seed: int,
    tokens: int | None = None,
    continuation: int = 128,
) -> Item:
    """A stretch of held-out text: 640 or `tokens` of it are compressed, the continuation's log-loss is taken.

    Score: `log_loss`. Raises ValueError for mode "aware", since there is no question, and for texts too short.
    """
    if mode != "agnostic":
        raise ValueError("task 'ppl' asks no question that a policy could be aware of: use mode='agnostic'.")
    prefix = tokens or 640
    rng = random.Random(f"ppl/{seed}/{index}")
    text = paragraph_window(rng.choice(texts), (prefix + continuation) * 8, rng)
    ids = encode(tokenizer, text)[: prefix + continuation]
    if len(ids) < prefix + continuation:
        raise ValueError(
            f"a held-out text has {len(ids)} tokens where {prefix + continuation} are wanted: give longer ones with "
            "--data, or lower --tokens."
        )
    return Item(ids[: prefix - 1], [(ids[prefix - 1 : prefix], ids[prefix:])], log_loss)
