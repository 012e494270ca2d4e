"""How a generated answer is scored as text, as LongBench (2308.14508) and RULER (2404.06654) score it: shares, not %.

A LongBench metric is a function (prediction, one reference, the data set's classes or None) -> score.
"""

import difflib
import importlib.util
import re
import string
from collections import Counter
from typing import cast

NEEDS = {"rouge": ["rouge"], "rouge_zh": ["rouge", "jieba"], "qa_f1_zh": ["jieba"]}  # packages that define a metric
CHINESE = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～"  # the marks that LongBench lists
CHINESE += "｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
PUNCTUATION = str.maketrans("", "", string.punctuation)
PUNCTUATION_ZH = str.maketrans("", "", string.punctuation + CHINESE)


def check_packages(metric: str, who: str) -> None:
    """Raises ValueError, with the cure, when a package that defines the metric is missing; who: what wants it."""
    if missing := [name for name in NEEDS.get(metric, []) if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"{who} is scored with {', '.join(missing)}: pip install {' '.join(missing)}, or gatekv[eval]."
        )


def _f1(mine: list[str], true: list[str]) -> float:
    same = sum((Counter(mine) & Counter(true)).values())
    return 2 * same / (len(mine) + len(true)) if same else 0.0


def qa_f1(prediction: str, reference: str, classes: list[str] | None = None) -> float:
    """F1 of the words' multisets, lower-cased, without punctuation and articles."""

    def words(text: str) -> list[str]:
        return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()

    return _f1(words(prediction), words(reference))


def qa_f1_zh(prediction: str, reference: str, classes: list[str] | None = None) -> float:
    """F1 of the words' multisets, where jieba says what a word is, without punctuation."""
    import jieba

    def words(text: str) -> list[str]:
        bare = ("".join(w.lower().translate(PUNCTUATION_ZH).split()) for w in jieba.cut(text, cut_all=False))
        return [w for w in bare if w]

    return _f1(words(prediction), words(reference))


def rouge(prediction: str, reference: str, classes: list[str] | None = None) -> float:
    """F of ROUGE-L as the package `rouge` has it (of sentences' unions, every word once); 0 where there is none."""
    from rouge import Rouge

    try:
        return Rouge(metrics=["rouge-l"]).get_scores([prediction], [reference], avg=True)["rouge-l"]["f"]
    except (ValueError, RecursionError):  # no words, or a sentence too long for it: both count 0 in LongBench
        return 0.0


def rouge_zh(prediction: str, reference: str, classes: list[str] | None = None) -> float:
    """`rouge` of the words that jieba finds."""
    import jieba

    words = [" ".join(jieba.cut(text, cut_all=False)) for text in (prediction, reference)]
    return rouge(words[0], words[1])


def classification(prediction: str, reference: str, classes: list[str]) -> float:
    """1 / number of the classes that the prediction names, if the true one is among them, else 0."""
    named = [name for name in classes if name in prediction]
    for name in named:  # LongBench removes while it walks, which spares the name behind a removed one: so do we
        if name in reference and name != reference:
            named.remove(name)  # a part of the true name
    return 1 / len(named) if reference in named else 0.0


def _numbers(prediction: str, true: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(true) / len(numbers) if numbers else 0.0


def count(prediction: str, reference: str, classes: list[str] | None = None) -> float:
    """The share of the prediction's numbers that are the reference."""
    return _numbers(prediction, str(reference))


def retrieval(prediction: str, reference: str, classes: list[str] | None = None) -> float:
    """The share of the prediction's numbers that are the true paragraph's ("Paragraph 7")."""
    return _numbers(prediction, cast(re.Match, re.search(r"Paragraph (\d+)", reference))[1])


def retrieval_zh(prediction: str, reference: str, classes: list[str] | None = None) -> float:
    """`retrieval`, of "段落7"."""
    return _numbers(prediction, cast(re.Match, re.search(r"段落(\d+)", reference))[1])


def code_sim(prediction: str, reference: str, classes: list[str] | None = None) -> float:
    """Similarity of the reference and the first line without `, # or //, in whole percents.

    fuzzywuzzy's ratio without its optional C library is this one of difflib, rounded.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(sign in line for sign in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


METRICS = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "classification": classification,
    "count": count,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "code_sim": code_sim,
}


def references_found(prediction: str, references: list[str]) -> list[bool]:
    """Which references stand in the prediction, upper and lower case alike; RULER's scores are their share or any."""
    text = re.sub(r"[\x00-\x1f]", "\n", prediction).lower()
    return [reference.lower() in text for reference in references]
