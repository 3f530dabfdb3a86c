"""On which step from teacher to program quality was lost, and in which module a program parts from its student."""
