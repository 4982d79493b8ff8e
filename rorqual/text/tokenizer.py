"""Text to token ids and back, from a Hugging Face folder or from GGUF metadata; byte-level BPE only.

Every model of the family (and SmolLM2, Qwen2 and Llama 3, on which it was distilled or tested) uses
byte-level BPE: a vocabulary entry is a run of bytes, each byte written as one printable letter.
"""

import codecs
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from rorqual.text import pretokenizers
from rorqual.text.added import finder, spelled

_CONFIG, _SPECIAL, _GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"
_FILES = ("tokenizer.json", _CONFIG, _SPECIAL, _GENERATION, "chat_template.jinja")
MARK = "\ufdd0"  # a noncharacter; see Tokenizer.mark
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


@cache
def _letter_bytes() -> dict[str, int]:
    """GPT-2's spelling of the 256 bytes: printable Latin-1 for itself, the rest from U+0100 upwards."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


class TokenStream:
    """Decodes ids one at a time: `push` gives the text that is certain, `finish` the rest.

    The pieces together equal `Tokenizer.decode` of all ids. A character whose bytes are spread over several
    tokens comes out whole with the last of them. Each push costs the length of its token, however long the
    text.
    """

    def __init__(self, backend: Backend, special: frozenset[int]) -> None:
        self._backend = backend
        self._skip = special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text completed by this id; "" while a character is unfinished or for an id without text."""
        if token in self._skip:
            return ""
        return self._utf8.decode(_bytes_of(self._backend.id_to_token(token) or ""))

    def finish(self) -> str:
        """What an unfinished character decodes to (U+FFFD), else ""."""
        return self._utf8.decode(b"", final=True)


def _bytes_of(piece: str) -> bytes:
    """The bytes a vocabulary entry stands for; an entry with a letter outside the alphabet is plain text."""
    table = _letter_bytes()
    if all(letter in table for letter in piece):
        return bytes(table[letter] for letter in piece)
    return piece.encode("utf-8")


