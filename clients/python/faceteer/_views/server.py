"""What a server runs, as HTML."""

from __future__ import annotations

from faceteer._models.server import ServerStatus
from faceteer._models.shown import html_of
from faceteer._views.html import Markup, chip, dim, table, text, view


@html_of.register
def _status_view(status: ServerStatus, *, page: bool) -> str:
    head = Markup(f'<div class="ft-head"><h3>{text(status.address)}</h3></div>')
    rows = [
        [service, chip(state, kind="ft-solid" if state == "serving" else "ft-warn"), runs, revision]
        for service, state, revision, runs in status.rows()
    ]
    trouble = [Markup(f'<p class="ft-warning">{text(reason)}</p>') for reason in status.down.values()]
    trouble += [dim(sentence) for sentence in status.consequences()]
    services = table(("service", "health", "runs", "revision"), rows, left=4)
    return view(status.address, [head, dim(status.title()), services, *trouble], page=page)
