"""1 for the right sum, 0 for any other text.

python ppo_rlhf.py ... --reward-fn benchmarks/smollm2/sums.py:right
"""


def right(completions: list[str], answer: list[str]) -> list[float]:
    return [float(text.strip() == x) for text, x in zip(completions, answer, strict=True)]
