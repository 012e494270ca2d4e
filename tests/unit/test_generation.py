"""`gatekv.generate` and `gatekv.ContextQA` give what the five lines with a `KVCache` give."""

import pytest
import torch
from conftest import gated, padded_batch, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TextStreamer

import gatekv
from gatekv.generation import Generation

GREEDY = dict(max_new_tokens=6, do_sample=False)
TEXT = "the code of the lantern is 4711, and the harbour is shut until noon. " * 2
CHAT = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}</>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture(scope="module")
def letters():
    """A tokenizer whose tokens are characters, without a chat template or a pad."""
    core = Tokenizer(models.WordLevel({chr(i): i - 32 for i in range(32, 127)} | {"\n": 95}, unk_token=" "))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="~")


@pytest.fixture(scope="module")
def chatting(letters):
    """The same with a chat template."""
    with_chat = PreTrainedTokenizerFast(tokenizer_object=letters._tokenizer, eos_token="~")
    with_chat.chat_template = CHAT
    return with_chat


@pytest.fixture(scope="module")
def model():
    return tiny(dtype=torch.float32)


def encoded(tokenizer, *texts):
    """(ids, mask) of left-padded texts."""
    rows = [tokenizer(t, add_special_tokens=False).input_ids for t in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    return ids, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])


def by_hand(model, tokenizer, texts, policy, budget, ask="", **options):
    """The five lines: texts of the new tokens."""
    ids, mask = encoded(tokenizer, *texts)
    cache = gatekv.KVCache(model, policy, budget)
    if ask:
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        more = encoded(tokenizer, ask)[0].repeat(len(ids), 1)
        ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY | options)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in out[:, ids.shape[1] :]]


@pytest.mark.parametrize("policy,budget", [("snapkv+ada", 0.5), ("keydiff+global", 60), ("h2o", 0.3), ("full", None)])
def test_texts_are_the_five_lines(policy, budget, model, letters):
    texts = [TEXT, TEXT[7:60], "a"]
    options = dict(policy=policy, budget=budget, tokenizer=letters, **GREEDY)
    assert gatekv.generate(model, texts, **options) == by_hand(model, letters, texts, policy, budget)
    assert gatekv.generate(model, TEXT, **options) == by_hand(model, letters, [TEXT], policy, budget)[0]


@pytest.mark.parametrize(
    "policy,budget", [("snapkv+ada", 0.5), ("keydiff+global", 60), ("h2o", 0.3), ("streaming_llm", 40)]
)
def test_ids_give_ids_and_chunks_change_nothing(policy, budget, model):
    ids, mask = padded_batch([60, 41])
    cache = gatekv.KVCache(model, policy, budget)
    wanted = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    for more in ({}, {"prefill_chunk_size": 13}):
        got = gatekv.generate(model, ids, policy, budget, attention_mask=mask, **more, **GREEDY)
        assert torch.equal(got, wanted)
        again = gatekv.generate(model, {"input_ids": ids, "attention_mask": mask}, policy, budget, **more, **GREEDY)
        assert torch.equal(again, wanted)
    alone = gatekv.generate(model, ids[0], policy, budget, **GREEDY)
    assert torch.equal(alone[0], wanted[0])


