"""`classification`: which choice is likeliest behind the compressed context; cloze from held-out text, or a JSONL file.

With no file: the word that ends the sentence after the context, as in the Children's Book Test (1511.02301). The true word
stands in the context; the wrong ones do not, but follow the same word elsewhere in the text, so that grammar does not decide.
"""

import json
import random
import re
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from gatekv.evaluation.tasks.item import Choice, Item, encode, placed, prose
from gatekv.facts import chat_frame

FIELDS = ("context", "question", "choices", "answer")
CHOICES, LETTERS, TIMES = 6, 5, 2  # words to choose from; letters of one at least; its occurrences in the context
WORD = re.compile(r"[A-Za-z]+")


def load_choices(path: str) -> list[dict]:
    """Lines of a JSONL file: context, question, choices (a list of texts), answer (its index, or the text itself).

    Raises:
        ValueError: no such file, no line, or a line that is not so, by number.
    """
    if not Path(path).is_file():
        raise ValueError(f"--choices {path!r} is not a file: give a JSONL file with {', '.join(FIELDS)} in each line.")
    found = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"--choices {path}, line {number} is not JSON: {error}.") from error
        missing = [f for f in FIELDS if not isinstance(entry, dict) or f not in entry]
        if missing:
            raise ValueError(f"--choices {path}, line {number} lacks {', '.join(missing)}.")
        choices, answer = entry["choices"], entry["answer"]
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise ValueError(f"--choices {path}, line {number}: choices must be a list of at least two texts.")
        if isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(f"--choices {path}, line {number}: answer must be an index into choices, or one of them.")
        found.append({**{f: entry[f] for f in FIELDS}, "answer": answer})
    if not found:
        raise ValueError(f"--choices {path} has no line: each must be JSON with {', '.join(FIELDS)}.")
    return found


@lru_cache(maxsize=16)
def _followers(text: str) -> dict[str, Counter]:
    """Per word, the words that follow it in a text, with their counts; lower case only."""
    found = defaultdict(Counter)
    for first, second in pairwise(text.split()):
        if second.rstrip(".,;:!?").isalpha() and second.islower():
            found[first][second.rstrip(".,;:!?")] += 1
    return found


def _cloze(tokenizer, texts, tokens: int, rng) -> tuple[str, str, list[str], int]:
    """(context, start of the next sentence, choices, number of the true one)."""
    for _ in range(300):
        text = rng.choice(texts)
        stretch = prose(tokenizer, [text], tokens + 160, rng)
        cut = stretch.find(". ", int(len(stretch) * tokens / (tokens + 160)) - 80) + 1
        context, sentence = stretch[:cut], stretch[cut:].split(". ")[0]
        counts, followers = Counter(WORD.findall(context)), _followers(text)
        ends = []
        for before, end in pairwise(re.finditer(r"\S+", sentence)):
            word = end[0].rstrip(".,;:!?")
            if word.isalpha() and word.islower() and len(word) >= LETTERS and counts[word] >= TIMES:
                others = {w: n for w, n in followers[before[0]].items() if len(w) >= LETTERS and w not in counts}
                if word not in sentence[: end.start()] and len(others) >= CHOICES - 1:
                    ends.append((end.start(), word, others))
        if not cut or not ends:
            continue
        start, word, others = max(ends, key=lambda e: counts[e[1]] / text.count(e[1]))  # what this context is about
        wrong = sorted(others, key=lambda w: (-others[w], w))[: 2 * CHOICES]
        choices = [word, *rng.sample(wrong, CHOICES - 1)]
        order = rng.sample(range(CHOICES), CHOICES)
        return context, sentence[:start].rstrip(), [f" {choices[i]}" for i in order], order.index(0)
    raise ValueError("no cloze could be made: give longer held-out texts with --data, or other --tokens.")


def classification(tokenizer, texts, mode: str, index: int, seed: int, tokens: int | None = None,
                   examples: list[dict] | None = None) -> Item:  # fmt: skip
    """A context of 640 or `tokens` tokens with its cloze, or example number `index` of a shuffled file, whole.

    examples: see `load_choices`; `tokens` does not cut their contexts. Score: `Choice`, accuracy by summed
    log-likelihood. Raises ValueError when there are fewer examples than asked for, or no cloze can be made.
    """
    rng = random.Random(f"classification/{seed}/{index}")
    if examples is None:
        context, lead, choices, truth = _cloze(tokenizer, texts, tokens or 640, rng)
        context, question = encode(tokenizer, context), encode(tokenizer, lead)
    else:
        if index >= len(examples):
            raise ValueError(f"--choices has {len(examples)} examples, and number {index + 1} is wanted: lower --n.")
        order = random.Random(f"classification/{seed}").sample(range(len(examples)), len(examples))
        entry, frame = examples[order[index]], chat_frame(tokenizer)
        context = encode(tokenizer, frame[0] + entry["context"])
        question = encode(tokenizer, f"\n\n{entry['question']}{frame[1]}")
        choices, truth = entry["choices"], entry["answer"]
    asks = [([], encode(tokenizer, choice)) for choice in choices]
    return placed(mode, context, question, asks, score=Choice(truth))
