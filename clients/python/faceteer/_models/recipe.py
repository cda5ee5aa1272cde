"""An edit as data: what was done, with which models and settings, to be saved, sent, compared and replayed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from faceteer._errors import InvalidArgumentError, InvalidRecipeError, RevisionMismatchError, invalid
from faceteer._files import write_atomically
from faceteer._models.edits import FeatureEdit, chained
from faceteer._models.picture_recipe import FORMATS, is_picture, recipe_in
from faceteer._models.values import Revisions, Settings, check_strength

FORMAT = "faceteer-recipe/1"
_PARTS = ("encoder", "sae", "generator")


@dataclass(frozen=True, eq=False)
class Recipe:
    """Edits by index, the revisions they were made with, and how to draw.

    The canonical form is JSON as RFC 8785 writes it (keys sorted, no spaces, numbers in their shortest form, so 1 and
    never 1.0), with the edits in order of their indices, since edits commute. Labels are informative: people rename
    features, and a renamed feature is the same feature, so labels are in no hash and no comparison. Neither is the
    library's revision, nor the picture whose layout was kept. Seeds are whole numbers up to 2**64 - 1 and are written
    in full.

    Attributes:
        edits: each feature at most once, all by index.
        revisions: encoder, sae and generator; a server with others refuses the recipe. An empty one matches any.
        settings: how to draw; what is left out is the generator's default, which its revision pins.
        photo: SHA-256 of the picture whose layout ``settings.keep_layout`` kept, hexadecimal; empty without one.
            Informative, as the edited photo is no part of a recipe: replayed on another photo, that one's layout is
            kept.
        changed_from: the hash that its file carries, where somebody changed the file since and the change was accepted;
            empty otherwise. Informative too.
    """

    edits: tuple[FeatureEdit, ...]
    revisions: Revisions
    settings: Settings = field(default_factory=Settings)
    photo: str = ""
    changed_from: str = ""

    def __post_init__(self) -> None:
        edits = tuple(self.edits)
        if len(chained((), edits)) < len(edits):
            raise invalid("edits", "a feature is edited twice; a recipe edits each feature once")
        for position, edit in enumerate(edits):
            if isinstance(edit.feature, str):
                raise InvalidRecipeError(
                    f"edits[{position}].feature: {edit.feature!r} is a label; a recipe names features by index "
                    "(edit.recipe() looks labels up)",
                    field=f"edits[{position}].feature",
                )
        if self.settings.keep_layout == "none":
            object.__setattr__(self, "settings", replace(self.settings, keep_layout=None))
        check_strength(self.settings)
        if not re.fullmatch(r"(?:[0-9a-f]{64})?", self.photo):
            raise InvalidRecipeError(f"photo: {self.photo!r} is no SHA-256 in hexadecimal", field="photo")
        object.__setattr__(self, "edits", tuple(sorted(edits, key=lambda edit: int(edit.feature))))

    @property
    def canonical(self) -> bytes:
        """The canonical JSON, UTF-8, without labels: what is hashed and compared."""
        return _canonical(self._as_dict(labels=False)).encode()

    @property
    def hash(self) -> str:
        """SHA-256 of :attr:`canonical`, hexadecimal."""
        return hashlib.sha256(self.canonical).hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.canonical == other.canonical if isinstance(other, Recipe) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.canonical)

    def __str__(self) -> str:
        edits = "; ".join(map(str, self.edits)) or "no edits"
        changed = f" (changed since it was saved as {self.changed_from[:12]})" if self.changed_from else ""
        return f"recipe {self.hash[:12]}{changed}: {edits}"

    def to_dict(self) -> dict[str, Any]:
        """The recipe with its labels and its hash as plain values; what :meth:`to_json` writes."""
        return {**self._as_dict(labels=True), "hash": self.hash}

    def to_json(self) -> str:
        """Readable JSON with labels and the hash; :meth:`from_json` reads it back."""
        # Numbers are written canonically here too, so that the file and the hash never disagree about a value.
        return _canonical(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, accept_changed: bool = False) -> Recipe:
        """Reads :meth:`to_json`'s or the canonical form.

        Args:
            text: the JSON.
            accept_changed: take a recipe whose values are not those that its hash was made of, and note the hash in
                ``changed_from``.

        Raises:
            InvalidRecipeError: not a recipe, or one that was changed since it was saved; ``field`` and the message say
                where and why. A recipe without a hash (the canonical form, or one written by hand) is taken as it is.
        """
        try:
            data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        except UnicodeDecodeError as error:
            raise InvalidRecipeError(f"not a recipe: not UTF-8 ({error.reason})") from error
        except json.JSONDecodeError as error:
            raise InvalidRecipeError(f"not a recipe: line {error.lineno}, column {error.colno}: {error.msg}") from error
        recipe, carried = _read(data)
        if carried in ("", recipe.hash):
            return recipe
        if accept_changed:
            return replace(recipe, changed_from=carried)
        raise InvalidRecipeError(
            "the recipe was changed after it was saved: its values do not give its hash. Undo the change, or accept "
            "it: accept_changed=True, --accept-changed on the command line",
            field="hash",
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the recipe as readable JSON, all or nothing, and returns the path."""
        return write_atomically(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, accept_changed: bool = False) -> Recipe:
        """Reads a saved recipe, or the one in a picture (PNG, WebP or JPEG) that was drawn with it.

        Args:
            path: of either.
            accept_changed: as for :meth:`from_json`.

        Raises:
            OSError: the file cannot be read.
            InvalidRecipeError: it holds no recipe, or one that was changed since it was saved.
        """
        data = Path(path).read_bytes()
        text = recipe_in(data) if is_picture(data) else data
        if text is None:
            raise InvalidRecipeError(
                f"{os.fspath(path)}: this picture holds no recipe; only pictures that Faceteer drew and saved as "
                f"{FORMATS} do, and some programs drop it when they save again"
            )
        try:
            return cls.from_json(text, accept_changed=accept_changed)
        except InvalidRecipeError as error:
            raise InvalidRecipeError(f"{os.fspath(path)}: {error.message}", field=error.field) from error

    def check(self, revisions: Revisions) -> None:
        """Raises RevisionMismatchError when the recipe was made for other models than ``revisions``."""
        for part in _PARTS:
            expected, actual = getattr(self.revisions, part), getattr(revisions, part)
            if expected and actual and expected != actual:
                raise RevisionMismatchError(
                    f"the recipe was made for {part} revision {expected}, but the server runs {actual}; its features "
                    "mean something else there",
                    reason="REVISION_MISMATCH",
                    metadata={"part": part, "expected": expected, "actual": actual},
                )

    def _as_dict(self, *, labels: bool) -> dict[str, Any]:
        edits: list[dict[str, Any]] = []
        for edit in self.edits:
            entry: dict[str, Any] = {"feature": edit.feature, "operation": edit.operation}
            if edit.operation != "ablate":
                entry["value"] = edit.value
            if edit.operation not in ("ablate", "scale"):
                entry["unit"] = edit.unit
            if labels and edit.label:
                entry["label"] = edit.label
            edits.append(entry)
        settings = {name: value for name, value in vars(self.settings).items() if value not in (None, ())}
        if self.settings.seeds:
            settings["seeds"] = list(self.settings.seeds)
        if self.settings.size is not None:
            settings["width"], settings["height"] = settings.pop("size")
        revisions = {part: getattr(self.revisions, part) for part in _PARTS if getattr(self.revisions, part)}
        recipe = {"format": FORMAT, "revisions": revisions, "edits": edits, "settings": settings}
        if labels and self.photo and self.settings.keep_layout is not None:
            recipe["photo"] = self.photo
        return recipe


