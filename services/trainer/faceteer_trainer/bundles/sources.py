"""Where published files come from: the Hugging Face Hub or a mirror of it, or a directory on this machine.

A source says how large a file is and what its digest should be, and fetches it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from huggingface_hub import HfApi, hf_hub_download

from faceteer_trainer.bundles.manifest import Wanted
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import job_file

_BLOCK = 8 << 20
Advance = Callable[[int], None]


class Published(NamedTuple):
    """What is known of a file before it is fetched; None where nothing is."""

    size: int | None
    sha256: str | None
    revision: str


class Source(Protocol):
    """A place that holds published files."""

    def look(self, wanted: Wanted) -> Published:
        """Size, digest and exact revision. Raises JobError where the file is not there."""
        ...

    def fetch(self, wanted: Wanted, published: Published, target: Path, advance: Advance) -> None:
        """Puts the file at ``target``, resuming where an earlier attempt stopped; ``advance`` gets the bytes."""
        ...


class Hub:
    """The Hugging Face Hub through its own client, which resumes; or a mirror at another address."""

    def __init__(self, endpoint: str | None = None, staging: Path | None = None) -> None:
        """endpoint: of a mirror; staging: where unfinished downloads wait."""
        self._endpoint, self._staging = endpoint, staging
        self._api = HfApi(endpoint=endpoint)
        self._known: dict[tuple[str, str], tuple[str, dict[str, Published]]] = {}

    def look(self, wanted: Wanted) -> Published:
        """Of a large file the Hub itself states the SHA-256."""
        key = (wanted.repo, wanted.revision)
        if key not in self._known:
            try:
                info = self._api.model_info(wanted.repo, revision=wanted.revision, files_metadata=True)
            except Exception as error:
                # The client passes on whatever its HTTP library raises.
                raise JobError(
                    f"{wanted.repo}: cannot be reached ({_first_line(error)}); on a machine without internet access "
                    "give --from a directory that holds the published files"
                ) from None
            revision = info.sha or wanted.revision
            found = {
                file.rfilename: Published(file.size, file.lfs.sha256 if file.lfs else None, revision)
                for file in info.siblings or ()
            }
            self._known[key] = revision, found
        try:
            return self._known[key][1][wanted.file]
        except KeyError:
            raise JobError(f"{wanted.repo}: holds no file {wanted.file} at revision {self._known[key][0]}") from None

    def fetch(self, wanted: Wanted, published: Published, target: Path, advance: Advance) -> None:
        """By the Hub's client, into the staging directory first."""
        staging = (self._staging or target.parent) / wanted.repo.replace("/", "--")
        try:
            fetched = hf_hub_download(
                wanted.repo, wanted.file, revision=published.revision, local_dir=staging, endpoint=self._endpoint
            )
        except Exception as error:
            raise JobError(
                f"{wanted.repo}/{wanted.file}: not fetched ({_first_line(error)}); run the same command again to go on"
            ) from None
        target.parent.mkdir(parents=True, exist_ok=True)
        advance(Path(fetched).stat().st_size)
        Path(fetched).replace(target)


class Directory:
    """Published files on this machine: ROOT/<owner>/<repository>/<file>, ROOT/<repository>/<file>, or a Hub cache."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise JobError(f"--from {root}: no such directory")
        self._root = root

    def look(self, wanted: Wanted) -> Published:
        """The size; the digest is recorded too."""
        return Published(self._find(wanted).stat().st_size, None, wanted.revision)

    def fetch(self, wanted: Wanted, published: Published, target: Path, advance: Advance) -> None:
        """A copy, so that the bundle does not change when the directory does."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with job_file(target) as part, self._find(wanted).open("rb") as source, part.open("wb") as copy:
            while block := source.read(_BLOCK):
                copy.write(block)
                advance(len(block))

    def _find(self, wanted: Wanted) -> Path:
        owner, _, name = wanted.repo.partition("/")
        places = [self._root / owner / name / wanted.file, self._root / name / wanted.file]
        places += sorted((self._root / f"models--{owner}--{name}" / "snapshots").glob(f"*/{wanted.file}"))
        for place in places:
            if place.is_file():
                return place
        raise JobError(f"{places[0]}: missing, and so is {places[1]}; they should hold {wanted.file} of {wanted.repo}")


def sha256_of(path: Path) -> str:
    """A file's digest, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(existing: Path | str, target: Path | str) -> None:
    """One file under two names where the file system can, else a copy."""
    Path(target).unlink(missing_ok=True)
    try:
        Path(target).hardlink_to(existing)
    except OSError:
        shutil.copyfile(existing, target)


def free_bytes(directory: Path) -> int:
    """Room on the disk that holds ``directory``, which need not exist yet."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