class Tokenizer:
    """Encodes and decodes text. Build one with `Tokenizer.from_dir` or `Tokenizer.from_gguf`.

    Attributes: `bos`, `pad`: id or None. `eos`: ids that end a turn, most important first. `adds_bos`:
    whether the model's files ask for BOS before plain text (chat encodings write their own). `chat_template`:
    the Jinja text of the files, kept for `rorqual.text.detect` only; it is never run.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos: int | None = None,
        eos: Iterable[int] = (),
        pad: int | None = None,
        adds_bos: bool = False,
        chat_template: str | None = None,
        folder: Path | None = None,
    ) -> None:
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise ValueError("this tokenizer is not byte-level BPE; the DeepSeek family uses no other kind")
        self._backend = backend
        self._plain: Backend | None = None
        self._spelled: re.Pattern[str] | None = None
        self._finder: tuple[re.Pattern[str] | None, dict[str, int]] | None = None
        self._added = backend.get_added_tokens_decoder()
        self._special = frozenset(number for number, token in self._added.items() if token.special)
        self._folder = folder
        self.bos = bos
        self.eos: tuple[int, ...] = tuple(dict.fromkeys(eos))
        self.pad = pad
        self.adds_bos = adds_bos
        self.chat_template = chat_template

    @classmethod
    def from_dir(cls, path: str | PathLike[str]) -> "Tokenizer":
        """Read tokenizer.json, and BOS, EOS, PAD and the template from the small files beside it.

        Raises FileNotFoundError when tokenizer.json or all the small files are missing, and ValueError when a
        file is not what it should be.
        """
        folder = Path(path)
        main = folder / "tokenizer.json"
        if not main.is_file():
            raise FileNotFoundError(f"{main} is missing: a tokenizer folder needs tokenizer.json")
        small = (_CONFIG, _SPECIAL, _GENERATION)
        if not any((folder / name).is_file() for name in small):
            raise FileNotFoundError(
                f"{folder} has none of {', '.join(small)}: they say which token ends a turn"
            )
        try:
            backend = Backend.from_file(str(main))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{main} cannot be read: {error}") from error
        config, special, generation = (_read_json(folder / name) for name in small)

        def named(key: str) -> int | None:
            entry = config.get(key) or special.get(key)
            text = entry.get("content") if isinstance(entry, Mapping) else entry
            if text is None:
                return None
            found = backend.token_to_id(str(text))
            if found is None:
                raise ValueError(f"{folder}: {key} is {text!r}, which is not in the vocabulary")
            return found

        bos, end, pad = named("bos_token"), named("eos_token"), named("pad_token")
        eos = [] if end is None else [end]
        listed = generation.get("eos_token_id")
        eos += listed if isinstance(listed, list) else [] if listed is None else [listed]
        if bos is None:
            bos = generation.get("bos_token_id")
        adds_bos = bool(config.get("add_bos_token", False))
        template = _template(folder, config)
        return cls(
            backend, bos=bos, eos=eos, pad=pad, adds_bos=adds_bos, chat_template=template, folder=folder
        )

    @classmethod
    def from_gguf(cls, fields: Mapping[str, object]) -> "Tokenizer":
        """Build from GGUF metadata: a mapping with keys such as "tokenizer.ggml.tokens".

        Control tokens (type 3) become special tokens; user-defined ones (type 4) are matched whole in the
        text but are not special. Raises ValueError for a missing field, another tokenizer model than "gpt2",
        or an unknown pre-tokenizer.
        """

        def need(key: str) -> object:
            if f"tokenizer.ggml.{key}" not in fields:
                raise ValueError(
                    f"the GGUF metadata has no tokenizer.ggml.{key}; this file holds no BPE tokenizer"
                )
            return fields[f"tokenizer.ggml.{key}"]

        def optional(key: str) -> int | None:
            value = fields.get(f"tokenizer.ggml.{key}")
            return None if value is None else int(cast(int, value))

        model = str(need("model"))
        if model != "gpt2":
            raise ValueError(
                f"GGUF tokenizer model {model!r} is not supported; only byte-level BPE ('gpt2') is"
            )
        tokens = [str(token) for token in cast(Iterable[object], need("tokens"))]
        pairs = [_merge(str(merge)) for merge in cast(Iterable[object], need("merges"))]
        pre = str(fields.get("tokenizer.ggml.pre", "default"))
        bpe = models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=pairs,
            ignore_merges=pre == "llama-bpe",  # Llama 3 takes a word that is an entry whole
        )
        backend = Backend(bpe)
        backend.pre_tokenizer = pretokenizers.build(pre)
        backend.decoder = decoders.ByteLevel()
        if pre in ("qwen2", "deepseek-r1-qwen"):
            backend.normalizer = normalizers.NFC()
        kinds = [
            int(cast(int, kind))
            for kind in cast(Iterable[object], fields.get("tokenizer.ggml.token_type", ()))
        ]
        backend.add_tokens(
            [
                AddedToken(token, special=kind == _CONTROL, normalized=kind != _CONTROL)
                for token, kind in zip(tokens, kinds, strict=False)
                if kind in (_CONTROL, _USER_DEFINED)
            ]
        )
        template = fields.get("tokenizer.chat_template")
        return cls(
            backend,
            bos=optional("bos_token_id"),
            eos=[end for end in (optional("eos_token_id"), optional("eot_token_id")) if end is not None],
            pad=optional("padding_token_id"),
            adds_bos=bool(fields.get("tokenizer.ggml.add_bos_token", False)),
            chat_template=None if template is None else str(template),
        )

    @property
    def vocab_size(self) -> int:
        """Entries in use, added tokens included; a model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        """Token ids of `text`. BOS is put first only with `bos=True` (ValueError when there is none).

        With `special=False` the spelling of an added token, such as "<think>" in a user's words, is read as
        ordinary text. (Added tokens of a single letter stay: some vocabularies need them for rare bytes.)
        """
        if bos and self.bos is None:
            raise ValueError("bos=True, but this tokenizer names no BOS token")
        backend = self._backend if special else self._without_added()
        start = [self.bos] if bos and self.bos is not None else []
        return start + backend.encode(text, add_special_tokens=False).ids

    def mark(self, text: str) -> str:
        """`text` with MARK after the first letter of every added token spelled in it, and at its end, so that
        `encode_marked` sees none there."""
        if self._spelled is None:
            self._spelled = spelled(t.content for t in self._added.values() if len(t.content) > 1)
        return self._spelled.sub(lambda found: found[0] + MARK, text) + MARK if text else ""

    def encode_marked(self, text: str) -> list[int]:
        """As `encode`, for text made of parts of which some went through `mark`: the added tokens spelled in
        those are read as ordinary text."""
        ids: list[int] = []
        done = 0
        for number, start, end in self._places(text):
            ids += [*self._ordinary(text[done:start]), number]
            done = end
        return ids + self._ordinary(text[done:])

    def _ordinary(self, text: str) -> list[int]:
        text = text.replace(MARK, "")
        return self.encode(text, special=False) if text else []

    def _places(self, text: str) -> Iterator[tuple[int, int, int]]:
        """The added tokens spelled in a text, in order: their ids, where they start and where they end. (Those of a
        single letter don't count.)"""
        if self._finder is None:
            self._finder = finder(self._backend, self._added), {t.content: n for n, t in self._added.items()}
        pattern, ids = self._finder
        if pattern is not None:
            for found in pattern.finditer(text):
                yield ids[found[0]], found.start(), found.end()
            return
        whole = self._backend.encode(text, add_special_tokens=False)
        for number, (start, end) in zip(whole.ids, whole.offsets, strict=True):
            if number in self._added and len(self._added[number].content) > 1:
                yield number, start, end

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`. `skip_special` leaves out tokens the files mark special (in V4: BOS, EOS, PAD and
        the image tokens, but not `<｜User｜>` or `<think>`). Bytes that are not UTF-8 come out as U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def bytes_of(self, token: int) -> bytes:
        """The bytes one id stands for; b"" for an id outside the vocabulary."""
        return _bytes_of(self._backend.id_to_token(token) or "")

    def stream(self, *, skip_special: bool = False) -> TokenStream:
        """A decoder fed one id at a time; see `TokenStream`."""
        return TokenStream(self._backend, self._special if skip_special else frozenset())

    def id_of(self, token: str) -> int | None:
        """The id of a vocabulary entry or added token by its exact spelling, or None."""
        return self._backend.token_to_id(token)

    def to_json(self) -> str:
        """The vocabulary, merges and added tokens as the text of a tokenizer.json."""
        return str(self._backend.to_str())

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the tokenizer files: the originals byte for byte when it came from a folder, else
        tokenizer.json and a minimal tokenizer_config.json (and generation_config.json for several EOS
        ids)."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        if self._folder is not None:
            for name in _FILES:
                source = self._folder / name
                if source.is_file() and source.resolve() != (target / name).resolve():
                    shutil.copyfile(source, target / name)
            return
        self._backend.save(str(target / "tokenizer.json"))
        config: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.adds_bos,
        }
        for key, number in (("bos_token", self.bos), ("eos_token", self.eos[0] if self.eos else None),
                            ("pad_token", self.pad)):  # fmt: skip
            if number is not None:
                config[key] = self._backend.id_to_token(number)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        _write_json(target / _CONFIG, config)
        if len(self.eos) > 1:
            _write_json(target / _GENERATION, {"bos_token_id": self.bos, "eos_token_id": list(self.eos)})

    def _without_added(self) -> Backend:
        """The same model without its added tokens, built at first use."""
        if self._plain is None:
            description = json.loads(self._backend.to_str())
            description["added_tokens"] = [t for t in description["added_tokens"] if len(t["content"]) == 1]
            self._plain = Backend.from_str(json.dumps(description))
        return self._plain


def _merge(line: str) -> tuple[str, str]:
    """ "a b" -> ("a", "b")."""
    left, space, right = line.partition(" ")
    if not (left and space and right):
        raise ValueError(f"tokenizer.ggml.merges holds {line!r}; each merge must be two pieces and a space")
    return left, right


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}; it must be a JSON object")
    return value


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _template(folder: Path, config: Mapping[str, object]) -> str | None:
    """The chat template: its own file, or the field; of several named ones the one called "default"."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    field = config.get("chat_template")
    if isinstance(field, list):
        return next((str(entry["template"]) for entry in field if entry.get("name") == "default"), None)
    return None if field is None else str(field)
