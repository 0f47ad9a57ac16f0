"""The benchmark's parent with real workers on the tiny model: turns, medians, exact prompt lengths, named failures."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from opentao.bench import run as run_module
from opentao.bench.case import Case, make_prompts, make_responses
from opentao.bench.command import run_bench
from opentao.bench.run import BenchError, Worker, as_text, bench, interpreter
from opentao.cli import app
from opentao.models import load_tokenizer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SIZES = {"prompts": 2, "prompt_tokens": 30, "group_size": 2, "new_tokens": 4}
SETTINGS = {"dtype": "float32", "lora": True, "repeats": 3}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> str:
    """This interpreter as a peer's environment: transformers is installed in it."""
    folder = tmp_path_factory.mktemp("env")
    (folder / "bin").mkdir()
    script = folder / "bin" / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize("length", [20, 31, 200])
def test_prompts_have_exactly_so_many_tokens_and_differ_early(tiny_model_dir: Path, length: int) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    frame = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], add_generation_prompt=True, return_dict=False
    )
    prompts = make_prompts(tokenizer, 5, length)
    assert [len(p) for p in prompts] == [length] * 5
    assert len({tuple(p[: len(frame) + 4]) for p in prompts}) == 5
    assert all(p[-3:] == frame[-3:] for p in prompts)  # the template closes the message
    assert prompts == make_prompts(tokenizer, 5, length)


def test_a_prompt_shorter_than_the_template_is_refused(tiny_model_dir: Path) -> None:
    sizes = SIZES | {"prompt_tokens": 3}
    with pytest.raises(BenchError, match=r"--prompt-tokens: the chat template alone has \d+ tokens"):
        run_bench("generate", sizes, str(tiny_model_dir), [], [], dict(SETTINGS))


