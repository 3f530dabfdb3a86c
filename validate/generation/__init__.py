"""What language models write: greedy text, continuations of prompts, tasks of the lm-evaluation-harness."""
