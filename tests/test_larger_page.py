"""docs/larger_models.md: its figures are those of docs/results/, and keep what the page says."""

import re

import pytest

import make_larger
import ppo_rlhf

TEXT = make_larger.PAGE.read_text()


def test_page_is_up_to_date():
    assert make_larger.page() == TEXT


def test_calculated_memory_is_what_was_measured():
    rows, _ = make_larger.load("memory")
    assert {row["model"] for row in rows} > {"SmolLM2-135M", "Qwen2.5-7B"}
    measured = [row for row in rows if row["measured"]]
    assert {row["case"] for row in measured} == make_larger.CASES.keys()
    for row in measured:
        assert float(row["measured"]) == pytest.approx(float(row["calculated"]), rel=0.15)


def test_bytes_of_all_weights_are_those_of_the_formula():
    """There is no reward model in the table: 36 bytes for each of the policy's weights."""
    rows, _ = make_larger.load("memory")
    for row in rows:
        if row["case"] == "full":
            weights, learning = (float(row[x]) for x in ("weights", "gradients"))
            assert weights == pytest.approx(1.5 * learning, rel=0.35)  # a trunk has no lm_head
            assert float(row["moments of AdamW"]) == pytest.approx(2 * learning, abs=2e-3)


def test_sampling_is_no_slower_than_generate():
    _, origin = make_larger.load("sampling")
    assert min(origin["generate_by_ours"].values()) >= 1


def test_flags_exist():
    text = re.sub("torchrun --nproc_per_node=8|<!--|-->", "", TEXT)
    fields = {name.replace("_", "-") for name in vars(ppo_rlhf.Args())}
    programs = {"out", "rounds", "updates", "epochs", "trl"}  # flags of benchmarks
    assert {*re.findall(r"--([a-z][a-z-]+)", text)} - programs <= fields


def test_rates_of_adapters():
    assert "ten times those of whole models" in " ".join(TEXT.split())
    for name, rate in ppo_rlhf.LORA.items():
        assert rate == pytest.approx(10 * ppo_rlhf.REAL[name])
