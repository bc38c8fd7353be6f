"""Types and frozen data that both halves read: tasks, adaptations, mechanisms, built-in bases, recipes. No I/O."""
