"""The command: thin doors to the library. `rorqual VERB --help` shows an example of each."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import Progress

import rorqual

app = App(
    name="rorqual",
    help="The DeepSeek model family, V1 to V4, in one PyTorch code base.",
    version=rorqual.__version__,
)
console = Console(highlight=False)
DTYPES = ("float32", "bfloat16", "float16")


@app.command
def models(*, json_: Annotated[bool, Parameter(name="--json")] = False) -> None:
    """The whole family: parameters in all and active, cache bytes a token, context, licence.

    Example: rorqual models

    Parameters
    ----------
    json_
        Print the table as JSON instead.
    """
    from rorqual.family import show

    if json_:
        print(json.dumps(show.models_as_dict(), indent=1))
    else:
        show.show_models(console)


@app.command
def inspect(
    name: str,
    *,
    context: int | None = None,
    batch: int = 1,
    svg: Path | None = None,
    json_: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Anatomy of a model: parts, FLOPs and cache a token, what it needs and where it fits.

    Example: rorqual inspect deepseek-v3 --context 100000 --svg v3.svg

    Parameters
    ----------
    name
        A name or alias of `rorqual models`, or a path to a checkpoint or its config.json.
    context
        Tokens in each sequence; the model's own context by default.
    batch
        Sequences served at once.
    svg
        Also draw the layers into this file.
    json_
        Print the figures as JSON instead.
    """
    from rorqual.family import show
    from rorqual.family.draw import draw

    subject = _subject(name)
    config = getattr(subject, "config", subject)
    if svg is not None:  # first: a path that can't be written is said before pages of figures
        svg.write_text(draw(config, name), encoding="utf-8")
        Console(stderr=True).print(f"drawn into {svg}", highlight=False)
    if json_:
        print(json.dumps(show.as_dict(subject, context=context, batch=batch), indent=1))
    else:
        show.show_inspect(subject, console, context=context, batch=batch)


def _subject(name: str) -> Any:
    """A card by name, or the config of a checkpoint on disk."""
    from rorqual.family import card, from_hub
    from rorqual.family.parts import ConfigError

    path = Path(name)
    if path.suffix != ".json" and not path.is_dir():
        return card(name)
    file = path / "config.json" if path.is_dir() else path
    try:
        mapping = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{file.absolute()} does not exist: give a directory that holds a config.json"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise ConfigError(f"{file} is not readable JSON: {problem}") from None
    if not isinstance(mapping, dict):
        raise ConfigError(f"{file} must hold a JSON object, found {type(mapping).__name__}")
    return from_hub(mapping, source=str(file))


@Parameter(name="*")
class Draw:
    """How answers are drawn; see `rorqual.Sampling`."""

    def __init__(
        self,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.6,
        top_p: float = 0.95,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        seed: int | None = None,
        stop: tuple[str, ...] = (),
    ) -> None:
        self.sampling = rorqual.Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
        )