def _read(data: Any) -> tuple[Recipe, str]:
    """A recipe, and the hash that stands beside it; empty without one."""
    top = _members(data, "", required=("format", "edits", "revisions"), optional=("settings", "photo", "hash"))
    carried = _typed(top.get("hash", ""), str, "hash", "a string")
    if top["format"] != FORMAT:
        raise _bad("format", f"{top['format']!r} is not {FORMAT!r}, the only format that this version reads")
    revisions = _members(top["revisions"], "revisions", optional=_PARTS)
    for part, revision in revisions.items():
        _typed(revision, str, f"revisions.{part}", "a string")
    edits = [_read_edit(entry, f"edits[{i}]") for i, entry in enumerate(_typed(top["edits"], list, "edits", "a list"))]
    sides = ("width", "height")
    names = [field.name for field in fields(Settings) if field.name != "size"]
    settings = _members(top.get("settings", {}), "settings", optional=(*names, *sides))
    given = {name: settings[name] for name in names if name in settings}
    if "seeds" in given:
        given["seeds"] = _typed(given["seeds"], list, "settings.seeds", "a list") or None
    if any(side in settings for side in sides):
        if not all(side in settings for side in sides):
            raise _bad("settings", "width and height go together; give both or neither")
        given["size"] = settings["width"], settings["height"]
    with _at("settings."):
        drawn = Settings.of(**given)
        check_strength(drawn)
    with _at(""):
        photo = _typed(top.get("photo", ""), str, "photo", "a string")
        return Recipe(tuple(edits), Revisions(**revisions), drawn, photo), carried


