"""The formats of V3.2 and V4, with DSML tool calls (facts 4.4, 4.5): published as encoders, not templates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rorqual.text.dsml import DsmlReaderV4, DsmlReaderV32, write_dsml
from rorqual.text.encoding import Encoding, Request, system_text
from rorqual.text.messages import Block, EncodingError, Message, to_json
from rorqual.text.parser import Grammar
from rorqual.text.tokens import ASSISTANT, BOS, DSML, END_THINK, EOS, LATEST_REMINDER, TASKS, THINK, USER

# ---- texts the models were trained on: parts of the format, to the letter


def _call_shape(block: str, kind: str) -> str:
    """The example of a block of two calls, as both tools sections show it."""
    return f"""\
<{DSML}{block}>
<{DSML}invoke name="${kind}_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="${kind}_NAME2">
...
</{DSML}invoke>
</{DSML}{block}>
"""


_TOOLS_V32 = f"""\
## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{DSML}function_calls>" block like the following as part of your \
reply to the user:
{_call_shape("function_calls", "FUNCTION")}
String and scalar parameters should be specified as is without any escaping or quotes, while lists and \
objects should use JSON format. The "string" attribute should be set to "true" for string type parameters \
and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a \
thinking block. Here is an example:

<{DSML}function_calls>
...
</{DSML}function_calls>

<function_results>
...
</function_results>

{THINK}...thinking about results{END_THINK}

Here are the functions available in JSONSchema format:
<functions>
$SCHEMAS
</functions>
"""

_TOOLS_V4 = f"""\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<{DSML}tool_calls>" block like the following:

{_call_shape("tool_calls", "TOOL")}
String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, \
arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside \
{THINK}...{END_THINK} BEFORE any tool calls or final response.

Otherwise, output directly after {END_THINK} with tool calls or final response.

### Available Tool Schemas

$SCHEMAS

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""

_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"

_EFFORT_MAX = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the "
    "root cause, rigorously stress-testing your logic against all potential paths, edge cases, and "
    "adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)

# ---- what both share


def _sections(
    template: str,
    tools: Sequence[Mapping[str, Any]],
    formats: Sequence[Mapping[str, Any] | None],
    mark: Callable[[str], str],
) -> list[str]:
    """The tools section and the response-format sections, where there are any."""
    sections = (
        [template.replace("$SCHEMAS", "\n".join(mark(to_json(tool)) for tool in tools))] if tools else []
    )
    return sections + [_FORMAT + mark(to_json(schema)) for schema in formats if schema is not None]


def _head(template: str, messages: Sequence[Message], request: Request) -> str:
    """All system texts joined by a blank line, then the sections, each after a blank line.

    (Where system messages stand elsewhere or are several, DeepSeek's encoders disagree; this is V4.1's way.)
    """
    systems = [message for message in messages if message.role == "system"]
    tools = [*request.tools, *(tool for message in systems for tool in message.tools)]
    formats = [message.response_format for message in systems] + [request.response_format]
    return "\n\n".join([system_text(messages), *_sections(template, tools, formats, request.mark)])


