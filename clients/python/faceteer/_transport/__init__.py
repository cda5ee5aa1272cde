"""How calls travel: the channel of each kind, the calls by name, what their failures mean, and when to try again."""
