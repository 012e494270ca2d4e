"""Tasks to fine-tune on, from packages: what a machine without a hub can have. And a hub's, by a recipe's YAML.

    python data/build_sft.py presuppositions vitaminc      # or no name: all ten; writes data/cache/sft/NAME/
    python data/build_sft.py recipes/configs/sft/rte.yaml validation   # a data set by name, as the YAML reads it
    python data/build_sft.py owners                        # gatekv/assets/sample/sft.jsonl, of the bundled text

Each task becomes train.jsonl and heldout.jsonl, one example a line: context, question, choices, answer. What shares a
text (an article, a page, a goal) is on one side. The first download is 358 MB (bigbench's source archive, kept in
data/cache); it is unpacked in part, never installed and never committed: its data keep their own licences
(data/LICENCES.md).
"""

import hashlib
import json
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from gatekv.bundled import TASK, TRAIN  # noqa: E402

CACHE = ROOT / "data" / "cache"
ARCHIVE, SHA256 = "bigbench-1.0.0.tar.gz", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks"
HELDOUT, MOST = 0.2, {"train": 10_000, "heldout": 1_000}
Pairs = Iterator[tuple[str, dict]]  # (what must stay on one side, example)


def asked(context: str, question: str, scores: dict[str, int]) -> dict:
    """An example of a task.json entry; choices in the order given, the true one is the one with score 1."""
    answer = next(i for i, score in enumerate(scores.values()) if score)
    return {"context": context.strip(), "question": question, "choices": [*scores], "answer": answer}


def presuppositions(task: dict) -> Pairs:
    """Does sentence 1 entail sentence 2, contradict it, or neither? 735."""
    for e in task["examples"]:
        form = r"(?s)Sentence 1: (.*?)\s*\nSentence 2: (.*?)\s*The answer is: "
        first, second = re.fullmatch(form, e["input"]).groups()
        question = f"Sentence 2: {second}\nIs this an entailment, neutral, or a contradiction?"
        yield first, asked(f"Sentence 1: {first}", question, e["target_scores"])


def vitaminc(task: dict) -> Pairs:
    """Is a claim true by a sentence of Wikipedia? 54,668, of 13,000 pages."""
    for e in task["examples"]:
        evidence, claim = e["input"].split("\nClaim: ")
        question = f"Claim: {claim}\nIs the claim true, false, or neither?"
        yield evidence.split(":")[0], asked(evidence, question, e["target_scores"])


def fever(task: dict) -> Pairs:
    """Is a claim true? 6,612; there is nothing to read but the claim."""
    for e in task["examples"]:
        claim = e["input"].split("\nQ: ")[0]
        yield claim, asked(claim, "Was this claim true or false?", e["target_scores"])


def strategyqa(task: dict) -> Pairs:
    """Yes or no, by several steps of common knowledge; 2,290."""
    for e in task["examples"]:
        yield e["input"], asked(e["input"], "Answer yes or no.", e["target_scores"])


def social_iqa(task: dict) -> Pairs:
    """What people do, feel and want; 1,954, three choices."""
    for e in task["examples"]:
        text = e["input"].strip()
        end = max(text.rfind(mark) for mark in (". ", "! ", "? ")) + 1
        yield text[:end], asked(text[:end], text[end:].strip(), e["target_scores"])


def ordering(task: dict) -> Pairs:
    """Which of two steps of a wikiHow article comes first? 3,100."""
    for e in task["examples"]:
        context = e["input"].removesuffix("Which should happen first? ")
        goal = context.split("', one can '")[0]
        yield goal, asked(context, "Which should happen first?", e["target_scores"])


def squad(task: dict) -> Pairs:
    """SQuAD v1.1, dev: 10,565 questions on 48 articles; other choices: answers to others of its article."""
    for article in task["data"]:
        questions = [(p["context"], q) for p in article["paragraphs"] for q in p["qas"]]
        answers = sorted({q["answers"][0]["text"].strip() for _, q in questions})
        for context, q in questions:
            truth = q["answers"][0]["text"].strip()
            rng = random.Random(q["id"])
            others = [a for a in answers if a.lower() not in {x["text"].strip().lower() for x in q["answers"]}]
            choices = [truth, *rng.sample(others, 3)]
            rng.shuffle(choices)
            found = {"context": context, "question": q["question"].strip(), "choices": choices}
            yield article["title"], found | {"answer": choices.index(truth)}


MEMBERS = {
    "presuppositions": (presuppositions, "presuppositions_as_nli/task.json"),
    "vitaminc": (vitaminc, "vitaminc_fact_verification/task.json"),
    "fever": (fever, "fact_checker/fever/task.json"),
    "strategyqa": (strategyqa, "strategyqa/task.json"),
    "social_iqa": (social_iqa, "social_iqa/task.json"),
    "ordering": (ordering, "goal_step_wikihow/step_ordering/task.json"),
    "squad": (squad, "squad_shifts/squaddev_v1.1.json"),
}


RELATIONS = (
    "father mother son daughter husband wife brother sister grandfather grandmother father-in-law mother-in-law"
).split()


def family(example: dict) -> tuple[str, str, list[str]]:
    """How are two people of a family related?"""
    story, question = example["question"].split("\n\n")
    return story, question, sorted(RELATIONS)


def haystack(example: dict) -> tuple[str, str, list[str]]:
    """Who of 8 to 16 people likes or dislikes a thing?"""
    story, question = (part.strip() for part in example["question"].split("\n"))
    return story, question, sorted({statement.split()[0] for statement in story.split(". ")})


