"""What the field asks of a spoken dialogue model, as numbers: tasks, judges, statistics."""
