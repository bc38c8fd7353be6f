"""Privacy budgets: limits on what all jobs on some data may spend, and the append-only ledger of what they did."""
