"""What saves memory in ppo_rlhf.py: adapters, bfloat16, checkpointing, chunks; and --plan."""

import contextlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import ppo_rlhf as rlhf
import test_rlhf_models as models
import tiny
from conftest import command_line
from test_rlhf_models import (
    call,
    causal,
    classifier,
    flags,
    logged,
    ran,
    refused,
    rewarded,
    same,
    start,
    started,
    stop_at,
    their_logprobs,
    tokenizer_of,
)
from test_rlhf_models import rows as rows_of

pytestmark = pytest.mark.xdist_group("rlhf_lora")

files, no_hub = models.files, models.no_hub
KINDS = ["gpt2", "llama", "gemma"]  # Conv1D and tied, bfloat16 in the file, tied; and fused
KINDS += [pytest.param("gpt_neox", marks=pytest.mark.slow)]
RANK = 2
LORA = [f"--lora-rank={RANK}"]
TREES = ("policy", "reference", "reward_model", "value_model")
SORT = "--no-cuda --task=sort --d-model=16 --num-heads=2 --response-length=8 --sft-texts=64 "
SORT += "--sft-batch-size=32 --total-episodes=32 --batch-size=16 --update-epochs=1 "
SORT = (SORT + "--critic-warmup=0 --stages=sft,ppo").split()


# ------------------------------------------------------------------------------------------------
# Runs that the tests share


def parts(model):
    """Copies of what a model has: of the base, under the names without adapters, and adapters."""
    state = {name: x.clone() for name, x in model.state_dict().items()}
    base = {k.replace(".base_layer", ""): x for k, x in state.items() if "lora_" not in k}
    return base, {k: x for k, x in state.items() if "lora_" in k}


def trunk(tree):
    """The part that all four models have."""
    model = tree.model
    return model.base_model if isinstance(tree, rlhf.Policy) else model


def snapshot(agent):
    """Adapters, heads and what may learn, of each model."""
    return {
        name: SimpleNamespace(
            adapter=parts(trunk(tree))[1],
            head={k: x.clone() for k, x in tree.state_dict().items() if k.startswith("head.")},
            learns={k for k, x in tree.named_parameters() if x.requires_grad},
        )
        for name, tree in agent.named_children()
    }


