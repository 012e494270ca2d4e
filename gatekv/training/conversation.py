"""Conversations of fine-tuning rows: which messages a row holds, and what a tokenizer makes of them as text."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from gatekv.textfiles import as_text, said

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHAPE = '{"role": "user", "content": "…"}'


@dataclass(frozen=True)
class Conversation:
    """Messages of which the last is the assistant's, to be learned. tools: JSON schemas of what it may call.

    Each has a role and a content that is a text; one with tool calls may have no content.
    """

    messages: list[dict]
    tools: list[dict]


def plain_text(value: object, where: str) -> str:
    """As `gatekv.textfiles.as_text`; a whole number, as labels often are, is its digits."""
    return str(value) if type(value) is int else as_text(value, where)


def conversation(entry: dict, where: str) -> Conversation:
    """Of an entry with `messages`, or with `prompt` and `completion`, each a text or a list of messages.

    Raises:
        ValueError: messages that are none, an empty prompt or completion, a last one that is not the assistant's; says
            `where`.
    """
    if "messages" in entry:
        messages = _messages(entry["messages"], f"{where}: messages")
    else:
        messages = _side(entry["prompt"], "user", f"{where}: prompt")
        completion = _side(entry["completion"], "assistant", f"{where}: completion")
        if len(completion) != 1:
            raise ValueError(
                f"{where}: completion has {len(completion)} messages: leave the last, and put the others into prompt."
            )
        messages = messages + completion
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: messages must end with the assistant's, after at least one other.")
    for message, what in ((messages[-1], "completion"), (messages[-2], "prompt")):
        if not message.get("content", "").strip() and "tool_calls" not in message:
            raise ValueError(f"{where} has an empty {what}: give it a text, or leave the row out.")
    return Conversation(messages, _tools(entry.get("tools"), f"{where}: tools"))


def _side(value: object, role: str, where: str) -> list[dict]:
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value):
        return _messages(value, where)
    return [{"role": role, "content": plain_text(value, where)}]


def _messages(value: object, where: str) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} is {said(value)}: give a list of {SHAPE}.")
    return [_message(message, f"{where}, number {i}") for i, message in enumerate(value, 1)]


def _message(value: object, where: str) -> dict:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise ValueError(f"{where} is {said(value)}: a message is {SHAPE}.")
    # Tables fill up what some rows lack with null, and templates ask whether a key is there, not what it is.
    message = {key: v for key, v in value.items() if v is not None}
    content, calls = message.get("content"), _calls(message.pop("tool_calls", []), where)
    if calls:
        message["tool_calls"] = calls
    elif content is None:
        raise ValueError(f"{where} has no content and no tool_calls: give it a text, or leave the row out.")
    if content is not None:
        message["content"] = plain_text(content, f"{where}, content")
    return message


def _calls(value: object, where: str) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise ValueError(f"{where}, tool_calls is {said(value)}: give a list of objects.")
    calls = []
    for call in value:
        inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise ValueError(f'{where}, tool_calls: a call is {{"function": {{"name": "…", "arguments": {{}}}}}}.')
        if isinstance(inner.get("arguments"), str):  # as in OpenAI's replies; templates would quote it once more
            try:
                inner = inner | {"arguments": json.loads(inner["arguments"])}
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}, tool_calls: arguments are not JSON ({error}): mend them.") from error
        calls.append(call | {"function": inner} if "function" in call else inner)
    return calls


def _tools(value: object, where: str) -> list[dict]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error}): give a list of JSON schemas.") from error
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise ValueError(f"{where} is {said(value)}: give a list of JSON schemas.")
    return value or []


def written(
    tokenizer: "PreTrainedTokenizerBase", talk: Conversation, frame: tuple[str, str, str], where: str
) -> tuple[str, str]:
    """(prompt, completion) by the tokenizer's chat template, or joined by `frame` where it has none.

    Raises:
        ValueError: a template that refuses the messages, leaves out calls or tools, or rewrites the prompt once an
            answer is there; calls without a template; says `where`.
    """
    messages = talk.messages
    if not tokenizer.chat_template:
        if talk.tools or any("tool_calls" in m for m in messages):
            raise ValueError(f"{where} has tool calls, and the tokenizer no chat template that could write them: set "
                             "tokenizer.chat_template, or write them into content.")  # fmt: skip
        return "\n\n".join(m["content"] for m in messages[:-1]) + frame[1], messages[-1]["content"]
    messages = _with_contents(tokenizer, talk, where)
    try:
        prompt = _render(tokenizer, messages[:-1], talk.tools, asks=True)
        whole = _render(tokenizer, messages, talk.tools)
        bare = _render(tokenizer, messages, []) if talk.tools else ""
    except Exception as error:  # templates raise what they like; all mean the same to the user
        raise ValueError(
            f"{where}: the chat template refuses these messages ({error}): change their roles or order, or take a "
            "tokenizer with another template."
        ) from error
    if talk.tools and whole == bare:
        raise ValueError(f"{where} has tools, which the chat template does not write: leave `tools` out, or take a "
                         "tokenizer with another template.")  # fmt: skip
    if not whole.startswith(prompt):
        raise ValueError(f"{where}: the chat template writes the prompt otherwise once it is answered; give prompt and "
                         "completion as `choices` do, or a tokenizer with another template.")  # fmt: skip
    completion = whole[len(prompt) :].rstrip()
    if not completion:
        raise ValueError(f"{where}: the chat template writes nothing for the completion: take another tokenizer.")
    return as_text(prompt, f"{where}: prompt"), as_text(completion, f"{where}: completion")


def _render(tokenizer: "PreTrainedTokenizerBase", messages: list[dict], tools: list[dict], asks: bool = False) -> str:
    given: dict[str, Any] = {"tools": tools} if tools else {}
    return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks, **given))


def _with_contents(tokenizer: "PreTrainedTokenizerBase", talk: Conversation, where: str) -> list[dict]:
    """The messages so that the template writes their calls: with no content where there is none, as transformers hands
    over a null, or else with an empty one."""
    if not any("tool_calls" in m for m in talk.messages):
        return talk.messages
    for messages in (talk.messages, [{"content": ""} | m for m in talk.messages]):
        try:
            text = _render(tokenizer, messages, talk.tools)
        except Exception:  # whatever the template misses, the other may have it
            continue
        calling = [i for i, m in enumerate(messages) if "tool_calls" in m]
        if all(_writes_calls(tokenizer, messages, i, talk.tools, text) for i in calling):
            return messages
    raise ValueError(f"{where} has tool_calls that the chat template does not write: take a tokenizer with a template "
                     "for tools, or write the calls into content.")  # fmt: skip


def _writes_calls(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict], i: int, tools: list[dict], text: str
) -> bool:
    """Whether the text would be another if the i-th message called nothing; a template that then fails reads calls."""
    silent = {"content": ""} | {k: v for k, v in messages[i].items() if k != "tool_calls"}
    try:
        return _render(tokenizer, [*messages[:i], silent, *messages[i + 1 :]], tools) != text
    except Exception:
        return True