def _last_user(turns: Sequence[Message]) -> int:
    """The place of the last user or developer turn, -1 when there is none."""
    return max((place for place, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def _answer(turn: Message, calls: str, *, thinks: bool) -> str:
    """An assistant turn after its think tag. A prefix stays open: without content, inside the reasoning."""
    if thinks and turn.prefix and not turn.text:
        return turn.reasoning
    thought = turn.reasoning + END_THINK if thinks else ""
    said = turn.text + calls if turn.emitted is None else turn.emitted
    return thought + said + (EOS if turn.eos and not turn.prefix else "")


# ---- V3.2


def render_v32(messages: Sequence[Message], request: Request) -> str:
    """V3.2. Every user turn and every run of tool results ends in a think tag. (unverified:
    `drop_thinking=False` keeps the reasoning of all turns; the published encoder never writes that of earlier
    turns.)"""
    turns = [message for message in messages if message.role != "system"]
    last_user = _last_user(turns)
    drop = request.thinking and request.drop_thinking
    parts = [BOS, _head(_TOOLS_V32, messages, request)]
    for place, turn in enumerate(turns):
        after = turns[place + 1] if place + 1 < len(turns) else None
        thinks = request.thinking and (not drop or place >= last_user)
        opens = after is not None or request.generate
        tag = THINK if thinks else END_THINK
        if turn.role == "assistant":
            calls = write_dsml(turn.calls, "function_calls", request.mark, blank_when_empty=True)
            parts.append(_answer(turn, calls, thinks=thinks))
        elif turn.role == "tool":
            first = turns[place - 1].role != "tool"
            parts.append(("\n\n<function_results>" if first else "") + f"\n<result>{turn.text}</result>")
            if after is None or after.role != "tool":
                parts.append("\n</function_results>" + (f"\n\n{tag}" if opens else ""))
        elif turn.role == "user" or not drop or place >= last_user:
            parts.append(
                USER + (_developer_v32(turn, request.mark) if turn.role == "developer" else turn.text)
            )
            parts.append(ASSISTANT + tag if opens else "")
    return "".join(parts)


def _developer_v32(turn: Message, mark: Callable[[str], str]) -> str:
    sections = _sections(_TOOLS_V32, turn.tools, [turn.response_format], mark)
    return "".join(f"\n\n{section}" for section in [*sections, f"# The user's message is: {turn.text}"])


# ---- V4


def render_v4(messages: Sequence[Message], request: Request) -> str:
    """V4. Tool results are part of user turns; `<｜Assistant｜>` and a think tag open each assistant turn,
    except the answer to a quick task."""
    turns = _merge(messages)
    last_user = _last_user(turns)
    has_tools = bool(request.tools) or any(message.tools for message in messages)
    drop = request.thinking and request.drop_thinking and not has_tools
    effort = _EFFORT_MAX if request.thinking and request.effort == "max" else ""
    parts = [BOS, effort, _head(_TOOLS_V4, messages, request)]

    def opening(place: int) -> str:
        thinks = request.thinking and (not drop or place > last_user)
        return ASSISTANT + (THINK if thinks else END_THINK)

    for place, turn in enumerate(turns):
        task = turns[place - 1].task if place else None
        if turn.role == "assistant":
            thinks = request.thinking and (not drop or place > last_user) and task is None
            calls = write_dsml(turn.calls, "tool_calls", request.mark, blank_when_empty=False)
            parts.append((opening(place) if task is None else "") + _answer(turn, calls, thinks=thinks))
        elif turn.role == "latest_reminder":
            parts.append(LATEST_REMINDER + turn.text)
        elif turn.role == "user" or not drop or place >= last_user:
            sections = _sections(_TOOLS_V4, turn.tools, [turn.response_format], request.mark)
            parts.append(USER + "\n\n".join([_user_text(turn), *sections]))
        if turn.task is not None:
            if place + 1 < len(turns) and turns[place + 1].role != "assistant":
                found = f"message {turn.index}: task is {turn.task!r}"
                raise EncodingError(f"{found}; only its answer, an assistant message, may follow")
            parts.append((opening(place + 1) if turn.task == "action" else "") + TASKS[turn.task])
    if request.generate and (not turns or turns[-1].task is None):
        parts.append(opening(len(turns)))
    return "".join(parts)


def _merge(messages: Sequence[Message]) -> list[Message]:
    """The turns: tool results become user turns, user turns in a row one; results follow the calls' order."""
    turns: list[Message] = []
    for message in messages:
        turn = replace(message, role="user") if message.role == "tool" else message
        if turn.role == "user" and turns and turns[-1].role == "user" and turns[-1].task is None:
            turns[-1] = replace(turns[-1], blocks=turns[-1].blocks + turn.blocks, task=turn.task)
        elif turn.role != "system":
            turns.append(turn)
    order: dict[str | None, int] = {}
    for place, turn in enumerate(turns):
        if turn.calls:
            order = {call.id: number for number, call in enumerate(turn.calls) if call.id is not None}
        elif turn.role == "user" and order:
            results = [block for block in turn.blocks if block.result]
            in_order = iter(sorted(results, key=lambda block: order.get(block.call_id, 0)))
            blocks = tuple(next(in_order) if block.result else block for block in turn.blocks)
            turns[place] = replace(turn, blocks=blocks)
    return turns


def _user_text(turn: Message) -> str:
    """A user turn's blocks, a blank line between; tool results in their tag."""

    def shown(block: Block) -> str:
        return f"<tool_result>{block.text}</tool_result>" if block.result else block.text

    return "\n\n".join(map(shown, turn.blocks))


_SPECIAL = (BOS, EOS, THINK, END_THINK, DSML)

V32 = Encoding(
    "v32",
    render_v32,
    Grammar(reader=DsmlReaderV32, special=_SPECIAL),
    roles=("system", "user", "assistant", "tool", "developer"),
    fields=("tools", "response_format"),
    thinking="choice",
    tools="always",
    schema=True,
)
V4 = Encoding(
    "v4",
    render_v4,
    Grammar(reader=DsmlReaderV4, special=_SPECIAL),
    roles=("system", "user", "assistant", "tool", "developer", "latest_reminder"),
    fields=("tools", "response_format", "content_blocks", "task", "wo_eos"),
    thinking="choice",
    default_thinking=True,
    tools="always",
    efforts=("high", "max"),
    schema=True,
    loose_parts=True,
)
