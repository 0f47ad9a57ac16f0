"""The same comparisons on a GPU, in under nine minutes, from a checkout: python benchmarks/gpu.py

Needs no network and no weights: the model is SmolLM2-135M's shape with random weights, which cost the same time. What
it needs beside torch and transformers is in benchmarks/README.md. transformers and TRL take part if they can be
imported, another peer if its environment is at benchmarks/envs. Results go to benchmarks/results-gpu.json and
RESULTS.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src"), str(HERE.parent / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")]))

import torch  # noqa: E402
from run import LONG, SHORT, keep  # noqa: E402
from tiny import build_tiny_model  # noqa: E402

from opentao.bench.command import run_bench  # noqa: E402
from opentao.bench.run import DOES, ENVIRONMENTS, BenchError  # noqa: E402

BUDGET_S = 7 * 60  # no comparison is started after that
CASES = {  # kind, prompts, tokens a prompt
    "generate-short": ("generate", 64, SHORT),
    "generate-long": ("generate", 64, LONG),
    "score-long": ("score", 16, LONG),
    "train-long": ("train", 4, LONG),
    "train-short": ("train", 16, SHORT),
    "round-long": ("round", 4, LONG),
    "round-short": ("round", 16, SHORT),
    "reward-train-long": ("reward-train", 8, LONG),
}


def random_smollm(folder: Path) -> Path:
    """SmolLM2-135M's shape, random weights, the tests' small tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    build_tiny_model(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def here_as_environment(folder: Path) -> Path:
    """This interpreter as transformers' environment."""
    script = folder / "bin" / "python"
    script.parent.mkdir(parents=True)
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return folder


def device() -> str:
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return f"{torch.cuda.get_device_name()}, driver {driver.stdout.strip()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help=f"one of: {', '.join(CASES)}; none: all")
    given = parser.parse_args()
    if unknown := set(given.name) - set(CASES):
        parser.error(f"no such comparison: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    os.chdir(HERE.parent)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = random_smollm(Path(folder) / "model")
        here = here_as_environment(Path(folder) / "env")
        mine = [p for p in ("transformers", "trl") if importlib.util.find_spec(p)]
        environments = [f"{peer}={here}" for peer in mine]
        for name, (kind, prompts, tokens) in CASES.items():
            if given.name and name not in given.name:
                continue
            if time.perf_counter() - start > BUDGET_S:
                print(f"{name}: not started, {BUDGET_S} s are over", flush=True)
                continue
            sizes = {"prompts": prompts, "prompt_tokens": tokens, "group_size": 8, "new_tokens": 64}
            present = [p for p in DOES if kind in DOES[p] and (p in mine or (ENVIRONMENTS / p).exists())]
            peers = [p for p in present if p != "llama.cpp"]
            settings = {"dtype": "bfloat16", "lora": True, "repeats": 3}
            try:
                result = run_bench(kind, sizes, str(model), peers, environments, settings)  # type: ignore[arg-type]
            except BenchError as error:
                print(f"{name}: {error}", flush=True)
                continue
            keep(HERE / "results-gpu.json", name, result, device())
            if out := os.environ.get("OUT"):  # what comes back from a machine that is lent
                shutil.copy(HERE / "results-gpu.json", out)
            print(f"{name}: {json.dumps(result['times_faster'])} ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