def _read_edit(data: Any, place: str) -> FeatureEdit:
    entry = _members(data, place, required=("feature", "operation"), optional=("value", "unit", "label"))
    index = entry["feature"]
    if not isinstance(index, int) or isinstance(index, bool):
        raise _bad(f"{place}.feature", f"{index!r} is not a feature's index")
    operation = entry["operation"]
    if operation != "ablate" and "value" not in entry:
        raise _bad(f"{place}.value", f"is missing; {operation!r} needs one")
    with _at(f"{place}."):
        return FeatureEdit(
            feature=index,
            operation=operation,
            value=entry.get("value", 0.0),
            unit=entry.get("unit", "scaled"),
            label=_typed(entry.get("label", ""), str, f"{place}.label", "a string"),
        )


def _members(
    data: Any, place: str, *, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    members: dict[str, Any] = _typed(data, dict, place, "an object")
    prefix = f"{place}." if place else ""
    for name in required:
        if name not in members:
            raise _bad(f"{prefix}{name}", "is missing")
    for name in members:
        if name not in required and name not in optional:
            known = ", ".join((*required, *optional))
            raise _bad(f"{prefix}{name}", f"is unknown; known are {known}")
    return members


def _typed(value: Any, kind: type, place: str, name: str) -> Any:
    if not isinstance(value, kind):
        raise _bad(place or "the file", f"is not {name}")
    return value


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Adds to a refusal where in the file the value is."""
    try:
        yield
    except InvalidRecipeError:
        raise
    except InvalidArgumentError as error:
        raise _bad(f"{place}{error.field}", error.description) from error


def _bad(place: str, description: str) -> InvalidRecipeError:
    return InvalidRecipeError(f"not a recipe: {place}: {description}", field=place, description=description)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise _bad(twice, "is given twice")
    return result


def _no_constant(name: str) -> Any:
    raise InvalidRecipeError(f"not a recipe: {name} is not a JSON number")


def _canonical(value: Any, indent: int = 0, level: int = 0) -> str:
    """JSON with sorted keys and RFC 8785's numbers; compact unless ``indent``."""
    if isinstance(value, dict | list):
        opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
        if isinstance(value, dict):
            colon = ": " if indent else ":"
            items = [f"{_canonical(key)}{colon}{_canonical(value[key], indent, level + 1)}" for key in sorted(value)]
        else:
            items = [_canonical(item, indent, level + 1) for item in value]
        if not items or not indent or all(isinstance(item, int) for item in value):
            return opening + (", " if indent else ",").join(items) + closing
        inner = "\n" + " " * (indent * (level + 1))
        return opening + inner + ("," + inner).join(items) + "\n" + " " * (indent * level) + closing
    if isinstance(value, float):
        return _number(value)
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    """A finite float as ECMAScript writes it (RFC 8785, section 3.2.2.3)."""
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    parts = Decimal(repr(abs(value))).normalize().as_tuple()
    digits, exponent = "".join(map(str, parts.digits)), int(parts.exponent)
    point = len(digits) + exponent
    if len(digits) <= point <= 21:
        return sign + digits + "0" * (point - len(digits))
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    mantissa = digits[0] + (f".{digits[1:]}" if len(digits) > 1 else "")
    return f"{sign}{mantissa}e{'+' if point > 0 else '-'}{abs(point - 1)}"
