"""Where rooms are composed: one function a verb, and recipes that run several of them and resume."""
