"""The choice of experts by kernels, against `rorqual.nn.router` and a written-out search."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.family import parts
from rorqual.kernels import route as r
from rorqual.nn.router import Router
from tests.interpreter import repair

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, over NaN and overflow

RULES = {
    "V1": (r.Rule(3, "softmax"), False),
    "V2": (r.Rule(4, "softmax", 4, 2, "max", False, 16.0), False),
    "V3": (r.Rule(4, "sigmoid", 4, 2, "top2", True, 2.5), True),
    "V4": (r.Rule(3, "sqrtsoftplus", normalize=True, scale=1.5), True),
    "odd": (r.Rule(1, "softmax", 5, 3, "top2", True), True),
}
EXPERTS = 20
BY_ROWS = r.Plan(4, 32, 32)
BY_TILES = r.Plan(16, 32, 16, 16)


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


def inputs(
    device: torch.device, tokens: int, biased: bool, hidden: int = 72
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(tokens, hidden + 8, device=device)[:, :hidden]
    weight = torch.randn(EXPERTS, hidden, device=device) * 0.2
    return x, weight, torch.randn(EXPERTS, device=device) * 0.1 if biased else None


def close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert actual[0].dtype == torch.int32 and actual[1].dtype == torch.float32
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", RULES)
def test_reference_is_the_brick(name: str) -> None:
    rule, biased = RULES[name]
    x, weight, bias = inputs(torch.device("cpu"), 50, biased)
    part = parts.Router(
        rule.score, biased, rule.groups, rule.keep, rule.group_score, False, rule.normalize, rule.scale
    )
    brick = Router(72, 7, parts.MoE(EXPERTS, rule.top_k, 8, 0, part))
    brick.weight.data = weight
    brick.bias = bias
    logits = torch.empty(50, EXPERTS)
    ids, weights = r.reference(x, weight, bias, rule, logits_NE=logits)
    choice = brick(x)
    assert torch.equal(ids, choice.ids.int())
    assert torch.equal(weights, choice.weights) and torch.equal(logits, choice.logits)


def test_reference_reads_the_table_as_the_brick_does() -> None:
    rule = r.Rule(3, "sqrtsoftplus", normalize=True, scale=1.5)
    brick = Router(
        72,
        7,
        parts.MoE(EXPERTS, 3, 8, 0, parts.Router("sqrtsoftplus", hashed=True, normalize=True, scale=1.5)),
    )
    x, brick.weight.data, _ = inputs(torch.device("cpu"), 6, False)
    brick.table = torch.randint(0, EXPERTS, (7, 3))
    token = torch.randint(0, 7, (6,))
    ids, weights = r.reference(x, brick.weight, None, rule, brick.table, token)
    choice = brick(x, token)
    assert torch.equal(ids, choice.ids.int()) and torch.equal(weights, choice.weights)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("tokens", "shape"), [(1, None), (2, BY_ROWS), (5, BY_ROWS), (17, BY_TILES), (6, None)]
)
def test_choice(
    device: torch.device, name: str, tokens: int, shape: r.Plan | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(r, "BY_TILES", r.BY_ROWS)  # beyond it PyTorch multiplies
    rule, biased = RULES[name]
    x, weight, bias = inputs(device, tokens, biased)
    logits = torch.full((tokens, EXPERTS), math.nan, device=device)
    actual = r.fast(x, weight, bias, rule, logits_NE=logits, shape=shape)
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
    close(actual, r.choose_reference(logits, bias, rule))
    if name == "V3":
        early = r.fast(x, weight, bias, rule, early=True, shape=shape)
        assert torch.equal(early[0], actual[0]) and torch.equal(early[1], actual[1])


@pytest.mark.parametrize("shape", [BY_ROWS, BY_TILES])
def test_a_token_does_not_see_its_neighbours(device: torch.device, shape: r.Plan) -> None:
    rule, _ = RULES["V3"]
    x, weight, bias = inputs(device, 6, True)
    together = r.fast(x, weight, bias, rule, shape=shape)
    for n in range(6):
        alone = r.fast(x[n : n + 1], weight, bias, rule, shape=shape)
        assert torch.equal(alone[0][0], together[0][n]) and torch.equal(alone[1][0], together[1][n])


def by_logits(
    device: torch.device, logits_NE: Tensor, bias: Tensor | None, rule: r.Rule, **more: Any
) -> tuple[Tensor, Tensor]:
    """`fast` on given logits: x picks rows of an orthogonal matrix."""
    experts = logits_NE.shape[1]
    return r.fast(logits_NE.to(device), torch.eye(experts, device=device), bias, rule, **more)


def test_equal_scores_go_to_the_lower_index(device: torch.device) -> None:
    flat = torch.zeros(1, 12)
    ids, weights = by_logits(device, flat, None, r.Rule(5, "sigmoid"))
    assert ids.tolist() == [[0, 1, 2, 3, 4]] and weights.tolist() == [[0.5] * 5]
    flat[0, 7] = 1.0
    assert by_logits(device, flat, None, r.Rule(3, "softmax"))[0].tolist() == [[7, 0, 1]]
    grouped = r.Rule(3, "sigmoid", 4, 2, "top2")
    assert by_logits(device, flat, None, grouped)[0].tolist() == [[7, 0, 1]]
    assert by_logits(device, flat * 0, None, grouped)[0].tolist() == [[0, 1, 2]]
    for rule in (r.Rule(3, "softmax"), grouped):
        assert r.choose_reference(flat, None, rule)[0].tolist() == [[7, 0, 1]]


def test_bias_orders_and_does_not_weigh(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    bias = torch.tensor([5.0, -5.0, 0.0, 1.0], device=device)
    ids, weights = by_logits(device, logits, bias, r.Rule(3, "sigmoid"))
    assert ids.tolist() == [[0, 3, 2]]
    torch.testing.assert_close(weights.cpu(), logits.sigmoid()[:, [0, 3, 2]])
    ids, _ = by_logits(device, logits, bias - 9.0, r.Rule(4, "sigmoid"))  # all below zero
    assert ids.tolist() == [[0, 3, 2, 1]]


def test_groups_are_chosen_by_hand(device: torch.device) -> None:
    score = torch.tensor([[0.9, 0.1, 0.5, 0.55, 0.8, 0.15, 0.2, 0.3]])
    logits = (score / (1 - score)).log()
    best, two = r.Rule(3, "sigmoid", 4, 2, "max"), r.Rule(3, "sigmoid", 4, 2, "top2")
    assert by_logits(device, logits, None, best)[0].tolist() == [[0, 4, 5]]
    assert by_logits(device, logits, None, two)[0].tolist() == [[0, 3, 2]]


def test_groups_that_fill_no_tile(device: torch.device) -> None:
    """Groups of five stand in rows of eight: what pads a row is nobody's score."""
    logits = torch.randn(2, 20) - 6.0
    for rule in (r.Rule(6, "sigmoid", 4, 2, "top2"), r.Rule(6, "softmax", 4, 3), r.Rule(6, "sqrtsoftplus")):
        close(
            by_logits(device, logits, None, rule),
            tuple(t.to(device) for t in r.choose_reference(logits, None, rule)),
        )


