"""What `/v1/responses` sends back: the response as a whole, and as a stream of events."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from rorqual.serve.errors import Refusal, render
from rorqual.serve.meta import Meta
from rorqual.serve.parts import (
    CallArguments,
    CallStart,
    Content,
    End,
    Part,
    Reasoning,
    Usage,
)
from rorqual.serve.turn import Turn
from rorqual.serve.wire import event


def usage(used: Usage) -> dict[str, Any]:
    """`usage` with this API's names."""
    return {
        "input_tokens": used.prompt,
        "input_tokens_details": {"cached_tokens": used.cached},
        "output_tokens": used.completion,
        "output_tokens_details": {"reasoning_tokens": used.reasoning},
        "total_tokens": used.prompt + used.completion,
    }


def body(meta: Meta, told: Mapping[str, Any], turn: Turn) -> dict[str, Any]:
    """The whole response: what the last event of its stream would hold."""
    writer, end = Writer(meta, told), turn.end or End("stop")
    for part in (*turn.parts(), end):
        for _ in writer.feed(0, part):
            pass
    return writer.response(end)


def _reasoning(item: str) -> dict[str, Any]:
    return {"id": item, "type": "reasoning", "summary": [], "content": [], "status": "in_progress"}


def _message(item: str) -> dict[str, Any]:
    told = {"id": item, "type": "message", "role": "assistant"}
    return told | {"content": [], "status": "in_progress"}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(item: str, call_id: str, name: str) -> dict[str, Any]:
    told = {"id": item, "type": "function_call", "call_id": call_id, "name": name}
    return told | {"arguments": "", "status": "in_progress"}


class Writer:
    """A stream of numbered events. `items`: the output items finished so far."""

    def __init__(self, meta: Meta, told: Mapping[str, Any]) -> None:
        self.meta, self.told = meta, told
        self.items: list[dict[str, Any]] = []
        self._number = -1
        self._open: dict[str, Any] | None = None
        self._text = ""

    def item_id(self, kind: str) -> str:
        """An id for the next item."""
        return f"{kind}_{self.meta.number}{len(self.items):02d}"

    def response(self, end: End | None) -> dict[str, Any]:
        """The response as it stands; with its end, if that has come."""
        cut = end is not None and end.finish == "length"
        status = "in_progress" if end is None else "incomplete" if cut else "completed"
        done = {
            "id": self.meta.id,
            "object": "response",
            "created_at": self.meta.created,
            "model": self.meta.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": list(self.items),
            "usage": None if end is None else usage(end.usage),
            **self.told,
        }
        if end is not None and end.finish != "length":
            done["completed_at"] = int(time.time())
        if end is not None and end.problem is not None:
            done["format_problem"] = {"message": end.problem, "text": end.unparsed}
        return done

    def start(self) -> Iterator[bytes]:
        """The response has begun."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.response(None))

    def feed(self, index: int, part: Part) -> Iterator[bytes]:
        """The events of one part."""
        match part:
            case Reasoning(text, _):
                yield from self._inside("reasoning", lambda: _reasoning(self.item_id("rs")))
                self._text += text
                yield self._piece("response.reasoning_text.delta", delta=text)
            case Content(text, _):
                yield from self._inside("message", lambda: _message(self.item_id("msg")))
                self._text += text
                yield self._piece("response.output_text.delta", delta=text, logprobs=[])
            case CallStart(_, call_id, name):
                yield from self._close()
                item = _call(self.item_id("fc"), call_id, name)
                yield from self._inside("function_call", lambda: item)
            case CallArguments(_, text):
                self._text += text
                yield self._in_item("response.function_call_arguments.delta", delta=text)
            case End():
                if not self.items and self._open is None:
                    yield from self._inside("message", lambda: _message(self.item_id("msg")))
                yield from self._close("incomplete" if part.finish == "length" else "completed")
                kind = "response.incomplete" if part.finish == "length" else "response.completed"
                yield self._event(kind, response=self.response(part))

    def end(self) -> Iterator[bytes]:
        """Nothing stands after the response's own end."""
        return iter(())

    def failed(self, refusal: Refusal) -> bytes:
        """The event of an error in the middle of the stream, its last."""
        _, body = render(refusal, "openai")
        told = {name: body["error"][name] for name in ("code", "message", "param")}
        return self._event("error", **told)

    # ---- items

    def _inside(self, kind: str, make: Any) -> Iterator[bytes]:
        """Be inside an item of this kind."""
        if self._open is not None and self._open["type"] == kind:
            return
        yield from self._close()
        self._open, self._text = make(), ""
        yield self._event("response.output_item.added", output_index=len(self.items), item=self._open)
        if kind == "message":
            yield self._piece("response.content_part.added", part=_part(""))
        elif kind == "reasoning":
            yield self._piece("response.content_part.added", part={"type": "reasoning_text", "text": ""})

    def _close(self, status: str = "completed") -> Iterator[bytes]:
        """The open item is whole."""
        if self._open is None:
            return
        item, kind = self._open, self._open["type"]
        if kind == "message":
            yield self._piece("response.output_text.done", text=self._text, logprobs=[])
            yield self._piece("response.content_part.done", part=_part(self._text))
            item = item | {"content": [_part(self._text)]}
        elif kind == "reasoning":
            part = {"type": "reasoning_text", "text": self._text}
            yield self._piece("response.reasoning_text.done", text=self._text)
            yield self._piece("response.content_part.done", part=part)
            item = item | {"content": [part]}
        else:
            done = {"name": item["name"], "arguments": self._text}
            yield self._in_item("response.function_call_arguments.done", **done)
            item = item | {"arguments": self._text}
        item = item | {"status": status}
        yield self._event("response.output_item.done", output_index=len(self.items), item=item)
        self.items.append(item)
        self._open = None

    def _in_item(self, kind: str, **fields: Any) -> bytes:
        assert self._open is not None
        return self._event(kind, item_id=self._open["id"], output_index=len(self.items), **fields)

    def _piece(self, kind: str, **fields: Any) -> bytes:
        return self._in_item(kind, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **fields}, kind)
