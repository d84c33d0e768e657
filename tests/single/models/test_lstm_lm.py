"""The LSTM language model: its sizes, and that it is the recurrence of the paper."""

import pytest
import torch
from support.counting_parameters import build, count

from hvdlarge.evaluation.errors import Perplexity
from hvdlarge.models.losses import CrossEntropyLoss
from hvdlarge.models.lstm_lm import LSTMLanguageModel

WORDS = 13


def small(**arguments):
    return LSTMLanguageModel(tokens=WORDS, hidden=6, **arguments)


@pytest.mark.parametrize(
    ("hidden", "millions"),
    [(200, 4.65), (650, 19.8), (1500, 66.0)],
    ids=["small", "medium", "large"],
)
def test_the_papers_sizes(hidden, millions):
    """An LSTM layer maps (input, state, 1) to four gates: one bias."""
    words = 10_000
    expected = words * hidden + 2 * 4 * hidden * (2 * hidden + 1) + words * (hidden + 1)
    assert count(build("lstm_lm", hidden=hidden)) == expected
    assert expected == pytest.approx(millions * 1e6, rel=2e-3)


def test_it_is_the_recurrence_of_the_paper():
    model, tokens = small(layers=2).double(), torch.randint(WORDS, (3, 5))
    states = [(torch.zeros(3, 6).double(), torch.zeros(3, 6).double()) for _ in range(2)]
    for position, token in enumerate(tokens.T):
        value = model.embedding.weight[token]
        for number, layer in enumerate(model.layers):
            hidden, cell = states[number]
            gates = value @ layer.weight_ih_l0.T + hidden @ layer.weight_hh_l0.T + layer.bias_ih_l0
            i, f, g, o = gates.chunk(4, dim=1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            value = o.sigmoid() * cell.tanh()
            states[number] = value, cell
        logits = value @ model.classifier.weight.T + model.classifier.bias
        assert torch.allclose(model(tokens)[:, :, position], logits, rtol=1e-12, atol=1e-12)


def test_a_state_carries_a_text_over_a_cut():
    model, tokens = small().double(), torch.randint(WORDS, (3, 7))
    first, state = model.advance(tokens[:, :4])
    second, end = model.advance(tokens[:, 4:], state)
    whole, whole_end = model.advance(tokens)
    assert torch.allclose(torch.cat([first, second], dim=2), whole, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(end, whole_end, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == (1, 3, 6)
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert torch.equal(model(tokens), whole)


def test_loss_and_perplexity_take_its_output_as_it_is():
    model, tokens = small(), torch.randint(WORDS, (3, 5))
    logits = model(tokens)
    assert logits.shape == (3, WORDS, 5)
    loss, metric = CrossEntropyLoss()(logits, tokens), Perplexity()
    assert metric.result(metric.totals(logits, tokens).tolist()) == pytest.approx(loss.exp().item())


def test_dropout_is_on_the_connections_that_are_not_recurrent():
    """On the embedding, between layers and before the linear layer: as often as layers, and once more."""
    model, calls = small(layers=3, dropout=0.5), []
    model.dropout.register_forward_hook(lambda *_: calls.append(1))
    tokens = torch.randint(WORDS, (2, 4))
    torch.manual_seed(1)
    first = model(tokens)
    assert len(calls) == 4
    assert not torch.equal(model(tokens), first)
    torch.manual_seed(1)
    assert torch.equal(model(tokens), first)
    assert all(layer.num_layers == 1 and layer.dropout == 0 for layer in model.layers)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("bound", [0.1, 0.05, 0.04])
def test_initial_weights_are_uniform_and_the_second_bias_is_zero_and_not_trained(bound):
    model = LSTMLanguageModel(tokens=500, hidden=20, init_range=bound)
    for name, weight in model.named_parameters():
        if "bias_hh" in name:
            assert not weight.any()
            assert not weight.requires_grad
        else:
            assert 0.9 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[1, 13]]), "tokens hold the token 13; the vocabulary has 13, 0 to 12"),
        (torch.tensor([[-1, 3]]), "tokens hold the token -1"),
        (torch.tensor([1, 2]), r"integers of the shape \(n, length\), not torch.int64 .*\(2,\)"),
        (torch.zeros(2, 3), "must be integers .*not torch.float32"),
    ],
)
def test_tokens_that_the_vocabulary_does_not_have_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        small()(tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0}, "tokens, hidden and layers must be at least 1, got 13, 6, 0"),
        ({"init_range": 0}, "init_range must be above 0, got 0"),
        ({"init_range": float("nan")}, "init_range must be above 0, got nan"),
        ({"dropout": 1.5}, "dropout probability"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
