"""Exports: a model in other forms, made by a worker from released weights, checked, downloaded, deleted."""
