"""TRL image trainers beside our plans."""
