"""The plan of a conversion and its proof; integers and names, no files."""
