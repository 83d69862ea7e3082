"""The scripts as texts: the same where they claim to be, and short."""

import ast
import difflib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SOURCES = {path.stem[4:]: path.read_text() for path in ROOT.glob("ppo_*.py")}
BANNER = re.compile(r"^# -{96}\n# (.+)\n", re.M)
TITLES = ["Configuration", "Environment", "Policy and value function"]
TITLES += ["The algorithm", "Training", "Runs"]

# What may differ from ppo_discrete.py, beside the default values of the configuration.
CONFIGURATION = {
    "continuous": [],
    "atari": [
        "-     torch_threads: Count = ...  "
        "# CPU threads of torch; networks this small are slower with more",
        "+     torch_threads: Count = ...  # CPU threads of torch",
        "+     bf16 = not torch.cuda.is_available() "
        'and torch.cpu.get_capabilities().get("avx512_bf16")',
        '+     precision: Literal["fp32", "bf16"] = ...  # what the torso multiplies in',
    ],
}
TRAINING = {
    "continuous": [
        '+     saved |= {f"obs_{k}": torch.as_tensor(x) for k, x in vars(envs.obs_rms).items()}',
        "+     saved |= "
        '{f"return_{k}": torch.as_tensor(x) for k, x in vars(envs.return_rms).items()}',
        "+ ",
        "+         for rms in (envs.obs_rms, envs.return_rms):",
        "+             rms.merge()  # [X2]",
    ],
    "atari": [
        "-     agent = Agent(envs).to(device)",
        "+     agent = Agent(envs, args.precision).to(device)",
    ],
}

# What memory changes in ppo_atari.py, beside environment, network and training loop.
MEMORY = {
    "Configuration": [
        "-     compile: bool = True  "
        "# compile the update, which takes a while once; needs a C++ compiler",
        "-     num_minibatches: Count = 4  # minibatches per pass [C6]",
        "+     num_minibatches: Count = 4  "
        "# minibatches per pass, each of whole environments [C6] [L4]",
    ],
    "The algorithm": [
        "-     obs, actions, logprobs, values, advantages, returns = minibatch",
        "+     obs, starts, h, c, actions, logprobs, values, advantages, returns = minibatch",
        "-     policy, new_values = agent(obs)",
        "+     policy, new_values, _ = agent(obs, starts, (h, c))  # [L5]",
        "+     minibatch = [x[:, indices.to(x.device, non_blocking=True)] for x in batch]  # [L4]",
        "-     loss, stats = ppo_loss(agent, [x[indices] for x in batch], *coefficients)",
        "+     loss, stats = ppo_loss(agent, minibatch, *coefficients)",
    ],
    "Runs": [
        "- ",
        "- ",
        "- @functools.cache",
        "- def notice(message: str):",
        "-     if rank_of()[0] == 0:",
        '-         print("notice:", message, file=sys.stderr)',
        "-     if args.batch_size % args.num_minibatches:",
        "+     if args.num_envs % (args.num_minibatches * ranks):",
        '-         fail(f"{batch} cannot be divided into '
        '{args.num_minibatches} equal --num-minibatches")',
        '+         parts = f"{args.num_minibatches} equal --num-minibatches" '
        '+ f", {ranks} ranks" * (ranks > 1)',
        '+         fail(f"{args.num_envs} environments (--num-envs) '
        'cannot be divided into {parts}")',
        "+         state = torch.zeros(2, 1, N, 128, "
        'device=next(self.saved["agent"].parameters()).device)',
        "+         starts, state = np.ones(N, np.float32), state.unbind()",
        "+             actions, state = act(obs, starts, state)",
        "-             obs, _, _, _, info = envs.step(act(obs))",
        "+             obs, _, terminated, truncated, info = envs.step(actions)",
        "+             starts = np.float32(terminated | truncated)",
    ],
}

# What masked tokens, four models and one clip range per side change in the loss of ppo_discrete.py.
RLHF_LOSS = [
    "- obs, actions, logprobs, values, advantages, returns = minibatch",
    "+ def mean(x, lengths=1, number=sizes[0]):",
    "+ return (x * mask / lengths).sum() / number",
    "+ tokens, logprobs, values, advantages, returns, reference_logprobs, mask = minibatch",
    "+ by_response = (mask.sum(1, keepdim=True), sizes[1]) if sizes[1] else ()",
    "+ actions = tokens[:, -mask.shape[1] :].clamp(min=0)",
    "- policy, new_values = agent(obs)",
    "+ policy, new_values = agent(tokens)",
    "- logratio = policy.log_prob(actions) - logprobs",
    "+ new_logprobs = policy.log_prob(actions)",
    "+ logratio = (new_logprobs - logprobs).masked_fill(~mask, 0.0)",
    "+ approx_kl = mean(0.5 * logratio**2)",
    "- approx_kl = ((ratio - 1) - logratio).mean()",
    "- if norm_adv:",
    "- advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)",
    "- clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)",
    "+ clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef_high)",
    "- policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()",
    "+ surrogate = torch.min(ratio * advantages, clipped_ratio * advantages)",
    "+ policy_loss = -mean(surrogate, *by_response)",
    "- if kl_coef is not None:",
    "- policy_loss = -(ratio * advantages).mean() + kl_coef * approx_kl",
    "- value_losses = (new_values - returns) ** 2",
    "+ value_losses = unclipped_losses = (new_values - returns) ** 2",
    "- value_loss = 0.5 * value_losses.mean()",
    "+ value_loss = 0.5 * mean(value_losses)",
    "- entropy = policy.entropy().mean()",
    "- loss = policy_loss + vf_coef * value_loss - ent_coef * entropy",
    "+ loss = policy_loss + vf_coef * value_loss",
    "+ if kl_coef:",
    "+ logratio = (new_logprobs - reference_logprobs).masked_fill(~mask, 0.0)",
    '+ loss = loss + kl_coef * mean(kl_estimate(logratio, "k3"), *by_response)',
]

