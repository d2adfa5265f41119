"""Reports of a run: tables, pictures and one self-contained page, from the run folder's files alone."""
