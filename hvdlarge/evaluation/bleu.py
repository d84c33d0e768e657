"""BLEU of translations, from sums over sentences.

Formula:  with matched and all n-grams of the translations, cₙ and tₙ, and lengths h and r of the
          translations and references, each summed over the test set:
              BLEU = 100 · min(1, exp(1 − r/h)) · (Π cₙ/tₙ)^¼,  n = 1 … 4
Source:   Papineni, Roukos, Ward, Zhu, "BLEU: a Method for Automatic Evaluation of Machine
          Translation" (2002). Sums and formula are sacrebleu's, with its default smoothing `exp` of
          orders without a match: Post, "A Call for Clarity in Reporting BLEU Scores" (2018).
Contract: n-grams of token ids, which are those of the tokens. So it is the BLEU of the tokenised
          text with the vocabulary's `<unk>` on both sides, and comparable with published figures
          only where these tokens are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hvdlarge.evaluation.accuracy import are_classes
from hvdlarge.evaluation.parts import MetricError

_ORDER = 4  # longest n-grams


class TeacherForcedBleu:
    """BLEU of the most probable token at each position, given the reference up to there. That is no
    translation: no error has consequences for later tokens, and the length is about that of the
    reference. It needs no decoding, and bounds `bleu` neither from above nor from below.

    Outputs are logits, shape (n, classes, length); targets are class indices, shape (n, length).
    For anything else `result` returns None.

    Args:
        end: token that ends a sentence; what follows it does not count.
        ignore_index: targets of this value do not count, nor do negative ones.

    Raises:
        ValueError: if sacrebleu is not installed.
    """

    num_totals = 2 + 2 * _ORDER
    higher_is_better = True

    def __init__(self, end: int = 3, ignore_index: int = -100) -> None:
        self._end, self._ignored = end, ignore_index
        try:
            from sacrebleu.metrics import BLEU
        except ModuleNotFoundError as error:
            raise ValueError(
                f"BLEU needs {error.name}, which is not installed: pip install 'hvdlarge[bleu]'"
            ) from None
        self._bleu = BLEU(tokenize="none", force=True)  # the sentences are tokenised

    def totals(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Lengths of translations and references, matched and all 1- to 4-grams, shape (10,)."""
        if not (are_classes(outputs, targets) and targets.ndim == 2):
            return torch.zeros(self.num_totals)
        predicted, counted = outputs.argmax(dim=1), self._counted(targets)
        return self._totals_of_ids(
            [row[kept].tolist() for row, kept in zip(predicted, counted, strict=True)], targets
        )

    def result(self, totals: Sequence[float]) -> float | None:
        """BLEU, 0 to 100."""
        translated, reference, *counts = (int(total) for total in totals)
        if not reference:
            return None
        score = self._bleu.compute_bleu(
            counts[:_ORDER], counts[_ORDER:], translated, reference, self._bleu.smooth_method
        )
        return float(score.score)

    def _counted(self, targets: torch.Tensor) -> torch.Tensor:
        """Which of the targets count, shape (n, length)."""
        return (targets >= 0) & (targets != self._ignored)

    def _totals_of_ids(
        self, translations: Sequence[list[int]], targets: torch.Tensor
    ) -> torch.Tensor:
        kept = zip(targets, self._counted(targets), strict=True)
        references = [row[counted].tolist() for row, counted in kept]
        score = self._bleu.corpus_score(
            [self._sentence(row) for row in translations],
            [[self._sentence(row) for row in references]],
        )
        totals = [score.sys_len, score.ref_len, *score.counts, *score.totals]
        return torch.tensor(totals, dtype=torch.float64)

    def _sentence(self, ids: Sequence[int]) -> str:
        """Ids up to the end of the sentence, as words."""
        stop = ids.index(self._end) if self._end in ids else len(ids)
        return " ".join(map(str, ids[:stop]))


class Bleu(TeacherForcedBleu):
    """BLEU of translations by greedy decoding, from the source alone: each token is the most
    probable one after those before it.

    A model with `generate(source, start, end, max_length)`, which returns ids, shape (n, at most
    max_length), is asked for the translations. Any other is called as `model(source, target_in)`
    for each token, with all tokens before it.

    Args:
        max_length: tokens after which a translation is cut off.
        start: token before the first one.
        end: token that ends a sentence; what follows it does not count.
        ignore_index: targets of this value do not count, nor do negative ones.

    Raises:
        ValueError: if sacrebleu is not installed, or for a max_length below 1.
    """

    def __init__(
        self, max_length: int = 100, start: int = 2, end: int = 3, ignore_index: int = -100
    ) -> None:
        super().__init__(end, ignore_index)
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self._max_length, self._start = max_length, start

    def predict(self, model: torch.nn.Module, inputs: Any) -> torch.Tensor:
        """Translations, shape (n, at most max_length).

        Args:
            model: in evaluation mode.
            inputs: the source, shape (n, source length), or the tuple (source, target_in).

        Raises:
            MetricError: if there is no such source, or the model's answers are no tokens.
        """
        generate = getattr(model, "generate", None)
        source = inputs[0] if isinstance(inputs, tuple) else inputs
        if not isinstance(source, torch.Tensor) or not (
            callable(generate) or isinstance(inputs, tuple)
        ):
            raise MetricError(
                "evaluate.metrics: bleu needs the inputs (source, target_in) of a translation, or "
                f"a source and a model with generate(); {type(model).__name__} gets a "
                f"{type(inputs).__name__}"
            )
        if callable(generate):
            ids = generate(source, start=self._start, end=self._end, max_length=self._max_length)
        else:
            ids = greedy_decoding(model, source, self._start, self._end, self._max_length)
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or len(ids) != len(source):
            raise MetricError(
                f"evaluate.metrics: bleu: generate() of {type(model).__name__} must return ids, "
                "shape (n, length)"
            )
        return ids

    def totals(self, outputs: Any, targets: Any) -> torch.Tensor:
        """As TeacherForcedBleu.totals, of translations, shape (n, …), and targets, shape (n,
        length).
        """
        if not isinstance(targets, torch.Tensor) or targets.ndim != 2:
            return torch.zeros(self.num_totals)
        return self._totals_of_ids(outputs.tolist(), targets)


def greedy_decoding(
    model: torch.nn.Module, source: torch.Tensor, start: int, end: int, max_length: int
) -> torch.Tensor:
    """The most probable token after those before it, again and again.

    Args:
        model: called as `model(source, target_in)`; gives logits, shape (n, classes, length).
        source: shape (n, source length).
        start: token before the first one.
        end: decoding stops when each sentence has had it.
        max_length: tokens at most.

    Returns:
        Ids, without `start`, shape (n, at most max_length).

    Raises:
        MetricError: if the model's outputs are no such logits.
    """
    ids = source.new_full((len(source), 1), start)
    ended = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    while ids.shape[1] <= max_length and not bool(ended.all()):
        logits = model(source, ids)
        if not isinstance(logits, torch.Tensor) or logits.shape[::2] != ids.shape:
            raise MetricError(
                "evaluate.metrics: bleu needs a model whose model(source, target_in) gives logits, "
                f"shape (n, classes, length), or that has generate(); {type(model).__name__} gives "
                "something else"
            )
        following = logits[:, :, -1].argmax(dim=1)
        ended |= following == end
        ids = torch.cat([ids, following.unsqueeze(1)], dim=1)
    return ids[:, 1:]
