"""Exports: a finished model in other forms, each checked in the runtime that it is made for. Torch, no network."""
