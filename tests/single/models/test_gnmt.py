"""GNMT: its layers and sizes, the attention by its formula, padding that does not count, and decoding in pieces."""

import pytest
import torch
from support.counting_parameters import build, count

from hvdlarge.evaluation.bleu import greedy_decoding
from hvdlarge.models.gnmt import GNMT

WORDS, BOTH = 17, pytest.mark.parametrize("attention", ["current", "previous"])


def small(**arguments):
    sizes = {"tokens": WORDS, "hidden": 6, "encoder_layers": 3, "decoder_layers": 3, "dropout": 0.0}
    return GNMT(**{**sizes, "init_range": 0.5, **arguments}).double()


def sentences(*lengths):
    """Words from 2 on, padded with 0."""
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(2, WORDS, (length,))
    return tokens


def close(ours, theirs):
    return torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def lstm(inputs, hidden):
    return 4 * hidden * (inputs + hidden + 1)


@pytest.mark.parametrize(("attention", "shared"), [("current", True), ("previous", False)])
def test_the_size_is_that_of_its_layers(attention, shared):
    """At the paper's width and depth, with 32,000 word pieces."""
    v, h = 32_000, 1024
    encoder = 2 * lstm(h, h) + lstm(2 * h, h) + 6 * lstm(h, h)
    decoder = lstm(h if attention == "current" else 2 * h, h) + 7 * lstm(2 * h, h)
    attended = 2 * h * h + 2 * h + 1  # W, U, b, v, g
    vocabulary = (1 if shared else 2) * v * h + (h + 1) * v
    model = build("gnmt", attention=attention, target_tokens=None if shared else v)
    assert count(model) == encoder + decoder + attended + vocabulary
    assert count(model) == (243_897_601 if shared else 280_859_905)


@BOTH
def test_shapes(attention):
    logits = small(attention=attention, target_tokens=9)(sentences(4, 2), torch.ones(2, 5).long())
    assert logits.shape == (2, 9, 5)


def test_attention_is_the_formula():
    model = small()
    a = model.attention
    torch.nn.init.uniform_(a.key.bias)  # b, which begins at 0
    torch.nn.init.constant_(a.scale, 1.7)
    memory = model.encode(sentences(4, 2))
    queries = torch.randn(2, 3, 6).double()
    contexts = a(queries, memory)
    unit = a.direction / a.direction.square().sum().sqrt()
    for sample, length in enumerate((4, 2)):
        for position in range(3):
            scores = torch.stack(
                [
                    a.scale[0]
                    * unit.dot(
                        (
                            a.query.weight @ queries[sample, position]
                            + a.key.weight @ x
                            + a.key.bias
                        ).tanh()
                    )
                    for x in memory.values[sample, :length]
                ]
            )
            expected = scores.softmax(0) @ memory.values[sample, :length]
            assert close(contexts[sample, position], expected)


def test_the_encoders_first_layer_has_both_directions_and_residuals_begin_at_the_third():
    model, source = small(encoder_layers=4), sentences(5)
    memory, encoder = model.encode(source), model.encoder
    values = model.source_embedding(source)
    both, _ = encoder.first(values)
    assert both.shape == (1, 5, 12)
    second, _ = encoder.others[0](both)
    third = encoder.others[1](second)[0] + second
    fourth = encoder.others[2](third)[0] + third
    assert close(memory.values, fourth)


@BOTH
def test_the_decoder_gets_the_context_of_its_first_layer_in_all_layers(attention):
    model, source, target = small(attention=attention), sentences(5, 3), sentences(4, 4)
    memory, decoder = model.encode(source), model.decoder
    embedded = model.target_embedding(target)
    state, query, firsts, contexts = None, torch.zeros(2, 1, 6).double(), [], []
    for position in range(4):
        inputs = embedded[:, position : position + 1]
        if attention == "previous":
            context = model.attention(query, memory)
            query, state = decoder.first(torch.cat([inputs, context], -1), state)
        else:
            query, state = decoder.first(inputs, state)
            context = model.attention(query, memory)
        firsts.append(query)
        contexts.append(context)
    first, context = torch.cat(firsts, 1), torch.cat(contexts, 1)
    second, _ = decoder.others[0](torch.cat([first, context], -1))
    third = decoder.others[1](torch.cat([second, context], -1))[0] + second
    assert close(model(source, target), model.classifier(third).movedim(-1, 1))


