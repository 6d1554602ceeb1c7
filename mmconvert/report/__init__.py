"""Reports: pictures and pages as text, JSON forms, and the files that take them."""
