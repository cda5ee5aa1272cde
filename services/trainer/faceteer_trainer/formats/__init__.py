"""SAEs in other projects' file formats, to ours and back."""
