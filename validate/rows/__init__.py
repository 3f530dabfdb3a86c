"""Rows beside the validation rows: pairs from files, rows with mistakes put in, prompts from templates."""
