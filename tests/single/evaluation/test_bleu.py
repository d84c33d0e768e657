"""BLEU: sacrebleu's figure of the whole corpus, from sums over parts of it."""

import random

import pytest
import torch

from hvdlarge import run_job
from hvdlarge.config import registry
from hvdlarge.data.translation import END, START
from hvdlarge.evaluation.parts import MetricError
from hvdlarge.exits import JobError

sacrebleu = pytest.importorskip("sacrebleu")

from hvdlarge.evaluation.bleu import Bleu, TeacherForcedBleu, greedy_decoding  # noqa: E402


def corpus(sentences, errors, seed=0):
    """Translations and references of 1 to 20 tokens (ids from 4), the former with some errors."""
    draws = random.Random(seed)
    references = [
        [draws.randrange(4, 30) for _ in range(draws.randint(1, 20))] for _ in range(sentences)
    ]
    translations = []
    for reference in references:
        changed = [
            draws.randrange(4, 30) if draws.random() < errors else token for token in reference
        ]
        translations.append(changed[: draws.randint(0, 20)] + changed[: draws.randint(0, 2)])
    return translations, references


def padded(sentences, filling):
    length = max(map(len, sentences)) + 2
    rows = [[*tokens, END] + [filling] * (length - len(tokens) - 1) for tokens in sentences]
    return torch.tensor(rows)


def of_sacrebleu(translations, references):
    texts = [[" ".join(map(str, tokens)) for tokens in each] for each in (translations, references)]
    return sacrebleu.corpus_bleu(texts[0], [texts[1]], tokenize="none", force=True).score


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("errors", [0.05, 0.3, 0.9])
def test_bleu_of_any_number_of_parts_is_that_of_the_corpus(parts, errors):
    translations, references = corpus(40, errors)
    metric = Bleu()
    sums = torch.zeros(metric.num_totals, dtype=torch.float64)
    for part in range(parts):
        # What follows the end of a sentence does not count
        sums += metric.totals(
            padded(translations[part::parts], filling=5), padded(references[part::parts], -100)
        )
    expected = of_sacrebleu(translations, references)
    assert 0 < expected < 100
    assert metric.result(sums.tolist()) == expected


def test_a_perfect_translation_has_100_and_none_at_all_0():
    _, references = corpus(9, 0)
    targets = padded(references, -100)
    metric = Bleu()
    perfect = metric.totals(padded(references, 7), targets)
    assert metric.result(perfect.tolist()) == pytest.approx(100)
    empty = metric.totals(torch.full((9, 4), END), targets)
    assert metric.result(empty.tolist()) == of_sacrebleu([[]] * 9, references) == 0
    assert metric.result([0.0] * 10) is None
    assert metric.higher_is_better


def test_teacher_forced_bleu_is_that_of_the_most_probable_tokens():
    translations, references = corpus(12, 0.2)
    ids = padded(translations, filling=6)
    targets = padded(references, -100)
    length = max(ids.shape[1], targets.shape[1])
    ids, targets = (
        torch.nn.functional.pad(each, (0, length - each.shape[1]), value=filling)
        for each, filling in ((ids, 6), (targets, -100))
    )
    logits = torch.nn.functional.one_hot(ids, 30).movedim(-1, 1).double()
    metric = TeacherForcedBleu()
    totals = metric.totals(logits, targets)
    assert metric.result(totals.tolist()) == of_sacrebleu(translations, references)
    # A short sentence whose end the model misses is no longer for the padding beside a long one
    first = [i for i, row in enumerate(targets.tolist()) if row.count(-100) > 2][:1]
    missed = logits.clone()
    missed[first, :, :] = torch.nn.functional.one_hot(torch.tensor(7), 30)[None, :, None].double()
    alone = (targets[first] != -100).sum()
    together, cut = (
        metric.totals(missed, targets),
        metric.totals(missed[first, :, :alone], targets[first, :alone]),
    )
    others = [i for i in range(len(targets)) if i not in first]
    assert torch.equal(together, cut + metric.totals(logits[others], targets[others]))
    for outputs in (logits[:, :, :-1], logits[0], {"logits": logits}):
        assert metric.result(metric.totals(outputs, targets).tolist()) is None


class CopyShifted(torch.nn.Module):
    """Translates token t by t + 1, from the source and the number of tokens so far."""

    def __init__(self, slips=()):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.slips, self.calls = slips, 0

    def forward(self, source, target_in):
        self.calls += 1
        positions = torch.arange(target_in.shape[1])
        tokens = torch.nn.functional.pad(source, (0, target_in.shape[1]))[:, positions]
        expected = torch.where(tokens > END, tokens + 1, END)
        for position in self.slips:  # a wrong token there, and after it for good
            wrong = (positions >= position) & (target_in[:, -1:] != START)
            expected = torch.where(wrong & (expected > END), 4, expected)
        return torch.nn.functional.one_hot(expected, 40).movedim(-1, 1) * self.weight