def syllogism(example: dict) -> tuple[str, str, list[str]]:
    """Does a conclusion follow from two statements?"""
    story, _, question = example["question"].partition("\n\n")
    return story, question, ["Yes", "No"]


GYM = {
    "family": (family, "family_relationships", {}),
    "haystack": (haystack, "needle_haystack", {"min_num_statements": 8, "max_num_statements": 16}),
    "syllogism": (syllogism, "syllogism", {}),
}


def generated(name: str) -> Pairs:
    """3,000 examples of a generator of reasoning-gym (Apache-2.0), with at most four of its choices."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(f"the task {name!r} is generated by a package: pip install reasoning-gym==0.1.25") from error
    cut, generator, options = GYM[name]
    for i, e in enumerate(reasoning_gym.create_dataset(generator, size=3000, seed=0, **options)):
        context, question, choices = cut(e)
        others = [c for c in choices if c != e["answer"]]
        kept = {e["answer"], *random.Random(f"{name}/{i}").sample(others, min(3, len(others)))}
        choices = [c for c in choices if c in kept]
        found = {"context": context, "question": question, "choices": choices}
        yield context, found | {"answer": choices.index(e["answer"])}


def owners() -> Iterator[dict]:
    """Who of four owns a thing, in passages of the bundled training text: what `recipes/sft.py` reads by default."""
    from gatekv.facts import WORDS, paragraph_window

    names = "Paul Laura Henry Sarah Oliver Clara Victor Emma Walter Rosa".split()
    texts = [path.read_text() for path in sorted(TRAIN.glob("*.txt"))]
    for i in range(400):
        rng = random.Random(f"owners/{i}")
        sentences = " ".join(paragraph_window(rng.choice(texts), 450, rng).split()).split(". ")
        things, people = rng.sample(WORDS["train"], 4), rng.sample(names, 4)
        for thing, person in zip(things, people):
            sentences.insert(rng.randrange(len(sentences) + 1), f"{person} owns the {thing}")
        question = f"Who owns the {things[0]}?"
        context = ". ".join(s.removesuffix(".") for s in sentences) + "."
        yield {"context": context, "question": question, "choices": sorted(people), "answer": people[0]}


def archive() -> Path:
    """bigbench's source archive, fetched with pip once and checked."""
    path = CACHE / ARCHIVE
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        options = ["-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(CACHE)]
        try:
            pip = [sys.executable, "-m", "pip", "download", *options, "bigbench==1.0.0"]
            subprocess.run(pip, check=True, stdout=subprocess.DEVNULL)
        except subprocess.CalledProcessError as error:
            raise ValueError(f"pip could not download bigbench 1.0.0 ({error}): put {ARCHIVE} into {CACHE}.") from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{path} has sha256 {found}, not {SHA256}: delete it and run this again.")
    return path


def unpacked(names: list[str]) -> dict[str, dict]:
    """name -> its file's JSON, all read in one pass over the archive, which takes half a minute."""
    wanted, found = {f"{TASKS}/{MEMBERS[name][1]}": name for name in names}, {}
    with tarfile.open(archive()) as tar:
        for member in tar:
            if member.name in wanted and member.isfile():
                found[wanted[member.name]] = json.load(tar.extractfile(member))
    return found


def halves(pairs: Pairs) -> dict[str, list[dict]]:
    """train and heldout: groups in the order of their hashes go to heldout until it has its share; then both are
    shuffled and cut."""
    groups: dict[str, list[dict]] = {}
    for group, example in pairs:
        groups.setdefault(group, []).append(example)
    total, out = sum(map(len, groups.values())), {"train": [], "heldout": []}
    for group in sorted(groups, key=lambda g: hashlib.sha256(g.encode()).digest()):
        out["heldout" if len(out["heldout"]) < HELDOUT * total else "train"] += groups[group]
    for part, examples in out.items():
        random.Random(part).shuffle(examples)
        out[part] = examples[: MOST[part]]
    return out


def write(path: Path, examples) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
    path.write_text("".join(lines))
    print(path.relative_to(ROOT), len(lines))


def by_name(config: Path, part: str) -> None:
    """A split of the data set that a recipe's YAML names, as evaluate.py --choices reads it."""
    import yaml

    from gatekv.training.examples import read_entries

    settings = yaml.safe_load(config.read_text())
    entries = [e for source in settings["data"] for _, e in read_entries(source, settings.get("fields", {}), part)]
    write(CACHE / "sft" / config.stem / f"{part}.jsonl", entries)


def main(names: list[str]) -> None:
    if names and names[0].endswith(".yaml"):
        return by_name(Path(names[0]), names[1] if len(names) > 1 else "validation")
    names = names or [*MEMBERS, *GYM]
    if unknown := [n for n in names if n not in (*MEMBERS, *GYM, "owners")]:
        raise ValueError(f"no task {unknown[0]!r}; there are {', '.join([*MEMBERS, *GYM, 'owners'])}.")
    if "owners" in names:
        write(TASK, owners())
    tasks = unpacked([n for n in names if n in MEMBERS]) if set(names) & set(MEMBERS) else {}
    pairs = {name: MEMBERS[name][0](task) for name, task in tasks.items()}
    pairs |= {name: generated(name) for name in names if name in GYM}
    for name, found in pairs.items():
        for part, examples in halves(found).items():
            write(CACHE / "sft" / name / f"{part}.jsonl", examples)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
