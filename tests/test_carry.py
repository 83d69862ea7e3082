"""A change in one script reaches the sections that the others share with it."""

import pytest

import carry
from conftest import ROOT

TEXTS = {path.stem[4:]: path.read_text() for path in ROOT.glob("ppo_*.py")}
LOSS = "value_loss = 0.5 * value_losses.mean()"
STORAGE = "    rewards, dones, final_values = np.zeros((3, T, N), np.float32)\n"


def changed(old, new):
    """ppo_discrete.py before and after a change."""
    assert TEXTS["discrete"].count(old) == 1
    return TEXTS["discrete"], TEXTS["discrete"].replace(old, new)


@pytest.mark.parametrize("name", ["continuous", "atari", "atari_lstm"])
def test_a_changed_line_is_carried_and_nothing_else(name):
    after, left_out = carry.carry_sections(TEXTS[name], *changed(LOSS, LOSS + "  # half"))
    assert after == TEXTS[name].replace(LOSS, LOSS + "  # half")
    assert left_out == []


def test_lines_in_which_a_script_differs_stay():
    old, new = changed("    run = Run(args, device, envs", "    run = Run(args, 1, envs")
    after, left_out = carry.carry_sections(TEXTS["continuous"], old, new)
    assert "vars(envs.obs_rms).items()" in after and "run = Run(args, 1, envs" in after
    assert left_out == []


def test_a_section_where_change_and_difference_meet_is_left_out():
    change = changed(STORAGE, STORAGE + "    more = 1\n")
    after, left_out = carry.carry_sections(TEXTS["atari_lstm"], *change)
    assert after == TEXTS["atari_lstm"]
    assert left_out == ["Training"]


@pytest.mark.slow
def test_a_function_that_was_the_same_is_replaced_in_rlhf():
    line = "    advantages = rewards + gamma * next_values - values\n"
    after, _ = carry.carry_functions(TEXTS["rlhf"], *changed(line, line + "    more = 1\n"))
    assert after == TEXTS["rlhf"].replace(line, line + "    more = 1\n")
    assert (
        carry.carry_functions(TEXTS["rlhf"], *changed(LOSS, LOSS + "  # half"))[0]
        == (TEXTS["rlhf"])
    )


def test_main_writes_the_other_scripts_and_counts_what_is_left(monkeypatch, tmp_path, capsys):
    for name, text in TEXTS.items():
        (tmp_path / f"ppo_{name}.py").write_text(text)
    old, new = changed(STORAGE, STORAGE + "    more = 1\n")
    (tmp_path / "ppo_discrete.py").write_text(new)
    monkeypatch.setattr(carry, "ROOT", tmp_path)
    monkeypatch.setattr(carry.subprocess, "check_output", lambda *_, **__: old)
    assert carry.main("ppo_discrete.py") == 1
    assert "ppo_atari_lstm.py as it was; by hand: Training" in capsys.readouterr().out
    for name in ("continuous", "atari"):
        expected = TEXTS[name].replace(STORAGE, STORAGE + "    more = 1\n")
        assert (tmp_path / f"ppo_{name}.py").read_text() == expected
