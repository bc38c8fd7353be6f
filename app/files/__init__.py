"""Datasets: uploads, their checking in a process of their own, and the canonical rows that jobs read."""
