"""Commands that print ratios side by side in one run: `make bench`. Results are recorded in RESULTS.md."""
