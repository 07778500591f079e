"""What a plain encoder is worth: tasks, measures and their uncertainty."""
