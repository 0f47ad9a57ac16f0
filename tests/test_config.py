"""Every mistake in a config gives one line that names file, line, key and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from opentao.config import Config, EvaluateConfig, GenerateConfig, dump_config, load_config
from opentao.errors import ConfigError
from opentao.scorers.registry import build_scorer

GOOD = """\
model: tiny
prompts:
  path: prompts.jsonl
scorers:
  - type: length
    args: {max: 20}
  - type: contains
    name: polite
    args: {strings: [thanks]}
train:
  objective: regress
  epochs: 2
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "tao.yaml"
    path.write_text(GOOD)
    return path


def complaint(path: Path, text: str, *overrides: str) -> str:
    """The error of a config with this text, without the folder."""
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message.replace(f"{path.parent}/", "")


def test_good(config_file: Path) -> None:
    config = load_config(config_file)
    assert [s.label for s in config.scorers] == ["length", "polite"]
    assert config.train.epochs == 2
    assert config.generate.group_size == 8  # a class default
    assert load_config(config_file, ["audit.type=exact", "audit.args.key=answer"]).audit is not None


def test_dump_holds_every_setting(config_file: Path) -> None:
    config = load_config(config_file)
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config
    assert "prompts_per_step: 4" in dump_config(config)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("epochs: 2", "epoch: 2", "tao.yaml:12: train.epoch: unknown key; expected one of: objective, method, lora,"),
        ("    args: {max", "    arg: {max", "tao.yaml:6: scorers.0.arg: unknown key; expected one of: type, name,"),
        ("model: tiny", "modle: tiny", "tao.yaml:1: modle: unknown key; expected one of: model,"),
        ("epochs: 2", "epochs: two", "tao.yaml:12: train.epochs: Input should be a valid integer"),
        ("epochs: 2", "epochs: 0", "tao.yaml:12: train.epochs: Input should be greater than or equal to 1, got 0"),
        ("regress", "reinforce", "tao.yaml:11: train.objective: Input should be 'regress', 'distill', 'online' or"),
        ("  path: prompts.jsonl", "  max_train: 5", "tao.yaml:2: prompts.path: is required"),
        ("    name: polite\n", "    name: length\n", "tao.yaml:4: scorers: names must differ"),
        ("scorers:\n", "scorers: []\nother:\n", "tao.yaml:4: scorers: List should have at least 1 item"),
        ("model: tiny", "model: [tiny", "not valid YAML"),
        ("model: tiny", "model: !!python/name:os.system", "tao.yaml:1: not valid YAML: could not determine a constr"),
        ("model: tiny", "model: a\x00b", "not valid YAML: unacceptable character"),
    ],
)
def test_mistakes(config_file: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    assert expected in complaint(config_file, GOOD.replace(old, new))


def test_wrong_value_is_quoted(config_file: Path) -> None:
    assert complaint(config_file, GOOD.replace("epochs: 2", "epochs: two")).endswith("got 'two'")


def test_other_mistakes_are_counted(config_file: Path) -> None:
    text = GOOD.replace("epochs: 2", "epochs: 0").replace("regress", "x").replace("model: tiny", "modle: tiny")
    assert complaint(config_file, text).endswith("(and 2 more)")


def test_missing_section(config_file: Path) -> None:
    text = GOOD.replace("prompts:\n  path: prompts.jsonl\n", "")
    assert complaint(config_file, text) == "tao.yaml:1: prompts: is required"


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n", "5"])
def test_not_a_tree(config_file: Path, text: str) -> None:
    assert "tao.yaml:1: expected keys and values, got" in complaint(config_file, text)


def test_bad_yaml_names_the_line(config_file: Path) -> None:
    assert complaint(config_file, "model: tiny\nprompts: {path: x\nscorers: 1\n").startswith("tao.yaml:3: not valid")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD + "train: {epochs: 4}\n", "train: given twice, first on line "),
        (GOOD.replace("{max: 20}", "{max: 20, max: 9}"), "tao.yaml:6: max: given twice, first on line 6"),
        (GOOD.replace("    args: {max", "    args: {min: 1}\n    args: {max"), "args: given twice, first on line 6"),
    ],
)
def test_a_key_given_twice_is_an_error(config_file: Path, text: str, expected: str) -> None:
    """YAML would keep the last one, and the first would be gone without a word."""
    assert expected in complaint(config_file, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "tao.yaml:1: expected keys and values, got nothing"),
        ("# nothing yet\n", "tao.yaml:1: expected keys and values, got nothing"),
        (
            GOOD.replace("prompts:\n  path: prompts.jsonl", "prompts: p.jsonl"),
            "tao.yaml:2: prompts: expected a section",
        ),
        (GOOD.replace("prompts:\n  path: prompts.jsonl", "prompts:"), "keys and values, got nothing"),
        (GOOD + "a: &a [*a]\n", "tao.yaml: nested too deeply, or an alias that holds itself"),
        (GOOD + "generate: {stop: [END, '']}\n", "tao.yaml:13: generate.stop: an empty text stands in every answer"),
        (GOOD + "generate: {temperature: .inf}\n", "generate.temperature: Input should be a finite number, got inf"),
        (GOOD + "  learning_rate: .nan\n", "train.learning_rate: Input should be a finite number, got nan"),
        (
            GOOD + "generate: {group_size: 2, strategies: [{name: a}, {name: b}, {name: c}]}\n",
            "generate: strategies: 3 for 2 responses: each needs one",
        ),
        (
            GOOD + "generate: {strategies: [{name: a, examples: [{role: usr, content: x}]}]}\n",
            "generate.strategies.0.examples: expected turns {role: user or assistant, content: text}, got {'role'",
        ),
        (
            GOOD + "generate: {strategies: [{name: a, replace: {'': y}}]}\n",
            "generate.strategies.0.replace: expected the text to replace, got an empty one",
        ),
    ],
)
def test_what_cannot_work_is_refused(config_file: Path, text: str, expected: str) -> None:
    assert expected in complaint(config_file, text)


