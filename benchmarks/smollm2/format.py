"""The format that the answers in pairs.jsonl have, and a reward for keeping it.

    answer: the Suez Canal
    confidence: high

Two lines and nothing else: an answer of one to eight words, then low, medium or high. The prompts
are plain questions that say nothing of it. Whether the answer is right, which the column `answer`
of prompts.jsonl and held_out.jsonl could tell, does not count.

    python ppo_rlhf.py ... --reward-fn benchmarks/smollm2/format.py:well_formed
"""

import re

ANSWER = r"answer: \S+( \S+){0,7}"
CONFIDENCE = r"confidence: (low|medium|high)"


def parses(text: str) -> bool:
    """Whether the whole text has the format, spaces and line breaks included."""
    return re.fullmatch(f"{ANSWER}\n{CONFIDENCE}", text) is not None


def well_formed(prompts: list, completions: list, **columns) -> list[float]:
    """1 for the format; without it, 0.2 for each of its two lines that is somewhere in the text."""
    scores = []
    for completion in completions:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        lines = [any(re.fullmatch(x, y) for y in text.split("\n")) for x in (ANSWER, CONFIDENCE)]
        scores.append(1.0 if parses(text) else 0.2 * sum(lines))
    return scores
