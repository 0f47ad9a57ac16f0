"""Public data for the recipes: taken from a folder that has it, or fetched once from GitHub at a fixed commit.

    python examples/sources.py spider --data DIR     make sure that DIR holds it, and say where

Every file is checked: a single file by its sha256 (unpacked), an archive by one sha256 over the files in it that are
used (GitHub packs the same files differently from time to time). Nothing here is part of the package.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

RAW, ARCHIVE = "https://raw.githubusercontent.com", "https://codeload.github.com"
SECONDS = 60  # without a byte


class SourceError(Exception):
    """Data is missing, or is not what it should be."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Source:
    """One file of a repository, or all of it as an archive (`path` is "")."""

    file: str  # where it lies under the data folder
    repository: str
    commit: str
    path: str
    sha256: str
    used: str = ""  # of an archive: which files count, a pattern with the groups that name them

    def url(self, raw: str = RAW, archive: str = ARCHIVE) -> str:
        if self.path:
            return f"{raw}/{self.repository}/{self.commit}/{self.path}"
        return f"{archive}/{self.repository}/tar.gz/{self.commit}"

    def hash_of(self, path: Path) -> str:
        if not self.used:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            return hashlib.sha256(content).hexdigest()
        whole = hashlib.sha256()
        for name, content in sorted(members(path, self.used)):
            whole.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
        return whole.hexdigest()


def members(archive: Path, used: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files in an archive that `used` matches; the name is its groups, joined by "/"."""
    pattern = re.compile(used)
    with tarfile.open(archive) as opened:
        for member in opened:
            match = pattern.search(member.name)
            if match and (file := opened.extractfile(member)) is not None:
                yield "/".join(match.groups()), file.read()


# The databases named last are left out: some of their tables are larger than what a recipe should fetch.
SPIDER_FILES = r"/(?!(?:baseball_1|soccer_1|wta_1|flight_4)/)([A-Za-z0-9_]+)/(schema\.sql|data/[^/]+\.csv)$"
SOURCES: dict[str, tuple[Source, ...]] = {
    "spider": (
        Source(
            file="spider-sql/spider_train.orig.json",
            repository="ygan/Spider-Syn",
            commit="0b996a57b7e329c14c300a8fb13661da128a9ddc",
            path="Spider-Syn/train_spider.json",
            sha256="f045467b2ec33df51362dddfcb9a9424470e3c0c5bacc2e2469805627300964a",
        ),
        Source(
            file="spider-sql/databases.tar.gz",
            repository="cloudera/spiderman",
            commit="c11367b8dbe1e693dab376ee4ac41ef0072691cd",
            path="",
            sha256="17adeafa0584623eda8dad0bb44bf858a9a587c5b60fdefb41581f08f3172317",
            used=SPIDER_FILES,
        ),
    ),
    "ifeval": (
        Source(
            file="ifeval/input_data.jsonl",
            repository="josejg/instruction_following_eval",
            commit="0c495b2f95155e8b10acb919ae283bfb4d5be6e2",
            path="instruction_following_eval/data/input_data.jsonl",
            sha256="67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
        ),
    ),
    "xquad": (
        Source(
            file="xquad-en/xquad.en.json",
            repository="google-deepmind/xquad",
            commit="7d30520c717524000f0d9d2f9c10a069acd9d285",
            path="xquad.en.json",
            sha256="e4c57d1c9143aaa1c5d265ba5987a65f4e69528d2a98f29d6e75019b10344f29",
        ),
    ),
    "qa-feedback": (
        Source(
            file="qa-feedback/dev_feedback.json.gz",
            repository="allenai/FineGrainedRLHF",
            commit="a1469d4eba0b3754bcb343beb88f0aca24bf4848",
            path="tasks/qa_feedback/data/dev_feedback.json",
            sha256="f394289ecfdc5a2d1663170254b92d75ad3c53ba36df9f627c70d4c6fc4f3291",
        ),
    ),
    "financebench": (
        Source(
            file="financebench/financebench_open_source.jsonl",
            repository="patronus-ai/financebench",
            commit="cc39aeb4afdf33909ee1412188bf89035950c2eb",
            path="data/financebench_open_source.jsonl",
            sha256="a5a2aa673e573e55675fc3c0f9aa38c1cf59d2abc91edb077534f71f10a71877",
        ),
    ),
}


def find(name: str, folder: Path, *, raw: str = RAW, archive: str = ARCHIVE) -> list[Path]:
    """The source's files under `folder`; what is missing is fetched, and everything is checked.

    Raises:
        SourceError: a file cannot be fetched, or its content is not the one that is expected.
    """
    found = []
    for source in SOURCES[name]:
        path = folder / source.file
        if not path.exists():
            _fetch(source.url(raw, archive), path, pack=path.suffix == ".gz" and not source.used)
        try:
            is_ = source.hash_of(path)
        except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
            raise SourceError(f"{path}: is broken off or no archive ({error}); delete it to fetch it again") from error
        if is_ != source.sha256:
            raise SourceError(f"{path}: sha256 {is_}, expected {source.sha256}; delete it to fetch it again")
        found.append(path)
    return found


def _fetch(url: str, path: Path, *, pack: bool) -> None:
    """Write what the URL gives, packed by gzip if it is not yet; whole or not at all."""
    print(f"fetching {url}", file=sys.stderr)
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    opener: Any = gzip.open if pack else open
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer, opener(part, "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
    except (OSError, HTTPException) as error:  # the second: the connection was lost half-way
        part.unlink(missing_ok=True)
        raise SourceError(f"{url}: {error}; put the file at {path} yourself, or name a folder that has it") from error
    part.rename(path)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What every `prepare.py` takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=default_folder(), help="folder that has the data, or will")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    return parser


def default_folder() -> Path:
    """The shared data beside a development checkout, else a cache in the user's home."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    return shared if shared.is_dir() else Path.home() / ".cache" / "opentao" / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SOURCES))
    parser.add_argument("--data", type=Path, default=default_folder())
    given = parser.parse_args()
    try:
        print(*find(given.name, given.data), sep="\n")
    except SourceError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
