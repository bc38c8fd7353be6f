"""One file for each way to make an export. A maker writes into a folder, reloads it there, and returns what answers."""
