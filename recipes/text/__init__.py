"""Text that ships with limbeck: public domain and CC BY, credited in CREDITS.md."""
