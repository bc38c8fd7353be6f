"""Models: bases to start from, and what jobs made of them, to be downloaded."""