@app.command
def generate(
    model: str,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    *,
    draw: Draw | None = None,
    dtype: str | None = None,
    device: str | None = None,
    speculate: bool = False,
) -> None:
    """Continue a text, streaming it as it comes.

    Example: rorqual generate smollm2 "The sea is" --temperature 0 --max-new-tokens 40

    Parameters
    ----------
    model
        A checkpoint directory, a .gguf file, a hub id, a name of `rorqual models`, or "smollm2".
    prompt
        The text to continue; "-" reads standard input.
    draw
        Sampling.
    dtype
        float32, bfloat16 or float16; by default what the checkpoint holds.
    device
        "cpu", "cuda", "cuda:1"; by default the GPU if there is one.
    speculate
        Draft with the checkpoint's MTP module.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = _load(model, dtype, device)
    for delta in loaded.stream(text, (draw or Draw()).sampling, speculate=speculate):
        print(delta.text, end="", flush=True)
    print()


@app.command
def chat(
    model: str = "smollm2",
    *,
    system: str | None = None,
    think: bool | None = None,
    draw: Draw | None = None,
    dtype: str | None = None,
    device: str | None = None,
    speculate: bool = False,
) -> None:
    """Talk to a model. Ctrl-C stops an answer, /help lists commands.

    Example: rorqual chat smollm2 --system "Answer in one sentence."

    Parameters
    ----------
    model
        A checkpoint directory, a .gguf file, a hub id, a name of `rorqual models`, or "smollm2".
    system
        The system prompt.
    think
        Reasoning on or off, where the model has the switch.
    draw
        Sampling.
    dtype
        float32, bfloat16 or float16; by default what the checkpoint holds.
    device
        "cpu", "cuda", "cuda:1"; by default the GPU if there is one.
    speculate
        Draft with the checkpoint's MTP module.
    """
    from rorqual.chat import Chat

    loaded = _load(model, dtype, device)
    settings = (draw or Draw()).sampling
    Chat(loaded, console, settings, system=system, thinking=think, speculate=speculate).loop()


@app.command
def serve(
    model: str = "smollm2",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    alias: tuple[str, ...] = (),
    api_key_file: Path | None = None,
    max_requests: int | None = None,
    max_queue: int = 1024,
    max_tokens: int | None = None,
    timeout: float | None = None,
    cors: tuple[str, ...] = (),
    strict: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    speculate: bool = False,
    page: bool = True,
    inside: bool = True,
    warm: int | None = None,
) -> None:
    """Serve a model over HTTP: a page to talk on at /, and the APIs of DeepSeek, OpenAI and Anthropic.

    Ctrl-C finishes what runs and ends.

    Example: rorqual serve smollm2 --port 8000

    Keys come from --api-key-file or the environment variable RORQUAL_API_KEYS (separated by commas); without any the
    server is open to whoever reaches it.

    Parameters
    ----------
    model
        A checkpoint directory, a .gguf file, a hub id, a name of `rorqual models`, or "smollm2".
    host
        The address to listen on; only this machine's own by default.
    port
        The port.
    name
        The model's name in requests; by default the last part of MODEL.
    alias
        Other names for it; may be given several times.
    api_key_file
        A file of API keys, one a line.
    max_requests
        Answers that the engine works on at once.
    max_queue
        Answers under way and waiting; more are turned away.
    max_tokens
        Of answers that name no limit; by default what the context leaves.
    timeout
        Seconds for a whole answer; no limit by default.
    cors
        An origin that browsers may call from; may be given several times.
    strict
        Refuse requests with unknown fields.
    dtype
        float32, bfloat16 or float16; by default what the checkpoint holds.
    device
        "cpu", "cuda", "cuda:1"; by default the GPU if there is one.
    speculate
        Draft with the checkpoint's MTP module.
    page
        Offer the page at /.
    inside
        Requests may ask for what goes on inside the model: experts chosen, drafts, earlier tokens looked at.
    warm
        Answers at once that the engine gets ready for before the server listens: their kernels are compiled and their
        passes recorded. By default 64 on a GPU, none on a CPU.
    """
    try:
        from rorqual.serve import Settings, create_app, read_keys
        from rorqual.serve.run import run
    except ImportError as problem:
        raise ValueError(f"the server needs {problem.name}: pip install 'rorqual[serve]'") from None
    keys = tuple(key for key in os.environ.get("RORQUAL_API_KEYS", "").split(",") if key)
    settings = Settings(
        name=name or Path(model).name,
        aliases=alias,
        keys=keys + (read_keys(api_key_file) if api_key_file is not None else ()),
        max_queue=max_queue,
        max_tokens=max_tokens,
        timeout=timeout,
        cors=cors,
        strict=strict,
        page=page,
        inside=inside,
    )
    loaded = _load(model, dtype, device)
    served = create_app(loaded, settings, max_requests=max_requests, speculate=speculate)
    most = (64 if loaded.device.type == "cuda" else 0) if warm is None else warm
    if most:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("getting ready", total=1.0)
            for share in served.state.service.engine.warm(most):
                progress.update(task, completed=share)
    run(served, host=host, port=port)


def _load(model: str, dtype: str | None, device: str | None) -> rorqual.Model:
    import torch

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with Console(stderr=True).status(f"loading {model}"):
        return rorqual.load(model, dtype=getattr(torch, dtype) if dtype else None, device=device)


def main() -> None:
    """Run the command. Errors a user can mend are one line on standard error and exit code 1."""
    try:
        app(console=console)
    except BrokenPipeError:  # the reader of a pipe has had enough: `rorqual models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except (ValueError, OSError) as problem:
        Console(stderr=True).print(f"rorqual: {problem}", style="red", markup=False, highlight=False)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
