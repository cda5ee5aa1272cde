"""Messages to values: fields of the same name, and enums by their words."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.message import Message

T = TypeVar("T")


def copied(kind: type[T], message: Message, **others: Any) -> T:
    """A dataclass from the message's fields of the same names: None for an optional one that is absent, a tuple for a
    repeated one. ``others`` are the fields that the message lacks or spells differently; defaults stand for the rest.
    """
    known = message.DESCRIPTOR.fields_by_name
    for name in {field.name for field in fields(kind)} & known.keys() - others.keys():  # type: ignore[arg-type]  # of T
        if known[name].has_presence and not message.HasField(name):
            others[name] = None
        else:
            value = getattr(message, name)
            others[name] = tuple(value) if known[name].is_repeated else value
    return kind(**others)


def word(enum: Any, number: int) -> str:
    """EDIT_OPERATION_SET as "set"."""
    return str(enum.Name(number)).removeprefix(_prefix(enum)).lower()


def number(enum: Any, word: str) -> Any:
    """ "set" as EDIT_OPERATION_SET. Raises ValueError for an unknown word."""
    return enum.Value(_prefix(enum) + word.upper())


def _prefix(enum: Any) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", enum.DESCRIPTOR.name).upper() + "_"
