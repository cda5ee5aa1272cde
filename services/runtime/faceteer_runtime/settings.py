"""Settings of a service: flag > environment > default, typed, each documented once.

Each service subclasses :class:`ServiceSettings` in its own ``settings.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, NoReturn, Self, Union, get_args, get_origin

from pydantic import Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX = "FACETEER_"


class ServiceSettings(BaseSettings):
    """What every service can be told.

    Subclasses add fields whose names begin with the service's ("encoder_max_batch"), so that the all-in-one process can
    read all services' settings from one environment and one command line.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    needs_bundle: ClassVar[bool] = True
    """Whether the service opens a bundle; False for one that only talks to others."""

    listen: str = Field("127.0.0.1:50051", description="Address and port to serve on; port 0 picks a free one.")
    bundle: Path = Field(Path("deploy/bundles/postcards"), description="Directory of the bundle to serve.")
    redis_url: str | None = Field(
        None, description="Redis behind the in-process cache, e.g. redis://localhost:6379/0; without it, none."
    )
    cache_memory_bytes: int = Field(
        256 << 20, ge=0, description="Most bytes in the in-process cache; 0 switches it off."
    )
    cache_ttl_s: int = Field(7 * 24 * 3600, ge=1, description="Seconds for which Redis keeps a value.")
    device: str = Field("cpu", description="Where the models run: cpu, cuda, cuda:1 …")
    threads: int = Field(1, ge=1, description="Intra-op threads of the model library.")
    max_queue: int = Field(256, ge=1, description="Most work items that wait for a model; more are refused at once.")
    max_calls: int = Field(1000, ge=1, description="Most calls answered at once; more are refused at once.")
    max_message_bytes: int = Field(64 << 20, ge=1024, description="Largest request message taken, in bytes.")
    reflection: bool = Field(False, description="Serve gRPC reflection, for grpcurl and buf curl.")
    metrics_listen: str | None = Field(
        None, description="Address and port of the Prometheus endpoint; without it, none."
    )
    drain_seconds: float = Field(
        15.0, ge=0, description="Longest time given to running calls after SIGTERM, in seconds."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log lines written."
    )

    @field_validator("listen", "metrics_listen")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None:
            split_address(value)
        return value

    @field_validator("redis_url")
    @classmethod
    def _is_redis_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        return value

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None, *, ignore_unknown: bool = False) -> Self:
        """Reads flags (``--max-queue 5``), then FACETEER_MAX_QUEUE, then the default.

        Args:
            argv: the command line without the program's name; ``sys.argv[1:]`` by default.
            ignore_unknown: leave flags alone that belong to somebody else.

        Raises:
            SystemExit: ``--help`` (0), or a wrong flag or value (2), after one sentence on stderr.
        """
        (settings,) = parse_together((cls,), argv, ignore_unknown=ignore_unknown)
        assert isinstance(settings, cls)
        return settings

    @classmethod
    def from_other(cls, other: ServiceSettings, **changes: Any) -> Self:
        """Shared fields from ``other``, ``changes`` on top, the rest from environment and default.

        ``other`` itself when it is of this class already and nothing changes, so that a service's ``build`` need not
        ask whether it runs alone.
        """
        if isinstance(other, cls) and not changes:
            return other
        shared = {name: getattr(other, name) for name in cls.model_fields if name in type(other).model_fields}
        return cls(**(shared | changes))


def parse_together(
    classes: Sequence[type[ServiceSettings]], argv: Sequence[str] | None = None, *, ignore_unknown: bool = False
) -> tuple[ServiceSettings, ...]:
    """Reads several classes from one command line: a flag must belong to at least one of them.

    Raises:
        SystemExit: as :meth:`ServiceSettings.parse`.
    """
    parser = _Parser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    seen: set[str] = set()
    for settings in classes:
        for name, info in settings.model_fields.items():
            if name not in seen:
                seen.add(name)
                _add_flag(parser, name, info)
    if ignore_unknown:
        given = vars(parser.parse_known_args(argv)[0])
    else:
        given = vars(parser.parse_args(argv))
    try:
        return tuple(
            settings(**{name: value for name, value in given.items() if name in settings.model_fields})
            for settings in classes
        )
    except ValidationError as error:
        parser.error(describe(error))


def describe(error: ValidationError) -> str:
    """The first fault as one line that names flag and variable."""
    fault = error.errors(include_url=False)[0]
    name = str(fault["loc"][0]) if fault["loc"] else "settings"
    reason = fault["msg"].removeprefix("Value error, ")
    return f"{_flag(name)} ({ENV_PREFIX}{name.upper()}): {reason[:1].lower()}{reason[1:]}, not {fault['input']!r}"


def split_address(address: str) -> tuple[str, int]:
    """Splits ``host:port``. IPv6 hosts are in brackets.

    Raises:
        ValueError: anything else.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("must be HOST:PORT")
    return host, int(port)


def fields_table(settings: type[ServiceSettings], *, without: type[ServiceSettings] | None = None) -> str:
    """A Markdown table: flag, variable, default, meaning. ``without`` leaves out another class's fields."""
    rows = ["| flag | environment | default | meaning |", "|---|---|---|---|"]
    for name, info in settings.model_fields.items():
        if without is not None and name in without.model_fields:
            continue
        default = "none" if info.default is None else f"`{_as_text(info.default)}`"
        rows.append(f"| `{_flag(name)}` | `{ENV_PREFIX}{name.upper()}` | {default} | {info.description} |")
    return "\n".join(rows) + "\n"


class _Parser(argparse.ArgumentParser):
    """Reports a fault as one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def _add_flag(parser: argparse.ArgumentParser, name: str, info: FieldInfo) -> None:
    described = f"{info.description or ''} [{ENV_PREFIX}{name.upper()}; default {_as_text(info.default)}]".replace(
        "%", "%%"
    )
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": described}
    annotation = _without_none(info.annotation)
    if annotation is bool:
        parser.add_argument(_flag(name), action=argparse.BooleanOptionalAction, **options)
        return
    if get_origin(annotation) is Literal:
        metavar = "{" + ",".join(map(str, get_args(annotation))) + "}"
    else:
        metavar = name.rpartition("_")[2].upper()
    parser.add_argument(_flag(name), metavar=metavar, **options)


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return members[0] if len(members) == 1 else annotation
    return annotation


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
