"""What a task type is to the trainer: rows in, batches, a loss per record, predictions."""
