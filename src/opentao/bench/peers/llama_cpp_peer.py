"""llama.cpp as a peer: N responses a prompt as parallel sequences that share the prompt's keys.

A prompt is decoded once, `llama_memory_seq_cp` hands its keys and values to the other responses of its group, and every
step decodes one token of each sequence in one batch. Groups run in waves of equal size, which loses nothing to
continuous batching since all responses are equally long. The warm-up tries how many sequences at once, one key/value
buffer for all or one for each, and the buffer's type. Sampling is llama.cpp's own chain, spread over the threads.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp as llama
from common import Answers, guarded, read_case, serve

BATCH_TOKENS = 2048  # most tokens handed to one `llama_decode`
MICRO_BATCH_TOKENS = 512  # most tokens in one pass over the weights
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ, a constant of the library
FILE_TYPES = {"float32": "ALL_F32", "bfloat16": "MOSTLY_BF16", "int8": "MOSTLY_Q8_0"}
TUNING_STEPS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How to run it, e.g. Setting(keys="F16", unified=False, num_groups=16)."""

    keys: str  # type of the key/value cache
    unified: bool  # one key/value buffer that all sequences scan, or one for each sequence
    num_groups: int  # prompts in one wave; times group_size = parallel sequences


class Row(NamedTuple):
    """One token of a batch, e.g. Row(token=9690, position=1, sequence=0, output=True)."""

    token: int
    position: int
    sequence: int
    output: bool  # its logits are wanted


