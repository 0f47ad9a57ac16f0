"""`tao label`: the page on which people choose, and its choices as preference files."""

from __future__ import annotations

import getpass
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opentao.cli_common import AsJson, emit, guarded, prepare_process
from opentao.config import LabelKind
from opentao.errors import ConfigError, DataError

if TYPE_CHECKING:
    from opentao.preferences import Ranking
    from opentao.web.choices import Choices, Item

label_app = typer.Typer(help="Let people choose between answers, on a web page.", no_args_is_help=True)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
Database = Annotated[Path, typer.Option("--db", metavar="FILE", help="SQLite file that holds the choices.")]


@label_app.command("start")
@guarded
def label_start(
    source: Annotated[Path, typer.Argument(help="Run directory, or JSONL / Parquet rows with prompt and responses.")],
    db: Database = Path("choices.sqlite"),
    kind: Annotated[LabelKind, typer.Option(help="Two side by side, the best of N, or right and wrong.")] = "pair",
    annotator: Annotated[
        list[str] | None, typer.Option(help="Who judges; repeat it for several. Default: you.")
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="Ensemble of reward models: pairs it disagrees on come first (--kind pair).")
    ] = None,
    repeats: Annotated[float, typer.Option(min=0, max=0.5, help="Share of tasks that repeat an earlier one.")] = 0.1,
    overlap: Annotated[float, typer.Option(min=0, max=1, help="Share of tasks that everybody is given.")] = 0.3,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine only if you say so.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8765,
    seed: int = 0,
) -> None:
    """Open the page. Prints a link with its own token for each annotator."""
    from opentao.web.choices import Choices
    from opentao.web.items import read_items
    from opentao.web.next_task import Plan

    if reward_model and kind != "pair":
        raise ConfigError(f"--reward-model orders pairs, --kind is {kind}")
    if any(not name.strip() for name in annotator or ()):
        raise ConfigError("--annotator: expected a name")
    names = annotator or [_user()]
    items, without = read_items(source)
    choices = Choices(db)
    new = choices.add_items(items)
    information = _information(reward_model, choices.items()) if reward_model else {}
    asked = frozenset(item.id for item in items)
    plan = Plan(kind=kind, repeats=repeats, overlap=overlap, seed=seed, information=information, items=asked)
    aside = f" ({without} without two different answers left out)" if without else ""
    print(f"{len(items)} prompts with answers to judge{aside}, {new} of them new; choices are kept in {db}")
    _serve(choices, plan, names, host, port)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:  # a container's user id without a name
        raise ConfigError("--annotator: expected a name; this user has none") from error


def _information(reward_model: str, items: list[Item]) -> dict[str, Any]:
    """What each pair would teach, by the disagreement of an ensemble's heads."""
    prepare_process()
    from opentao.progress import Progress
    from opentao.reward_model import RewardModel
    from opentao.web.next_task import pair_information

    model = RewardModel.load(reward_model).for_scoring()
    if model.num_heads == 1:
        raise ConfigError(f"--reward-model {reward_model}: has one head; see `tao reward train --ensemble`")
    groups = [model.encode(item.messages, item.responses) for item in items]
    found = {}
    with Progress() as progress, progress.stage("score", total=len(items), unit="prompts", label="score pairs") as step:
        for index, heads in model.score_heads(groups):
            found[items[index].id] = pair_information(heads)
            step.advance(1, tokens=groups[index].num_tokens)
    return found


def _serve(choices: Choices, plan: Any, names: list[str], host: str, port: int) -> None:
    import socket

    import uvicorn

    from opentao.web.label import build_app

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(128)  # whoever follows a link from now on waits until the application is there
        except OSError as error:
            raise ConfigError(f"--host {host} --port {port}: {error.strerror}; --port 0 takes any free one") from error
        port = listener.getsockname()[1]
        hosts = ["127.0.0.1", "localhost", "[::1]"] if host in LOOPBACK else ["*"]
        shown = f"[{host}]" if ":" in host else host
        for name in dict.fromkeys(names):  # only now: a new link ends the old one, of a page that may still be open
            print(f"{name}: http://{shown}:{port}/?token={choices.add_annotator(name)}")
        if host not in LOOPBACK:
            print("everybody who can reach this machine can open the page, and needs a token to see anything")
        with suppress(KeyboardInterrupt):  # which is how it ends, once the server has shut down
            print("stop with Ctrl-C; nothing is lost", flush=True)
            config = uvicorn.Config(build_app(choices, plan, hosts=hosts), log_level="warning", access_log=False)
            uvicorn.Server(config).run(sockets=[listener])


