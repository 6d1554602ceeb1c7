"""Balanced stage grids: what each layer costs, and the layout whose slowest rank is fastest."""
