"""Fine-tuning jobs: planned, admitted to their budgets, claimed under a lease with a fence, settled once."""
