"""ROUGE and exact match against rouge-score itself and against numbers worked out by hand."""

from __future__ import annotations

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from fedlora.errors import DataError
from fedlora.evaluation.rouge import METRICS, AnswerScore, AnswerScorer, check_categories, summarise

WORDS = ("the", "cat", "sat", "on", "mat", "and", "it", "ran", "running", "Paris,", "42", "times.\nIt's", "na\u00efve")


def random_text(generator: random.Random) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(0, 12)))


def score_all(triples: list[tuple[str, str, str]]) -> list[AnswerScore]:
    scorer = AnswerScorer()
    return [scorer.score(answer, target, category) for answer, target, category in triples]


def test_means_are_those_of_rouge_score_over_random_texts() -> None:
    generator = random.Random(7)
    triples = [(random_text(generator), random_text(generator), generator.choice("aabbbc")) for _ in range(300)]
    result = summarise(score_all(triples))
    library = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=False)
    for metric in METRICS:
        means = {}
        for category in "abc":
            values = [library.score(t, a)[metric].fmeasure for a, t, c in triples if c == category]
            means[category] = sum(values) / len(values)
            assert result[category][metric] == pytest.approx(means[category], abs=1e-12)
        assert result["overall"][f"avg_{metric}"] == pytest.approx(sum(means.values()) / 3, abs=1e-12)
        micro = sum(library.score(t, a)[metric].fmeasure for a, t, _ in triples) / len(triples)
        assert result["fedlora"]["micro"][metric] == pytest.approx(micro, abs=1e-12)


def test_scores_are_the_f_measures_worked_out_by_hand() -> None:
    # 3 of 4 and 3 of 3 words are shared: P = 3/4, R = 1; bigrams: 2 of 3 and 2 of 2
    (score,) = score_all([("the cat sat down", "the cat sat", "x")])
    assert score.rouge == pytest.approx({"rouge1": 6 / 7, "rouge2": 4 / 5, "rougeL": 6 / 7, "rougeLsum": 6 / 7})
    # another order costs the longest common subsequence, not the words
    (turned,) = score_all([("sat cat", "cat sat", "x")])
    assert (turned.rouge["rouge1"], turned.rouge["rougeL"]) == pytest.approx((1.0, 0.5))


def test_words_are_not_stemmed() -> None:
    (score,) = score_all([("running", "run", "x")])
    assert score.rouge["rouge1"] == 0.0


def test_lines_count_as_sentences_in_rouge_lsum_alone() -> None:
    (score,) = score_all([("b c\na", "a\nb c", "x")])
    assert score.rouge["rougeLsum"] == 1.0
    assert score.rouge["rougeL"] == pytest.approx(2 / 3)


def test_a_category_counts_the_same_in_overall_whatever_its_size() -> None:
    scores = score_all([("yes", "yes", "small")] + [("no", "yes", "large")] * 9)
    result = summarise(scores)
    assert result["overall"]["avg_rouge1"] == 0.5
    assert result["fedlora"]["micro"]["rouge1"] == pytest.approx(0.1)
    exact = result["fedlora"]["exact_match"]
    assert exact == {"categories": {"small": 1.0, "large": 0.0}, "macro": 0.5, "micro": pytest.approx(0.1)}
    assert result["fedlora"]["num_samples"] == {"small": 1, "large": 9}


@pytest.mark.parametrize(
    ("answer", "exact"),
    [
        ("Paris", True),
        (" Paris\n", True),
        ("\u3000Paris\t", True),
        ("paris", False),
        ("Paris.", False),
        ("Par is", False),
        ("", False),
    ],
)
def test_exact_match_ignores_white_space_at_the_ends_and_nothing_else(answer: str, exact: bool) -> None:
    assert score_all([(answer, "Paris", "x")])[0].exact is exact


ARABIC = "\u0639\u0627\u0635\u0645\u0629 \u0641\u0631\u0646\u0633\u0627 \u0628\u0627\u0631\u064a\u0633"
RUSSIAN = "\u041c\u043e\u0441\u043a\u0432\u0430 \u0441\u0442\u043e\u043b\u0438\u0446\u0430 1"
CHINESE, WRONG_CHINESE = "2019\u5e74\u5728\u5317\u4eac", "2019\u4e2a\u82f9\u679c"
THAI = "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e"


@pytest.mark.parametrize("text", [ARABIC, RUSSIAN, CHINESE, THAI])
def test_texts_of_which_rouge_keeps_less_than_half_are_told_apart(text: str) -> None:
    right, guess, question = score_all([(text, text, "x"), ("a", text, "x"), (text, "a", "x")])
    assert (right.hides_target, right.hides_answer) == (True, True)
    assert (guess.hides_target, guess.hides_answer) == (True, False)
    assert (question.hides_target, question.hides_answer) == (False, True)


@pytest.mark.parametrize("text", ["", "  ", "a", "1990", "na\u00efve caf\u00e9", "Paris, 1990!", "x_y"])
def test_texts_that_rouge_reads_or_that_are_empty_hide_nothing(text: str) -> None:
    (score,) = score_all([(text, text, "x")])
    assert not score.hides_target
    assert not score.hides_answer


def test_signs_alone_are_hidden_from_either_tokenizer() -> None:
    for tokenizer in ("ascii", "unicode"):
        assert AnswerScorer(tokenizer).score("\U0001f44d", "\U0001f44d", "x").hides_target


def test_hidden_texts_are_counted_and_no_count_is_written_where_there_are_none() -> None:
    result = summarise(score_all([(ARABIC, ARABIC, "x"), ("a", ARABIC, "x"), ("a", "a", "x")]))
    assert result["fedlora"]["hidden_from_rouge"] == {"references": 2, "answers": 1}
    assert "hidden_from_rouge" not in summarise(score_all([("a", "a", "x")]))["fedlora"]


def test_the_ascii_tokenizer_misjudges_other_scripts_and_the_unicode_one_does_not() -> None:
    ascii_words, words = AnswerScorer(), AnswerScorer("unicode")
    for text in (ARABIC, THAI):
        assert ascii_words.score(text, text, "x").rouge["rouge1"] == 0.0
    for text in (ARABIC, RUSSIAN, CHINESE, THAI):
        score = words.score(text, text, "x")
        assert score.rouge == dict.fromkeys(METRICS, 1.0)
        assert not score.hides_target
    assert ascii_words.score(WRONG_CHINESE, CHINESE, "x").rouge["rouge1"] == 1.0
    # of 2019 and four characters against 2019 and three, the year alone is shared: P = 1/4, R = 1/5
    assert words.score(WRONG_CHINESE, CHINESE, "x").rouge["rouge1"] == pytest.approx(2 / 9)
    # one of three words
    assert words.score(ARABIC.split()[0], ARABIC, "x").rouge["rouge1"] == pytest.approx(0.5)


def test_on_ascii_text_both_tokenizers_agree() -> None:
    generator = random.Random(3)
    ascii_words, words = AnswerScorer(), AnswerScorer("unicode")
    for _ in range(50):
        answer, target = (random_text(generator).replace("na\u00efve", "'naive'").replace("'s", "") for _ in range(2))
        assert words.score(answer, target, "x").rouge == ascii_words.score(answer, target, "x").rouge


@pytest.mark.parametrize("name", ["overall", "fedlora"])
def test_a_category_named_like_a_key_of_the_result_is_refused(name: str) -> None:
    check_categories(["sums"], "test.jsonl")
    with pytest.raises(DataError, match=rf"test\.jsonl: a category is named '{name}'"):
        check_categories(["sums", name], "test.jsonl")
