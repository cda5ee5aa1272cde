"""The public surface: what is exported, that the blocking client is generated, and what an import costs."""

from __future__ import annotations

import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import faceteer
import pytest
from faceteer._transport import methods as calls
from faceteer.v1 import encoder_pb2, generator_pb2, library_pb2, sae_pb2, studio_pb2

ROOT = Path(__file__).parents[3]
PAIRS = [
    (faceteer.Client, faceteer.AsyncClient),
    (faceteer.Photo, faceteer.AsyncPhoto),
    (faceteer.Edit, faceteer.AsyncEdit),
    (faceteer.Feature, faceteer.AsyncFeature),
    (faceteer.FeatureLibrary, faceteer.AsyncFeatureLibrary),
    (faceteer.FeatureList, faceteer.AsyncFeatureList),
]


def public(kind: type) -> dict[str, Any]:
    return {name: value for name, value in inspect.getmembers(kind) if not name.startswith("_")}


def test_the_blocking_client_is_what_the_script_makes_of_the_asyncio_one() -> None:
    script = [sys.executable, str(ROOT / "clients" / "python" / "unasync.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_nothing_asynchronous_is_left_in_the_blocking_client() -> None:
    for path in (ROOT / "clients" / "python" / "faceteer" / "_sync").glob("*.py"):
        text = path.read_text()
        assert text.startswith("# Generated from "), path.name
        assert not re.findall(r"\basync\b|\bawait|import asyncio|Async|aiter|anext|coroutine", text), path.name


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS)
def test_every_public_member_is_documented(blocking: type, asynchronous: type) -> None:
    for kind in (blocking, asynchronous):
        for name, member in public(kind).items():
            assert inspect.getdoc(member), f"{kind.__name__}.{name}"


def test_all_names_every_public_thing_of_the_package_and_nothing_else() -> None:
    modules = {module.name for module in pkgutil.iter_modules(faceteer.__path__)}
    visible = {name for name in vars(faceteer) if not name.startswith("_") and name not in modules}
    assert visible - {"annotations"} == set(faceteer.__all__) - {"__version__"}
    assert faceteer.__all__ == sorted(faceteer.__all__)


def test_only_the_generated_code_and_the_command_line_are_public_modules() -> None:
    public_modules = {m.name for m in pkgutil.iter_modules(faceteer.__path__) if not m.name.startswith("_")}
    assert public_modules == {"v1", "cli"}


def test_public_classes_name_the_public_door_as_their_module() -> None:
    for name in faceteer.__all__:
        member = getattr(faceteer, name)
        if isinstance(member, type):
            assert member.__module__ == "faceteer", name


def test_every_error_stands_in_the_drawn_tree_and_is_exported() -> None:
    import faceteer._errors as errors

    def below(kind: type) -> set[str]:
        names = {kind.__name__}
        for child in kind.__subclasses__():
            names |= below(child)
        return names

    for name in below(faceteer.FaceteerError) - {"_WaitingHelps"}:
        assert name in (errors.__doc__ or ""), name
        assert name in faceteer.__all__, name


def test_the_table_ofmethods_agrees_with_the_contract() -> None:
    known = {}
    for module in (studio_pb2, encoder_pb2, sae_pb2, generator_pb2, library_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                known[f"/{service.full_name}/{method.name}"] = method.output_type.full_name
    methods = [value for value in vars(calls).values() if isinstance(value, calls.Method)]
    assert len(methods) > 10
    for method in methods:
        if method is calls.HEALTH_CHECK:
            continue
        assert known[method.path] == method.response.DESCRIPTOR.full_name


def test_the_health_check_has_the_bytes_of_the_standard_messages() -> None:
    from google.protobuf import wrappers_pb2
    from grpc_health.v1 import health_pb2

    ours, standard = wrappers_pb2.StringValue(value="a.B"), health_pb2.HealthCheckRequest(service="a.B")
    assert ours.SerializeToString() == standard.SerializeToString()
    answer = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
    assert calls.HEALTH_CHECK.response.FromString(answer.SerializeToString()) == wrappers_pb2.UInt32Value(value=2)


def test_the_version_is_the_distributions() -> None:
    assert faceteer.__version__ == importlib.metadata.version("faceteer")


def test_importing_the_sdk_loads_no_torch_and_none_of_the_command_line() -> None:
    code = (
        "import sys, faceteer; "
        "heavy = {'torch', 'rich', 'typer', 'click', 'faceteer_runtime', 'grpc_status'}; "
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
