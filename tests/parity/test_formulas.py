"""What transformers lacks or gets wrong, held to the equations written out by hand (formulas.py), in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import rorqual
from rorqual.family import (
    GQA,
    MLA,
    CompressedAttention,
    HyperConnection,
    Layer,
    ModelConfig,
    MoE,
    Rope,
    Router,
    SwiGLU,
)
from rorqual.nn import Rows, Trace, Transformer
from tests.parity import formulas as f
from tests.parity.zoo import largest, stir_ours

TIGHT = 1e-9  # fp64 on both sides; rotations are taken from fp32 angles, exact for these few positions
EPS = 1e-6
THETA = 10000.0


def published(config: ModelConfig, directory: Path) -> tuple[Transformer, dict[str, Tensor]]:
    """A random fp64 model, and its weights as they would be published."""
    model = Transformer(config, dtype=torch.float64).double()
    stir_ours(model)
    rorqual.save(model, directory)
    weights = {}
    for file in directory.glob("*.safetensors"):
        weights.update({k: v.double() for k, v in load_file(file).items()})
    return model, weights


def rows(hidden: Tensor) -> Rows:
    return Rows([0] * hidden.shape[0], [hidden.shape[1]] * hidden.shape[0], hidden.shape[1], hidden.device)


def tokens(vocab: int, length: int = 9) -> Tensor:
    return torch.randint(0, vocab, (1, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_deepseek_moe_16b(tmp_path: Path) -> None:
    attention = GQA(heads=3, kv_heads=3, head_dim=8, rope=Rope(8, THETA))
    moe = MoE(routed=7, top_k=3, width=11, shared=2, router=Router("softmax"))
    layers = (Layer(attention, SwiGLU(30)), Layer(attention, moe), Layer(attention, moe))
    config = ModelConfig("deepseek", 40, 24, layers, 64, norm_eps=EPS, dtype="float64")
    model, w = published(config, tmp_path)
    ids = tokens(40)
    xs = [w["model.embed_tokens.weight"][i] for i in ids[0]]
    for layer in range(3):
        name = f"model.layers.{layer}."
        normed = [f.rms(x, w[f"{name}input_layernorm.weight"], EPS) for x in xs]
        xs = [x + a for x, a in zip(xs, f.mha(normed, w, f"{name}self_attn.", 3, THETA), strict=True)]
        normed = [f.rms(x, w[f"{name}post_attention_layernorm.weight"], EPS) for x in xs]
        if layer == 0:
            xs = [x + f.swiglu(n, w, f"{name}mlp.", f.HUB) for x, n in zip(xs, normed, strict=True)]
        else:
            xs = [x + f.moe_v1(n, w, f"{name}mlp.", 3, 7) for x, n in zip(xs, normed, strict=True)]
    logits = torch.stack([w["lm_head.weight"] @ f.rms(x, w["model.norm.weight"], EPS) for x in xs])
    assert largest(model(ids)[0], logits) < 1e-6  # angles pass fp32 on our side


@torch.no_grad()
def test_mtp_of_v3(tmp_path: Path) -> None:
    attention = MLA(3, 12, 8, 4, 6, Rope(4, THETA, interleaved=True), q_rank=10)
    router = Router("sigmoid", bias=True, groups=4, keep=2, group_score="top2", normalize=True, scale=2.5)
    layer = Layer(attention, MoE(8, 3, 9, 1, router))
    config = ModelConfig("deepseek_v3", 40, 24, (layer,), 64, norm_eps=EPS, mtp=(layer,), dtype="float64")
    model, w = published(config, tmp_path)
    ids, trace = tokens(40), Trace()
    model(ids, trace=trace)
    hidden = trace.hidden[-1][:, :-1]
    ours, _ = model.predict_further(hidden, ids[:, 1:], rows(hidden))
    name = "model.layers.1."
    xs = []
    for h, following in zip(hidden[0], ids[0, 1:], strict=True):
        e = f.rms(w["model.embed_tokens.weight"][following], w[f"{name}enorm.weight"], EPS)
        xs.append(w[f"{name}eh_proj.weight"] @ torch.cat((e, f.rms(h, w[f"{name}hnorm.weight"], EPS))))
    normed = [f.rms(x, w[f"{name}input_layernorm.weight"], EPS) for x in xs]
    attended = f.mla(normed, w, f"{name}self_attn.", heads=3, nope=8, rope=4, v=6, theta=THETA, eps=EPS)
    xs = [x + a for x, a in zip(xs, attended, strict=True)]
    normed = [f.rms(x, w[f"{name}post_attention_layernorm.weight"], EPS) for x in xs]
    moe = [f.moe_v3(n, w, f"{name}mlp.", top_k=3, groups=4, keep=2, scale=2.5) for n in normed]
    xs = [x + m for x, m in zip(xs, moe, strict=True)]
    logits = torch.stack(
        [w["lm_head.weight"] @ f.rms(x, w[f"{name}shared_head.norm.weight"], EPS) for x in xs]
    )
    assert largest(ours[0], logits) < 1e-6


@torch.no_grad()
def test_mtp_of_v4(tmp_path: Path) -> None:
    """Also V4's window attention, sinks, clamps, stream mixing and stream head by hand."""
    attention = CompressedAttention(4, 12, 10, 2, 6, 4, Rope(4, THETA, interleaved=True))
    router = Router("sqrtsoftplus", bias=True, normalize=True, scale=1.5)
    layer = Layer(attention, MoE(5, 2, 9, 1, router, limit=0.8))
    config = ModelConfig(
        "deepseek_v4",
        40,
        16,
        (layer,),
        64,
        EPS,
        residual=HyperConnection(4, 20, 1e-6),
        mtp=(layer,),
        dtype="float64",
    )
    model, w = published(config, tmp_path)
    ids = tokens(40)
    state = model.run(ids, rows(ids))

    def block(streams: list[Tensor], name: str) -> list[Tensor]:
        read = [f.hyper_read(x, w, f"{name}hc_attn", 20, 1e-6) for x in streams]
        normed = [f.rms(r[0], w[f"{name}attn_norm.weight"], EPS) for r in read]
        kind = dict(heads=4, rope=4, window=4, groups=2, theta=THETA, eps=EPS)
        attended = f.window_attention(normed, w, f"{name}attn.", **kind)
        streams = [f.hyper_write(x, y, r[1], r[2]) for x, y, r in zip(streams, attended, read, strict=True)]
        read = [f.hyper_read(x, w, f"{name}hc_ffn", 20, 1e-6) for x in streams]
        normed = [f.rms(r[0], w[f"{name}ffn_norm.weight"], EPS) for r in read]
        fed = [f.moe_v4(n, w, f"{name}ffn.", top_k=2, scale=1.5, limit=0.8) for n in normed]
        return [f.hyper_write(x, y, r[1], r[2]) for x, y, r in zip(streams, fed, read, strict=True)]

    streams = block([w["embed.weight"][i].expand(4, -1) for i in ids[0]], "layers.0.")
    assert largest(state[0], torch.stack(streams)) < 1e-6
    joined = []
    for x, following in zip(streams[:-1], ids[0, 1:], strict=True):
        e = w["mtp.0.e_proj.weight"] @ f.rms(w["embed.weight"][following], w["mtp.0.enorm.weight"], EPS)
        joined.append(
            torch.stack([e + w["mtp.0.h_proj.weight"] @ f.rms(s, w["mtp.0.hnorm.weight"], EPS) for s in x])
        )
    after = [f.hyper_head(x, w, "mtp.0.hc_head", 1e-6) for x in block(joined, "mtp.0.")]
    logits = torch.stack([w["head.weight"] @ f.rms(x, w["mtp.0.norm.weight"], EPS) for x in after])
    ours, _ = model.predict_further(state[:, :-1], ids[:, 1:], rows(state[:, :-1]))
    assert largest(ours[0], logits) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_weights_follow_normalize_and_score(score: str, normalize: bool) -> None:
    """transformers ignores norm_topk_prob (V2, V4) and scoring_func (V3); the config decides here."""
    from rorqual.nn.router import Router as Brick

    part = MoE(6, 2, 8, 0, Router(score, normalize=normalize, scale=3.0))
    brick = Brick(5, 10, part).double()
    torch.nn.init.normal_(brick.weight)
    x = torch.randn(4, 5, dtype=torch.float64)
    choice = brick(x)
    for n in range(4):
        logits = brick.weight @ x[n]
        s = {
            "softmax": logits.exp() / logits.exp().sum(),
            "sigmoid": 1 / (1 + (-logits).exp()),
            "sqrtsoftplus": (1 + logits.exp()).log().sqrt(),
        }[score]
        best = s.argsort(descending=True)[:2]
        expected = s[best] / (s[best].sum() if normalize else 1) * 3.0
        assert choice.ids[n].tolist() == best.tolist()
        assert largest(choice.weights[n], expected) < TIGHT
