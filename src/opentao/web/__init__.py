"""Pages that people work with in a browser: `label`."""
