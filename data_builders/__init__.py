"""Builders of preference data: models generate candidates, models judge them, best and worst make pairs."""
