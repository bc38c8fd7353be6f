"""The service: HTTP, SQL, storage, budgets and queues. It never imports torch."""
