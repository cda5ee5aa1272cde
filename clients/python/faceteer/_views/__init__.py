"""What people see: values as HTML, and progress on a terminal. Importing it registers the views."""

from faceteer._views import features, photos, server

__all__ = ["features", "photos", "server"]
