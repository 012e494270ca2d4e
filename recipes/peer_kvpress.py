"""kvpress as a peer for benchmark.py: in its own environment (transformers < 5.3), one JSON line in, one out.

{"context": T, "batch": 1, "keep": r}  ->  {"prefill": seconds, "bytes": held, "full_bytes": of T tokens}
{"step": true}                         ->  {"seconds": CPU seconds of one decoding step}
"""

import json
import os
import sys
import time


def main(path: str, dtype: str, name: str) -> None:
    out, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr  # libraries print; the pipe carries answers alone
    import torch
    from kvpress import AdaKVPress, SnapKVPress
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    size = lambda c: sum(t.nbytes for layer in c.layers for t in (layer.keys, layer.values))  # noqa: E731
    cache, position = None, 0
    for line in sys.stdin:
        request = json.loads(line)
        start = time.process_time()
        if "step" in request:
            token = torch.full((len(cache.layers[0].keys), 1), 5)
            model(token, past_key_values=cache, position_ids=torch.full_like(token, position), logits_to_keep=1)
            position += 1
            answer = {"seconds": time.process_time() - start}
        else:
            ratio = 1 - request["keep"]
            press = SnapKVPress(compression_ratio=ratio)
            press = AdaKVPress(press) if name == "ada" else press
            torch.manual_seed(0)
            ids = torch.randint(3, model.config.vocab_size, (request["batch"], request["context"]))
            cache, position = DynamicCache(), request["context"]
            with press(model):
                model(ids, past_key_values=cache, logits_to_keep=1)
            kept = cache.layers[0].keys.shape[2]
            answer = {"prefill": time.process_time() - start, "bytes": size(cache)}
            answer["full_bytes"] = size(cache) * request["context"] // kept
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
