"""State dicts: what one rank hands out, the consolidated form, and loading either."""
