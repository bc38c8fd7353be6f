"""Big files in parts, which a client may send again or side by side; once complete, each is a file like any other."""