def test_greedy_decoding_is_from_the_source_alone_until_every_sentence_has_ended():
    source = torch.tensor([[5, 6, 7, END], [9, END, 0, 0]])
    model = CopyShifted()
    ids = greedy_decoding(model, source, START, END, max_length=20)
    assert ids.tolist() == [[6, 7, 8, END], [10, END, END, END]]
    assert model.calls == 4
    assert greedy_decoding(model, source, START, END, max_length=2).tolist() == [[6, 7], [10, END]]


class WithGenerate(CopyShifted):
    def generate(self, source, start, end, max_length):
        assert (start, end, max_length) == (START, END, 9)
        return source + 1


def test_a_model_that_generates_is_asked_to():
    source = torch.tensor([[5, 6, 7, END]])
    assert Bleu(max_length=9).predict(WithGenerate(), (source, None)).tolist() == [[6, 7, 8, 4]]


@pytest.mark.parametrize(
    ("model", "inputs", "problem"),
    [
        (torch.nn.Identity(), {"source": 1}, r"bleu needs the inputs .* gets a dict"),
        (torch.nn.Bilinear(1, 1, 3), (torch.ones(2, 1), 0), r"bleu needs a model whose .*Bilinear"),
    ],
)
def test_a_model_that_cannot_translate_is_refused(model, inputs, problem):
    with pytest.raises(MetricError, match=problem):
        Bleu().predict(model, inputs)


def test_without_sacrebleu_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    with pytest.raises(JobError, match=r"BLEU needs sacrebleu.*pip install 'hvdlarge\[bleu\]'"):
        registry.instantiate("evaluate.metrics", "bleu", {}, registry.METRICS)


TRANSLATOR = """
import torch

class Translator(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.source, self.target = torch.nn.Embedding(size, 8), torch.nn.Embedding(size, 8)
        self.encoder = torch.nn.LSTM(8, 8, batch_first=True)
        self.decoder = torch.nn.LSTM(8, 8, batch_first=True)
        self.head = torch.nn.Linear(8, size)

    def forward(self, source, target_in):
        encoded, _ = self.encoder(self.source(source))
        last = (source != 0).sum(dim=1) - 1
        state = encoded[torch.arange(len(source)), last].unsqueeze(0)
        return self.head(self.decoder(self.target(target_in), (state, 0 * state))[0]).movedim(-1, 1)
"""
JOB = {
    "name": "translation",
    "epochs": 12,
    "precision": "fp64",
    "model": {"name": "own_translator:Translator", "args": {"size": 12}},
    "loss": {
        "name": "cross_entropy",
        "args": {"ignore_index": -100, "label_smoothing": 0.1},
    },
    "batch": {"base": 4, "micro": 2},
    "lr": {"base": 0.03},
    "optimizer": {"name": "adam"},
    "checkpoint": {"every_epochs": 12},
    "evaluate": {
        "every_epochs": 12,
        "metrics": {
            "bleu": {"name": "bleu", "args": {"max_length": 8}},
            "bleu_teacher_forced": {"name": "bleu_teacher_forced"},
            "perplexity": {"name": "perplexity"},
        },
    },
}


def test_a_job_reports_bleu_whatever_the_micro_batch(tmp_path, monkeypatch):
    (tmp_path / "own_translator.py").write_text(TRANSLATOR)
    (tmp_path / "en").write_text("a b c d\nb c d e\nc a b\nd e a b c\n" * 3)
    (tmp_path / "de").write_text("A B C D\nB C D E\nC A B\nD E A B C\n" * 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    files = ["en", "de"]
    data = {
        "name": "parallel_text",
        "args": {"folder": ".", "train": files, "test": files},
        "collate": "hvdlarge.data.translation:pad",
    }
    results = []
    for micro_batch in (5, 12):
        evaluate = JOB["evaluate"] | {"micro_batch": micro_batch}
        results.append(
            run_job(JOB | {"data": data, "name": f"m{micro_batch}", "evaluate": evaluate})
        )
    assert results[0]["bleu_teacher_forced"] > 20
    assert results[0]["bleu"] > 5
    for name in ("bleu", "bleu_teacher_forced", "perplexity"):
        assert [each[name] for each in results] == pytest.approx([results[0][name]] * 2, rel=1e-12)


def test_a_job_whose_model_cannot_translate_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = {
        "name": "classes",
        "epochs": 1,
        "data": {"name": "digits"},
        "model": {"name": "mlp"},
        "batch": {"base": 128, "micro": 64},
        "lr": {"base": 1.0},
        "evaluate": {"metrics": ["bleu"]},
    }
    with pytest.raises(JobError, match=r"metrics: bleu needs the inputs .* MLP gets a Tensor"):
        run_job(job)
