"""Plain values: pictures, edits, reports, recipes, features. They convert themselves and make no call."""
