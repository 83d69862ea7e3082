"""How kind a text is, by the words of a public lexicon: VADER (Hutto and Gilbert 2014).

    python ppo_rlhf.py ... --reward-fn benchmarks/smollm2/sentiment.py:kind

From -1 to 1; 0 for a text without a word of the lexicon. Only the response counts.
"""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

ANALYZER = SentimentIntensityAnalyzer()


def kind(completions: list[str]) -> list[float]:
    return [ANALYZER.polarity_scores(text)["compound"] for text in completions]
