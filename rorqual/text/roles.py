"""Formats with role tokens and tool calls in marked tokens: V2.5 to V3.2-Exp, R1 and the distills (facts 4.2,
4.3).

They differ in what follows `<｜Assistant｜>` and in how tools are written; `_Style` holds the differences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rorqual.text.encoding import Encoding, Request, system_text
from rorqual.text.marked import FencedReader, MarkedReader, write_marked
from rorqual.text.messages import EncodingError, Message, to_json
from rorqual.text.parser import Grammar
from rorqual.text.tokens import (
    ASSISTANT,
    BOS,
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    END_THINK,
    EOS,
    OUTPUT_BEGIN,
    OUTPUT_END,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    SEP,
    THINK,
    USER,
)


def _tools_v3(tools: Sequence[Mapping[str, Any]], mark: Callable[[str], str]) -> str:
    """The tools section of V2.5's model card (unverified; V3's own template has none)."""
    shown = (f"- `{mark(tool['name'])}`:\n```json\n{mark(to_json(tool, indent=4))}\n```" for tool in tools)
    return "## Tools\n\n### Function\n\nYou have the following functions available:\n\n" + "\n\n".join(shown)


def _tools_v31(tools: Sequence[Mapping[str, Any]], mark: Callable[[str], str]) -> str:
    """The tools section of V3.1's model card (blank lines unverified)."""
    shown = "".join(
        f"\n### {mark(tool['name'])}\nDescription: {mark(str(tool.get('description', '')))}\n\n"
        f"Parameters: {mark(to_json(tool.get('parameters') or {}))}\n"
        for tool in tools
    )
    return (
        f"## Tools\nYou have access to the following tools:\n{shown}\n"
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        f"{CALLS_BEGIN}{CALL_BEGIN}tool_call_name{SEP}tool_call_arguments{CALL_END}"
        "{{additional_tool_calls}}" + CALLS_END + "\n\nWhere:\n\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces\n"
    )


@dataclass(frozen=True, slots=True)
class _Style:
    """think, close: around reasoning, after `<｜Assistant｜>`. answer: there instead, without reasoning.
    forced: a prompt ends in `think` when thinking. fenced: V3's form of calls and results, else V3.1's.
    tools: writes the tools section."""

    tools: Callable[[Sequence[Mapping[str, Any]], Callable[[str], str]], str]
    think: str = ""
    close: str = ""
    answer: str = ""
    forced: bool = False
    fenced: bool = True


def _render(style: _Style, messages: Sequence[Message], request: Request) -> str:
    """BOS, all system texts joined by a blank line, the tools, then the turns with nothing between them.

    After tool results the assistant goes on without a new `<｜Assistant｜>`. (Templates before V3-0324 kept
    only the last of several system messages; here none is lost.)
    """
    head = system_text(messages)
    if request.tools:
        head = "\n\n".join(part for part in (head, style.tools(request.tools, request.mark)) if part)
    parts = [BOS, head]
    turns = [message for message in messages if message.role != "system"]
    after_tool = False
    for place, message in enumerate(turns):
        if message.role == "user":
            parts.append(USER + message.text)
        elif message.role == "tool":
            last = place + 1 == len(turns) or turns[place + 1].role != "tool"
            parts.append(_result(style, message.text, first=not after_tool, last=last))
        else:
            parts.append(_assistant(style, message, request, opened=after_tool))
        after_tool = message.role == "tool"
    if request.generate:
        if after_tool:
            if style.answer and request.thinking:
                raise EncodingError(
                    "this generation answers tool results without thinking; use thinking=False"
                )
        else:
            thinking = request.thinking and style.forced
            parts.append(ASSISTANT + (style.think if thinking else style.answer))
    return "".join(parts)


def _result(style: _Style, text: str, *, first: bool, last: bool) -> str:
    """One tool result; V3's form wraps each run of results."""
    result = OUTPUT_BEGIN + text + OUTPUT_END
    if not style.fenced:
        return result
    return (OUTPUTS_BEGIN if first else "\n") + result + (OUTPUTS_END if last else "")


def _assistant(style: _Style, message: Message, request: Request, *, opened: bool) -> str:
    """An assistant turn. `opened`: tool results came before it, so it has no role token of its own.

    Text up to `</think>` in the content counts as reasoning, as in the published templates. Past reasoning is
    dropped unless the request keeps it; a prefix message keeps its own.
    """
    text, reasoning = message.text, message.reasoning
    keep = request.thinking and (message.prefix or not request.drop_thinking)
    if style.close and END_THINK in text:
        inline, _, text = text.rpartition(END_THINK)
        if keep:
            reasoning = reasoning or inline.removeprefix(THINK).strip("\n")
            text = text.lstrip("\n")
    start = "" if opened else ASSISTANT
    if keep and message.prefix and not text and (reasoning or style.forced):
        return start + style.think + reasoning
    if keep and reasoning:
        start += style.think + reasoning + style.close
    elif not opened:
        start += style.answer
    end = "" if message.prefix else EOS
    if message.emitted is not None:
        return start + message.emitted + end
    return start + text + write_marked(message.calls, request.mark, fenced=style.fenced) + end


_R1_STYLE = _Style(_tools_v3, THINK + "\n", f"\n{END_THINK}\n\n")
_R1_GRAMMAR = Grammar(think_gap="\n", think_end=("\n", "\n\n"))
_WITH_TOOLS = ("system", "user", "assistant", "tool")

ROLES = Encoding(
    "roles",
    partial(_render, _Style(_tools_v3)),
    Grammar(reader=FencedReader, special=(BOS, EOS)),
    roles=_WITH_TOOLS,
    tools="always",
)
R1 = Encoding(
    "r1",
    partial(_render, replace(_R1_STYLE, forced=True)),
    _R1_GRAMMAR,
    thinking="always",
    reads_think_tags=True,
)
R1_0528 = Encoding(
    "r1-0528",
    partial(_render, _R1_STYLE),
    replace(_R1_GRAMMAR, reader=FencedReader),
    roles=_WITH_TOOLS,
    thinking="always",
    opens_thinking=False,
    reads_think_tags=True,
    tools="always",
)
V31 = Encoding(
    "v31",
    partial(_render, _Style(_tools_v31, THINK, END_THINK, answer=END_THINK, forced=True, fenced=False)),
    Grammar(reader=MarkedReader),
    roles=_WITH_TOOLS,
    thinking="choice",
    tools="chat",
    reads_think_tags=True,
)
