"""The figures of docs/rlhf.md are those of the runs kept beside it, and reach their bars."""

import numpy as np

import make_rlhf

RUNS = make_rlhf.load()
DEFAULT, FREE = (make_rlhf.select(RUNS, "reviews", kl_coef) for kl_coef in (0.1, 0.0))
SORT = [run for run in RUNS if run[0]["task"] == "sort"]


def evaluated(metrics, name):
    return metrics[f"eval/{name}"][-1]


def test_page_is_up_to_date():
    assert make_rlhf.PAGE.read_text() == make_rlhf.page(RUNS)


def test_five_seeds_of_each():
    seeds = [[config["seed"] for config, _ in runs] for runs in (DEFAULT, FREE, SORT)]
    assert seeds == [[*range(31, 36)], [*range(31, 36)], [*range(51, 56)]]


def test_gold_rises():
    gains = [
        evaluated(metrics, "ppo/gold/score") - evaluated(metrics, "sft/gold/score")
        for _, metrics in DEFAULT
    ]
    assert np.mean(gains) >= 0.85
    assert min(gains) >= 0.6


def test_better_than_the_best_of_four():
    for _, metrics in DEFAULT:
        assert evaluated(metrics, "ppo/gold/score") > evaluated(metrics, "best_of_4/gold/score")


def test_almost_all_responses_end_and_the_first_kl_is_0():
    for _, metrics in DEFAULT:
        assert evaluated(metrics, "ppo/missing_eos") < 0.02
        assert abs(metrics["objective/kl"][0]) < 1e-6


def test_without_the_kl_gold_falls_while_the_proxy_rises():
    for _, metrics in FREE:
        gold = make_rlhf.smooth(metrics["gold/score"])
        proxy = make_rlhf.smooth(metrics["objective/scores"])
        assert gold[-1] <= gold.max() - 0.5
        assert proxy[-1] > proxy[gold.argmax()] + 0.5


def test_reward_models():
    for _, metrics in DEFAULT:
        assert 0.62 <= metrics["rm/accuracy"][-1] < metrics["rm/ceiling"][-1]


def test_sort_is_learned():
    for _, metrics in SORT:
        assert evaluated(metrics, "ppo/gold/exact") >= 0.9