def test_a_question_is_asked_of_the_compressed_context(model, letters, chatting):
    options = dict(policy="keydiff", budget=0.25, **GREEDY)
    ask = "\n\nWhat is shut?\nAnswer:"
    wanted = by_hand(model, letters, [TEXT], "keydiff", 0.25, ask)
    found = gatekv.generate(model, TEXT, question="What is shut?", tokenizer=letters, return_dict=True, **options)
    assert isinstance(found, Generation) and [found.text] == wanted
    assert 0.2 < found.prompt["ratio"] < 0.4 and found.memory()["bytes"] > found.prompt["bytes"]
    assert found.sequences.shape[1] == len(TEXT) + len(ask) + 6
    kept = found.caches[0].flags()[0]
    assert kept[..., : len(TEXT)].sum(-1).unique().tolist() == [len(TEXT) // 4], "the question was not seen"
    assert kept[..., len(TEXT) :].all()
    chunks = gatekv.generate(
        model, TEXT, question="What is shut?", tokenizer=letters, prefill_chunk_size=50, **options
    )  # fmt: skip
    assert [chunks] == wanted
    context, ask = f"<u>{TEXT}", "\n\nWhat is shut?</><a>"
    wanted = by_hand(model, chatting, [context], "keydiff", 0.25, ask)
    assert [gatekv.generate(model, TEXT, question=" What is shut? ", tokenizer=chatting, **options)] == wanted


def test_chats_are_written_by_the_template(model, chatting):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": TEXT}]
    options = dict(policy="snapkv", budget=0.5, tokenizer=chatting, **GREEDY)
    rendered = f"<s>be brief</><u>{TEXT}</><a>"
    wanted = by_hand(model, chatting, [rendered], "snapkv", 0.5)
    assert gatekv.generate(model, chat, **options) == wanted[0]
    assert gatekv.generate(model, [chat, chat], **options) == wanted * 2
    wanted = by_hand(model, chatting, [f"<s>be brief</><u>{TEXT}"], "snapkv", 0.5, "\n\nWho?</><a>")
    assert gatekv.generate(model, chat, question="Who?", **options) == wanted[0]


def test_a_question_for_each_input_even_of_unequal_length(model, letters):
    texts, questions = [TEXT, TEXT[3:90], TEXT[9:80]], ["Who owns it?", "When?", "Where and why is that so?"]
    options = dict(policy="snapkv", budget=0.6, tokenizer=letters, **GREEDY)
    wanted = [gatekv.generate(model, t, question=q, **options) for t, q in zip(texts, questions)]
    found = gatekv.generate(model, texts, question=questions, return_dict=True, **options)
    assert found.text == wanted and len(found.caches) == 3
    assert gatekv.generate(model, texts, question="When?", **options)[1] == wanted[1]
    ids, mask = encoded(letters, *texts)
    got = gatekv.generate(model, ids, attention_mask=mask, question=[f"\n\n{q}\nAnswer:" for q in questions], **options)
    assert letters.decode(got[2][mask.shape[1] :])[: len(questions[2]) + 10] == f"\n\n{questions[2]}\nAnswer:"
    assert letters.decode(got[2][-6:]) == wanted[2]


def test_one_context_many_questions(model, letters):
    asked = ["What is shut?", "Which code?", "Why?"]
    options = dict(policy="keydiff+ada", budget=0.3, tokenizer=letters)
    wanted = [gatekv.generate(model, TEXT, question=q, **options, **GREEDY).strip() for q in asked]
    qa = gatekv.ContextQA(model, **options, **GREEDY)
    assert qa(context=TEXT, questions=asked) == wanted
    first, held = qa.cache, qa.memory()["bytes"]
    assert qa(question=asked[1]) == wanted[1] and qa(TEXT, asked[2]) == wanted[2]
    assert qa.cache is first and qa.memory()["bytes"] == held, "read once, and no question has touched it"
    assert qa(TEXT[:50], "Why?") != wanted[2] or qa.cache is not first
    for call, match in (
        (dict(), "give one text as question="), (dict(question="a", questions=["b"]), "give one text"),
        (dict(questions="Who?"), "list of texts"), (dict(question="Who?", window=3), "belong to ContextQA"),
        (dict(question="Who?", past_key_values=1), "is set by gatekv"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            qa(**call)
    empty = gatekv.ContextQA(model, tokenizer=letters)
    with pytest.raises(ValueError, match="no context yet"):
        empty(question="Who?")
    with pytest.raises(ValueError, match="nothing has been read"):
        empty.memory()
    with pytest.raises(ValueError, match="Did you mean"):
        gatekv.ContextQA(model, "snapvk", 0.5)


def test_the_adapters_gate_is_the_default_and_options_find_their_place(model, letters):
    peft = gated(dtype=torch.float32, window=6, sinks=2)
    found = gatekv.generate(peft, TEXT, tokenizer=letters, return_dict=True, window=9, sinks=3, **GREEDY)
    plan = found.caches[0].config
    assert (str(plan.policy), plan.policy.budget, plan.window, plan.sinks) == ("Gate x Global", 0.25, 9, 3)
    assert [found.text] == by_hand_gate(peft, letters)
    found = gatekv.generate(model, TEXT, tokenizer=letters, return_dict=True, block_size=4, **GREEDY)
    assert str(found.caches[0].config.policy) == "SnapKV x Uniform" and found.caches[0].config.block_size == 4
    fading = gated(dtype=torch.float32, relaxation="decay", window=6)
    found = gatekv.generate(fading, TEXT, budget=50, tokenizer=letters, return_dict=True, **GREEDY)
    assert str(found.caches[0].config.policy) == "Gate x Decay" and found.caches[0].config.policy.budget == 50
    assert found.prompt is None and found.memory()["ratio"] < 0.8


def by_hand_gate(peft, letters):
    ids, mask = encoded(letters, TEXT)
    cache = gatekv.KVCache(peft, "gate+global", 0.25, window=9, sinks=3)
    out = peft.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    return [letters.decode(out[0, ids.shape[1] :], skip_special_tokens=True)]


def test_beams_several_sequences_streams_and_drafts(model, letters, capsys):
    options = dict(policy="snapkv", budget=0.5, tokenizer=letters)
    beams = dict(num_beams=3, num_return_sequences=2, length_penalty=0.0)
    wanted = by_hand(model, letters, [TEXT, TEXT[5:70]], "snapkv", 0.5, **beams)
    assert gatekv.generate(model, [TEXT, TEXT[5:70]], **options, **beams, **GREEDY) == wanted and len(wanted) == 4
    asked = [gatekv.generate(model, t, question="Who?", **options, **beams, **GREEDY) for t in (TEXT, TEXT[5:70])]
    both = gatekv.generate(model, [TEXT, TEXT[5:70]], question="Who?", **options, **beams, **GREEDY)
    assert both == asked[0] + asked[1] and len(both) == 4
    plain = gatekv.generate(model, TEXT, **options, **GREEDY)
    assert gatekv.generate(model, TEXT, **options, assistant_model=tiny(dtype=torch.float32, seed=1), **GREEDY) == plain
    assert gatekv.generate(model, TEXT, **options, prompt_lookup_num_tokens=3, **GREEDY) == plain
    said = gatekv.generate(model, TEXT, **options, streamer=TextStreamer(letters, skip_prompt=True), **GREEDY)
    assert capsys.readouterr().out.strip("\n") == said.strip("\n")
    dicts = gatekv.generate(model, TEXT, **options, return_dict_in_generate=True, output_scores=True, **GREEDY)
    assert dicts == plain


def test_fastgen_learns_what_a_token_is(model, letters):
    found = gatekv.generate(
        model, [TEXT, "a, b."], "fastgen", 0.4, tokenizer=letters, return_dict=True, num_beams=2, **GREEDY
    )
    assert found.caches[0].config.kinds is not None
    qa = gatekv.ContextQA(model, "fastgen", 0.4, tokenizer=letters, **GREEDY)
    assert len(qa(TEXT, questions=["Who?", "Why now?"])) == 2 and qa.cache.config.kinds is not None


def test_short_prompts_and_strict(model, letters):
    text = gatekv.generate(model, "Hi", tokenizer=letters, **GREEDY)
    assert [text] == by_hand(model, letters, ["Hi"], "full", None)
    with pytest.raises(ValueError, match="below the 2 that sinks . window protect"):
        gatekv.generate(model, "Hi", tokenizer=letters, strict=True, **GREEDY)


def test_the_tokenizer_beside_the_model(letters, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny(dtype=torch.float32).save_pretrained(tmp_path)
    letters.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert gatekv.generate(model, TEXT, **GREEDY) == gatekv.generate(model, TEXT, tokenizer=letters, **GREEDY)


@pytest.mark.parametrize("inputs,more,match", [
    (3, {}, "inputs must be a text, a list of texts"), ([], {}, "empty prompt"), ("", {}, "empty text"),
    (["a", 3], {}, "inputs must be"), ([{"text": "a"}], {}, "'role' and 'content'"), ([{"role": "user", "content": "a"}], {}, "no chat template"),
    ({"ids": 3}, {}, "without 'input_ids'"), (torch.ones(2, 2, 2).long(), {}, "whole numbers"), (torch.ones(3), {}, "whole numbers"),
    (torch.ones(1, 3).long(), {"attention_mask": torch.tensor([[1, 1, 0]])}, "pads must stand on the left"),
    (torch.ones(2, 3).long(), {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "empty prompt"),
    ("a", {"attention_mask": torch.ones(1, 1)}, "attention_mask belongs to token ids"),
    ("a", {"past_key_values": 1}, "past_key_values= is set by gatekv itself.*a cache of yours"),
    ("a", {"prompt_tokens": 4}, "it is the length of the prompt"), ("a", {"use_cache": False}, "nothing to compress"),
    ("a", {"question": ["b", "c"]}, "a list of 1, one for each input"), ("a", {"question": " "}, "question must be a text"),
    ("a", {"policy": "snapkv"}, "needs budget="), ("a", {"policy": "gate"}, "needs an adapter"), ("a", {"budget": 0}, "above 0"),
    ("a", {"blok_size": 3, "policy": "full"}, "blok_size"),
])  # fmt: skip
def test_bad_input_is_one_line(inputs, more, match, model, letters):
    with pytest.raises(ValueError, match=match):
        gatekv.generate(model, inputs, tokenizer=letters, **more, **GREEDY)


def test_a_model_without_a_tokenizer_says_so(model):
    with pytest.raises(ValueError, match=r"no tokenizer beside the model .*pass tokenizer="):
        gatekv.generate(model, "a", **GREEDY)


def test_a_chat_that_cannot_be_asked(model, chatting):
    for chat, match in (
        ([{"role": "assistant", "content": "a"}], "a text of the user's"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a text of the user's"),
    ):
        with pytest.raises(ValueError, match=match):
            gatekv.generate(model, chat, question="Who?", tokenizer=chatting, **GREEDY)
