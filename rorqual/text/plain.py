"""Formats whose roles are ordinary words or ChatML: V1/V2 chat, Coder V1, R1-Zero, ChatML (facts 4.1,
4.2)."""

from collections.abc import Sequence

from rorqual.text.encoding import Encoding, Request
from rorqual.text.messages import EncodingError, Message
from rorqual.text.parser import Grammar
from rorqual.text.tokens import BOS, END_OF_TEXT, END_THINK, EOS, EOT, IM_END, IM_START, THINK

# The sentence Coder V1 was tuned with; part of the format (deepseek-coder-*-instruct, tokenizer_config.json).
CODER_SYSTEM = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, "
    "and you only answer questions related to computer science. For politically sensitive questions, "
    "security and privacy issues, and other non-computer science questions, you will refuse to answer\n"
)
# The template R1-Zero was trained with (R1 paper, table 1).
_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)
_ANSWER, _END_ANSWER = "<answer>", "</answer>"


def render_user_assistant(messages: Sequence[Message], request: Request) -> str:
    """V1 LLM, V2, Coder-V2, Math: "User: …" and "Assistant: …"; system messages where they stand."""
    parts = [BOS]
    for message in messages:
        if message.role == "system":
            parts.append(f"{message.text}\n\n")
        elif message.role == "user":
            parts.append(f"User: {message.text}\n\n")
        else:
            parts.append("Assistant:" + (f" {message.text}" if message.text or not message.prefix else ""))
            parts.append("" if message.prefix else EOS)
    return "".join(parts) + ("Assistant:" if request.generate else "")


def render_coder(messages: Sequence[Message], request: Request) -> str:
    """Coder V1 instruct. A system message of one's own is written as it is, with nothing after it, so end it
    with a newline (unverified: so in the published template)."""
    has_system = any(message.role == "system" for message in messages)
    parts = [BOS, "" if has_system else request.default_system or ""]
    for message in messages:
        if message.role == "system":
            parts.append(message.text)
        elif message.role == "user":
            parts.append(f"### Instruction:\n{message.text}\n")
        else:
            parts.append(f"### Response:\n{message.text}" + ("" if message.prefix else f"\n{EOT}\n"))
    return "".join(parts) + ("### Response:\n" if request.generate else "")


def render_r1_zero(messages: Sequence[Message], request: Request) -> str:
    """R1-Zero: one question, one answer with its tags (unverified: the full stop after the question, the
    single space between the two tags). The model writes `<think>` itself."""
    shape = [message.role for message in messages]
    if shape not in (["user"], ["user", "assistant"]):
        raise EncodingError(
            "encoding 'r1-zero' takes one user message, then at most one assistant message; "
            f"found {', '.join(shape)}"
        )
    text = f"{BOS}{_ZERO} User: {messages[0].text}. Assistant:"
    if len(messages) == 1:
        return text
    answer = messages[1]
    if answer.prefix and not answer.text:
        return text + (f" {THINK}{answer.reasoning}" if answer.reasoning else "")
    close = "" if answer.prefix else _END_ANSWER + EOS
    return f"{text} {THINK}{answer.reasoning}{END_THINK} {_ANSWER}{answer.text}{close}"


def render_chatml(messages: Sequence[Message], request: Request) -> str:
    """ChatML as in SmolLM2 and Qwen2; no BOS. `default_system` stands in for a missing first system turn."""
    parts = []
    if request.default_system is not None and messages[0].role != "system":
        parts.append(f"{IM_START}system\n{request.default_system}{IM_END}\n")
    for message in messages:
        parts.append(f"{IM_START}{message.role}\n{message.text}" + ("" if message.prefix else f"{IM_END}\n"))
    return "".join(parts) + (f"{IM_START}assistant\n" if request.generate else "")


USER_ASSISTANT = Encoding("user-assistant", render_user_assistant, Grammar(lead=" ", special=(BOS, EOS)))
CODER = Encoding(
    "coder", render_coder, Grammar(stops=(EOT,), tail="\n", special=(BOS, EOT)), default_system=CODER_SYSTEM
)
R1_ZERO = Encoding(
    "r1-zero",
    render_r1_zero,
    Grammar(lead=" ", wrappers=(_ANSWER, _END_ANSWER)),
    roles=("user", "assistant"),
    thinking="always",
    opens_thinking=False,
)
CHATML = Encoding(
    "chatml",
    render_chatml,
    Grammar(stops=(IM_END, END_OF_TEXT), special=(IM_START, IM_END, END_OF_TEXT)),
)