def test_scores_keep_their_precision(device: torch.device) -> None:
    """softplus far below zero is exp: a sum with one would round it away."""
    logits = torch.tensor([[-60.0, -30.0, -12.0, -6.0, -3.4, 0.0, 5.0, 19.0, 21.0, 300.0]])
    for kind in r.SCORES:
        ids, weights = by_logits(device, logits, None, r.Rule(10, kind))
        wide = logits.double().to(device)
        exact = {
            "softmax": wide.softmax(-1),
            "sigmoid": wide.sigmoid(),
            "sqrtsoftplus": torch.log1p(wide.exp()).sqrt(),
        }
        if kind == "sqrtsoftplus":
            exact[kind][0, -1] = math.sqrt(300.0)
        torch.testing.assert_close(
            weights.double(), exact[kind].gather(-1, ids.long()), rtol=5e-6, atol=1e-37
        )


@pytest.mark.parametrize("tokens", [1, 9])
def test_hashed(device: torch.device, tokens: int) -> None:
    rule = r.Rule(3, "sqrtsoftplus", normalize=True, scale=1.5)
    x, weight, _ = inputs(device, tokens, False)
    table = torch.randint(0, EXPERTS, (50, 3), device=device)
    token = torch.randint(0, 50, (tokens, 2), device=device)[
        :, 0
    ]  # as it stands in a batch of which a part is taken
    actual = r.fast(x, weight, None, rule, table, token)
    close(actual, r.reference(x, weight, None, rule, table, token))


def test_ids_stay_in_range_whatever_comes(device: torch.device) -> None:
    for value in (math.nan, -math.nan, math.inf, -math.inf):
        for rule, _ in RULES.values():
            ids, _ = by_logits(device, torch.full((1, EXPERTS), value), None, rule)
            assert ids.min() >= 0 and ids.max() < EXPERTS and len(set(ids[0].tolist())) == rule.top_k


def test_bf16_and_no_tokens(device: torch.device) -> None:
    rule, _ = RULES["V3"]
    x, weight, bias = inputs(device, 3, True)
    x, weight = x.bfloat16(), weight.bfloat16()
    for shape in (BY_ROWS, BY_TILES, None):
        logits = torch.empty(3, EXPERTS, device=device)
        actual = r.fast(x, weight, bias, rule, logits_NE=logits, shape=shape)
        torch.testing.assert_close(logits.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
        close(actual, r.choose_reference(logits, bias, rule))
    ids, weights = r.fast(x[:0], weight, bias, rule)
    assert ids.shape == weights.shape == (0, 4)


def test_the_public_operation(device: torch.device) -> None:
    x, weight, bias = inputs(device, 2, True)
    choice = r.route(
        x,
        weight,
        bias,
        top_k=2,
        score="sigmoid",
        groups=4,
        keep=2,
        group_score="top2",
        normalize=True,
        scale=2.5,
    )
    close(choice, r.reference(x, weight, bias, r.Rule(2, "sigmoid", 4, 2, "top2", True, 2.5)))
    with pytest.raises(ValueError, match="score"):
        r.route(x, weight, bias, top_k=2, score="relu")
