"""Text: tokenizers, each generation's chat format, reading answers and tool calls, fill-in-the-middle."""

from rorqual.text.encoding import Emitted, Encoding
from rorqual.text.fim import fim, repository
from rorqual.text.messages import EncodingError, ToolCall
from rorqual.text.parser import (
    CallBegin,
    CallDelta,
    CallEnd,
    ContentDelta,
    Event,
    Parsed,
    ReasoningDelta,
    StreamParser,
    ToolCallError,
)
from rorqual.text.registry import ENCODINGS, detect, get_encoding
from rorqual.text.tokenizer import Tokenizer, TokenStream

__all__ = [
    "ENCODINGS",
    "CallBegin",
    "CallDelta",
    "CallEnd",
    "ContentDelta",
    "Emitted",
    "Encoding",
    "EncodingError",
    "Event",
    "Parsed",
    "ReasoningDelta",
    "StreamParser",
    "TokenStream",
    "Tokenizer",
    "ToolCall",
    "ToolCallError",
    "detect",
    "fim",
    "get_encoding",
    "repository",
]