def test_bf16_is_refused_where_ours_would_take_fp32(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer would be timed in bf16, which is slower there."""
    monkeypatch.setattr("opentao.bench.command.native_bf16", lambda device: False)
    with pytest.raises(BenchError, match="--dtype bfloat16: OpenTAO's `train` multiplies in fp32 here"):
        run_bench("train", SIZES, str(tiny_model_dir), [], [], SETTINGS | {"dtype": "bfloat16"})


def test_a_peers_choice_is_by_time_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices that do different amounts of work: the one that does least is not the fastest for it."""
    monkeypatch.syspath_prepend(str(Path(run_module.__file__).parent / "peers"))
    from transformers_peer import fastest

    clock = iter(float(t) for t in (0, 1, 10, 12))  # a second for one token, two for eight
    monkeypatch.setattr("transformers_peer.time.perf_counter", lambda: next(clock))
    assert fastest({"small": lambda: 1, "large": lambda: 8}) == "large"


@pytest.mark.parametrize("kind", ["generate", "score"])
def test_side_by_side_with_transformers(
    tiny_model_dir: Path, here: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    real = Worker.turn
    monkeypatch.setattr(Worker, "turn", lambda self: turns.append(self.label) or real(self))
    result = run_bench(kind, SIZES, str(tiny_model_dir), ["transformers"], [f"transformers={here}"], dict(SETTINGS))
    ours, peer = result["systems"]
    assert (ours["name"], peer["name"]) == ("opentao", "transformers")
    assert turns == ["opentao", "transformers"] * 3
    for system in (ours, peer):
        assert system["tokens"] == 2 * 2 * 4  # equal work
        assert len(system["seconds"]) == 3
        assert system["median_s"] == sorted(system["seconds"])[1]
        assert system["tokens_per_second"] == pytest.approx(16 / system["median_s"])
        assert system["peak_bytes"] > 10**7
    assert result["times_faster"] == {"transformers": pytest.approx(peer["median_s"] / ours["median_s"])}
    assert all(v > 0 for v in result["limit_tokens_per_second"].values())
    assert "transformers" in as_text(result) and "×" in as_text(result)


@pytest.mark.parametrize("kind", ["reward-train", "round"])  # `train`: below, by the command
def test_our_side_of_every_kind(tiny_model_dir: Path, kind: Any) -> None:
    result = run_bench(kind, SIZES, str(tiny_model_dir), [], [], SETTINGS | {"repeats": 1})
    assert result["systems"][0]["tokens"] > 0 and result["times_faster"] == {}


def test_a_short_run_is_done_twice_and_the_second_counts(tmp_path: Path) -> None:
    code = (
        "import sys\nprint('{\"ready\": true}', flush=True)\n"
        "for s in (5, 7, 30, 50): sys.stdin.readline(); print('{\"seconds\": %d}' % s, flush=True)"
    )
    worker = Worker([sys.executable, "-c", code], tmp_path, "peer")
    assert [worker.turn()["seconds"] for _ in range(3)] == [7, 30, 50]
    worker.close()


def test_a_missing_peer_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"vllm: no environment at .*; benchmarks/README.md says how"):
        interpreter("vllm", "generate", {"vllm": tmp_path})
    with pytest.raises(BenchError, match=r"--vs vlm: expected one of: transformers, trl, vllm, llama\.cpp"):
        interpreter("vlm", "generate", {})
    with pytest.raises(BenchError, match=r"--vs trl: does not score; it does: reward-train, round, train"):
        interpreter("trl", "score", {})


def test_a_worker_that_dies_tells_its_last_words(tmp_path: Path) -> None:
    code = "import sys\nprint('{\"ready\": true}', flush=True)\nsys.stdin.readline()\nsys.exit('out of luck')"
    worker = Worker([sys.executable, "-c", code], tmp_path, "peer")
    with pytest.raises(BenchError, match="peer: died: out of luck"):
        worker.go()
    worker.close()
    with pytest.raises(BenchError, match=r"peer: died: .*No such file"):
        Worker([sys.executable, str(tmp_path / "none.py")], tmp_path, "peer")


def test_a_peers_error_is_one_line(tiny_model_dir: Path, here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run_module.DOES, "transformers", {"train"})
    case = Case(kind="train", model=str(tiny_model_dir), prompt_ids=[[1, 5, 6]], group_size=2, new_tokens=2)
    make_responses(case, 400)
    with pytest.raises(BenchError, match="transformers: KeyError: 'train'"):
        bench(case, ["transformers"], {"transformers": Path(here)}, 1)


def test_the_command_prints_json(tiny_model_dir: Path) -> None:
    options = ["--prompts", "1", "--prompt-tokens", "30", "--group-size", "2", "--new-tokens", "2", "--repeats", "1"]
    done = CliRunner().invoke(app, ["bench", "train", "--model", str(tiny_model_dir), *options, "--json"])
    assert done.exit_code == 0, done.output
    [ours] = json.loads(done.stdout)["systems"]
    assert ours["name"] == "opentao" and ours["tokens"] > 0
    failed = CliRunner().invoke(app, ["bench", "generate", "--model", str(tiny_model_dir), "--vs", "no", *options])
    assert failed.exit_code == 1 and "--vs no: expected one of" in failed.output


# ---------------------------------------------------------------------------------------------------- benchmarks/


def benchmarks_run() -> Any:
    spec = importlib.util.spec_from_file_location("benchmarks_run", BENCHMARKS / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_of_results_is_what_the_script_writes() -> None:
    cpu, gpu, reward = (
        json.loads(path.read_text()) if path.exists() else {}
        for path in (BENCHMARKS / name for name in ("results.json", "results-gpu.json", "reward_results.json"))
    )
    assert (BENCHMARKS / "RESULTS.md").read_text() == benchmarks_run().page(cpu, gpu, reward)


def test_pages_that_show_what_was_measured_are_what_the_script_writes() -> None:
    for path, text in benchmarks_run().evidence_documents().items():
        assert path.read_text(encoding="utf-8") == text, path


def test_a_bar_is_held_or_not() -> None:
    run = benchmarks_run()
    result = {
        "kind": "generate",
        "times_faster": {"llama.cpp": 1.5, "vllm": 2.9},
        "limit_tokens_per_second": {"128": 500.0, "256": 600.0},
        "systems": [{"tokens_per_second": 420.0}],
    }
    rows = [(what.rpartition(": ")[2], value, held) for what, value, _, held in run.bars("generate-short", result)]
    assert rows == [
        ("faster than vllm", 2.9, False),
        ("faster than llama.cpp", 1.5, True),
        ("share of the matrix-product limit", 0.7, True),
    ]
    [(what, value, bound, held)] = run.bars("growth-responses", {"kind": "growth", "ratio": 1.6})
    assert "N from 8 to 16" in what and (value, bound, held) == (1.6, "at most 1.5×", False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_script_says_that_there_is_none() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (1, "no CUDA device")
