"""What loading costs: the memory of the model and little more. (Its speed: benchmarks/loading.py.)"""

import resource
import sys

import pytest
import torch
from safetensors import safe_open

from rorqual.family.hub import from_hub
from rorqual.nn import Transformer
from rorqual.weights import load, save
from tests.forks import CONTEXT
from tests.weights.tiny import CONFIGS

DENSE = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16, vocab_size=30000
)
MOE = dict(
    hidden_size=1024, intermediate_size=4096, moe_intermediate_size=768, num_hidden_layers=3, vocab_size=30000
)
MOE |= dict(n_routed_experts=32, kv_lora_rank=256, q_lora_rank=512)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
BIG = {
    "dense": ("llama-tied", DENSE),
    "moe": ("deepseek_v3", MOE),
    "fp8": ("deepseek_v3", MOE | {"quantization_config": FP8, "vocab_size": 8000}),
}


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Checkpoints of 100 to 400 MB in BF16 (or FP8)."""
    root, done = tmp_path_factory.mktemp("big"), {}

    def make(kind):
        if kind not in done:
            key, changes = BIG[kind]
            config = CONFIGS[key]().to_dict() | changes | {"dtype": "bfloat16"}
            if kind == "dense":
                config |= {"num_key_value_heads": 16, "head_dim": 64}
            else:
                config["quantization_config"] = changes.get("quantization_config")
            torch.manual_seed(0)
            save(Transformer(from_hub(config), dtype=torch.bfloat16), root / kind)
            done[kind] = root / kind
        return done[kind]

    return make


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(told, small, path, options):
    """In a process of its own: by how much the peak grew, and what the model holds of that."""
    load(small)  # so that what is allocated once is there
    before = peak()
    model = load(path, **options)
    after = peak()
    held = sum(t.nbytes for t in model.state_dict().values())
    told.send((after - before, held, sum(t.nbytes for t in model.released_scales.values())))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dense", {}),
        ("dense", {"mapped": False}),
        ("dense", {"dtype": torch.float32}),
        ("moe", {}),
        ("moe", {"dtype": torch.float32}),
        ("fp8", {}),
        ("fp8", {"dtype": torch.bfloat16}),
    ],
)
def test_peak_memory_is_the_model_and_one_tensor(big, made, kind, options):
    path = big(kind)
    here, there = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=measure, args=(there, made("llama").path, path, options))
    child.start()
    there.close()  # so that a child that dies is an end, not a wait
    grown, held, scales = here.recv()
    child.join()
    with safe_open(path / "model.safetensors", "pt") as f:
        largest = max(f.get_tensor(k).nbytes for k in f.keys())  # noqa: SIM118 - not a dict
    assert held > 100e6
    assert grown <= held + scales + max(largest, 48e6)