class Engine:
    """A model with one context, sized for one wave of a case under one setting."""

    def __init__(self, model: Any, case: dict[str, Any], setting: Setting) -> None:
        self.case, self.setting = case, setting
        self.prompts, self.size = case["prompt_ids"], case["group_size"]
        self.num_sequences = setting.num_groups * self.size
        self.pool = ThreadPoolExecutor(case["threads"])
        self.context = llama.llama_init_from_model(model, self._context_params())
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context for {setting}")
        self.batch = llama.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.samplers = [self._sampler(seed) for seed in range(self.num_sequences)]

    def _context_params(self) -> ctypes.Structure:
        params = llama.llama_context_default_params()
        params.n_ctx = self._num_cells()
        params.n_seq_max = self.num_sequences
        params.n_batch, params.n_ubatch = BATCH_TOKENS, MICRO_BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self.case["threads"]
        params.kv_unified = self.setting.unified
        params.type_k = params.type_v = getattr(llama, f"GGML_TYPE_{self.setting.keys}")
        return params

    def _num_cells(self) -> int:
        """Places in the key/value cache, in the library's blocks of 256."""
        longest, new = max(map(len, self.prompts)), self.case["new_tokens"]
        if self.setting.unified:
            return padded(self.setting.num_groups * longest + self.num_sequences * new)
        return self.num_sequences * padded(longest + new)

    def _sampler(self, seed: int) -> Any:
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_temp(self.case["temperature"]))
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(seed))
        return chain

    def close(self) -> None:
        self.pool.shutdown()
        for sampler in self.samplers:
            llama.llama_sampler_free(sampler)
        llama.llama_batch_free(self.batch)
        llama.llama_free(self.context)

    def generate(self, new_tokens: int, num_prompts: int) -> int:
        """Make that many tokens for each response of the first prompts, wave by wave. Returns how many in all."""
        prompts = self.prompts[:num_prompts]
        step = self.setting.num_groups
        waves = [prompts[i : i + step] for i in range(0, len(prompts), step)]
        return sum(self._wave(wave, new_tokens) for wave in waves)

    def _wave(self, prompts: list[list[int]], new_tokens: int) -> int:
        tokens = self._read_prompts(prompts)
        lengths = [len(prompt) for prompt in prompts] * self.size
        for step in range(new_tokens - 1):
            self._decode([Row(t, n + step, s, True) for s, (t, n) in enumerate(zip(tokens, lengths, strict=True))])
            tokens = self._sample([(s, s) for s in range(len(tokens))])
        return len(tokens) * new_tokens

    def _read_prompts(self, prompts: list[list[int]]) -> list[int]:
        """Decode each prompt once, share it with its group and sample the first token of every sequence.

        Response n of prompt p is sequence n · len(prompts) + p: the prompts are the first sequences, side by side,
        as separate key/value buffers need them in order to be decoded in one batch.
        """
        memory = llama.llama_get_memory(self.context)
        llama.llama_memory_clear(memory, False)
        rows = [
            Row(token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        firsts: dict[int, int] = {}
        for start in range(0, len(rows), BATCH_TOKENS):
            chunk = rows[start : start + BATCH_TOKENS]
            self._decode(chunk)
            ends = [(i, row.sequence) for i, row in enumerate(chunk) if row.output]
            draws = [(i, n * len(prompts) + p) for i, p in ends for n in range(self.size)]
            firsts |= dict(zip([s for _, s in draws], self._sample(draws), strict=True))
        for sequence in range(len(prompts), len(prompts) * self.size):
            llama.llama_memory_seq_cp(memory, sequence % len(prompts), sequence, -1, -1)
        return [firsts[sequence] for sequence in range(len(prompts) * self.size)]

    def _decode(self, rows: list[Row]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, row in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = row.token, row.position, row.output
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row.sequence
        status = llama.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {len(rows)} tokens returned {status}")

    def _sample(self, draws: list[tuple[int, int]]) -> list[int]:
        """Draw tokens for (row of the batch, sequence), each sequence with its own sampler chain."""
        if not draws:
            return []
        llama.llama_get_logits_ith(self.context, draws[0][0])  # waits and orders the rows: the rest only reads
        return list(self.pool.map(lambda d: llama.llama_sampler_sample(self.samplers[d[1]], self.context, d[0]), draws))


def padded(count: int) -> int:
    return -(-count // 256) * 256


def in_file_type(gguf: Path, file_type: str) -> Path:
    """The model's weights in another type, made once and kept in the temporary folder."""
    folder = Path(tempfile.gettempdir()) / "opentao-llama-cpp"
    target = folder / f"{gguf.stem}-{gguf.stat().st_size}-{file_type}.gguf"
    if target.exists():
        return target
    folder.mkdir(exist_ok=True)
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_{file_type}")
    params.allow_requantize = True
    unfinished = target.with_suffix(f".{os.getpid()}")
    if llama.llama_model_quantize(os.fsencode(gguf), os.fsencode(unfinished), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp could not turn {gguf.name} into {file_type}")
    return unfinished.replace(target)


def settings(case: dict[str, Any]) -> list[Setting]:
    groups = len(case["prompt_ids"])
    most = min(groups, MAX_SEQUENCES // case["group_size"])
    counts = sorted({most, max(1, most // 2), max(1, most // 4)})
    keys = ("F16", "F32") if case["dtype"] == "float32" else ("F16",)
    return [Setting(keys=k, unified=u, num_groups=n) for n in counts for u in (False, True) for k in keys]


def fastest(model: Any, case: dict[str, Any]) -> Setting:
    """By a few tokens of one wave: prompts and first steps in proportion to a whole run."""
    speeds: dict[Setting, float] = {}
    for setting in settings(case):
        try:
            engine = Engine(model, case, setting)
        except RuntimeError:
            continue
        try:
            start = time.perf_counter()
            engine.generate(1, setting.num_groups)
            prompts_s = time.perf_counter() - start
            start = time.perf_counter()
            engine.generate(1 + TUNING_STEPS, setting.num_groups)
            step_s = max(0.0, time.perf_counter() - start - prompts_s) / TUNING_STEPS
            wave_s = prompts_s + (case["new_tokens"] - 1) * step_s
            speeds[setting] = setting.num_groups / wave_s
        except RuntimeError:
            pass
        finally:
            engine.close()
    if not speeds:
        raise RuntimeError("llama.cpp ran under none of the settings")
    return max(speeds, key=lambda setting: speeds[setting])


def main(answers: Answers) -> None:
    case = read_case()
    if case["group_size"] > MAX_SEQUENCES:
        raise ValueError(f"group_size {case['group_size']} is above the {MAX_SEQUENCES} sequences of llama.cpp")
    llama.llama_log_set(QUIET, ctypes.c_void_p(0))
    gguf = in_file_type(Path(case["options"]["gguf"]), FILE_TYPES[case["dtype"]])
    model = llama.llama_model_load_from_file(os.fsencode(gguf), llama.llama_model_default_params())
    setting = fastest(model, case)
    engine = Engine(model, case, setting)
    buffers = "one buffer" if setting.unified else "a buffer each"
    config = f"{case['dtype']}, {engine.num_sequences} sequences at once, {buffers}, keys {setting.keys.lower()}"
    work: Callable[[], int] = lambda: engine.generate(case["new_tokens"], len(case["prompt_ids"]))  # noqa: E731
    serve(answers, work, name="llama.cpp", version=f"llama-cpp-python {llama.__version__}", config=config)


@llama.llama_log_callback
def QUIET(level: int, text: bytes, user_data: Any) -> None:
    pass


if __name__ == "__main__":
    guarded(main)
