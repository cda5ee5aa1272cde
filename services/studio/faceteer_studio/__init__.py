"""The front door: opens pictures, edits them, transfers features; also the all-in-one process."""