def test_a_section_without_a_key_is_the_default(config_file: Path) -> None:
    """`tao init` writes every key; with all of a section's commented out, YAML says null."""
    config_file.write_text(GOOD + "generate:\n  # group_size: 8\nevaluate:\n")
    config = load_config(config_file)
    assert (config.generate, config.evaluate) == (GenerateConfig(), EvaluateConfig())


def test_a_section_that_is_off_can_be_set(config_file: Path) -> None:
    config_file.write_text(GOOD + "later_rounds: null\n")
    config = load_config(config_file, ["later_rounds.train.epochs=1", "audit.type=contains", "audit.args.strings=[a]"])
    assert config.of_round(2).train.epochs == 1
    assert config.audit is not None and config.audit.args == {"strings": ["a"]}


def test_what_a_scorer_does_not_take_is_said_with_its_place(config_file: Path) -> None:
    config_file.write_text(GOOD.replace("{max: 20}", "{mxa: 20}") + "audit: {type: lenght}\n")
    config = load_config(config_file)
    assert config.audit is not None
    with pytest.raises(ConfigError, match=r"tao\.yaml:5: scorers\.0: scorer length: .*mxa.*; expected args: "):
        build_scorer(config.scorers[0])
    with pytest.raises(ConfigError, match=r"tao\.yaml:13: audit: scorer lenght: unknown type; expected one of: "):
        build_scorer(config.audit)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("model: tiny # grün\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: expected UTF-8 text, byte 17"):
        load_config(tmp_path / "latin.yaml")


