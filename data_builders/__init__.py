"""Builders of preference data: models draw candidates, models judge them, best and worst make pairs."""
