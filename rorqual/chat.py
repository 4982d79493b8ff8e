"""A conversation in the terminal: streaming, reasoning apart from the answer, Ctrl-C stops the answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from rorqual.engine import Completion, Sampling
from rorqual.model import Model
from rorqual.text import CallBegin, CallDelta, ContentDelta, Event, ReasoningDelta

SWITCH = {"on": True, "off": False, "auto": None}
BLOCK = "\0"
"""Before a question typed as a block: it is never a command, whatever it begins with."""
HELP = """\
  /new            forget the conversation          /system TEXT    set the system prompt and start anew
  /think on|off|auto   reasoning, where the model has the switch     /retry   answer the last question again
  /help           this page                        /exit           leave (also Ctrl-D)
  Ctrl-C stops an answer. A line that ends in \\ goes on; or open and close a block with \"\"\"."""


class Chat:
    """The state of one conversation: messages, settings, and where it is shown."""

    def __init__(
        self,
        model: Model,
        console: Console,
        sampling: Sampling,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        speculate: bool = False,
    ) -> None:
        self.model, self.console, self.sampling = model, console, sampling
        self.thinking, self.speculate = thinking, speculate
        self.messages: list[dict[str, Any]] = []
        self.start(system)

    def start(self, system: str | None) -> None:
        """Begin anew with a system prompt, or none."""
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    # -------------------------------------------------------------------------------------- one turn

    def ask(self, question: str) -> Completion:
        """Answer `question` on the console. If the answer is stopped or fails, what was said so far stays
        in the conversation; a question that could not be asked does not."""
        self.messages.append({"role": "user", "content": question})
        try:
            return self._answer()
        except ValueError:
            self.messages.pop()
            raise

    def retry(self) -> Completion | None:
        """Answer the last question again."""
        kept = list(self.messages)
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            self.messages = kept
            self.console.print("nothing to answer yet", style="dim")
            return None
        try:
            return self._answer()
        except ValueError:
            self.messages = kept
            raise

    def _answer(self) -> Completion:
        options = {} if self.thinking is None else {"thinking": self.thinking}
        ids = self.model.encode_chat(self.messages, **options)
        parser = self.model.parser(**options)
        show = _Show(self.console)
        done = Completion(prompt_tokens=len(ids))
        begun = time.perf_counter()
        first: float | None = None
        stream = self.model.stream(ids, self.sampling, speculate=self.speculate)
        try:
            for delta in stream:
                first = first or time.perf_counter()
                done.ids.append(delta.id)
                done.finish_reason = delta.finish_reason
                for event in parser.feed(delta.text):
                    show.event(event)
        except KeyboardInterrupt:
            done.finish_reason = "stopped"
        finally:
            with contextlib.suppress(AttributeError):
                stream.close()  # type: ignore[attr-defined]
        parsed = parser.finish()
        for event in parsed.events:
            show.event(event)
        show.end()
        if parsed.problem:
            self.console.print(f"the answer's format is off: {parsed.problem}", style="yellow", markup=False)
        done.text = parsed.content
        self.messages.append(parsed.message())
        self._figures(done, begun, first)
        return done

    def _figures(self, done: Completion, begun: float, first: float | None) -> None:
        now = time.perf_counter()
        wait = (first or now) - begun
        rate = (len(done.ids) - 1) / (now - first) if first and len(done.ids) > 1 and now > first else 0.0
        ending = {"length": ", cut at the length limit", "stopped": ", stopped"}.get(
            done.finish_reason or "", ""
        )
        self.console.print(
            f"{done.prompt_tokens} tokens in, {len(done.ids)} out, first after {wait:.2f} s, "
            f"{rate:.1f} tokens/s{ending}",
            style="dim",
        )

    # ----------------------------------------------------------------------------------- the loop

    def loop(self, read: Callable[[str], str] = input) -> None:
        """Questions until the user leaves. `read(prompt)` gives one line, as `input` does."""
        self.console.print("/help for commands, Ctrl-D to leave", style="dim")
        if self.thinking is not None:
            self.model.parser(thinking=self.thinking)  # refused before the first question rather than at it
        for question in _questions(read, self.console):
            try:
                if question.startswith("/"):
                    if not self._command(question):
                        return
                else:
                    self.ask(question.removeprefix(BLOCK))
            except ValueError as problem:
                self.console.print(f"{problem}", style="red", markup=False)

    def _command(self, line: str) -> bool:
        """Obey a slash command; False means leave."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        match word:
            case "/exit" | "/quit":
                return False
            case "/help":
                self.console.print(HELP, markup=False)
            case "/new":
                self.start(self.system)
                self.console.print("a new conversation", style="dim")
            case "/system":
                self.start(rest or None)
                self.console.print(
                    "a new conversation, system prompt " + ("set" if rest else "removed"), style="dim"
                )
            case "/retry":
                self.retry()
            case "/think" if rest in SWITCH:
                self.model.parser(thinking=SWITCH[rest])  # refuses what this model's format has not
                self.thinking = SWITCH[rest]
                self.console.print(f"reasoning {rest}", style="dim")
            case _:
                self.console.print(f"unknown command {line!r}: /help lists them", style="red", markup=False)
        return True


class _Show:
    """Prints the parts of an answer as they come: reasoning dim in a gutter, then the answer."""

    def __init__(self, console: Console) -> None:
        self.console, self.part, self.blank = console, "", True

    def event(self, event: Event) -> None:
        match event:
            case ReasoningDelta():
                self._write("reasoning", event.text, "dim italic")
            case ContentDelta():
                self._write("content", event.text, "")
            case CallBegin():
                self._write(f"call {event.index}", f"{event.name} ", "cyan")
            case CallDelta():
                self._write(f"call {event.index}", event.text, "cyan")

    def _write(self, part: str, text: str, style: str) -> None:
        if part != self.part:
            if self.part:
                self.console.print("\n")
            self.part, text = part, text.lstrip("\n")
        self.console.print(Text(text, style=style), end="", soft_wrap=True)

    def end(self) -> None:
        self.console.print()


def _questions(read: Callable[[str], str], console: Console) -> Iterator[str]:
    """Questions as the user types them: one line, lines joined by a final backslash, or a \"\"\" block."""
    ended = False

    def more() -> str:
        """One more line of a question; at the end of the input what there is counts as all."""
        nonlocal ended
        try:
            return read(". ")
        except EOFError:
            ended = True
            return ""

    while not ended:
        try:
            line = read("\n> ")
            if line.startswith('"""'):
                lines, line = [], line[3:]
                while not line.rstrip().endswith('"""') and not ended:
                    lines.append(line)
                    line = more()
                line = BLOCK + "\n".join([*lines, line.rstrip().removesuffix('"""')])
            while line.endswith("\\") and not ended:
                line = line[:-1] + "\n" + more()
        except EOFError:
            break
        except KeyboardInterrupt:
            console.print("\n(Ctrl-D or /exit leaves)", style="dim")
            continue
        if line.removeprefix(BLOCK).strip():
            yield line.strip("\n")
    console.print()
