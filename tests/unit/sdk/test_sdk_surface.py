"""The public surface: what is exported, that both clients have the same, and what an import costs."""

from __future__ import annotations

import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys
from typing import Any

import faceteer
import pytest
from faceteer import _methods, _server
from faceteer.v1 import encoder_pb2, generator_pb2, library_pb2, sae_pb2, studio_pb2

PAIRS = [
    (faceteer.Client, faceteer.AsyncClient),
    (faceteer.Photo, faceteer.AsyncPhoto),
    (faceteer.Edit, faceteer.AsyncEdit),
    (faceteer.Feature, faceteer.AsyncFeature),
    (faceteer.FeatureLibrary, faceteer.AsyncFeatureLibrary),
    (faceteer.FeatureList, faceteer.AsyncFeatureList),
]
MAKES_NO_CALL = {
    "Client": {"address", "features"},
    "Photo": {"edit", "save_html"},
    "Edit": {"set", "add", "scale", "ablate", "switch", "extend", "without", "using", "save_html"},
    "Feature": {"to_dict"},
    "FeatureList": {name for name in dir(list) if not name.startswith("_")},
}


def public(kind: type) -> dict[str, Any]:
    return {name: value for name, value in inspect.getmembers(kind) if not name.startswith("_")}


def normalised(signature: inspect.Signature) -> str:
    """A signature without what must differ: the Async prefixes, and iterators and iterables being async."""
    text = re.sub(r"\bAsync(?=[A-Z])", "", str(signature))
    return text.replace("Iterable[Picture] | Iterable[Picture]", "Iterable[Picture]")


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS)
def test_both_clients_have_the_same_public_members_with_the_same_signatures(blocking: type, asynchronous: type) -> None:
    ours, theirs = public(blocking), public(asynchronous)
    assert ours.keys() == theirs.keys()
    for name, member in ours.items():
        other = theirs[name]
        assert type(member) is type(other), name
        if callable(member):
            assert normalised(inspect.signature(member)) == normalised(inspect.signature(other)), name


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS)
def test_a_call_of_the_blocking_client_is_a_coroutine_or_an_async_iterator_of_the_other(
    blocking: type, asynchronous: type
) -> None:
    for name, member in public(asynchronous).items():
        if not inspect.isfunction(member) or name in MAKES_NO_CALL.get(blocking.__name__, set()):
            continue
        returns = str(inspect.signature(member).return_annotation)
        assert inspect.iscoroutinefunction(member) or returns.startswith("AsyncIterator"), name
        assert not inspect.iscoroutinefunction(public(blocking)[name]), name


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS)
def test_every_public_member_is_documented_alike(blocking: type, asynchronous: type) -> None:
    for name, member in public(blocking).items():
        assert inspect.getdoc(member), f"{blocking.__name__}.{name}"
        assert inspect.getdoc(public(asynchronous)[name]), f"{asynchronous.__name__}.{name}"


def test_connect_and_connect_async_take_the_same_arguments() -> None:
    ours, theirs = inspect.signature(faceteer.connect), inspect.signature(faceteer.connect_async)
    assert normalised(ours) == normalised(theirs)


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


def test_the_table_of_methods_agrees_with_the_contract() -> None:
    known = {}
    for module in (studio_pb2, encoder_pb2, sae_pb2, generator_pb2, library_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                known[f"/{service.full_name}/{method.name}"] = method.output_type.full_name
    methods = [value for value in vars(_methods).values() if isinstance(value, _methods.Method)]
    assert len(methods) > 10
    for method in methods:
        assert known[method.path] == method.response.DESCRIPTOR.full_name


def test_the_health_check_has_the_bytes_of_the_standard_messages() -> None:
    from google.protobuf import wrappers_pb2
    from grpc_health.v1 import health_pb2

    ours, standard = wrappers_pb2.StringValue(value="a.B"), health_pb2.HealthCheckRequest(service="a.B")
    assert ours.SerializeToString() == standard.SerializeToString()
    answer = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
    assert _server._HEALTH_CHECK.response.FromString(answer.SerializeToString()) == wrappers_pb2.UInt32Value(value=2)


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
