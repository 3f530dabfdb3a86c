"""What answers are worth beside the teacher's: every metric with its interval, a module a kind of task."""
