"""Which parameters an adaptation trains, and how it is undone into a plain model."""
