"""The contract over HTTP, for everything that does not speak gRPC, and the web page."""