class TestSet:
    def test_values_are_yaml_and_the_last_one_wins(self, config_file: Path) -> None:
        overrides = ["train.epochs=3", "train.epochs=4", "train.lora.rank=2", "generate.stop=['\\n', END]", "seed=7"]
        config = load_config(config_file, overrides)
        assert (config.train.epochs, config.train.lora.rank, config.seed) == (4, 2, 7)
        assert config.generate.stop == ["\\n", "END"]

    def test_items_of_a_list(self, config_file: Path) -> None:
        config = load_config(config_file, ["scorers.1.weight=0.5", "scorers.0={type: exact, args: {key: a}}"])
        assert config.scorers[1].weight == 0.5
        assert config.scorers[0].type == "exact"

    def test_a_value_with_an_equals_sign(self, config_file: Path) -> None:
        assert load_config(config_file, ["prompts.path=a=b.jsonl"]).prompts.path == "a=b.jsonl"

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("train.epochs", "--set train.epochs: expected KEY=VALUE, e.g. train.epochs=2"),
            ("train.epoch=2", "--set train.epoch=2: train.epoch: unknown key"),
            ("train.epochs=two", "--set train.epochs=two: train.epochs: Input should be a valid integer"),
            ("audit.type=", "--set audit.type=: audit.type: Input should be a valid string, got None"),
            ("model.name=x", "--set model.name=x: model is not a section"),
            ("scorers.7.weight=1", "--set scorers.7.weight=1: 7: expected an item of the list, 0 to 1"),
            ("scorers.first=1", "--set scorers.first=1: first: expected an item of the list, 0 to 1"),
            ("scorers.-1=1", "--set scorers.-1=1: -1: expected an item of the list, 0 to 1"),
            ("seed=[1", "--set seed=[1: the value is not valid YAML"),
            ("seed=-1", "seed: Input should be greater than or equal to 0, got -1"),
        ],
    )
    def test_mistakes(self, config_file: Path, override: str, expected: str) -> None:
        assert expected in complaint(config_file, GOOD, override)

    def test_a_mistake_between_two_keys(self, config_file: Path) -> None:
        """The message names the one, the override gave the other."""
        online = GOOD.replace("objective: regress", "objective: online")
        given = ["seed=3", "generate.top_p=0.5", "rounds=1"]
        assert complaint(config_file, online, *given).startswith(
            "--set generate.top_p=0.5: train.objective: importance"
        )
        in_file = f"{config_file.name}:11: train.objective: importance"
        assert complaint(config_file, online + "generate: {top_p: 0.5}\n", "seed=3").startswith(in_file)
        both = ["generate.top_p=0.5", "train.objective=online"]
        assert complaint(config_file, GOOD, *both).startswith("--set train.objective=online: train.objective")


class TestLaterRounds:
    LATER = "later_rounds:\n  train: {objective: online, epochs: 1}\n  generate: {max_new_tokens: 9}\n"

    def test_differ_in_what_they_name(self, config_file: Path) -> None:
        config_file.write_text(GOOD + self.LATER)
        config = load_config(config_file)
        assert config.of_round(0) is config.of_round(1) is config
        later = config.of_round(2)
        assert later == config.of_round(3)
        assert (later.train.objective, later.train.epochs, later.generate.max_new_tokens) == ("online", 1, 9)
        same = {"train": config.train, "generate": config.generate, "later_rounds": config.later_rounds}
        assert later.model_copy(update=same) == config

    def test_without_any_all_rounds_are_alike(self, config_file: Path) -> None:
        config = load_config(config_file)
        assert config.of_round(2) is config

    @pytest.mark.parametrize(
        ("old", "new", "expected"),
        [
            (
                "epochs: 1",
                "epoch: 1",
                "tao.yaml:14: later_rounds.train.epoch: unknown key; expected one of: objective,",
            ),
            ("epochs: 1", "epochs: 0", "tao.yaml:14: later_rounds.train.epochs: Input should be greater than or equal"),
            (
                "9}",
                "9, top_k: 3}",
                "tao.yaml:14: later_rounds.train.objective: importance weights of online need top_p 1",
            ),
            (
                "9}",
                "9, batch_responses: 3}",
                "tao.yaml:15: later_rounds.generate: `batch_responses` is that of `generate`",
            ),
            ("epochs: 1", "method: lora", "tao.yaml:14: later_rounds.train: `method` and `lora` are those of `train`"),
            (
                "  train: ",
                "  evaluate: ",
                "tao.yaml:14: later_rounds.evaluate: unknown key; expected one of: generate, train",
            ),
            (
                "  train: {objective: online, epochs: 1}",
                "  train: 3",
                "tao.yaml:14: later_rounds.train: Input should be a",
            ),
        ],
    )
    def test_mistakes(self, config_file: Path, old: str, new: str, expected: str) -> None:
        assert old in self.LATER
        assert expected in complaint(config_file, GOOD + self.LATER.replace(old, new))


