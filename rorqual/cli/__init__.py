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
app.command("rorqual.cli.data:app", name="data")
app.command("rorqual.cli.pretrain:app", name="pretrain")
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
    fit: str | None = None,
    data: int | None = None,
    tensor: int | None = None,
    fp8_cache: bool = False,
    json_: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Anatomy of a model: parts, FLOPs and cache a token, what it needs and where it fits.

    Example: rorqual inspect deepseek-v3 --context 100000 --svg v3.svg
    Example: rorqual inspect deepseek-v3 --fit 8xH200 --context 32768 --batch 64

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
    fit
        Only this: whether a machine serves it, and how many sequences fit. 8xH200, 2x48gb, cpu16gb, ...
    data
        With --fit: rows of processes, as `rorqual serve` has them.
    tensor
        With --fit: processes that share each layer.
    fp8_cache
        With --fit: caches in the released 8-bit layouts.
    json_
        Print the figures as JSON instead.
    """
    from rorqual.family import show
    from rorqual.family.draw import draw

    subject = _subject(name)
    config = getattr(subject, "config", subject)
    if fit is not None:
        from rorqual.engine import fit as fits

        length = context or getattr(subject, "context", config.max_positions)
        place = fits.machine(fit)
        found = fits.room(
            config, place, context=length, requests=batch, data=data, tensor=tensor, fp8_cache=fp8_cache
        )
        told = {"model": name, "context": length, **found.as_dict()}
        print(json.dumps(told, indent=1) if json_ else "\n".join(fits.lines(found, length)))
        return
    if data or tensor or fp8_cache:
        raise ValueError("data, tensor and fp8-cache say how --fit MACHINE is laid out: give that too")
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
    allow_host: tuple[str, ...] = (),
    strict: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    speculate: bool = False,
    page: bool = True,
    inside: bool = True,
    warm: int | None = None,
    first_timeout: float | None = 600.0,
    max_body: int = 16 * 2**20,
    drain: float = 60.0,
    fp8_cache: bool = False,
    gpus: int | None = None,
    ranks: int | None = None,
    data: int | None = None,
    tensor: int | None = None,
    expert: int | None = None,
) -> None:
    """Serve a model over HTTP: a page to talk on at /, and the APIs of DeepSeek, OpenAI and Anthropic.

    Ctrl-C finishes what runs and ends.

    Example: rorqual serve deepseek-v3 --gpus 8

    Without MODEL it serves the demo model. With --gpus torchrun starts one process a GPU; several machines are
    joined by calling torchrun yourself: torchrun --nnodes 2 --nproc-per-node 8 ... -m rorqual serve MODEL.

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
    allow_host
        A name that a server without keys may be called by, such as a proxy's; may be given several times.
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
    first_timeout
        Seconds until an answer's first token.
    max_body
        Bytes of a request's body; longer ones are refused.
    drain
        Seconds that a shutdown leaves to answers under way.
    fp8_cache
        Keep caches in the released 8-bit layouts (V3.2 and V4): more of them fit, answers are rounded.
    gpus
        One process on each of so many GPUs of this machine, as one server.
    ranks
        The same on the CPU: so many processes.
    data
        Rows of processes with requests of their own; experts are spread over all. By default one a GPU for models with
        experts.
    tensor
        Processes that share each layer's heads and widths. By default all of them for dense models, and with
        --speculate.
    expert
        Processes that the experts are spread over: all of them, or as many as --tensor says.
    """
    try:
        from rorqual import weights
        from rorqual.serve import Settings, create_app, keys_of, read_keys
        from rorqual.serve import ranks as many
        from rorqual.serve.run import bind, run
    except ImportError as problem:
        raise ValueError(f"the server needs {problem.name}: pip install 'rorqual[serve]'") from None
    keys = keys_of(os.environ.get("RORQUAL_API_KEYS"))
    settings = Settings(
        name=name or Path(model).name,
        aliases=alias,
        keys=keys + (read_keys(api_key_file) if api_key_file is not None else ()),
        max_queue=max_queue,
        max_tokens=max_tokens,
        timeout=timeout,
        first_timeout=first_timeout,
        max_body=max_body,
        drain=drain,
        cors=cors,
        hosts=allow_host,
        strict=strict,
        page=page,
        inside=inside,
    )
    options: dict[str, Any] = {"max_requests": max_requests, "speculate": speculate, "fp8_cache": fp8_cache}
    if not many.is_rank():
        count = _processes(gpus, ranks, device)
        if count is not None:
            bind(host, port).close()  # a port that is taken is said at once
            many.launch(count, sys.argv[1:], drain=drain)
            return
        if data or tensor or expert:
            raise ValueError("data, tensor and expert lay out several processes: say how many with --gpus")
        listener: Any = bind(host, port)
        loaded = _load(model, dtype, device)
    else:
        many.begin()
        listener = bind(host, port) if os.environ["RANK"] == "0" else None
        place = weights.resolve(model)
        layout = many.layout_for(
            place, data=data, tensor=tensor, expert=expert, speculate=speculate, device=device
        )
        loaded = many.in_turns(layout, place, lambda: _load(str(place), dtype, "cpu"))
        options["layout"] = layout
        if layout.rank != 0:
            many.follow(loaded, **options)
            return
    served = create_app(loaded, settings, **options)
    most = (64 if loaded.device.type == "cuda" else 0) if warm is None else warm
    if most:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("getting ready", total=1.0)
            for share in served.state.service.engine.warm(most):
                progress.update(task, completed=share)
    run(served, host=host, port=port, listener=listener)


def _processes(gpus: int | None, ranks: int | None, device: str | None) -> int | None:
    """How many processes are to be started; None for this one alone."""
    import torch

    count = gpus if ranks is None else ranks
    if gpus is not None and ranks is not None:
        raise ValueError("give --gpus or --ranks, not both")
    if count is not None and count < 1:
        raise ValueError(f"there must be at least one process, got {count}")
    if ranks is not None and device != "cpu":
        raise ValueError("--ranks is for the CPU: add --device cpu, or use --gpus")
    if gpus is not None and device is not None:
        raise ValueError(
            "--gpus takes the machine's first GPUs: leave --device out (CUDA_VISIBLE_DEVICES chooses)"
        )
    if gpus is not None and gpus > torch.cuda.device_count():
        raise ValueError(f"--gpus {gpus}, but this machine has {torch.cuda.device_count()}")
    return count


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
    except (MemoryError, RuntimeError) as problem:
        if not _out_of_memory(problem):
            raise
        said = f"rorqual: there is too little memory: {str(problem).splitlines()[0]}"
        if "pretrain" in sys.argv[1:2]:
            said += ". Take fewer sequences at once (--override micro=1); --dry-run says what a run takes"
        Console(stderr=True).print(said, style="red", markup=False, highlight=False)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _out_of_memory(problem: Exception) -> bool:
    """Whether Python, a GPU or PyTorch's allocator on the CPU had no room."""
    named = isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(problem)
