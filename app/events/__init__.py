"""The history of each job: what a user may see of it, in order."""