@label_app.command("export")
@guarded
def label_export(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Preference file to write, JSONL.")],
    test: Annotated[
        Path | None,
        typer.Option("--test", metavar="FILE", help="A second one, of choices about other prompts: to measure on."),
    ] = None,
    test_share: Annotated[float, typer.Option(min=0.01, max=0.99, help="Share of prompts that go to --test.")] = 0.2,
    db: Database = Path("choices.sqlite"),
    as_json: AsJson = False,
) -> None:
    """Write the choices as a preference file, with annotator, time and order; or as two, near-copies in one of them."""
    from opentao.preferences import write_preferences
    from opentao.web.agreement import alpha, between, with_oneself
    from opentao.web.choices import Choices
    from opentao.web.preference_rows import rankings_of

    files = {"--out": out} | ({"--test": test} if test else {})
    for option, file in files.items():
        if file.exists() and file.samefile(_existing(db)):
            raise DataError(f"{file}: holds the choices; name another file with {option}")
    if test and test.resolve() == out.resolve():
        raise ConfigError(f"--test {test}: is the file of --out; name another")
    choices = Choices(_existing(db))
    rankings = rankings_of(choices)
    if not rankings:
        raise DataError(f"{db}: no choice that says something yet")
    sides = _halves(rankings, test_share, db) if test else [rankings]
    for file, side in zip(files.values(), sides, strict=True):
        write_preferences(file, side)
    made = choices.choices()
    tested = {"test_rankings": len(sides[1]), "test": str(test)} if test else {}
    facts = {
        "rankings": len(sides[0]),
        "choices": len(made),
        "skipped": sum("skip" in c.answer for c in made),
        "agreement": alpha(made),
        "with_others": between(made),
        "with_oneself": with_oneself(made),
        "out": str(out),
    } | tested
    written = ", ".join(f"{len(side)} -> {file}" for side, file in zip(sides, files.values(), strict=True))
    emit(facts, as_json, f"{len(rankings)} rankings of {len(made)} choices: {written}")


def _halves(rankings: list[Ranking], share: float, db: Path) -> list[list[Ranking]]:
    """[to train on, to test on]: by prompt, near-duplicates on one side."""
    from opentao.config import PromptsConfig
    from opentao.split import hold_out, near_duplicates

    alike = near_duplicates([r.prompt for r in rankings], PromptsConfig.model_fields["near_duplicate"].default)
    if len(alike) < 2:
        raise DataError(f"{db}: all choices are about one prompt, or near-duplicates of it; --test needs another one")
    _, tests = hold_out(alike, share)
    tested = {prompt.id for cluster in tests for prompt in cluster}
    return [[r for r in rankings if (r.prompt.id in tested) is wanted] for wanted in (False, True)]


@label_app.command("import")
@guarded
def label_import(
    pairs: Annotated[Path, typer.Option("--pairs", metavar="FILE", help="Preferences, JSONL or Parquet.")],
    db: Database = Path("choices.sqlite"),
    as_json: AsJson = False,
) -> None:
    """Add the choices of a preference file; those that are there already are left alone."""
    from opentao.preferences import read_preferences
    from opentao.web.choices import Choices
    from opentao.web.preference_rows import import_rankings

    found = read_preferences(pairs)
    added = import_rankings(Choices(db), found.rankings)
    facts: dict[str, Any] = {"added": added, "read": len(found.rankings), "set_aside": len(found.set_aside)}
    facts["rows_set_aside"] = found.set_aside
    emit(facts, as_json, f"{added} choices added to {db}, {found.said_aside}")


def _existing(db: Path) -> Path:
    if not db.is_file():
        raise DataError(f"{db}: there is no such file")
    return db