@BOTH
def test_padding_of_the_source_changes_nothing(attention):
    model, target = small(attention=attention), torch.randint(2, WORDS, (2, 4))
    source = sentences(5, 3)
    alone = model(source[1:, :3], target[1:])
    assert close(model(source, target)[1:], alone)
    wider = torch.cat([source, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    assert close(model(wider, target), model(source, target))
    with torch.no_grad():
        model.source_embedding.weight[0] = 7.0
    assert close(model(source, target)[1:], alone)


@BOTH
def test_a_position_sees_no_later_word_of_the_target(attention):
    model, source, target = small(attention=attention), sentences(5, 3), sentences(6, 6)
    logits = model(source, target)
    target[:, 3:] = 1
    assert close(model(source, target)[:, :, :3], logits[:, :, :3])
    assert not close(model(source, target)[:, :, 3:], logits[:, :, 3:])


@BOTH
def test_a_translation_can_be_decoded_word_by_word(attention):
    model, source, target = small(attention=attention), sentences(5, 3), sentences(6, 6)
    memory, state, pieces = model.encode(source), None, []
    for word in target.split(1, dim=1):
        logits, state = model.decode(word, memory, state)
        pieces.append(logits)
    assert close(torch.cat(pieces, dim=2), model(source, target))
    assert [hidden.shape for hidden, _ in state] == [(1, 2, 6)] * 3


def test_languages_with_one_vocabulary_share_the_embedding():
    shared, apart = small(), small(target_tokens=WORDS)
    assert shared.target_embedding is shared.source_embedding
    assert apart.target_embedding is not apart.source_embedding


@BOTH
def test_dropout_follows_torchs_generator_and_evaluation_has_none(attention):
    model, source, target = (
        small(attention=attention, dropout=0.5),
        sentences(5, 3),
        sentences(4, 4),
    )
    torch.manual_seed(1)
    first = model(source, target)
    assert not torch.equal(model(source, target), first)
    torch.manual_seed(1)
    assert torch.equal(model(source, target), first)
    model.eval()
    assert torch.equal(model(source, target), model(source, target))


def test_initial_weights():
    model = GNMT(tokens=50, hidden=20, encoder_layers=2, decoder_layers=2, init_range=0.04)
    fixed = {"attention.scale": 20**-0.5, "attention.key.bias": 0.0}
    for name, weight in model.named_parameters():
        if name in fixed or "bias_hh" in name:
            assert weight.tolist() == pytest.approx([fixed.get(name, 0.0)] * len(weight))
        else:
            assert 0.02 < weight.abs().max() <= 0.04


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([[3, 0, 4]], r"a source must be one token or more, then only padding \(token 0\)"),
        ([[0, 3, 4]], "then only padding"),
        ([[3, 4], [0, 0]], "one token or more"),
        ([[3, 17]], "source tokens hold the token 17; the vocabulary has 17, 0 to 16"),
    ],
)
def test_sources_that_are_not_sentences_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.tensor(source), torch.ones(len(source), 2).long())


def test_target_tokens_that_the_vocabulary_does_not_have_are_refused():
    with pytest.raises(
        ValueError, match="target tokens hold the token 9; the vocabulary has 9, 0 to 8"
    ):
        small(target_tokens=9)(sentences(3), torch.tensor([[1, 9]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_layers": 1}, "encoder_layers must be at least 2, got 1"),
        ({"decoder_layers": 0}, "must be at least 1"),
        ({"attention": "none"}, "attention must be current or previous, got 'none'"),
        ({"padding": 17}, "padding must be a token, 0 to 16, got 17"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


@pytest.mark.parametrize("attention", ["current", "previous"])
def test_translations_are_those_of_decoding_everything_again(attention):
    torch.manual_seed(4)
    model = GNMT(11, 9, hidden=8, encoder_layers=2, decoder_layers=3, attention=attention, init_range=1).eval()  # fmt: skip
    source = torch.randint(1, 11, (20, 7))
    source[::2, 5:] = 0
    lengths = set()
    for end in range(9):
        found = model.generate(source, start=2, end=end, max_length=12)
        assert torch.equal(found, greedy_decoding(model, source, 2, end, 12))
        lengths.add(found.shape[1])
    assert 12 in lengths  # some sentence never ends; others do
    assert model.generate(source, max_length=0).shape == (20, 0)
