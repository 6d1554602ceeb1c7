"""The sides of a plan, made from a family's table: what exists, and what is to be written."""
