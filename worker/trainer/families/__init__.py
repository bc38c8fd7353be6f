"""What an architecture needs to be trained privately and exported as a plain model of its own."""
