"""Prompts of lm-evaluation-harness, read as LongBench and RULER read theirs: see `PromptFormat`.

The harness hands a model finished strings: the chat template stands around them already, nothing says where the
question begins, and what is too long loses its left end. Here such a string is taken apart again.
"""

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from gatekv.config import check_choice
from gatekv.evaluation.tasks.item import encode
from gatekv.evaluation.tasks.longbench import NO_CHAT, truncated
from gatekv.evaluation.tasks.ruler_sets import QUESTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGBENCH = "longbench"  # as no_chat: the tasks that LongBench itself gives no chat template
LONGBENCH_PATTERNS = tuple(f"longbench_{name}{end}" for name in NO_CHAT for end in ("", "_e"))


@dataclass(frozen=True)
class PromptFormat:
    """How the prompts of generating tasks are read.

    Attributes:
        compress: "prompt": all of a prompt but its last token is compressed. "before_question": what stands before its
            question, so that the question is not seen when tokens are evicted. The question is what stands behind the
            document's field `context`, or, in a document of RULER's, what begins with RULER's question.
        truncate: of a prompt that is too long, "left": its end is kept, as the harness does; "middle": the first and
            the last half of what the model holds beside the chat template, as LongBench does.
        no_chat: patterns of the names of tasks that go without the chat template when others have one;
            "longbench" stands for LongBench's own exceptions.

    Raises:
        ValueError: an unknown choice.
    """

    compress: str = "prompt"
    truncate: str = "left"
    no_chat: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("compress", self.compress, ("prompt", "before_question"))
        check_choice("truncate", self.truncate, ("left", "middle"))

    @classmethod
    def of(cls, compress: str, truncate: str, no_chat: str | list[str]) -> "PromptFormat":
        """From arguments as a command line has them: patterns of no_chat stand in a list, or with "+" between them."""
        names = no_chat.split("+") if isinstance(no_chat, str) else no_chat
        patterns = [p for name in names if name for p in (LONGBENCH_PATTERNS if name == LONGBENCH else (name,))]
        return cls(compress, truncate, tuple(patterns))

    @property
    def plain(self) -> bool:
        """Whether prompts are read as the harness reads them."""
        return self == PromptFormat()

    def prompt(self, task: str, doc: dict, text: str, framed: "Framed | None") -> "Prompt":
        """The prompt that the harness made of a document of a task.

        text: as the harness has it. framed: what the chat template was put around, or None where there was none.

        Raises:
            ValueError: no question is found where one is wanted, or a conversation of which no bare text can be made.
        """
        before, body, after = ("", text, "") if framed is None else framed.parts()
        if framed is not None and any(fnmatch(task, pattern) for pattern in self.no_chat):
            before, body, after = "", framed.bare(task), ""
        behind = 0
        if self.compress == "before_question":
            behind = len(body) - _context_end(task, doc, body)
        return Prompt(before, body, after, behind, self.compress == "before_question", self.truncate == "middle")


@dataclass(frozen=True)
class Framed:
    """A conversation and what the chat template made of it.

    Attributes:
        messages: role and content of each. text: what the template made.
    """

    messages: tuple[tuple[str, str], ...]
    text: str

    def parts(self) -> tuple[str, str, str]:
        """(before, the last message of the user, after) of the text; all of it is the message where it is not found."""
        asked = [content for role, content in self.messages if role == "user"][-1]
        place = self.text.rfind(asked)
        if place < 0:  # templates may leave out blanks around a message
            asked = asked.strip()
            place = self.text.rfind(asked)
        if place < 0:
            return "", self.text, ""
        return self.text[:place], asked, self.text[place + len(asked) :]

    def bare(self, task: str) -> str:
        """The user's message without the template, and the start of the answer behind it if there is one.

        Raises:
            ValueError: there are other messages.
        """
        roles = [role for role, _ in self.messages]
        if roles not in (["user"], ["user", "assistant"]):
            raise ValueError(
                f"{task} goes without the chat template, and has messages of {', '.join(roles)}: leave the system "
                "instruction and fewshot_as_multiturn out, or the task out of no_chat."
            )
        text, *start = [content for _, content in self.messages]
        for lead in start:
            text += lead if text[-1:].isspace() or lead[:1].isspace() else f" {lead}"
        return text


@dataclass(frozen=True)
class Prompt:
    """A prompt taken apart.

    Attributes:
        before, after: the chat template. body: what it stands around. behind: how many characters of the body, from its
        end, are the question. split: whether the question is compressed later than the context, and encoded by itself.
        middle: whether the middle is left out of a long one; else its left end.
    """

    before: str
    body: str
    after: str
    behind: int
    split: bool
    middle: bool

    def ids(
        self, tokenizer: "PreTrainedTokenizerBase", limit: int, add_special_tokens: bool | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids (compressed, fed to the compressed cache), of at most `limit` tokens together.

        add_special_tokens: of the tokenizer; None: its own default.

        Raises:
            ValueError: a limit that the chat template fills.
        """
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        body, behind = self.body, self.behind
        if self.middle:
            room = limit - sum(len(encode(tokenizer, part)) for part in (self.before, self.after))
            if room < 2:
                raise ValueError(f"the chat template leaves {room} of {limit} tokens: use a model that holds more.")
            start, end = truncated(tokenizer, body, behind, room)
            body, behind = start + end, len(end)
        cut = len(body) - behind
        if self.split:
            context = list(tokenizer(self.before + body[:cut], **special).input_ids)
            question = encode(tokenizer, body[cut:] + self.after)
        else:
            ids = list(tokenizer(self.before + body + self.after, **special).input_ids)
            context, question = ids[:-1], ids[-1:]
        excess = len(context) + len(question) - limit  # of text cut in the middle few tokens, where ends do not fit
        return (context[excess:], question) if 0 < excess < len(context) else (context, question[-limit:])


def _context_end(task: str, doc: dict, text: str) -> int:
    """Where in the text the document's context ends."""
    if context := doc.get("context"):
        if (place := text.rfind(context)) >= 0:
            return place + len(context)
        raise ValueError(f"the prompt of {task} does not have the document's context in it: use compress='prompt'.")
    place = max(text.rfind(question) for question in QUESTIONS)
    if place <= 0:
        raise ValueError(
            f"a document of {task} has no field 'context' and no question of RULER's, so that nothing says where its "
            "question begins: use compress='prompt'."
        )
    return place
