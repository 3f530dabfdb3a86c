"""What is written down and read back: the report with all that it is made of, profiles, bisections, sensitivity."""
