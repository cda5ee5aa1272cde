"""What a shell offers for a feature that is being typed: labels of the running server, or nothing without one."""

from __future__ import annotations

import typer

import faceteer

# A shell waits for this at every press of the tab key.
_SECONDS = 1.0
_MOST = 30


def features(context: typer.Context, incomplete: str) -> list[str]:
    """Labels that go on from what was typed, the commonest first."""
    if "=" in incomplete:
        return []
    root = context.find_root()
    address = context.params.get("address") or root.params.get("address")
    typed = incomplete.casefold()
    try:
        with faceteer.connect(address, timeout=_SECONDS, retries=faceteer.Retries(attempts=1)) as client:
            if typed.strip():
                found = list(client.features.search(incomplete, limit=_MOST, labelled=True))
            else:
                found = list(client.features.list(order="firing_share", limit=_MOST, labelled=True))
    except faceteer.FaceteerError:
        return []
    labels = [feature.label for feature in found if feature.label.casefold().startswith(typed)]
    return list(dict.fromkeys(labels))
