"""llama.cpp as a peer of the benchmark: N responses a prompt as parallel sequences that share the prompt's keys.

A stand-alone script for an environment of its own (it needs `llama-cpp-python` alone, never opentao):

    python llama_cpp_peer.py SPEC.json      # prints {"ready": true, ...}; every line `go` then runs once, to the end

The textbook loop (examples/batched of llama.cpp) is kept: a prompt is decoded once, `llama_memory_seq_cp` hands its
keys and values to the other responses of its group, and every step decodes one token of each sequence in one batch.
Groups run in waves of equal size, which loses nothing to continuous batching since all responses are equally long.
Left to the warm-up is what depends on the machine: see `CHOICES`. Sampling is llama.cpp's own chain (temperature, then
a draw from the full distribution, one seed a sequence); its calls are spread over the threads, which the library
leaves to its user.
"""

import ctypes
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

BATCH_TOKENS = 2048  # most tokens handed to one `llama_decode`
MICRO_BATCH_TOKENS = 512  # most tokens in one pass over the weights: above all sequence counts below
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ, a constant of the library
FILE_TYPES = {"float32": ["F32"], "bfloat16": ["BF16", "F16"], "int8": ["Q8_0"]}  # the first is where tuning starts
FILE_TYPE_NAMES = {"F32": "LLAMA_FTYPE_ALL_F32"}  # the others are LLAMA_FTYPE_MOSTLY_<type>
TUNING_STEPS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """What to time.

    Example: Spec(prompt_ids=[[1, 9690], [1, 253]], group_size=8, new_tokens=64, temperature=1.0, dtype="float32",
    threads=2, gguf=Path("SmolLM2-135M-Instruct.Q4_1.gguf"), parallel=None)
    """

    prompt_ids: list[list[int]]
    group_size: int  # responses a prompt
    new_tokens: int  # sampled tokens a response
    temperature: float
    dtype: str  # a key of FILE_TYPES
    threads: int
    gguf: Path  # the model in any quantisation
    parallel: int | None  # sequences decoded together; None: the fastest found in the warm-up

    @classmethod
    def read(cls, path: Path) -> "Spec":
        """Raises ValueError for another kind of benchmark than `generate` and for what llama.cpp cannot hold."""
        raw = json.loads(path.read_text())
        if raw["kind"] != "generate":
            raise ValueError(f"llama.cpp is timed at `generate` only, not {raw['kind']!r}")
        if raw["group_size"] > MAX_SEQUENCES:
            raise ValueError(f"group_size {raw['group_size']} is above the {MAX_SEQUENCES} sequences of llama.cpp")
        names = ("prompt_ids", "group_size", "new_tokens", "temperature", "dtype", "threads")
        options = raw["options"]
        return cls(**{name: raw[name] for name in names}, gguf=Path(options["gguf"]), parallel=options.get("parallel"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How to run it, e.g. Setting(file_type="F32", keys="F16", unified=False, flash=True, num_groups=16)."""

    file_type: str  # of the weights
    keys: str  # type of the key/value cache
    unified: bool  # one key/value buffer that all sequences scan, or one for each sequence
    flash: bool  # flash attention
    num_groups: int  # prompts in one wave; times group_size = parallel sequences


class Row(NamedTuple):
    """One token of a batch, e.g. Row(token=9690, position=1, sequence=0, output=True)."""

    token: int
    position: int
    sequence: int
    output: bool  # its logits are wanted


class Engine:
    """A loaded model with one context, sized for one wave of a Spec under one Setting."""

    def __init__(self, llama: ModuleType, spec: Spec, setting: Setting) -> None:
        self.llama, self.spec, self.setting = llama, spec, setting
        self.num_sequences = setting.num_groups * spec.group_size
        self.pool = ThreadPoolExecutor(spec.threads)
        params = llama.llama_model_default_params()
        path = in_file_type(llama, spec.gguf, setting.file_type)
        self.model = llama.llama_model_load_from_file(os.fsencode(path), params)
        self.context = llama.llama_init_from_model(self.model, self.context_params())
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context for {setting}")
        self.batch = llama.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.samplers = [self.sampler(seed) for seed in range(self.num_sequences)]

    def context_params(self) -> ctypes.Structure:
        spec, setting, llama = self.spec, self.setting, self.llama
        params = llama.llama_context_default_params()
        params.n_ctx = num_cells(spec, setting)
        params.n_seq_max = self.num_sequences
        params.n_batch, params.n_ubatch = BATCH_TOKENS, MICRO_BATCH_TOKENS
        params.n_threads = params.n_threads_batch = spec.threads
        params.kv_unified = setting.unified
        params.flash_attn_type = int(setting.flash)
        params.type_k = params.type_v = getattr(llama, f"GGML_TYPE_{setting.keys}")
        return params

    def sampler(self, seed: int) -> ctypes.c_void_p:
        llama = self.llama
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_temp(self.spec.temperature))
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(seed))
        return chain

    def close(self) -> None:
        self.pool.shutdown()
        for sampler in self.samplers:
            self.llama.llama_sampler_free(sampler)
        self.llama.llama_batch_free(self.batch)
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)

    def generate(self) -> list[list[int]]:
        """One response of `new_tokens` ids for each prompt and member of its group, wave by wave."""
        prompts, size = self.spec.prompt_ids, self.setting.num_groups
        waves = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        return [response for wave in waves for response in self.generate_wave(wave)]

    def generate_wave(self, prompts: list[list[int]]) -> list[list[int]]:
        responses = [[token] for token in self.read_prompts(prompts)]
        lengths = [len(prompt) for prompt in prompts] * self.spec.group_size
        for step in range(self.spec.new_tokens - 1):
            tokens = self.step([r[-1] for r in responses], [length + step for length in lengths])
            for response, token in zip(responses, tokens, strict=True):
                response.append(token)
        return responses

    def read_prompts(self, prompts: list[list[int]]) -> list[int]:
        """Decodes each prompt once, shares it with its group and samples the first token of every sequence.

        Response n of prompt p is sequence n · len(prompts) + p: the prompts are the first sequences, side by side,
        as separate key/value buffers need them in order to be decoded in one batch.
        """
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), False)
        rows = [
            Row(token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        firsts: dict[int, int] = {}
        for start in range(0, len(rows), BATCH_TOKENS):
            chunk = rows[start : start + BATCH_TOKENS]
            self.decode(chunk)
            ends = [(index, row.sequence) for index, row in enumerate(chunk) if row.output]
            firsts |= self.sample_groups(ends, len(prompts))
        self.share(len(prompts))
        return [firsts[sequence] for sequence in range(len(prompts) * self.spec.group_size)]

    def sample_groups(self, ends: list[tuple[int, int]], num_prompts: int) -> dict[int, int]:
        """First tokens by sequence: each member of a group draws from the logits of the same row."""
        members = range(self.spec.group_size)
        draws = [(row, member * num_prompts + prompt) for row, prompt in ends for member in members]
        return dict(zip([sequence for _, sequence in draws], self.sample(draws), strict=True))

    def share(self, num_prompts: int) -> None:
        memory = self.llama.llama_get_memory(self.context)
        for sequence in range(num_prompts, num_prompts * self.spec.group_size):
            self.llama.llama_memory_seq_cp(memory, sequence % num_prompts, sequence, -1, -1)

    def step(self, tokens: list[int], positions: list[int]) -> list[int]:
        """Feeds one token to each sequence and samples the next."""
        self.decode([Row(t, p, s, True) for s, (t, p) in enumerate(zip(tokens, positions, strict=True))])
        return self.sample([(s, s) for s in range(len(tokens))])

    def decode(self, rows: list[Row]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, row in enumerate(rows):
            batch.token[index], batch.pos[index], batch.logits[index] = row.token, row.position, row.output
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row.sequence
        status = self.llama.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {len(rows)} tokens returned {status}")

    def sample(self, draws: list[tuple[int, int]]) -> list[int]:
        """Draws tokens for (row of the batch, sequence), each sequence with its own sampler chain."""
        if not draws:
            return []
        self.llama.llama_get_logits_ith(self.context, draws[0][0])  # waits and orders the rows: the rest only reads
        return list(self.pool.map(self.sample_one, draws))

    def sample_one(self, draw: tuple[int, int]) -> int:
        row, sequence = draw
        return self.llama.llama_sampler_sample(self.samplers[sequence], self.context, row)

    def speed(self) -> float:
        """Tokens a second half way through a wave, from a few steps after feeding the first half as if sampled."""
        prompts = self.spec.prompt_ids[: self.setting.num_groups]
        tokens = self.read_prompts(prompts)
        half = self.spec.new_tokens // 2
        lengths = [len(prompt) for prompt in prompts] * self.spec.group_size
        rows = [
            Row(tokens[sequence], length + offset, sequence, False)
            for sequence, length in enumerate(lengths)
            for offset in range(half)
        ]
        for start in range(0, len(rows), BATCH_TOKENS):
            self.decode(rows[start : start + BATCH_TOKENS])
        start_seconds = time.perf_counter()
        for step in range(TUNING_STEPS):
            self.step(tokens, [length + half + step for length in lengths])
        return TUNING_STEPS * len(tokens) / (time.perf_counter() - start_seconds)


def num_cells(spec: Spec, setting: Setting) -> int:
    """Places in the key/value cache, in the library's blocks of 256."""
    longest = max(len(prompt) for prompt in spec.prompt_ids)
    num_sequences = setting.num_groups * spec.group_size
    if setting.unified:
        return padded(setting.num_groups * longest + num_sequences * spec.new_tokens)
    return num_sequences * padded(longest + spec.new_tokens)


def padded(count: int) -> int:
    return -(-count // 256) * 256


def in_file_type(llama: ModuleType, gguf: Path, file_type: str) -> Path:
    """The model's weights in another type, made once and kept in the temporary folder."""
    folder = Path(tempfile.gettempdir()) / "opentao-llama-cpp"
    target = folder / f"{gguf.stem}-{gguf.stat().st_mtime_ns}-{file_type}.gguf"
    if target.exists():
        return target
    folder.mkdir(exist_ok=True)
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, FILE_TYPE_NAMES.get(file_type, f"LLAMA_FTYPE_MOSTLY_{file_type}"))
    params.allow_requantize = True
    unfinished = target.with_suffix(f".{os.getpid()}")
    if llama.llama_model_quantize(os.fsencode(gguf), os.fsencode(unfinished), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp could not turn {gguf.name} into {file_type}")
    return unfinished.replace(target)
