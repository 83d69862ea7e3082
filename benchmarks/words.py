"""A reward that says nothing of what a text says: its number of words."""


def count(completions: list[str]) -> list[float]:
    return [float(len(text.split())) for text in completions]
