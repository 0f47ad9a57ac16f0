"""Names, refusals, loading, chat templates."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from opentao.errors import ModelError
from opentao.models import (
    DEFAULT_MODEL,
    ensure_chat_template,
    load_causal_lm,
    load_classifier,
    load_model,
    load_tokenizer,
    resolve_model,
)

WEIGHTS = "model.safetensors"
CHAT = [{"role": "user", "content": "Where is my parcel?"}]


class TestNames:
    def test_folder_is_returned(self, tiny_model_dir: Path) -> None:
        assert resolve_model(str(tiny_model_dir)) == tiny_model_dir

    @pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "org/model-1.5_b"])
    def test_hub_name_is_returned_as_it_is(self, name: str) -> None:
        assert resolve_model(name) == name

    @pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "~/absent", "a b", "-a/b"])
    def test_neither(self, name: str) -> None:
        with pytest.raises(ModelError, match=f"expected a built-in name .*{DEFAULT_MODEL}.* folder .* hub name"):
            resolve_model(name)

    def test_file_is_not_a_model(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").touch()
        with pytest.raises(ModelError, match="existing folder"):
            resolve_model(str(tmp_path / "model.gguf"))

    def test_folder_without_config(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no config\.json"):
            resolve_model(str(tmp_path))

    @pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.pt"])
    def test_pickled_weights_are_refused(self, tiny_model_dir: Path, tmp_path: Path, weights: str) -> None:
        shutil.copytree(tiny_model_dir, tmp_path / "model")
        (tmp_path / "model" / WEIGHTS).rename(tmp_path / "model" / weights)
        with pytest.raises(ModelError, match=f"found {weights}; only safetensors are loaded"):
            load_causal_lm(str(tmp_path / "model"), dtype=torch.float32)


class TestLoading:
    def test_model_and_tokenizer(self, tiny_model_dir: Path) -> None:
        model, tokenizer = load_model(str(tiny_model_dir), dtype=torch.float64)
        assert (model.dtype, model.training, model.config._attn_implementation) == (torch.float64, False, "sdpa")
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 2, 400)
        text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        assert text == "<|im_start|>user\nWhere is my parcel?<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    def test_the_tiny_model_is_the_same_every_time(self, tiny_model_dir: Path) -> None:
        model, tokenizer = load_model(str(tiny_model_dir), dtype=torch.float64)
        assert sum(float(p.detach().abs().sum()) for p in model.parameters()) == pytest.approx(7183.5239, abs=1e-3)
        assert tokenizer("The parcel is late.").input_ids == [273, 345, 277, 338, 16]

    def test_damaged_weights_are_one_line(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_model_dir, tmp_path / "model")
        (tmp_path / "model" / WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
        with pytest.raises(ModelError, match="cannot be loaded") as error:
            load_causal_lm(str(tmp_path / "model"), dtype=torch.float32)
        assert "\n" not in str(error.value)

    def test_weights_that_are_not_there_are_not_made_up(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        """A language model's folder named as a reward model would get a random head."""
        with pytest.raises(ModelError, match=r"no weights for score\.weight of LlamaForSequenceClassification"):
            load_classifier(str(tiny_model_dir), dtype=torch.float32)
        shutil.copytree(tiny_model_dir, tmp_path / "model")
        weights = load_file(tmp_path / "model" / WEIGHTS)
        cut = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
        assert len(cut) < len(weights)
        save_file(cut, tmp_path / "model" / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"no weights for (model\.layers\.1\.\S+, ){2}\S+ and \d+ more of Llama"):
            load_causal_lm(str(tmp_path / "model"), dtype=torch.float32)

    @pytest.mark.parametrize("load", [lambda n: load_causal_lm(n, dtype=torch.float32), load_tokenizer])
    def test_hub_failure_is_one_line(self, load) -> None:
        with pytest.raises(ModelError, match="'opentao-tests/absent' cannot be loaded") as error:
            load("opentao-tests/absent")
        assert "\n" not in str(error.value)

    def test_code_of_others_is_not_run(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(tiny_model_dir, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "code.py").write_text("raise SystemExit('code of others was run')")
        with pytest.raises(ModelError, match="trust_remote_code"):
            load_causal_lm(str(folder), dtype=torch.float32)


class TestChatTemplate:
    def test_kept_if_there_is_one(self, tiny_model_dir: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        before = tokenizer.chat_template
        assert ensure_chat_template(tokenizer).chat_template == before

    def test_minimal_one_for_a_base_model(self, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        tokenizer.chat_template = None
        with caplog.at_level(logging.WARNING, "opentao"):
            ensure_chat_template(tokenizer)
        turns = [{"role": "system", "content": "Be brief."}, *CHAT]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert text == "System: Be brief.\n\nUser: Where is my parcel?\n\nAssistant:"
        assert "no chat template" in caplog.text


def test_import_is_light() -> None:
    code = "import sys, opentao.models; assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True)