class TestChecksOverSeveralKeys:
    def test_a_date_among_a_scorers_args(self, config_file: Path) -> None:
        """YAML makes it of 2024-05-01 without quotes; whether the audit is that scorer is asked all the same."""
        text = GOOD.replace("type: length", "type: exact").replace("max: 20", "target: 2024-05-01")
        assert "2024-05-01" in text
        config_file.write_text(text + "audit: {type: regex, args: {pattern: x}}\n")
        scorer = load_config(config_file).scorers[0]
        with pytest.raises(ConfigError, match="target"):
            build_scorer(scorer)

    def test_audit_that_is_also_a_scorer(self, config_file: Path) -> None:
        audit = "audit:\n  type: length\n  name: another name\n  args: {max: 20}\n"
        expected = (
            "tao.yaml:13: audit: must differ from every training scorer, or it judges what it taught; it is length"
        )
        assert complaint(config_file, GOOD + audit) == expected
        config_file.write_text(GOOD + audit.replace("max: 20", "max: 30"))
        assert load_config(config_file).audit is not None

    @pytest.mark.parametrize(
        "generate",
        [
            "{top_p: 0.9}",
            "{top_k: 40}",
            "{strategies: [{name: plain}, {name: think, template: '{prompt} Think.'}]}",
            "{strategies: [{name: prefix, answer_prefix: Sure}]}",
        ],
    )
    def test_online_needs_the_policys_own_samples(self, config_file: Path, generate: str) -> None:
        text = GOOD.replace("regress", "online") + f"generate: {generate}\n"
        message = complaint(config_file, text)
        assert message.startswith("tao.yaml:11: train.objective: importance weights of online need top_p 1, top_k 0")
        config_file.write_text(GOOD + f"generate: {generate}\n")
        assert load_config(config_file)  # the other objectives do not mind

    def test_online_alone_is_fine(self, config_file: Path) -> None:
        assert load_config(config_file, ["train.objective=online"]).train.objective == "online"

    def test_the_learners_temperature(self, config_file: Path) -> None:
        assert load_config(config_file, ["generate.temperature=0.6"]).learner_temperature == 0.6
        sharper = ["generate.temperature=0.6", "train.temperature=1.0"]
        assert load_config(config_file, sharper).learner_temperature == 1.0
        assert load_config(config_file, ["train.objective=online", "train.temperature=1.0"])  # the default of sampling
        with pytest.raises(ConfigError, match=r"train\.temperature: importance weights of online need"):
            load_config(config_file, ["train.objective=online", *sharper])

    def test_strategies(self, config_file: Path) -> None:
        text = GOOD + "generate:\n  strategies: [{name: a}, {name: a}]\n"
        assert "tao.yaml:14: generate.strategies: strategy names must differ" in complaint(config_file, text)
        text = GOOD + "generate:\n  strategies:\n  - {name: a, template: Think.}\n"
        assert "tao.yaml:15: generate.strategies.0.template: must contain {prompt}" in complaint(config_file, text)


def test_learning_rate_depends_on_the_method(config_file: Path) -> None:
    assert load_config(config_file).train.lr == 1e-5
    assert load_config(config_file, ["train.method=lora"]).train.lr == 2e-4
    assert load_config(config_file, ["train.learning_rate=0.5"]).train.lr == 0.5