each_script = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
each_variant = pytest.mark.parametrize("name", ["continuous", "atari"])


def sections(source: str) -> dict[str, str]:
    """title -> text of a section, without the blank lines at its end"""
    _, *rest = BANNER.split(source)
    return dict(zip(rest[::2], map(str.rstrip, rest[1::2]), strict=True))


def changes(old: str, new: str) -> list[str]:
    return [x for x in difflib.ndiff(old.splitlines(), new.splitlines()) if x[0] in "+-"]


def function(source: str, name: str) -> str:
    """The text of a function."""
    return ast.get_source_segment(source, function_node(source, name))


def function_node(source: str, name: str) -> ast.AST:
    return next(node for node in ast.parse(source).body if getattr(node, "name", "") == name)


def without(source: str, name: str) -> str:
    """The text of a section without one of its functions."""
    return re.sub(rf"(?ms)^def {name}\(.+?(?=^def |^class )", "", source)


def without_docstrings(source: str) -> str:
    return re.sub(r'(?ms)^ +""".+?"""\n', "", source)


def imports(source: str) -> set[str]:
    """Names of the packages and modules imported anywhere in a script."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    from_ = {"." * x.level + (x.module or "") for x in nodes if isinstance(x, ast.ImportFrom)}
    return {name.partition(".")[0] for name in plain | from_}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """name -> requirement, extras and version included"""
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def dependencies(source: str) -> dict[str, Requirement]:
    """What the PEP 723 header of a script asks for."""
    (block,) = re.findall(r"(?m)^# /// script$\s((?:^#(?:| .*)$\s)+)^# ///$", source)
    header = tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(keepends=True)))
    assert set(header) == {"requires-python", "dependencies"}
    return requirements(header["dependencies"])


# ------------------------------------------------------------------------------------------------
# Sameness


@each_script
def test_sections(source):
    assert BANNER.findall(source) == TITLES
    assert len(re.findall(r"(?m)^# -{9,}$", source)) == len(TITLES)


@pytest.mark.parametrize("title", ["The algorithm", "Runs"])
@each_variant
def test_same_text(name, title):
    expected, actual = sections(SOURCES["discrete"])[title], sections(SOURCES[name])[title]
    assert changes(expected, actual) == []
    assert expected == actual


@each_variant
def test_training_differs_in_the_listed_lines(name):
    texts = [sections(SOURCES[x])["Training"] for x in ("discrete", name)]
    assert changes(*texts) == TRAINING[name]
    assert len(TRAINING[name]) <= 12


@each_variant
def test_configuration_differs_in_default_values(name):
    texts = [
        re.sub(r"(?m)^(    \w+: [^=]+ = ).+?(  # )", r"\1...\2", sections(SOURCES[x])[TITLES[0]])
        for x in ("discrete", name)
    ]
    assert changes(*texts) == CONFIGURATION[name]


@pytest.mark.parametrize("title", MEMORY)
def test_memory_changes_the_listed_lines(title):
    texts = [without_docstrings(sections(SOURCES[x])[title]) for x in ("atari", "atari_lstm")]
    texts[0] = without(texts[0], "compiled")  # its loop over time cannot be compiled
    assert changes(*texts) == MEMORY[title]


def test_memory_keeps_the_order_of_the_training_loop():
    """The comments that stand alone are its table of contents, and most lines are the same."""
    texts = [sections(SOURCES[x])["Training"] for x in ("atari", "atari_lstm")]
    contents = [re.findall(r"(?m)^ *#.+$", text) for text in texts]
    assert len(contents[0]) >= 6
    assert contents[0] == contents[1]
    assert len(changes(*texts)) <= 50


def test_rlhf_has_the_same_function():
    assert function(SOURCES["rlhf"], "gae") == function(SOURCES["discrete"], "gae")


@pytest.mark.parametrize("name", ["rank_of", "of_all_ranks", "fail", "say"])
def test_rlhf_knows_ranks_and_fails_in_the_same_way(name):
    assert function(SOURCES["rlhf"], name) == function(SOURCES["discrete"], name)


def test_rlhf_changes_the_listed_lines_of_the_loss():
    texts = []
    for name in ("discrete", "rlhf"):
        text = without_docstrings(function(SOURCES[name], "ppo_loss"))
        lines = text.partition("    stats = {")[0].splitlines()[1:]
        texts.append("\n".join(line.partition("  #")[0].strip() for line in lines if line))
    assert changes(*texts) == RLHF_LOSS


def test_rlhf_has_the_order_of_the_training_loop():
    """Its comments that stand alone, with a stage of its own: the rewards."""
    texts = [SOURCES["discrete"], function(SOURCES["rlhf"], "train_ppo")]
    contents = [re.findall(r"(?m)^        # (.+)$", text) for text in texts]
    contents[0] = [line for line in contents[0] if line in contents[1] or ":" in line]
    assert [line.partition(":")[0] for line in contents[1]] == [
        "rollout",
        "log-probabilities and values under the policy that acted, which is still the current one",
        "rewards",
        "advantages and value targets",
        "update",
        "log",
    ]
    assert set(contents[1]) - set(contents[0]) == {
        "rollout: B responses, G to each prompt",
        "rewards: the score at the end, the KL penalty all the way",
    }


# ------------------------------------------------------------------------------------------------
# Length and form


@each_script
def test_budget(source):
    learning, runs = (
        text.rstrip().count("\n") + 1 for text in source.split(f"# {'-' * 96}\n# Runs\n")
    )
    if "class Transformer" in source:
        algorithm = sections(source)["The algorithm"] + function(source, "train_ppo")
        assert algorithm.count("\n") <= 400, "too much in The algorithm and train_ppo"
        assert learning + runs <= 2125
    else:
        assert learning <= (485 if "nn.LSTM" in source else 460), "too much before Runs"
        assert runs <= 604, "too much in Runs"


@each_script
def test_lines(source):
    assert source.isascii()
    assert [line for line in source.splitlines() if len(line) > 100] == []
    assert re.findall(r"TODO|FIXME|XXX", source) == []


@each_script
def test_every_argument_is_explained(source):
    lines = source.splitlines()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    (args,) = [node for node in classes if node.name == "Args"]
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    assert len(fields) > 20
    for field in fields:
        assert field.lineno == field.end_lineno
        assert re.fullmatch(r"  # \S.+", lines[field.lineno - 1][field.end_col_offset :])


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    command = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_paths_of_one_machine():
    """In what git tracks: absolute paths of folders that only one machine has."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    pattern = re.compile(rb"(?<![\w.~}/-])/(?:work|root|home|tmp|mnt|Users)\b[^\n]*")
    paths = [ROOT / file for file in files.split("\0") if (ROOT / file).is_file()]
    found = {path: pattern.findall(path.read_bytes()) for path in paths}
    found = {path.name: matches for path, matches in found.items() if matches}
    assert found == {}


