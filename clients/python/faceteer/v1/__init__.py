"""The contract: messages and stubs generated from protos/faceteer/v1. Never edited by hand."""