@contextlib.contextmanager
def watched(replay=()):
    """What a run does meanwhile.

    replay: what `sample` returns, in turn, that two runs learn from the same texts.
    """
    seen = SimpleNamespace(samples=[], updates=[], before={}, after={}, saved=[], moments=[])
    sample, gradient = rlhf.sample, rlhf.ppo_gradient
    steps, finish, save = rlhf.Run.steps, rlhf.Run.finish, rlhf.Run.save_checkpoint
    replay = iter(replay)

    def spy_sample(*args):
        drawn = sample(*args)  # random numbers are drawn in any case
        seen.samples.append(next(replay, drawn))
        return seen.samples[-1]

    def spy_gradient(agent, *args):
        calls = Counter()

        def count(module, inputs, output):
            if isinstance(module, nn.Linear | Conv1D):
                calls[names[module], output.dtype] += 1

        names = {module: name for name, module in agent.named_modules(remove_duplicate=False)}
        hook = nn.modules.module.register_module_forward_hook(count)
        with rlhf.Memory() as memory:
            stats = gradient(agent, *args)
        hook.remove()
        grads = {k: x.grad.clone() for k, x in agent.named_parameters() if x.grad is not None}
        update = SimpleNamespace(grads=grads, calls=calls, peak=memory.peak)
        update.stats = {name: float(x) for name, x in stats.items()}
        seen.updates.append(update)
        return stats

    def spy_steps(run, stage, *args):
        seen.before[stage] = snapshot(run.agent)
        return steps(run, stage, *args)

    def spy_finish(run):
        seen.after[rlhf.STAGES[run.stage]] = snapshot(run.agent)
        if run.optimizer:
            seen.moments += [x for s in run.optimizer.state.values() for x in s.values()]
        finish(run)

    def spy_save(run):
        save(run)
        paths = {path.stem: path for path in run.folder.glob("*.pt")}
        data = {name: torch.load(path, weights_only=True) for name, path in paths.items()}
        data |= data["checkpoint"].pop("models")
        seen.saved.append((data, {name: path.stat().st_size for name, path in paths.items()}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf, "sample", spy_sample)
        patch.setattr(rlhf, "ppo_gradient", spy_gradient)
        patch.setattr(rlhf.Run, "steps", spy_steps)
        patch.setattr(rlhf.Run, "finish", spy_finish)
        patch.setattr(rlhf.Run, "save_checkpoint", spy_save)
        yield seen


def watch(*argv, replay=()):
    with watched(replay) as seen:
        run = ran(*argv)
    vars(run).update(vars(seen))
    return run


@pytest.fixture(scope="module")
def adapted(files, tmp_path_factory):
    """All stages of a kind of model with adapters, run once."""
    runs = {}

    def run(kind):
        if kind not in runs:
            with contextlib.chdir(tmp_path_factory.mktemp(kind)):
                runs[kind] = watch(*flags(files, kind, "sft", "pref", "prompts"), *LORA)
        return runs[kind]

    return run


@pytest.fixture(scope="module")
def updates(files, tmp_path_factory):
    """PPO alone with flags, run once. replay: with the texts of the run that has these flags."""
    runs = {}

    def run(kind, *more, replay=None):
        key = (kind, more, replay)
        if key not in runs:
            texts = () if replay is None else run(kind, *replay).samples
            with contextlib.chdir(tmp_path_factory.mktemp(kind)):
                argv = [*flags(files, kind, "prompts"), *rewarded(files), "--stages=ppo"]
                runs[key] = watch(*argv, *more, replay=texts)
        return runs[key]

    return run


def numbers(folder):
    """metrics.csv: (step, name) and values."""
    cells = [x for x in rows_of(folder)[1:] if x[1] != "rollout/logp_mismatch"]
    return [x[:2] for x in cells], [float(x[2]) for x in cells]


def ids_of(task):
    return torch.tensor([task.ids({"prompt": tiny.TEXTS[0]})[0]])


# ------------------------------------------------------------------------------------------------
# Adapters


@pytest.mark.parametrize("kind", KINDS)
def test_base_is_never_touched(kind, adapted, files):
    """After all stages each of the four has the file's weights, bit for bit."""
    run, model = adapted(kind), causal(files / kind)
    for name in TREES:
        tree = getattr(run.agent, name)
        original = model if isinstance(tree, rlhf.Policy) else model.base_model
        base, adapter = parts(tree.model)
        assert same(base, original.state_dict())
        assert adapter
    assert len(logged(run.folder, "sft/loss")) == 3 and len(logged(run.folder, "rm/loss")) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_base_is_in_memory_once(kind, adapted, files):
    run, model = adapted(kind), causal(files / kind)
    trees = [getattr(run.agent, name) for name in TREES]
    where = [
        {k: x.data_ptr() for k, x in trunk(tree).named_parameters() if "lora_" not in k}
        for tree in trees
    ]
    assert len(where[0]) == len([*model.base_model.parameters()])
    assert all(other == where[0] for other in where[1:])
    products = [x for x in model.base_model.modules() if isinstance(x, nn.Linear | Conv1D)]
    adapter = sum(4 * RANK * sum(x.weight.shape) for x in products)
    heads = 2 * 4 * (model.config.hidden_size + 1)
    held = {x.data_ptr(): x.nbytes for tree in trees for x in tree.parameters()}
    assert sum(held.values()) == sum(x.nbytes for x in model.parameters()) + 4 * adapter + heads
    rows, head = (
        trees[0].model.get_input_embeddings().weight,
        trees[0].model.get_output_embeddings().weight,
    )
    assert (rows.data_ptr() == head.data_ptr()) == (kind in models.TIED)


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_and_heads_learn(kind, adapted):
    run = adapted(kind)
    stages = {
        "sft": {"policy"},
        "rm": {"reward_model"},
        "ppo": {"policy", "value_model"},
    }
    for stage, learn in stages.items():
        before, after = run.before[stage], run.after[stage]
        for name in TREES:
            a, b = before[name], after[name]
            if name in learn:
                assert all(not torch.equal(a.adapter[k], b.adapter[k]) for k in a.adapter)
                assert not a.head or not same(a.head, b.head)
            else:
                untouched = stage != "sft" or name != "reference"  # which takes what sft learns
                assert same(a.adapter, b.adapter) == untouched
                assert same(a.head, b.head)
            tree = getattr(run.agent, name)
            may = {k for k, _ in tree.named_parameters() if "lora_" in k or k.startswith("head.")}
            assert b.learns <= may
            if name in learn:
                assert b.learns == may
    assert not run.after["ppo"]["reference"].learns
    for update in run.updates:
        assert all("lora_" in name or ".head." in name for name in update.grads)


@pytest.mark.parametrize("more", [[], LORA], ids=["whole", "lora"])
def test_gradients_do_not_outlive_their_stage(more, files):
    """That of the reward model would be as large as the model, in memory all through PPO."""
    run = watch(*flags(files, "gpt2", "sft", "pref", "prompts"), *more, "--total-episodes=8")
    for update in run.updates:
        assert {name.split(".")[0] for name in update.grads} == {"policy", "value_model"}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_handed_on(kind, adapted):
    """Of all models they start alike, as nothing; each stage starts where the one before ended."""
    run = adapted(kind)
    first = run.before["sft"]
    for name in TREES:
        assert same(first[name].adapter, first["policy"].adapter)
        assert all(k.endswith("weight") for k in first[name].adapter)
        for k, x in first[name].adapter.items():
            assert x.any() == ("lora_A" in k)
    sft = run.after["sft"]["policy"].adapter
    assert same(run.after["sft"]["reference"].adapter, sft)
    assert same(run.before["rm"]["reward_model"].adapter, sft)
    assert same(run.before["ppo"]["policy"].adapter, sft)
    judge, value = run.after["rm"]["reward_model"], run.before["ppo"]["value_model"]
    assert same(value.adapter, judge.adapter) and same(value.head, judge.head)
    for stage in ("rm", "ppo", "eval"):
        assert same(run.after[stage]["reference"].adapter, sft)
        assert same(run.after[stage]["policy"].adapter, sft) == (stage == "rm")
    assert same(run.after["eval"]["reward_model"].adapter, judge.adapter)
    first = {name.rpartition(".lora_")[0] for name in sft}
    assert len(first) == len(sft) / 2 >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_kl_is_0_and_ratios_are_1_at_the_start(kind, adapted, updates):
    for run in (adapted(kind), updates(kind, *LORA)):
        kl = logged(run.folder, "objective/kl")
        assert kl[0] == 0 and abs(kl[1]) > 1e-6
        first = run.updates[0].stats
        assert first["val/ratio"] == pytest.approx(1, abs=1e-5)
        assert first["val/ratio_var"] < 1e-8 and first["policy/approxkl"] < 1e-8
        assert run.updates[1].stats["policy/approxkl"] > 1e-12
        assert max(logged(run.folder, "rollout/logp_mismatch")) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_reference_without_sft_is_the_model(kind, updates, files):
    run = updates(kind, *LORA)
    _, task, _ = started(files, kind)
    with torch.no_grad():
        ids = ids_of(task)
        expected = causal(files / kind)(ids).logits
        assert torch.equal(run.agent.reference.model(ids).logits, expected)
        assert not torch.equal(run.agent.policy.model(ids).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_adapters_say_what_sft_learned(kind, adapted, files):
    """Logits of the reference, from the matrices by hand; with sft they are not the model's."""
    run, model = adapted(kind), causal(files / kind)
    _, task, _ = started(files, kind)
    sft, ids = run.after["sft"]["policy"].adapter, ids_of(task)
    with torch.no_grad():
        before = model(ids).logits
        for name in {name.rpartition(".lora_")[0] for name in sft}:
            layer = model.base_model.get_submodule(name)
            a, b = (sft[f"{name}.lora_{x}.default.weight"] for x in "AB")
            change = 2 * (b @ a)  # alpha is twice the rank
            layer.weight += change.T if isinstance(layer, Conv1D) else change
        ours = run.agent.reference.model(ids).logits
        torch.testing.assert_close(ours, model(ids).logits, rtol=0, atol=1e-4)
        assert (ours - before).abs().max() > 1e-2


def test_x7_groups_learn_with_an_adapter_alone(files, tmp_path):
    """One adapter learns and is saved; what is left, the reference, is the model itself."""
    text = "def letters(completions): return [float(len({*x[0]['content']})) for x in completions]"
    (tmp_path / "letters.py").write_text(text)
    argv = [*flags(files, "llama", "prompts"), f"--reward-fn={tmp_path / 'letters.py'}:letters"]
    argv += ["--stages=ppo", "--group-size=4", "--kl-in=loss", "--loss-mean=response", "--stop=e"]
    with contextlib.chdir(tmp_path):
        run = watch(*argv, *LORA)
    for update in run.updates:
        assert all(name.startswith("policy.") and "lora_" in name for name in update.grads)
        assert update.grads and "val/grad_norm" not in update.stats
    assert run.updates[0].stats["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert max(float(x.abs().max()) for x in run.updates[0].grads.values()) > 0
    data, sizes = run.saved[-1]
    assert {"policy", "reference"} <= data.keys() and not {"value_model"} & data.keys()
    assert sizes.keys() <= {"checkpoint", "reference"}


@pytest.mark.parametrize("value_init", ["sft", "rm"])
def test_value_model_starts_with_an_adapter(value_init, adapted, files):
    """--value-init sft: that of the SFT policy, and a head of 0."""
    if value_init == "rm":
        run = adapted("gpt2")
    else:
        run = watch(*flags(files, "gpt2", "sft", "pref", "prompts"), *LORA, "--value-init=sft")
    first = run.before["ppo"]
    like = "policy" if value_init == "sft" else "reward_model"
    assert same(first["value_model"].adapter, first[like].adapter)
    assert first["value_model"].head["head.weight"].any() == (value_init == "rm")
    assert not same(run.after["ppo"]["value_model"].adapter, first[like].adapter)
    other = {"sft": "reward_model", "rm": "policy"}[value_init]
    assert not same(first["value_model"].adapter, first[other].adapter)


# ------------------------------------------------------------------------------------------------
# Adapters: other models


def test_reward_model_of_another_family(files):
    """Which has another tokenizer and a base of its own; the value model is the policy's."""
    tiny.save_classifier("judge", "qwen2", seed=3, tokenizer_seed=1)
    argv = [*flags(files, "llama", "sft", "prompts"), *LORA, "--reward-model=judge"]
    line = refused(*argv)
    assert "--value-init rm" in line and "tokenizer" in line
    run = watch(*argv, "--value-init=sft")
    theirs = classifier("judge")
    base, adapter = parts(run.agent.reward_model.model)
    assert same(base, theirs.base_model.state_dict())
    assert not any(x.any() for k, x in adapter.items() if "lora_B" in k)
    assert torch.equal(run.agent.reward_model.head.weight, theirs.score.weight)
    assert logged(run.folder, "objective/scores_std")[0] > 0.1
    assert same(run.before["ppo"]["value_model"].adapter, run.before["ppo"]["policy"].adapter)
    assert same(parts(run.agent.value_model.model)[0], causal(files / "llama").model.state_dict())


@pytest.mark.parametrize("flag", ["--ref-model", "--value-model", "--reward-model"])
def test_another_model_has_a_base_of_its_own(flag, files):
    """A reward model that is given, and one that the pairs then teach."""
    tiny.save_model("other", "gpt2", seed=5)
    data = ("sft", "pref", "prompts")
    run = watch(*flags(files, "gpt2", *data), *LORA, flag, "other")
    other, model = causal("other"), causal(files / "gpt2")
    name = {"--ref-model": "reference"}.get(flag, flag[2:].replace("-", "_"))
    of_other = {name, "value_model"} if name == "reward_model" else {name}
    for tree in TREES:
        base = parts(trunk(getattr(run.agent, tree)))[0]
        assert same(base, (other if tree in of_other else model).base_model.state_dict())
    if flag == "--ref-model":
        _, task, _ = started(files, "gpt2")
        with torch.no_grad():
            ids = ids_of(task)
            assert torch.equal(run.agent.reference.model(ids).logits, other(ids).logits)
        assert abs(logged(run.folder, "objective/kl")[0]) > 1
    else:
        assert logged(run.folder, "objective/kl")[0] == 0


# ------------------------------------------------------------------------------------------------
# Adapters: files


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.parametrize("kind", KINDS)
def test_policy_is_an_adapter(kind, adapted, files):
    """As peft and transformers read it, from the folder alone or on a model that is there."""
    run, (_, task, _) = adapted(kind), started(files, kind)
    folder, ids = run.folder / "policy", ids_of(task)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(files / kind)
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, 2 * RANK, "LORA")
    assert config["task_type"] == "CAUSAL_LM"
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    products = {name.split(".")[-3] for name in load_file(folder / "adapter_model.safetensors")}
    assert {*config["target_modules"]} == products and len(products) >= 3
    with torch.no_grad():
        ours = run.agent.policy.model(ids).logits
        for theirs in (
            PeftModel.from_pretrained(causal(files / kind), folder),
            AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        ):
            torch.testing.assert_close(theirs(ids).logits, ours, rtol=0, atol=1e-5)
        assert (ours - causal(files / kind)(ids).logits).abs().max() > 1e-2
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == len(run.after["ppo"]["policy"].adapter)
    assert not [*folder.glob("model*")] and not (folder / "config.json").exists()
    one, other = tokenizer_of(folder), tokenizer_of(files / kind)
    assert one.chat_template == other.chat_template
    assert all(one(text).input_ids == other(text).input_ids for text in tiny.TEXTS)
    assert f"base_model: {files / kind}\n" in (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_policy_is_a_whole_model(kind, adapted, files):
    """And the run is the same."""
    stages = [] if kind == "gpt2" else ["--stages=sft"]
    run = watch(*flags(files, kind, "sft", "pref", "prompts"), *LORA, "--merge", *stages)
    folder, (_, task, _) = run.folder / "policy", started(files, kind)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not [*folder.glob("adapter*")]
    with torch.no_grad():
        ids = ids_of(task)
        ours = run.agent.policy.model(ids).logits
        torch.testing.assert_close(loaded(ids).logits, ours, rtol=0, atol=1e-4)
        assert (ours - causal(files / kind)(ids).logits).abs().max() > 1e-2
    assert tokenizer_of(folder)(tiny.TEXTS[0]).input_ids == task.tokenizer(tiny.TEXTS[0]).input_ids
    whole = rows_of(adapted(kind).folder)
    assert rows_of(run.folder) == whole[: None if kind == "gpt2" else len(rows_of(run.folder))]
    assert same(parts(run.agent.policy.model)[0], causal(files / kind).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_reward_model_is_a_whole_classifier(kind, adapted, files):
    """Its scores are those of the run, up to reward_offset; and --reward-model takes it."""
    run, (_, task, _) = adapted(kind), started(files, kind)
    folder = run.folder / "reward_model"
    auto = transformers.AutoModelForSequenceClassification
    loaded, info = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens, batch = models.exported_texts(task, tokenizer_of(folder))
    with torch.no_grad():
        theirs = loaded(batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
        ours = rlhf.reward_scores(run.agent.reward_model, tokens)
        torch.testing.assert_close(theirs + loaded.config.reward_offset, ours, rtol=0, atol=2e-5)
        assert ours.std() > 0.1 and abs(loaded.config.reward_offset) > 1e-3
        again = start(*flags(files, kind, "sft", "prompts"), "--reward-model", folder, *LORA)[-1]
        said = rlhf.reward_scores(again.reward_model, tokens)
        torch.testing.assert_close(said, ours, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_have_adapters_and_heads_only(kind, adapted, files):
    """So each is smaller than the base."""
    run = adapted(kind)
    base = (files / kind / "model.safetensors").stat().st_size
    base *= 2 if kind == "llama" else 1  # bfloat16 there
    for data, sizes in run.saved:
        for name in data.keys() & {*TREES}:
            learns = {k for k in data[name] if "lora_" in k or k.startswith("head.")}
            assert data[name].keys() == learns
            assert any(k.startswith("head.") for k in learns) == (name in TREES[2:])
        assert max(sizes.values()) < base
        for name in sizes.keys() - {"checkpoint"}:
            assert sizes[name] < base / 3
    names = [{*data} - {"checkpoint"} for data, _ in run.saved]
    assert names[0] == {"policy"} and names[-1] == {"policy", "reference", "reward_model"}
    assert {"policy", "value_model", "reference", "reward_model"} in names
    data, _ = run.saved[-1]
    for name in names[-1]:
        state = getattr(run.agent, name).state_dict()
        assert all(torch.equal(x, state[k]) for k, x in data[name].items())


@pytest.mark.parametrize("kind, stage", [("llama", "sft"), ("gemma", "rm"), ("gpt2", "ppo")])
def test_resume_bitexact(kind, stage, adapted, files):
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, stage, 1)
        stopped = call(*flags(files, kind, "sft", "pref", "prompts"), *LORA)
    assert stopped.code == 130
    run, whole = ran("--resume", stopped.folder), adapted(kind)
    assert run.folder == stopped.folder
    assert rows_of(run.folder) == rows_of(whole.folder)
    assert same(run.agent.state_dict(), whole.agent.state_dict())
    for name in ("policy/adapter_model.safetensors", "reward_model/model.safetensors"):
        assert same(load_file(run.folder / name), load_file(whole.folder / name))


def test_load_goes_on_with_the_adapters(adapted):
    """Not without them."""
    whole = adapted("gpt2")
    run = ran("--load", whole.folder, "--stages=ppo,eval")
    written = [x for x in rows_of(whole.folder)[1:] if x[1].split("/")[0] not in ("sft", "rm")]
    assert rows_of(run.folder)[1:] == written
    for other in ("--lora-rank=0", f"--lora-rank={RANK + 1}"):
        again = call("--load", whole.folder, other)
        assert again.code == 2 and "does not fit these settings" in again.err
        assert len(again.err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize("more", [(), ("--lora-rank=2",)], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma"])
def test_bf16_multiplies_in_bfloat16_only(kind, more, updates, monkeypatch):
    """Weights, gradients, moments, logits of the softmax and values are float32.

    Of the same texts the losses are those of float32 to 0.05, gradients to a tenth.
    """
    exact, kept = updates(kind, *more), []
    original = rlhf.Categorical

    def spy(**inputs):
        kept.append(inputs["logits"].dtype)
        return original(**inputs)

    monkeypatch.setattr(rlhf, "Categorical", spy)
    run = updates(kind, *more, "--precision=bf16", replay=more)
    assert {*kept} == {torch.float32}
    assert {x.dtype for x in run.agent.parameters()} == {torch.float32}
    assert {x.dtype for x in run.moments} == {torch.float32} and len(run.moments) > 40
    first, reference = run.updates[0], exact.updates[0]
    types = {dtype for name, dtype in first.calls if not name.endswith(".head")}
    assert types == {torch.bfloat16}
    assert {x.dtype for x in first.grads.values()} == {torch.float32}
    assert {dtype for _, dtype in reference.calls} == {torch.float32}
    for name, value in reference.stats.items():
        atol = 0.1 * abs(value) if "grad_norm" in name else 0.05
        assert first.stats[name] == pytest.approx(value, abs=atol), name
    assert first.grads.keys() == reference.grads.keys()
    for part in ("policy.", "value_model."):
        a, b = (
            torch.cat([x.flatten() for k, x in sorted(update.grads.items()) if k.startswith(part)])
            for update in (first, reference)
        )
        assert 0 < (a - b).norm() < 0.1 * b.norm()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.parametrize("more", [(), ("--lora-rank=2",)], ids=["whole", "lora"])
def test_pure_bf16(more, files):
    """All weights but the heads, in all stages; what sampler and trainer differ by is logged."""
    argv = [*flags(files, "llama", "sft", "pref", "prompts"), *more]
    run = watch(*argv, "--precision=pure-bf16")
    for name in TREES:
        for key, x in getattr(run.agent, name).named_parameters():
            assert x.dtype == (torch.float32 if key.startswith("head.") else torch.bfloat16), key
    assert torch.bfloat16 in {x.dtype for x in run.moments}
    mismatch = logged(run.folder, "rollout/logp_mismatch")
    assert len(mismatch) == 2 and all(0 <= x < 0.1 for x in mismatch)
    assert logged(run.folder, "objective/kl")[0] == 0
    loaded, (_, task, _) = causal(files / "llama"), started(files, "llama")
    if more:
        loaded = PeftModel.from_pretrained(loaded, run.folder / "policy")
    else:
        loaded = causal(run.folder / "policy")
    with torch.no_grad():
        theirs = loaded(ids_of(task)).logits
        ours = run.agent.policy.model(ids_of(task)).logits.float()
    assert (theirs - ours).std() < 0.1 * ours.std()


# ------------------------------------------------------------------------------------------------
# Gradient checkpointing


def in_layers(calls):
    """How often each product within a layer was computed; not the last, of which only what goes
    in is needed again.
    """
    layer, last = re.compile(r"\.(h|layers|blocks)\.\d\."), ("mlp.c_proj", ".down", "down_proj")
    return {k: n for (k, _), n in calls.items() if layer.search(k) and not k.endswith(last)}


@pytest.mark.parametrize(
    "kind, more", [("gpt2", ()), ("gemma", tuple(LORA)), ("llama", ("--precision=bf16",))]
)
def test_gradient_checkpointing_changes_nothing(kind, more, updates):
    """But that a layer is computed twice, and what is kept meanwhile is less."""
    plain = updates(kind, *more)
    run = updates(kind, *more, "--gradient-checkpointing")
    assert rows_of(run.folder) == rows_of(plain.folder)
    assert len(run.updates) == len(plain.updates) == 4
    for a, b in zip(run.updates, plain.updates, strict=True):
        assert same(a.grads, b.grads) and a.stats == b.stats
        assert {*in_layers(b.calls).values()} == {1}
        assert {*in_layers(a.calls).values()} == {2}
        assert a.peak < b.peak
    assert same(run.agent.state_dict(), plain.agent.state_dict())


def test_gradient_checkpointing_of_the_scripts_own_model():
    """In both stages; a third of the bytes is enough for what is kept."""
    plain, run = watch(*SORT), watch(*SORT, "--gradient-checkpointing")
    assert rows_of(run.folder) == rows_of(plain.folder)
    assert same(run.agent.state_dict(), plain.agent.state_dict())
    for a, b in zip(run.updates, plain.updates, strict=True):
        assert same(a.grads, b.grads)
        assert {*in_layers(b.calls).values()} == {1}
        assert {*in_layers(a.calls).values()} == {2}
        assert a.peak < 0.7 * b.peak


# ------------------------------------------------------------------------------------------------
# Chunks of logits


@pytest.mark.parametrize("more", [(), ("--lora-rank=2",)], ids=["whole", "lora"])
def test_chunks_change_nothing(more, files):
    argv = [*flags(files, "gemma", "sft", "prompts"), *rewarded(files), *more]
    small, large = (watch(*argv, f"--logprob-chunk={n}") for n in (5, 4096))
    (names, values), (others, expected) = numbers(small.folder), numbers(large.folder)
    assert names == others and values == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for (a, _), (b, _) in zip(small.samples, large.samples, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(small.updates, large.updates, strict=True):
        for name, grad in b.grads.items():
            torch.testing.assert_close(a.grads[name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", models.KINDS)
def test_chunks_are_the_models_own_logits(kind, files):
    """Capped and scaled as in the plain forward, of all responses; the entropies, too."""
    _, task, agent = started(files, kind, "--logprob-chunk=5")
    tokens, P = models.ragged(task), task.prompt_length
    mask = tokens[:, P:] != rlhf.PAD
    theirs = their_logprobs(causal(files / kind), task.num_tokens, tokens, P)
    with torch.no_grad():
        ours = rlhf.response_logprobs(agent.policy, tokens, P)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)
        policy, _ = agent(tokens)
        policy.log_prob(tokens[:, P:].clamp(min=0))
        plain = models.all_logits(agent.policy, tokens[:, :-1])[:, P - 1 :]
        p = plain.log_softmax(-1)
        entropy = -(p.exp() * p).sum(-1)
        torch.testing.assert_close(policy.entropy()[mask], entropy[mask], rtol=0, atol=1e-4)
    assert mask.sum() > 20 and ours.min() < -3


class Rows(TorchDispatchMode):
    """How many rows of logits there are in a tensor that is made, at most."""

    def __init__(self, *widths):
        super().__init__()
        self.widths, self.made = [(x,) for x in widths], Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            self.made[self.of(x)] += 1
        return made

    def of(self, x):
        logits = torch.is_tensor(x) and x.is_floating_point() and x.shape[-1:] in self.widths
        held = x.untyped_storage().nbytes() // x.itemsize if logits else 0  # less, if expanded
        return min(x.numel(), held) // x.shape[-1] if logits else 0


@pytest.mark.parametrize("more", [(), ("--lora-rank=2",)], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["gemma", "qwen2"])
def test_logits_in_memory_are_one_chunk(kind, more, files):
    """Forward and backward 37 tokens, and between the two none; 32 rows are the head itself."""
    _, task, agent = started(files, kind, "--logprob-chunk=37", *more)
    tokens, P = models.ragged(task), task.prompt_length
    count = tokens[:, P:].numel()
    widths = task.num_tokens, agent.policy.model.get_output_embeddings().weight.shape[0]
    assert count > 2 * 37 and task.num_tokens > 300
    kept, weights = [], {x.data_ptr() for x in agent.parameters()}
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with Rows(*widths) as forward, hooks:
        loss = rlhf.sft_loss(agent.policy, tokens, P, count)
    with Rows(*widths) as backward:
        loss.backward()
    with Rows(*widths) as judged, torch.no_grad():
        rlhf.response_logprobs(agent.reference, tokens, P)
    for rows in (forward, backward, judged):
        assert max(rows.made) == 37 and rows.made[37] >= 2 * 3
    assert sum(forward.of(x) for x in kept if x.data_ptr() not in weights) <= 37


def test_default_of_the_chunk():
    """Fewer tokens of a model whose vocabulary is large."""
    assert rlhf.parse_args([]).logprob_chunk == 4096
    argv = ["--model=m", "--sft-data=s", "--stages=sft"]
    assert rlhf.parse_args(argv).logprob_chunk == 512
    assert rlhf.parse_args([*argv, "--logprob-chunk=7"]).logprob_chunk == 7


# ------------------------------------------------------------------------------------------------
# The plan

LARGE = dict(vocab_size=20_000, hidden_size=512, num_hidden_layers=2, num_attention_heads=8)
NO_DATA = ["--sft-data=no", "--pref-data=no", "--prompts=no", "--plan"]


def table(text):
    """{row: GB} of what --plan prints."""
    lines = [re.fullmatch(r"(\S.*\S) +(\d+\.\d{3}) GB", line) for line in text.splitlines()]
    return {line[1]: float(line[2]) for line in lines}


def planned(*argv):
    """--plan in this process: nothing is left or printed beside the table."""
    before = {*Path().rglob("*")}
    with models.captured() as printed:
        args = rlhf.parse_args([str(x) for x in argv])
        rlhf.check_args(args)
        rlhf.plan(args)
    assert printed.err == "" and {*Path().rglob("*")} == before
    return table(printed.out)


def config_only(kind, **sizes):
    """A folder with nothing but a configuration."""
    config = transformers.AutoConfig.for_model(kind, **sizes)
    config.architectures = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.save_pretrained("large")
    assert [path.name for path in Path("large").iterdir()] == ["config.json"]
    return config


def size(*modules):
    """GB of all weights, each counted once."""
    return sum({x: x.nbytes for module in modules for x in module.parameters()}.values()) / 1e9


@pytest.mark.slow
def test_plan_is_printed_and_that_is_all():
    """From a configuration alone, through the command line; with --fsdp one process has it all."""
    config_only("gpt2", **LARGE)
    argv = ["--model=large", *NO_DATA, "--prompt-length=64"]
    done = command_line("rlhf", *argv)
    assert done.returncode == 0 and done.stderr == ""
    assert [path.name for path in Path().iterdir()] == ["large"]
    assert table(done.stdout) == planned(*argv) == planned(*argv, "--fsdp")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_plan_has_the_bytes_of_the_weights(kind):
    """Embeddings tied or not: to the last digit shown."""
    config = config_only(kind, **LARGE)
    argv = ["--model=large", *NO_DATA, "--prompt-length=64"]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        head = nn.Linear(512, 1)
    whole, scalar = size(model), size(model.base_model, head)
    products = [x for x in model.base_model.modules() if isinstance(x, nn.Linear | Conv1D)]
    adapter = sum(4 * 64 * sum(x.weight.shape) for x in products) / 1e9
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (kind == "gpt2")
    learned = {
        (): (whole, whole, scalar, scalar, whole + scalar),
        ("--precision=bf16",): (whole, whole, scalar, scalar, whole + scalar),
        ("--precision=pure-bf16",): [x / 2 for x in (whole, whole, scalar, scalar, whole + scalar)],
        ("--lora-rank=64",): (whole + adapter, *[adapter] * 3, 2 * adapter),  # base: once
    }
    for more, (*weights, gradients) in [*learned.items()][:: 3 if kind == "gpt2" else 1]:
        plan = planned(*argv, *more)
        rows = [f"weights, {name.replace('_', ' ')}" for name in TREES]
        shown = [plan[row] for row in rows]
        assert shown == pytest.approx(weights, abs=0.00051)
        assert plan["gradients"] == pytest.approx(gradients, abs=0.00051)
        assert plan["moments of AdamW"] == pytest.approx(2 * gradients, abs=0.00051)
        *parts, total = plan.values()
        assert [*plan][-1] == "at most at a time"
        lasting = sum(parts) - plan["update"] - plan["sampling"]
        assert total == pytest.approx(lasting + max(plan["update"], plan["sampling"]), abs=0.005)


def test_plan_of_ranks_that_share_the_models(monkeypatch):
    """With --fsdp each of four has a quarter of what lasts; without it, all of it."""
    argv = ["--task=sort", "--plan", "--rm-coef=1", "--d-model=512", "--batch-size=16"]
    alone = planned(*argv)
    monkeypatch.setattr(rlhf, "rank_of", lambda: (0, 4))
    assert planned(*argv) == alone
    shared = planned(*argv, "--fsdp")
    passing = {"update", "sampling"}
    for name in alone.keys() - passing - {"at most at a time"}:
        assert shared[name] == pytest.approx(alone[name] / 4, abs=0.00051) != alone[name], name
    assert {x: shared[x] for x in passing} == {x: alone[x] for x in passing}


def test_plan_without_a_reward_model():
    config_only("gpt2", **LARGE)
    function = ["--reward-fn=functions.py:length", "--rm-coef=0"]
    Path("functions.py").write_text(models.LENGTH)
    argv = ["--model=large", "--prompts=no", "--plan", "--prompt-length=64", *function]
    assert "weights, reward model" not in planned(*argv)


def test_plan_of_the_scripts_own_model():
    task = rlhf.TASKS["sort"]
    plan = planned("--task=sort", "--plan", "--rm-coef=1", "--d-model=512", "--num-layers=4")
    args = rlhf.Args(**rlhf.SORT | {"d_model": 512, "num_layers": 4, "rm_coef": 1.0})
    agent = rlhf.Agent(task, args)
    for name in TREES:
        shown = plan[f"weights, {name.replace('_', ' ')}"]
        assert shown == pytest.approx(size(getattr(agent, name)), abs=0.00051)


WIDE = dict(hidden_size=256, num_hidden_layers=3, num_attention_heads=8)
LORA_BF16 = ("--lora-rank=8", "--precision=bf16")
FRUGAL = (*LORA_BF16, "--gradient-checkpointing", "--logprob-chunk=32")


@pytest.mark.parametrize(
    "kind, more",
    [
        pytest.param("gpt2", (), id="gpt2"),
        pytest.param("llama", FRUGAL, id="frugal", marks=pytest.mark.slow),
        pytest.param("llama", LORA_BF16, id="bf16", marks=pytest.mark.slow),
    ],
)
def test_plan_is_what_an_update_takes(kind, more, files):
    """To 2 %: the same numbers, of a real update of texts that are as long as may be."""
    wide = {"intermediate_size": 1024} if kind == "llama" else {}
    tiny.save_model("wide", kind, dtype=torch.float32, **WIDE | wide)
    tokenizer = tokenizer_of("wide")
    text = " ".join(tiny.TEXTS[:3])
    models.write(Path("prompts.jsonl"), [{"prompt": text}] * 4)
    sizes = [
        "--response-length=24",
        "--batch-size=16",
        "--total-episodes=16",
        "--num-minibatches=1",
    ]
    sizes += [f"--prompt-length={len(tokenizer(text).input_ids)}", "--micro-batch-size=8"]
    argv = [*flags(files, kind, model="wide"), "--prompts=prompts.jsonl", "--stages=ppo", *sizes]
    run = watch(*argv, *rewarded(files), *more)
    (tokens, _), (update,) = run.samples[0], run.updates
    assert (tokens != rlhf.PAD).all(1).sum() > 8
    plan = planned(*argv, *rewarded(files), *more, "--plan")
    gradients = sum(x.nbytes for x in update.grads.values())
    measured = (update.peak - gradients) / 1e9
    assert measured > 0.02 and plan["update"] == pytest.approx(measured, rel=0.02, abs=0.0006)
    assert plan["gradients"] == pytest.approx(gradients / 1e9, abs=0.00051)
    assert plan["moments of AdamW"] == pytest.approx(2 * gradients / 1e9, abs=0.00051)


def test_memory_counts_what_is_made():
    """Not the weights that a product reads; what is freed, no longer."""
    layer, x = nn.Linear(1000, 1000), torch.ones(10, 1000)
    with rlhf.Memory() as memory:
        y = layer(x)
        assert memory.now == memory.peak == y.nbytes
        views = [y.view(-1), y.T, y[:3], layer.weight.T, x[0]]
        assert memory.now == y.nbytes
        y.relu().sum().backward()
        gradients = layer.weight.nbytes + layer.bias.nbytes
        del views
        assert memory.now == y.nbytes + gradients
        assert y.nbytes + gradients < memory.peak < 4 * y.nbytes + gradients
        del y
        assert memory.now == gradients
        layer.zero_grad()
        assert memory.now == 0


@pytest.mark.slow
def test_plan_is_less_with_what_saves_memory():
    """Each flag makes the row smaller that it is there for, the others no larger."""
    config_only("llama", **LARGE, intermediate_size=1024)
    sizes = ["--prompt-length=64", "--micro-batch-size=16", "--logprob-chunk=4096"]
    argv = ["--model=large", *NO_DATA, *sizes]
    plain = planned(*argv)
    flags = ["--precision=bf16", "--gradient-checkpointing", "--logprob-chunk=64", "--lora-rank=4"]
    for flag in flags:
        less = planned(*argv, flag)
        assert less["at most at a time"] < 0.97 * plain["at most at a time"], flag
        assert less["update"] < 0.9 * plain["update"] or flag == "--lora-rank=4"
    everything = planned(*argv, *flags)
    assert everything["update"] < 0.2 * plain["update"]


# ------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "more, hints",
    [
        (["--lora-rank=-1"], ["--lora-rank", "-1", "at least 0"]),
        (["--logprob-chunk=0"], ["--logprob-chunk", "0", "at least 1"]),
        (["--merge"], ["--merge", "--lora-rank"]),
        (["--fsdp"], ["--fsdp", "torchrun"]),
        (["--fsdp", "--lora-rank=4"], ["--fsdp", "torchrun"]),
    ],
    ids=" ".join,
)
def test_flag_refused(more, hints, files):
    line = refused(*flags(files, "gpt2", "sft"), *more)
    assert all(hint in line for hint in hints)


def test_adapters_of_no_model_refused():
    line = refused("--lora-rank=4", "--no-cuda")
    assert "--lora-rank" in line and "--model" in line


def test_peft_not_installed(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    line = refused(*flags(files, "gpt2", "sft", model="not read yet"), *LORA)
    assert "--lora-rank" in line and "pip install peft" in line


@pytest.mark.parametrize("precision", ["fp8", "bfloat16"])
def test_precision_refused(precision, files):
    run = call(*flags(files, "gpt2", "sft"), f"--precision={precision}")
    assert run.code == 2 and run.folder is None
    assert "--precision" in run.err and "pure-bf16" in run.err