# ------------------------------------------------------------------------------------------------
# A script is enough


@each_script
def test_imports_nothing_of_this_repository(source):
    modules = {path.stem for pattern in ("*.py", "*/*.py") for path in ROOT.glob(pattern)}
    assert imports(source) & (modules | {"benchmarks", "docs", "tests", ""}) == set()


@each_script
def test_header_pins_what_requirements_txt_pins(source):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = requirements([line for line in lines if not line.startswith("#")])
    for name, dependency in dependencies(source).items():
        assert dependency == pinned[name]
        assert re.fullmatch(r"==[\d.]+", str(dependency.specifier))


@each_script
def test_optional_packages_are_pinned_but_not_in_the_header(source):
    """What only some flags need is asked for where it is used, by its name."""
    optional = set(re.findall(r'package\("(\w+)"', source)) - {"wandb"}
    assert optional == ({"transformers", "datasets", "peft"} if "class Texts" in source else set())
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = requirements([line for line in lines if not line.startswith("#")])
    assert optional <= pinned.keys()
    assert optional & dependencies(source).keys() == set()


@each_script
def test_header_covers_the_imports(source):
    """Each package imported is a dependency or comes with an extra of one, none is left over."""
    named = dependencies(source)
    extras = {
        canonicalize_name(needed.name)
        for name, dependency in named.items()
        for needed in map(Requirement, importlib.metadata.requires(name) or [])
        if needed.marker
        and any(needed.marker.evaluate({"extra": extra}) for extra in dependency.extras)
    }
    distributions = importlib.metadata.packages_distributions()
    imported = [
        {canonicalize_name(name) for name in distributions[module]}
        for module in imports(source) - sys.stdlib_module_names
    ]
    assert set().union(*[names for names in imported if not names & extras]) == set(named)


def test_version_is_that_of_the_citation():
    """config.json of a run names it."""
    (version,) = re.findall(r"(?m)^version: (\S+)$", (ROOT / "CITATION.cff").read_text())
    for source in SOURCES.values():
        assert f'"versions": {{"ppo37": "{version}", ' in source
